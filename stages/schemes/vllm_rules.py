"""What vLLM will do with a compressed-tensors config: a small simulation of its matching, run before anything is served.

A target that hits nothing does not fail in vLLM: the experts are then left uninitialized or unquantized without a word.
So the names that vLLM will ask for are derived from the tensors of the release, its rules are applied to them, and every
quantized module must be claimed by its scheme while every other linear module is claimed by none.

The rules (vLLM 0.32), for a module's runtime name:
1. `ignore` first. An entry must be equal or, as `re:`, match from the start (the end is open). The module's own name is tried,
   then those of its shards where it is fused (qkv_proj, gate_up_proj): all or none of them, otherwise vLLM raises.
2. Then the targets, in order: the name; where it is fused, its shards, all of which must match; the class name, which a
   plain target need only occur in, in any case.
3. The routed experts of a layer are one module, probed as the gate, up and down projection of expert 0, which must all find
   the same scheme. A target `Linear` stands for `RoutedExperts`, too.
4. The vision tower and the draft layers are built without the mapping of fused modules: only their own names count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ROUTED_EXPERTS = "RoutedExperts"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

ARCHITECTURES = ("Step3p7ForConditionalGeneration", "Step3p5ForCausalLM")  # whose runtime names the tables below give

# checkpoint prefix -> runtime prefix, first match wins; then the shared expert moves under `moe`
PREFIXES = (
    ("model.vision_model.", "vision_model."), ("vision_model.", "vision_model."),
    ("model.vit_large_projector", "vit_large_projector"), ("vit_large_projector", "vit_large_projector"),
    ("model.language_model.", "language_model.model."), ("language_model.", "language_model."),
    ("model.", "language_model.model."), ("lm_head", "language_model.lm_head"),
)
SUBSTITUTIONS = (
    (r"\.share_expert\.", ".moe.share_expert."), (r"\.attn\.in_proj$", ".attn.qkv_proj"),
    (r"\.mlp\.c_fc$", ".mlp.fc1"), (r"\.mlp\.c_proj$", ".mlp.fc2"),
)
# tail of a runtime name -> the class that vLLM builds, which class-name targets are compared with; None: no quantization
# config reaches the module, so that it is never quantized
CLASSES = (
    (r".*\.(moe|mlp|ffn|block_sparse_moe)\.gate$", None), (r".*\.eh_proj$", None), (r".*embed_tokens$", None), (r".*\.conv1$", None),
    (r".*vit_downsampler\d$", None),
    (r".*(lm_head|shared_head\.head)$", "ParallelLMHead"), (r".*qkv_proj$", "QKVParallelLinear"),
    (r".*gate_up_proj$", "MergedColumnParallelLinear"), (r".*(o_proj|out_proj|down_proj|fc2)$", "RowParallelLinear"),
    (r".*", "ColumnParallelLinear"),
)


@dataclass(frozen=True)
class RuntimeModule:
    """A linear module as vLLM names it, and the checkpoint's modules that fill it."""

    name: str
    class_name: str | None
    members: tuple[str, ...]
    fused: bool = False  # built with the mapping of fused modules

    def shards(self) -> list[str]:
        """Names of the parts of a fused module, as targets and ignores may name them; empty for others."""
        prefix, _, leaf = self.name.rpartition(".")
        return [f"{prefix}.{part}" for part in FUSED.get(leaf, ())] if self.fused else []

    def names(self) -> list[str]:
        """All names by which a target or an ignore entry can reach the module."""
        if self.class_name == ROUTED_EXPERTS:
            return [f"{self.name}.0.{projection}_proj" for projection in ("gate", "up", "down")]
        return [self.name, *self.shards()]


def runtime_name(module: str, text_layers: int) -> str:
    """Checkpoint module name (no `.weight`) -> vLLM's name of it, before fusing."""
    layer = re.match(r"(?:model\.language_model|language_model\.model|model)\.layers\.(\d+)\.(.*)", module)
    if layer and int(layer.group(1)) >= text_layers:  # the draft model has names of its own and no mapper
        rest = layer.group(2)
        rest = re.sub(r"^transformer\.shared_head\.output$", "shared_head.head", rest)
        if not rest.startswith(("shared_head", "eh_proj")):
            rest = f"mtp_block.{rest}"
        return f"model.layers.{layer.group(1)}.{rest}"
    for old, new in PREFIXES:
        if module.startswith(old):
            module = new + module[len(old):]
            break
    for pattern, replacement in SUBSTITUTIONS:
        module = re.sub(pattern, replacement, module)
    return module


def runtime_modules(linears: Iterable[str], routed_experts: Iterable[str], text_layers: int,
                    architecture: str | None = ARCHITECTURES[0]) -> list[RuntimeModule]:
    """Modules that vLLM builds from the checkpoint's linear modules.

    `linears`: 2D modules; `routed_experts`: the experts' projections, as `...moe.gate_proj` or `...experts.7.gate_proj`.
    For an architecture that ARCHITECTURES does not name, runtime names are taken to be the checkpoint's.
    """
    known = architecture in ARCHITECTURES

    def name_of(module: str) -> str:
        return runtime_name(module, text_layers) if known else module

    members: dict[str, list[str]] = {}
    for module in linears:
        name = name_of(module)
        prefix, _, leaf = name.rpartition(".")
        whole = next((whole for whole, parts in FUSED.items() if leaf in parts), leaf)
        members.setdefault(f"{prefix}.{whole}" if prefix else whole, []).append(module)
    result = []
    for name, parts in members.items():
        class_name = next(found for pattern, found in CLASSES if re.match(pattern, name))
        text = not known or name.startswith("language_model.")  # the draft's names begin with model.layers, the tower's with vision_model
        result.append(RuntimeModule(name, class_name, tuple(parts), fused=text))
    layers: dict[str, list[str]] = {}
    for module in routed_experts:
        layers.setdefault(re.sub(r"(\.(?:moe|mlp|ffn|block_sparse_moe|feed_forward))\..*$", r"\1.experts", name_of(module)), []).append(module)
    result += [RuntimeModule(name, ROUTED_EXPERTS, tuple(parts), fused=True) for name, parts in layers.items()]
    return result


def _matches(value: str, entry: str) -> bool:
    return re.match(entry[3:], value) is not None if entry.startswith("re:") else entry == value


def _first(value: str, entries: Iterable[str]) -> str | None:
    return next((entry for entry in entries if _matches(value, entry)), None)


def ignored(name: str, shards: list[str], ignore: list[str]) -> bool:
    """Whether `ignore` takes a name out of quantization; ValueError where only some of its shards are named."""
    if _first(name, ignore):
        return True
    found = [_first(shard, ignore) is not None for shard in shards]
    if any(found) and not all(found):
        raise ValueError(f"ignore names only some of {', '.join(shards)}, so that vLLM raises")
    return bool(found) and all(found)


def matched_target(name: str, shards: list[str], class_name: str, targets: list[str]) -> str | None:
    """The target that gives a name its scheme, or None."""
    if found := _first(name, targets):
        return found
    parts = [_first(shard, targets) for shard in shards]
    if parts and all(parts):
        return parts[0]
    return next((target for target in targets if (re.match(target[3:], class_name) if target.startswith("re:")
                                                  else target.lower() in class_name.lower())), None)


def scheme_target(module: RuntimeModule, targets: list[str], ignore: list[str]) -> str | None:
    """The target under which vLLM quantizes the module, None if it stays as it is; ValueError where vLLM raises."""
    if module.class_name is None:
        return None
    if module.class_name != ROUTED_EXPERTS:
        if ignored(module.name, module.shards(), ignore):
            return None
        return matched_target(module.name, module.shards(), module.class_name, targets)
    if "Linear" in targets and ROUTED_EXPERTS not in targets:
        targets = [*targets, ROUTED_EXPERTS]
    found = [None if ignored(probe, [], ignore) else matched_target(probe, [], ROUTED_EXPERTS, targets)
             for probe in module.names()]
    if len(set(map(bool, found))) > 1:
        raise ValueError(f"only some of {', '.join(module.names())} find a scheme, so that vLLM raises")
    return found[0]


def coverage_faults(modules: Iterable[RuntimeModule], quantization_config: Mapping, quantized: set[str]) -> list[str]:
    """Every disagreement between what is stored and what vLLM will expect; an empty list is the proof.

    `quantized` holds the checkpoint modules (as in `RuntimeModule.members`) that the release stores in MXFP4.
    """
    targets = [target for group in quantization_config["config_groups"].values() for target in group["targets"]]
    ignore = list(quantization_config.get("ignore") or [])
    faults, used = [], set()
    for module in modules:
        names = [*module.names(), *([module.class_name] if module.class_name else [])]
        used.update(entry for entry in (*targets, *ignore) if any(_matches(name, entry) for name in names)
                    or (module.class_name and entry.lower() in module.class_name.lower()))
        stored = [member in quantized for member in module.members]
        if any(stored) and not all(stored):
            missing = next(m for m, s in zip(module.members, stored) if not s)
            faults.append(f"{module.name}: one format is needed for all its parts, but {missing} is not quantized")
            continue
        try:
            target = scheme_target(module, targets, ignore)
        except ValueError as error:
            faults.append(f"{module.name}: {error}")
            continue
        if all(stored) and target is None:
            faults.append(f"{module.name}: stored as MXFP4, but no target claims it; vLLM would leave it uninitialized")
        elif not any(stored) and target is not None:
            faults.append(f"{module.name}: stored unquantized, but target {target} claims it; vLLM would expect MXFP4")
    faults += [f"{entry}: matches no module of the model" for entry in (*targets, *ignore) if entry not in used]
    return faults
