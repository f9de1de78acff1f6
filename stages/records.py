"""What stages hand to each other as JSON: the fields of inspect.json, plan.json and receipts, and the check that a file has them.

They are TypedDicts, so that a table of up to 90,000 tensors, which every job reads again, is used as it was read.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Literal, NamedTuple, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict


class CensusTensor(TypedDict):
    """A tensor of the source as inspect_format found it; from `dialect` on the fields of its Claim (stages/dialects/claim.py)."""

    shard: str
    dtype: str  # as safetensors spells it
    shape: list[int]
    bytes: int
    role: str  # of stages/dialects/roles.py
    dialect: str
    scale: str | None
    tile: list[int] | None
    matrix: list[int] | None
    parts: dict[str, str]
    belongs_to: str | None
    one_scale: bool
    scales: list[list]
    transposed: bool


class PlannedTensor(CensusTensor):
    """The same with what becomes of it."""

    decision: Literal["quantize", "pass through", "keep", "drop"]
    scheme: str | None  # that it is quantized to
    stored: str | None  # format in which the release has it, None for plain numbers
    reason: str


class ListedFile(TypedDict):
    """A file of the source in listing.json, by its name."""

    bytes: int
    sha256: str | None  # of what a hub lists with one, and of every copied file; None for a local shard
    kind: str  # of SourceFile (stages/sources/files.py)
    mtime_ns: NotRequired[int | None]  # last change of a local file; older listings lack it


class SourceShard(TypedDict):
    """A file of the source, from its header."""

    file_size: int


class PlannedShard(TypedDict):
    """A file of the release as it will be, and the bytes of the source's file that it is made of."""

    source_bytes: int
    tensors: int
    tensor_bytes: int
    file_bytes: int


class Census(TypedDict):
    """inspect.json: what there is, by the headers of all shards, and what config.json says of it."""

    format: int
    source: str
    architecture: str | None
    text_layers: int
    hidden_size: int | None
    experts: int | None  # routed ones of a layer
    drafts: int  # draft layers that config.json declares
    tied: bool  # whether lm_head is the embeddings
    shared_experts: bool
    tower_blocks: int | None  # of the vision model
    layers_apart: list[int]  # layers of another kind than their neighbours
    shards: dict[str, SourceShard]
    tensor_bytes: int
    dialects: dict[str, int]  # dialect -> tensors
    anomalies: list[str]
    tensors: dict[str, CensusTensor]
    file_bytes: NotRequired[int]  # these three are for a person, no stage reads them
    dtypes: NotRequired[dict[str, int]]
    bytes_by_role: NotRequired[dict[str, int]]


class TensorParallel(TypedDict):
    """Whether a release can be split over a number of ranks."""

    tensor_parallel: int
    fits: bool
    marlin: bool  # whether vLLM's Marlin kernels take each rank's share of the experts
    reason: str | None  # why not, of the first weight in the way
    drafts: str | None  # why it fits without the draft layers only


class Engine(TypedDict):
    """Whether an engine loads a release."""

    engine: str
    loads: Literal["yes", "expected", "no", "unknown"]  # run here; by its names; refused; not tried
    how: list[str]  # how that is known, and what to heed


class Plan(TypedDict):
    """plan.json: a decision for every tensor, and the release predicted to the byte."""

    format: int
    source: str
    architecture: str
    recipe: str
    layout: str
    exponent_rule: str
    text_layers: int
    recipe_settings: dict
    tensors: dict[str, PlannedTensor]
    quantization_config: dict  # the release's
    runtime_modules: int  # that vLLM builds, each of them claimed by the config in the format that it is stored in
    draft_layers: int
    draft_scales: dict[str, float]  # inert scalars that the release gets, by name
    shards: dict[str, PlannedShard]
    decisions: dict[str, int]  # decision -> tensors
    quantized_weights: int
    source_tensor_bytes: int
    release_tensor_bytes: int
    release_shard_file_bytes: int
    release_index_bytes: int
    release_config_bytes: int
    release_tensors: int
    jobs: int  # of the workflow
    lane: int  # shards that are converted at a time
    disk_peak_bytes: int
    tensor_parallel: list[TensorParallel]
    engines: list[Engine]
    notes: list[str]


class MatrixSums(NamedTuple):
    """Sums of squares over the weights of a quantized matrix, float64."""

    expert: int | None  # its number; None for other weights
    signal: float  # of the source's weights
    error: float  # of what the release's differ by
    decoded: float  # of the release's weights


class FileHash(TypedDict):
    """Size and hash of a file of the source or of the release, in receipts and in manifest.json."""

    bytes: int
    sha256: str
    mtime_ns: NotRequired[int]  # of a local source's file: its last change


class Receipt(TypedDict):
    """What converting a shard found out; beside the shard in shards/."""

    shard: str
    plan_sha256: str  # of what in the plan determines its bytes
    source: FileHash
    output: FileHash
    tensors: dict[str, str]  # that passed through -> sha256
    borrowed: dict[str, str]  # scales that it read from other shards -> sha256
    lent: dict[str, str]  # scales that other shards read from it -> sha256
    quantized: dict[str, list[MatrixSums]]  # group of matrices, in the source's names
    zeros: list[str]  # weights that hold nothing but zeros
    seconds: float
    bytes_per_second: int


@cache
def _fields(record: type) -> dict[str, tuple[type, ...]]:
    """Required field -> the classes that its value may have. `__required_keys__` cannot tell: annotations are texts here."""
    hints = get_type_hints(record, include_extras=True)
    return {name: _classes(hints[name]) for name in sorted(hints) if get_origin(hints[name]) is not NotRequired}


def _classes(hint: object) -> tuple[type, ...]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return tuple(found for part in get_args(hint) for found in _classes(part))
    if origin is Literal:
        return (str,)
    if is_typeddict(hint):
        return (dict,)
    return (int, float) if hint is float else (origin or hint,)


def fault(value: object, record: type) -> str | None:
    """The first required field of a record that JSON's `value` lacks or has in another form, or that it is no object at all; what lies deeper in a
    field is not looked at."""
    if not isinstance(value, dict):
        return "an object in braces"
    return next((name for name, classes in _fields(record).items() if name not in value or not isinstance(value[name], classes)), None)
