"""What the dialects of FP8 weights share: names and shapes of scales, and reading rows of codes with their scales."""

from __future__ import annotations

import re

E8M0 = ("U8", "F8_E8M0")  # dtypes of E8M0 scales
MICROSCALED = (1, 32)  # the tile of MXFP8


def scale_of(name: str) -> list[str]:
    """Names that the scale of FP8 weight `name` may have."""
    return [f"{name}_scale_inv", f"{name}_scale", *([f"{name.removesuffix('weight')}scale"] if name.endswith(".weight") else [])]


def granularity(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> str | None:
    """`channel` where a scale of that shape has one number per output channel (row) of the weight, `tensor` where it has one for the whole weight;
    None where it is neither."""
    if len(shape) < 2:
        return None
    if scale_shape == (*shape[:-1], 1):
        return "channel"
    if len(shape) == 2 and scale_shape in ((), (1,), (1, 1)):
        return "tensor"
    return "channel" if len(shape) == 2 and scale_shape == shape[:1] else None  # Quark's and ModelOpt's


def is_microscaled(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> bool:
    """Whether a scale of that shape has one number per 32 inputs, as MXFP8's."""
    return len(shape) > 1 and scale_shape == (*shape[:-1], -(-shape[-1] // MICROSCALED[1]))


def static_scale(name: str, tensors) -> dict[str, str]:
    """The scale of activations that goes along with a weight, as a part of its claim: kind -> name."""
    stem = re.sub(r"(?<=\.)weight(_packed)?$|(?<=_)blocks$", "", name)
    stem = f"{name}_" if stem == name else stem
    return {kind: stem + kind for kind in ("input_scale", "act_scale", "activation_scale") if stem + kind in tensors}


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """Codes, and the float scales of their tiles; also for MXFP8 and for scales per channel or tensor."""
    import numpy as np

    from kernels.arrays import e8m0_to_float32, to_float32

    codes = tensors.matrix_array(name, expert, begin, end, buffer)
    if claim.one_scale:
        return codes, np.full((end - begin, 1), to_float32(tensors.array(claim.scale)).item(), np.float32)
    first, last = begin // claim.tile[0], -(-end // claim.tile[0])
    if claim.scales:
        scale = np.concatenate([tensors.matrix_array(part, None, row, row + 1) for part, row in claim.scales[first:last]])
    else:
        scale = tensors.matrix_array(claim.scale, expert, first, last)
    return codes, e8m0_to_float32(scale) if scale.dtype == np.uint8 else to_float32(scale)
