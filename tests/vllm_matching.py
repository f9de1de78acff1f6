"""Random names and configs for the simulation of vLLM's matching and for vLLM's own functions.

    python -m tests.vllm_matching        in an environment with vLLM: prints how often each outcome was seen, as JSON
"""

import json
import random
import re

from stages.schemes import vllm_rules

PREFIX = "language_model.model.layers"
NAMES = [f"{PREFIX}.{layer}.{tail}" for layer in (0, 3, 17, 44) for tail in (
    "self_attn.qkv_proj", "self_attn.o_proj", "self_attn.g_proj", "mlp.gate_up_proj", "mlp.down_proj",
    "moe.share_expert.gate_up_proj", "moe.share_expert.down_proj", "moe.experts.0.gate_proj", "moe.experts.0.up_proj",
    "moe.experts.0.down_proj")] + [
    "language_model.lm_head", "vision_model.transformer.resblocks.3.attn.qkv_proj",
    "vision_model.transformer.resblocks.3.mlp.fc1", "vit_large_projector", "model.layers.45.mtp_block.self_attn.qkv_proj",
    "model.layers.45.mtp_block.mlp.gate_up_proj", "model.layers.45.shared_head.head"]
ENTRIES = [r"re:.*", r"re:.*\.moe\.experts\.\d+\..*", r"re:.*\.moe\.experts\.\d+\.(gate|up)_proj$", r"re:model\.layers\..*",
           r"re:.*mtp_block.*", r"re:.*self_attn.*", r"re:.*\.(q|k|v)_proj$", r"re:.*\.q_proj$", r"re:.*\.k_proj$",
           r"re:.*\.v_proj", r"re:.*\.gate_proj$", r"re:.*up_proj$", r"re:.*vision_model.*", r"re:.*lm_head$", "lm_head",
           "Linear", "linear", "RoutedExperts", "FusedMoE", "Attention", "RowParallelLinear", r"re:.*ParallelLinear",
           "language_model.lm_head", "vit_large_projector", r"re:.*\.layers\.(3|17)\..*",
           *(name for name in NAMES if "experts.0" in name), *(f"{PREFIX}.3.self_attn.{p}_proj" for p in "qkv"),
           f"{PREFIX}.3.mlp.gate_proj", f"{PREFIX}.3.mlp.up_proj", f"{PREFIX}.3.self_attn.qkv_proj"]


def class_of(name):
    if ".experts." in name:
        return vllm_rules.ROUTED_EXPERTS
    return next(found for pattern, found in vllm_rules.CLASSES if re.match(pattern, name))


def compare(count: int) -> dict[str, int]:
    """Outcomes of `count` random cases; AssertionError, with the case, where the two disagree."""
    from vllm.model_executor.layers.quantization.compressed_tensors import utils

    draw = random.Random(0)
    mapping = {whole: list(parts) for whole, parts in vllm_rules.FUSED.items()}
    seen = {"ignored": 0, "raises": 0, "matched": 0, "none": 0}
    for _ in range(count):
        name = draw.choice(NAMES)
        entries = draw.sample(ENTRIES, draw.randint(0, 4))
        fused = name.startswith("language_model.")
        module = vllm_rules.RuntimeModule(name, class_of(name), (), fused)
        theirs_mapping = mapping if fused else {}
        try:
            theirs = utils.should_ignore_layer(name, ignore=entries, fused_mapping=theirs_mapping)
        except ValueError:
            theirs = "raises"
        try:
            ours = vllm_rules.ignored(name, module.shards(), entries)
        except ValueError:
            ours = "raises"
        assert ours == theirs, (name, entries)
        instance = type(module.class_name, (), {})()
        target = utils.find_matched_target(name, instance, entries, theirs_mapping)
        assert vllm_rules.matched_target(name, module.shards(), module.class_name, entries) == target, (name, entries)
        seen["raises" if theirs == "raises" else "ignored" if theirs else "matched" if target else "none"] += 1
    return seen


if __name__ == "__main__":
    print(json.dumps(compare(10_000)))
