"""Results that earlier stages wrote, read back by those behind them."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.files import read_json
from stages.errors import UserError
from stages.provenance import RESULTS_FORMAT
from stages.records import Census, CensusTensor, Plan, PlannedTensor, fault
from stages.settings import Settings, as_dict

RESULTS = {"inspect_format": (Census, CensusTensor), "plan": (Plan, PlannedTensor)}  # stage -> (what its result is, an entry of its `tensors`)


def read_plan(settings: Settings) -> Plan:
    """plan.json of this run; UserError where it was made for another recipe than the settings have."""
    path = settings.run_directory / "plan.json"
    plan = current(path, "plan")
    if not is_plan_for(plan, settings):
        raise UserError(f"{path}: was made for other settings of recipe {settings.recipe.name} (or of release.draft_scales) than these; run plan "
                        "again, or choose other results= if another run is writing here")
    return plan


def is_plan_for(plan: dict, settings: Settings) -> bool:
    """Whether a plan was made for this recipe, and says the same wherever it names a setting."""
    recipe = as_dict(settings.recipe)
    named = all(plan.get(key) == recipe[key] for key in ("exponent_rule", "layout"))
    return named and plan.get("recipe_settings") == recipe and bool(plan.get("draft_scales")) == settings.release.draft_scales


def current(path: Path, stage: str) -> Census | Plan:
    """A result that an earlier stage of this version of mxforge wrote; UserError where it lacks something that those behind it take for granted."""
    result = read_json(path, stage)
    if result.get("format") != RESULTS_FORMAT:
        raise UserError(f"{path}: was made by another version of mxforge; run {stage} again (snakemake does so by itself)")
    record, tensor = RESULTS[stage]
    odd = fault(result, record) or next((f"{odd} of {name}" for name, entry in result["tensors"].items() if (odd := fault(entry, tensor))), None)
    if odd:
        raise UserError(f"{path} is damaged ({odd} is missing or of another form): delete it and run {stage} again")
    return result
