"""Whether a model's layers are all there, with what layers of their kind have: no shard and no header says that something is missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping

from stages.dialects.roles import layer_and_tail, layer_of, role_of
from stages.errors import UserError

ROUTED = re.compile(r"\.experts\.|^\w+\.(router\.gate|gate|router)\.weight$")  # of a layer with experts, even one that has lost them
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


def unlike_their_kind(held: Mapping[int, set[str]], sharing: Container[int]) -> Iterator[tuple[int, list[str]]]:
    """(layer, what it lacks) of layers that lack what others with the same parts have.

    held: layer -> its tensors' names in it. sharing: layers that use another one's indexer, a kind of their own.
    """
    kinds: dict[frozenset, dict[int, set[str]]] = defaultdict(dict)
    for layer, tails in held.items():
        parts = {tail.split(".")[0] for tail in tails if tail.count(".") >= 2}
        parts |= {"experts" for tail in tails if ROUTED.search(tail)}  # a dense `mlp` beside one of experts
        if layer in sharing:
            parts.add("the indexer of another layer")
        kinds[frozenset(parts)][layer] = tails
    for members in kinds.values():
        usual = set.union(*members.values())
        yield from ((layer, sorted(usual - tails)) for layer, tails in members.items() if tails != usual)


def check_layers(entries: Mapping[str, Mapping], layers: int, drafts: int, sharing: Container[int]) -> None:
    """UserError for a text layer that is missing, one past those that config.json counts, and one that lacks what others of its kind have.

    entries: tensor name -> {"belongs_to", ...}; layers, drafts and sharing (an indexer): by config.json. Draft layers may be left
    out.
    """
    held = held_by_layers(name for name, entry in entries.items() if not entry["belongs_to"])
    counted = f"config.json has {layers} layers" + (f" and {drafts} draft layers" if drafts else "")
    incomplete = "the checkpoint is incomplete or of another config"
    if (missing := first_gap(held)) < layers:
        raise UserError(f"layer {missing}: no shard holds anything of it, but {counted}; {incomplete}")
    if past := [layer for layer in held if layer >= layers + drafts]:
        raise UserError(f"layer {min(past)}: there are tensors of it, but {counted}; {incomplete}")
    for layer, lacking in unlike_their_kind({layer: tails for layer, tails in held.items() if layer < layers}, sharing):
        raise UserError(f"layer {layer}: there is no {lacking[0]}{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}, which other layers "
                        f"of its kind have; {incomplete}")


def check_ends(entries: Mapping[str, Mapping], layers: int, tied: bool) -> None:
    """UserError where the embedding, the norm behind the last layer or, unless it is tied to the embedding, the head is missing."""
    roles = {role_of(name, layers) for name in entries}
    norm = any(role_of(name, layers) == "norms" and layer_of(name) is None for name in entries)
    for there, what in (("embeddings" in roles, "embedding (embed_tokens.weight)"), (norm, "norm behind the last layer (norm.weight)"),
                        (tied or "lm_head" in roles, "output head (lm_head.weight), and tie_word_embeddings is false")):
        if not there:
            raise UserError(f"no shard holds the {what}; the checkpoint is incomplete")
