"""Brings a checkpoint's files to where they are worked on: its metadata at once, its shards one by one when they are needed.

A source is a local directory or a hub repository at a pinned revision. Metadata is everything but the weights: a listing
with sizes and hashes, the auxiliary files byte for byte, and the headers of *all* shards, which for a hub come by range
requests of a few kilobytes each, so that a 212-GB checkpoint is inspected and planned before a weight byte is moved.

Shards of a hub are resumed: what is downloaded lies under a stable name (`<shard>.incomplete`) and the next run goes on
behind it, which the hub client's own cache does not do across processes. Size and, where the hub gives one, sha256 are
checked before the file takes its name. A local shard is read where it lies, and never moved, copied or written to; snakemake does without
`--shard` for it.

The environment says how to reach the hub: HF_TOKEN (for private and gated repositories), HF_ENDPOINT (a mirror).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stages.checkpoint.files import CHUNK, atomic_write, check_disk, human_bytes, only_one, read_json, sha256_file, write_json, write_rows
from stages.checkpoint.header import Header, read_header
from stages.errors import UserError, exit_with_one_line
from stages.settings import Settings, SourceSettings, load, stage_parser
from stages.sources import list_files
from stages.sources.files import SourceFile
from stages.sources.hub import Hub
from stages.sources.index import index_anomalies
from stages.sources.listing import read_listing, record_of
from stages.sources.local import check_file, directory_of


def fetch_metadata(settings: Settings) -> None:
    """Writes listing.json, headers.json and auxiliary/ into results/<source>/source; moves no weight byte.

    Raises UserError for what `list_files` refuses, a damaged header, a tensor in two shards, or an index that names shards
    or tensors that are not there, or leaves a whole shard out. What the index merely omits is read from the headers and noted as an anomaly.
    """
    with only_one(settings.source_directory / ".metadata.lock", "reading this source"):
        _fetch_metadata(settings)


def refuse(settings: Settings) -> None:
    """UserError where `fetch_metadata` of a local source would raise it; writes nothing."""
    source = settings.source
    index_anomalies(Path(source.path), _read_headers(source, None, list_files(source, None)), source.path)


def _read_headers(source: SourceSettings, hub: Hub | None, files: list[SourceFile]) -> dict[str, Header]:
    """Shard -> header; UserError for a damaged one, or where two shards have a tensor of one name."""
    headers: dict[str, Header] = {}
    shard_of: dict[str, str] = {}
    for file in files:
        if file.kind != "shard":
            continue
        header = headers[file.name] = hub.read_header(file.name, file.size) if hub else read_header(Path(source.path) / file.name)
        for name in header.tensors:
            if name in shard_of:
                raise UserError(f"{source.repository or source.path}: tensor {name} is in two shards, {shard_of[name]} and {file.name}; remove the "
                                "stale file")
            shard_of[name] = file.name
    return headers


def _fetch_metadata(settings: Settings) -> None:
    source, directory = settings.source, settings.source_directory
    hub = Hub(source) if source.repository else None
    files = list_files(source, hub)
    place = source.repository or str(source.path)
    auxiliary = directory / "auxiliary"
    building = directory / "auxiliary.part"
    shutil.rmtree(building, ignore_errors=True)
    try:
        for file in files:
            if file.kind in ("auxiliary", "config", "index"):
                check_disk(directory, file.size, file.name)
                if hub:
                    hub.fetch(file, building / file.name)
                else:
                    with atomic_write(building / file.name) as output, open(Path(source.path) / file.name, "rb") as original:
                        shutil.copyfileobj(original, output, CHUNK)
        hashes = {file.name: sha256_file(building / file.name) for file in files if (building / file.name).is_file()}
        headers = _read_headers(source, hub, files)
        anomalies = index_anomalies(building, headers, place)
        shutil.rmtree(auxiliary, ignore_errors=True)
        os.replace(building, auxiliary)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    write_rows(directory / "headers.json", {shard: record_of(header) for shard, header in headers.items()}, levels=3)
    write_json(directory / "listing.json", {
        "path": directory_of(source), "repository": source.repository, "revision": source.revision, "anomalies": anomalies,
        "files": {file.name: {"bytes": file.size, "sha256": hashes.get(file.name, file.sha256), "kind": file.kind, "mtime_ns": file.mtime_ns}
                  for file in files}})
    shards = [file for file in files if file.kind == "shard"]
    print(f"{place}: {len(shards)} shards, {human_bytes(sum(file.size for file in shards))}, "
          f"{sum(file.kind != 'shard' for file in files)} other files")


def fetch_shard(settings: Settings, shard: str) -> Path:
    """Makes one shard available to this run and returns its path: where it lies in a local source, else downloaded.

    Either way its size and header are those that `fetch_metadata` recorded, because the plan was made from them; UserError
    if not, if the hub refuses, or if the disk is too small for what is still to come.
    """
    listing = read_listing(settings)
    if listing.get(shard, {}).get("kind") != "shard":
        raise UserError(f"--shard {shard}: not a shard of {settings.source.name}; it has "
                        f"{', '.join(name for name, entry in listing.items() if entry['kind'] == 'shard')}")
    target = settings.shard_directory / shard
    if settings.source.repository:
        file = SourceFile(shard, listing[shard]["bytes"], listing[shard]["sha256"], "shard")
        if not target.exists() or target.stat().st_size != file.size:
            Hub(settings.source).fetch(file, target)
    else:
        check_file(settings.source, shard, listing[shard])
    _check_header(settings, shard, target)
    return target


def _check_header(settings: Settings, shard: str, path: Path) -> None:
    """UserError unless the shard's header is the recorded one; two shards of one size may have been swapped since."""
    recorded = read_json(settings.source_directory / "headers.json", "download --metadata").get(shard)
    if record_of(read_header(path)) != recorded:
        raise UserError(f"{path}: its header is not the one that was inspected; the checkpoint changed, run download "
                        "--metadata again")


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    parser = stage_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--metadata", action="store_true", help="listing, headers and auxiliary files")
    what.add_argument("--shard", help="one shard, for example model-00002.safetensors; needs --metadata first")
    arguments = parser.parse_args()
    settings = load(arguments.overrides)
    if arguments.metadata:
        fetch_metadata(settings)
    else:
        fetch_shard(settings, arguments.shard)


if __name__ == "__main__":
    main()
