"""`mxforge`: the questions that are asked outside of a run, answered by the functions of the stages.

    mxforge plan DIRECTORY | OWNER/NAME[@REVISION]      what a conversion would do, from headers alone
    mxforge verify DIRECTORY                            what is wrong with a release, ours or not
    mxforge config DIRECTORY                            its config.json, made again from its tensors

Conversions are run by snakemake; see the README.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from stages import download, inspect_format, plan
from stages.checkpoint.files import read_json, render_json, sha256_file, write_text
from stages.dialects.roles import hidden_layers, role_of
from stages.errors import UserError, exit_with_one_line
from stages.plan import coverage, release_config
from stages.schemes import compressed_tensors, mxfp4, vllm_rules
from stages.settings import load

REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def source_overrides(where: str) -> list[str]:
    """Settings that name a local directory or, by its commit and its shards, a hub repository."""
    if Path(where).is_dir():
        return ["source=local", f"source.path='{where}'"]
    match = REPOSITORY.fullmatch(where)
    if not match:
        raise UserError(f"{where}: no such directory, and no hub repository (OWNER/NAME or OWNER/NAME@REVISION)")
    revision, shards = download.resolve(match["name"], match["revision"])
    print(f"{match['name']} at revision {revision}", file=sys.stderr)
    return ["source=hub", f"source.repository={match['name']}", f"source.revision={revision}",
            f"source.shards=[{','.join(shards)}]"]


def show_plan(arguments: argparse.Namespace) -> None:
    """Prints the plan of a conversion; UserError for whatever could not be converted rightly."""
    with tempfile.TemporaryDirectory() as results:
        settings = load([f"results={results}", f"recipe={arguments.recipe}", *source_overrides(arguments.where), *arguments.overrides])
        with redirect_stdout(sys.stderr):
            download.fetch_metadata(settings)
        census = inspect_format.census(settings)
        made = plan.make_plan(settings, census, inspect_format.read_config(settings))
        if arguments.json:
            shown = {key: value for key, value in made.items() if key not in ("tensors", "draft_scales")}
            shown |= {"roles": plan.by_role(made), "dialects": census["dialects"], "architecture": census["architecture"],
                      "anomalies": census["anomalies"], "repository": settings.source.repository, "revision": settings.source.revision}
            print(json.dumps(shown, indent=2))
            return
        print(f"{settings.source.name}: {census['architecture']}, "
              + ", ".join(f"{count} tensors {name}" for name, count in census["dialects"].items()))
        plan.print_plan(made)
        for anomaly in census["anomalies"]:
            print(f"note: {anomaly}")


def verify(arguments: argparse.Namespace) -> None:
    """Prints what is wrong with a checkpoint; UserError when something is."""
    from stages import verify_checkpoint  # brings torch, which plans do without

    verify_checkpoint.run(arguments.directory, arguments.source, arguments.quick, arguments.json)


def regenerate_config(arguments: argparse.Namespace) -> None:
    """Writes DIRECTORY/config.json with the quantization_config that fits the tensors, everything else as it was."""
    from stages.verify_checkpoint import Checkup

    directory = arguments.directory
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name a release")
    path = directory / "config.json"
    config = read_json(arguments.base or path, "whatever made the checkpoint")
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in vllm_rules.ARCHITECTURES:
        raise UserError(f"{path}: runtime names of {architecture} are not known, only those of {' and '.join(vllm_rules.ARCHITECTURES)}")
    layers = hidden_layers(config)
    checkup = Checkup(directory, section={})
    tensors = {}
    with checkup.opened():
        for fault in (*checkup.containers(), *checkup.pairs(), *checkup.experts()):
            raise UserError(f"{fault}; mend the weights first")
        for module, (stored, info, _) in checkup.modules().items():
            name = f"{module}.weight"
            if stored not in ("mxfp4", "plain"):
                raise UserError(f"{checkup.where[name]}: {name} is {stored}; config writes MXFP4 groups only")
            tensors[name] = {"role": role_of(name, layers), "scheme": mxfp4.NAME if stored == "mxfp4" else None,
                             "decision": "quantize" if stored == "mxfp4" else "pass through", "shape": list(info.shape)}
    if not any(entry["scheme"] for entry in tensors.values()):
        raise UserError(f"{directory}: holds no MXFP4 weight; nothing to configure")
    section = compressed_tensors.quantization_config(tensors)
    modules, faults = coverage(tensors, section, layers)
    if faults:
        raise UserError(f"{directory}: vLLM could not serve these tensors under any config of ours: {faults[0]}")
    text = render_json(release_config(config, section))
    if path.exists() and path.read_text(encoding="utf-8") == text:
        print(f"{path}: is right as it is ({modules} modules)")
        return
    if arguments.dry_run:
        print(text, end="")
        return
    write_text(path, text)
    manifest = directory / "manifest.json"
    if manifest.exists():
        content = read_json(manifest, "assemble_release")
        content["files"]["config.json"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_text(manifest, render_json(content))
    print(f"{path}: written; its groups claim {modules} modules rightly" + ("; manifest.json follows it" if manifest.exists() else ""))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="mxforge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("plan", help="what a conversion would do, from headers alone")
    command.add_argument("where", metavar="DIRECTORY|OWNER/NAME[@REVISION]")
    command.add_argument("--recipe", default="mxfp4_experts", help="a file of conf/recipe")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example device.lane=4")
    command.set_defaults(run=show_plan)
    command = commands.add_parser("verify", help="what is wrong with a compressed-tensors MXFP4 or MXFP8 checkpoint")
    command.add_argument("directory", type=Path)
    command.add_argument("--source", type=Path, help="directory of the checkpoint that it was made from: weights are compared")
    command.add_argument("--quick", action="store_true", help="read samples only: no file is hashed")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=verify)
    command = commands.add_parser("config", help="write a release's config.json again, from its tensors")
    command.add_argument("directory", type=Path)
    command.add_argument("--base", type=Path, help="config.json to start from; the release's own if not given")
    command.add_argument("--dry-run", action="store_true", help="print it, write nothing")
    command.set_defaults(run=regenerate_config)
    return result


@exit_with_one_line
def main() -> None:
    """Entry point of the console script."""
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
