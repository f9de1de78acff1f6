"""The ratio of two sums of squares in decibels: every SQNR and every GEMM figure."""

from __future__ import annotations

import math


def decibels(signal: float, error: float) -> float:
    """10 log10(signal / error).

    Infinite where nothing differs (error 0); minus infinity where there is no signal, or where either sum is no finite number: a ratio
    that passes no floor.
    """
    if error == 0 and math.isfinite(signal):
        return math.inf
    return 10 * math.log10(signal / error) if 0 < signal < math.inf and 0 < error < math.inf else -math.inf
