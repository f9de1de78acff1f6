"""Whether everything is there that config.json counts: routed experts and layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from stages.checkup.checkpoint import Checkpoint
from stages.checkup.faults import some
from stages.dialects.completeness import check_ends, check_tower, held_by_layers, lacking_layers, unlike_their_kind
from stages.dialects.config import expert_count, has_shared_experts, is_tied, layers_apart, tower_blocks
from stages.dialects.roles import as_numbered_layer, declared_drafts, hidden_layers, layer_of
from stages.errors import UserError
from stages.schemes.architectures import architecture_of
from stages.schemes.modules import EXPERT

MOST_LAYERS, MOST_EXPERTS = 10_000, 10_000  # that are looked for, whatever a config or a name says

Groups = dict[tuple[str, str], dict[int, tuple[int, ...]]]  # layer and projection -> expert -> shape of its weight


def experts(checkpoint: Checkpoint) -> Iterator[str]:
    """Every layer has all its routed experts, in one format, of one shape."""
    wanted = None
    try:
        wanted = expert_count(checkpoint.config)
    except UserError as error:
        yield str(error)
    groups: Groups = defaultdict(dict)
    formats: dict[str, set] = defaultdict(set)
    stacked: list[tuple[str, str, str]] = []
    for module, (stored, info, _, _) in checkpoint.modules.items():
        if match := EXPERT.match(module):
            groups[match["layer"], match["projection"]][int(match["number"])] = info.shape
            formats[match["layer"]].add(stored)
        elif len(info.shape) == 3 and (match := re.search(r"^(.*)\.(?:moe|experts)\.([^.]+)$", module)):
            stacked.append((re.sub(r"\.moe$", "", match[1]) + ".moe", match[2], module))
            if wanted and info.shape[0] != wanted:
                yield f"{module}: holds {info.shape[0]} experts, config.json says {wanted}"
    yield from (f"{layer}.experts: stored as {' and '.join(sorted(kinds))}; an engine reads all experts of a layer as one format"
                for layer, kinds in formats.items() if len(kinds) > 1)
    yield from (f"{module}: is there stacked and expert by expert; an engine takes either"
                for layer, projection, module in stacked if (layer, projection) in groups)
    yield from _lost_projections(groups)
    for (layer, projection), members in groups.items():
        missing = sorted(set(range(min(wanted or max(members) + 1, MOST_EXPERTS))) - set(members))
        yield from some([f"{layer}.experts.{number}.{projection}" for number in missing], "there is no", "the expert stays uninitialized")
        extra = [number for number in members if wanted and number >= wanted]
        yield from some([f"{layer}.experts.{number}.{projection}" for number in extra], f"config.json has {wanted} experts, but there is", "")
        shapes = set(members.values())
        if len(shapes) > 1:
            yield f"{layer}.experts.*.{projection}: has shapes {sorted(map(list, shapes))}"
    if wanted and not groups and not stacked and architecture_of(checkpoint.architecture) is not None:
        yield f"config.json counts {wanted} experts, but no tensor is one's"
    checkpoint.counts["experts"] = sum(map(len, groups.values()))


def _lost_projections(groups: Groups) -> Iterator[str]:
    """Layers in which no expert has a projection that experts of other layers have."""
    projections: dict[str, set] = defaultdict(set)
    for layer, projection in groups:
        projections[layer].add(projection)
    usual = set().union(*projections.values())
    for layer, names in projections.items():
        yield from some([f"{layer}.experts.*.{name}" for name in sorted(usual - names)], "no expert has", "the layer cannot run")


def layers(checkpoint: Checkpoint) -> Iterator[str]:
    """Every layer that config.json counts is there, with the tensors that layers of its kind have."""
    try:
        count, drafts = hidden_layers(checkpoint.config), declared_drafts(checkpoint.config)
    except UserError as error:
        yield str(error)
        return
    held = held_by_layers(as_numbered_layer(name, count) for name in checkpoint.tensors)
    if not held:
        return
    counted = f"config.json has {count} layers and {drafts} draft layers"
    expected = count + (drafts if max(held) >= count else 0)  # a release may leave all draft layers out
    yield from some([f"layer {layer}" for layer in range(min(expected, MOST_LAYERS)) if layer not in held],
                    "no shard holds anything of", counted)
    numbered = {layer for name in checkpoint.tensors if (layer := layer_of(name)) is not None}
    yield from some([f"layer {layer}" for layer in sorted(numbered) if layer >= count + drafts], "there are tensors of", counted)
    row, apart = architecture_of(checkpoint.architecture), layers_apart(checkpoint.config, held)
    if row is None:  # its parts and ends may be named otherwise
        lacking_of = unlike_their_kind({layer: tails for layer, tails in held.items() if layer < count}, apart, alone=False)
    else:
        lacking_of = lacking_layers(held, count, apart, has_shared_experts(checkpoint.config))
        ends, tower = (is_tied(checkpoint.config, row.tied),), (tower_blocks(checkpoint.config), row.projector)
        for check, arguments in ((check_ends, ends), (check_tower, tower)):
            try:
                check(checkpoint.tensors, count, *arguments)
            except UserError as error:
                yield str(error)
    for layer, lacking in lacking_of:
        yield from some([f"layer {layer}: {tail}" for tail in lacking], "there is no", "other layers have it")
    checkpoint.counts["layers"] = len(held)
