"""What a release calls the modules that a source weight becomes, and which rows of it each takes.

Sources store routed experts one by one or stacked, gate and up apart or fused into one matrix; engines read them expert by
expert, gate and up apart. Two layouts of a release: `per_expert`, the publishers', and `stacked`, 3D as the source stores it.
The bytes are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<number>\d+)\.(?P<projection>[^.]+)$")  # a module of one routed expert
SUFFIX = re.compile(r"(?:[._]weight(?:_packed|_scale)?|_blocks)$")  # `in_proj_weight`, too: a tensor of attention that no module stands for
FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}  # fused projection of stacked experts -> the halves of its rows


@dataclass(frozen=True)
class Matrix:
    """One matrix of a release, or a 3D tensor of them that stays together."""

    module: str  # without `.weight`
    index: int | None  # in the source's 3D tensor; None where the source has it in 2D, or where it stays together
    rows: tuple[int, int, int]  # of the source's matrix, as in range()
    group: str  # stacked name of the weights that its SQNR is reported with: one for all experts of a projection
    expert: int | None  # its number in the group; None for other weights, and for a 3D tensor that stays together


@dataclass(frozen=True)
class Output:
    """One tensor of the release: where its bytes come from, and what part of the quantized pair it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    part: str  # weight (passes through) | codes | scale (both made here) | constant (an inert draft scale)
    matrix: Matrix | None = None


def module_of(name: str) -> str:
    """Module name of a weight, or of one of the tensors that store it."""
    return SUFFIX.sub("", name)


def is_weight(name: str, shape: tuple[int, ...] | list[int]) -> bool:
    """Whether a tensor is the weight of a module that multiplies with it: named so, and of two dimensions or more."""
    return len(shape) >= 2 and name.endswith((".weight", "_weight"))


def matrices(name: str, shape: tuple[int, ...], layout: str) -> list[Matrix]:
    """The release's matrices made from source weight `name` of shape [out, in] or [experts, out, in].

    Rows of a fused gate_up_proj lie one behind the other, gate first; gpt-oss (`_blocks`) interleaves them.
    """
    module, rows = module_of(name), shape[-2]
    if len(shape) == 2 or layout == "stacked":
        single = EXPERT.fullmatch(module) if len(shape) == 2 else None
        group = f"{single['layer']}.experts.{single['projection']}.weight" if single else name
        return [Matrix(module, None, (0, rows, 1), group, int(single["number"]) if single else None)]
    prefix, projection = re.fullmatch(r"(.*)\.([^.]+)", module).groups()
    experts = prefix if prefix.endswith(".experts") else f"{prefix}.experts"
    parts = FUSED.get(projection, (projection,))
    if len(parts) == 1:
        spans = [(0, rows, 1)]
    elif name.endswith("_blocks"):
        spans = [(0, rows, 2), (1, rows, 2)]
    else:
        spans = [(0, rows // 2, 1), (rows // 2, rows, 1)]
    return [Matrix(f"{experts}.{expert}.{part}", expert, span, name if len(parts) == 1 else f"{prefix}.{part}.weight", expert)
            for expert in range(shape[0]) for part, span in zip(parts, spans)]


def pair(name: str, shape: tuple[int, ...], layout: str, suffixes: tuple[str, str], dtypes: tuple[str, str],
         columns: tuple[int, int]) -> list[Output]:
    """Outputs of a scheme that stores codes and scales: for each matrix one tensor [out, columns] of either."""
    result = []
    for matrix in matrices(name, shape, layout):
        leading = tuple(shape[:-1]) if matrix.index is None else (len(range(*matrix.rows)),)
        for part, suffix, dtype, width in zip(("codes", "scale"), suffixes, dtypes, columns):
            result.append(Output(f"{matrix.module}.{suffix}", dtype, (*leading, width), name, part, matrix))
    return result
