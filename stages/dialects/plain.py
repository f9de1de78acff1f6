"""Plain tensors: the stored number is the value. BF16, F16, F32 weights, and whatever only passes through."""

from __future__ import annotations

import re

from stages.checkpoint.header import FLOATS
from stages.dialects.claim import Claim

NAME = "plain"
LABEL, CAN_STAY, IS_COARSE = "plain weights", False, False
METHODS = None  # plain tensors occur in every checkpoint
PASS_DTYPES = (*FLOATS, "F64", "BOOL", "I8", "I16", "I32", "I64")
FUSED_EXPERTS = re.compile(r".*\.experts\.(gate_up|gate|up|down)_proj")


def claim(name, info, tensors, shard_of, config):
    """Claims every tensor that stores its own values; matrices named as weights can be quantized."""
    if info.dtype not in PASS_DTYPES or (len(info.shape) > 1 and name.endswith("weight") and info.dtype not in (*FLOATS, "F64")):
        return None  # integers under a weight's name are codes, not values
    is_matrix = len(info.shape) in (2, 3) and (name.endswith("weight") or FUSED_EXPERTS.fullmatch(name))
    return Claim(NAME, matrix=info.shape if is_matrix and info.dtype in FLOATS else None)


def rows(tensors, name, claim, expert, begin, end, buffer=None):
    """The rows themselves."""
    return tensors.matrix_array(name, expert, begin, end, buffer), None
