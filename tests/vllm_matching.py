"""Random names and configs for the simulation of vLLM's matching and for vLLM's own functions; names of real checkpoints for
the table of architectures and for vLLM's own model classes.

    python -m tests.vllm_matching        in an environment with vLLM: prints how often each outcome was seen, as JSON
"""

import json
import random
import re

from stages.schemes import vllm_rules
from stages.schemes.architectures import ARCHITECTURES, CLASSES, STANDARD, architecture_of, config_name, runtime_name
from stages.schemes.kept import WEIGHT_ONLY, group_of
from stages.schemes.modules import module_of
from stages.schemes.vllm_rules import named_parts
from tests import step37_flash
from tests.meta_checkpoints import FAMILIES, Family

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
    return next(found for pattern, found in CLASSES if re.match(pattern, name))


def compare(count: int) -> dict[str, int]:
    """Outcomes of `count` random cases; AssertionError, with the case, where the two disagree."""
    from vllm.model_executor.layers.quantization.compressed_tensors import utils

    draw = random.Random(0)
    mapping = {whole: list(parts) for whole, parts in STANDARD.items()}
    seen = {"ignored": 0, "raises": 0, "matched": 0, "none": 0}
    for _ in range(count):
        name = draw.choice(NAMES)
        entries = draw.sample(ENTRIES, draw.randint(0, 4))
        fused = name.startswith("language_model.")
        module = vllm_rules.RuntimeModule(name, class_of(name), (), STANDARD.get(name.rpartition(".")[2], ()) if fused else ())
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


def vllm_class(name: str):
    """vLLM's class of an architecture."""
    from vllm.model_executor.models.registry import ModelRegistry

    return ModelRegistry._try_load_model_cls(name)


def compare_architectures() -> dict[str, int]:
    """Architecture -> number of names that vLLM's mapper and the table map alike; AssertionError, with the name, where not."""
    import transformers

    checked = {}
    for row in ARCHITECTURES:
        for architecture in row.names:
            cls = vllm_class(architecture)
            if row.borrowed:
                assert cls is None and hasattr(transformers, architecture), architecture
                checked[architecture] = 0
                continue
            if cls is None:
                continue  # a model for other devices than this
            packed = dict(getattr(cls, "packed_modules_mapping", None) or {})
            ours = {whole: list(named_parts(row.merged[whole])) for whole in row.visible}
            for whole, parts in ours.items():
                if whole in packed:  # others are set when a model is built
                    assert packed[whole] == parts, (architecture, whole, packed[whole], parts)
            hidden = {whole for whole in packed if whole in row.merged} - set(ours)
            assert not hidden, (architecture, hidden)
            checked[architecture] = _compare_names(architecture, cls, row)
    return checked


def _compare_names(architecture: str, cls, row) -> int:
    """Names of the family's tensors, mapped by vLLM's class and by the table."""
    mapper = getattr(cls, "hf_to_vllm_mapper", None)
    if mapper is None:
        assert all(module == runtime_name(module, row, 10**9) for module in ("model.layers.3.self_attn.q_proj", "lm_head")) \
            or architecture.startswith(("Step", "MiniMaxM2")), architecture
        return 0
    mapper, count = mapper.get_rename_mapper(), 0
    step = Family("", step37_flash.config(True), lambda: {name: entry for shard in step37_flash.tensors().values() for name, entry in shard.items()})
    for family in (*FAMILIES.values(), step):
        if architecture not in family.config["architectures"]:
            continue
        layers = (family.config.get("text_config") or family.config)["num_hidden_layers"]
        for name, (_, shape) in family.tensors().items():
            module = module_of(name)
            layer = re.match(r"(?:.*\.)?layers\.(\d+)\.", name)
            if len(shape) < 2 or not name.endswith(".weight") or module.startswith("mtp.") or (layer and int(layer[1]) >= layers):
                continue
            theirs = mapper._map_name(name)
            inner = r"\.experts\.|\.share_expert\.|\.c_fc$|\.c_proj$|visual\..*\.qkv$"  # inner models rename these
            if theirs is not None and "." in module and ".share_expert." not in module:  # whose mapper is the text model's
                assert mapper._map_name(module) == config_name(module, row), (architecture, module, "in a config")
            if theirs is not None and not re.search(inner, module):
                assert theirs.removesuffix(".weight") == runtime_name(module, row, layers), (architecture, module, theirs)
                count += 1
    return count


def compare_groups() -> dict[str, str]:
    """Stored format -> vLLM's test that takes its group's arguments; AssertionError where it takes them for another."""
    from vllm.model_executor.layers.quantization.compressed_tensors import utils
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    found = {}
    for stored in ("mxfp4", "mxfp8", "fp8 128x128", *(f"fp8 per {kind}{more}" for kind in ("channel", "tensor") for more in ("", WEIGHT_ONLY))):
        group = {"targets": ["re:.*"], **group_of(stored)}
        section = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {"group_0": group}, "ignore": []}
        config = CompressedTensorsConfig.from_config(section)
        made = config.target_scheme_map["re:.*"]
        weights, activations = made["weights"], made["input_activations"]
        tests = {"mxfp4": config._is_mxfp4(weights), "mxfp8": config._is_mxfp8(weights), "fp8": config._is_fp8_w8a8(weights, activations)}
        if stored.endswith(WEIGHT_ONLY):
            tests["fp8"] = activations is None and config._is_fp8_w8a16(weights, activations) and not tests["fp8"]
        assert [name for name, holds in tests.items() if holds] == [stored.split()[0]], (stored, tests)
        assert stored.startswith("mx") or utils.is_activation_quantization_format(made["format"]), made["format"]
        found[stored] = stored.split()[0]
    return found


if __name__ == "__main__":
    assert architecture_of("GptOssForCausalLM").refused
    print(json.dumps({"names": compare_architectures(), "groups": compare_groups(), "outcomes": compare(10_000)}))
