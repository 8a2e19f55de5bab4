"""dm_control's physics with less Python around each step, and the same numbers, bit for bit."""

from functools import cache
from typing import Any

import mujoco
from dm_control.mujoco import Physics, index
from dm_control.mujoco.engine import NamedIndexStructs
from dm_control.rl.control import PhysicsError

_RK4 = mujoco.mjtIntegrator.mjINT_RK4.value


@cache
def lean(physics: Any) -> Any:
    """The class of a domain's physics with `_Lean` before it."""
    return type(physics.__name__, (_Lean, physics), {})


class _Lean(Physics):
    def _reload_from_data(self, data: Any) -> None:
        super()._reload_from_data(data)
        theirs = super().named
        self._names = NamedIndexStructs(_Fields(self.model, theirs.model), _Fields(self.data, theirs.data))

    @property
    def named(self) -> NamedIndexStructs:
        return self._names

    def step(self, nstep: int = 1) -> None:
        """`nstep` steps, after which positions and velocities agree. Raises PhysicsError where MuJoCo warns."""
        if not self.legacy_step:
            return super().step(nstep)
        model, data, warned = self.model.ptr, self.data.ptr, self._warnings.tobytes()
        if model.opt.integrator == _RK4:
            mujoco.mj_step(model, data, nstep)
        else:  # mj_step1 has been called for this state
            mujoco.mj_step2(model, data)
            if nstep > 1:
                mujoco.mj_step(model, data, nstep - 1)
        mujoco.mj_step1(model, data)
        if self._warnings.tobytes() != warned and self._warnings_cause_exception:
            counts = zip(mujoco.mjtWarning.__members__, self._warnings.tolist())
            warnings = ", ".join(f"{name} ({count} times so far)" for name, count in counts if count)
            raise PhysicsError(f"the physics became invalid; MuJoCo warned of {warnings}")


class _Fields:
    """Named arrays of a MuJoCo structure, each made when it is first asked for."""

    def __init__(self, struct: Any, theirs: Any):
        self._struct, self._theirs = struct, theirs

    def __getattr__(self, field: str) -> Any:
        theirs = getattr(self._theirs, field)
        if isinstance(theirs, index.FieldIndexer):
            theirs = _Remembering(self._struct, field, [axis for axis in theirs.axes if axis is not None])
            setattr(self, field, theirs)
        return theirs


class _Remembering(index.FieldIndexer):
    """An array indexed by names, which turns each into numbers once: that takes ten times as long as the reading."""

    __slots__ = ("_numbers",)

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._numbers: dict[str, Any] = {}

    def _convert_key(self, key: Any) -> Any:
        name = repr(key)
        try:
            return self._numbers[name]
        except KeyError:
            numbers = super()._convert_key(key)
            if _written_out(key):
                self._numbers[name] = numbers
            return numbers


def _written_out(key: Any) -> bool:
    """Whether `repr` tells all of a key; of a long array it does not."""
    return type(key) in (str, int, slice) or (type(key) in (list, tuple) and all(map(_written_out, key)))
