"""Clipping and Adam per policy, against torch's own for each policy alone."""

import pytest
import torch
from closeness import relative_error

from pwm_fast.kernels import clip_adam

BETAS = (0.7, 0.95)


class State:
    """Parameters, moments, learning rates and step counts of `policies` policies."""

    def __init__(self, policies: int, size: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(size)
        self.param = torch.randn(policies, size, generator=generator, dtype=torch.float64).to(dtype)
        self.m, self.v = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.lr = torch.linspace(0.01, 0.03, policies, dtype=dtype)
        self.step = torch.zeros(policies, dtype=torch.int64)

    def update(self, grad: torch.Tensor, **options: object) -> torch.Tensor:
        return clip_adam.step(self.param, grad, self.m, self.v, self.lr, self.step, 1.0, BETAS, **options)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.param, self.m, self.v, self.step


def gradients(policies: int, size: int, steps: int) -> list[torch.Tensor]:
    """float64 [policies, size] per step, with norms below and above the limit of 1."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-1, 1, policies, dtype=torch.float64)[:, None] / size**0.5
    return [torch.randn(policies, size, generator=generator, dtype=torch.float64) * scale for _ in range(steps)]


def torch_adam(state: State, grads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters [P, n] and the last norms [P] from torch.optim.Adam, one policy at a time."""
    params, norms = [], []
    for policy, start in enumerate(state.param):
        param = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([param], lr=float(state.lr[policy]), betas=BETAS)
        for grad in grads:
            param.grad = grad[policy].clone()
            norm = torch.nn.utils.clip_grad_norm_([param], 1.0)
            optimizer.step()
        params.append(param.detach())
        norms.append(norm)
    return torch.stack(params), torch.stack(norms)


@pytest.mark.parametrize("size", [1, 7, 1023])
def test_definition_is_torch_adam_per_policy(size: int) -> None:
    grads = gradients(3, size, 5)
    state = State(3, size, torch.float64)
    expected, norm = torch_adam(state, grads)
    for grad in grads:
        last = state.update(grad)
    assert relative_error(state.param, expected) < 1e-13
    assert relative_error(last, norm) < 1e-13
    assert state.step.tolist() == [5, 5, 5]


@pytest.mark.parametrize("size", [1, 7, 101, 40_001])
def test_native_matches_definition(size: int, isa: str) -> None:
    grads = [grad.float() for grad in gradients(3, size, 5)]
    state, exact = State(3, size, torch.float32), State(3, size, torch.float64)
    exact.param, exact.lr = state.param.double(), state.lr.double()
    start = exact.param.clone()
    for grad in grads:
        norm, exact_norm = state.update(grad, backend="native"), exact.update(grad.double())
        assert relative_error(norm, exact_norm) < 1e-6
    assert relative_error(state.m, exact.m) < 1e-6
    assert relative_error(state.v, exact.v) < 1e-6
    # The parameters' own rounding, about 1e-7 of their size five times, over changes of a hundredth of it.
    assert relative_error(state.param - start, exact.param - start) < 2e-5


def test_result_does_not_depend_on_threads(isa: str) -> None:
    grads = [grad.float() for grad in gradients(2, 70_001, 2)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        state = State(2, 70_001, torch.float32)
        norms = [state.update(grad, backend="native") for grad in grads]
        results.append((*norms, *state.tensors()))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_gradient_stops_its_policy_only(backend: str, bad: float, isa: str) -> None:
    (grad,) = gradients(3, 101, 1)
    grad = grad.float()
    state, reference = State(3, 101, torch.float32), State(3, 101, torch.float32)
    reference.update(grad, backend=backend)
    before = state.param.clone()
    grad[1, 40] = bad
    norm = state.update(grad, backend=backend)
    assert norm.isfinite().tolist() == [True, False, True]
    assert torch.equal(state.param[1], before[1])
    assert state.step.tolist() == [1, 0, 1]
    assert torch.equal(state.param[[0, 2]], reference.param[[0, 2]])


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_inactive_policies_keep_everything(backend: str, isa: str) -> None:
    (grad,) = gradients(3, 33, 1)
    state = State(3, 33, torch.float32)
    before = [t.clone() for t in state.tensors()]
    norm = state.update(grad.float(), active=torch.tensor([True, False, True]), backend=backend)
    assert norm.isfinite().all()
    for now, then in zip(state.tensors(), before, strict=True):
        assert torch.equal(now[1], then[1])
        assert not torch.equal(now[0], then[0])


def test_infinite_limit_does_not_clip() -> None:
    grad = torch.full((1, 4), 100.0)
    state = State(1, 4, torch.float32)
    clip_adam.step(state.param, grad, state.m, state.v, state.lr, state.step, float("inf"), BETAS)
    assert torch.allclose(state.m, 0.3 * grad)


def test_wrong_arguments_are_named() -> None:
    state = State(2, 5, torch.float32)
    with pytest.raises(ValueError, match=r"grad must have the parameters' shape \(2, 5\), got \(2, 4\)"):
        state.update(torch.zeros(2, 4))
    state.step = state.step.float()
    with pytest.raises(ValueError, match=r"step must be torch.int64 \[2\]"):
        state.update(torch.zeros(2, 5))
