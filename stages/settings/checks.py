"""What settings must be beyond their types; each mistake is one line."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

from stages.checkpoint.files import from_here, nearest_existing
from stages.errors import UserError
from stages.settings.conf import located
from stages.settings.schema import EvaluationSettings, RecipeSettings, ServingSettings, Settings, SourceSettings

LATENCIES = ("ttft", "tpot", "end_to_end")


def check(settings: Settings) -> None:
    """UserError for settings that cannot be meant. A source without a name takes its directory's or its repository's, and paths that name results
    or are recorded with them get one spelling: with another Snakemake would make everything again."""
    source, serving = settings.source, settings.serving
    source.path, serving.environment = source.path and located(source.path), serving.environment and located(serving.environment)
    _check_source(source)
    _check_places(settings)
    _check_apart(settings)
    settings.results = from_here(settings.results)
    if settings.source.path:
        settings.source.path = from_here(settings.source.path)
    _check_limits(settings)
    _check_evaluation(settings.evaluation, settings.serving)
    _check_serving(settings.serving)
    _check_recipe(settings.recipe)


def _check_source(source: SourceSettings) -> None:
    if bool(source.path) == bool(source.repository):
        raise UserError("conf: a source is either a local directory (source=local source.path=DIRECTORY) or a hub repository (source=hub "
                        f"source.repository=OWNER/NAME); this one has {'both' if source.path else 'neither'}")
    if source.repository and source.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", source.revision):
        raise UserError(f"conf: source.revision must be the 40-digit commit hash of {source.repository}, not "
                        f"{source.revision!r}: a branch name can mean other bytes tomorrow")
    if source.repository and source.revision and not source.shards:
        raise UserError(f"conf: list the shard files of {source.repository} in source.shards=[...]: the workflow must "
                        "know them before the first byte")
    if source.origin and not re.fullmatch(r"[\w.-]+/[\w.-]+", source.origin):
        raise UserError(f"conf: source.origin is {source.origin!r}; it names a hub repository, OWNER/NAME")
    if source.name is None:
        source.name = Path(source.path).resolve().name if source.path else source.repository.rsplit("/", 1)[-1]


def _check_places(settings: Settings) -> None:
    """Paths and names that become paths."""
    source, recipe, results = settings.source, settings.recipe, Path(settings.results)
    for key, value in (("source.path", source.path), ("results", settings.results), ("evaluation.text", settings.evaluation.text)):
        if re.search(r"[{}\n*?]", value or ""):
            raise UserError(f"conf: {key}={value!r}: Snakemake reads braces, * and ? as wildcards; use a link without them")
    for key, value in (("source.name", source.name), ("recipe.name", recipe.name)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or (key, value) == ("recipe.name", "source"):
            raise UserError(f"conf: {key} {value!r} (of a local source the folder's name, if it has none) names a directory of results: set {key} to "
                            "another word than 'source', of letters, digits, '.', '_' and '-'")
    if not settings.results or settings.results.startswith("-") or ((results.exists() or results.is_symlink()) and not results.is_dir()):
        raise UserError(f"conf: results is {settings.results or 'empty'}: name the directory that everything is written to, made where it is missing")
    if not results.exists():
        above = nearest_existing(results)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"conf: results={settings.results} cannot be made: {above} is {'read-only' if above.is_dir() else 'a file'}; name another "
                            "directory")


def _check_apart(settings: Settings) -> None:
    """Results and a local source: neither is the other or lies in it. Checked before Snakemake makes a log or removes an old result there."""
    if not settings.source.path:
        return
    source, ours = Path(settings.source.path).resolve(), settings.source_directory.parent.resolve()
    for place in (ours, Path(settings.results).resolve()):
        if place == source or source in place.parents:
            raise UserError(f"conf: results={settings.results}: this run's {place} {'is' if place == source else 'lies in'} the source {source}; choose "
                            "results outside of it, or another source.name")
    for place in (ours, settings.run_directory.resolve()):
        if place in source.parents:
            raise UserError(f"conf: source.path={source}: lies in the results {place} of this run; choose other results")


def _check_limits(settings: Settings) -> None:
    """The limits that stand beside the fields in the schema."""
    for group in dataclasses.fields(settings):
        part = getattr(settings, group.name)
        for key in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
            value, limits = getattr(part, key.name), key.metadata
            if "allowed" in limits and value not in limits["allowed"]:
                raise UserError(f"conf: {group.name}.{key.name} is {value!r}; choose one of {', '.join(limits['allowed'])}")
            if value is None:
                continue
            if "least" in limits and not value >= limits["least"]:  # NaN is not
                raise UserError(f"conf: {group.name}.{key.name} is {value}; it must be at least {limits['least']}")
            if "above" in limits and not value > limits["above"]:
                raise UserError(f"conf: {group.name}.{key.name} is {value}; it must be above {limits['above']}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"conf: {group.name}.{key.name} is {value}; give a number")


def _check_evaluation(evaluation: EvaluationSettings, serving: ServingSettings) -> None:
    if evaluation.via == "vllm" and serving.kind == "none":
        raise UserError("conf: evaluation.via=vllm needs a server: add serving=vllm_cpu, vllm_cuda or endpoint")
    if not evaluation.text:
        raise UserError(f"conf: evaluation={evaluation.name} has no text of its own: name a file, evaluation.text=FILE")
    if evaluation.stride > evaluation.context:
        raise UserError(f"conf: evaluation.stride {evaluation.stride} is more than evaluation.context {evaluation.context}: tokens between two windows "
                        "would not be scored; the same number of both makes windows that do not overlap")


def _check_serving(serving: ServingSettings) -> None:
    if serving.kind == "endpoint" and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", serving.url or ""):
        raise UserError(f"conf: serving=endpoint needs serving.url=http://HOST:PORT, not {serving.url!r}")
    if re.match(r"https?://[^/]*@", serving.url or ""):
        raise UserError("conf: serving.url has a name or key before its @, which results would show: take it out; a server's key belongs in the "
                        "environment variable MXFORGE_API_KEY")
    if serving.hardware and serving.kind != "endpoint":
        raise UserError("conf: serving.hardware says what an endpoint runs on; of a server that is started here it is found out: leave it out")
    if not serving.concurrencies or min(serving.concurrencies) < 1:
        raise UserError(f"conf: serving.concurrencies is {serving.concurrencies}; it must name numbers of streams, each at least 1")
    if wrong := set(serving.goodput_ms) - set(LATENCIES):
        raise UserError(f"conf: serving.goodput_ms has {sorted(wrong)[0]!r}; choose from {', '.join(LATENCIES)}")
    if wrong := [limit for limit in serving.goodput_ms.values() if not 0 < limit < math.inf]:
        raise UserError(f"conf: serving.goodput_ms has {wrong[0]}; limits are milliseconds above 0")


def _check_recipe(recipe: RecipeSettings) -> None:
    if not recipe.groups:
        raise UserError(f"conf: recipe {recipe.name} names nothing to quantize; give it groups with roles or patterns")
    for group in recipe.groups:
        if not any((*group.roles, *group.patterns)):
            raise UserError(f"conf: recipe {recipe.name}: a group with scheme {group.scheme} names nothing to quantize; give it roles or "
                            "patterns, or take it out")
    for pattern in (pattern for group in recipe.groups for pattern in group.patterns):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"conf: recipe {recipe.name}: pattern {pattern!r} is no regular expression: {error}") from None
