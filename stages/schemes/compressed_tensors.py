"""The `quantization_config` of a release: compressed-tensors, format `mixed-precision`, weight-only MXFP4.

Targets are regular expressions over vLLM's runtime names (they begin with `language_model.`, fuse q, k, v and gate, up,
and call the shared expert `moe.share_expert`), anchored at both ends so that they hit nothing else. `ignore` names what
stays as it is, for engines that want every linear module explained. Both are checked against a simulation of vLLM's
matching (vllm_rules) when the release is assembled and again when it is verified.
"""

from __future__ import annotations

from stages.dialects.roles import layer_of
from stages.schemes import SCHEMES

# role -> tail of the runtime names of its modules, `{layers}` replaced by the layers concerned
TARGETS = {
    "routed_experts": r"re:.*\.layers\.{layers}\.moe\.experts\.\d+\.(gate_proj|up_proj|down_proj)$",
    "shared_experts": r"re:.*\.layers\.{layers}\.moe\.share_expert\.(gate_up_proj|gate_proj|up_proj|down_proj)$",
    "attention": r"re:.*\.layers\.{layers}\.self_attn\.(qkv_proj|q_proj|k_proj|v_proj|o_proj|g_proj)$",
    "dense_mlp": r"re:.*\.layers\.{layers}\.mlp\.(gate_up_proj|gate_proj|up_proj|down_proj)$",
}
# ... and of what stays unquantized, when the model has such tensors
IGNORES = {
    **TARGETS,
    "router": r"re:.*\.moe\.gate$",
    "lm_head": r"re:.*lm_head$",
    "mtp": r"re:.*\.(mtp_block|shared_head|eh_proj)(\..*)?$",
    "vision": r"re:.*vision_model\..*",
    "projector": r"re:.*vit_large_projector$",
}


def _layers(numbers: set[int], all_numbers: set[int]) -> str:
    return r"\d+" if numbers == all_numbers else "(" + "|".join(map(str, sorted(numbers))) + ")"


def quantization_config(tensors: dict) -> dict:
    """Config section for a plan's tensors: name -> {role, decision, scheme, ...}."""
    layers: dict[tuple[str, str | None], set[int]] = {}
    present: dict[str, set[int]] = {}
    for name, entry in tensors.items():
        if not name.endswith("weight") and entry["role"] in TARGETS:
            continue  # scales
        layer = layer_of(name)
        layers.setdefault((entry["role"], entry["scheme"]), set()).add(layer)
        present.setdefault(entry["role"], set()).add(layer)
    groups: dict[str, dict] = {}
    for (role, scheme), numbers in sorted(layers.items(), key=lambda item: (item[0][0], item[0][1] or "")):
        if scheme is not None:
            target = TARGETS[role].replace("{layers}", _layers(numbers, present[role]))
            groups.setdefault(scheme, {"targets": [], "weights": dict(SCHEMES[scheme].WEIGHTS),
                                       "input_activations": None, "output_activations": None,
                                       "format": SCHEMES[scheme].FORMAT})["targets"].append(target)
    ignore = []
    for role, pattern in IGNORES.items():
        numbers = layers.get((role, None))
        if numbers:
            ignore.append(pattern.replace("{layers}", _layers(numbers, present[role]) if "{layers}" in pattern else ""))
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
