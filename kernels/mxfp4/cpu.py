"""MXFP4 on one CPU core: the host side of kernels/mxfp4/cpu_kernels.py, for numpy arrays and as a backend for torch."""

from __future__ import annotations

import functools
import warnings

import numpy as np

from kernels.arrays import check_matrix, e4m3_values, first_index
from kernels.compiled import exact_subnormals
from kernels.errors import NonFiniteError
from kernels.mxfp4.cpu_kernels import BLOCK, TABLE_SCALES, VALUES, decode_rows, float_rows, fp8_matrix
from kernels.mxfp4.rules import RULE_NUMBER
from kernels.panels import float_panel, panel_height

ROUNDED_WEIGHTS = 1 << 22  # that torch rounds to float16 at once: starting its threads takes milliseconds


def table_shift(weight, tile_scale, tile, importance):
    """log2 of a tile's width in blocks if per-tile tables are worthwhile and valid for the whole matrix, else None."""
    if tile_scale is None or importance is not None or not weight.size or tile[0] * tile[1] < 4096:
        return None
    width = tile[1] // BLOCK
    if tile[1] >= weight.shape[-1]:
        shift = 62  # one tile across
    elif tile[1] % BLOCK or width & (width - 1):
        return None
    else:
        shift = width.bit_length() - 1
    return shift if TABLE_SCALES[0] <= float(tile_scale.min()) and float(tile_scale.max()) <= TABLE_SCALES[1] else None


def quantize_matrix(weight, tile_scale=None, *, rule="mse", tile=(128, 128), importance=None, packed=None, scale=None):
    """Convert one matrix that lies in numpy arrays, without torch.

    Args:
        weight: [out, in], `in` a multiple of 32: uint8 e4m3fn codes with `tile_scale`, or float32, float16 or uint16 (BF16 bits) without.
        tile_scale: float32 [ceil(out/tile[0]), ceil(in/tile[1])], positive.
        rule, tile, importance: as for kernels.mxfp4.quantize.
        packed, scale: uint8 arrays for the result; made where None.
    Returns:
        packed uint8 [out, in/2], scale uint8 [out, in/32], float64 [3]: sums of w^2, of (w - w_hat)^2 and of w_hat^2.
    Raises:
        NonFiniteError: names the first weight or tile scale that MXFP4 cannot represent.
    """
    out, columns = weight.shape
    check_matrix(weight, tile_scale, tile, BLOCK)
    packed = np.empty((out, columns // 2), np.uint8) if packed is None else packed
    scale = np.empty((out, columns // BLOCK), np.uint8) if scale is None else scale
    statistics = np.zeros(3)
    number_of_rule = RULE_NUMBER[rule]
    target = (packed.reshape(-1), scale.reshape(-1), statistics)
    shift = table_shift(weight, tile_scale, tile, importance)
    with exact_subnormals():
        if shift is not None:
            source = np.ascontiguousarray(weight).reshape(-1)
            fine = fp8_matrix(source, out, columns, tile_scale, tile[0], np.uint64(shift), e4m3_values(), number_of_rule, *target)
        else:
            fine = by_panels(weight, tile_scale, number_of_rule, tile, importance, target)
        if not fine:
            refuse(weight, tile_scale, tile)
    return packed, scale, statistics


def by_panels(weight, tile_scale, rule, tile, importance, target):
    """Convert [out, in] through float32 row panels; False if a weight is not finite."""
    out, columns = weight.shape
    packed, scale, statistics = target
    weighted = importance is not None
    factors = np.ascontiguousarray(importance) if weighted else np.ones(1, np.float32)
    height = panel_height(columns)
    for r in range(0, out, height):
        values = float_panel(weight, tile_scale, tile, r, min(r + height, out))
        span = r * columns, (r + len(values)) * columns
        if not float_rows(values, values.view(np.uint32), factors, weighted, rule, packed[span[0] // 2 : span[1] // 2],
                          scale[span[0] // BLOCK : span[1] // BLOCK], statistics):  # fmt: skip
            return False
    return True


def refuse(weight, tile_scale, tile):
    """Find and report the first weight that is not finite; kernels only say that there is one."""
    height = panel_height(weight.shape[1])
    for r in range(0, len(weight), height):
        values = float_panel(weight, tile_scale, tile, r, min(r + height, len(weight)))
        bad = ~np.isfinite(values)
        if bad.any():
            row, column = first_index(bad)
            raise NonFiniteError("weight", (r + row, column), float(values[row, column]))
    raise AssertionError(f"kernel refused a matrix {weight.shape}, but all its weights are finite")


def quantize(weight, tile_scale, rule, tile, importance):
    """torch twin of `quantize_matrix`: [E, out, in] -> packed, scale, signal, error, decoded; arguments checked by
    kernels.mxfp4.quantize."""
    import torch

    experts, out, columns = weight.shape
    assert weight.device.type == "cpu", f"weight is on {weight.device}"
    weight = weight.contiguous()
    if weight.element_size() == 1:
        weight = weight.view(torch.uint8)
    elif weight.dtype == torch.bfloat16:
        weight = weight.view(torch.uint16)
    packed = torch.empty(experts, out, columns // 2, dtype=torch.uint8)
    scale = torch.empty(experts, out, columns // BLOCK, dtype=torch.uint8)
    statistics = torch.empty(experts, 3, dtype=torch.float64)
    for i in range(experts):
        try:
            *_, sums = quantize_matrix(
                weight[i].numpy(), None if tile_scale is None else tile_scale[i].numpy(), rule=rule, tile=tile,
                importance=None if importance is None else importance.numpy(), packed=packed[i].numpy(), scale=scale[i].numpy())  # fmt: skip
        except NonFiniteError as error:
            raise NonFiniteError(error.what, (i, *error.index), error.value) from None
        statistics[i] = torch.from_numpy(sums)
    return packed, scale, *statistics.unbind(-1)


@functools.cache
def value_table(dtype: str) -> tuple[np.ndarray, int]:
    """(bits [16, 256] of nibble under scale byte, bit at which their exponent begins) in float32 (uint32) or bfloat16 (uint16).

    BF16 is float32's upper half, which holds all of MXFP4's two significant bits, those of subnormals, too.
    """
    signed = np.concatenate((VALUES, -VALUES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow to infinity is what float32 holds there
        bits = (signed[:, None] * 2.0 ** (np.arange(256) - 127.0)).astype(np.float32).view(np.uint32)
    return (bits, 23) if dtype == "float32" else ((bits >> 16).astype(np.uint16), 7)


def dequantize(packed, scale, dtype):
    """Bits of float32 or bfloat16, row by row; float16 is rounded by torch from panels of float32."""
    import torch

    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    result = torch.empty(shape, dtype=dtype)
    if not packed.numel():
        return result
    packed, scale = (part.contiguous().reshape(-1, part.shape[-1]).numpy() for part in (packed, scale))
    rows = result.view(-1, shape[-1])
    if dtype == torch.float16:
        height = max(1, ROUNDED_WEIGHTS // shape[-1])
        for begin in range(0, len(rows), height):
            bits = np.empty((len(rows[begin : begin + height]), shape[-1]), np.uint32)
            decode_rows(packed[begin : begin + height], scale[begin : begin + height], bits, *value_table("float32"))
            rows[begin : begin + height] = torch.from_numpy(bits.view(np.float32))
    elif dtype == torch.float32:
        decode_rows(packed, scale, rows.numpy().view(np.uint32), *value_table("float32"))
    else:
        decode_rows(packed, scale, rows.view(torch.uint16).numpy(), *value_table("bfloat16"))
    return result
