"""Panels of rows in float32, for whatever has no table: the only temporary copy of the weights, small enough for the second-level cache."""

from __future__ import annotations

import numpy as np

from kernels.arrays import e4m3_values, to_float32
from kernels.compiled import jit

PANEL_BYTES = 1 << 18


def panel_height(columns: int) -> int:
    """Rows of a float32 panel."""
    return max(1, PANEL_BYTES // max(1, 4 * columns))


@jit
def decode_codes(codes, begin, tile_scale, tile_rows, tile_columns, values, result):
    """uint8 e4m3fn codes of the rows from `begin` on -> float32 `result`; one rounding where they are multiplied by their scale."""
    for row in range(len(codes)):
        for t in range(tile_scale.shape[1]):
            scale = tile_scale[(begin + row) // tile_rows, t]
            for column in range(t * tile_columns, min((t + 1) * tile_columns, codes.shape[1])):
                result[row, column] = values[codes[row, column]] * scale


def float_panel(weight, tile_scale, tile, begin, end):
    """Rows begin..end as float32; infinite or NaN where a code or its product is."""
    if tile_scale is None:
        return np.ascontiguousarray(to_float32(weight[begin:end]))
    result = np.empty((end - begin, weight.shape[1]), np.float32)
    decode_codes(weight[begin:end], begin, tile_scale, *tile, e4m3_values(), result)
    return result
