"""Everything that a run found out, for a person: report.html, the model card, and the few figures that DVC compares.

report.html is one file without references to anything outside it. card.md is the README.md to publish with the release:
measured figures first, the source's own card below. Neither is part of the release's identity, since figures differ in
the last digit from machine to machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2
import yaml
from omegaconf import OmegaConf

from stages.checkpoint.files import human_bytes, read_json, write_json, write_text
from stages.errors import UserError, exit_with_one_line
from stages.gemm_summary import worst_by_path
from stages.planning.record import read_plan
from stages.planning.view import by_role, where_it_runs
from stages.plots import expert_plot, layer_plot
from stages.receipts import read_receipts, shards_sha256, zeros_note
from stages.records import Plan, Receipt
from stages.release import measured_release
from stages.schemes import SCHEMES
from stages.stale_results import of_other_settings
from stages.serving.commands import (
    DRAFT_FAULTS, Used, chat_flags, client_example, conditions, count_range, generated, has_draft_faults, serve_commands, served_by, thinks,
)
from stages.serving.plots import serving_plot
from stages.settings import PROJECT, Settings, load, stage_parser
from stages.settings.commands import command_for

PACKAGES = ("torch", "numpy", "numba", "triton", "safetensors", "transformers", "snakemake", "hydra-core", "dvc")
STAGES = {"verify.json": "verify_release", "sqnr.json": "evaluate", "perplexity.json": "evaluate", "gemm.json": "validate_gemm",
          "serving.json": "serve_bench"}


def versions() -> dict[str, str]:
    """Installed versions of the packages that produce bytes or figures."""
    found = {"python": platform.python_version()}
    found["mxforge"] = _own_version()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _own_version() -> str:
    """The version, and the commit where this is a checkout, and whether files differ from it."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=12", "--dirty= with uncommitted changes", "--exclude=*"]
    try:
        described = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return metadata.version("mxforge")
    commit = described.stdout.strip() if (PROJECT / ".git").exists() else ""
    return metadata.version("mxforge") + (f" (commit {commit})" if commit else "")


def role_rows(plan: Plan) -> list[dict]:
    """What happened to each role: decision, tensors, bytes before and after."""
    words = {"drop": "folded into the block scales, or unread", "pass through": "unchanged", "keep": "kept in its own FP8"}
    rows = [{**row, "role": row["role"].replace("_", " "), "what": words.get(row["decision"], f"quantized to {row['decision']}")}
            for row in by_role(plan)]
    return sorted(rows, key=lambda row: -row["before"])


def _results(settings: Settings, receipts: dict[str, Receipt]) -> dict[str, dict]:
    """The results that are proof or figures, by name; UserError for one that is not of this release, and unless this release passed."""
    found = {name: read_json(settings.run_directory / name, stage) for name, stage in STAGES.items()}
    release, shards = measured_release(settings), shards_sha256(receipts)
    for name, result in found.items():
        of_this = result.get("shards_sha256") == shards if name == "gemm.json" else result.get("manifest_sha256") == release
        if not of_this and not (name == "serving.json" and "not_measured" in result):
            raise UserError(f"{settings.run_directory / name}: was measured on another release than the one in "
                            f"{settings.run_directory / 'release'}; run {STAGES[name]} again")
    if found["verify.json"].get("passed") is not True:
        raise UserError(f"{settings.run_directory / 'verify.json'}: does not say that the release passed; run verify_release again")
    return found


def facts(settings: Settings) -> dict:
    """Everything that the templates show, read from the run's results; UserError for one of other settings or of another release."""
    if stale := [path for path in of_other_settings(settings) if path.name in ("verify.json", "perplexity.json")]:
        raise UserError(f"{stale[0]}: was made for other settings than these; run {STAGES[stale[0].name]} again")
    run_directory = settings.run_directory
    plan = read_plan(settings)
    receipts = read_receipts(settings, plan)
    results = _results(settings, receipts)
    serving = results["serving.json"]
    seconds = sum(receipt["seconds"] for receipt in receipts.values())
    source_bytes = sum(receipt["source"]["bytes"] for receipt in receipts.values())
    release_bytes = sum(path.stat().st_size for path in (run_directory / "release").rglob("*") if path.is_file())
    config = read_json(run_directory / "release" / "config.json", "assemble_release")
    thoughts = thinks(run_directory / "release")
    zeros = [name for receipt in receipts.values() for name in receipt["zeros"]]
    notes = [*read_json(run_directory / "inspect.json", "inspect_format")["anomalies"], *plan["notes"], *([zeros_note(zeros)] if zeros else [])]
    schemes = sorted({entry["scheme"] for entry in plan["tensors"].values() if entry["scheme"]})
    return {
        "schemes": schemes, "formats": " and ".join(SCHEMES[scheme].LABEL for scheme in schemes),
        "commands": serve_commands(plan, config, serving.get("engine", {})), "client": client_example(config, thoughts),
        "chat_flags": chat_flags(plan, thoughts),
        "engine": served_by(serving["engine"]) if serving.get("engine") else None, "served": Used(serving.get("engine", {})).command,
        **({"conditions": conditions(serving), "generated": generated(serving)} if "levels" in serving else {}),
        "origin": settings.source.repository or settings.source.origin,
        "experts": any(entry["role"] == "routed_experts" for entry in plan["tensors"].values()),
        "settings": settings, "plan": plan, "notes": notes, "where_it_runs": where_it_runs(plan), "roles": role_rows(plan),
        "gemm": worst_by_path(results["gemm.json"]),
        "verify": results["verify.json"], "sqnr": results["sqnr.json"], "quality": results["perplexity.json"], "serving": serving,
        "scored_on": scored_on(results["perplexity.json"]),
        "receipts": receipts, "seconds": seconds, "source_bytes": source_bytes, "release_bytes": release_bytes,
        "rate": source_bytes / seconds if seconds else 0.0,
        "tensor_ratio": plan["release_tensor_bytes"] / plan["source_tensor_bytes"],
        "versions": versions(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "source_card": source_card(settings), "source_matter": source_matter(settings),
        "command": command_for(settings),
    }


def scored_on(quality: dict) -> str | None:
    """What a perplexity is of: text, windows, and what computed it; None where none was measured."""
    if "release" not in quality:
        return None
    text, asked = quality["text"], quality["settings"]
    context, stride = asked["context"], asked["stride"]
    overlap = "without overlap" if stride == context else f"{stride} of them new in each"
    by = served_by(quality["release"]["engine"]) if asked["via"] == "vllm" else f"in process in {asked['dtype']}"
    return (f"{quality['release']['tokens']:,} scored tokens of {text['name']} (sha256 {text['sha256'][:12]}), "
            f"{'a BOS token before its first' if text['begins_with_bos'] else 'no BOS token before it'}; windows of {context} tokens, {overlap}; {by}")


FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.S)  # of a hub's card: YAML
KEPT_MATTER = ("license", "license_name", "license_link", "language", "pipeline_tag")  # holds of a release, too


def _source_readme(settings: Settings) -> str | None:
    path = settings.source_directory / "auxiliary" / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def source_card(settings: Settings) -> str | None:
    """The source's README.md without its front matter, which would read as text in the middle of a card."""
    text = _source_readme(settings)
    return text and FRONT_MATTER.sub("", text)


def source_matter(settings: Settings) -> str:
    """YAML lines of the source's front matter that hold of a release: above all its licence, which source.license overrides.

    Its values are read as the words that they are: YAML would make false of `no`, Norwegian.
    """
    found = FRONT_MATTER.match(_source_readme(settings) or "")
    try:
        stated = yaml.load(found[1], Loader=yaml.BaseLoader) if found else None
    except yaml.YAMLError:
        stated = None
    kept = {key: stated[key] for key in KEPT_MATTER if _says(stated.get(key))} if isinstance(stated, dict) else {}
    if settings.source.license:
        kept = {key: value for key, value in kept.items() if not key.startswith("license")} | {"license": settings.source.license}
    return yaml.safe_dump(kept, sort_keys=False) if kept else ""


def _says(value: object) -> bool:
    """Whether it is a word or a list of words, as the values of KEPT_MATTER are."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word.lower() not in ("", "~", "null") for word in words)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                                     autoescape=lambda name: bool(name) and name.endswith(".html.j2"))
    environment.filters["bytes"] = human_bytes
    environment.globals |= {"draft_faults": DRAFT_FAULTS, "served_by": served_by, "count_range": count_range, "has_draft_faults": has_draft_faults}
    return environment


def metrics(found: dict) -> dict:
    """The figures that `dvc metrics show` and `dvc metrics diff` compare between revisions."""
    quality = found["quality"]
    return {
        "sqnr_db": found["sqnr"]["overall_db"], "worst_matrix_sqnr_db": found["sqnr"]["worst_matrix_db"],
        "release_tensor_bytes": found["plan"]["release_tensor_bytes"],
        "source_tensor_bytes": found["plan"]["source_tensor_bytes"],
        **{f"{name}_perplexity": quality[name]["perplexity"] for name in ("source", "release") if name in quality},
        **({"mean_kl_nats": quality["divergence"]["mean_kl_nats"]} if "divergence" in quality else {}),
        **({key: quality["paired"][key] for key in ("perplexity_ratio", "same_top_token")} if "paired" in quality else {}),
        **{f"tokens_per_second_{level['streams']}_streams": level["tokens_per_second"]["mean"]
           for level in found["serving"].get("levels", [])},
    }


def run(settings: Settings) -> None:
    """Writes report.html, card.md, metrics.json and settings.yaml, the resolved settings of the run."""
    try:
        found = facts(settings)
        _write(settings, found)
    except (AttributeError, KeyError, TypeError, ValueError, jinja2.UndefinedError) as error:
        raise UserError(f"{settings.run_directory}: one of its results is damaged ({type(error).__name__}: {str(error)[:100]}); remove sqnr.json, "
                        "perplexity.json, gemm.json and serving.json there and run again") from None
    print(f"release: {settings.run_directory / 'release'}\nreport:  {settings.run_directory / 'report.html'}\n"
          f"card:    {settings.run_directory / 'card.md'}")


def _write(settings: Settings, found: dict) -> None:
    environment = _environment()
    page = environment.get_template("report.html.j2").render(
        **found, layer_plot=layer_plot(found["sqnr"]), expert_plot=expert_plot(found["sqnr"]),
        serving_plot=serving_plot(found["serving"], settings.run_directory / "serving") if "levels" in found["serving"] else "")
    write_text(settings.run_directory / "report.html", page)
    write_text(settings.run_directory / "card.md", environment.get_template("card.md.j2").render(**found))
    write_json(settings.run_directory / "metrics.json", metrics(found))
    write_text(settings.run_directory / "settings.yaml", OmegaConf.to_yaml(OmegaConf.structured(settings)))


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
