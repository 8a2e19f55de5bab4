"""The error for a task name nobody knows, with the nearest name that exists."""

import difflib
from collections.abc import Iterable


class UnknownTask(ValueError):
    """A task name that is in no table; the message suggests the nearest one."""

    def __init__(self, name: str, known: Iterable[str]):
        known = list(known)
        near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known tasks: {', '.join(known)}"
        super().__init__(f"unknown task '{name}'{hint} (python -m pwm_fast.tasks lists all)")
        self.name, self.suggestion = name, near[0] if near else None
