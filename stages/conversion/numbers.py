"""Which numbers and magnitudes of weights are refused: NaN, infinity, unusable scales, and weights far larger or smaller than any network's."""

from __future__ import annotations

import numpy as np

from kernels.arrays import first_index, to_float32
from stages.checkpoint.reader import as_array
from stages.errors import UserError
from stages.records import PlannedTensor

USUAL_SIZES = (1e-9, 1e4)  # root mean square of a network's weights; outside of it a scale was misunderstood
DAMAGED = "the source is damaged, get that shard again"
UNUSABLE = f"no number that a weight can be made of; {DAMAGED}"
EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # all bits of it set: NaN or infinite


def check_numbers(name: str, entry: PlannedTensor, chunk: memoryview, begin: int) -> None:
    """UserError at the first NaN or infinity in a piece of a tensor that passes through, and at the first float scale that is not positive.

    FP8 weights that are kept, their scales and unquantized weights are checked, other tensors are not. entry: the tensor's, in plan.json.
    chunk: bytes of the tensor from byte `begin` on.
    """
    dtype = entry["dtype"]
    if entry["decision"] != "keep" and not (dtype in EXPONENTS and name.endswith("weight")):
        return
    numbers = as_array(chunk, dtype, (-1,))
    if dtype == "F8_E4M3":
        bad = (numbers & 0x7F) == 0x7F
    elif dtype in ("U8", "F8_E8M0"):
        bad = numbers == 255
    elif entry["decision"] == "keep":
        values = to_float32(numbers)
        bad = ~(np.isfinite(values) & (values > 0))
    else:
        bits = np.dtype(f"u{numbers.itemsize}").type
        bad = (numbers.view(bits) & bits(EXPONENTS[dtype])) == bits(EXPONENTS[dtype])
    if bad.any():
        first = first_index(bad)[0]
        index = [int(part) for part in np.unravel_index(begin // numbers.itemsize + first, entry["shape"])]
        value = "NaN" if numbers.dtype == np.uint8 else to_float32(numbers[first:first + 1])[0]
        raise UserError(f"{entry['shard']}: {name}{index} is {value}, {UNUSABLE}")
