"""World-model steps over static memory: on CUDA forward, backward, clipping and Adam are one captured graph.

The host only copies a batch into the static windows before each replay; loss terms go to a ring on the device. A step
whose gradient is not finite changes nothing, and is reported when the ring is read.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from pwm_fast.learning.pretraining import Pretraining, Windows
from pwm_fast.profiling import span

WARM_UP = 3
RING = 256


class PretrainingGraph:
    """Runs the steps of a `Pretraining`, whose model, optimiser and step count stay its own.

    Its state may be loaded between calls. All batches must have one shape. `ring` is how many steps' terms fit on the
    device. Elsewhere than on CUDA the same steps run operation by operation.
    """

    def __init__(self, learner: Pretraining, ring: int = RING):
        if ring < 1:
            raise ValueError(f"ring must be >= 1, got {ring}")
        self.learner, self.ring = learner, ring
        device = learner.model.obs_mean.device
        self._cuda = device.type == "cuda"
        self._step_count = torch.zeros((), dtype=torch.float64, device=device)
        self._slot = torch.zeros((), dtype=torch.int64, device=device)
        self._names: list[str] = []
        self._rows: Tensor | None = None  # [ring, terms]
        self._windows: Windows | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, steps: int) -> dict[str, Tensor]:
        """`steps` gradient steps; the loss terms and gradient norms [steps] on the CPU.

        Raises FloatingPointError, naming the first step, where a gradient was not finite.
        """
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        parts = []
        for start in range(0, steps, self.ring):
            first, number = self.learner.step_count, min(self.ring, steps - start)
            self.advance(number)
            assert self._rows is not None
            rows = self._rows[:number].to("cpu", copy=True)
            broken = (~torch.isfinite(rows[:, -1])).nonzero()
            if len(broken):
                at = int(broken[0, 0])
                raise FloatingPointError(self.learner.broken(rows[at, -1].item(), first + at))
            parts.append(rows)
        joined = torch.cat(parts)
        return {name: joined[:, i] for i, name in enumerate(self._names)}

    def advance(self, steps: int) -> None:
        """At most `ring` steps, launched without waiting for any of them."""
        if not 1 <= steps <= self.ring:
            raise ValueError(f"steps must be 1 to {self.ring}, which is the ring's length, got {steps}")
        learner = self.learner
        self._step_count.fill_(learner.step_count)
        self._stage(learner.batch(learner.step_count))
        if self._cuda and self._graph is None:
            self._capture()
        self._slot.zero_()
        for i in range(steps):
            if i:
                self._stage(learner.batch(learner.step_count))
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            learner.step_count += 1

    @span("data")
    def _stage(self, batch: Windows) -> None:
        if self._windows is None:
            self._windows = batch.map(lambda value: value.to(self._slot.device, copy=True))
            return
        for field in fields(Windows):
            place, value = getattr(self._windows, field.name), getattr(batch, field.name)
            if (place is None) != (value is None) or (place is not None and place.shape != value.shape):
                raise ValueError(f"all batches must have one shape; {field.name} changed")
            if place is None:
                continue
            if self._cuda and value.device.type == "cpu":
                # torch keeps page-locked memory of its own until the device has read it: the host need not wait, and
                # the batch's may be written again
                value = torch.empty_like(place, device="cpu", pin_memory=True).copy_(value)
            place.copy_(value, non_blocking=True)

    def _step(self) -> None:
        learner, c = self.learner, self.learner.config
        assert self._windows is not None
        start = (1.0 - c.decay_fraction) * c.steps  # `Pretraining.learning_rate`, on the device
        progress = ((self._step_count - start) / max(c.steps - start, 1.0)).clamp(0.0, 1.0)
        rate = c.learning_rate * (1.0 + (c.final_lr_scale - 1.0) * progress)
        with span("world model"):
            terms, norm = learner.gradients(self._windows)
        with span("world model update"):
            learner.update(rate, norm)
        values = torch.stack([*terms.values(), norm]).detach()
        if self._rows is None:
            self._names, self._rows = [*terms, "grad_norm"], values.new_zeros(self.ring, len(values))
        self._rows.index_copy_(0, self._slot.view(1), values[None])
        self._slot += 1
        self._step_count += 1

    def _capture(self) -> None:
        """Warm up on a stream of its own, take the warm-up back, capture."""
        learner = self.learner
        before = learner.state_dict()
        before["model"] = {k: v.clone() for k, v in before["model"].items()}
        with torch.cuda.device(self._slot.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._slot.zero_()
                    self._step()
                learner.load_state_dict(before)
                self._step_count.fill_(learner.step_count)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        self._graph = graph
