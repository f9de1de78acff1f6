"""NVFP4: two E2M1 codes in a byte, one E4M3 scale per 16 inputs, one float32 scale per tensor.

    weight_packed + weight_scale + weight_global_scale     w = code * (scale / global)      compressed-tensors
    weight        + weight_scale + weight_scale_2          w = code * (scale * scale_2)     ModelOpt; 2D, or 3D with scale_2 [experts]

The two tensor scales are each other's reciprocals, so the name decides. A scale of activations goes along with its weight.
"""

from __future__ import annotations

import math

from stages.dialects.claim import Claim
from stages.dialects.config import declared
from stages.errors import UserError

NAME = "nvfp4"
LABEL, CAN_STAY, IS_COARSE = "NVFP4 weights", False, True
TILE = (1, 16)
METHODS = ("compressed-tensors", "modelopt", "modelopt_fp4", "modelopt_mixed", "fp8")  # fp8: experts among FP8 linears, see claim
LAYOUTS = (  # suffix of the codes, of the tensor scale, of the activations' scale
    ("weight_packed", "weight_global_scale", "input_global_scale"), ("weight", "weight_scale_2", "input_scale"),
)


def claim(name, info, tensors, shard_of, config):
    """Claims packed weights beside E4M3 block scales."""
    for suffix, whole_suffix, activations in LAYOUTS:
        stem = name.removesuffix(suffix)
        scale = tensors.get(f"{stem}weight_scale")
        if not name.endswith(suffix) or info.dtype != "U8" or scale is None or scale.dtype != "F8_E4M3":
            continue
        whole = tensors.get(stem + whole_suffix)
        counts = (1, info.shape[0]) if len(info.shape) == 3 else (1,)  # stacked experts may have one each
        if whole is None or whole.dtype != "F32" or math.prod(whole.shape) not in counts:
            found = "is missing" if whole is None else f"is {whole.dtype} {list(whole.shape)}"
            raise UserError(f"{shard_of[name]}: NVFP4 weight {name} needs its tensor scale, but {stem + whole_suffix} {found}, expected F32 of "
                            f"{' or '.join(map(str, counts))} elements; the checkpoint is incomplete, download it again")
        section = declared(config)
        if section.get("quant_method") == "fp8" and section.get("moe_quant_algo") != "NVFP4":
            raise UserError(f"{shard_of[name]}: {name} is NVFP4, but config.json declares quant_method 'fp8' without moe_quant_algo 'NVFP4'; this mix "
                            "is not supported, get the checkpoint with its own config.json")
        matrix = (*info.shape[:-1], 2 * info.shape[-1]) if info.shape else ()
        expected = (*matrix[:-1], matrix[-1] // 16) if matrix else ()
        if len(matrix) not in (2, 3) or matrix[-1] % 16 or scale.shape != expected:
            raise UserError(f"{shard_of[name]}: scale {stem}weight_scale is F8_E4M3 {list(scale.shape)}, but blocks of 16 inputs cut {name} "
                            f"{list(info.shape)} into {list(expected)}; one of them is of another checkpoint")
        parts = {"tensor_scale": stem + whole_suffix}
        if stem + activations in tensors:
            parts["input_scale"] = stem + activations
        return Claim(NAME, f"{stem}weight_scale", TILE, matrix, parts)
    return None


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """Decoded rows."""
    from kernels.formats import decode_nvfp4

    whole = tensors.tensor(claim.parts["tensor_scale"]).reshape(-1)
    whole = whole[expert] if expert is not None and whole.numel() > 1 else whole
    return decode_nvfp4(tensors.matrix_rows(name, expert, begin, end, buffer), tensors.matrix_rows(claim.scale, expert, begin, end),
                        whole, claim.parts["tensor_scale"].endswith("global_scale")).numpy(), None
