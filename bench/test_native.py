"""The native matrix products against torch's and against what the core can do, shape by shape of extraction; those in
bfloat16 against float32; the gradient step on them against plain autograd, against the explicit step on torch's
products, and under torch.compile.

    pytest bench/test_native.py -s                  # products, and steps without torch.compile
    pytest bench/test_native.py -s -m slow          # torch.compile: minutes of warm-up

Where a step's time goes on one Zen 3 core (AVX2, 103 GFLOP/s in registers; perf, samples of the step alone):

    of the step            1M     5M    48M
    innermost products    63%    73%    80%
    copies of operands     7%     5%     3%
    their panels, ahead    2%     2%     3%    (6% when every tile divided)
    LayerNorm with Mish   11%     6%     4%
    Adam and norms         4%     4%     2%
    Python and torch       9%     5%     4%    (14% and 6% at 1M and 48M with calls per minibatch)

The innermost product alone, operands in the first-level cache, runs at 99% of the peak; in a step it waits for the
second and third levels and reaches 80 to 88%. The ceiling, all products at the peak and all else free, is the ratio
that bench/test_extraction.py prints beside each size: 5.4 at 1M, 3.7 at 5M, 3.3 at 48M. Ratios of 5 and 4.5 in float32
need fewer multiplications, not faster ones.

In quiet moments products of 64 rows on packed weights reach 83 to 91% of the peak, of 256 rows 87 to 94%; with other
work on the machine's caches 71 to 91% and 75 to 86%, torch always less. What misses 90%: 64 rows on weights of
megabytes, each of which comes from the third level or from memory for 11 tiles; and operands that are copied for one
product (actors' weights, gradients by weights). Reading A's rows where they lie, without a copy, was slower: 0.90 to
0.99 of the speed, six streams for one. Asking for B's next panel in small shares throughout a tile, as with AVX-512,
instead of before each tile: 1.02 to 1.05 of the speed at 64 rows of 48M's weights, 0.97 to 0.99 where weights are in
the caches.

bf16 on AVX2 saves memory and no multiplication: products at 0.97 to 1.02 of float32's speed, 1.13 where the caches are
contended. In a step that is nothing to speak of: 0.92 to 1.16 in the part on the world model (1M, 5M, 48M), with other
work on the machine, and 0.95 to 1.09 in the critics' part, which is the same.

On an Intel core with AVX-512 (230 GFLOP/s at other work's side, 250 without; 2 MB of second-level cache) products of 64
rows on packed weights reach 73 to 90%, of 1024 rows 60 to 96%, critics' products 70 to 82%: 1.17 to 1.35, 0.96 to 1.02
and 0.92 to 1.16 of MKL's speed, which wins input gradients. bf16 as floats made of pairs: 0.84 to 0.99 of float32's
speed; as pairs by dpbf16ps, which takes more than twice a multiply-add's time there, 0.55 to 0.59.

With AMX (the same core, 3400 to 3800 GFLOP/s in tiles of bfloat16, a sixth of it for float32) products of 64 rows on
packed weights reach 91 to 122% of the multiply-adds' peak, of 1024 rows 99 to 167%, critics' products 88 to 128%, 1.3
to 1.9 times MKL's speed; bf16 1.8 to 3.3 times that. What keeps them from a sixth of the tiles' peak, 240%: a float32
weight is 6 bytes there, and 64 rows on weights beyond 2 MB take as long as the third level gives them, 13 to 15 GB/s
to tile loads where plain loads have 28; factors that are split for one product; tiles from the second level (0.8 of
the speed from the first). Asking for tiles ahead helped where many rows share a panel only; making the next panel's
tiles between the products did not.

The peak is a loop of multiply-adds in registers, timed in turn with the products: on a shared core it moves with them.
Times are CPU seconds of this thread. `best` is the fastest of many calls; `mean`, over all of them, includes what other
work on the core takes from both. Every product is compared with float64 before its speed counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from test_extraction import (
    MIN_COSINE,
    NaiveExtraction,
    actor_gradient_cosine,
    batch,
    cpu_seconds,
    make_world_model,
)

from pwm_fast import backend
from pwm_fast.kernels import gemm, linear
from pwm_fast.learning.extraction import PRESETS, Extraction
from pwm_fast.learning.precision import check_precision

pytestmark = [
    pytest.mark.skipif(backend.native is None, reason=f"no native module: {backend.native_reason}"),
    pytest.mark.timeout(0),
]
CRITICS = [(256, 512, 400), (256, 768, 400), (256, 400, 200)]  # rows, inputs, outputs of three critics at 5M and 48M
FROZEN = [(64, 512, 512), (64, 518, 512), (64, 512, 518), (64, 1792, 1792), (64, 774, 1792), (1024, 512, 512),
          (1024, 512, 101), (1024, 1792, 1792)]  # fmt: skip
STEPS = {"1M": 3, "5M": 2, "48M": 1}  # steps of each kind in a round
ROUNDS = 100_000  # of the peak's loop, some 0.2 ms
SECONDS = 0.4  # of CPU time for all calls of one row of the table


def times(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """CPU seconds of each call, taken in turn until `SECONDS` are spent."""
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    stop = time.thread_time() + SECONDS
    while time.thread_time() < stop or len(found[0]) < 5:
        for call, mine in zip(calls, found):
            start = time.thread_time()
            call()
            mine.append(time.thread_time() - start)
    return found


def report(
    name: str, flop: float, native: Callable[[], object], library: Callable[[], object], other: str = "torch"
) -> float:
    """Prints GFLOP/s of both and their share of the core's peak; returns the ratio of the best times."""
    peak_flop = backend.native.gemm_peak(ROUNDS)[0]
    ours, theirs, loop = times([native, library, lambda: backend.native.gemm_peak(ROUNDS)])

    def rates(seconds: list[float], work: float) -> tuple[float, float]:
        return work / min(seconds) / 1e9, work * len(seconds) / sum(seconds) / 1e9

    (best, mean), (torch_best, torch_mean), (peak, peak_mean) = (
        rates(ours, flop),
        rates(theirs, flop),
        rates(loop, peak_flop),
    )
    print(
        f"\n  {name:26s} best {best:6.1f} of {peak:.1f} GFLOP/s ({best / peak:4.0%}), {other} {torch_best:6.1f}; "
        f"mean {mean:6.1f} of {peak_mean:.1f} ({mean / peak_mean:4.0%}), {other} {torch_mean:6.1f}; "
        f"ratio {best / torch_best:.2f}, {mean / torch_mean:.2f} ({backend.native.isa()})",
        end="",
    )
    return best / torch_best


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), CRITICS)
def test_grouped_products(rows: int, inputs: int, outputs: int, library: str, record_property: Callable) -> None:
    """Forward, input gradient and weight gradient of three critics; the first layer's rows are shared."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(1, rows, inputs), torch.randn(3, outputs, inputs), torch.randn(3, rows, outputs)
    bias, y, dx, dw = (
        torch.randn(3, outputs),
        torch.empty_like(dy),
        torch.empty(3, rows, inputs),
        torch.empty_like(weight),
    )
    wide_x, wide_w, wide_dy = x.double(), weight.double(), dy.double()
    cases = {
        "forward": (
            lambda b: linear.forward(x, weight, bias, out=y, backend=b),
            wide_x @ wide_w.mT + bias.double()[:, None],
        ),
        "input gradient": (lambda b: linear.input_grad(dy, weight, out=dx, backend=b), wide_dy @ wide_w),
        "weight gradient": (lambda b: linear.weight_grad(dy, x, out=dw, backend=b), wide_dy.mT @ wide_x),
    }
    switch = linear.fast_matmul() if library == "oneDNN" else None
    if switch is not None and not switch.active:
        pytest.skip(switch.reason)
    try:
        print(f"\n  3 x {rows} x {inputs} -> {outputs}, torch on {library}", end="")
        for name, (product, exact) in cases.items():
            assert relative_error(product("native"), exact) < 1e-6
            flop, ours, torchs = 6.0 * rows * inputs * outputs, partial(product, "native"), partial(product, "torch")
            ratio = report(name, flop, ours, torchs)
            record_property(f"{name}_{rows}x{inputs}x{outputs}_{library}_ratio", ratio)
    finally:
        if switch is not None:
            switch.restore()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), FROZEN)
def test_packed_weights(rows: int, inputs: int, outputs: int, record_property: Callable) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    y = torch.empty(rows, outputs)
    packed = gemm.pack(weight, backend="native")
    assert packed is not None
    assert relative_error(packed.product(x, bias, out=y), x.double() @ weight.double().T + bias.double()) < 1e-6
    with linear.fast_matmul():
        name, flop = f"packed {rows}x{inputs}->{outputs}", 2.0 * rows * inputs * outputs
        torchs = partial(torch.addmm, bias, x, weight.T, out=y)
        ratio = report(name, flop, partial(packed.product, x, bias, out=y), torchs)
    record_property(f"packed_{rows}x{inputs}x{outputs}_ratio", ratio)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), FROZEN)
def test_packed_weights_in_bf16(rows: int, inputs: int, outputs: int, record_property: Callable) -> None:
    torch.manual_seed(0)
    x, weight, y = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.empty(rows, outputs)
    low, packed = (gemm.pack(weight, backend="native", bf16=bf16) for bf16 in (True, False))
    assert low is not None and packed is not None
    assert relative_error(low.product(x, out=y), x.bfloat16().double() @ weight.bfloat16().double().T) < 1e-6
    name, flop = f"bf16 {rows}x{inputs}->{outputs}", 2.0 * rows * inputs * outputs
    ratio = report(name, flop, partial(low.product, x, out=y), partial(packed.product, x, out=y), "fp32")
    record_property(f"bf16_{rows}x{inputs}x{outputs}_ratio", ratio)


def forced(monkeypatch: pytest.MonkeyPatch, name: str, step: Callable[[], object]) -> Callable[[], object]:
    """The step with its backend forced while it runs."""

    def run() -> None:
        with monkeypatch.context() as patch:
            patch.setenv(backend.VARIABLE, name)
            step()

    return run


def wall_seconds(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", STEPS)
def test_steps(size: str, threads: int, monkeypatch: pytest.MonkeyPatch, record_property: Callable) -> None:
    """The step of `published-code` on native products in every precision, on torch's, and as plain autograd.

    CPU seconds on one thread; on two the time of day, which other work on the machine lengthens.
    """
    assert actor_gradient_cosine(size, "published-code") > MIN_COSINE
    model, preset = make_world_model(size), PRESETS["published-code"]
    native, eager = (Extraction(model, preset, task_ids=[3]) for _ in range(2))
    naive, (obs, noise) = NaiveExtraction(model, native), batch()
    lower = [precision for precision in backend.cpu_precisions() if precision != "fp32"]
    cosines = {name: check_precision(model, preset, obs, name, torch.tensor([3])) for name in lower}
    steps = {
        "autograd": lambda: naive.step(obs[0], noise[0]),
        "torch": forced(monkeypatch, "torch", lambda: eager.step(obs)),
        "native": forced(monkeypatch, "native", lambda: native.step(obs)),
    }
    for name in lower:
        low = Extraction(model, preset, task_ids=[3], precision=name)
        steps[name] = forced(monkeypatch, "native", partial(low.step, obs))
    measure, before = cpu_seconds if threads == 1 else wall_seconds, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounds = [{name: measure(step, STEPS[size]) for name, step in steps.items()} for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    best = {name: min(r[name] for r in rounds) for name in steps}
    ratios = "; ".join(
        f"{name} {1e3 * seconds:.0f} ms, ratio {best['autograd'] / seconds:.2f}"
        + (f", gradient cosine {cosines[name]:.6f}" if name in cosines else "")
        for name, seconds in best.items()
    )
    print(f"\n  step at {size}, {threads} threads ({backend.native.isa()}): {ratios}", end="")
    for name, seconds in best.items():
        record_property(f"{size}_{threads}_{name}_ms", 1e3 * seconds)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", STEPS)
def test_rollout_in_one_call(size: str, threads: int, record_property: Callable) -> None:
    """Steps of `published-code` whose recurrence is one native call each way, against those step by step.

    CPU seconds of all threads, those included that torch's keep waiting between its operations.
    """
    assert actor_gradient_cosine(size, "published-code") > MIN_COSINE
    model, preset = make_world_model(size), PRESETS["published-code"]
    at_once, loops = (Extraction(model, preset, task_ids=[3]) for _ in range(2))
    loops.imagination._native.available = lambda *_: False
    obs, _ = batch()

    def half(ext: Extraction) -> None:
        with torch.no_grad(), ext.arithmetic():
            ext.update_actor(ext.imagination.rollout(ext.actor, obs, ext.action_noise(ext.iteration)))

    steps = {
        "step by step": partial(loops.step, obs), "one call": partial(at_once.step, obs),
        "actors, step by step": partial(half, loops), "actors, one call": partial(half, at_once),
    }  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounds = [{name: cpu_seconds(step, STEPS[size]) for name, step in steps.items()} for _ in range(6)]
    finally:
        torch.set_num_threads(before)
    best = {name: min(r[name] for r in rounds) for name in steps}
    whole, actors = best["step by step"] / best["one call"], best["actors, step by step"] / best["actors, one call"]
    print(
        f"\n  rollout in one call at {size}, {threads} threads: step {1e3 * best['one call']:.0f} ms, ratio {whole:.2f}"
        f", actors' half {1e3 * best['actors, one call']:.0f} ms, ratio {actors:.2f}",
        end="",
    )
    record_property(f"{size}_{threads}_rollout_step_ratio", whole)
    record_property(f"{size}_{threads}_rollout_actors_ratio", actors)


@pytest.mark.slow
@pytest.mark.parametrize("size", STEPS)
def test_compiled_step(size: str, record_property: Callable) -> None:
    """The published form with its networks under torch.compile, against the same without, and against the native step.

    Warm-up is reported. The whole step as one compiled function is no rival: H unrolled steps and 32 of the critics did
    not come out of the compiler within 25 minutes.
    """
    model, preset = make_world_model(size), PRESETS["published-code"]
    native = Extraction(model, preset, task_ids=[3])
    (compiled, plain), (obs, noise) = (NaiveExtraction(model, native) for _ in range(2)), batch()
    for part, names in ((compiled.world, ("encode", "next", "reward")), (compiled, ("actor", "values"))):
        for name in names:
            setattr(part, name, torch.compile(getattr(part, name)))
    start = time.perf_counter()
    losses = compiled.step(obs[0], noise[0])
    warm_up = time.perf_counter() - start
    expected = plain.step(obs[0], noise[0])
    assert losses["actor_loss"] == pytest.approx(expected["actor_loss"], rel=1e-4)
    assert losses["actor_grad_norm"] == pytest.approx(expected["actor_grad_norm"], rel=1e-3)
    steps = {
        "autograd": lambda: plain.step(obs[0], noise[0]),
        "compiled": lambda: compiled.step(obs[0], noise[0]),
        "native": lambda: native.step(obs),
    }
    rounds = [{name: cpu_seconds(step, STEPS[size]) for name, step in steps.items()} for _ in range(4)]
    best = {name: min(r[name] for r in rounds) for name in steps}
    print(
        f"\n  step at {size}: autograd {1e3 * best['autograd']:.0f} ms; compiled {1e3 * best['compiled']:.0f} ms after "
        f"{warm_up:.0f} s of warm-up, ratio {best['autograd'] / best['compiled']:.2f}; native "
        f"{1e3 * best['native']:.0f} ms, ratio {best['autograd'] / best['native']:.2f}",
        end="",
    )
    record_property(f"{size}_compiled_ratio", best["compiled"] / best["native"])
