"""The schema of conf/ and the one `load()` that the Snakefile, the stages and the tests use.

Hydra composes the YAML files, nothing else: no launcher, no run directories. The dataclasses below are the truth about
which keys exist, what they mean and what their defaults are; a test fails when a YAML file and this schema drift apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kernels.mxfp4 import RULES
from stages.checkpoint.files import read_json, write_json
from stages.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
CONF = PROJECT / "conf"
CONVERTING = (  # the code on which a shard's bytes depend; dvc.yaml names it, too
    *(f"kernels/{name}.py" for name in ("arrays", "formats", "fp8", "mxfp8", "panels")), "kernels/mxfp4", "stages/checkpoint", "stages/conversion",
    "stages/dialects", "stages/planning", "stages/schemes", "stages/sources", "stages/download.py", "stages/inspect_format.py", "stages/plan.py", "stages/quantize_experts.py", "stages/receipts.py")
RESULTS_FORMAT = 7  # of listing.json, inspect.json, plan.json and receipts; raised with their meaning, so that older results are made again


@dataclass
class SourceSettings:
    """Where a checkpoint comes from. A row of data: a local directory, or a hub repository at a pinned revision."""

    name: str | None = None  # names results/<name>/; a local directory without one takes its own name
    path: str | None = None  # a local checkpoint directory; relative paths start at the working directory
    repository: str | None = None  # owner/name on the hub
    revision: str | None = None  # a commit hash: what is converted must be nameable afterwards; null: that of the main branch
    # when the workflow first runs, which it records in results/<name>/source/revision.json and then keeps to
    shards: list[str] = field(default_factory=list)  # shard file names of a hub source with a revision
    license: str | None = None  # licence of the weights, for the model card
    origin: str | None = None  # OWNER/NAME of the hub repository that a local directory is a copy of, for the model card


@dataclass
class GroupSettings:
    """What one scheme applies to: every tensor whose role is listed or whose name matches a pattern."""

    scheme: str = "mxfp4"  # mxfp4 | mxfp8
    roles: list[str] = field(default_factory=list)  # routed_experts, shared_experts, attention, dense_mlp, ...; linear: all of
    # these that the model has; rest: those of them that the recipe names nowhere else
    patterns: list[str] = field(default_factory=list)  # regular expressions, matched against whole tensor names


@dataclass
class RecipeSettings:
    """What is quantized, and how. Everything that no group names passes through bit-identical."""

    name: str = "???"
    exponent_rule: str = "mse"  # mse | ocp_floor | even | rceil: see kernels/mxfp4
    layout: str = "per_expert"  # per_expert (one pair of tensors per expert) | stacked (3D, as in the source)
    groups: list[GroupSettings] = field(default_factory=list)


@dataclass
class DeviceSettings:
    """Where the numerics run and how much may run at once."""

    name: str = "???"
    backend: str = "cpu"  # cpu (numba) | cuda (Triton) | reference (float64 torch, slow): the bytes are the same
    lane: int = 2  # source shards on disk and in work at any time
    memory_mb: int = 1000  # resident memory that one quantize job may use


@dataclass
class EvaluationSettings:
    """How the release is measured."""

    name: str = "???"
    text: str = "???"  # UTF-8 file; relative paths start at the project
    context: int = 256  # tokens per window
    stride: int = 128  # new tokens scored per window; the rest of the window is their context
    maximum_tokens: int | None = None  # score at most this many tokens of the text
    via: str = "process"  # process (transformers, in this process) | vllm (prompt log-probabilities from the server)
    dtype: str = "float32"  # float32 | bfloat16: in which the model computes in process
    memory_gb: float = 16.0  # models that would need more in process are not measured in process, and the report says so
    gemm_tensors: int = 4  # quantized modules that validate_gemm samples from each shard
    gemm_tokens: int = 64  # rows of the activations that it multiplies them with


@dataclass
class ServingSettings:
    """Which server runs the release, and how it is measured. See docs/serving.md."""

    name: str = "none"
    kind: str = "none"  # none | vllm (started here, on loopback) | endpoint (a server that runs already)
    model: str = "release"  # the name under which the server offers the release
    url: str | None = None  # of an endpoint, http://HOST:PORT
    environment: str | None = None  # virtual environment with vLLM; null: the `vllm` on the PATH
    makes_environment: bool = False  # the environment is this project's own, for a CPU: snakemake makes it, and anew when its parts change
    if_installed: bool = False  # leave serving out, and say so, where the environment has not been made
    drafts: bool = True  # let the release's MTP layers draft tokens
    flags: list[str] = field(default_factory=list)  # further flags of `vllm serve`
    variables: dict[str, str] = field(default_factory=dict)  # environment variables of the server
    startup_seconds: float = 600.0  # until the first completion must have come back
    concurrencies: list[int] = field(default_factory=lambda: [8, 32, 64])  # numbers of streams, measured one after the other
    output_tokens: int = 512  # of each completion (ignore_eos)
    prompt_tokens: int = 32  # random token ids, which no prefix cache can have seen
    windows: int = 1  # measured one after the other at each level
    window_seconds: float = 30.0
    ramp_seconds: float = 10.0  # between the first token of the last stream and the first window
    timeout_seconds: float = 600.0  # for one answer, and for all streams to have begun
    goodput_ms: dict[str, float] = field(default_factory=dict)  # limits of ttft, tpot, end_to_end that a good request keeps
    seed: int = 0  # of the prompts


@dataclass
class ReleaseSettings:
    """What goes into the release beside the weights."""

    name: str = "default"
    minimum_sqnr_db: float = 15.0  # a tensor below this was damaged, not quantized: verify refuses the release
    draft_scales: bool = False  # add the 6 inert KV-cache scalars per MTP layer that vLLM's draft loader asks for


@dataclass
class Settings:
    """Everything that a run depends on, composed from conf/."""

    source: SourceSettings = field(default_factory=SourceSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    device: DeviceSettings = field(default_factory=DeviceSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    release: ReleaseSettings = field(default_factory=ReleaseSettings)
    results: str = "results"

    @property
    def source_directory(self) -> Path:
        """Metadata of the source: listing, headers and auxiliary files."""
        return Path(self.results) / str(self.source.name) / "source"

    @property
    def shard_directory(self) -> Path:
        """Source shards while they are needed; of one run, so that two recipes never wait for or delete each other's."""
        return self.run_directory / "source"

    @property
    def run_directory(self) -> Path:
        """Everything that one recipe produced from one source."""
        return Path(self.results) / str(self.source.name) / self.recipe.name


SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
OPEN_DICTIONARY = re.compile(r"\+{0,2}serving\.(goodput_ms|variables)\b")  # whose keys the user names, for which Hydra wants `++`
ConfigStore.instance().store(name="schema", node=Settings)  # the first entry of conf/config.yaml's defaults list


def choices(group: str) -> list[str]:
    """Names of the alternatives that conf/ offers for one settings group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _keys() -> list[str]:
    """All settings as dotted keys."""
    tree = OmegaConf.structured(Settings)
    keys = [f"{group}.{key}" for group in tree if group != "results" for key in tree[group]]
    return ["results", *keys, *(f"recipe.groups.{field_.name}" for field_ in dataclasses.fields(GroupSettings))]


def _one_line(error: Exception) -> str:
    text = str(error) + (f"\n{error.__cause__}" if error.__cause__ else "")
    missing = re.search(r"Could not find '(\w+)/([^']*)'", text)
    if missing:
        group, name = missing.groups()
        return f"conf: there is no {group} {name!r}; choose one of {', '.join(choices(group))}"
    override = re.search(r"Could not override '([\w.]+)'", text)
    unknown = re.search(r"Key '(\w+)' (?:is )?not in", text)
    if override or unknown:
        key = override.group(1) if override else unknown.group(1)
        if override and unknown and unknown.group(1) not in key.split("."):
            key = f"{key}.{unknown.group(1)}"
        keys = _keys()
        by_name = {known.rpartition(".")[2]: known for known in reversed(keys)}  # whatever group it was looked for in
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.8) or [
            by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.7)]
        return f"conf: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                       "; stages/settings.py lists them all")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keep = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "Set the", "Error merging"))]
    if "LexerNoViableAlt" in text or "mismatched input" in text or "Error parsing override" in text:
        found = re.search(r"Error parsing override '(.*)'", text)
        shown = re.sub(r"^\w+Exception: ", "", text.splitlines()[0])
        return (f"conf: cannot read the setting {found.group(1) if found else shown!r}; put values with spaces, "
                "braces, quotes, ~ or other than ASCII letters in quotes, as in \"source.path='/my data/checkpoint'\"")
    key = re.search(r"full_key: (\S+)", text)
    return "conf: " + (f"{key.group(1)}: " if key else "") + " ".join(keep[:2])


def _compose(overrides) -> Settings:
    """conf/ with overrides, not yet checked beyond keys and types."""
    overrides = ["++" + item.lstrip("+") if OPEN_DICTIONARY.match(item) else item for item in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="mxforge"):
            composed = compose(config_name="config", overrides=overrides)
        # merged once more because Hydra's `+key=value` may add keys that the schema does not have
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.to_container(composed)))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        groups = ", ".join(field_.name for field_ in dataclasses.fields(Settings) if field_.name != "results")
        raise UserError(f"conf: each of {groups} is chosen by the name of a file in conf/, not by null, a number or true and false: "
                        f"got {' '.join(overrides)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"conf: {f'{mark.name}, line {mark.line + 1}' if mark else 'a file'}: is no YAML: {getattr(error, 'problem', None) or error}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from None


def _literal(value: object) -> str:
    """A value in Hydra's notation."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf") else \
            "'" + value.replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def command_for(settings: Settings) -> str:
    """The snakemake command that makes the same release: choices of conf/, and what differs from them.

    It is published: a local source is DIRECTORY in it, whatever its path on this machine.
    """
    source = settings.source
    if source.path and source.name not in choices("source"):
        source = dataclasses.replace(source, path="DIRECTORY")
    chosen = {"source": source.name if source.name in choices("source") else "local" if source.path else "hub",
              "recipe": settings.recipe.name, "release": settings.release.name}
    chosen = {group: name for group, name in chosen.items() if name in choices(group)}
    plain = as_dict(_compose([f"{group}={name}" for group, name in chosen.items()]))
    different = [f"{group}.{key}={_literal(value)}" for group, part in (("source", source), ("recipe", settings.recipe), ("release", settings.release))
                 for key, value in as_dict(part).items() if value != plain[group][key]]
    command = "snakemake --cores all --config " + " ".join(f"{group}={name}" for group, name in chosen.items() if (group, name) != ("release", "default"))
    if different:
        command += " " + shlex.quote(f"overrides={json.dumps(different)}")
    return command


def load(overrides: list[str] | tuple[str, ...] = (), ask: bool = False) -> Settings:
    """Composes conf/ with Hydra overrides (`recipe=...`, `source.path=...`) and checks it against the schema.

    ask: let the hub say, once, at which revision a source stands that names none.
    Raises UserError with one line for a misspelt key, an unknown choice or a value of the wrong type.
    """
    settings = _compose(overrides)
    _check(settings)
    if settings.source.repository and not settings.source.revision:
        _pin(settings, ask)
    return settings


def _pin(settings: Settings, ask: bool) -> None:
    """Fills in the revision and the shards that a hub source without them was first converted at."""
    source, record = settings.source, settings.source_directory / "revision.json"
    found = read_json(record, "snakemake") if record.exists() else None
    if found is None or found.get("repository") != source.repository or not found.get("revision") or not found.get("shards"):
        if not ask:
            raise UserError(f"{record} is missing: {source.repository} was given without a revision, which snakemake looks up and records when "
                            "it starts; or set source.revision and source.shards")
        from stages.sources.hub import resolve

        revision, shards = resolve(source.repository, None)
        found = {"repository": source.repository, "revision": revision, "shards": shards}
        write_json(record, found)
    source.revision, source.shards = found["revision"], found["shards"]


def _check(settings: Settings) -> None:
    source, recipe = settings.source, settings.recipe
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
    for key, value in (("source.path", source.path), ("results", settings.results), ("evaluation.text", settings.evaluation.text)):
        if re.search(r"[{}\n*?]", value or ""):
            raise UserError(f"conf: {key}={value!r}: Snakemake reads braces, * and ? as wildcards; use a link without them")
    for key, value in (("source.name", source.name), ("recipe.name", recipe.name)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or (key, value) == ("recipe.name", "source"):
            raise UserError(f"conf: {key} {value!r} (of a local source the folder's name, if it has none) names a directory of results: set {key} to "
                            "another word than 'source', of letters, digits, '.', '_' and '-'")
    for key, value, allowed in (
        ("recipe.exponent_rule", recipe.exponent_rule, RULES),
        ("recipe.layout", recipe.layout, ("per_expert", "stacked")),
        ("device.backend", settings.device.backend, ("cpu", "cuda", "reference")),
        ("evaluation.dtype", settings.evaluation.dtype, ("float32", "bfloat16")),
        ("evaluation.via", settings.evaluation.via, ("process", "vllm")),
        ("serving.kind", settings.serving.kind, ("none", "vllm", "endpoint")),
    ):
        if value not in allowed:
            raise UserError(f"conf: {key} is {value!r}; choose one of {', '.join(allowed)}")
    for key, least in (("device.lane", 1), ("device.memory_mb", 1), ("evaluation.context", 2), ("evaluation.stride", 1),
                       ("evaluation.maximum_tokens", 2), ("evaluation.gemm_tensors", 1), ("evaluation.gemm_tokens", 1),
                       ("evaluation.memory_gb", 0), ("release.minimum_sqnr_db", 0), ("serving.windows", 1), ("serving.output_tokens", 1),
                       ("serving.prompt_tokens", 1), ("serving.ramp_seconds", 0)):
        group, name = key.split(".")
        value = getattr(getattr(settings, group), name)
        if value is not None and not value >= least:  # NaN is not
            raise UserError(f"conf: {key} is {value}; it must be at least {least}")
    results = Path(settings.results)
    if not settings.results or settings.results.startswith("-") or ((results.exists() or results.is_symlink()) and not results.is_dir()):
        raise UserError(f"conf: results is {settings.results or 'empty'}: name the directory that everything is written to, made where it is missing")
    if settings.serving.kind == "endpoint" and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", settings.serving.url or ""):
        raise UserError(f"conf: serving=endpoint needs serving.url=http://HOST:PORT, not {settings.serving.url!r}")
    serving = settings.serving
    if not serving.concurrencies or min(serving.concurrencies) < 1:
        raise UserError(f"conf: serving.concurrencies is {serving.concurrencies}; it must name numbers of streams, each at least 1")
    if not serving.window_seconds > 0:
        raise UserError(f"conf: serving.window_seconds is {serving.window_seconds}; it must be above 0")
    if wrong := set(serving.goodput_ms) - {"ttft", "tpot", "end_to_end"}:
        raise UserError(f"conf: serving.goodput_ms has {sorted(wrong)[0]!r}; choose from ttft, tpot, end_to_end")
    if wrong := [limit for limit in serving.goodput_ms.values() if not limit > 0]:
        raise UserError(f"conf: serving.goodput_ms has {wrong[0]}; limits are milliseconds above 0")
    if settings.evaluation.via == "vllm" and settings.serving.kind == "none":
        raise UserError("conf: evaluation.via=vllm needs a server: add serving=vllm_cpu, vllm_cuda or endpoint")
    if settings.evaluation.stride >= settings.evaluation.context:
        raise UserError(f"conf: evaluation.stride {settings.evaluation.stride} must be below evaluation.context "
                        f"{settings.evaluation.context}: a window's first token has nothing to be predicted from")
    if not recipe.groups:
        raise UserError(f"conf: recipe {recipe.name} names nothing to quantize; give it groups with roles or patterns")
    for group in recipe.groups:
        for pattern in group.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"conf: recipe {recipe.name}: pattern {pattern!r} is no regular expression: "
                                f"{error}") from None


def code_of(*parts: str) -> str:
    """sha256 of files of this project, and of all Python files in its directories: a rule's parameter, so that what other code made is
    made again."""
    digest = hashlib.sha256()
    for part in parts:
        path = PROJECT / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(PROJECT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def as_dict(part: object) -> dict:
    """A settings part as plain data, for JSON results, receipts and Snakemake's `params`."""
    return dataclasses.asdict(part)


def as_json(part: object) -> str:
    """Canonical JSON of a settings part, or of what was picked from one."""
    return json.dumps(part if isinstance(part, dict) else as_dict(part), sort_keys=True, separators=(",", ":"))


def scoring(evaluation: EvaluationSettings) -> dict:
    """What a perplexity depends on: all of the evaluation's settings but those of the GEMM checks."""
    return {key: value for key, value in as_dict(evaluation).items() if not key.startswith("gemm")}


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every stage shares: Hydra overrides as positional arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="settings as in conf/, for example source=step37_tiny recipe=mxfp4_experts "
                             "source.path=/data/checkpoint")
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
        result.append(f"{key}={value}")
    extra = config.get("overrides") or []
    if not isinstance(extra, str | list | tuple):
        raise UserError(f"--config overrides={extra}: is no list; write 'overrides=[\"recipe.layout=stacked\"]'")
    for item in extra.split() if isinstance(extra, str) else extra:
        if not isinstance(item, str) or "=" not in item:
            raise UserError(f"--config overrides: {item!r} is not KEY=VALUE; write 'overrides=[\"recipe.layout=stacked\"]'")
        result.append(item)
    return result


def shards_of(source: SourceSettings) -> list[str]:
    """Shard file names of a source: pinned for a hub repository, read off the directory for a local one."""
    if source.repository:
        return [_shard_name(name, source.repository) for name in source.shards]
    directory = Path(source.path)
    names = sorted(path.name for path in directory.glob("*.safetensors")) if directory.is_dir() else []
    if not names:
        raise UserError(f"source.path={source.path}: {'no *.safetensors file there' if directory.is_dir() else 'no such directory'}; name a checkpoint "
                        "directory")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory / missing[0]}: is a link to a file that is missing, or no file; complete the checkpoint")
    return [_shard_name(name, f"source.path={source.path}") for name in names]


def _shard_name(name: str, where: str) -> str:
    """The name, if it is one that a publisher would give: it becomes part of command lines and of Snakemake's patterns."""
    if not SHARD_NAME.fullmatch(name):
        raise UserError(f"{where}: has a shard named {name!r}; only letters, digits, '.', '_' and '-' are accepted, rename it")
    return name


def text_path(settings: Settings) -> Path:
    """evaluation.text, looked up from the working directory and then from the project; UserError when there is none."""
    for path in (Path(settings.evaluation.text), PROJECT / settings.evaluation.text):
        if path.is_file():
            return path
    raise UserError(f"evaluation.text={settings.evaluation.text}: no such file; name a UTF-8 text")
