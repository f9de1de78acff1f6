"""Decides every tensor before a byte is converted: quantize, pass through or drop, and predicts the release to the byte.

Everything that makes peers finish with a wrong checkpoint is refused here: a pattern or role that matches nothing, a
scale that is missing, a dimension that does not fit, a set of experts of which only a part is named, a config whose targets
would hit something else than what is stored.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from stages.checkpoint.files import check_disk, human_bytes, read_json, render_json, write_json
from stages.checkpoint.header import DTYPE_BYTES, render_header, sorted_specs
from stages.dialects.completeness import check_ends, check_layers
from stages.dialects.experts import check_experts
from stages.dialects.plain import WEIGHT_DTYPES
from stages.dialects.roles import QUANTIZABLE, ROLE_NAMES, declared_drafts, draft_layers, is_routed_expert, projection_of
from stages.errors import UserError, exit_with_one_line
from stages.inspect_format import read_config
from stages.schemes import SCHEMES, compressed_tensors, draft_scales, kept, tensor_parallel, vllm_rules
from stages.schemes.architectures import ARCHITECTURES, Architecture, architecture_of
from stages.schemes.engines import engines
from stages.schemes.kept import stored_as
from stages.schemes.modules import Output, matrices, module_of
from stages.settings import RESULTS_FORMAT, Settings, as_dict, load, stage_parser

JOBS_OF_A_SHARD, JOBS_OF_A_RUN = 2, 10  # of the workflow: download and quantize; all others
SHARD_METADATA = {"format": "pt"}  # the library's readers want to know the framework


def _selected(settings: Settings, tensors: dict) -> dict[str, str]:
    """Weight name -> scheme for everything that the recipe names; each role and pattern must match something."""
    chosen: dict[str, str] = {}
    named = {role for group in settings.recipe.groups for role in group.roles}
    aliases = {"linear": QUANTIZABLE, "rest": tuple(role for role in QUANTIZABLE if role not in named)}
    for group in settings.recipe.groups:
        if group.scheme not in SCHEMES:
            raise UserError(f"recipe {settings.recipe.name}: scheme {group.scheme!r} is unknown; choose one of "
                            f"{', '.join(SCHEMES)}")
        for role in group.roles:
            if role not in (*ROLE_NAMES, *aliases):
                raise UserError(f"recipe {settings.recipe.name}: role {role!r} is unknown; choose from "
                                f"{', '.join((*QUANTIZABLE, *aliases))}")
        rules = [("role", role, lambda name, roles=aliases.get(role, (role,)): tensors[name]["role"] in roles)
                 for role in group.roles]
        rules += [("pattern", pattern, lambda name, pattern=pattern: re.fullmatch(pattern, name) is not None)
                  for pattern in group.patterns]
        for kind, text, matches in rules:
            names = [name for name, entry in tensors.items() if matches(name) and not entry["belongs_to"]
                     and (kind == "pattern" or entry["matrix"] or name.endswith(".weight"))]
            if not names:
                raise UserError(f"recipe {settings.recipe.name}: {kind} {text!r} matches no weight of "
                                f"{settings.source.name}; its roles are "
                                f"{', '.join(sorted({t['role'] for t in tensors.values()}))}")
            for name in names:
                if chosen.setdefault(name, group.scheme) != group.scheme:
                    raise UserError(f"recipe {settings.recipe.name}: {name} is given two schemes, {chosen[name]} and "
                                    f"{group.scheme}")
    return chosen


def _check_weight(name: str, entry: dict, recipe: str, layout: str) -> None:
    """UserError for a weight that cannot become what the recipe makes of it."""
    where = f"{entry['shard']}: {name}"
    if entry["dialect"] == "plain" and entry["dtype"] not in WEIGHT_DTYPES:
        raise UserError(f"{where} has dtype {entry['dtype']}, which is no floating-point weight; recipe {recipe} must "
                        "not name it")
    if entry["role"] not in QUANTIZABLE or not entry["matrix"]:
        raise UserError(f"{where} of shape {entry['shape']} and role {entry['role']} is no linear weight that the engine "
                        f"can read quantized; recipe {recipe} must not name it")
    rows, inputs = entry["matrix"][-2:]
    if not math.prod(entry["matrix"]):
        raise UserError(f"{where} has shape {entry['shape']} and holds nothing; the checkpoint is damaged")
    if inputs % 32:
        raise UserError(f"{where}: its input dimension {inputs} is not a multiple of 32, the MXFP4 block; keep it as it "
                        "is in the recipe")
    projection = projection_of(name)
    if len(entry["matrix"]) == 3 and projection == "gate_up":
        if layout == "stacked":
            raise UserError(f"{where} holds gate and up in one tensor; recipe.layout=stacked would keep them so, which no engine reads "
                            "in MXFP4; use recipe.layout=per_expert")
        edge = 2 * entry["tile"][0] if entry["tile"] else 2
        if rows % edge:
            raise UserError(f"{where}: its {rows} rows are not two halves of whole tiles; gate and up cannot be told apart")


def _keep(name: str, tensors: dict, recipe: str) -> str:
    """Format in which a weight that the recipe leaves stays in the release; UserError where no engine could read it."""
    entry, why = tensors[name], None
    dialect, scale = entry["dialect"], tensors[entry["scale"]] if entry["scale"] else None
    stored = stored_as(tuple(entry["matrix"]), scale["dtype"], tuple(scale["shape"])) if dialect in kept.DIALECTS else None
    if dialect not in kept.DIALECTS:
        why = f"{dialect} cannot be kept in a release"
    elif len(entry["matrix"]) != 2 or module_of(name) + ".weight" != name:
        why = "3D weights cannot be kept in their own format"
    elif entry["parts"]:
        why = f"its activations have a fixed scale ({', '.join(entry['parts'].values())}), which is not supported"
    elif entry["role"] == "embeddings":
        why = "engines read embeddings unquantized only"
    elif stored is None:
        why = (f"engines read none with a scale of {scale['dtype']} {scale['shape']}: it takes blocks of {kept.BLOCK}x{kept.BLOCK} or one "
               "per channel or tensor in float, or one per 32 inputs")
    elif stored == "fp8 per tensor" and ".experts." in name:
        why = "engines read experts with a scale per channel or block only"
    if why:
        remedy = f"name its role ({entry['role']}) in the recipe" if entry["role"] in QUANTIZABLE else "get a source that has it in BF16"
        raise UserError(f"{entry['shard']}: {name} is {dialect} and recipe {recipe} leaves it, but {why}; {remedy}")
    return stored


def decide(settings: Settings, census: dict) -> dict[str, dict]:
    """Tensor name -> its census entry plus decision, scheme, reason, and the format that the release stores it in."""
    tensors = census["tensors"]
    chosen = _selected(settings, tensors)
    decided = {}
    for name, entry in tensors.items():
        if entry["role"] == "routed_experts" and not entry["matrix"] and not entry["belongs_to"]:
            raise UserError(f"{entry['shard']}: {name} ({entry['dtype']} {entry['shape']}) is of routed experts, but no weight or scale that is "
                            "known; an engine would not find it beside the converted ones")
    check_layers(tensors, census["text_layers"], census["drafts"])
    check_ends(tensors, census["text_layers"], census["tied"])
    for name, scheme in chosen.items():
        _check_weight(name, tensors[name], settings.recipe.name, settings.recipe.layout)
    check_experts({name: entry for name, entry in tensors.items() if entry["role"] == "routed_experts" and entry["matrix"]},
                  census["experts"], census["hidden_size"])
    for name, entry in tensors.items():
        owner = entry["belongs_to"]
        decision, scheme, stored, reason = "pass through", None, None, "not named by the recipe"
        if name in chosen:
            decision, scheme, stored, reason = "quantize", chosen[name], chosen[name], f"recipe {settings.recipe.name}"
            if entry["dialect"] == scheme:
                reason += f"; {scheme} already, its values stay"
        elif owner in chosen:
            decision, reason = "drop", f"belongs to {owner}, folded into its block scales"
        elif owner or entry["dialect"] != "plain":
            decision, stored = "keep", _keep(owner or name, tensors, settings.recipe.name)
            reason = "not named by the recipe; kept in its own format"
        decided[name] = {**entry, "decision": decision, "scheme": scheme, "stored": stored, "reason": reason}
    return decided


def outputs_of(name: str, entry: dict, layout: str) -> list[Output]:
    """The release's tensors that a source tensor becomes."""
    if entry["decision"] == "drop":
        return []
    if entry["scheme"]:
        return SCHEMES[entry["scheme"]].outputs(name, tuple(entry["matrix"]), layout)
    kept_scale = entry["decision"] == "keep" and entry["belongs_to"]
    written = f"{module_of(entry['belongs_to'])}.weight_scale" if kept_scale else name
    return [Output(written, entry["dtype"], tuple(entry["shape"]), name, "weight")]


def outputs_of_shard(plan: dict, shard: str) -> list[Output]:
    """The release's tensors of one shard, in file order (dtype size descending, then name)."""
    found: dict[str, Output] = {}
    for name, entry in plan["tensors"].items():
        if entry["shard"] != shard:
            continue
        for output in outputs_of(name, entry, plan["layout"]):
            if output.name in found:
                raise UserError(f"{shard}: {name} and {found[output.name].source} would both become {output.name}")
            found[output.name] = output
    order = sorted_specs([(o.name, o.dtype, o.shape) for o in found.values()])
    return [found[name] for name, _, _ in order]


def specs_of(outputs: list[Output]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Header entries of outputs, in their order."""
    return [(output.name, output.dtype, output.shape) for output in outputs]


def index_json(weight_map: dict[str, str], total_size: int) -> str:
    """Text of model.safetensors.index.json: every name, and the true number of tensor bytes."""
    return render_json({"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def release_config(source_config: dict, section: dict) -> dict:
    """The release's config.json: the source's, its quantization_config replaced (and none left in text_config)."""
    config = {key: value for key, value in source_config.items() if key != "quantization_config"}
    if "quantization_config" in (config.get("text_config") or {}):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    return {**config, "quantization_config": section}


def linear_modules(plan: dict) -> tuple[list[str], list[str], dict[str, str]]:
    """(2D linear modules, routed experts' modules, module -> stored format) in the source's names, for the coverage proof."""
    linears, experts, stored = [], [], {}
    for name, entry in plan["tensors"].items():
        if not (entry["matrix"] or re.search(r"[._]weight$", name) and len(entry["shape"]) >= 2):
            continue
        module = module_of(name) if entry["matrix"] and not name.endswith("_weight") else re.sub(r"[._]weight$", "", name)
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


def _known_architecture(name: str | None) -> Architecture:
    """The row of an architecture that a release can be made for; UserError for any other."""
    row = architecture_of(name)
    if row is None:
        known = ", ".join(name for row in ARCHITECTURES if not row.refused for name in row.names)
        raise UserError(f"config.json: vLLM's module names for architecture {name!r} are not known, so that nothing could be proven of a "
                        f"config for it; known are {known}; add a row to stages/schemes/architectures.py")
    if row.refused:
        raise UserError(f"config.json: {name} is not converted: {row.refused}")
    return row


def _expert_names(tensors: dict, layout: str) -> set[str]:
    """Projections under which the release stores its routed experts."""
    return {matrix.module.rpartition(".")[2] for name, entry in tensors.items() if entry["role"] == "routed_experts" and entry["matrix"]
            and entry["stored"] for matrix in matrices(name, tuple(entry["matrix"]), layout)}


def make_plan(settings: Settings, census: dict, source_config: dict) -> dict:
    """The content of plan.json."""
    row = _known_architecture(census["architecture"])
    tensors = decide(settings, census)
    plan = {
        "format": RESULTS_FORMAT, "source": census["source"], "architecture": census["architecture"],
        "recipe": settings.recipe.name, "layout": settings.recipe.layout,
        "exponent_rule": settings.recipe.exponent_rule, "text_layers": census["text_layers"],
        "recipe_settings": as_dict(settings.recipe), "tensors": tensors,
    }
    if settings.recipe.layout == "stacked" and not any(entry["scheme"] and len(entry["matrix"]) == 3 for entry in tensors.values()):
        raise UserError(f"recipe {settings.recipe.name}: recipe.layout=stacked keeps 3D experts together, but {settings.source.name} stores none so; "
                        "use recipe.layout=per_expert")
    experts = _expert_names(tensors, settings.recipe.layout)
    if missing := experts - set(row.experts):
        raise UserError(f"{census['architecture']}: vLLM loads its experts as {', '.join(row.experts)}, the release would have "
                        f"{', '.join(sorted(missing))}")
    section = compressed_tensors.quantization_config(runtime_modules(plan), linear_modules(plan)[2], tuple(sorted(experts)))
    modules, faults = coverage(plan, section)
    if faults:
        raise UserError(f"recipe {settings.recipe.name}: vLLM could not serve the release: {faults[0]}"
                        + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    shards, weight_map, tensor_bytes = {}, {}, 0
    for shard in census["shards"]:
        outputs = outputs_of_shard(plan, shard)
        size = sum(math.prod(output.shape) * DTYPE_BYTES[output.dtype] for output in outputs)
        shards[shard] = {"source_bytes": census["shards"][shard]["file_size"], "tensors": len(outputs),
                         "tensor_bytes": size,
                         "file_bytes": size + len(render_header(specs_of(outputs), SHARD_METADATA))}
        weight_map.update({output.name: shard for output in outputs})
        tensor_bytes += size
    drafts = draft_layers(source_config, tensors)
    scales = draft_scales.draft_scales(drafts, census["text_layers"]) if settings.release.draft_scales else {}
    if len(weight_map) != sum(shard["tensors"] for shard in shards.values()):
        raise UserError("two shards would hold a tensor of the same name; the source repeats a tensor")
    weight_map.update(dict.fromkeys(scales, draft_scales.SHARD))
    scale_bytes = 4 * len(scales)
    scale_header = len(render_header(draft_scales.specs_of_scales(scales), SHARD_METADATA)) if scales else 0
    tensor_bytes += scale_bytes
    quantized = [entry for entry in tensors.values() if entry["decision"] == "quantize"]
    largest = max(shard["source_bytes"] for shard in shards.values())
    passing = settings.device.lane * largest if settings.source.repository else 0  # a local source is only linked
    plan |= {
        "quantization_config": section,
        "draft_layers": drafts,
        "draft_scales": scales,
        "runtime_modules": modules,
        "shards": shards,
        "decisions": dict(Counter(entry["decision"] for entry in tensors.values())),
        "quantized_weights": sum(math.prod(entry["matrix"]) for entry in quantized),
        "source_tensor_bytes": census["tensor_bytes"],
        "release_tensor_bytes": tensor_bytes,
        "release_shard_file_bytes": sum(shard["file_bytes"] for shard in shards.values()) + scale_bytes + scale_header,
        "release_index_bytes": len(index_json(weight_map, tensor_bytes).encode()),
        "release_config_bytes": len(render_json(release_config(source_config, section)).encode()),
        "release_tensors": len(weight_map),
        "jobs": JOBS_OF_A_SHARD * len(shards) + JOBS_OF_A_RUN,
        "lane": settings.device.lane,
        "disk_peak_bytes": sum(shard["file_bytes"] for shard in shards.values()) + passing,
        "tensor_parallel": tensor_parallel.notes(tensors, (source_config.get("text_config") or source_config).get("num_key_value_heads")),
    }
    plan["engines"] = engines(plan)
    plan["notes"] = _notes(tensors, declared_drafts(source_config), drafts, tensor_bytes - census["tensor_bytes"])
    return plan


def _notes(tensors: dict, declared: int, drafts: int, grown: int) -> list[str]:
    """What a user should think over before converting."""
    notes = []
    converted = Counter(entry["dialect"] for entry in tensors.values() if entry["decision"] == "quantize")
    for dialect, count in converted.items():
        if dialect in ("int4", "nvfp4"):
            notes.append(f"{count} weights are {dialect.upper()} already: MXFP4 rounds them a second time; a source in FP8 or BF16 gives a "
                         "better release")
        elif dialect == "mxfp4":
            notes.append(f"{count} weights are MXFP4 already: they are stored anew, their values stay")
    left = Counter(entry["stored"] for entry in tensors.values() if entry["decision"] == "keep" and entry["matrix"])
    notes += [f"{count} weights that the recipe does not name stay {stored}, bit-identical" for stored, count in left.items()]
    if grown > 0:
        notes.append(f"the release is {human_bytes(grown)} larger than its source")
    if drafts < declared:
        notes.append(f"config.json declares {declared} draft layers, which are not all there: speculative decoding "
                     "with them is not possible")
    return notes


def by_role(plan: dict) -> list[dict]:
    """What happens to each role: tensors, parameters (without scales), bytes before and after."""
    rows: dict[tuple[str, str], dict] = {}
    for name, entry in plan["tensors"].items():
        key = (entry["role"], entry["scheme"] or entry["decision"])
        row = rows.setdefault(key, {"role": key[0], "decision": key[1], "tensors": 0, "parameters": 0, "before": 0, "after": 0})
        if entry["decision"] == "quantize":
            row["after"] += math.prod(entry["matrix"]) * SCHEMES[entry["scheme"]].BYTES_PER_BLOCK // 32
        elif entry["decision"] != "drop":
            row["after"] += entry["bytes"]
        row["tensors"] += 1
        row["parameters"] += 0 if entry["belongs_to"] else math.prod(entry["matrix"] or entry["shape"])
        row["before"] += entry["bytes"]
    return [rows[key] for key in sorted(rows)]


def print_plan(plan: dict) -> None:
    """The plan on one screen: what happens to each role, sizes before and after."""
    form = "{:16} {:13} {:>8} {:>17} {:>12} {:>12}".format
    print(form("role", "decision", "tensors", "parameters", "before", "after"))
    rows = by_role(plan)
    for row in rows:
        print(form(row["role"], row["decision"], row["tensors"], f"{row['parameters']:,}", human_bytes(row["before"]),
                   human_bytes(row["after"])))
    print(form("total", "", len(plan["tensors"]), f"{sum(row['parameters'] for row in rows):,}",
               human_bytes(plan["source_tensor_bytes"]), human_bytes(plan["release_tensor_bytes"])))
    print(f"release: {plan['release_tensors']} tensors in {len(plan['shards'])} shards, "
          f"{human_bytes(plan['release_shard_file_bytes'])} of shard files; disk peak about "
          f"{human_bytes(plan['disk_peak_bytes'])} with {plan['lane']} shards at a time, {plan['jobs']} jobs; config claims {plan['runtime_modules']} vLLM modules rightly")
    for note in plan["notes"]:
        print(f"note: {note}")
    print("\n".join(where_it_runs(plan)))


def where_it_runs(plan: dict) -> list[str]:
    """A line for each engine and for the numbers of GPUs that the release can be split over."""
    lines = [f"{engine['engine']}: {engine['loads']}; {'; '.join(engine['how'])}" for engine in plan["engines"]]
    rows = plan["tensor_parallel"]
    lines.append("tensor parallel: " + _sizes(row for row in rows if row["fits"] and row["marlin"]))
    experts_whole = [row for row in rows if row["fits"] and not row["marlin"]]
    out = [row for row in rows if not row["fits"]]
    if experts_whole:
        lines.append(f"tensor parallel {_sizes(experts_whole)} with expert parallelism only: {experts_whole[0]['reason']}")
    if out:
        lines.append(f"not tensor parallel {_sizes(out)}: {out[0]['reason']}")
    return lines


def _sizes(rows: Iterable[dict]) -> str:
    return ", ".join(str(row["tensor_parallel"]) for row in rows)


def run(settings: Settings) -> dict:
    """Writes plan.json and prints it."""
    census = _current(settings.run_directory / "inspect.json", "inspect_format")
    plan = make_plan(settings, census, read_config(settings))
    print_plan(plan)
    there = sum(path.stat().st_size for path in (settings.run_directory / "shards").glob("*.safetensors"))
    check_disk(settings.run_directory, max(0, plan["disk_peak_bytes"] - there), "the whole run, by this plan,")
    write_json(settings.run_directory / "plan.json", plan)
    return plan


def read_plan(settings: Settings) -> dict:
    """plan.json of this run; UserError where it was made for another recipe than the settings have."""
    path = settings.run_directory / "plan.json"
    plan = _current(path, "plan")
    if not is_plan_for(plan, settings):
        raise UserError(f"{path}: was made for other settings of recipe {settings.recipe.name} (or of release.draft_scales) than these; run plan "
                        "again, or choose other results= if another run is writing here")
    return plan


def is_plan_for(plan: dict, settings: Settings) -> bool:
    """Whether a plan was made for this recipe."""
    return plan.get("recipe_settings") == as_dict(settings.recipe) and bool(plan.get("draft_scales")) == settings.release.draft_scales


def _current(path: Path, stage: str) -> dict:
    """A result that an earlier stage of this version of mxforge wrote."""
    result = read_json(path, stage)
    if result.get("format") != RESULTS_FORMAT:
        raise UserError(f"{path}: was made by another version of mxforge; run {stage} again (snakemake does so by itself)")
    return result


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
