"""MXFP4 in compressed-tensors: `weight_packed` U8 [out, in/2] and `weight_scale` U8 [out, in/32] per linear weight.

Two layouts that vLLM loads: `per_expert`, the publishers' (one pair per expert and projection, `moe.experts.E.`), and
`stacked`, 3D as the source stores it. The bytes are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME = "mxfp4"
FORMAT = "mxfp4-pack-quantized"
BLOCK = 32
BITS_PER_WEIGHT = 4 + 8 / BLOCK
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True,
           "dynamic": False, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


@dataclass(frozen=True)
class Output:
    """One tensor of the release: where its bytes come from, and what part of the quantized pair it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    part: str  # weight | packed | scale
    expert: int | None = None


def module_names(name: str, shape: tuple[int, ...], layout: str) -> list[tuple[str, int | None]]:
    """(module name in the release, expert number or None) of a source weight; 3D weights fan out by expert."""
    module = name.removesuffix(".weight")
    if len(shape) == 2 or layout == "stacked":
        return [(module, None)]
    prefix, projection = re.fullmatch(r"(.*)\.([^.]+)", module).groups()
    return [(f"{prefix}.experts.{expert}.{projection}", expert) for expert in range(shape[0])]


def outputs(name: str, shape: tuple[int, ...], layout: str) -> list[Output]:
    """The release's tensors made from source weight `name` of shape [out, in] or [experts, out, in]."""
    result = []
    for module, expert in module_names(name, shape, layout):
        leading = tuple(shape[:-1]) if expert is None else (shape[-2],)
        for part, columns in (("packed", shape[-1] // 2), ("scale", shape[-1] // BLOCK)):
            result.append(Output(f"{module}.weight_{part}", "U8", (*leading, columns), name, part, expert))
    return result
