"""Which settings there are, what they mean, their defaults and their limits.

conf/ holds choices of these, a file each; a test fails when a YAML file and this schema drift apart.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from kernels.mxfp4 import RULES

FEWEST_TOKENS = 16  # of a text or a window: fewer measure nothing, and draft layers look several ahead


def limited(default: object, **limits):
    """A setting with limits, which stages/settings/checks.py looks at: `least` or `above` (a number) or `allowed` (the values that there are)."""
    return field(default=default, metadata=limits)


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
    # these that the model has; rest: those that no other role or pattern of the recipe names
    patterns: list[str] = field(default_factory=list)  # regular expressions, matched against whole tensor names


@dataclass
class RecipeSettings:
    """What is quantized, and how. Everything that no group names passes through bit-identical."""

    name: str = "???"
    exponent_rule: str = limited("mse", allowed=RULES)  # see kernels/mxfp4
    layout: str = limited("per_expert", allowed=("per_expert", "stacked"))  # one pair of tensors per expert | 3D, as in the source
    groups: list[GroupSettings] = field(default_factory=list)


@dataclass
class DeviceSettings:
    """Where the numerics run and how much may run at once."""

    name: str = "???"
    backend: str = limited("cpu", allowed=("cpu", "cuda", "reference"))  # numba | Triton | float64 torch, slow: the bytes are the same
    lane: int = limited(2, least=1)  # source shards on disk and in work at any time
    memory_mb: int = limited(1000, least=1)  # resident memory that one quantize job may use


@dataclass
class EvaluationSettings:
    """How the release is measured."""

    name: str = "???"
    text: str = "???"  # UTF-8 file; relative paths start at the working directory or, where there is none, at the project
    context: int = limited(256, least=FEWEST_TOKENS)  # tokens per window
    stride: int = limited(128, least=1)  # new tokens scored per window; the rest of the window is their context. As many as the context: windows
    # do not overlap, and the first token of each is not scored
    maximum_tokens: int | None = limited(None, least=FEWEST_TOKENS)  # score at most this many tokens of the text
    via: str = limited("process", allowed=("process", "vllm"))  # transformers, in this process | prompt log-probabilities from the server
    dtype: str = limited("float32", allowed=("float32", "bfloat16"))  # in which the model computes in process
    memory_gb: float = limited(16.0, least=0)  # models that would need more in process are not measured in process, and the report says so
    gemm_tensors: int = limited(4, least=1)  # quantized modules that validate_gemm samples from each shard
    gemm_tokens: int = limited(64, least=1)  # rows of the activations that it multiplies them with


@dataclass
class ServingSettings:
    """Which server runs the release, and how it is measured. See docs/serving.md."""

    name: str = "none"
    kind: str = limited("none", allowed=("none", "vllm", "endpoint"))  # none | started here, on loopback | a server that runs already
    model: str = "release"  # the name under which the server offers the release
    url: str | None = None  # of an endpoint, http://HOST:PORT, with or without /v1; its API key comes from the environment, MXFORGE_API_KEY
    hardware: str | None = None  # what an endpoint runs on, in words, such as "8 x H200": it cannot be seen from here
    environment: str | None = None  # virtual environment with vLLM; null: the `vllm` on the PATH
    makes_environment: bool = False  # the environment is this project's own, for a CPU: snakemake makes it, and anew when its parts change
    if_installed: bool = False  # leave serving out, and say so, where the environment has not been made
    drafts: bool = True  # let the release's MTP layers draft tokens
    flags: list[str] = field(default_factory=list)  # further flags of `vllm serve`
    variables: dict[str, str] = field(default_factory=dict)  # environment variables of the server
    startup_seconds: float = limited(600.0, above=0)  # until the first completion must have come back, of an endpoint that loads, too
    concurrencies: list[int] = field(default_factory=lambda: [8, 32, 64])  # numbers of streams, measured one after the other
    output_tokens: int = limited(512, least=1)  # of each completion (ignore_eos)
    prompt_tokens: int = limited(32, least=1)  # of each prompt, which no prefix cache can have seen
    prompts: str | None = None  # UTF-8 text whose pieces stand in the prompts; see evaluation.text for relative paths; null: random token ids
    windows: int = limited(1, least=1)  # measured one after the other at each level
    window_seconds: float = limited(30.0, above=0)
    ramp_seconds: float = limited(10.0, least=0)  # between the first token of the last stream and the first window
    timeout_seconds: float = limited(600.0, above=0)  # for one answer, and for all streams to have begun
    goodput_ms: dict[str, float] = field(default_factory=dict)  # limits of ttft, tpot, end_to_end that a good request keeps
    seed: int = 0  # of the prompts


@dataclass
class ReleaseSettings:
    """What goes into the release beside the weights."""

    name: str = "default"
    minimum_sqnr_db: float = limited(15.0, least=0)  # a tensor below this was damaged, not quantized: verify refuses the release
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
        """Where source shards lie: a local source itself; those of a hub while they are needed, for one run, so that two recipes never wait for or
        delete each other's."""
        return Path(self.source.path) if self.source.path else self.run_directory / "source"

    @property
    def run_directory(self) -> Path:
        """Everything that one recipe produced from one source."""
        return Path(self.results) / str(self.source.name) / self.recipe.name


def as_dict(part: object) -> dict:
    """A settings part as plain data, for JSON results, receipts and Snakemake's `params`."""
    return dataclasses.asdict(part)


def as_json(part: object) -> str:
    """Canonical JSON of a settings part, or of what was picked from one."""
    return json.dumps(part if isinstance(part, dict) else as_dict(part), sort_keys=True, separators=(",", ":"))


def gemm_sizes(evaluation: EvaluationSettings) -> list[int]:
    """What the GEMM checks depend on."""
    return [evaluation.gemm_tensors, evaluation.gemm_tokens]


def scoring(evaluation: EvaluationSettings) -> dict:
    """What a perplexity depends on: all of the evaluation's settings but those of the GEMM checks."""
    return {key: value for key, value in as_dict(evaluation).items() if not key.startswith("gemm")}
