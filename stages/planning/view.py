"""A plan for a person: what happens to each role, what to think over, where the release will run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from stages.checkpoint.files import human_bytes
from stages.dialects import by_name
from stages.dialects.config import declared
from stages.dialects.roles import declared_drafts
from stages.records import Plan, PlannedTensor
from stages.schemes import SCHEMES, kept


def notes(tensors: dict[str, PlannedTensor], source_config: dict, drafts: int, grown: int) -> list[str]:
    """What a user should think over before converting."""
    found = []
    converted = Counter(entry["dialect"] for entry in tensors.values() if entry["decision"] == "quantize")
    for dialect, count in converted.items():
        if by_name(dialect).IS_COARSE:
            found.append(f"{count} weights are {dialect.upper()} already: MXFP4 rounds them a second time; a source in FP8 or BF16 gives a "
                         "better release")
        elif dialect == "mxfp4":
            found.append(f"{count} weights are MXFP4 already: they are stored anew, their values stay")
    left = Counter(entry["stored"] for entry in tensors.values() if entry["decision"] == "keep" and entry["matrix"])
    found += [f"{count} weights that the recipe does not name stay {stored}, bit-identical" for stored, count in left.items()]
    weight_only = kept.weight_only(declared(source_config))
    found += [f"{count} weights stay {stored} and get their activations quantized, which the source does to none or not to all of them; vLLM reads "
              "neither FP8 blocks nor FP8 experts otherwise" for stored, count in left.items()
              if stored.startswith("fp8 ") and ("block" if "x" in stored else stored.split()[-1]) in weight_only.by_all | weight_only.by_some]
    if unread := [name for name, entry in tensors.items() if entry["decision"] == "drop" and not entry["belongs_to"]]:
        found.append(f"{len(unread)} scales of attention are left out ({unread[0]} ...): vLLM reads them only under a scheme of the KV cache, which the "
                     "release does not ask for")
    if grown > 0:
        found.append(f"the release is {human_bytes(grown)} larger than its source")
    section = declared(source_config)
    if section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo"):
        found.append("the source asks for a quantized KV cache, the release does not; engines take --kv-cache-dtype fp8 all the same")
    if drafts < (counted := declared_drafts(source_config)):
        found.append(f"config.json declares {counted} draft layers, which are not all there: speculative decoding "
                     "with them is not possible")
    return found


def by_role(plan: Plan) -> list[dict]:
    """What happens to each role: tensors, parameters (without scales), bytes before and after."""
    rows: dict[tuple[str, str], dict] = {}
    for name, entry in plan["tensors"].items():
        key = (entry["role"], entry["scheme"] or entry["decision"])
        row = rows.setdefault(key, {"role": key[0], "decision": key[1], "tensors": 0, "parameters": 0, "before": 0, "after": 0})
        if entry["decision"] == "quantize":
            row["after"] += math.prod(entry["matrix"]) * SCHEMES[entry["scheme"]].BYTES_PER_BLOCK // SCHEMES[entry["scheme"]].BLOCK
        elif entry["decision"] != "drop":
            row["after"] += entry["bytes"]
        row["tensors"] += 1
        row["parameters"] += 0 if entry["belongs_to"] else math.prod(entry["matrix"] or entry["shape"])
        row["before"] += entry["bytes"]
    return [rows[key] for key in sorted(rows)]


def print_plan(plan: Plan) -> None:
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
          f"{human_bytes(plan['disk_peak_bytes'])} with {plan['lane']} shards at a time, {plan['jobs']} jobs; "
          f"config.json gives all {plan['runtime_modules']} vLLM modules their format")
    for note in plan["notes"]:
        print(f"note: {note}")
    print("\n".join(where_it_runs(plan)))


def where_it_runs(plan: Plan) -> list[str]:
    """A line for each engine and for the numbers of GPUs that the release can be split over."""
    lines = [f"{engine['engine']}: {engine['loads']}; {'; '.join(engine['how'])}" for engine in plan["engines"]]
    rows = plan["tensor_parallel"]
    lines.append("tensor parallel: " + (_sizes(row for row in rows if row["fits"] and row["marlin"]) or "none"))
    experts_whole = [row for row in rows if row["fits"] and not row["marlin"]]
    out = [row for row in rows if not row["fits"]]
    if experts_whole:
        lines.append(f"tensor parallel {_sizes(experts_whole)} with expert parallelism only: {experts_whole[0]['reason']}")
    if alone := [row for row in rows if row["fits"] and row.get("drafts")]:
        lines.append(f"tensor parallel {_sizes(alone)} without drafting only: {alone[0]['drafts']}")
    if out:
        lines.append(f"not tensor parallel {_sizes(out)}: {out[0]['reason']}")
    return lines


def _sizes(rows: Iterable[dict]) -> str:
    return ", ".join(str(row["tensor_parallel"]) for row in rows)
