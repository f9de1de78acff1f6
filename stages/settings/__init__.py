"""The settings of a run: their schema, and the one `load()` that the Snakefile, the stages and the tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.checkpoint.files import read_json, write_json
from stages.errors import UserError
from stages.settings.checks import check
from stages.settings.commands import stage_parser
from stages.settings.conf import CONF, PROJECT, choices, located
from stages.settings.handed_over import handed_over
from stages.settings.schema import EvaluationSettings, Settings, SourceSettings, as_dict, as_json, gemm_sizes, scoring

__all__ = ["CONF", "PROJECT", "EvaluationSettings", "Settings", "SourceSettings", "as_dict", "as_json", "choices", "gemm_sizes", "load", "scoring", "stage_parser",
           "text_file", "text_path"]


def load(overrides: list[str] | tuple[str, ...] = (), resolve: Callable[[str, None], tuple[str, list[str]]] | None = None) -> Settings:
    """Composes conf/ with Hydra overrides (`recipe=...`, `source.path=...`), unless the workflow has handed over what it composed of the same
    overrides, and checks it against the schema.

    resolve: gives (revision, shards) of a repository that is named without a revision, and is asked once (stages.sources.hub.resolve); without
    it, what was recorded then is read.
    Raises UserError with one line for a misspelt key, an unknown choice or a value of the wrong type.
    """
    settings = handed_over(overrides)
    if settings is None:
        from stages.settings.composing import composed  # Hydra

        settings = composed(overrides)
    check(settings)
    if settings.source.repository and not settings.source.revision:
        _pin(settings, resolve)
    return settings


def results_of_another(settings: Settings, record: Path, listed: str) -> UserError:
    """The line that refuses to replace results that `record` says are of another source with the same name."""
    source = settings.source
    return UserError(f"{record}: the results there are of {listed}, not of {source.path or source.repository}: set source.name to another name; or, "
                     f"where the source was only moved or those results are not needed any more, remove {settings.source_directory}, and everything "
                     "is made again")


def _pin(settings: Settings, resolve: Callable | None) -> None:
    """Fills in the revision and the shards that a hub source without them was first converted at."""
    source, record = settings.source, settings.source_directory / "revision.json"
    found = read_json(record, "snakemake") if record.exists() else None
    if found is not None and found.get("repository") not in (None, source.repository):
        raise results_of_another(settings, record, found["repository"])
    if found is None or not found.get("repository") or not found.get("revision") or not found.get("shards"):
        if resolve is None:
            raise UserError(f"{record} is missing: {source.repository} was given without a revision, which snakemake looks up and records when "
                            "it starts; or set source.revision and source.shards")
        revision, shards = resolve(source.repository, None)
        found = {"repository": source.repository, "revision": revision, "shards": shards}
        write_json(record, found)
    source.revision, source.shards = found["revision"], found["shards"]


def text_path(settings: Settings) -> Path:
    """evaluation.text as `text_file` finds it."""
    return text_file("evaluation.text", settings.evaluation.text)


def text_file(key: str, name: str) -> Path:
    """A text that a setting names, looked up from the working directory and then from the project; UserError when there is none."""
    path = Path(located(name))
    if path.is_file():
        return path
    raise UserError(f"{key}={name}: no such file; name a UTF-8 text")
