"""Fixtures of the kernel tests. `pytest tests/kernels` runs them alone, from a checkout too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
