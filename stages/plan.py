"""Decides every tensor before a byte is converted: quantize, pass through or drop, and predicts the release to the byte.

Everything that makes peers finish with a wrong checkpoint is refused here: a pattern or role that matches nothing, a
scale that is missing, a dimension that does not fit, a set of experts of which only a part is named, a config whose targets
would hit something else than what is stored.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from stages.checkpoint.files import human_bytes, read_json, render_json, write_json
from stages.checkpoint.header import DTYPE_BYTES, render_header, sorted_specs
from stages.dialects.roles import ROLE_NAMES
from stages.download import check_disk
from stages.errors import UserError, exit_with_one_line
from stages.inspect_format import read_config
from stages.schemes import SCHEMES, compressed_tensors, draft_scales, vllm_rules
from stages.schemes.mxfp4 import Output
from stages.settings import Settings, as_dict, load, stage_parser

SHARD_METADATA = {"format": "pt"}  # the library's readers want to know the framework
QUANTIZABLE_ROLES = tuple(compressed_tensors.TARGETS)
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def _selected(settings: Settings, tensors: dict) -> dict[str, str]:
    """Weight name -> scheme for everything that the recipe names; each role and pattern must match something."""
    chosen: dict[str, str] = {}
    scales = {entry["scale"] for entry in tensors.values()}
    for group in settings.recipe.groups:
        if group.scheme not in SCHEMES:
            raise UserError(f"recipe {settings.recipe.name}: scheme {group.scheme!r} is unknown; choose one of "
                            f"{', '.join(SCHEMES)}")
        for role in group.roles:
            if role not in ROLE_NAMES:
                raise UserError(f"recipe {settings.recipe.name}: role {role!r} is unknown; choose from "
                                f"{', '.join(QUANTIZABLE_ROLES)}")
        rules = [("role", role, lambda name, role=role: tensors[name]["role"] == role) for role in group.roles]
        rules += [("pattern", pattern, lambda name, pattern=pattern: re.fullmatch(pattern, name) is not None)
                  for pattern in group.patterns]
        for kind, text, matches in rules:
            names = [name for name in tensors if matches(name) and name not in scales
                     and (kind == "pattern" or name.endswith(".weight"))]
            if not names:
                raise UserError(f"recipe {settings.recipe.name}: {kind} {text!r} matches no weight of "
                                f"{settings.source.name}; its roles are "
                                f"{', '.join(sorted({t['role'] for t in tensors.values()}))}")
            for name in names:
                if chosen.setdefault(name, group.scheme) != group.scheme:
                    raise UserError(f"recipe {settings.recipe.name}: {name} is given two schemes, {chosen[name]} and "
                                    f"{group.scheme}")
    return chosen


def _check_weight(name: str, entry: dict, recipe: str) -> None:
    where = f"{entry['shard']}: {name}"
    if entry["role"] not in QUANTIZABLE_ROLES or len(entry["shape"]) not in (2, 3) or not name.endswith(".weight"):
        raise UserError(f"{where} of shape {entry['shape']} and role {entry['role']} is no linear weight that the engine "
                        f"can read quantized; recipe {recipe} must not name it")
    if entry["dialect"] == "plain" and entry["dtype"] not in ("BF16", "F16", "F32"):
        raise UserError(f"{where} has dtype {entry['dtype']}, which is no floating-point weight; recipe {recipe} must "
                        "not name it")
    inputs = entry["shape"][-1]
    if inputs % 32:
        raise UserError(f"{where}: its input dimension {inputs} is not a multiple of 32, the MXFP4 block; keep it as it "
                        "is in the recipe")


def decide(settings: Settings, census: dict) -> dict[str, dict]:
    """Tensor name -> its census entry plus decision, scheme and reason."""
    tensors = census["tensors"]
    chosen = _selected(settings, tensors)
    decided = {}
    consumed = {}
    for name, scheme in chosen.items():
        _check_weight(name, tensors[name], settings.recipe.name)
        if tensors[name]["scale"]:
            consumed[tensors[name]["scale"]] = name
    for name, entry in tensors.items():
        if name in chosen:
            decision, scheme, reason = "quantize", chosen[name], f"recipe {settings.recipe.name}"
        elif name in consumed:
            decision, scheme, reason = "drop", None, f"tile scale of {consumed[name]}, folded into its block scales"
        else:
            decision, scheme, reason = "pass through", None, "not named by the recipe"
        if decision == "pass through" and entry["dialect"] != "plain":
            raise UserError(f"{entry['shard']}: {name} is {entry['dialect']} and recipe {settings.recipe.name} leaves it; a "
                            "release that mixes it with MXFP4 is not supported, name its role in the recipe")
        decided[name] = {**entry, "decision": decision, "scheme": scheme, "reason": reason}
    return decided


def outputs_of_shard(plan: dict, shard: str) -> list[Output]:
    """The release's tensors of one shard, in file order (dtype size descending, then name)."""
    found: dict[str, Output] = {}
    for name, entry in plan["tensors"].items():
        if entry["shard"] != shard or entry["decision"] == "drop":
            continue
        shape = tuple(entry["shape"])
        made = (SCHEMES[entry["scheme"]].outputs(name, shape, plan["layout"]) if entry["scheme"]
                else [Output(name, entry["dtype"], shape, name, "weight")])
        for output in made:
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


def linear_modules(tensors: dict) -> tuple[list[str], list[str], set[str]]:
    """(2D linear modules, routed experts' modules, quantized modules) in checkpoint names, for the coverage proof."""
    linears, experts, quantized = [], [], set()
    for name, entry in tensors.items():
        if entry["decision"] == "drop" or len(entry["shape"]) < 2 or not re.search(r"[._]weight$", name):
            continue
        module = re.sub(r"[._]weight$", "", name)
        (experts if entry["role"] == "routed_experts" else linears).append(module)
        if entry["scheme"]:
            quantized.add(module)
    return linears, experts, quantized


def coverage(tensors: dict, section: dict, text_layers: int) -> tuple[int, list[str]]:
    """(number of runtime modules, faults): what vLLM's matching makes of the config."""
    linears, experts, quantized = linear_modules(tensors)
    modules = vllm_rules.runtime_modules(linears, experts, text_layers)
    return len(modules), vllm_rules.coverage_faults(modules, section, quantized)


def tensor_parallel_notes(tensors: dict) -> list[dict]:
    """For each tensor-parallel size: whether every split of a quantized weight is whole blocks of 32."""
    rows = []
    for size in TENSOR_PARALLEL_SIZES:
        blocked = None
        for name, entry in tensors.items():
            if not entry["scheme"]:
                continue
            # gate, up, q, k, v, g are split by rows, down and o by columns; columns must stay whole blocks
            split = entry["shape"][-1] if re.search(r"(down|o)_proj\.weight$", name) else None
            if split is not None and split % (32 * size):
                blocked = f"{name}: {split} inputs / {size} are not whole blocks of 32"
                break
        rows.append({"tensor_parallel": size, "fits": blocked is None, "reason": blocked})
    return rows


def make_plan(settings: Settings, census: dict, source_config: dict) -> dict:
    """The content of plan.json."""
    tensors = decide(settings, census)
    plan = {
        "source": census["source"], "recipe": settings.recipe.name, "layout": settings.recipe.layout,
        "exponent_rule": settings.recipe.exponent_rule, "text_layers": census["text_layers"],
        "recipe_settings": as_dict(settings.recipe), "tensors": tensors,
    }
    section = compressed_tensors.quantization_config(tensors)
    modules, faults = coverage(tensors, section, census["text_layers"])
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
    scales = draft_scales.draft_scales(source_config, census["text_layers"]) if settings.release.draft_scales else {}
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
        "draft_scales": scales,
        "runtime_modules": modules,
        "shards": shards,
        "decisions": dict(Counter(entry["decision"] for entry in tensors.values())),
        "quantized_weights": sum(math.prod(entry["shape"]) for entry in quantized),
        "source_tensor_bytes": census["tensor_bytes"],
        "release_tensor_bytes": tensor_bytes,
        "release_shard_file_bytes": sum(shard["file_bytes"] for shard in shards.values()) + scale_bytes + scale_header,
        "release_index_bytes": len(index_json(weight_map, tensor_bytes).encode()),
        "release_config_bytes": len(render_json(release_config(source_config, section)).encode()),
        "release_tensors": len(weight_map),
        "disk_peak_bytes": sum(shard["file_bytes"] for shard in shards.values()) + passing,
        "tensor_parallel": tensor_parallel_notes(tensors),
    }
    return plan


def by_role(plan: dict) -> list[dict]:
    """What happens to each role: tensors, parameters (without scales), bytes before and after."""
    scales = {entry["scale"] for entry in plan["tensors"].values()}
    rows: dict[tuple[str, str], dict] = {}
    for name, entry in plan["tensors"].items():
        key = (entry["role"], entry["scheme"] or entry["decision"])
        row = rows.setdefault(key, {"role": key[0], "decision": key[1], "tensors": 0, "parameters": 0, "before": 0, "after": 0})
        if entry["decision"] == "quantize":
            row["after"] += sum(math.prod(o.shape) for o in SCHEMES[entry["scheme"]].outputs(name, tuple(entry["shape"]), "stacked"))
        elif entry["decision"] == "pass through":
            row["after"] += entry["bytes"]
        row["tensors"] += 1
        row["parameters"] += 0 if name in scales else math.prod(entry["shape"])
        row["before"] += entry["bytes"]
    return [rows[key] for key in sorted(rows)]


def print_plan(plan: dict) -> None:
    """The plan on one screen: what happens to each role, sizes before and after."""
    form = "{:16} {:13} {:>8} {:>17} {:>12} {:>12}".format
    print(form("role", "decision", "tensors", "parameters", "before", "after"))
    for row in by_role(plan):
        print(form(row["role"], row["decision"], row["tensors"], f"{row['parameters']:,}", human_bytes(row["before"]),
                   human_bytes(row["after"])))
    print(form("total", "", len(plan["tensors"]), f"{sum(row['parameters'] for row in by_role(plan)):,}",
               human_bytes(plan["source_tensor_bytes"]), human_bytes(plan["release_tensor_bytes"])))
    print(f"release: {plan['release_tensors']} tensors in {len(plan['shards'])} shards, "
          f"{human_bytes(plan['release_shard_file_bytes'])} of shard files; disk peak about "
          f"{human_bytes(plan['disk_peak_bytes'])}; config claims {plan['runtime_modules']} vLLM modules rightly")
    for row in plan["tensor_parallel"]:
        if not row["fits"]:
            print(f"note: tensor parallel {row['tensor_parallel']}: {row['reason']}")


def run(settings: Settings) -> dict:
    """Writes plan.json and prints it."""
    census = read_json(settings.run_directory / "inspect.json", "inspect_format")
    plan = make_plan(settings, census, read_config(settings))
    print_plan(plan)
    there = sum(path.stat().st_size for path in (settings.run_directory / "shards").glob("*.safetensors"))
    check_disk(settings.run_directory, max(0, plan["disk_peak_bytes"] - there), "the whole run, by this plan,")
    write_json(settings.run_directory / "plan.json", plan)
    return plan


def read_plan(settings: Settings) -> dict:
    """plan.json of this run."""
    return read_json(settings.run_directory / "plan.json", "plan")


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
