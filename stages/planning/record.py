"""Results that earlier stages wrote, read back by those behind them."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.files import read_json
from stages.errors import UserError
from stages.provenance import RESULTS_FORMAT
from stages.settings import Settings, as_dict


def read_plan(settings: Settings) -> dict:
    """plan.json of this run; UserError where it was made for another recipe than the settings have."""
    path = settings.run_directory / "plan.json"
    plan = current(path, "plan")
    if not is_plan_for(plan, settings):
        raise UserError(f"{path}: was made for other settings of recipe {settings.recipe.name} (or of release.draft_scales) than these; run plan "
                        "again, or choose other results= if another run is writing here")
    return plan


def is_plan_for(plan: dict, settings: Settings) -> bool:
    """Whether a plan was made for this recipe."""
    return plan.get("recipe_settings") == as_dict(settings.recipe) and bool(plan.get("draft_scales")) == settings.release.draft_scales


def current(path: Path, stage: str) -> dict:
    """A result that an earlier stage of this version of mxforge wrote."""
    result = read_json(path, stage)
    if result.get("format") != RESULTS_FORMAT:
        raise UserError(f"{path}: was made by another version of mxforge; run {stage} again (snakemake does so by itself)")
    return result
