"""What a release consists of, and which one a result was measured on: what assembling, verifying and reporting must agree about."""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path

from stages.checkpoint.files import read_json, sha256_file
from stages.checkpoint.header import INDEX
from stages.dialects.config import MODELOPT
from stages.errors import UserError
from stages.planning.outputs import release_outputs
from stages.records import FileHash, Plan, Receipt
from stages.schemes.architectures import architecture_of
from stages.serving.plugin import PLUGIN, plugin_files
from stages.settings import Settings
from stages.sources.listing import read_listing

WRITTEN = ("config.json", INDEX, "manifest.json")
REPORTS = ("report.html", "card.md", "metrics.json")  # what `report` says of a release, beside it
LEFT_OUT = ("README.md", ".gitattributes", MODELOPT, *WRITTEN)  # MODELOPT says how the source is quantized


def auxiliary_files(settings: Settings) -> list[Path]:
    """Files of the source that go into the release unchanged, relative to its directory, sorted."""
    listing = read_listing(settings)
    return [Path(name) for name in sorted(listing) if listing[name]["kind"] == "auxiliary" and name not in LEFT_OUT]


def bundled_files(plan: Plan) -> list[Path]:
    """Files of the plugin that a release of this architecture brings along, relative to the plugin's directory."""
    return plugin_files() if architecture_of(plan["architecture"]).plugin else []


def other_files(settings: Settings, plan: Plan) -> set[str]:
    """Names of all files of a release that are no shards, without manifest.json."""
    bundled = [f"{PLUGIN.name}/{path.as_posix()}" for path in bundled_files(plan)]
    return {"config.json", INDEX, *bundled, *(path.as_posix() for path in auxiliary_files(settings))}


def source_identity(settings: Settings, receipts: dict[str, Receipt]) -> dict:
    """What was converted: repository and revision, or just a name, and the hash of every source shard."""
    source = settings.source
    return {"name": source.name, "repository": source.repository, "revision": source.revision,
            "shards": {shard: receipt["source"]["sha256"] for shard, receipt in sorted(receipts.items())}}


def manifest_of(settings: Settings, plan: Plan, receipts: dict[str, Receipt], files: dict[str, FileHash]) -> dict:
    """manifest.json for these files: everything but the hashes of what is no shard follows from plan and receipts."""
    tensors = {output.name: receipts[shard]["tensors"][output.name]
               for shard, outputs in release_outputs(plan).items() for output in outputs if output.part == "weight"}
    tensors |= {name: hashlib.sha256(struct.pack("<f", value)).hexdigest() for name, value in plan["draft_scales"].items()}
    files = files | {shard: {"bytes": receipt["output"]["bytes"], "sha256": receipt["output"]["sha256"]} for shard, receipt in receipts.items()}
    return {"format_version": 1, "source": source_identity(settings, receipts), "recipe": plan["recipe_settings"],
            "files": dict(sorted(files.items())), "tensors": dict(sorted(tensors.items()))}


def measured_release(settings: Settings) -> str:
    """sha256 of the release's manifest.json, which names what a result was measured on.

    UserError where a file of the release is no longer the one that the manifest lists. A shard that is still a hard link to that in shards/ is
    trusted; any other (somebody replaced it, or DVC brought it back from its cache) is read and hashed, and then linked, so that the next stage
    need not read it.
    """
    release = settings.run_directory / "release"
    files = _listed_files(release)
    for name, entry in files.items():
        path = release / name
        same = path.is_file() and path.stat().st_size == entry.get("bytes")
        if not same or not (_is_linked(settings, name) or sha256_file(path) == entry.get("sha256")):
            raise UserError(f"{path}: {'is not the file that manifest.json lists' if path.exists() else 'is missing'}; remove {release} and run "
                            "again (assemble_release, then what is behind it)")
    digest = sha256_file(release / "manifest.json")
    _link_shards_again(settings, files)
    return digest


def _listed_files(release: Path) -> dict[str, FileHash]:
    """The files of a release as its manifest.json lists them, by name."""
    files = read_json(release / "manifest.json", "assemble_release").get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise UserError(f"{release / 'manifest.json'} is damaged (it lists no files): remove {release} and run again")
    return files


def _is_linked(settings: Settings, name: str) -> bool:
    """Whether a file of the release is a hard link to the shard that was converted."""
    made = settings.run_directory / "shards" / name
    return made.exists() and made.samefile(settings.run_directory / "release" / name)


def _link_shards_again(settings: Settings, files: dict[str, FileHash]) -> None:
    """Makes the shards in shards/ hard links to the release's files again, where DVC has put files of its cache with the same bytes into the
    release: those bytes would be on the disk twice, and every stage would read them to see that they are the same.

    files: what the manifest lists, already compared with what is there. DVC's files are told by their write protection. A shard keeps the time of
    its last change, by which Snakemake goes. Nothing is done where the receipt is of other bytes, or the system refuses.
    """
    release = settings.run_directory / "release"
    for name, entry in files.items():
        path, made = release / name, settings.run_directory / "shards" / name
        if made.suffix != ".safetensors" or not made.exists() or _is_linked(settings, name) or path.stat().st_mode & 0o222:
            continue
        with suppress(OSError, UserError):
            output, status = read_json(made.with_suffix(".json"), "quantize_experts").get("output"), made.stat()
            if isinstance(output, dict) and output.get("sha256") == entry["sha256"]:
                linked = made.with_name(f"{made.name}.linked")
                linked.unlink(missing_ok=True)
                os.link(path, linked)
                os.utime(linked, ns=(status.st_atime_ns, status.st_mtime_ns))
                os.replace(linked, made)
