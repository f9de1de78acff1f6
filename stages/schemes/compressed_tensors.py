"""The `quantization_config` of a release: compressed-tensors, format `mixed-precision`, one group per stored format.

Targets are regular expressions over vLLM's runtime names (which merge q, k, v and gate, up, and rename what they like),
anchored at both ends so that they hit nothing else; the names of the parts go along for engines that do not merge. They are
derived from the very modules that they must hit: a layer's number becomes `\\d+` where all layers agree. `ignore` names what
stays as it is, for engines that want every linear module explained. Both are checked against a simulation of vLLM's matching
(vllm_rules) by the plan, and again when the release is verified.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from stages.schemes.architectures import EMBEDDING
from stages.schemes.kept import group_of
from stages.schemes.vllm_rules import ROUTED_EXPERTS, RuntimeModule, named_parts

LAYER = re.compile(r"(?:.*\.)?(model|mtp)\.layers\.(\d+)\.(.*)")
TEXT_ROOTS = ("", "model", "language_model")  # what may stand before modules outside the layers, lm_head above all
ORDER = ("qkv_proj", "q_proj", "k_proj", "v_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _leaves(module: RuntimeModule, row_experts: tuple[str, ...]) -> tuple[str, list[str]]:
    """(name up to the leaf, leaves) under which a module can be named."""
    if module.class_name == ROUTED_EXPERTS:
        return module.name + r".\d+", list(dict.fromkeys((*module.probes, *row_experts)))
    prefix, _, leaf = module.name.rpartition(".")
    parts = named_parts(member.rpartition(".")[2] for member in module.members) if len(module.members) > 1 else ()
    return prefix, list(dict.fromkeys([leaf, *module.parts, *parts]))


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _pattern(root: str, tail: str, layers: set[int], every: set[int], leaves: Iterable[str]) -> str:
    """`re:` of modules: in some layers of root `model` or `mtp`, or (no layers) below whatever `root` says."""
    ordered = sorted(leaves, key=lambda leaf: (ORDER.index(leaf) if leaf in ORDER else len(ORDER), leaf))
    leaf = ordered[0] if len(ordered) == 1 else f"({'|'.join(ordered)})"
    if not layers:
        return f"re:.*{leaf}$" if root in TEXT_ROOTS else rf"re:(.*\.)?{_escaped(root)}\.{leaf}$"
    numbers = r"\d+" if layers == every else f"({'|'.join(map(str, sorted(layers)))})"
    return rf"re:.*{root}\.layers\.{numbers}\.{_escaped(tail)}{leaf}$"


def quantization_config(modules: Iterable[RuntimeModule], stored: Mapping[str, str | None], experts: tuple[str, ...]) -> dict:
    """Config section of a release.

    modules: as vLLM builds them. stored: the release's module -> format that it is stored in (`mxfp4`, `fp8 128x128`, ...).
    experts: projections under which the release stores routed experts.
    """
    found: dict[tuple[str, str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))  # (root, tail, leaf) -> format -> layers
    towers: dict[str, set[str]] = defaultdict(set)  # whatever stands beside the text model -> formats in it
    for module in modules:
        form = "" if module.expanded else stored.get(module.members[0]) or ""
        prefix, leaves = _leaves(module, experts)
        match = LAYER.match(f"{prefix}.")
        tower = match is None and prefix.split(".")[0] not in (*TEXT_ROOTS, "mtp")
        if tower:
            towers[prefix.split(".")[0]].add(form)
        if not form and (tower or (match is None and module.class_name in (None, EMBEDDING))):
            continue
        for leaf in leaves:
            place = (match[1], match[3], leaf) if match else (prefix, "", leaf)
            found[place][form] |= {int(match[2])} if match else set()
    grouped: dict[tuple, list[str]] = defaultdict(list)
    for (root, tail, leaf), forms in found.items():
        every = frozenset(set.union(*forms.values()))
        for form, numbers in forms.items():
            grouped[form, root, tail, frozenset(numbers), every].append(leaf)
    patterns: dict[str, list[str]] = defaultdict(list)
    for (form, root, tail, numbers, every), leaves in sorted(grouped.items(), key=lambda item: (*item[0][:3], sorted(item[0][3]))):
        patterns[form].append(_pattern(root, tail, set(numbers), set(every), leaves))
    ignore = patterns.pop("", []) + [rf"re:.*{prefix}\..*" for prefix, forms in sorted(towers.items()) if forms == {""}]
    groups = {f"group_{index}": {"targets": targets, **group_of(form)} for index, (form, targets) in enumerate(sorted(patterns.items()))}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
