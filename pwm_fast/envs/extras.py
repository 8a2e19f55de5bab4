"""Packages that only some tasks need: imported when such a task is made, with a clear word where they are missing."""

import warnings
from importlib import import_module
from typing import Any


class MissingExtra(ImportError):
    """A package of an optional extra is not installed; the message says what installs it."""


def import_extra(module: str, extra: str) -> Any:
    """The module. Raises MissingExtra where its package is not installed; other failures of the import stay theirs."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="glfw")  # dm_control looks for a display; few servers have one
            return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        text = f'{error.name} is not installed and these tasks need it: pip install "pwm_fast[{extra}]"'
        raise MissingExtra(text, name=error.name) from error
