"""Stacked experts that are stored transposed, [experts, in, out].

The architectures here are published so, while transformers 5 saves them as [experts, out, in], and no shard says which it is. Their shapes do,
beside those that config.json gives: gate_up_proj is square only where hidden_size is twice moe_intermediate_size, and then down_proj is not. So all
stacked experts of a checkpoint must fit one way.
"""

from __future__ import annotations

from collections.abc import Mapping

from stages.checkpoint.header import TensorInfo
from stages.dialects import block_fp8, plain
from stages.dialects.claim import Claim
from stages.dialects.config import expert_count, whole_number
from stages.errors import UserError

ARCHITECTURES = ("Qwen3VLMoeForConditionalGeneration",)
DIALECTS = (plain.NAME, block_fp8.NAME)  # of others nobody knows how codes and scales would lie


def transposed(claims: Mapping[str, Claim], tensors: Mapping[str, TensorInfo], shard_of: Mapping[str, str], config: dict) -> dict[str, Claim]:
    """Claims of the tensors that are stored transposed, as of the [experts, out, in] that they mean; UserError for what fits neither way."""
    known = any(name in ARCHITECTURES for name in config.get("architectures") or ())
    stacked = {name: claim for name, claim in claims.items() if known and ".experts." in name and claim.matrix and len(claim.matrix) == 3}
    if not stacked:
        return {}
    shapes, turned = _shapes(config), {name: claim.transpose() for name, claim in stacked.items()}
    published, saved = ([name for name, claim in found.items() if claim.matrix != shapes.get(name.removesuffix(".weight").rpartition(".")[2])]
                        for found in (turned, stacked))  # names that do not fit that way
    if published and saved:
        name = next((name for name in published if name in saved), published[0])
        raise UserError(f"{shard_of[name]}: {name} is {tensors[name].dtype} {list(tensors[name].shape)}; by config.json stacked experts are "
                        f"{' and '.join(f'{key} {list(shape)}' for key, shape in shapes.items())}, or all of them transposed; one of them is of "
                        "another checkpoint, get it as its maker published it")
    if published:
        return {}
    for name, claim in stacked.items():
        if claim.dialect not in DIALECTS:
            raise UserError(f"{shard_of[name]}: {name} is {claim.dialect} and stored transposed, [experts, in, out], which is read of "
                            f"{' and '.join(DIALECTS)} only; get the checkpoint in one of these")
    return turned


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """[experts, out, in] of stacked experts by config.json; UserError where it does not say."""
    sizes = {"num_experts": expert_count(config)} | {key: whole_number(config, key) for key in ("hidden_size", "moe_intermediate_size")}
    if missing := [key for key, size in sizes.items() if size is None]:
        raise UserError(f"config.json: {missing[0]} is missing, without which nobody can tell which way stacked experts lie; restore the original")
    experts, hidden, inner = sizes.values()
    return {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
