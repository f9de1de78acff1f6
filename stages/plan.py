"""Decides every tensor before a byte is converted: quantize, pass through or drop, and predicts the release to the byte.

Everything that could end in a wrong checkpoint is refused here: a pattern or role that matches nothing, a
scale that is missing, a dimension that does not fit, a set of experts of which only a part is named, a config whose targets
would hit something else than what is stored.
"""

from __future__ import annotations

import math
from collections import Counter

from stages.checkpoint.files import check_disk, check_hard_links, human_bytes, write_rows
from stages.dialects.config import KEY_VALUE_HEADS, declared, whole_number
from stages.dialects.roles import draft_layers
from stages.errors import UserError, exit_with_one_line
from stages.planning.decisions import decide
from stages.planning.modules import check_model, proven_config
from stages.planning.outputs import release_outputs, release_sizes, shard_sizes
from stages.planning.record import current
from stages.planning.view import notes, print_plan
from stages.provenance import RESULTS_FORMAT
from stages.records import Census, Plan, PlannedShard
from stages.schemes import draft_scales, kept, tensor_parallel
from stages.schemes.engines import engines
from stages.settings import Settings, as_dict, load, stage_parser
from stages.sources.hub import check_download
from stages.sources.listing import read_config

JOBS_OF_A_RUN = 10  # of the workflow, beside those of shards


def make_plan(settings: Settings, census: Census, source_config: dict) -> Plan:
    """The content of plan.json."""
    check_model(census["architecture"], census["tensors"], census["text_layers"])
    tensors = decide(settings, census, kept.weight_only(declared(source_config)))
    plan = {
        "format": RESULTS_FORMAT, "source": census["source"], "architecture": census["architecture"],
        "recipe": settings.recipe.name, "layout": settings.recipe.layout,
        "exponent_rule": settings.recipe.exponent_rule, "text_layers": census["text_layers"],
        "recipe_settings": as_dict(settings.recipe), "tensors": tensors,
    }
    if settings.recipe.layout == "stacked" and not any(entry["scheme"] and len(entry["matrix"]) == 3 for entry in tensors.values()):
        raise UserError(f"recipe {settings.recipe.name}: recipe.layout=stacked needs experts in 3D tensors, and {settings.source.name} has none; "
                        "use recipe.layout=per_expert")
    plan["quantization_config"], plan["runtime_modules"] = proven_config(plan)
    plan["draft_layers"] = drafts = draft_layers(source_config, tensors)
    plan["draft_scales"] = draft_scales.draft_scales(drafts, census["text_layers"], tensors) if settings.release.draft_scales else {}
    made = release_outputs(plan, census["shards"])
    plan["shards"] = shards = shard_sizes(made, census["shards"])
    plan |= {
        "decisions": dict(Counter(entry["decision"] for entry in tensors.values())),
        "quantized_weights": sum(math.prod(entry["matrix"]) for entry in tensors.values() if entry["decision"] == "quantize"),
        "source_tensor_bytes": census["tensor_bytes"],
        **release_sizes(plan, made, source_config),
        "jobs": (2 if settings.source.repository else 1) * len(shards) + JOBS_OF_A_RUN,
        "lane": settings.device.lane,
        "disk_peak_bytes": _disk_peak(settings, shards),
        "tensor_parallel": tensor_parallel.notes(tensors, whole_number(source_config, "num_attention_heads"),
                                                whole_number(source_config, *KEY_VALUE_HEADS)),
    }
    plan["engines"] = engines(plan)
    plan["notes"] = notes(tensors, source_config, drafts, plan["release_tensor_bytes"] - census["tensor_bytes"])
    return plan


def _disk_peak(settings: Settings, shards: dict[str, PlannedShard]) -> int:
    """Bytes of all converted shards, and of the source's that are there at the same time; a local source is read where it lies."""
    passing = settings.device.lane * max(shard["source_bytes"] for shard in shards.values()) if settings.source.repository else 0
    return sum(shard["file_bytes"] for shard in shards.values()) + passing


def _check_disk(settings: Settings, plan: Plan) -> None:
    """UserError unless the whole run fits beside what is there. Shards that were converted before are replaced one by one, which frees only those
    that have no other name: the release of that run, and DVC's cache, keep what they have hard links to."""
    release, freed, kept = settings.run_directory / "release", 0, 0
    for path in (settings.run_directory / "shards").glob("*.safetensors"):
        status = path.stat()
        freed += status.st_size if status.st_nlink == 1 else 0
        kept += status.st_size if status.st_nlink > 1 else 0
    remedy = (f"remove {release}, which keeps {human_bytes(kept)} of the shards before (so does DVC's cache, if it is pinned), free some" if kept
              else "free some")
    check_disk(settings.run_directory, max(0, plan["disk_peak_bytes"] - freed), "the whole run, by this plan,", remedy)


def planned(settings: Settings) -> Plan:
    """The plan of the source that was inspected."""
    return make_plan(settings, current(settings.run_directory / "inspect.json", "inspect_format"), read_config(settings))


def _check(settings: Settings, plan: Plan) -> None:
    """UserError for what is better told before the first byte of a shard is downloaded."""
    for shard, sizes in plan["shards"].items() if settings.source.repository else ():
        check_download(settings.source, shard, sizes["source_bytes"])
    _check_disk(settings, plan)


def refuse(settings: Settings) -> None:
    """UserError where `run` would raise it; writes nothing."""
    _check(settings, planned(settings))


def run(settings: Settings) -> Plan:
    """Writes plan.json and prints it."""
    plan = planned(settings)
    print_plan(plan)
    check_hard_links(settings.run_directory / "shards", settings.run_directory)  # of which the release is made
    _check(settings, plan)
    write_rows(settings.run_directory / "plan.json", plan)
    return plan


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
