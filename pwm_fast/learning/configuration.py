"""What one extraction computes: the published options, a preset for each published meaning, and ours."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "tf32", "bf16")  # see `Extraction`


@dataclass(frozen=True)
class ExtractionConfig:
    """What one extraction computes. Defaults are the paper's; `PRESETS` has the published code's too."""

    horizon: int = 16
    batch_size: int = 64
    gamma: float = 0.99
    td_lambda: float = 0.95
    terminal_discount_offset: int = 0  # V(z_H) is weighted gamma^(horizon + offset): paper 0, published code 1
    terminations: bool = False  # discount by the world model's termination head (not in the paper)
    return_normalisation: bool = True
    detach_actor_input: bool = True
    min_log_std: float = -1.427
    actor_units: tuple[int, ...] = (400, 200, 100)
    actor_lr: float = 5e-4
    actor_delay: int = 0  # steps at the start in which only the critics learn (for actors that were not random)
    actor_max_norm: float = 1.0
    actor_average: float = 0.0  # weight of the past in `Extraction.average` (not in the paper); 0: the actor itself
    critic_units: tuple[int, ...] = (400, 200)
    num_critics: int = 3
    critic_lr: float = 5e-4
    critic_max_norm: float = 100.0
    critic_epochs: int = 8
    critic_minibatches: int = 4
    shuffle: bool = True  # False: fixed contiguous blocks, time-major
    final_lr: float = 1e-5
    betas: tuple[float, float] = (0.7, 0.95)

    def __post_init__(self) -> None:
        for name in ("horizon", "batch_size", "num_critics", "critic_epochs", "critic_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("gamma", "td_lambda", "actor_average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("actor_lr", "critic_lr", "final_lr", "actor_max_norm", "critic_max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.horizon * self.batch_size < self.critic_minibatches:
            raise ValueError(
                f"critic_minibatches must be <= horizon * batch_size = {self.horizon * self.batch_size}, "
                f"got {self.critic_minibatches}"
            )


PRESETS = {
    "paper": ExtractionConfig(),
    "published-code": ExtractionConfig(td_lambda=0.0, terminal_discount_offset=1, shuffle=False),
    "fast": ExtractionConfig(terminations=True, critic_epochs=2, detach_actor_input=False, actor_average=0.9),
}


def preset(name: str) -> ExtractionConfig:
    """A named configuration; raises ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]
