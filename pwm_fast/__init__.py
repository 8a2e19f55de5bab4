"""From a world model to policies: `WorldModel`, `Policy` and `extract_policies` are the library's three names.

They are imported on first use, so that `import pwm_fast` (and `python -m pwm_fast.tasks`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwm_fast.learning.waves import extract_policies
    from pwm_fast.models.policy import Policy
    from pwm_fast.models.world_model import WorldModel

__version__ = "0.1.0"
__all__ = ["Policy", "WorldModel", "__version__", "extract_policies"]

_HOMES = {
    "WorldModel": "pwm_fast.models.world_model",
    "Policy": "pwm_fast.models.policy",
    "extract_policies": "pwm_fast.learning.waves",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pwm_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
