"""FP8 that a recipe leaves stays as it is: its codes and scales pass through, a group of the config says what they are.

Only the scale's name changes (`weight_scale_inv` becomes `weight_scale`, which compressed-tensors asks for), its shape where a source has one per
channel in one dimension (Quark, ModelOpt) or one per tensor in two, and its dtype where E8M0 is not U8, never its bytes.
vLLM quantizes activations on the fly, per token or per 128 inputs: that is how it runs the source, too. Where the source says that only its
weights are FP8, so does the release, as far as vLLM 0.32 reads that: of linears per channel or per tensor, not of blocks or experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stages.checkpoint.header import FLOATS
from stages.dialects.config import block_edges
from stages.schemes import SCHEMES

FORMAT = "float-quantized"
TILE = 128  # rows and columns under one scale, of the only block FP8 that engines read
WEIGHT_ONLY = ", weight-only"  # behind a stored format whose activations stay as they are
_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
_PER_TOKEN = {**_ACTIVATIONS, "strategy": "token"}


def stored_as(shape: tuple[int, ...], scale_dtype: str, scale_shape: tuple[int, ...]) -> str | None:
    """Stored format of an FP8 weight by its scale: `mxfp8`, `fp8 128x128`, `fp8 per channel`, `fp8 per tensor`; None if it is none.

    A scale that fits two (few inputs) is that of the block: only then is it named so by whoever wrote it.
    """
    if scale_dtype == "U8":
        return "mxfp8" if shape[-1] % 32 == 0 and scale_shape == (*shape[:-1], shape[-1] // 32) else None
    if scale_dtype not in FLOATS:
        return None
    if scale_shape == (*shape[:-1], 1) and shape[-2] > 1:
        return "fp8 per channel"
    if len(scale_shape) == len(shape) and scale_shape == (*shape[:-2], *(-(-size // TILE) for size in shape[-2:])):
        return f"fp8 {TILE}x{TILE}"
    return "fp8 per tensor" if len(shape) == 2 and scale_shape in ((), (1,)) else None


def as_written(dtype: str, shape: tuple[int, ...], one_scale: bool) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) in which a release has a kept weight's scale, of the same bytes: [out, 1] for [out] and, where it is the weight's `one_scale`, [1]
    for [1, 1], neither of which vLLM loads, and U8 for F8_E8M0, which it would convert."""
    shape = (1,) if one_scale and len(shape) > 1 else shape
    return "U8" if dtype == "F8_E8M0" else dtype, (*shape, 1) if len(shape) == 1 and shape[0] > 1 else shape


def stored_by(group: Mapping, section_format: str | None = None) -> str:
    """Stored format that a group claims, the inverse of `group_of`; what it says where it is none of those."""
    weights, form = group.get("weights") or {}, group.get("format") or section_format
    bits, strategy, kind = weights.get("num_bits"), weights.get("strategy"), weights.get("type")
    found = None
    if kind == "float" and strategy == "group" and weights.get("group_size") == 32 and bits in (4, 8):
        found = f"mxfp{bits}"
    elif kind == "float" and bits == 8 and strategy in ("tensor", "channel"):
        found = f"fp8 per {strategy}" + (WEIGHT_ONLY if group.get("input_activations") is None else "")
    elif kind == "float" and bits == 8 and strategy == "block":
        found = "fp8 {}x{}".format(*(block_edges(weights.get("block_structure")) or ("?", "?"))[:2])
    return found if found and "?" not in found and group_of(found)["format"] == form else f"{form} ({bits} bits, {strategy})"


class WeightOnly(NamedTuple):
    """Strategies (`channel`, `tensor`, `block`) of a source's FP8 whose activations stay as they are by compressed-tensors groups."""

    by_all: frozenset[str]  # groups of that strategy
    by_some: frozenset[str]  # but not by all


def weight_only(section: Mapping) -> WeightOnly:
    """What a source's quantization_config says of activations."""
    found: dict[str, set[bool]] = {}
    for group in (section.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("type") == "float" and weights.get("num_bits") == 8:
            found.setdefault(weights.get("strategy"), set()).add(group.get("input_activations") is None)
    return WeightOnly(*(frozenset(strategy for strategy, kinds in found.items() if kinds == wanted) for wanted in ({True}, {True, False})))


def group_of(stored: str) -> dict:
    """The compressed-tensors group (without targets) of a stored format: `mxfp4`, `mxfp8`, `fp8 128x128`, `fp8 per channel` ..."""
    if stored in SCHEMES:
        scheme = SCHEMES[stored]
        form, weights, activations = scheme.FORMAT, dict(scheme.WEIGHTS), scheme.ACTIVATIONS
    elif stored.startswith("fp8 per "):
        form, weights = FORMAT, {**_WEIGHTS, "strategy": stored.removesuffix(WEIGHT_ONLY).split()[-1]}
        activations = None if stored.endswith(WEIGHT_ONLY) else _PER_TOKEN
    else:
        rows, columns = map(int, stored.removeprefix("fp8 ").split("x"))
        form, weights = FORMAT, {**_WEIGHTS, "strategy": "block", "block_structure": [rows, columns]}
        activations = {**_ACTIVATIONS, "strategy": "group", "group_size": columns}
    return {"weights": weights, "input_activations": activations, "output_activations": None, "format": form}
