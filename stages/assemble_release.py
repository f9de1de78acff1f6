"""Puts the release together: shards as hard links, a config that vLLM reads correctly, a true index, and the manifest.

Everything in the directory is a function of the source's bytes and the recipe: no date, no host, no measured figure, so
that a pin can name it by hash. The vLLM plugin that serves its draft layers goes along. Auxiliary files (tokenizer, templates,
code, licence) are the source's, byte for byte; its README.md goes below the model card that `report` writes beside the release.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from stages.checkpoint.files import hard_link, only_one, sha256_file, sync_directory, write_json, write_text
from stages.checkpoint.header import INDEX
from stages.checkpoint.writer import ShardWriter
from stages.errors import UserError, exit_with_one_line
from stages.planning.outputs import SHARD_METADATA, config_json, index_json, release_outputs, weight_map
from stages.planning.record import read_plan
from stages.receipts import read_receipts
from stages.records import FileHash, Plan, Receipt
from stages.release import REPORTS, auxiliary_files, bundled_files, manifest_of
from stages.schemes import draft_scales
from stages.serving.plugin import PLUGIN
from stages.settings import Settings, load, stage_parser
from stages.sources.listing import read_config, read_listing


def run(settings: Settings) -> dict:
    """Builds results/<source>/<recipe>/release and returns its manifest."""
    with only_one(settings.run_directory / ".release.lock", "assembling a release"):
        return _assemble(settings)


def _entry(path: Path) -> FileHash:
    """A file as the manifest lists it."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _link_shards(settings: Settings, receipts: dict[str, Receipt], building: Path) -> None:
    """The converted shards, as hard links: a release takes no second copy of 123 GB."""
    for shard, receipt in receipts.items():
        made = settings.run_directory / "shards" / shard
        if not made.exists() or made.stat().st_size != receipt["output"]["bytes"]:
            raise UserError(f"{made} is not the file its receipt describes ({receipt['output']['bytes']} bytes); run "
                            f"quantize_experts --shard {shard} again")
        hard_link(made, building / shard)


def _copy_auxiliary(settings: Settings, building: Path) -> dict[str, FileHash]:
    """The source's files that go along unchanged; name -> entry of the manifest."""
    listing, files = read_listing(settings), {}
    for name in auxiliary_files(settings):
        copy, listed = settings.source_directory / "auxiliary" / name, listing[str(name)]["sha256"]
        if not copy.is_file() or sha256_file(copy) != listed:
            raise UserError(f"{copy}: is not what was read from the source; remove {settings.source_directory / 'listing.json'} and run again")
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(copy, building / name)
        files[str(name)] = {"bytes": copy.stat().st_size, "sha256": listed}
    return files


def _copy_plugin(plan: Plan, building: Path) -> dict[str, FileHash]:
    """The plugin, where the architecture needs it; name -> entry of the manifest."""
    files = {}
    for path in bundled_files(plan):
        target = building / PLUGIN.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PLUGIN / path, target)
        files[f"{PLUGIN.name}/{path.as_posix()}"] = _entry(target)
    return files


def _write_draft_scales(plan: Plan, building: Path) -> dict[str, FileHash]:
    """The shard of inert scales, where the settings ask for it; name -> entry of the manifest."""
    if not plan["draft_scales"]:
        return {}
    specs = draft_scales.specs_of_scales(plan["draft_scales"])
    with ShardWriter(building / draft_scales.SHARD, specs, SHARD_METADATA) as writer:
        for name, _, _ in specs:
            writer.write(name, struct.pack("<f", plan["draft_scales"][name]))
    return {draft_scales.SHARD: {"bytes": writer.size, "sha256": writer.sha256}}


def _assemble(settings: Settings) -> dict:
    plan = read_plan(settings)
    receipts = read_receipts(settings, plan)
    release = settings.run_directory / "release"
    building = release.with_name("release.part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _link_shards(settings, receipts, building)
        files = _copy_auxiliary(settings, building) | _copy_plugin(plan, building) | _write_draft_scales(plan, building)
        write_text(building / "config.json", config_json(read_config(settings), plan["quantization_config"]))
        write_text(building / INDEX, index_json(weight_map(plan, release_outputs(plan)), plan["release_tensor_bytes"]))
        files |= {name: _entry(building / name) for name in ("config.json", INDEX)}
        manifest = manifest_of(settings, plan, receipts, files)
        write_json(building / "manifest.json", manifest)
        if not (release / "manifest.json").is_file() or (release / "manifest.json").read_bytes() != (building / "manifest.json").read_bytes():
            for name in REPORTS:  # of another release; should a later stage fail, they would stay
                (settings.run_directory / name).unlink(missing_ok=True)
        shutil.rmtree(release, ignore_errors=True)
        os.replace(building, release)
        sync_directory(release.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"release: {release} ({plan['release_tensors']} tensors in {len(receipts)} shards, {len(manifest['files'])} files)")
    return manifest


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
