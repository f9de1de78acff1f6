"""The files of a release as they follow from a plan: the tensors of each shard, the index, config.json."""

from __future__ import annotations

import math
from collections.abc import Iterable

from stages.checkpoint.files import render_json
from stages.checkpoint.header import DTYPE_BYTES, render_header, sorted_specs
from stages.dialects.cache_scales import name_in_release
from stages.errors import UserError
from stages.records import Plan, PlannedShard, PlannedTensor, SourceShard
from stages.schemes import SCHEMES, draft_scales, kept
from stages.schemes.modules import Output, module_of

SHARD_METADATA = {"format": "pt"}  # the library's readers want to know the framework


def outputs_of(name: str, entry: PlannedTensor, layout: str) -> list[Output]:
    """The release's tensors that a source tensor becomes."""
    if entry["decision"] == "drop":
        return []
    if entry["scheme"]:
        return SCHEMES[entry["scheme"]].outputs(name, tuple(entry["matrix"]), layout)
    shape = tuple(entry["shape"])
    if entry["decision"] == "keep" and entry["belongs_to"]:
        written = kept.as_written(entry["dtype"], shape, entry["one_scale"])
        return [Output(f"{module_of(entry['belongs_to'])}.weight_scale", *written, name, "weight")]
    return [Output(name_in_release(name), entry["dtype"], shape, name, "weight")]


def release_outputs(plan: Plan, shards: Iterable[str] | None = None) -> dict[str, list[Output]]:
    """Shard -> the release's tensors in it, in file order (dtype size descending, then name); of all shards, or of these.

    UserError where two tensors of the release would have one name.
    """
    found: dict[str, list[Output]] = {shard: [] for shard in shards or plan["shards"]}
    made_of: dict[str, tuple[str, str]] = {}
    for name, entry in plan["tensors"].items():
        if entry["shard"] not in found:
            continue
        for output in outputs_of(name, entry, plan["layout"]):
            if output.name in made_of:
                shard, other = made_of[output.name]
                raise UserError(f"{entry['shard']}: {name} would become {output.name}, as {other} of {shard} does; the source repeats a tensor, remove "
                                "one of the two")
            made_of[output.name] = entry["shard"], name
            found[entry["shard"]].append(output)
    for shard, outputs in found.items():
        by_name = {output.name: output for output in outputs}
        found[shard] = [by_name[name] for name, _, _ in sorted_specs(specs_of(outputs))]
    return found


def weight_map(plan: Plan, made: dict[str, list[Output]]) -> dict[str, str]:
    """Tensor of the release -> its shard; `made` by `release_outputs`."""
    names = {output.name: shard for shard, outputs in made.items() for output in outputs}
    return names | dict.fromkeys(plan["draft_scales"], draft_scales.SHARD)


def specs_of(outputs: list[Output]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Header entries of outputs, in their order."""
    return [(output.name, output.dtype, output.shape) for output in outputs]


def index_json(names: dict[str, str], total_size: int) -> str:
    """Text of model.safetensors.index.json: every name with its shard, and the true number of tensor bytes."""
    return render_json({"metadata": {"total_size": total_size}, "weight_map": dict(sorted(names.items()))})


def release_config(source_config: dict, section: dict) -> dict:
    """The release's config.json: the source's, its quantization_config replaced (and none left in text_config)."""
    config = {key: value for key, value in source_config.items() if key != "quantization_config"}
    if "quantization_config" in (config.get("text_config") or {}):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    return {**config, "quantization_config": section}


def config_json(source_config: dict, section: dict) -> str:
    """Text of config.json. The source's Infinity and NaN (`time_step_limit` of Mamba) stay: transformers and vLLM read them."""
    return render_json(release_config(source_config, section), allow_nan=True)


def shard_sizes(made: dict[str, list[Output]], files: dict[str, SourceShard]) -> dict[str, PlannedShard]:
    """Shard -> bytes of its file in the source and in the release, number and bytes of the release's tensors in it.

    made: by `release_outputs`; files: of the census.
    """
    sizes = {}
    for shard, outputs in made.items():
        size = sum(math.prod(output.shape) * DTYPE_BYTES[output.dtype] for output in outputs)
        sizes[shard] = {"source_bytes": files[shard]["file_size"], "tensors": len(outputs), "tensor_bytes": size,
                        "file_bytes": size + len(render_header(specs_of(outputs), SHARD_METADATA))}
    return sizes


def release_sizes(plan: Plan, made: dict[str, list[Output]], source_config: dict) -> dict[str, int]:
    """Bytes of the release exactly as they will lie on the disk, and the number of its tensors; `made` by `release_outputs`."""
    scales = plan["draft_scales"]
    header = len(render_header(draft_scales.specs_of_scales(scales), SHARD_METADATA)) if scales else 0
    names = weight_map(plan, made)
    tensor_bytes = sum(shard["tensor_bytes"] for shard in plan["shards"].values()) + draft_scales.BYTES * len(scales)
    return {
        "release_tensor_bytes": tensor_bytes,
        "release_shard_file_bytes": sum(shard["file_bytes"] for shard in plan["shards"].values()) + header + draft_scales.BYTES * len(scales),
        "release_index_bytes": len(index_json(names, tensor_bytes).encode()),
        "release_config_bytes": len(config_json(source_config, plan["quantization_config"]).encode()),
        "release_tensors": len(names),
    }
