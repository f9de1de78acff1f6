"""The modules that vLLM builds for the source's model, and the proof that a config gives each the format that it is stored in."""

from __future__ import annotations

from stages.dialects.roles import is_routed_expert, layer_and_tail, layer_of
from stages.errors import UserError
from stages.schemes import compressed_tensors, vllm_rules
from stages.schemes.architectures import ARCHITECTURES, Architecture, architecture_of
from stages.schemes.modules import is_weight, matrices, module_of


def linear_modules(plan: dict) -> tuple[list[str], list[str], dict[str, str]]:
    """(2D linear modules, routed experts' modules, module -> stored format) in the source's names, for the coverage proof."""
    linears, experts, stored = [], [], {}
    for name, entry in plan["tensors"].items():
        if not (entry["matrix"] or is_weight(name, entry["shape"])):
            continue
        module = module_of(name)
        (experts if is_routed_expert(module, plan["text_layers"]) else linears).append(module)
        if entry["stored"]:
            stored[module] = entry["stored"]
    return linears, experts, stored


def runtime_modules(plan: dict) -> list[vllm_rules.RuntimeModule]:
    """The modules that vLLM builds for the source's model."""
    linears, experts, _ = linear_modules(plan)
    return vllm_rules.runtime_modules(linears, experts, plan["text_layers"], architecture_of(plan["architecture"]))


def coverage(plan: dict, section: dict) -> tuple[int, list[str]]:
    """(number of runtime modules, faults): what vLLM's matching makes of a config for the planned tensors."""
    modules = runtime_modules(plan)
    return len(modules), vllm_rules.coverage_faults(modules, section, linear_modules(plan)[2])


def known_architecture(name: str | None) -> Architecture:
    """The row of an architecture that a release can be made for; UserError for any other."""
    row = architecture_of(name)
    if row is None:
        known = ", ".join(name for row in ARCHITECTURES if not row.refused for name in row.names)
        raise UserError(f"config.json: vLLM's module names for architecture {name!r} are not known, so that nothing could be proven of a "
                        f"config for it; known are {known}; add a row to stages/schemes/architectures.py")
    if row.refused:
        raise UserError(f"config.json: {name} is not converted: {row.refused}")
    return row


def check_drafts(architecture: str, tensors: dict) -> None:
    """UserError for draft layers at which vLLM would stop."""
    draft = next((name for name, entry in tensors.items() if entry["role"] == "mtp"), None)
    if draft and known_architecture(architecture).draftless:
        raise UserError(f"{draft} belongs to a draft layer; vLLM has none for {architecture} and stops at this tensor: take the layers past "
                        "num_hidden_layers out of the checkpoint and set num_nextn_predict_layers to 0")


def _expert_names(tensors: dict, layout: str) -> set[str]:
    """Projections under which the release stores its routed experts."""
    return {matrix.module.rpartition(".")[2] for name, entry in tensors.items() if entry["role"] == "routed_experts" and entry["matrix"]
            and entry["stored"] for matrix in matrices(name, tuple(entry["matrix"]), layout)}


def proven_config(plan: dict) -> tuple[dict, int]:
    """(quantization_config of the release, number of vLLM's modules); UserError where vLLM could not load the planned tensors by it."""
    row = known_architecture(plan["architecture"])
    routed = {layer_of(name) for name, entry in plan["tensors"].items() if entry["role"] == "routed_experts"}
    if row.needed and (lacking := routed - {layer_of(name) for name in plan["tensors"] if layer_and_tail(name)[1] == row.needed}):
        raise UserError(f"layer {min(lacking)}: there is no {row.needed}, by which vLLM routes {plan['architecture']}'s tokens; it would leave it "
                        "uninitialized and say nothing: give the tensor the name that it is published under")
    experts = _expert_names(plan["tensors"], plan["layout"])
    for fault in vllm_rules.expert_faults(row, experts, stacked=bool(experts) and plan["layout"] == "stacked"):
        raise UserError(f"recipe {plan['recipe']}: {fault}" + ("; use recipe.layout=per_expert" if plan["layout"] == "stacked" else ""))
    section = compressed_tensors.quantization_config(runtime_modules(plan), linear_modules(plan)[2], tuple(sorted(experts)))
    modules, faults = coverage(plan, section)
    if faults:
        raise UserError(f"recipe {plan['recipe']}: vLLM could not serve the release: {faults[0]}"
                        + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    return section, modules
