"""The ablation ladder: what each ingredient of the gradient step's speed is worth, by size, batch and population.

Every rung is checked before it is timed: the actors' gradient against float64's on the same step.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gpu_timing import Run
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "learning"))
from naive import NaiveExtraction

from pwm_fast.learning.captured import StepGraph
from pwm_fast.learning.configuration import PRESETS, ExtractionConfig
from pwm_fast.learning.execution import LADDER, ExecutionConfig
from pwm_fast.learning.extraction import Extraction
from pwm_fast.learning.memory import population_memory
from pwm_fast.learning.precision import LEAST_COSINE, gradient_cosines
from pwm_fast.learning.step_inputs import StartTable
from pwm_fast.models.world_model import WorldModel, WorldModelConfig

OBS_DIM, ACTION_DIM, TASKS, TASK_DIM, ROWS = 39, 6, 80, 96, 100_000
MAIN = [("48M", 64, 1), ("48M", 512, 1), ("48M", 64, 80), ("5M", 64, 1), ("317M", 64, 1)]  # all rungs, in this order
REST = [(s, b, p) for s in ("48M", "5M", "317M") for b in (64, 512) for p in (1, 4, 16, 80)]
GOAL_STEPS = 10_000  # of a whole extraction


def make_world_model(size: str, device: torch.device) -> WorldModel:
    """A random model with MT80's shapes, made on the device; its reward head is not zero, so gradients are not."""
    torch.manual_seed(0)
    tasks = {"num_tasks": TASKS, "task_dim": TASK_DIM}
    if size == "dry":
        config = WorldModelConfig(OBS_DIM, ACTION_DIM, 16, 24, 24, 2, **tasks)
    else:
        config = WorldModelConfig.of_size(size, OBS_DIM, ACTION_DIM, **tasks)
    with torch.device(device):
        model = WorldModel(config)
    torch.nn.init.normal_(model._reward[-1].weight, std=0.1)
    return model


def start_table(device: torch.device, rows: int) -> Tensor:
    return torch.randn(rows, OBS_DIM, device=device, generator=torch.Generator(device).manual_seed(1))


def extraction(model: WorldModel, config: ExtractionConfig, policies: int, precision: str) -> Extraction:
    tasks = [p % TASKS for p in range(policies)]
    return Extraction(model, config, tasks, list(range(policies)), precision=precision)


def naive_step(model: WorldModel, config: ExtractionConfig, obs: Tensor) -> Callable[[], object]:
    """The published step in plain autograd, one policy."""
    ext = extraction(model, config, 1, "fp32")
    naive = NaiveExtraction(model, ext)
    noise = ext.action_noise(ext.iteration)[0]
    states = obs[: config.batch_size]
    return lambda: naive.step(states, noise)


def graph_of(
    model: WorldModel, config: ExtractionConfig, policies: int, obs: Tensor, how: ExecutionConfig
) -> StepGraph:
    ext = extraction(model, config, policies, how.precision)
    return StepGraph(ext, StartTable(ext, obs, check=False), how, ring=64)


def rungs(whole: bool) -> dict[str, ExecutionConfig]:
    """All rungs, then the top one in lower precisions; or only the ends, for combinations of less interest."""
    top = LADDER["overlap"]
    low = {f"overlap, {p}": replace(top, precision=p) for p in ("tf32", "bf16")}
    return {**LADDER, **low} if whole else {"frozen and batched": LADDER["frozen and batched"], "overlap": top, **low}


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ladder(run: Run, share: float = 0.75) -> None:
    """The main combinations whole, then the others' ends, as many as fit into `share` of the time that is left."""
    until = (1 - share) * run.left()
    combinations = [("dry", 8, 2)] if run.dry else MAIN + [c for c in REST if c not in MAIN]
    for size, batch, policies in combinations:
        whole = run.dry or (size, batch, policies) in MAIN
        label = f"{size} batch {batch} P {policies}"
        if run.left() < until:
            print(f"  ladder {label}: skipped, out of time")
            continue
        try:
            _combination(run, label, size, batch, policies, whole)
        except torch.cuda.OutOfMemoryError as error:
            run.failures.append(f"ladder {label}: {str(error).splitlines()[0]}")
        free_memory()


def _combination(run: Run, label: str, size: str, batch: int, policies: int, whole: bool) -> None:
    config = replace(PRESETS["paper"], batch_size=batch)
    if run.dry:
        config = replace(config, horizon=3, actor_units=(16, 8), critic_units=(16,), critic_epochs=1)
    model = make_world_model(size, run.device)
    if not run.dry:
        memory = population_memory(model.config, config, start_states=ROWS, overlap=True, ring=64)
        free = torch.cuda.mem_get_info(run.device)[0]
        if memory.fits(free) < policies:
            print(f"  ladder {label}: skipped, {memory.describe(free)}")
            return
    obs, eager = start_table(run.device, 500 if run.dry else ROWS), 0.0
    per_rung = 0.0 if run.dry else 1.0
    for name, how in rungs(whole).items():
        if name == "eager torch":
            step = naive_step(model, config, obs)
            eager = run.seconds(step, budget=per_rung, least=2) * policies
            run.record(f"ladder/{label}/{name}", eager * 1e6, "us/step", policies_in_turn=policies)
            continue
        try:
            how.check()
            graph = graph_of(model, config, policies, obs, how)
        except (RuntimeError, ValueError) as reason:  # kernels that do not take this machine or these shapes
            print(f"  ladder {label}/{name}: {reason}")
            continue
        short = run.seconds(lambda g=graph: g.advance(2), budget=0.0, least=1) / 2
        steps = 2 if run.dry else min(max(int(0.3 / short), 2), graph.ring)  # a call's own cost spreads over its steps
        each = run.seconds(lambda g=graph, n=steps: g.advance(n), budget=per_rung, least=3) / steps
        run.require(not bool(graph.extraction.diverged.any()), f"ladder {label}/{name}: a policy diverged")
        notes = {"policies_per_s": policies / each, "s_per_10k_steps": GOAL_STEPS * each}
        if eager:
            notes["times_eager"] = eager / each
        run.record(f"ladder/{label}/{name}", each * 1e6, "us/step", **notes)
        del graph
        free_memory()


def gradients(run: Run) -> None:
    """Cosine of the actors' gradient with float64's in each precision; a speed counts only with these."""
    for size in ("dry",) if run.dry else ("5M", "48M"):
        model = make_world_model(size, run.device)
        config = replace(PRESETS["paper"], critic_epochs=1)
        obs = start_table(run.device, 64).view(2, 32, OBS_DIM)
        for precision, least in LEAST_COSINE.items():
            cosine = float(gradient_cosines(model, config, obs, precision, torch.tensor([3, 5])).min())
            run.require(cosine >= least, f"gradient {size} {precision}: cosine {cosine:.6f} below {least}")
            run.record(f"gradient/{size} {precision}", 1 - cosine, "1-cos")
        free_memory()
