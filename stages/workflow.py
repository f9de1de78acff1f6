"""What the Snakefile must know before it can name its rules: settings, shards, files to watch, and what each result was made with."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from stages.errors import UserError
from stages.provenance import CONVERTING, RESULTS_FORMAT, code_of
from stages.serving.environment import marker_inputs
from stages.serving.plugin import PLUGIN, plugin_files
from stages.settings import PROJECT, Settings, as_json, gemm_sizes, load, scoring, text_file, text_path
from stages.settings.commands import overrides_from
from stages.settings.handed_over import forget
from stages.sources import shards_of
from stages.sources.hub import resolve
from stages.sources.local import directory_of, identities, local_files
from stages.stale_results import is_exchanged, of_other_settings, refuse_another_source, refuse_damaged, results_of

RESULTS = ("report.html", "card.md", "metrics.json", "settings.yaml", "verify.json", "sqnr.json", "perplexity.json", "gemm.json", "serving.json")


class Workflow:
    """Of one `--config`; UserError for what no run could begin with."""

    def __init__(self, config: Mapping):
        forget()  # what a run before has left in the environment
        self.overrides = overrides_from(dict(config))
        self.settings = settings = load(self.overrides, resolve=resolve)
        refuse_another_source(settings)
        self.shards = [name.removesuffix(".safetensors") for name in shards_of(settings.source)]
        self.files = local_files(settings.source)  # of a local source, which may change
        self.text = str(text_path(settings))
        self.server = marker_inputs(settings.serving)
        serving = settings.serving
        if settings.evaluation.via == "vllm" and serving.if_installed and serving.makes_environment and not self.server:
            raise UserError("evaluation.via=vllm needs a server: run make serve-env, or choose serving=vllm_cpu, vllm_cuda or endpoint")
        self.prompts = [str(text_file("serving.prompts", serving.prompts))] if serving.prompts and serving.kind != "none" else []
        self.watched = dict(identities([*self.files, self.text, *self.prompts]))  # by size and time: an older file in the place of another is new, too
        self.plugin = [str(PLUGIN / path) for path in plugin_files()]
        self.source, self.run = str(settings.source_directory), str(settings.run_directory)
        identities([str(path) for path in results_of(settings) if path.exists()])
        # this project's code, wherever the working directory is and whatever lies in it
        self.python = f"env PYTHONPATH={shlex.quote(os.pathsep.join(filter(None, (str(PROJECT), os.environ.get('PYTHONPATH')))))} {shlex.quote(sys.executable)} -P"
        self.arguments = shlex.join(self.overrides)
        self.converting = code_of(*CONVERTING)

    @property
    def served(self) -> bool:
        """Whether perplexity is measured through the server."""
        return self.settings.evaluation.via == "vllm"

    def params(self, result: str = "", **further: object) -> dict[str, Callable]:
        """Parameters of a rule, what its result is `made_with` and further ones: as functions, because in plain text Snakemake would read braces as
        wildcards, which regular expressions have, too."""
        return {key: lambda wildcards, value=value: value for key, value in (self.made_with(result) | further).items()}

    def made_with(self, result: str) -> dict:
        """The settings that a result was made with: it is made again when they change."""
        source, recipe, release = self.settings.source, self.settings.recipe, self.settings.release
        made_from = [directory_of(source), source.repository, source.revision]
        plan = {"recipe": as_json(recipe), "draft_scales": release.draft_scales}
        return {
            "listing.json": {"source": made_from, "format": RESULTS_FORMAT, "files": [self.watched[path] for path in self.files]},
            "plan.json": plan,
            # a refused run leaves no plan behind, so that what is made of one must name its settings, too
            "shards": {"made_from": [*plan.values(), *made_from]},
            "verify.json": {"release": as_json(release)},
            # in one list: Snakemake compares values without names
            "gemm.json": {"sizes": gemm_sizes(self.settings.evaluation)},
            "serving.json": {"serving": as_json(self.settings.serving), "prompts": [self.watched[path] for path in self.prompts]},
            "perplexity.json": {"evaluation": as_json(scoring(self.settings.evaluation)), "text": self.watched[self.text]},
        }.get(result, {})

    def unprotect(self) -> None:
        """Makes this run's shards and manifest writable again where DVC has write-protected them, as it does with all that its cache has a hard link
        to: Snakemake would refuse to make them again, and to say what it would do. Nobody writes to their bytes, since both make a new file and
        rename it; and DVC protects its cache's files once more when it next looks at them, after comparing them with their hash."""
        release = Path(self.run) / "release" / "manifest.json"
        for path in (release, *(Path(self.run) / "shards" / f"{shard}.safetensors" for shard in self.shards)):
            if path.exists() and not os.access(path, os.W_OK):
                with suppress(OSError):  # somebody else's, or on a read-only file system: Snakemake says which, if it must be made again
                    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWUSR)

    def refuse_foreign_results(self, record_of: Callable[[Path], Mapping | None], refuse_source: Callable[[Settings], None],
                               refuse_plan: Callable[[Settings], None]) -> None:
        """Stops the run if results made with other settings, or damaged ones, would be mistaken for this run's.

        record_of: Snakemake's record of how a file was made. Where it has none, or one of other parameters than the file shows, somebody ran
        a stage by hand.
        refuse_source: raises UserError for a local source that cannot be listed. refuse_plan: for settings that cannot be planned.
        """
        foreign = of_other_settings(self.settings)
        for stale in foreign:
            record, made_with = record_of(stale), self.made_with(stale.name)
            if record is None or (made_with and {repr(value) for value in made_with.values()} <= set(record["params"])):
                sys.exit(f"error: {stale} was made for other settings or from other files of the source, and not by a run that this working "
                         "directory knows of: remove it, or choose other results=")
        made_again = {"listing.json", "plan.json"} & {stale.name for stale in foreign}
        try:
            if "listing.json" in made_again and self.settings.source.path:
                refuse_source(self.settings)
            if made_again == {"plan.json"} and self._made_by_this_code("inspect.json", record_of):
                self._refuse_plan(refuse_plan)
            if not made_again and self._made_by_this_code("plan.json", record_of):
                if is_exchanged(self.settings):
                    raise UserError(f"{self.run}/release is not the release that {self.run}/verify.json is the proof of; somebody put it there: remove "
                                    f"{self.run}/release and run again, it is made anew")
                refuse_damaged(self.settings)
        except UserError as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    def _refuse_plan(self, refuse_plan: Callable[[Settings], None]) -> None:
        """UserError if these settings cannot be planned: Snakemake deletes the plan before the stage can refuse, and returning to the settings before
        would make it, and so everything, again. (So it would the source's listing.)"""
        source, run = self.settings.source_directory, self.settings.run_directory
        if all(path.is_file() for path in (source / "listing.json", source / "auxiliary" / "config.json", run / "inspect.json")):
            refuse_plan(self.settings)  # else they are made again first, and the plan of them

    def _made_by_this_code(self, name: str, record_of: Callable[[Path], Mapping | None]) -> bool:
        """Whether Snakemake would leave a result as it is as far as the code goes; so it does where it has no record of it."""
        path = self.settings.run_directory / name
        record = record_of(path)
        return path.exists() and (record is None or repr(self.converting) in (record["params"] or ()))


def stage(name: str, arguments: str = "") -> str:
    """A rule's command: the stage's output goes to its log and, marked, to the terminal. What is in braces Snakemake fills in late, so that it
    is no part of the rule's code."""
    return f"{{W.python}} -m stages.{name} {{W.arguments}} {arguments} 2>&1 | tee {{log:q}} | sed -u 's/^/{name:16} | /'"


def serving_code(*names: str) -> list[str]:
    """Files of stages/serving, for `code_of`."""
    return [f"stages/serving/{name}.py" for name in names]
