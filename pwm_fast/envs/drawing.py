"""Pictures of MuJoCo's tasks without a screen: which of its drawing libraries serves, found out in time."""

import os
import sys
from ctypes.util import find_library

_LIBRARIES = {"egl": ("EGL", "libegl1"), "osmesa": ("OSMesa", "libosmesa6")}  # MUJOCO_GL -> library, Debian's package
_ADVICE = "install EGL (libegl1) or OSMesa (libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa before the start"


def prepare_drawing() -> None:
    """Choose EGL or OSMesa where MUJOCO_GL is not set and there is no display; MuJoCo reads it at its first import.

    Raises RuntimeError where pictures cannot be drawn (MuJoCo itself would abort the process), with what to install.
    """
    setting = os.environ.get("MUJOCO_GL", "")
    if setting in _LIBRARIES:
        library, package = _LIBRARIES[setting]
        if not find_library(library):
            raise RuntimeError(f"MUJOCO_GL is {setting}, but there is no {library} library here; install {package}")
        return
    if setting == "disable":
        raise RuntimeError(f"MUJOCO_GL is disable, so nothing can be drawn; {_ADVICE}")
    if sys.platform != "linux" or os.environ.get("DISPLAY"):
        return
    found = [backend for backend, (library, _) in _LIBRARIES.items() if find_library(library)]
    if setting or not found:
        raise RuntimeError(f"there is no display to draw with (MUJOCO_GL={setting or 'unset'}); {_ADVICE}")
    if "mujoco" in sys.modules:
        raise RuntimeError(
            "MuJoCo was imported without a display to draw with; call pwm_fast.envs.drawing.prepare_drawing() before "
            f"the first environment is made, or set MUJOCO_GL={found[0]} before the start"
        )
    os.environ["MUJOCO_GL"] = found[0]
