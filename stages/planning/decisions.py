"""What becomes of every tensor of the source: quantize, pass through, keep in its own format, or drop."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping

from stages.checkpoint.header import FLOATS
from stages.dialects import by_name
from stages.dialects.cache_scales import is_cache_scale, is_unread
from stages.dialects.completeness import check_ends, check_layers, check_tower
from stages.dialects.roles import QUANTIZABLE, ROLE_NAMES, is_routed_expert, projection_of
from stages.errors import UserError
from stages.planning.experts import check_experts
from stages.records import Census, CensusTensor, PlannedTensor
from stages.schemes import SCHEMES, kept
from stages.schemes.architectures import architecture_of
from stages.schemes.kept import stored_as
from stages.schemes.modules import module_of
from stages.settings import Settings

BIAS = re.compile(r".*\.bias|.*_proj_bias", re.S)
LINEAR, REST = "linear", "rest"  # roles of a recipe: all linear weights of the text model; those that no other rule of the recipe names


def _selected(settings: Settings, tensors: dict[str, CensusTensor]) -> dict[str, str]:
    """Weight name -> scheme for everything that the recipe names; each role and pattern must match something."""
    recipe, chosen = settings.recipe, {}
    rules = []
    for group in recipe.groups:
        if group.scheme not in SCHEMES:
            raise UserError(f"recipe {recipe.name}: scheme {group.scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")
        for role in group.roles:
            if role not in (*ROLE_NAMES, LINEAR, REST):
                raise UserError(f"recipe {recipe.name}: role {role!r} is unknown; choose from {', '.join((*QUANTIZABLE, LINEAR, REST))}")
        rules += [(group.scheme, "role", role) for role in group.roles] + [(group.scheme, "pattern", pattern) for pattern in group.patterns]
    taken: set[str] = set()  # by all rules but REST, which comes last
    for scheme, kind, text in sorted(rules, key=lambda rule: rule[1:] == ("role", REST)):
        names = [name for name, entry in tensors.items() if not entry["belongs_to"] and _is_meant(kind, text, name, entry, taken)]
        is_rest = (kind, text) == ("role", REST)
        if not names and is_rest:
            raise UserError(f"recipe {recipe.name}: its other roles and patterns name every weight of {settings.source.name} already, nothing is left "
                            f"for {REST!r}")
        if not names:
            raise UserError(f"recipe {recipe.name}: {kind} {text!r} matches no weight of {settings.source.name}; its roles are "
                            f"{', '.join(sorted({entry['role'] for entry in tensors.values()}))}")
        for name in names:
            if chosen.setdefault(name, scheme) != scheme:
                raise UserError(f"recipe {recipe.name}: {name} is given two schemes, {chosen[name]} and {scheme}; name it in one group only")
        if not is_rest:
            taken.update(names)
    return chosen


def _is_meant(kind: str, text: str, name: str, entry: CensusTensor, taken: set[str]) -> bool:
    """Whether a role or a pattern of a recipe means this tensor; `taken` is what other rules took."""
    if kind == "pattern":
        return re.fullmatch(text, name) is not None
    roles = QUANTIZABLE if text in (LINEAR, REST) else (text,)
    return entry["role"] in roles and bool(entry["matrix"] or name.endswith(".weight")) and not (text == REST and name in taken)


def _check_weight(name: str, entry: CensusTensor, scheme: str, recipe: str, layout: str) -> None:
    """UserError for a weight that cannot become what the recipe makes of it, by the name of its scheme."""
    where = f"{entry['shard']}: {name}"
    if entry["dialect"] == "plain" and entry["dtype"] not in FLOATS:
        raise UserError(f"{where} has dtype {entry['dtype']}, which is no floating-point weight; take it out of "
                        f"recipe {recipe}")
    if entry["role"] not in QUANTIZABLE or not entry["matrix"]:
        raise UserError(f"{where} of shape {entry['shape']} and role {entry['role']} is no linear weight that the engine "
                        f"can read quantized; take it out of recipe {recipe}")
    rows, inputs = entry["matrix"][-2:]
    if not math.prod(entry["matrix"]):
        raise UserError(f"{where} has shape {entry['shape']} and holds nothing; the checkpoint is damaged")
    if inputs % (block := SCHEMES[scheme].BLOCK):
        raise UserError(f"{where}: its input dimension {inputs} is not a multiple of {block}, the {scheme.upper()} block; keep it as it is in the "
                        "recipe")
    projection = projection_of(name)
    if len(entry["matrix"]) == 3 and projection == "gate_up":
        if layout == "stacked":
            raise UserError(f"{where} holds gate and up in one tensor; recipe.layout=stacked would keep them so, which no engine reads "
                            "in MXFP4; use recipe.layout=per_expert")
        edge = 2 * entry["tile"][0] if entry["tile"] else 2
        if rows % edge:
            raise UserError(f"{where}: its {rows} rows are not two halves of whole tiles; gate and up cannot be told apart")


def _check_beside(tensors: dict[str, CensusTensor], chosen: Container[str]) -> None:
    """UserError for a tensor of a quantized module that is neither its weight nor what an engine knows without a config, a bias or a scale of
    attention: it may say that the weight means something else."""
    modules = {module_of(name): name for name, entry in tensors.items() if entry["matrix"] and (entry["dialect"] != "plain" or name in chosen)}
    for name, entry in tensors.items():
        if entry["belongs_to"] or entry["role"] == "router" or BIAS.fullmatch(name) or is_cache_scale(name):
            continue
        for end in re.finditer(r"[._]", name):
            weight = modules.get(module := name[:end.start()])
            if weight and weight != name and (end[0] == "." or not weight.startswith(f"{module}.")):  # a fused weight has no dot behind its module
                raise UserError(f"{entry['shard']}: {name} ({entry['dtype']} {entry['shape']}) belongs to {weight}, and what it does to that weight or "
                                "its inputs is not known here; get the checkpoint in BF16 or in another format")


def _keep(name: str, tensors: dict[str, CensusTensor], recipe: str, weight_only: kept.WeightOnly) -> str:
    """Format in which a weight that the recipe leaves stays in the release; UserError where no engine could read it."""
    entry, why = tensors[name], None
    dialect, scale = entry["dialect"], tensors[entry["scale"]] if entry["scale"] else None
    written = kept.as_written(scale["dtype"], tuple(scale["shape"]), scale["one_scale"]) if by_name(dialect).CAN_STAY else None
    stored = stored_as(tuple(entry["matrix"]), *written) if written else None
    if not written:
        why = f"{dialect} cannot be kept in a release"
    elif len(entry["matrix"]) != 2 or module_of(name) + ".weight" != name:
        why = "3D weights cannot be kept in their own format"
    elif entry["parts"]:
        why = f"its activations have a fixed scale ({', '.join(entry['parts'].values())}), which is not supported"
    elif entry["scales"]:
        why = "its tiles are those of q, k and v merged on each of several GPUs, which engines read correctly on just as many only"
    elif entry["role"] == "embeddings":
        why = "engines read embeddings unquantized only"
    elif stored is None:
        why = (f"no engine reads it with a scale of {scale['dtype']} {scale['shape']}: they read float scales per {kept.TILE}x{kept.TILE} block, per "
               "channel or per tensor, and E8M0 scales per 32 inputs")
    elif stored == "fp8 per tensor" and ".experts." in name:
        why = "engines read experts with a scale per channel or block only"
    if why:
        remedy = f"name its role ({entry['role']}) in the recipe" if entry["role"] in QUANTIZABLE else "get a source that has it in BF16"
        raise UserError(f"{entry['shard']}: {name} is {dialect} and recipe {recipe} leaves it, but {why}; {remedy}")
    return stored + kept.WEIGHT_ONLY if stored.removeprefix("fp8 per ") in weight_only.by_all and ".experts." not in name else stored


def _refuse(settings: Settings, census: Census, chosen: Mapping[str, str]) -> None:
    """UserError for a source of which something is missing or not known, and for a weight that cannot become what the recipe makes of it.

    chosen: weight name -> scheme.
    """
    tensors, layers, recipe = census["tensors"], census["text_layers"], settings.recipe
    for name, entry in tensors.items():
        if entry["role"] == "routed_experts" and not entry["matrix"] and not entry["belongs_to"]:
            raise UserError(f"{entry['shard']}: {name} ({entry['dtype']} {entry['shape']}) is of routed experts, but no weight or scale that is "
                            "known; an engine would not find it beside the converted ones")
    _check_beside(tensors, chosen)
    check_layers(tensors, layers, census["drafts"], census["layers_apart"], census["shared_experts"])
    check_ends(tensors, layers, census["tied"])
    check_tower(tensors, layers, census["tower_blocks"], architecture_of(census["architecture"]).projector)
    for name, scheme in chosen.items():
        _check_weight(name, tensors[name], scheme, recipe.name, recipe.layout)
    check_experts({name: entry for name, entry in tensors.items() if entry["matrix"] and is_routed_expert(module_of(name), layers)},
                  census["experts"], census["hidden_size"])


def decide(settings: Settings, census: Census, weight_only: kept.WeightOnly) -> dict[str, PlannedTensor]:
    """Tensor name -> its census entry plus decision, scheme, reason, and the format that the release stores it in."""
    tensors, recipe = census["tensors"], settings.recipe.name
    chosen = _selected(settings, tensors)
    _refuse(settings, census, chosen)
    decided = {}
    for name, entry in tensors.items():
        owner = entry["belongs_to"]
        decision, scheme, stored, reason = "pass through", None, None, "not named by the recipe"
        if name in chosen:
            decision, scheme, stored, reason = "quantize", chosen[name], chosen[name], f"recipe {recipe}"
            if entry["dialect"] == scheme:
                reason += f"; {scheme} already, its values stay"
        elif owner in chosen:
            decision, reason = "drop", f"belongs to {owner}, folded into its block scales"
        elif is_unread(name, entry["shape"]):
            decision, reason = "drop", "a scale of attention that vLLM reads only under a scheme of the KV cache, which the release does not ask for"
        elif owner or entry["dialect"] != "plain":
            decision, stored = "keep", _keep(owner or name, tensors, recipe, weight_only)
            reason = "not named by the recipe; kept in its own format"
        decided[name] = {**entry, "decision": decision, "scheme": scheme, "stored": stored, "reason": reason}
    return decided
