"""What `download --metadata` wrote down of a source, listing.json, headers.json and auxiliary/, for the stages behind it."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.files import read_json
from stages.checkpoint.header import Header, TensorInfo
from stages.dialects.config import read_source_config
from stages.errors import UserError
from stages.records import ListedFile, SourceShard
from stages.settings import Settings, SourceSettings
from stages.sources.hub import Hub
from stages.sources.local import check_file, list_directory

FIELDS = {"bytes", "sha256", "kind"}  # of a listed file; times came later


def lists_place(listing: dict, source: SourceSettings) -> bool:
    """Whether listing.json is of this directory, however its path is spelt, or of this repository at any revision."""
    path = listing.get("path")
    same_directory = bool(source.path) == bool(path) and (not path or Path(source.path).resolve() == Path(path).absolute())
    return same_directory and source.repository == listing.get("repository")


def lists_source(listing: dict, source: SourceSettings) -> bool:
    """Whether listing.json is of this directory, however its path is spelt, or of this revision of a repository."""
    return lists_place(listing, source) and source.revision == listing.get("revision")


def lists_files(listing: dict, source: SourceSettings) -> bool:
    """Whether the files of a local source are still the listed ones: by size and time, so that an older file in the place of another is noticed.
    A listing of an older version has no times and is of other files."""
    listed = {name: (entry["bytes"], entry.get("mtime_ns")) for name, entry in listing["files"].items() if entry["kind"] != "ignored"}
    return not source.path or listed == {file.name: (file.size, file.mtime_ns) for file in list_directory(source) if file.kind != "ignored"}


def _whole_listing(settings: Settings) -> dict:
    """listing.json; UserError where it is of another source than the settings name, or not as `fetch_metadata` writes it."""
    path = settings.source_directory / "listing.json"
    listing = read_json(path, "download --metadata")
    files, anomalies = listing.get("files"), listing.get("anomalies")
    if not (isinstance(files, dict) and isinstance(anomalies, list) and all(isinstance(entry, dict) and FIELDS <= entry.keys() for entry in files.values())):
        raise UserError(f"{path} is damaged (its files are not listed as they should be): delete it and run download --metadata again")
    if not lists_source(listing, settings.source):
        listed = listing.get("path") or f"{listing.get('repository')} at {listing.get('revision')}"
        raise UserError(f"{path}: lists {listed}, which is not the source that the settings name; run download --metadata again, or set source.name: "
                        "results are kept by it")
    return listing


def read_listing(settings: Settings) -> dict[str, ListedFile]:
    """The files of the source as `fetch_metadata` listed them; UserError as for `_whole_listing`."""
    return _whole_listing(settings)["files"]


def read_anomalies(settings: Settings) -> list[str]:
    """What `fetch_metadata` found odd about the source but harmless; UserError as for `_whole_listing`."""
    return _whole_listing(settings)["anomalies"]


def check_source(settings: Settings, may_be_gone: bool = False) -> None:
    """UserError unless a local source still has the files that it was listed with, by size and time, so that nothing is compared with others.
    A hub's revision cannot change. may_be_gone: accept missing files."""
    source = settings.source
    for name, entry in sorted(read_listing(settings).items()) if source.path else ():
        if entry["kind"] != "ignored" and not (may_be_gone and not (Path(source.path) / name).exists()):
            check_file(source, name, entry)


def read_headers(settings: Settings) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, SourceShard]]:
    """(tensor -> header entry, tensor -> shard, shard -> its entry in the census) over all shards, of which no two have a tensor of one name."""
    headers = read_json(settings.source_directory / "headers.json", "download --metadata")
    tensors, shard_of, files = {}, {}, {}
    for shard in sorted(headers):
        files[shard] = {"file_size": headers[shard]["file_size"]}
        for name, (dtype, shape, begin, end) in headers[shard]["tensors"].items():
            tensors[name], shard_of[name] = TensorInfo(dtype, tuple(shape), begin, end), shard
    return tensors, shard_of, files


def read_config(settings: Settings) -> dict:
    """The source's config.json, as `read_source_config` gives it; UserError where the copy is of another source."""
    _whole_listing(settings)
    source, copies = settings.source, settings.source_directory / "auxiliary"
    if not (copies / "config.json").exists():
        return read_json(copies / "config.json", "download --metadata")
    return read_source_config(copies, Path(source.path or source.repository))


def read_tensor_bytes(settings: Settings, shard: str, name: str) -> bytes:
    """Bytes of one tensor of a hub source's shard by a range request; the header that `fetch_metadata` saw says where."""
    record = read_json(settings.source_directory / "headers.json", "download --metadata")[shard]
    _, _, begin, end = record["tensors"][name]
    start = record["data_start"]
    return Hub(settings.source).read_range(shard, start + begin, start + end, record["file_size"])


def record_of(header: Header) -> dict:
    """A header as headers.json keeps it: begin and end are bytes from data_start."""
    return {"file_size": header.file_size, "metadata": header.metadata, "data_start": header.data_start,
            "tensors": {name: [info.dtype, list(info.shape), info.begin, info.end] for name, info in header.tensors.items()}}
