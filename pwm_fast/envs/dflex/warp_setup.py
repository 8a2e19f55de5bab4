"""Warp, started quietly and with a kernel cache that can be written."""

import os
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import warp as wp


@contextmanager
def _silent_stderr():
    """Warp's native library announces a missing CUDA driver on file descriptor 2; on a CPU that is no news."""
    try:
        saved = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    quiet = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(quiet, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(quiet)


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


@cache
def start_warp() -> None:
    """Initialise Warp once. Compiled kernels are kept in the user's cache, else in a temporary folder."""
    wp.config.log_level = max(wp.config.log_level, wp.LOG_WARNING)
    cache_home = Path(os.environ.get("WARP_CACHE_PATH") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if wp.config.kernel_cache_dir is None and not _writable(cache_home):
        wp.config.kernel_cache_dir = tempfile.mkdtemp(prefix="pwm_fast_kernels_")
    with _silent_stderr():
        wp.init()
