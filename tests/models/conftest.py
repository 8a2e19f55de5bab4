"""Puts tests/learning on the path: tests of policies take their small models from its `small.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))
