"""Algebra on a bundle of environments: every number is ``lanes`` numbers, one per environment, side by side in memory.

On a CPU 16 lanes fill the vector registers, which makes the dynamics about eight times faster than one environment at
a time (bench/test_physics.py); a GPU thread uses 1 lane. Operations are native snippets, one loop over the lanes each,
with their adjoints written beside them: fewer and larger operations than Warp would differentiate by itself.
"""

from functools import cache
from types import SimpleNamespace

from pwm_fast.envs.dflex.lanes import factor, forces, inertia, rotations, vectors
from pwm_fast.envs.dflex.lanes.bundle import COMPILER_FLAGS, Bundle

__all__ = ["COMPILER_FLAGS", "algebra"]


@cache
def algebra(lanes: int) -> SimpleNamespace:
    """Types (Lane, Vec, Quat, Mat, Sym) and differentiable functions for bundles of ``lanes`` environments."""
    bundle = Bundle(lanes)
    functions = {}
    for room in (vectors, rotations, inertia, forces, factor):
        functions.update(room.functions(bundle))
    return SimpleNamespace(**bundle.types, **functions)
