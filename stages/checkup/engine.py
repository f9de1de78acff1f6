"""What an engine makes of the config: whether its groups are those of the formats, and whether they claim what is stored."""

from __future__ import annotations

from collections.abc import Iterator

from stages.checkup.checkpoint import Checkpoint
from stages.checkup.json_checks import is_count
from stages.dialects.config import changes_weights
from stages.schemes import SCHEMES, kept, vllm_rules
from stages.schemes.architectures import UNKNOWN, architecture_of

SCALE_DTYPE = "torch.uint8"
NEEDED = ("num_bits", "type", "strategy", "group_size", "symmetric")
ARGUMENTS = {kept.FORMAT: {"num_bits": 8, "type": "float", "symmetric": True}} | {  # format -> what its group's `weights` must say
    scheme.FORMAT: {key: scheme.WEIGHTS[key] for key in NEEDED} for scheme in SCHEMES.values()}


def scheme_arguments(checkpoint: Checkpoint) -> Iterator[str]:
    """Groups say what is stored: bits, type, block, and a format for each."""
    section = checkpoint.section
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield "config.json: quantization_config has no config_groups, so that nothing is read as quantized"
        return
    for name, group in groups.items():
        form = group.get("format") or section.get("format")
        if form == "mixed-precision":
            yield f"config.json: {name} has no format of its own; mixed-precision needs one in every group"
        elif form not in ARGUMENTS:
            checkpoint.notes.append(f"config.json: {name} has format {form}, which is not verified here")
        else:
            yield from _weights(name, form, group.get("weights") or {})
            yield from _activations(checkpoint, name, form, group)
    inner = checkpoint.config.get("text_config") and checkpoint.text.get("quantization_config")
    if inner and inner != section:
        yield "config.json: text_config has another quantization_config than the whole, by which vLLM builds draft layers; take it out there"
    for part in changes_weights(section):
        yield f"config.json: quantization_config has {part}, by which an engine changes weights or inputs; nothing here vouches for that"
    if section.get("kv_cache_scheme"):
        checkpoint.notes.append("config.json: the KV cache is quantized, too")
    checkpoint.counts["scheme_arguments"] = len(groups)


def _weights(group: str, form: str, weights: dict) -> Iterator[str]:
    """What a group's `weights` say otherwise than its format."""
    for key, value in ARGUMENTS[form].items():
        if weights.get(key) != value:
            yield f"config.json: {group}.weights.{key} is {weights.get(key)!r}, {form} needs {value!r}"
    if form != "float-quantized" and weights.get("scale_dtype") != SCALE_DTYPE:
        yield (f"config.json: {group}.weights.scale_dtype is {weights.get('scale_dtype')!r}, not {SCALE_DTYPE!r}; "
               + ("vLLM does not take it for MXFP8" if form == "mxfp8-quantized" else "compressed-tensors takes its scales for floats"))
    if weights.get("dynamic"):
        yield f"config.json: {group}.weights.dynamic is {weights['dynamic']!r}; the scales are stored"


def _activations(checkpoint: Checkpoint, name: str, form: str, group: dict) -> Iterator[str]:
    """Of weight-only formats nothing; of FP8 a float of 8 bits found on the fly, unless the checkpoint stores its scales."""
    activations = group.get("input_activations")
    if activations is None:
        if form == "float-quantized" and not kept.stored_by(group, form).endswith(kept.WEIGHT_ONLY):
            yield f"config.json: {name} is FP8 in blocks without input_activations; vLLM takes that per channel and per tensor only"
        return
    if not isinstance(activations, dict) or activations.get("type") != "float":
        yield f"config.json: {name}.input_activations is {str(activations)[:80]!r}, expected none or floats"
    elif not activations.get("dynamic") and not any(tensor.endswith(("input_scale", "input_global_scale")) for tensor in checkpoint.tensors):
        yield f"config.json: {name}.input_activations is not dynamic, but the checkpoint holds no input_scale"
    elif form != "float-quantized":
        checkpoint.notes.append(f"config.json: {name} quantizes activations, too")


def coverage(checkpoint: Checkpoint) -> Iterator[str]:
    """vLLM's matching gives every module the format that it is stored in."""
    layers = checkpoint.text.get("num_hidden_layers")
    if not is_count(layers):
        return  # `layers` says so
    row = architecture_of(checkpoint.architecture)
    known = row is not None
    if not known:
        checkpoint.notes.append(f"config.json: the runtime names of {checkpoint.architecture} are not known here; they are taken to be the "
                                "checkpoint's")
    linears, experts, formats = checkpoint.engine_modules(layers, known)
    if row is not None:
        if fault := checkpoint.model_fault(row, layers, experts):
            yield fault
        yield from vllm_rules.expert_faults(row, *checkpoint.quantized_experts(layers))
    modules = vllm_rules.runtime_modules(linears, experts, layers, row or UNKNOWN)
    unused = {f"{entry}: matches no module of the model" for entry in checkpoint.section.get("ignore") or []}
    for fault in vllm_rules.coverage_faults(modules, checkpoint.section, formats, row or UNKNOWN):
        if fault in unused:
            checkpoint.notes.append(f"config.json: ignore {fault}")
        else:
            yield fault
    checkpoint.counts["coverage"] = len(modules)
