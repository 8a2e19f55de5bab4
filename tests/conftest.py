"""Tiny models, data and policies of the hopper's shape, for tests of whole commands."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton: its kernels then run in numpy

OBS, ACTION = 11, 3


def pytest_runtest_setup() -> None:
    """The same draws every time: of one number that a network computes, 1 in 40 cancels to next to nothing."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_world_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world model of the hopper with random weights."""
    from pwm_fast.models.world_model import WorldModel, WorldModelConfig

    torch.manual_seed(0)
    config = WorldModelConfig(OBS, ACTION, latent_dim=16, mlp_dim=32, encoder_dim=32, encoder_layers=2)
    path = tmp_path_factory.mktemp("model") / "world_model.safetensors"
    WorldModel(config, provenance={"task": "hopper"}).save(path)
    return path


def write_tiny_store(path: Path, obs_dim: int = OBS, action_dim: int = ACTION, task: str = "hopper") -> Path:
    """Eight episodes of 40 random transitions."""
    from pwm_fast.data.episodes import EpisodeWriter

    random = np.random.default_rng(0)
    with EpisodeWriter(path, obs_dim, action_dim, task_names=[task]) as writer:
        for _ in range(8):
            obs = random.normal(size=(41, obs_dim)).cumsum(0) / 10
            action = random.uniform(-1, 1, (40, action_dim))
            writer.add(obs, action, action.sum(1) + obs[:-1, 0], terminated=False)
    return path


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An episode store of the hopper's shape."""
    return write_tiny_store(tmp_path_factory.mktemp("data") / "hopper")


@pytest.fixture
def make_tiny_store() -> Callable[..., Path]:
    """The function `write_tiny_store`, for stores of other shapes."""
    return write_tiny_store


@pytest.fixture
def tiny_policies(tiny_world_model: Path) -> list:
    """Two untrained hopper policies, seeds 3 and 4."""
    from pwm_fast.learning.extraction import Extraction, ExtractionConfig
    from pwm_fast.models.world_model import WorldModel

    config = ExtractionConfig(actor_units=(16,), critic_units=(16,))
    return Extraction(WorldModel.load(tiny_world_model), config, seeds=[3, 4], tasks=["hopper", "hopper"]).policies()


@pytest.fixture
def command_environment() -> dict[str, str]:
    """Variables for commands in processes of their own: one thread, plain output."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", "PWM_FAST_DEBUG": ""}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command in this process: call("evaluate", "RUN", "--seed", 5) is its exit code."""
    monkeypatch.setenv("COLUMNS", "200")  # names of files are whole in tables, wherever pytest puts its folders
    from pwm_fast.errors import run_command

    def run(command: str, *arguments: object) -> int:
        module = import_module(f"pwm_fast.{command}")
        return run_command(module.Options, module.main, f"pwm_fast.{command}", [str(a) for a in arguments])

    return run
