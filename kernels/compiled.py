"""Numba for the kernels on a CPU: functions that are compiled once for all processes, and floats as IEEE 754 has them while they run."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np


def jit(function):
    """numba.njit, cached on disk where some cache directory is writable, else compiled anew in each process."""
    options = {"nogil": True, "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return numba.njit(**options)(function)


@contextmanager
def exact_subnormals():
    """Turns off, for this thread and the block, a processor mode that takes subnormal float32 for zero.

    torch.set_flush_denormal and libraries built for speed turn it on; small FP8 codes pass through subnormals here.
    """
    flushed = np.float32(1e-40) * np.float32(2.0**60) == 0
    if not flushed:
        yield
        return
    import torch

    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


@jit
def _nothing():
    """So that there is a compiled function of this package to ask for its cache."""


def cache_directory() -> Path:
    """Under which numba keeps the compiled kernels, in a directory for each directory of sources."""
    return Path(_nothing.stats.cache_path).parent
