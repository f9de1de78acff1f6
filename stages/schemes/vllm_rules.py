"""What vLLM will do with a compressed-tensors config: a small simulation of its matching, run before anything is served.

A target that hits nothing does not fail in vLLM: the experts are then left uninitialized or unquantized silently.
So the names that vLLM will ask for are derived from the tensors of the release, its rules are applied to them, and every
quantized module must be claimed by its scheme while every other linear module is claimed by none.

The rules (vLLM 0.32), for a module's runtime name:
1. `ignore` first. An entry must be equal or, as `re:`, match from the start (the end is open). The module's own name is tried,
   then those of its shards where it is fused (qkv_proj, gate_up_proj): all or none of them, otherwise vLLM raises.
2. Then the targets, in order: the name; where it is fused, its shards, all of which must match; the class name, which a
   plain target need only occur in, in any case.
3. The routed experts of a layer are one module, probed as the gate, up and down projection of expert 0, which must all find
   the same scheme. A target `Linear` stands for `RoutedExperts`, too.
4. Plain names in the config that hold a dot are mapped as the checkpoint's are; a draft model has no mapper and takes them as they are.
5. Where a model is built before its mapping of merged modules is set, only its modules' own names count (architectures.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stages.dialects.roles import layer_and_tail, role_of
from stages.schemes.architectures import CLASSES, HEAD, SWIGLU, UNKNOWN, Architecture, config_name, runtime_name
from stages.schemes.kept import WEIGHT_ONLY, stored_by

ROUTED_EXPERTS = "RoutedExperts"
EXPERT_BLOCK = re.compile(r"(\.(?:moe|mlp|ffn|block_sparse_moe|feed_forward))\..*$")


@dataclass(frozen=True)
class RuntimeModule:
    """A linear module as vLLM names it, and the checkpoint's modules that fill it."""

    name: str
    class_name: str | None
    members: tuple[str, ...]
    parts: tuple[str, ...] = ()  # leaves of a merged module that targets and ignores may name, too
    expanded: bool = False  # the loader decodes it: it may be stored in FP8, though no config reaches it
    probes: tuple[str, ...] = SWIGLU  # of routed experts: the projections that are looked up
    draft: bool = False  # of a draft layer, which no mapper of names knows

    def shards(self) -> list[str]:
        """Names of the parts of a merged module, as targets and ignores may name them; empty for others."""
        prefix = self.name.rpartition(".")[0]
        return [f"{prefix}.{part}" for part in self.parts]

    def names(self) -> list[str]:
        """All names by which a target or an ignore entry can reach the module."""
        if self.class_name == ROUTED_EXPERTS:
            return [f"{self.name}.0.{projection}" for projection in self.probes]
        return [self.name, *self.shards()]


def runtime_modules(linears: Iterable[str], routed_experts: Iterable[str], text_layers: int, row: Architecture) -> list[RuntimeModule]:
    """Modules that vLLM builds from the checkpoint's linear modules.

    `linears`: 2D modules; `routed_experts`: the experts' projections, as `...moe.gate_proj` or `...experts.7.gate_proj`.
    """
    whole_of = {part: whole for whole, parts in row.merged.items() for part in parts}
    members: dict[str, list[str]] = {}
    named = {module: runtime_name(module, row, text_layers).rpartition(".") for module in linears}
    there = {(prefix, leaf) for prefix, _, leaf in named.values()}
    for module, (prefix, _, leaf) in named.items():
        whole = whole_of.get(leaf, leaf)
        if any((prefix, part) not in there for part in named_parts(row.merged.get(whole, ()))):
            whole = leaf  # nothing to merge with: without q_lora_rank, DeepSeek's q_proj and kv_a_proj_with_mqa stand alone
        members.setdefault(f"{prefix}.{whole}" if prefix else whole, []).append(module)
    result = []
    for name, parts in members.items():
        leaf = name.rpartition(".")[2]
        class_name = None if re.match(row.never, name) else next(found for pattern, found in CLASSES if re.match(pattern, name))
        seen = leaf in row.visible and not re.match(row.unseen, name)
        result.append(RuntimeModule(name, class_name, tuple(parts), named_parts(row.merged[leaf]) if seen else (),
                                    expanded=re.match(row.expanded, name) is not None, draft=is_draft(parts[0], text_layers)))
    layers: dict[str, list[str]] = {}
    for module in routed_experts:
        layers.setdefault(EXPERT_BLOCK.sub(r"\1.experts", runtime_name(module, row, text_layers)), []).append(module)
    return result + [RuntimeModule(name, ROUTED_EXPERTS, tuple(parts), probes=row.probes, draft=is_draft(parts[0], text_layers))
                     for name, parts in layers.items()]


def is_draft(module: str, text_layers: int) -> bool:
    """Whether a checkpoint's module is of a draft layer."""
    return role_of(f"{module}.weight", text_layers) == "mtp"


def text_fault(row: Architecture, architecture: str, text: str | None) -> str | None:
    """Why a row says nothing of a model that vLLM builds around a text model of this type; None where it does."""
    if row.text and text not in row.text:
        return (f"config.json: {architecture} is known around a text model of type {', '.join(row.text)} only, this one's text_config says {text}; "
                "vLLM takes the names of the text model's modules from its own class: add a row to stages/schemes/architectures.py")
    return None


def model_fault(row: Architecture, architecture: str, names: Iterable[str], expert_layers: Iterable[int], text_layers: int) -> str | None:
    """Why vLLM would not serve a model, or would serve it wrong, whatever its config says of quantization; None where it would.

    names: all tensors. expert_layers: numbers of the layers with routed experts. text_layers: those before the draft layers.
    """
    if row.refused:
        return f"config.json: {architecture} is not converted: {row.refused}"
    places = {name: layer_and_tail(name) for name in names}
    if row.draftless and (draft := next((name for name in places if role_of(name, text_layers) == "mtp"), None)):
        return (f"{draft} belongs to a draft layer; vLLM has none for {architecture} and stops at this tensor: take the layers past "
                "num_hidden_layers out of the checkpoint and set num_nextn_predict_layers to 0")
    roots: dict[str, str] = {}  # what names of layers begin with -> the first of them
    for name, (layer, _) in places.items():
        if layer is not None and layer < text_layers:
            roots.setdefault(name.partition("layers.")[0], name)
    for root, name in roots.items():
        if (found := runtime_name(f"{root}layers.0", row, text_layers).removesuffix(".0")) != f"{row.root}.layers":
            return (f"{name} is one of {found}.* to vLLM, which has the layers of {architecture} as {row.root}.layers.* and stops at others; config.json "
                    "is of another architecture than the tensors, get the checkpoint with its own")
    routing = {layer for layer, tail in places.values() if tail == row.needed}
    lacking = {layer for layer in expert_layers if layer < text_layers} - routing
    if row.needed and lacking:
        return (f"layer {min(lacking)}: there is no {row.needed}, by which vLLM routes {architecture}'s tokens; it would leave it uninitialized and "
                "say nothing: give the tensor the name that it is published under")
    return None


def expert_faults(row: Architecture, projections: Iterable[str], stacked: bool) -> list[str]:
    """What keeps vLLM from loading quantized routed experts: it passes over names that it does not know, and leaves the experts uninitialized.

    projections: under which they are stored, none where they are not quantized. stacked: whether in 3D.
    """
    faults = []
    if strange := set(projections) - set(row.experts):
        faults.append(f"vLLM loads experts of {row.names[0]} as {', '.join(row.experts)}, these are stored as {', '.join(sorted(strange))}")
    if stacked and not row.stacked:
        faults.append(f"vLLM loads quantized experts of {row.names[0]} one by one only, these are stacked in 3D")
    return faults


def named_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Of what is merged, the leaves that the mapping of packed modules names: an indexer's projections go along unnamed."""
    return tuple(part for part in parts if not part.startswith("index_"))


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


def formats_of(section: Mapping) -> dict[str, str]:
    """Target -> what the group that claims by it says is stored; later groups overwrite earlier ones, as in vLLM."""
    groups = (section.get("config_groups") or {}).values()
    return {target: stored_by(group, section.get("format")) for group in groups for target in group["targets"]}


class Entries:
    """A config's targets and ignore list as a model sees them, under the names that its mapper gives them, and which of them were of use."""

    def __init__(self, section: Mapping, row: Architecture):
        self.formats = {config_name(target, row): form for target, form in formats_of(section).items()}
        self.targets, self.ignore = list(self.formats), [config_name(entry, row) for entry in section.get("ignore") or []]
        self._row, self.used = row, set()

    def note(self, module: RuntimeModule) -> None:
        """Marks the entries that reach a module."""
        names = [*module.names(), *([module.class_name] if module.class_name else [])]
        self.used.update(entry for entry in (*self.targets, *self.ignore) if any(_matches(name, entry) for name in names)
                         or (module.class_name and entry.lower() in module.class_name.lower()))

    def unused(self, section: Mapping) -> list[str]:
        """Of the config's own entries, as they are written there."""
        return [entry for entry in (*formats_of(section), *(section.get("ignore") or [])) if config_name(entry, self._row) not in self.used]


def _module_fault(module: RuntimeModule, stored: Mapping[str, str], entries: Entries) -> str | None:
    """How a module is stored otherwise than vLLM will expect by a config's entries; None where both agree. stored: as in `coverage_faults`."""
    kinds = {stored.get(member) for member in module.members}
    if len(kinds) > 1:
        odd = next(m for m in module.members if stored.get(m) != stored.get(module.members[0]))
        return (f"one format is needed for all its parts, but {odd} is "
                + (f"{stored[odd]}, {module.members[0]} is not" if odd in stored else "not quantized"))
    kind = kinds.pop()
    try:
        target = scheme_target(module, entries.targets, entries.ignore)
    except ValueError as error:
        return str(error)
    form = entries.formats.get(target, entries.formats.get("Linear")) if target else None
    if module.expanded and (kind is None or kind.startswith("fp8")):
        return None
    if kind is None:
        return None if target is None else f"stored unquantized, but target {target} claims it; vLLM would expect {form}"
    if module.class_name is None:
        return f"stored as {kind}, but vLLM never reads it quantized"
    if module.class_name == HEAD and re.fullmatch(r"fp8 \d+x\d+", kind):
        return f"stored as {kind}, but vLLM loads a head with scales per channel, per tensor or per 32 inputs only"
    if target is None:
        return f"stored as {kind}, but no target claims it; vLLM would leave it uninitialized"
    if form.endswith(WEIGHT_ONLY) and module.class_name == ROUTED_EXPERTS:
        return f"its group says {form}, but vLLM has no FP8 experts whose activations are not quantized"
    if kind not in (form, form.removesuffix(WEIGHT_ONLY)):  # tensors alone do not tell the two apart
        return f"stored as {kind}, but its group says {form}"
    return None


def coverage_faults(modules: Iterable[RuntimeModule], section: Mapping, stored: Mapping[str, str], row: Architecture) -> list[str]:
    """Every disagreement between what is stored and what vLLM will expect; an empty list is the proof.

    section: the quantization_config. row: of the model's architecture. stored: checkpoint module (as in `RuntimeModule.members`) -> `mxfp4`,
    `fp8 128x128` ... (schemes.kept), for what is quantized.
    """
    of_model, of_drafts = Entries(section, row), Entries(section, UNKNOWN)
    faults = []
    for module in modules:
        entries = of_drafts if module.draft else of_model
        entries.note(module)
        if fault := _module_fault(module, stored, entries):
            faults.append(f"{module.name}: {fault}")
    in_drafts = set(of_drafts.unused(section))
    faults += [f"{entry}: matches no module of the model" for entry in of_model.unused(section) if entry in in_drafts]
    return faults
