"""Settings that the Snakefile has composed, for the stages that it starts: Hydra takes half a second, which every shard would spend again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from stages.errors import UserError
from stages.settings.conf import PROJECT
from stages.settings.schema import GroupSettings, Settings, as_dict

VARIABLE = "MXFORGE_SETTINGS"  # environment variable
CODE = ("kernels", "stages")  # that results depend on, all of it
MOST_BYTES = 100_000  # that Linux takes in one variable, and some to spare


def forget() -> None:
    """Takes back what was handed over, by this process or by those before it."""
    os.environ.pop(VARIABLE, None)


def hand_over(overrides: Sequence[str], settings: Settings) -> None:
    """Leaves settings to the stages that this process starts with the same overrides, which compose others themselves, and what code they must have:
    Snakemake records the code that was there when it started as what made their results."""
    from stages.provenance import code_of

    forget()
    text = json.dumps({"project": str(PROJECT), "code": code_of(*CODE), "overrides": list(overrides), "settings": as_dict(settings)})
    if len(text.encode()) < MOST_BYTES:
        os.environ[VARIABLE] = text


def handed_over(overrides: Sequence[str]) -> Settings | None:
    """What was left for these overrides; None where nothing was. UserError where this is not the code of the process that left it."""
    try:
        found = json.loads(os.environ.get(VARIABLE, ""))
        project, code = found["project"], found["code"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    from stages.provenance import code_of

    if project != str(PROJECT):
        raise UserError(f"snakemake was started with the code in {project}, this stage would run that in {PROJECT}; use one environment for each")
    if code != code_of(*CODE):
        raise UserError(f"the code in {project} was changed while this run was going on; run the same command again: it keeps what the change leaves as it is")
    try:
        if found["overrides"] != list(overrides):
            return None
        groups = {group.name: group.default_factory for group in dataclasses.fields(Settings) if group.name != "results"}
        made = Settings(**{name: groups[name](**part) if name in groups else part for name, part in found["settings"].items()})
        made.recipe.groups = [GroupSettings(**group) for group in made.recipe.groups]
        return made if as_dict(made) == found["settings"] else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
