"""Optional: the inert KV-cache scalars that let vLLM's strict draft loader pass without a patch.

A compressed-tensors config makes vLLM give every attention layer six scalars, three KV-cache scales (1) and three zero
points (0). vLLM 0.32 fills them with these defaults itself, but its loader of draft (MTP) layers insists on finding each
parameter in the checkpoint. With `release.draft_scales=true` the release carries them, 24 bytes per draft layer in a shard
of their own. Off by default, since they alone do not make 0.32 draft: it also cuts `layer_types`, which only the bundled
plugin cures, and that makes the scalars unnecessary. docs/serving.md has what was tried.
"""

from __future__ import annotations

import re
from collections.abc import Container

from stages.checkpoint.header import sorted_specs
from stages.dialects.roles import TEXT_ROOT
from stages.errors import UserError

SHARD = "model-draft-scales.safetensors"
BYTES = 4  # of each, F32
VALUES = {f"{part}_{kind}": value for kind, value in (("scale", 1.0), ("zero_point", 0.0)) for part in "qkv"}
NAME = re.compile(rf"{TEXT_ROOT}\.layers\.\d+\.self_attn\.attn\.[qkv]_(scale|zero_point)")


def draft_scales(layers: int, text_layers: int, present: Container[str]) -> dict[str, float]:
    """Tensor name -> value of all inert scalars; UserError for a model without draft layers, or where the source's tensors, `present`, have them."""
    if not layers:
        raise UserError("release.draft_scales=true, but the model has no draft layers (num_nextn_predict_layers, and tensors of them)")
    scales = {f"model.layers.{layer}.self_attn.attn.{name}": value
              for layer in range(text_layers, text_layers + layers) for name, value in VALUES.items()}
    if there := next((name for name in scales if name in present), None):
        raise UserError(f"release.draft_scales=true, but the source holds {there} already; leave release.draft_scales out, the source's pass through")
    return scales


def specs_of_scales(names) -> list[tuple[str, str, tuple[int, ...]]]:
    """Header entries of their shard, in file order: F32 [1] each."""
    return sorted_specs([(name, "F32", (1,)) for name in names])
