"""Settings on command lines: of stages, of snakemake, and the one that a model card prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys

from stages.errors import UserError
from stages.settings.conf import choices
from stages.settings.schema import Settings, as_dict


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every stage shares: Hydra overrides as positional arguments."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    parser = argparse.ArgumentParser(prog=f"python -m {module.name}" if module else None, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="settings as in conf/, for example source=local source.path=/data/checkpoint recipe=mxfp4_experts")
    return parser


def overrides_from(config: dict) -> list[str]:
    """Snakemake's `--config` as Hydra overrides: groups by name, and `overrides=[recipe.a=1,source.path=/data]`.

    Snakemake allows no dots in its keys, hence the list. UserError names a key that is neither a group nor `results`.
    """
    groups = [field_.name for field_ in dataclasses.fields(Settings)]
    result = []
    for key, value in config.items():
        if key == "overrides":
            continue
        if key not in groups:
            raise UserError(f"--config {key}={value}: unknown; choose from {', '.join(groups)} and overrides")
        if key == "results" and not isinstance(value, str):
            raise UserError(f"--config results={value}: Snakemake reads nothing, a number, true or false there, whatever was written; give it as "
                            "'overrides=[\"results=...\"]'")
        result.append(f"{key}={value}")
    extra = config.get("overrides") or []
    if not isinstance(extra, str | list | tuple):
        raise UserError(f"--config overrides={extra}: is no list; write 'overrides=[\"recipe.layout=stacked\"]'")
    for item in extra.split() if isinstance(extra, str) else extra:
        if not isinstance(item, str) or "=" not in item:
            raise UserError(f"--config overrides: {item!r} is not KEY=VALUE; write 'overrides=[\"recipe.layout=stacked\"]'")
        result.append(item)
    return result


def _literal(value: object) -> str:
    """A value in Hydra's notation, which reads backslashes before a quote as pairs, all others as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf") else \
            "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def command_for(settings: Settings) -> str:
    """The snakemake command that makes the same release: choices of conf/, and what differs from them.

    It is published: a local source is DIRECTORY in it, whatever its path on this machine, unless conf/ names that path.
    """
    from stages.settings.composing import composed  # Hydra, which stages without this command do without

    source, of_conf = settings.source, None
    if source.name in choices("source"):  # as a local folder may be called, too
        named = composed([f"source={source.name}"]).source
        of_conf = source.name if (source.path, source.repository) == (named.path, named.repository) else None
    if source.path and not of_conf:
        source = dataclasses.replace(source, path="DIRECTORY")
    chosen = {"source": of_conf or ("local" if source.path else "hub"), "recipe": settings.recipe.name, "release": settings.release.name}
    chosen = {group: name for group, name in chosen.items() if name in choices(group)}
    plain = as_dict(composed([f"{group}={name}" for group, name in chosen.items()]))
    different = [f"{group}.{key}={_literal(value)}" for group, part in (("source", source), ("recipe", settings.recipe), ("release", settings.release))
                 for key, value in as_dict(part).items() if value != plain[group][key]]
    command = "snakemake --cores all --config " + " ".join(f"{group}={name}" for group, name in chosen.items() if (group, name) != ("release", "default"))
    if different:
        command += " " + shlex.quote(f"overrides={json.dumps(different)}")
    return command
