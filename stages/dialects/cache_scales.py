"""Scales of attention and its KV cache: they belong to no weight, a layer may do without them, and vLLM reads some of them in a release.

    q_scale, k_scale, v_scale, kv_scale     in the attention or under a projection; pass through where there is one for the layer
    q_zero_point ...                        the same
    k_proj.output_scale (q, k, v)           Quark's, which vLLM reads under Quark's config and not under compressed-tensors'; take the names above
    prob_scale, prob_output_scale ...       of the probabilities; vLLM stops at them
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from stages.dialects.roles import role_in_layer

_QUARK = re.compile(r"(?P<before>(?:.*\.)?)(?P<part>[qkv])_proj\.output_scale", re.S)
_KNOWN = re.compile(r"(?:.*\.)?(?:(?P<part>[qkv]|kv)|prob|prob_output)_(?:scale|zero_point)", re.S)


def is_cache_scale(name: str) -> bool:
    """Whether it is one, by its whole name or that within its layer."""
    return bool(_KNOWN.fullmatch(name) or _QUARK.fullmatch(name))


def name_in_release(name: str) -> str:
    """What a release calls a tensor that passes through: `k_proj.output_scale` becomes `k_scale`, all others keep their names."""
    return _QUARK.sub(r"\g<before>\g<part>_scale", name)


def is_unread(name: str, shape: Sequence[int]) -> bool:
    """Whether it is one at which vLLM stops, since the config of a release has no scheme of the KV cache: of the probabilities, or one for each head."""
    found = _KNOWN.fullmatch(name_in_release(name))
    return bool(found) and (not found["part"] or math.prod(shape) > 1) and role_in_layer(name) not in ("vision", "projector")
