"""FP8 that a recipe leaves stays as it is: its codes and scales pass through, a group of the config says what they are.

Only the scale's name changes (`weight_scale_inv` becomes `weight_scale`, which compressed-tensors asks for), never its bytes.
vLLM takes FP8 in compressed-tensors only with activations quantized on the fly, per token or per 128 inputs: that is how it
runs the source, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from stages.errors import UserError
from stages.schemes import SCHEMES

FORMAT = "float-quantized"
_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
_PER_TOKEN = {**_ACTIVATIONS, "strategy": "token"}


def _block(entry: Mapping) -> str:
    rows, columns = entry["tile"]
    if columns != 128:
        raise UserError(f"{entry['shard']}: blocks of {rows}x{columns} can be converted but not kept; engines read FP8 blocks of 128 inputs only")
    return f"fp8 {rows}x{columns}"


# dialect -> name of the format that its weights keep
KEPT = {
    "block_fp8": _block,
    "channel_fp8": lambda entry: "fp8 per tensor" if entry["one_scale"] else "fp8 per channel",
    "mxfp8": lambda entry: "mxfp8",
}


def group_of(stored: str) -> dict:
    """The compressed-tensors group (without targets) of a stored format: `mxfp4`, `mxfp8`, `fp8 128x128`, `fp8 per channel` ..."""
    if stored in SCHEMES:
        scheme = SCHEMES[stored]
        form, weights, activations = scheme.FORMAT, dict(scheme.WEIGHTS), scheme.ACTIVATIONS
    elif stored in ("fp8 per tensor", "fp8 per channel"):
        form, weights, activations = FORMAT, {**_WEIGHTS, "strategy": stored.split()[-1]}, _PER_TOKEN
    else:
        rows, columns = map(int, stored.removeprefix("fp8 ").split("x"))
        form, weights = FORMAT, {**_WEIGHTS, "strategy": "block", "block_structure": [rows, columns]}
        activations = {**_ACTIVATIONS, "strategy": "group", "group_size": columns}
    return {"weights": weights, "input_activations": activations, "output_activations": None, "format": form}
