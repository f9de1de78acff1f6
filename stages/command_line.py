"""What can be asked about a checkpoint or a release without converting anything.

    mxforge plan DIRECTORY | OWNER/NAME[@REVISION] | SOURCE   what a conversion would do, from headers alone
    mxforge verify DIRECTORY                                  what is wrong with a release, ours or not
    mxforge config DIRECTORY                                  its config.json, made again from its tensors

Conversions are run by snakemake; see README.md. Each command explains itself: mxforge plan --help
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path

from stages import download, inspect_format, plan
from stages.errors import UserError, exit_with_one_line
from stages.planning.view import by_role, print_plan
from stages.settings import Settings, choices, load
from stages.sources.hub import resolve
from stages.sources.listing import read_config

REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def settings_of(where: str, recipe: str, overrides: list[str], results: str) -> Settings:
    """Settings that name a local directory or, by its commit and its shards, a hub repository."""
    if recipe not in choices("recipe"):
        raise UserError(f"--recipe {recipe}: choose one of {', '.join(choices('recipe'))}")
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key == "recipe" or key.split(".")[0] in ("source", "results"):
            raise UserError(f"{override}: the source and the recipe are named by the command itself, and it writes no results")
    fixed = [f"recipe={recipe}", *overrides, f"results={results}"]
    if where and Path(where).is_dir():
        settings = load(["source=local", "source.path=/local", *fixed])
        settings.source.path = where  # after the composition: a path may hold what Hydra reads as syntax
        settings.source.name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(where).resolve().name) or "root"
        return settings
    if where in choices("source"):
        return load([f"source={where}", *fixed], resolve=resolve)
    match = REPOSITORY.fullmatch(where)
    if not match:
        raise UserError(f"{where!r}: no such directory, no source of conf/ ({', '.join(choices('source'))}), and no hub repository "
                        "(OWNER/NAME or OWNER/NAME@REVISION)")
    revision, shards = resolve(match["name"], match["revision"])
    return load(["source=hub", f"source.repository={match['name']}", f"source.revision={revision}",
                 f"source.shards=[{','.join(shards)}]", *fixed])


def show_plan(arguments: argparse.Namespace) -> None:
    """Prints the plan of a conversion; UserError for whatever could not be converted correctly."""
    with tempfile.TemporaryDirectory() as results:
        settings = settings_of(arguments.where, arguments.recipe, arguments.overrides, results)
        with redirect_stdout(io.StringIO()):
            download.fetch_metadata(settings)
        census = inspect_format.census(settings)
        made = plan.make_plan(settings, census, read_config(settings))
        if arguments.json:
            shown = {key: value for key, value in made.items() if key not in ("tensors", "draft_scales")}
            shown |= {"roles": by_role(made), "dialects": census["dialects"], "architecture": census["architecture"],
                      "anomalies": census["anomalies"], "repository": settings.source.repository, "revision": settings.source.revision}
            print(json.dumps(shown, indent=2))
            return
        if settings.source.repository:
            print(f"{settings.source.repository} at revision {settings.source.revision}")
        print(f"{settings.source.name}: {census['architecture']}, "
              + ", ".join(f"{count} tensors {name}" for name, count in census["dialects"].items()))
        print_plan(made)
        for anomaly in census["anomalies"]:
            print(f"note: {anomaly}")


def verify(arguments: argparse.Namespace) -> None:
    """Prints what is wrong with a checkpoint; UserError when something is."""
    from stages import checkup  # brings torch, which plans do without

    checkup.run(arguments.directory, arguments.source, arguments.quick, arguments.json)


def regenerate_config(arguments: argparse.Namespace) -> None:
    """Writes DIRECTORY/config.json anew."""
    from stages.checkup import configuring

    configuring.run(arguments.directory, arguments.base, arguments.dry_run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="mxforge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--version", action="version", version=f"mxforge {metadata.version('mxforge')}")
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("plan", help="what a conversion would do, from headers alone")
    command.add_argument("where", metavar="DIRECTORY|OWNER/NAME[@REVISION]|SOURCE", help="a checkpoint, a hub repository, or a file of conf/source")
    command.add_argument("--recipe", default="mxfp4_experts", help="a file of conf/recipe (default mxfp4_experts)")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example device.lane=4")
    command.set_defaults(run=show_plan)
    command = commands.add_parser("verify", help="what is wrong with a compressed-tensors MXFP4 or MXFP8 checkpoint")
    command.add_argument("directory", type=Path, help="of the release")
    command.add_argument("--source", type=Path, help="directory of the checkpoint that it was made from: weights are compared")
    command.add_argument("--quick", action="store_true", help="read samples of the codes only (all scales), hash no file")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=verify)
    command = commands.add_parser("config", help="write a release's config.json again, from its tensors")
    command.add_argument("directory", type=Path, help="of the release, whose config.json is written")
    command.add_argument("--base", type=Path, help="config.json to start from; the release's own if not given")
    command.add_argument("--dry-run", action="store_true", help="print it, write nothing")
    command.set_defaults(run=regenerate_config)
    return result


@exit_with_one_line
def main() -> None:
    """Entry point of the console script."""
    arguments, rest = parser().parse_known_args()
    if rest and (not hasattr(arguments, "overrides") or any(item.startswith("-") or "=" not in item for item in rest)):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # argparse takes settings before an option only
    arguments.run(arguments)


if __name__ == "__main__":
    main()
