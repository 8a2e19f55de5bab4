"""Gradient steps over static memory: on CUDA one captured graph per step, replayed many times per Python call.

The graph holds all of a step: start states, noise, rollout, rewards and values, backward, clip, Adam, TD(lambda)
targets, the critics' epochs, and metrics into a ring on the device. What changes from step to step (iteration, learning
rate, schedule, random numbers, world-model weights) lies in tensors, so nothing is captured twice. Without a GPU the
same steps run operation by operation on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import CriticRows, Extraction
from pwm_fast.learning.imagination import Rollout
from pwm_fast.learning.persistent import use_persistent_kernels
from pwm_fast.learning.step_inputs import StagedTrajectories, StartTable, StepInputs
from pwm_fast.models.workspace import Workspace
from pwm_fast.profiling import span

WARM_UP = 3  # steps before a capture: cuBLAS, Triton and the workspaces allocate and compile in them
RING = 256


class StepGraph:
    """Runs the gradient steps of an `Extraction`, whose state stays where it is and stays its own.

    State dicts, world models, schedules and snapshots may be loaded into the extraction between calls; the next call
    goes on from there. `ring` is how many steps' metrics fit on the device. Raises RuntimeError for an execution that
    cannot run here, ValueError for one that does not go with `inputs`.
    """

    def __init__(
        self, extraction: Extraction, inputs: StepInputs, execution: ExecutionConfig | None = None, ring: int = RING
    ):
        if ring < 1:
            raise ValueError(f"ring must be >= 1, got {ring}")
        along = isinstance(inputs, StagedTrajectories)
        self.execution = execution or ExecutionConfig(overlap=not along, precision=extraction.precision)
        self.execution.check()
        if self.execution.precision != extraction.precision:
            raise ValueError(
                f"the extraction was made with precision {extraction.precision}, the execution asks for "
                f"{self.execution.precision}: give both the same"
            )
        if along and self.execution.overlap:
            raise ValueError(
                "overlap needs start states: a step along real trajectories waits for practice with the policy of the "
                "step before; set overlap=False"
            )
        if self.execution.persistent:
            use_persistent_kernels(extraction, beside=self.execution.overlap)
        self.extraction, self.inputs, self.ring = extraction, inputs, ring
        device = extraction.iteration.device
        self._cuda = device.type == "cuda"
        self._slot = torch.zeros((), dtype=torch.int64, device=device)
        self._names: list[str] = []
        self._rows: Tensor | None = None  # [ring, metrics, P]
        self._filled = 0
        self._pending: Rollout | None = None
        self._workspace = Workspace()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._first: torch.cuda.CUDAGraph | None = None  # the rollout before the first overlapped step of a call
        self._side: torch.cuda.Stream | None = None

    def run(self, steps: int, feed: Callable[[int], Any] | None = None) -> dict[str, Tensor]:
        """`steps` gradient steps; metrics [steps, P] on the CPU. `feed` as of `advance`."""
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        parts = []
        for start in range(0, steps, self.ring):
            self.advance(min(self.ring, steps - start), None if feed is None else partial(_later, feed, start))
            parts.append(self.metrics())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def advance(self, steps: int, feed: Callable[[int], Any] | None = None) -> None:
        """At most `ring` gradient steps, launched without waiting for any of them.

        `feed(i)` gives the i-th step's staged inputs; a `StartTable` needs none.
        """
        if not 1 <= steps <= self.ring:
            raise ValueError(f"steps must be 1 to {self.ring}, which is the ring's length, got {steps}")
        if (feed is None) != isinstance(self.inputs, StartTable):
            raise ValueError("staged inputs need `feed`, a table takes none")
        with self.execution.kernels():
            self._stage(feed, 0)
            if self._cuda and self.execution.graph and self._graph is None:
                self._capture()
            self._slot.zero_()
            if not self.execution.overlap:
                for i in range(steps):
                    if i:
                        self._stage(feed, i)
                    self._one()
            else:  # inputs are a step ahead, because rollouts are
                if self._first is not None:
                    self._first.replay()
                else:
                    self._imagine_ahead(self.extraction.iteration)
                for i in range(steps):
                    if i + 1 < steps:
                        self._stage(feed, i + 1)
                    self._one()
        self._filled = steps

    def metrics(self) -> dict[str, Tensor]:
        """Metrics [steps, P] of the last `advance`, read back in one copy."""
        if self._rows is None or not self._filled:
            raise RuntimeError("there are no metrics before the first step: call advance")
        rows = self._rows[: self._filled].to("cpu", copy=True)
        return {name: rows[:, i] for i, name in enumerate(self._names)}

    def _stage(self, feed: Callable[[int], Any] | None, i: int) -> None:
        if feed is not None and not isinstance(self.inputs, StartTable):
            with span("data"):
                self.inputs.stage(feed(i))

    def _one(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        if self.execution.overlap:
            metrics = self._overlapped()
        elif isinstance(self.inputs, StagedTrajectories):
            metrics = self.extraction.step_along(**self.inputs.buffers)
        else:
            with span("data"):
                obs = self.inputs.states(self.extraction.iteration)
            metrics = self.extraction.step(obs)
        self._record(metrics)

    def _overlapped(self) -> dict[str, Tensor]:
        """The step whose rollout is there already; the next one's rollout goes beside the critics.

        A rollout needs the actors, which are ready when the critics begin; only the values of its states, which begin
        the next step, need the critics. Both read what the other leaves alone, so the order does not matter.
        """
        e, pending = self.extraction, self._pending
        assert pending is not None, "the first rollout comes before the first step"
        with e.arithmetic():
            e.actor.clamp_log_std(e.config.min_log_std)
            metrics, rows = e.learn_actor(pending)
            own = CriticRows(*(self._workspace.tensor(n, x, *x.shape).copy_(x) for n, x in rows._asdict().items()))
            with self._beside():
                self._imagine_ahead(e.iteration + 1)
            metrics |= e.learn_critics(own)
            self._join()
        e.iteration += 1
        return metrics

    def _imagine_ahead(self, step: Tensor) -> None:
        """The rollout of gradient step number `step`, into the memory of all rollouts."""
        e = self.extraction
        with e.arithmetic():
            log_std = e.actor.parameters["log_std"]
            before = log_std.clone()  # the state between two steps is that of the serial order, not yet clamped
            e.actor.clamp_log_std(e.config.min_log_std)
            with span("data"):
                assert not isinstance(self.inputs, StagedTrajectories)
                obs = self.inputs.states(step)
            self._pending = e.imagination.rollout(e.actor, obs, e.action_noise(step))
            log_std.copy_(before)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """What is launched inside goes to the second stream; `_join` waits for it."""
        if not self._cuda:
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(self.extraction.iteration.device)
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def _record(self, metrics: dict[str, Tensor]) -> None:
        values = torch.stack(list(metrics.values()))  # [metrics, P]
        if self._rows is None:
            self._names, self._rows = list(metrics), values.new_zeros(self.ring, *values.shape)
        self._rows.index_copy_(0, self._slot.view(1), values[None])
        self._slot += 1

    def _capture(self) -> None:
        """Warm up on a stream of its own, take the warm-up back, capture."""
        device = self.extraction.iteration.device
        before = self.extraction.state_dict()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    if self.execution.overlap:
                        self._imagine_ahead(self.extraction.iteration)
                    self._slot.zero_()
                    self._step()
                self.extraction.load_state_dict(before)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
            if self.execution.overlap:
                self._first = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._first, capture_error_mode="thread_local"):
                    self._imagine_ahead(self.extraction.iteration)
        self._graph = graph


def _later(feed: Callable[[int], Any], start: int, i: int) -> Any:
    return feed(start + i)
