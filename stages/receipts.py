"""Receipts: what converting a shard found out, and for which plan it holds.

`quantize_experts` writes one beside each converted shard. It names the sha256 of the source (and the time of a local file's last change)
and of the output, of every tensor that passed through and of what one shard lent to another, and for every quantized matrix the sums of
squares of the signal, of the error and of what it decodes to; later stages trust it instead of reading the weights again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

from stages.checkpoint.files import read_json
from stages.dialects import Claim
from stages.errors import UserError
from stages.provenance import RESULTS_FORMAT
from stages.records import FileHash, ListedFile, MatrixSums, Plan, PlannedTensor, Receipt, fault
from stages.settings import Settings
from stages.sources.listing import read_listing

DECISIVE = ("shard", "dtype", "shape", "decision", "scheme")  # of a plan's entry, beside the fields of its Claim


def plan_hashes(plan: Plan, shards: Iterable[str] | None = None) -> dict[str, str]:
    """Shard -> sha256 over everything in the plan that determines its bytes, scales in other shards among it; the rest is prose. Of all shards,
    or of these."""
    entries: dict[str, dict[str, PlannedTensor]] = {shard: {} for shard in shards or plan["shards"]}
    for name, entry in plan["tensors"].items():
        if entry["shard"] not in entries:
            continue
        needed = Claim.from_entry(entry).read_from() if entry["scheme"] else ()
        entries[entry["shard"]].update({part: plan["tensors"][part] for part in (name, *needed)})
    common = {"format": RESULTS_FORMAT, "layout": plan["layout"], "exponent_rule": plan["exponent_rule"]}
    result = {}
    for shard, found in entries.items():
        decisive = {name: {key: entry[key] for key in DECISIVE} | Claim.from_entry(entry).as_entry() for name, entry in found.items()}
        result[shard] = hashlib.sha256(json.dumps(common | {"tensors": decisive}, sort_keys=True).encode()).hexdigest()
    return result


def read_receipts(settings: Settings, plan: Plan) -> dict[str, Receipt]:
    """Shard -> receipt; UserError for a missing one, for one that was made under another plan, and for one of other bytes than the source was
    listed with: a checkpoint of the same name and shapes has the same plan."""
    receipts, hashes, listing = {}, plan_hashes(plan), read_listing(settings)
    passed = Counter(entry["shard"] for entry in plan["tensors"].values() if entry["decision"] in ("pass through", "keep"))
    for shard in plan["shards"]:
        path = (settings.run_directory / "shards" / shard).with_suffix(".json")
        receipt = read_json(path, f"quantize_experts --shard {shard}")
        of_this_form = fault(receipt, Receipt) is None
        if of_this_form and receipt["plan_sha256"] != hashes[shard]:
            raise UserError(f"{path} was made under another plan; run quantize_experts --shard {shard} again")
        if not (of_this_form and _is_whole(receipt, passed[shard], plan)):
            raise UserError(f"{path} is damaged: delete it and run quantize_experts --shard {shard} again")
        if not _is_of(receipt["source"], listing.get(shard, {})):
            raise UserError(f"{path} was made from another file than the {shard} of {settings.source.path or settings.source.repository}; run "
                            f"download --shard {shard} and quantize_experts --shard {shard} again")
        receipt["quantized"] = {name: [MatrixSums(*entry) for entry in sums] for name, sums in receipt["quantized"].items()}
        receipts[shard] = receipt
    for shard, receipt in receipts.items():
        for name, digest in receipt["borrowed"].items():
            owner = plan["tensors"][name]["shard"]
            if receipts[owner]["lent"].get(name) != digest:
                raise UserError(f"{shard}: was converted with other bytes of {name} than {owner} holds; remove {settings.run_directory / 'shards' / shard} "
                                "and run again")
    return receipts


def _is_whole(receipt: Receipt, passed: int, plan: Plan) -> bool:
    """Whether a receipt of this plan holds what later stages take for granted: bytes and sha256 of both files, a sha256 for each of the tensors
    that `passed` through, and sums that are numbers."""
    files = all(isinstance(receipt[key].get("bytes"), int) and isinstance(receipt[key].get("sha256"), str) for key in ("source", "output"))
    sums = [entry for found in receipt["quantized"].values() for entry in (found if isinstance(found, list) else [None])]
    return files and len(receipt["tensors"]) == passed and receipt["borrowed"].keys() <= plan["tensors"].keys() and all(
        isinstance(entry, list) and len(entry) == 4 and all(isinstance(number, int | float) for number in entry[1:]) for entry in sums)


def _is_of(converted: FileHash, listed: ListedFile) -> bool:
    """Whether what was converted is the file that was listed, by all that the listing says of it: the sha256 that a hub gives, the time of the
    last change of a local file."""
    return "bytes" in listed and all(converted.get(key) == listed[key] for key in ("bytes", "sha256", "mtime_ns") if listed.get(key) is not None)


def shards_sha256(receipts: dict[str, Receipt]) -> str:
    """One hash of all converted shards: names what was measured on them where no release need be there."""
    return hashlib.sha256(json.dumps({shard: receipts[shard]["output"]["sha256"] for shard in sorted(receipts)}).encode()).hexdigest()


def zeros_note(names: list[str]) -> str:
    """What to say of weights that hold nothing but zeros: converted correctly, but where a download left a hole, too."""
    return (f"{len(names)} weight{'s hold' if len(names) > 1 else ' holds'} nothing but zeros, in the source already "
            f"({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}); compare the source with its published sha256 if that is a surprise")
