"""What vLLM will do with a compressed-tensors config: a small simulation of its matching, run before anything is served.

A target that hits nothing does not fail in vLLM: the experts are then left uninitialized or unquantized without a word.
So the names that vLLM will ask for are derived from the tensors of the release, its rules are applied to them, and every
quantized module must be claimed by its scheme while every other linear module is claimed by none.

The rules (vLLM 0.32): a name is tried against the targets in order, a plain target must be equal, `re:` means re.match
(start anchored, end open); a fused module (qkv_proj, gate_up_proj) counts when its own name or all of its shards match;
then the class name is tried the same way. The routed experts of a layer are one module, probed through expert 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

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
# linear modules that vLLM builds without any quantization config
NEVER_QUANTIZED = (r".*\.moe\.gate$", r".*\.eh_proj$", r".*embed_tokens$", r".*\.conv1$", r".*vit_downsampler\d$")


@dataclass(frozen=True)
class RuntimeModule:
    """A linear module as vLLM names it, and the release's tensors or checkpoint modules that fill it."""

    name: str
    kind: str  # Linear | RoutedExperts | ParallelLMHead
    members: tuple[str, ...]  # checkpoint modules
    probes: tuple[str, ...]  # names that vLLM matches against targets; all of one group must agree


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


def runtime_modules(linears: Iterable[str], routed_experts: Iterable[str], text_layers: int) -> list[RuntimeModule]:
    """Modules that vLLM builds from the checkpoint's linear modules.

    `linears`: 2D modules; `routed_experts`: the experts' projections, as `...moe.gate_proj` or `...experts.7.gate_proj`.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    for module in linears:
        name = runtime_name(module, text_layers)
        prefix, _, leaf = name.rpartition(".")
        fused = next((whole for whole, parts in FUSED.items()
                      if leaf in parts and not prefix.endswith(".attn")), None)
        members.setdefault(f"{prefix}.{fused}" if fused else name, []).append((module, name))
    result = []
    for name, parts in members.items():
        if any(re.match(pattern, name) for pattern in NEVER_QUANTIZED):
            kind = "unquantizable"
        else:
            kind = "ParallelLMHead" if name.endswith(("lm_head", "shared_head.head")) else "Linear"
        result.append(RuntimeModule(name, kind, tuple(module for module, _ in parts),
                                    tuple(sorted(part for _, part in parts))))
    layers: dict[str, list[str]] = {}
    for module in routed_experts:
        name = runtime_name(module, text_layers)
        layers.setdefault(re.sub(r"(\.moe)\..*$", r"\1.experts", name), []).append(module)
    for name, parts in layers.items():
        probes = tuple(f"{name}.0.{projection}_proj" for projection in ("gate", "up", "down"))
        result.append(RuntimeModule(name, "RoutedExperts", tuple(parts), probes))
    return result


def _hits(name: str, targets: Iterable[str]) -> str | None:
    for target in targets:
        if target == name or (target.startswith("re:") and re.match(target[3:], name)):
            return target
    return None


def matched_target(module: RuntimeModule, targets: Iterable[str]) -> str | None:
    """The target that gives this module its scheme, or None; "mixed" when its parts disagree (vLLM then raises)."""
    targets = list(targets)
    if module.kind == "unquantizable":
        return None
    if module.kind == "RoutedExperts":
        found = [_hits(probe, targets) for probe in module.probes]
        by_class = _hits("RoutedExperts", targets) or next((t for t in targets if t == "Linear"), None)
        found = [hit or by_class for hit in found]
        return found[0] if len(set(map(bool, found))) == 1 else "mixed"
    found = _hits(module.name, targets)
    if found:
        return found
    parts = [_hits(probe, targets) for probe in module.probes]
    if len(module.probes) > 1 and all(parts):
        return parts[0]
    if len(module.probes) > 1 and any(parts):
        return "mixed"
    return next((t for t in targets if not t.startswith("re:") and t.lower() in module.kind.lower()), None)


def is_ignored(module: RuntimeModule, ignore: Iterable[str]) -> bool | str:
    """Whether `ignore` takes the module out; "mixed" when only some of its parts are named (vLLM then raises)."""
    ignore = list(ignore)
    if _hits(module.name, ignore):
        return True
    parts = [bool(_hits(probe, ignore)) for probe in module.probes]
    return all(parts) if len(set(parts)) == 1 else "mixed"


def coverage_faults(modules: Iterable[RuntimeModule], quantization_config: Mapping, quantized: set[str]) -> list[str]:
    """Every disagreement between what is stored and what vLLM will expect; an empty list is the proof.

    `quantized` holds the checkpoint modules (as in `RuntimeModule.members`) that the release stores in MXFP4.
    """
    groups = quantization_config["config_groups"].values()
    targets = [target for group in groups for target in group["targets"]]
    ignore = list(quantization_config.get("ignore") or [])
    faults, used = [], set()
    for module in modules:
        stored = [member in quantized for member in module.members]
        if any(stored) and not all(stored):
            missing = next(m for m, s in zip(module.members, stored) if not s)
            faults.append(f"{module.name}: one format is needed for all its parts, but {missing} is not quantized")
            continue
        ignored = is_ignored(module, ignore)
        hit = matched_target(module, targets) if ignored is False else None
        used.update(t for t in (*targets, *ignore) if any(_hits(n, [t]) for n in (module.name, *module.probes)))
        if "mixed" in (ignored, hit):
            faults.append(f"{module.name}: only some of {', '.join(module.probes)} match; vLLM raises")
        elif all(stored) and not hit:
            faults.append(f"{module.name}: stored as MXFP4, but no target claims it; vLLM would leave it uninitialized")
        elif not any(stored) and hit:
            faults.append(f"{module.name}: stored unquantized, but target {hit} claims it; vLLM would expect MXFP4")
    faults += [f"{entry}: matches no module of the model" for entry in (*targets, *ignore) if entry not in used]
    return faults
