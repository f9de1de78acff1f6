"""What a checkpoint's index says, held against the headers of its shards, which alone are trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from stages.checkpoint.header import INDEX, Header
from stages.errors import UserError
from stages.sources.files import safe_name


def weight_map_of(directory: Path, headers: Mapping[str, Header], place: str) -> dict[str, str] | None:
    """Tensor -> shard by the index, None where there is none; UserError where it names what is not there. headers: by shard; place: what it is of."""
    if not (directory / INDEX).exists():
        return None
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {INDEX} is not valid JSON ({str(error)[:120]}); restore the original") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{place}: {INDEX} has no weight_map of names; restore the original")
    for name, shard in weight_map.items():
        safe_name(shard, INDEX)
        if shard not in headers:
            raise UserError(f"{place}: {INDEX} names {shard} (for {name}), which is not there; the checkpoint is "
                            "incomplete, download the missing shard")
        if name not in headers[shard].tensors:
            elsewhere = next((s for s, header in headers.items() if name in header.tensors), None)
            where = f"it is in {elsewhere}" if elsewhere else "no shard has it"
            raise UserError(f"{place}: {INDEX} says that {name} is in {shard}, but {where}; the checkpoint is inconsistent, "
                            "get it again")
    return weight_map


def index_anomalies(directory: Path, headers: Mapping[str, Header], place: str) -> list[str]:
    """What is odd about the index but harmless. UserError as for `weight_map_of`, and for an index that leaves a whole shard out."""
    weight_map = weight_map_of(directory, headers, place)
    if weight_map is None:
        return []
    unlisted = sum(name not in weight_map for header in headers.values() for name in header.tensors)
    anomalies = [f"the source's {INDEX} omits {unlisted} tensors that its shards hold"] if unlisted else []
    if strangers := sorted(set(headers) - set(weight_map.values())):
        raise UserError(f"{place}: {INDEX} does not name {', '.join(strangers)}, so that engines will not load it (often it is a second copy of the "
                        "weights in another form); remove it, or complete the index")
    return anomalies
