"""Plain tensors: the stored number is the value. BF16, F16, F32 weights, and whatever only passes through."""

from __future__ import annotations

NAME = "plain"
WEIGHT_DTYPES = ("BF16", "F16", "F32")
PASS_DTYPES = (*WEIGHT_DTYPES, "F64", "BOOL", "I8", "I16", "I32", "I64")


def claim(name, info, tensors, where, config):
    """Claims every tensor that stores its own values."""
    return (NAME, None, None) if info.dtype in PASS_DTYPES else None


def check_config(names, config) -> None:
    """Nothing to check: plain tensors occur in every checkpoint."""
