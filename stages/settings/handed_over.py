"""Settings that the Snakefile has composed, for the stages that it starts: Hydra takes half a second, which every shard would spend again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

from stages.settings.conf import PROJECT
from stages.settings.schema import GroupSettings, Settings, as_dict

VARIABLE = "MXFORGE_SETTINGS"  # environment variable
MOST_BYTES = 100_000  # that Linux takes in one variable, and some to spare


def forget() -> None:
    """Takes back what was handed over, by this process or by those before it."""
    os.environ.pop(VARIABLE, None)


def hand_over(overrides: Sequence[str], settings: Settings) -> None:
    """Leaves settings to the stages that this process starts with the same overrides; they compose others themselves."""
    forget()
    text = json.dumps({"project": str(PROJECT), "overrides": list(overrides), "settings": as_dict(settings)})
    if len(text.encode()) < MOST_BYTES:
        os.environ[VARIABLE] = text


def handed_over(overrides: Sequence[str]) -> Settings | None:
    """What was left for these overrides; None where nothing was, or by another version of mxforge."""
    try:
        found = json.loads(os.environ.get(VARIABLE, ""))
        if (found["project"], found["overrides"]) != (str(PROJECT), list(overrides)):
            return None
        groups = {group.name: group.default_factory for group in dataclasses.fields(Settings) if group.name != "results"}
        made = Settings(**{name: groups[name](**part) if name in groups else part for name, part in found["settings"].items()})
        made.recipe.groups = [GroupSettings(**group) for group in made.recipe.groups]
        return made if as_dict(made) == found["settings"] else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
