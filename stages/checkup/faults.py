"""Faults of many things: found on all cores, said in one line where they are the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

MOST_THREADS = 32  # more do not make a disk faster


def some(names: list[str], before: str, after: str) -> Iterator[str]:
    """One line for many names of the same fault."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{before} {names[0]}{more}" + (f"; {after}" if after else "")


def on_all_cores(fault_of: Callable, items: Iterable) -> Iterator[str]:
    """Faults of items, in their order; what `fault_of` does with an item leaves the interpreter alone: reading, hashing, sums."""
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS)) as pool:
        yield from filter(None, pool.map(fault_of, items))
