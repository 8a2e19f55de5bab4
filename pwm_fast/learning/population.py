"""Many policies from one frozen world model: as many at once as fit into memory, in waves where not all do.

A policy's numbers depend on its own seed only, so neither the waves nor the policies that leave early change the rest
(to rounding: a matrix product may be blocked differently for more rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pwm_fast.learning.captured import RING, StepGraph
from pwm_fast.learning.configuration import PRESETS, ExtractionConfig
from pwm_fast.learning.execution import ExecutionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.memory import PopulationMemory, population_memory, split
from pwm_fast.learning.step_inputs import StartTable
from pwm_fast.models.policy import Policy
from pwm_fast.models.world_model import WorldModel

Report = Callable[[list[int], int, dict[str, Tensor]], None]
"""Called with the policies at work, steps done and metrics [steps, policies] since the last call."""


class Extracted(NamedTuple):
    """One policy and how its extraction ended."""

    policy: Policy
    steps: int
    diverged: bool


class Population:
    """Extractions from a table of start observations [N, S].

    `seeds` [P], `task_ids`, `tasks` as of `Extraction`; `first` and `count` [P] as of `StartTable`. `fits` is how many
    policies work at once (default: what the free memory of a GPU holds; all on the CPU). Raises ValueError where not
    even one fits.
    """

    def __init__(
        self,
        world_model: WorldModel,
        start_obs: Tensor | np.ndarray,
        seeds: Sequence[int],
        steps: int,
        config: ExtractionConfig = PRESETS["paper"],
        *,
        task_ids: Sequence[int] | None = None,
        tasks: Sequence[str] | None = None,
        first: Sequence[int] | None = None,
        count: Sequence[int] | None = None,
        execution: ExecutionConfig | None = None,
        fits: int | None = None,
    ):
        self.world_model, self.start_obs, self.config, self.steps = world_model, start_obs, config, steps
        self.execution = execution or ExecutionConfig()
        self._of: dict[str, Any] = {
            "seeds": seeds,
            "task_ids": task_ids,
            "tasks": tasks,
            "first": first,
            "count": count,
        }
        device = world_model.obs_mean.device
        self.memory: PopulationMemory = population_memory(
            world_model.config,
            config,
            start_states=len(start_obs),
            overlap=self.execution.overlap,
            ring=RING,
            low_precision=self.execution.precision == "bf16",
            itemsize=world_model.obs_mean.element_size(),
            on_cpu=device.type == "cpu",
        )
        self.free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        if fits is None:
            fits = len(seeds) if self.free is None else self.memory.fits(self.free)
        self.waves = split(len(seeds), fits)

    def describe(self) -> str:
        """One line for the start of a run: memory, and the waves it makes necessary."""
        waves = "" if len(self.waves) == 1 else f"; {len(self.waves)} waves of at most {max(map(len, self.waves))}"
        return self.memory.describe(self.free) + waves

    def run(self, report: Report = lambda policies, steps, metrics: None) -> list[Extracted]:
        """All waves, one after another; results in the order of the seeds."""
        results: dict[int, Extracted] = {}
        for wave in self.waves:
            self._wave(list(wave), report, results)
        return [results[i] for i in sorted(results)]

    def _wave(self, members: list[int], report: Report, results: dict[int, Extracted]) -> None:
        """Extract some policies; the ones that diverge leave, so that the others no longer carry them."""
        extraction, graph = self._start(members)
        done = 0
        while done < self.steps and members:
            part = min(RING, self.steps - done)
            metrics = graph.run(part)
            done += part
            report(members, done, metrics)
            diverged = extraction.diverged.tolist()
            leaving = [done >= self.steps or gone for gone in diverged]
            if not any(leaving):
                continue
            policies = extraction.policies(averaged=True)
            for i, leaves in enumerate(leaving):
                if leaves:
                    results[members[i]] = Extracted(policies[i], done, diverged[i])
            staying = [i for i, leaves in enumerate(leaving) if not leaves]
            members = [members[i] for i in staying]
            if members:
                state = of_policies(extraction.state_dict(), staying)
                del extraction, graph  # their memory before that of the next
                extraction, graph = self._start(members)
                extraction.load_state_dict(state)

    def _start(self, members: list[int]) -> tuple[Extraction, StepGraph]:
        of: dict[str, Any] = {k: None if v is None else [v[i] for i in members] for k, v in self._of.items()}
        extraction = Extraction(
            self.world_model, self.config, of["task_ids"], of["seeds"], self.steps, of["tasks"],
            self.execution.precision,
        )  # fmt: skip
        table = StartTable(extraction, self.start_obs, of["first"], of["count"])
        return extraction, StepGraph(extraction, table, self.execution)


def of_policies(state: Mapping[str, Any], members: Sequence[int]) -> dict[str, Any]:
    """The part of an `Extraction.state_dict()` that belongs to some of its policies."""
    population = len(state["seeds"])

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: pick(v) for k, v in value.items()}
        if isinstance(value, Tensor) and value.dim():  # rows are ordered [P], or [P, K] for critics
            return value.unflatten(0, (population, -1))[list(members)].flatten(0, 1)
        return value

    return {**{k: pick(v) for k, v in state.items()}, "config": state["config"],
            "seeds": [state["seeds"][i] for i in members]}  # fmt: skip
