"""The modules that vLLM builds for the source's model, and the proof that a config gives each the format that it is stored in."""

from __future__ import annotations

from collections.abc import Mapping

from stages.dialects.roles import is_routed_expert, layer_of
from stages.errors import UserError
from stages.records import CensusTensor, Plan, PlannedTensor
from stages.schemes import compressed_tensors, vllm_rules
from stages.schemes.architectures import ARCHITECTURES, Architecture, architecture_of
from stages.schemes.modules import is_weight, matrices, module_of


def linear_modules(plan: Plan) -> tuple[list[str], list[str], dict[str, str]]:
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


def runtime_modules(plan: Plan) -> list[vllm_rules.RuntimeModule]:
    """The modules that vLLM builds for the source's model."""
    linears, experts, _ = linear_modules(plan)
    return vllm_rules.runtime_modules(linears, experts, plan["text_layers"], architecture_of(plan["architecture"]))


def coverage(plan: Plan, section: dict) -> tuple[int, list[str]]:
    """(number of runtime modules, faults): what vLLM's matching makes of a config for the planned tensors."""
    modules = runtime_modules(plan)
    return len(modules), vllm_rules.coverage_faults(modules, section, linear_modules(plan)[2], architecture_of(plan["architecture"]))


def check_architecture(architecture: str | None) -> Architecture:
    """The row of an architecture; UserError where there is none, or where it says that no release would load."""
    row = architecture_of(architecture)
    if row is None:
        known = ", ".join(name for row in ARCHITECTURES if not row.refused for name in row.names)
        raise UserError(f"config.json: vLLM's module names for architecture {architecture!r} are not known, so that nothing could be proven of a "
                        f"config for it; known are {known}; add a row to stages/schemes/architectures.py")
    if row.refused:
        raise UserError(vllm_rules.model_fault(row, architecture, (), (), 0))
    return row


def check_model(architecture: str | None, tensors: Mapping[str, CensusTensor], text_layers: int) -> None:
    """UserError for a model of which no release can be made that vLLM serves; tensors: entries with their roles."""
    row = check_architecture(architecture)
    routed = {layer_of(name) for name, entry in tensors.items() if entry["role"] == "routed_experts"}
    if fault := vllm_rules.model_fault(row, architecture, tensors, routed, text_layers):
        raise UserError(fault)


def _expert_names(tensors: dict[str, PlannedTensor], layout: str) -> set[str]:
    """Projections under which the release stores its routed experts."""
    return {matrix.module.rpartition(".")[2] for name, entry in tensors.items() if entry["role"] == "routed_experts" and entry["matrix"]
            and entry["stored"] for matrix in matrices(name, tuple(entry["matrix"]), layout)}


def proven_config(plan: Plan) -> tuple[dict, int]:
    """(quantization_config of the release, number of vLLM's modules); UserError where vLLM could not load the planned tensors by it."""
    row = architecture_of(plan["architecture"])
    experts = _expert_names(plan["tensors"], plan["layout"])
    for fault in vllm_rules.expert_faults(row, experts, stacked=bool(experts) and plan["layout"] == "stacked"):
        raise UserError(f"recipe {plan['recipe']}: {fault}" + ("; use recipe.layout=per_expert" if plan["layout"] == "stacked" else ""))
    section = compressed_tensors.quantization_config(runtime_modules(plan), linear_modules(plan)[2], tuple(sorted(experts)))
    modules, faults = coverage(plan, section)
    if faults:
        raise UserError(f"recipe {plan['recipe']}: vLLM could not serve the release: {faults[0]}"
                        + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    return section, modules
