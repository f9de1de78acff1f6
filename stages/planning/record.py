"""Results that earlier stages wrote, read back by those behind them."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.files import read_json
from stages.errors import UserError
from stages.provenance import RESULTS_FORMAT
from stages.settings import Settings, as_dict

TENSOR = {"shard", "dtype", "shape", "bytes", "role", "dialect", "scale", "tile", "matrix", "parts", "belongs_to", "one_scale", "scales",
          "transposed"}
CONTENT = {  # stage -> (what its result holds, of which kinds; keys of each entry of its `tensors`)
    "inspect_format": ({
        "source": str, "architecture": str | None, "text_layers": int, "hidden_size": int | None, "experts": int | None, "drafts": int, "tied": bool,
        "layers_apart": list, "shared_experts": bool, "tower_blocks": int | None, "shards": dict, "tensor_bytes": int, "anomalies": list,
        "dialects": dict, "tensors": dict}, TENSOR),
    "plan": ({
        "source": str, "architecture": str, "recipe": str, "layout": str, "exponent_rule": str, "text_layers": int, "recipe_settings": dict,
        "quantization_config": dict, "runtime_modules": int, "draft_layers": int, "draft_scales": dict, "shards": dict, "decisions": dict,
        "quantized_weights": int, "source_tensor_bytes": int, "release_tensor_bytes": int, "release_shard_file_bytes": int,
        "release_index_bytes": int, "release_config_bytes": int, "release_tensors": int, "jobs": int, "lane": int, "disk_peak_bytes": int,
        "tensor_parallel": list, "engines": list, "notes": list, "tensors": dict}, TENSOR | {"decision", "scheme", "stored", "reason"}),
}


def read_plan(settings: Settings) -> dict:
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


def current(path: Path, stage: str) -> dict:
    """A result that an earlier stage of this version of mxforge wrote; UserError where it lacks something that those behind it take for granted."""
    result = read_json(path, stage)
    if result.get("format") != RESULTS_FORMAT:
        raise UserError(f"{path}: was made by another version of mxforge; run {stage} again (snakemake does so by itself)")
    kinds, keys = CONTENT[stage]
    odd = next((key for key, kind in kinds.items() if key not in result or not isinstance(result[key], kind)), None)
    odd = odd or next((name for name, entry in result["tensors"].items() if not isinstance(entry, dict) or not keys <= entry.keys()), None)
    if odd:
        raise UserError(f"{path} is damaged ({odd} is missing or of another form): delete it and run {stage} again")
    return result
