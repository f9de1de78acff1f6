"""What a tensor is for: one table per family of names, first matching row wins.

The same model is published under several prefixes (`model.layers.`, `model.language_model.layers.`,
`language_model.model.layers.`), so the text prefix is part of every pattern. Layers past `num_hidden_layers` are
multi-token-prediction layers whatever they look like: no recipe reaches them by naming `attention`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stages.errors import UserError

_TEXT = r"(?:model\.language_model|language_model\.model|model)\."
_LAYER = _TEXT + r"layers\.(?P<layer>\d+)\."
_SCALES = r"(?:_scale(?:_inv)?)?"
_LINEAR = r"(?P<projection>gate|up|down)_proj\.weight" + _SCALES


@dataclass(frozen=True)
class Role:
    """A row: tensors whose whole name matches `pattern` have this role."""

    name: str
    pattern: str


ROLES = (
    Role("routed_experts", _LAYER + r"moe\.(?:experts\.\d+\.)?" + _LINEAR),
    Role("shared_experts", _LAYER + r"share_expert\." + _LINEAR),
    Role("router", _LAYER + r"moe\.(?:gate\.weight|router_bias)"),
    Role("dense_mlp", _LAYER + r"mlp\." + _LINEAR),
    Role("attention", _LAYER + r"self_attn\.(?P<projection>[qkvog])_proj\.weight" + _SCALES),
    Role("norms", _LAYER + r"(?:self_attn\.[qk]_norm|input_layernorm|post_attention_layernorm)\.weight"),
    Role("norms", _TEXT + r"norm\.weight"),
    Role("embeddings", _TEXT + r"embed_tokens\.weight"),
    Role("lm_head", r"(?:language_model\.)?lm_head\.weight"),
    Role("vision", r"(?:model\.)?vision_model\..*"),
    Role("projector", r"(?:model\.)?vit_large_projector\..*"),
    Role("mtp", _LAYER + r".*"),
    Role("other", r".*"),
)
ROLE_NAMES = tuple(dict.fromkeys(role.name for role in ROLES))
_COMPILED = tuple((role.name, re.compile(role.pattern)) for role in ROLES)


def hidden_layers(config: dict) -> int:
    """Number of text layers before the MTP layers; UserError when config.json does not say."""
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UserError("config.json: num_hidden_layers is missing (looked at the top and in text_config); without it "
                        "draft layers cannot be told from text layers")
    return layers


def layer_of(name: str) -> int | None:
    """Layer number in a text tensor's name, None outside the layers."""
    match = re.match(_LAYER, name)
    return int(match.group("layer")) if match else None


def role_of(name: str, layers: int) -> str:
    """Role of a tensor name in a model with `layers` text layers."""
    layer = layer_of(name)
    if layer is not None and layer >= layers:
        return "mtp"
    return next(role for role, pattern in _COMPILED if pattern.fullmatch(name))


def projection_of(name: str) -> str | None:
    """`gate`, `up`, `down`, `q`, ... of a linear weight; None for other tensors."""
    for _, pattern in _COMPILED:
        if match := pattern.fullmatch(name):
            return match.groupdict().get("projection")
    return None
