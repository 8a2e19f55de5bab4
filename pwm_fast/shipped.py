"""World models that come with the package, and those that earlier runs built into the user's cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

MODEL, PACK, DATA = "world_model.safetensors", "episodes.npz", "data"


@dataclass(frozen=True)
class Prepared:
    """A task's world model and the episodes that go with it; `origin` says where they come from."""

    world_model: Path
    episodes: Path  # a pack (.npz) or an episode store
    origin: str


def cache_root() -> Path:
    """$PWM_FAST_CACHE, else pwm_fast in the user's cache folder."""
    given = os.environ.get("PWM_FAST_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pwm_fast"


def shipped(task: str) -> Prepared | None:
    """What the package brings for a task."""
    folder = Path(str(resources.files("pwm_fast"))) / "assets" / task
    if not (folder / MODEL).is_file():
        return None
    return Prepared(folder / MODEL, folder / PACK, "shipped with pwm_fast")


def cached(task: str) -> Prepared | None:
    """What an earlier run built for a task on this machine."""
    folder = cache_root() / task
    if not (folder / MODEL).is_file():
        return None
    return Prepared(folder / MODEL, folder / DATA, f"built by an earlier run, in {folder}")


def prepared(task: str) -> Prepared | None:
    """The shipped model of a task, else the cached one, else None."""
    return shipped(task) or cached(task)
