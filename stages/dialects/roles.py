r"""What a tensor is for: one table for all families of names, first matching row wins.

The same model is published under several prefixes (`model.layers.`, `model.language_model.layers.`,
`language_model.model.layers.`, plain `layers.`), so the text prefix is part of every pattern; families differ in what they
call the block of experts (`moe`, `mlp`, `block_sparse_moe`, `ffn`) and its projections (`gate_proj` or `w1`). Layers past
`num_hidden_layers` are multi-token-prediction layers whatever they look like: no recipe reaches them by naming `attention`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from stages.dialects.config import text_part, whole_number
from stages.errors import UserError

TEXT_ROOT = r"(?:model\.language_model|language_model\.model|model)"  # what names of the text model begin with, where not plain
_TEXT = rf"(?:{TEXT_ROOT}\.|(?=layers\.|embed\.|norm\.|head\.))"
_LAYER = _TEXT + r"layers\.(?P<layer>\d{1,9})\."
_BLOCK = r"(?:moe|mlp|block_sparse_moe|ffn|feed_forward)\."
# what a linear weight may be stored as: the weight, its scales, its bias
_STORED = r"(?:[._](?:weight|scale|blocks|scales|bias|packed)[a-z0-9_]*|[._](?:input|output|act|activation)_(?:global_)?scale)?"
_MLP = r"(?P<projection>(?:gate_up|gate|up|down)_proj|w[123])" + _STORED


@dataclass(frozen=True)
class Role:
    """A row: tensors whose whole name matches `pattern` have this role."""

    name: str
    pattern: str


ROLES = (
    Role("routed_experts", _LAYER + _BLOCK + r"experts\.(?:\d+\.)?" + _MLP),
    Role("routed_experts", _LAYER + r"moe\." + _MLP),  # Step-3.7 stacks them without `experts`
    Role("shared_experts", _LAYER + rf"(?:{_BLOCK})?share(?:d)?_(?:experts?|mlp)\." + _MLP),
    Role("router", _LAYER + _BLOCK + r"(?:router\.gate|gate|router|shared_expert_gate)\.(?:weight|bias|expert_bias|e_score_correction_bias|tid2eid)"),
    Role("router", _LAYER + _BLOCK + r"(?:router_bias|expert_bias|e_score_correction_bias)"),
    Role("dense_mlp", _LAYER + r"mlp\." + _MLP),
    Role("attention", _LAYER + r"(?:self_attn|attn|attention)\.(?P<projection>[a-z_]+_proj(?:_with_mqa)?|w[qkvo]\w*|query_key_value|dense)"
         + _STORED),
    Role("linear_attention", _LAYER + r"linear_attn\.(?P<projection>in_proj_\w+?|out_proj)" + _STORED),
    Role("norms", _LAYER + r"(?:[a-z_]+\.)?[a-z_]*norm\.(?:weight|bias)"),
    Role("norms", _TEXT + r"norm\.weight"),
    Role("embeddings", _TEXT + r"(?:embed(?:_tokens)?|word_embeddings)\.weight"),
    Role("lm_head", r"(?:language_model\.)?(?:model\.)?(?:lm_)?head\.weight"),
    Role("vision", r"(?:model\.)?(?:vision_model|vision_tower|visual|encoder)\..*"),
    Role("projector", r"(?:model\.)?(?:vit_large_projector|multi_modal_projector|mm_projector|patch_merge_mlp)\..*"),
    Role("mtp", r"(?:model\.|language_model\.)*mtp(?:_[a-z]+)*\..*"),
    Role("other", r".*"),
)
ROLE_NAMES = tuple(dict.fromkeys(role.name for role in ROLES))
QUANTIZABLE = ("routed_experts", "shared_experts", "dense_mlp", "attention", "linear_attention")  # linear weights of the text model
DRAFT_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # keys of config.json; the second is Qwen3.5's
_COMPILED = tuple((role.name, re.compile(role.pattern, re.S)) for role in ROLES)  # a name may hold anything


def hidden_layers(config: dict) -> int:
    """Number of text layers before the MTP layers; UserError when config.json does not say."""
    layers = whole_number(config, "num_hidden_layers")
    if layers is None:
        raise UserError("config.json: num_hidden_layers is missing (looked at the top and in text_config); without it "
                        "draft layers cannot be told from text layers, restore the original config.json")
    return layers


@cache  # asked several times of each name
def layer_and_tail(name: str) -> tuple[int | None, str]:
    """(layer number, what the tensor is called in its layer) of a text tensor; (None, its name) outside the layers."""
    match = re.match(_LAYER, name)
    return (int(match.group("layer")), name[match.end():]) if match else (None, name)


def layer_of(name: str) -> int | None:
    """Layer number in a text tensor's name, None outside the layers."""
    return layer_and_tail(name)[0]


@cache
def role_in_layer(name: str) -> str:
    """Role of a tensor name, whether its layer is a draft layer or not."""
    return next(role for role, pattern in _COMPILED if pattern.fullmatch(name))


def role_of(name: str, layers: int) -> str:
    """Role of a tensor name in a model with `layers` text layers."""
    layer = layer_of(name)
    if layer is not None and layer >= layers:
        return "mtp"
    return role_in_layer(name)


def as_numbered_layer(name: str, layers: int) -> str:
    """The name that a draft layer's tensor would have if draft layers were counted on from the text layers, as most families do; what joins
    them to the model (Qwen's `mtp.fc`) is in the first of them then."""
    match = re.fullmatch(r"(?:model\.|language_model\.)*mtp\.(?:layers\.(\d{1,9})|fc)\.(.*)", name, re.S)
    if match is None:
        return name
    return f"model.layers.{layers + int(match[1])}.{match[2]}" if match[1] else f"model.layers.{layers}.eh_proj.{match[2]}"


def declared_drafts(config: dict) -> int:
    """Number of MTP layers that config.json declares; UserError where that is no number."""
    text = text_part(config)
    key = next((key for key in DRAFT_COUNTS if text.get(key)), DRAFT_COUNTS[0])
    declared = text.get(key) or 0
    if type(declared) is not int or declared < 0:
        raise UserError(f"config.json: {key} is {declared!r}, expected a whole number; restore the original")
    return declared


def draft_layers(config: dict, names: Iterable[str]) -> int:
    """Number of MTP layers, 0 where not all that are declared have tensors. Copies of a model are published without them though
    config.json declares them; an engine told to draft then stops, or drafts from weights that nothing initialized."""
    layers, declared = hidden_layers(config), declared_drafts(config)
    present = set()
    for name in names:
        layer = layer_of(name)
        if layer is None and role_of(name, layers) == "mtp":  # drafts under names of their own are not told apart
            return declared
        present.add(layer)
    return declared if present.issuperset(range(layers, layers + declared)) else 0


def is_routed_expert(module: str, layers: int) -> bool:
    """Whether a module (no `.weight`) holds weights of routed experts, of one or of all of a layer."""
    return ".experts." in module or role_of(f"{module}.weight", layers) == "routed_experts"


def projection_of(name: str) -> str | None:
    """`gate`, `w1`, `q`, ... of a linear weight; None for other tensors."""
    for _, pattern in _COMPILED:
        if match := pattern.fullmatch(name):
            projection = match.groupdict().get("projection")
            return projection and projection.removesuffix("_proj")
    return None
