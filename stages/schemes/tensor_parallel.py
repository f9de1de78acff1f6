"""How many ranks a release can be split over, by what vLLM 0.32's linear and expert layers demand of each rank's share.

    heads    of attention must divide by the ranks, those of keys and values too, or the ranks by them
    blocks   a rank's share of the inputs must be whole blocks of 32 (MXFP4, MXFP8): scales are cut with them
    tiles    FP8 blocks: a rank's inputs and each output partition must be whole blocks of 128
    Marlin   vLLM's kernels for MXFP4 experts on Hopper and Ampere do not pad: 64 inputs at a time where the outputs are whole
             128s, or the other way round; expert parallelism has no such limit
"""

from __future__ import annotations

from collections.abc import Container

from stages.dialects.roles import QUANTIZABLE, as_numbered_layer, projection_of
from stages.records import PlannedTensor, TensorParallel
from stages.schemes.kept import TILE

SIZES = (1, 2, 4, 8, 16)
WHOLE = ("q_a", "kv_a_proj_with_mqa")  # every rank has all of them
FIRST = ("q", "k", "gate", "w1", "q_a", "in_proj_qkv", "in_proj_b")  # lie before others in a merged module: whole blocks even unsplit
BY_INPUTS = ("down", "w2", "o", "out", "dense")  # row-parallel: each rank has a part of the inputs; all others split their outputs


def _fault(name: str, entry: PlannedTensor, size: int, kv_heads: int | None) -> tuple[str, str] | None:
    """(kind, reason) for which one stored weight cannot be split over `size` ranks."""
    rows, inputs = entry["matrix"][-2:]
    by_inputs = projection_of(name) in BY_INPUTS
    if projection_of(name) in WHOLE:
        size = 1
    if projection_of(name) in ("k", "v", "query_key_value") and kv_heads:
        size = min(size, kv_heads)  # ranks beyond them hold copies
    split = inputs if by_inputs else rows
    side = "inputs" if by_inputs else "outputs"
    if split % size:
        return "blocks", f"{name}: {split} {side} do not divide by {size}"
    share = split // size
    if entry["stored"].startswith("fp8 ") and "x" in entry["stored"]:
        if size == 1 and projection_of(name) not in FIRST:
            return None
        return ("tiles", f"{name}: {split} {side} / {size} are not whole FP8 blocks of {TILE}") if share % TILE else None
    if entry["stored"].startswith("mx") and by_inputs and share % 32:
        return "blocks", f"{name}: {split} inputs / {size} are not whole blocks of 32"
    if entry["stored"] == "mxfp4" and entry["role"] == "routed_experts" and by_inputs and not (
            (rows % 128 == 0 and share % 64 == 0) or (rows % 64 == 0 and share % 128 == 0)):
        return "Marlin", f"{name}: {split} inputs / {size} = {share} are not whole 64s, as vLLM's Marlin kernels want"
    return None


def _head_fault(size: int, query_heads: int | None, kv_heads: int | None) -> str | None:
    """Why attention cannot be split over `size` ranks, by the numbers of heads of queries and of keys and values."""
    if query_heads and query_heads % size:
        return f"num_attention_heads is {query_heads}, which does not divide by {size}"
    if kv_heads and kv_heads % size and size % kv_heads:
        return f"{kv_heads} heads of keys and values and {size} ranks do not divide each other"
    return None


def _kinds(tensors: dict[str, PlannedTensor], roles: Container[str]) -> dict[str, PlannedTensor]:
    """One weight of each kind of these roles that is stored quantized, by a name that tells its projection."""
    found: dict[tuple, tuple[str, PlannedTensor]] = {}
    for name, entry in tensors.items():
        if entry["matrix"] and entry["role"] in roles and entry["stored"]:
            name = as_numbered_layer(name, 0) if projection_of(name) is None else name  # Qwen's `mtp.layers.0`
            found.setdefault((entry["role"], projection_of(name), entry["stored"], tuple(entry["matrix"][-2:])), (name, entry))
    return dict(found.values())


def notes(tensors: dict[str, PlannedTensor], query_heads: int | None, kv_heads: int | None) -> list[TensorParallel]:
    """Whether the release can be split, for each number of ranks.

    tensors: as decided. query_heads, kv_heads: heads of queries, and of keys and values, by config.json.
    """
    result = []
    of_model, of_drafts = _kinds(tensors, QUANTIZABLE), {name: entry for name, entry in _kinds(tensors, ("mtp",)).items() if projection_of(name)}
    for size in SIZES:
        faults = [fault for name, entry in of_model.items() if (fault := _fault(name, entry, size, kv_heads))]
        hard = [*filter(None, [_head_fault(size, query_heads, kv_heads)]), *(reason for kind, reason in faults if kind != "Marlin")]
        drafts = (fault[1] for name, entry in of_drafts.items() if (fault := _fault(name, entry, size, kv_heads)))
        result.append({"tensor_parallel": size, "fits": not hard, "marlin": not faults and not hard,
                       "reason": hard[0] if hard else faults[0][1] if faults else None, "drafts": next(drafts, None)})
    return result
