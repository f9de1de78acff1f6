"""Whether a model's layers are all there, with what layers of their kind have: no shard and no header says that something is missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping

from stages.dialects.cache_scales import is_cache_scale
from stages.dialects.roles import as_numbered_layer, layer_and_tail, layer_of, projection_of, role_in_layer, role_of
from stages.errors import UserError

ROUTED = re.compile(r"\.experts\.|^\w+\.(router\.gate|gate|router)\.weight$")  # of a layer with experts, even one that has lost them
ATTENTION = {"query": r"w?q\w*", "key": r"w?k\w*|qkv|query_key_value", "value": r"w?k?v\w*|qkv|query_key_value",
             "output": r"o|out|dense|wo\w*"}  # what a layer needs -> projections that are it
LINEAR = {"input": r"in_proj\w*", "output": r"out"}
BLOCK = re.compile(r"(?P<tower>.*?\.(?:blocks|layers?|resblocks)\.)(?P<number>\d{1,9})\.(?P<tail>.*)", re.S)  # of a vision tower
GATED = {"gate": r"gate|gate_up|w1", "up": r"up|gate_up|w3", "down": r"down|w2"}
STORED = re.compile(r"[._](weight(_packed|_scale(_inv)?)?|blocks|scales)$")  # one name for a weight, however it is stored


def first_gap(numbers: Iterable[int]) -> int:
    """The least whole number that is not among them; how many a config counts is not looped over, it may say anything."""
    present = set(numbers)
    return next(number for number in range(len(present) + 1) if number not in present)


def held_by_layers(names: Iterable[str]) -> dict[int, set[str]]:
    """Layer -> what its tensors are called in it, one name for all experts and for all parts of a weight."""
    held: dict[int, set[str]] = defaultdict(set)
    for name in names:
        layer, tail = layer_and_tail(name)
        if layer is not None:
            held[layer].add(STORED.sub(".weight", re.sub(r"\.experts\.\d+\.", ".experts.*.", f".{tail}"))[1:])
    return held


def unlike_their_kind(held: Mapping[int, set[str]], apart: Container[int], alone: bool = True) -> Iterator[tuple[int, list[str]]]:
    """(layer, what it lacks) of layers that lack what others with the same parts have.

    held: layer -> its tensors' names in it. apart: layers of a kind of their own by config.json. alone: whether the only layer
    of a kind must have, in each part, what all others with that part have.
    """
    kinds: dict[frozenset, dict[int, set[str]]] = defaultdict(dict)
    by_part: dict[str, dict[int, set[str]]] = defaultdict(dict)
    for layer, tails in held.items():
        parts = parts_of(tails)
        kinds[frozenset(parts) | ({"apart"} if layer in apart else set())][layer] = tails
        for part, members in parts.items():
            by_part[part][layer] = members
    for kind, members in kinds.items():
        usual = set.union(*members.values())
        for layer, tails in members.items():
            lacking = usual - tails
            if alone and len(members) == 1:
                for part in kind & by_part.keys():
                    others = [tails for other, tails in by_part[part].items() if other != layer]
                    usual_elsewhere = set.intersection(*others) if others else set()
                    lacking |= {tail for tail in usual_elsewhere - tails if "index" not in tail and (part or "norm" in tail)}
            lacking = {tail for tail in lacking if not is_cache_scale(tail)}
            if lacking:
                yield layer, sorted(lacking)


def parts_of(tails: Iterable[str]) -> dict[str, set[str]]:
    """Part of a layer -> what it holds: `self_attn`, `mlp of experts` (beside a dense `mlp`) ..., and "" for what is in no part (norms)."""
    parts: dict[str, set[str]] = defaultdict(set)
    for tail in tails:
        parts[tail.split(".")[0] if tail.count(".") >= 2 else ""].add(tail)
    return {f"{part} of experts" if part and any(ROUTED.search(tail) for tail in members) else part: members for part, members in parts.items()}


def lost_parts(tails: Iterable[str], shared_experts: bool) -> list[str]:
    """What one layer lacks of what every layer of the known architectures has.

    tails: as `held_by_layers` gives them. shared_experts: whether config.json has some.
    """
    projections: dict[str, set[str]] = defaultdict(set)
    for tail in tails:
        name = f"model.layers.0.{tail.replace('.*.', '.0.')}"
        role = role_in_layer(name)
        if role != "router" or name.endswith(".weight"):  # its bias routes nothing
            projections[role].add(projection_of(name) or "")

    def has(role: str, pattern: str) -> bool:
        return any(re.fullmatch(pattern, projection) for projection in projections[role])

    lost = []
    if "attention" in projections:
        lost += [f"{what} projection of the attention" for what, pattern in ATTENTION.items() if not has("attention", pattern)]
    elif "linear_attention" in projections:
        lost += [f"{what} projection of the linear attention" for what, pattern in LINEAR.items() if not has("linear_attention", pattern)]
    else:
        lost.append("attention")
    blocks = [role for role in ("dense_mlp", "routed_experts", "shared_experts") if role in projections]
    for role in blocks:
        lost += [f"{what} projection of the {role.replace('_', ' ')}" for what, pattern in GATED.items() if not has(role, pattern)]
    if not {"dense_mlp", "routed_experts"} & set(blocks):
        lost.append("MLP and no routed experts")
    if "routed_experts" in blocks:
        lost += [what for role, what in (("router", "router"), *([("shared_experts", "shared experts")] if shared_experts else []))
                 if role not in projections]
    return lost


def check_layers(entries: Mapping[str, Mapping], layers: int, drafts: int, apart: Container[int], shared_experts: bool) -> None:
    """UserError for a text layer that is missing, one past those that config.json counts, and one that lacks what it must have.

    entries: tensor name -> {"belongs_to", ...}; layers, drafts, apart (layers of a kind of their own) and shared_experts: by config.json. Draft
    layers may be left out; those that are there are held to be layers like others.
    """
    names = [name for name, entry in entries.items() if not entry["belongs_to"]]
    held = held_by_layers(as_numbered_layer(name, layers) for name in names)
    counted = f"config.json has {layers} layers" + (f" and {drafts} draft layers" if drafts else "")
    incomplete = "the checkpoint is incomplete or of another config, download it again with its own config.json"
    if (missing := first_gap(held)) < layers:
        raise UserError(f"layer {missing}: no shard holds anything of it, but {counted}; {incomplete}")
    if past := [layer for name in names if (layer := layer_of(name)) is not None and layer >= layers + drafts]:
        raise UserError(f"layer {min(past)}: there are tensors of it, but {counted}; {incomplete}")
    for layer, lacking in lacking_layers(held, layers, apart, shared_experts):
        raise UserError(f"layer {layer}: there is no {lacking[0]}{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}, which "
                        f"{'draft layers' if layer >= layers else 'other layers of its kind'} have; {incomplete}")


def _unjoined(drafts: Mapping[int, set[str]]) -> list[int]:
    """Draft layers that lack what joins them to the model: each has its own eh_proj, or the first has it for all of them."""
    joined = [layer for layer, tails in drafts.items() if "eh_proj.weight" in tails]
    if not joined:
        return sorted(drafts)[:1]
    return [layer for layer in drafts if layer not in joined] if len(joined) > 1 else []


def lacking_layers(held: Mapping[int, set[str]], layers: int, apart: Container[int], shared_experts: bool) -> Iterator[tuple[int, list[str]]]:
    """(layer, what it lacks): of its kind's tensors, of the parts that every layer has, of what joins a draft layer to the model."""
    text = {layer: tails for layer, tails in held.items() if layer < layers}
    yield from unlike_their_kind(text, apart)
    usual: dict[str, set[str]] = {}  # what all text layers have in a part
    for tails in text.values():
        for part, members in parts_of(tails).items():
            usual[part] = usual.get(part, members) & members
    drafts = {layer: tails for layer, tails in held.items() if layer >= layers}
    for layer in _unjoined(drafts):
        yield layer, ["eh_proj, or what else joins it to the model"]
    for layer, tails in held.items():
        if lost := lost_parts(tails, shared_experts):
            yield layer, lost
        if layer >= layers:
            lacking = {tail for part, members in parts_of(tails).items() for tail in usual.get(part, set()) - members
                       if part and "index" not in tail and ".experts." not in tail and not is_cache_scale(tail)}  # may be stored otherwise there
            if lacking:
                yield layer, sorted(lacking)


def check_tower(names: Iterable[str], layers: int, blocks: int | None, projector: str | None) -> None:
    """UserError where the vision tower lacks something. blocks: that config.json counts. projector: what the tensors behind the tower are called."""
    if any(role_of(name, layers) == "vision" for name in names):
        lost = lost_of_tower(names, layers, blocks)
        if lost is None and projector and not any(re.match(projector, name) for name in names):
            lost = "projector behind the vision tower"
        if lost:
            raise UserError(f"no shard holds the {lost}; the checkpoint is incomplete or of another config, download it "
                            "again with its own config.json")


def lost_of_tower(names: Iterable[str], layers: int, blocks: int | None) -> str | None:
    """A block of the vision tower that is missing, or what one lacks and another has. blocks: by config.json, None where it does not say."""
    towers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if role_of(name, layers) == "vision" and (match := BLOCK.match(name)):
            towers[match["tower"]][int(match["number"])].add(STORED.sub(".weight", match["tail"]))
    for tower, members in towers.items():
        gap, usual = first_gap(members), set.union(*members.values())
        if gap < len(members) or (blocks is not None and len(towers) == 1 and gap < blocks):
            return f"{tower}{gap}"
        for number, tails in members.items():
            if tails != usual:
                return f"{tower}{number}.{min(usual - tails)}"
    return None


def check_ends(entries: Mapping[str, Mapping], layers: int, tied: bool) -> None:
    """UserError where the embedding, the norm behind the last layer or, unless it is tied to the embedding, the head is missing."""
    roles = {role_of(name, layers) for name in entries}
    norm = any(role_of(name, layers) == "norms" and layer_of(name) is None for name in entries)
    for there, what in (("embeddings" in roles, "embedding (embed_tokens.weight)"), (norm, "norm behind the last layer (norm.weight)"),
                        (tied or "lm_head" in roles, "output head (lm_head.weight), and tie_word_embeddings is false")):
        if not there:
            raise UserError(f"no shard holds the {what}; the checkpoint is incomplete, download it again")
