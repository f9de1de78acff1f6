"""Existing results made with other settings or from other files, by hand or by a run that Snakemake has no record of here; and damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from stages.checkpoint.files import read_json, sha256_file
from stages.errors import UserError
from stages.planning.record import is_plan_for
from stages.provenance import RESULTS_FORMAT
from stages.serving.secrets import settings_shown
from stages.settings import Settings, as_dict, gemm_sizes, results_of_another, scoring, text_path
from stages.sources.listing import lists_files, lists_place, lists_source


def of_other_settings(settings: Settings) -> list[Path]:
    """Results that are there, but of other settings than these, or of other files of a local source. Of one that is damaged nothing is said, the stage
    that reads it does; a plan of another version is made again anyway."""
    run, sizes = settings.run_directory, gemm_sizes(settings.evaluation)
    checks: tuple[tuple[Path, Callable[[dict], bool]], ...] = (
        (settings.source_directory / "listing.json", lambda found: lists_source(found, settings.source) and lists_files(found, settings.source)),
        (run / "plan.json", lambda found: found.get("format") != RESULTS_FORMAT or is_plan_for(found, settings)),
        (run / "verify.json", lambda found: found.get("minimum_sqnr_db", settings.release.minimum_sqnr_db) == settings.release.minimum_sqnr_db),
        (run / "perplexity.json", lambda found: found.get("settings") == scoring(settings.evaluation) and (
            "text" not in found or found["text"]["sha256"] == sha256_file(text_path(settings)))),
        (run / "gemm.json", lambda found: found.get("sizes", sizes) == sizes),  # results of older versions do not say
        (run / "serving.json", lambda found: (found["settings"] == settings_shown(settings.serving)) if "settings" in found else (
            found.get("server") == settings.serving.name)),
        (run / "settings.yaml", lambda found: all(found.get(part) == as_dict(getattr(settings, part)) for part in ("source", "recipe", "release"))),
    )
    return [path for path, fits in checks if path.exists() and _differs(path, fits)]


def refuse_another_source(settings: Settings) -> None:
    """UserError where the results of this source's name are those of another directory or repository, which these would silently replace: of two
    with the same last part of their name. A local source may be at another path that leads to the same directory, a hub's at another revision."""
    path, source = settings.source_directory / "listing.json", settings.source
    if path.exists() and _differs(path, lambda found: lists_place(found, source)):
        found = read_json(path)
        listed = found.get("path") or found.get("repository")
        raise results_of_another(settings, path, listed)


def is_exchanged(settings: Settings) -> bool:
    """Whether release/ was replaced after it was verified (`dvc checkout` does that) by a release that is not newer, which Snakemake cannot see from
    timestamps."""
    proof, manifest = settings.run_directory / "verify.json", settings.run_directory / "release" / "manifest.json"
    if not (proof.is_file() and manifest.is_file()) or proof.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        return False
    return _differs(proof, lambda found: found["manifest_sha256"] == sha256_file(manifest))


def results_of(settings: Settings) -> list[Path]:
    """The results by whose times Snakemake goes, whether they are there or not."""
    run, source = settings.run_directory, settings.source_directory
    named = [source / "listing.json", source / "headers.json", *(run / name for name in ("inspect.json", "plan.json", "verify.json"))]
    return [*named, run / "release" / "manifest.json", *(run / "shards").glob("*.json")]


def refuse_damaged(settings: Settings) -> None:
    """UserError where a file of the release, or a converted shard, has not the size that it was made with: half of it was copied, say. Nothing is read."""
    release, shards = settings.run_directory / "release", settings.run_directory / "shards"
    for name, entry in _entries(release / "manifest.json"):
        if not (release / name).is_file() or (release / name).stat().st_size != entry:
            raise UserError(f"{release / name}: {'is missing' if not (release / name).is_file() else 'has not the size that manifest.json lists'}; remove "
                            f"{release} and run again, it is made anew")
    for path in sorted(shards.glob("*.safetensors")):
        for _, size in _entries(path.with_suffix(".json")):
            if path.stat().st_size != size:
                raise UserError(f"{path}: has not the size that its receipt gives; remove it and run again, it is converted anew")


def _entries(path: Path) -> list[tuple[str, int]]:
    """(file, bytes) of what a manifest or a receipt describes; nothing where it is missing or damaged, which the stage that reads it says."""
    try:
        found = read_json(path)
        return [(name, entry["bytes"]) for name, entry in (found["files"] if "files" in found else {"": found["output"]}).items()]
    except (AttributeError, KeyError, TypeError, UserError):
        return []


def _differs(path: Path, fits: Callable[[dict], bool]) -> bool:
    try:
        return not fits(yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError, UserError, yaml.YAMLError):
        return False
