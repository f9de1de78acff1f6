"""Reads what the headers of all shards say, and writes the census: which tensors exist, how they are stored, what for.

The index is never trusted: the published FP8 index omits every scale, and sniffing the first shard says BF16. The
census comes from the headers that `download` read off the files themselves (for a hub source by range requests).
"""

from __future__ import annotations

from collections import Counter

from stages.checkpoint.files import human_bytes, write_rows
from stages.dialects import recognize
from stages.dialects.config import expert_count, has_shared_experts, is_tied, layers_apart, text_part, tower_blocks
from stages.dialects.roles import declared_drafts, hidden_layers, layer_of, role_of
from stages.errors import UserError, exit_with_one_line
from stages.planning.modules import check_architecture
from stages.provenance import RESULTS_FORMAT
from stages.records import Census
from stages.schemes.vllm_rules import text_fault
from stages.settings import Settings, load, stage_parser
from stages.sources.listing import read_anomalies, read_config, read_headers


def census(settings: Settings) -> Census:
    """The content of inspect.json. UserError for anything that could not be converted correctly."""
    try:
        tensors, shard_of, files = read_headers(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{settings.source_directory / 'headers.json'} is damaged ({type(error).__name__}: {str(error)[:100]}): delete it and run "
                        "download --metadata again") from None
    anomalies = read_anomalies(settings)
    config = read_config(settings)
    architecture = (config.get("architectures") or [None])[0]
    row = check_architecture(architecture)  # first: what is odd about the tensors of a stranger is not its checkpoint's fault
    if fault := text_fault(row, architecture, text_part(config).get("model_type")):
        raise UserError(fault)
    layers = hidden_layers(config)
    claims = recognize(tensors, shard_of, config)
    entries = {}
    for name in sorted(tensors):
        info, claim = tensors[name], claims[name]
        entries[name] = {"shard": shard_of[name], "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes,
                         "role": role_of(name, layers), **claim.as_entry()}
    by_role = Counter()
    for entry in entries.values():
        by_role[entry["role"]] += entry["bytes"]
    return {
        "format": RESULTS_FORMAT,
        "source": settings.source.name,
        "architecture": architecture,
        "text_layers": layers,
        "hidden_size": text_part(config).get("hidden_size"),
        "experts": expert_count(config),
        "drafts": declared_drafts(config),
        "tied": is_tied(config, row.tied),
        "shared_experts": has_shared_experts(config),
        "tower_blocks": tower_blocks(config),
        "layers_apart": layers_apart(config, sorted({layer for name in tensors if (layer := layer_of(name)) is not None})),
        "shards": files,
        "tensor_bytes": sum(entry["bytes"] for entry in entries.values()),
        "file_bytes": sum(file["file_size"] for file in files.values()),
        "dialects": dict(sorted(Counter(entry["dialect"] for entry in entries.values()).items())),
        "dtypes": dict(sorted(Counter(entry["dtype"] for entry in entries.values()).items())),
        "bytes_by_role": dict(sorted(by_role.items())),
        "anomalies": anomalies,
        "tensors": entries,
    }


def run(settings: Settings) -> Census:
    """Writes inspect.json."""
    result = census(settings)
    write_rows(settings.run_directory / "inspect.json", result)
    print(f"{len(result['tensors'])} tensors in {len(result['shards'])} shards, "
          f"{human_bytes(result['tensor_bytes'])}: "
          + ", ".join(f"{count} {name}" for name, count in result["dialects"].items()))
    for anomaly in result["anomalies"]:
        print(f"note: {anomaly}")
    return result


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
