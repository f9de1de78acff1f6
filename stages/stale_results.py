"""Which results that are there were made for other settings or from other files: by hand, or by a run that this working directory has no
records of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from stages.checkpoint.files import read_json, sha256_file
from stages.errors import UserError
from stages.planning.record import is_plan_for
from stages.provenance import RESULTS_FORMAT
from stages.settings import Settings, as_dict, results_of_another, scoring
from stages.sources.listing import lists_files, lists_place, lists_source


def of_other_settings(settings: Settings) -> list[Path]:
    """Results that are there, but of other settings than these, or of other files of a local source. One that is damaged, and a plan of another
    version, is made again anyway."""
    run = settings.run_directory
    checks: tuple[tuple[Path, Callable[[dict], bool]], ...] = (
        (settings.source_directory / "listing.json", lambda found: lists_source(found, settings.source) and lists_files(found, settings.source)),
        (run / "plan.json", lambda found: found.get("format") != RESULTS_FORMAT or is_plan_for(found, settings)),
        (run / "verify.json", lambda found: found.get("minimum_sqnr_db", settings.release.minimum_sqnr_db) == settings.release.minimum_sqnr_db),
        (run / "perplexity.json", lambda found: found.get("settings") == scoring(settings.evaluation)),
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
    """Whether verify.json is of another release than the one that is there, but not older: somebody put that in the place of the proven one
    (`dvc checkout` does), and Snakemake, which goes by times, would leave both."""
    proof, manifest = settings.run_directory / "verify.json", settings.run_directory / "release" / "manifest.json"
    if not (proof.is_file() and manifest.is_file()) or proof.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        return False
    return _differs(proof, lambda found: found["manifest_sha256"] == sha256_file(manifest))


def _differs(path: Path, fits: Callable[[dict], bool]) -> bool:
    try:
        return not fits(yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError, UserError, yaml.YAMLError):
        return False
