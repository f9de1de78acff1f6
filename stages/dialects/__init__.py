"""How sources store weights: one file per dialect, one table that recognizes them, one table of tensor roles.

A dialect is recognized from the headers of all shards, weight by weight, and cross-checked with config.json; the first
row that claims a tensor wins, and brings the scales that belong to it. Adding a dialect is adding a module (`Dialect` in claim.py) and a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from stages.checkpoint.header import TensorInfo
from stages.dialects import block_fp8, channel_fp8, int4, mxfp4, mxfp8, nvfp4, plain
from stages.dialects.cache_scales import is_cache_scale
from stages.dialects.claim import Claim, Dialect
from stages.dialects.config import changes_weights, declared
from stages.dialects.fp8 import scale_of
from stages.dialects.transposed import transposed
from stages.errors import UserError

__all__ = ["DIALECTS", "Claim", "by_name", "recognize"]

DIALECTS: tuple[Dialect, ...] = (block_fp8, mxfp8, channel_fp8, mxfp4, nvfp4, int4, plain)  # more specific first
SCALE = re.compile(r".*(_scale_inv|weight_scale|weight_scale_2|weight_global_scale|weight_zero_point|weight_shape|weight_packed|weight_g_idx"
                   r"|proj_scales|proj_blocks|_proj\.(input_scale|input_global_scale|output_scale|scale|bias_scale))")
FOREIGN = re.compile(r"(.*\.)?(qweight|qzeros|scales|g_idx|SCB|pre_quant_scale|lora_[AB]|svdquant_lora_[ab]|weight_format|hadamard_matrix"
                     r"|spinquant_r\d_\w+|(.*_)?(input_rotation(_\d+)?|input_prescale))(\..*)?")  # of tools that are not read here
_BY_NAME = {dialect.NAME: dialect for dialect in DIALECTS}


def by_name(name: str) -> Dialect:
    """The module of a dialect."""
    return _BY_NAME[name]


def recognize(tensors: Mapping[str, TensorInfo], shard_of: Mapping[str, str], config: dict) -> dict[str, Claim]:
    """Name -> Claim for every tensor of the checkpoint. `shard_of`: tensor -> shard, for messages.

    Raises UserError for a tensor that no dialect understands, for a lone scale, and when config.json and the headers
    disagree (a lost `quantization_config` has made tools drop scales with only a warning).
    """
    claims: dict[str, Claim] = {}
    for name, info in tensors.items():
        claimed = next(filter(None, (dialect.claim(name, info, tensors, shard_of, config) for dialect in DIALECTS)), None)
        if claimed is not None:
            claims[name] = claimed
    for name, claimed in list(claims.items()):
        for companion in claimed.companions().values():
            if (other := claims.get(companion)) and other.belongs_to:
                raise UserError(f"{shard_of[companion]}: {companion} would belong to {other.belongs_to} and to {name}; rename one of them")
            claims[companion] = Claim(claimed.dialect, belongs_to=name, one_scale=claimed.one_scale and companion == claimed.scale)
    for name, info in tensors.items():
        claimed = claims.get(name)
        if FOREIGN.fullmatch(name) and not (claimed and claimed.belongs_to):
            raise UserError(f"{shard_of[name]}: {name} {info.dtype} {list(info.shape)} says that weights here are not what their tensors "
                            "hold (GPTQ, AWQ, bitsandbytes, rotations, adapters), which is not read; get the unquantized checkpoint")
        if claimed is None:
            raise UserError(f"{shard_of[name]}: {_unread_message(name, info, tensors)}")
        if claimed.dialect == plain.NAME and SCALE.fullmatch(name) and not is_cache_scale(name):
            raise UserError(f"{shard_of[name]}: {_unpaired_message(name, info, tensors)}")
    if declared(config).get("quant_method") == "fp8" and not any("fp8" in (by_name(claimed.dialect).METHODS or ()) for claimed in claims.values()):
        raise UserError("config.json declares quant_method 'fp8', but no shard holds an FP8 tensor; shards are missing "
                        "or config.json is of another checkpoint")
    for dialect in DIALECTS:
        _check_config(dialect, [name for name, claimed in claims.items() if claimed.dialect == dialect.NAME and claimed.matrix], config)
    _check_section(declared(config), {claimed.dialect for claimed in claims.values()})
    return claims | transposed(claims, tensors, shard_of, config)


def _check_section(section: Mapping, found: set[str]) -> None:
    """config.json must not declare what no tensor shows, nor what changes weights on their way to the engine."""
    method = section.get("quant_method")
    methods = {known for name in found for known in by_name(name).METHODS or ()}
    cache_only = method == "compressed-tensors" and section.get("config_groups") == {} and section.get("kv_cache_scheme")
    if section and method not in methods and not cache_only:
        raise UserError(f"config.json declares quant_method {method!r}, but no tensor is stored in a format of that method that is read here (found: "
                        f"{', '.join(sorted(found))}); get the checkpoint as its maker published it, or one that is not quantized")
    for part in changes_weights(section):
        raise UserError(f"config.json: quantization_config has {part}, by which an engine changes weights or inputs; that is not read, get a "
                        "checkpoint without it")


def _unread_message(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str:
    """What to say of a tensor that no dialect claims."""
    if (SCALE.fullmatch(name) and not is_cache_scale(name)) or info.dtype == "F8_E8M0":
        return _unpaired_message(name, info, tensors)
    if info.dtype == "F8_E4M3":
        if found := next((scale for scale in scale_of(name) if scale in tensors), None):
            return _unread_pair_message(name, found, tensors)
        return (f"FP8 tensor {name} has no scale {name}_scale_inv in any shard; without it its values are unknown, get the complete "
                "checkpoint")
    return (f"tensor {name} has dtype {info.dtype} and shape {list(info.shape)}, which no dialect here reads "
            f"({', '.join(_BY_NAME)}); it would be converted wrongly")


def _unpaired_message(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str:
    """What to say of a scale or a packed weight without its counterpart."""
    weight = re.sub(r"(_scale_inv|_scale_2|_global_scale|_scale|_scales|_zero_point|_shape|_packed|_blocks|_g_idx)$", "", name)
    weight = re.sub(r"(?<=\.)(input|output|bias|act|activation)$", "weight", weight)
    if name.endswith(("_packed", "_blocks")):
        scale = re.sub("packed$", "scale", re.sub("blocks$", "scales", name))
        if scale in tensors:
            return _unread_pair_message(name, scale, tensors)
        return f"packed weight {name} has no scale in any shard; the checkpoint is incomplete, download it again"
    found = next((other for other in (weight, f"{weight}_packed", f"{weight}_blocks", re.sub(r"scale$", "weight", name))
                  if other in tensors and other != name), None)
    if found is None:
        return f"scale {name} has no weight {weight} in any shard; the checkpoint is incomplete, download it again"
    return _unread_pair_message(found, name, tensors)


def _unread_pair_message(weight: str, scale: str, tensors: Mapping[str, TensorInfo]) -> str:
    """What to say of a weight and its scale that are both there, but with dtypes or shapes that no dialect reads."""
    shown = (f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}" for name in (weight, scale))
    return f"{' and '.join(shown)}, which together no dialect here reads ({', '.join(_BY_NAME)}); get the checkpoint in BF16 or FP8"


def _check_config(dialect, names: list[str], config: dict) -> None:
    """config.json must declare a method that stores the dialect."""
    method = declared(config).get("quant_method")
    if names and dialect.METHODS is not None and method not in dialect.METHODS:
        known = {known for other in DIALECTS for known in other.METHODS or ()}
        remedy = ("restore the original config.json" if method is None else f"{method!r} is not read here, get the checkpoint in another format"
                  if method not in known else "this mix is not supported, get the checkpoint in another format")
        raise UserError(f"config.json declares quant_method {method!r}, but the headers hold {len(names)} {dialect.LABEL}, {names[0]} first; {remedy}")
