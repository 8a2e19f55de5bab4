"""Puts this folder on the path: its tests share `naive.py`, the definition of extraction, and `small.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
