"""Multiplies with quantized tensors as they lie in the shards and compares with float64, on every backend present.

Two paths, as an engine runs them: `linear` (one matrix, all tokens) and `grouped_experts` (tokens sorted by expert, uneven
numbers of them, some experts without any). Two questions, two signal-to-noise ratios in dB:

    arithmetic  y against float64 on the *decoded* weights: is the kernel right?  BF16 output rounding allows about 50
    format      y against float64 on the *source* weights: what does the format cost?  about 19, like the weights' SQNR

The second needs the source's shard and is left out where that was temporary. It has a floor, too: no block of MXFP4 comes near it, but
weights that are not the source's do.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.decibels import decibels
from stages.checkpoint.files import write_json
from stages.checkpoint.reader import ShardReader
from stages.dialects import Claim
from stages.dialects.reading import Tensors, decoded_rows
from stages.errors import UserError, exit_with_one_line
from stages.gemm_summary import worst_by_path
from stages.planning.outputs import release_outputs
from stages.planning.record import read_plan
from stages.receipts import read_receipts, shards_sha256
from stages.records import Plan
from stages.schemes.modules import Output
from stages.settings import Settings, gemm_sizes, load, stage_parser
from stages.sources.listing import check_source

MINIMUM_ARITHMETIC_DB = 45.0
MINIMUM_FORMAT_DB = 6.0  # scales off by one give 0, another tensor's weights -3
MAXIMUM_EXPERTS = 8  # of one 3D tensor, enough to see uneven and empty groups
FORMAT_ROWS = 256  # of the source's matrices, for the second question
INTERPRETER_ROWS, INTERPRETER_COLUMNS = 64, 1024  # Triton's interpreter runs on numpy, a hundred times slower than the CPU twin: a corner
# of one weight of each shape shows as much as all of them


def signal_to_noise_db(measured: torch.Tensor, truth: torch.Tensor) -> float:
    """10 log10(sum truth^2 / sum (measured - truth)^2), within the 300 dB that JSON can hold where it is infinite."""
    noise, signal = (measured.double() - truth).square().sum().item(), truth.square().sum().item()
    return max(-300.0, min(300.0, decibels(signal, noise)))


class Member(NamedTuple):
    """An MXFP4 weight of the release."""

    expert: int  # its number in the group
    codes: str  # names of its two tensors
    scale: str
    output: Output  # of the codes


def _samples(settings: Settings, plan: Plan, made: list[Output]) -> dict[str, list[Member]]:
    """Groups of MXFP4 weights among the tensors of a shard to multiply with."""
    groups: dict[str, list[Member]] = {}
    outputs = [output for output in made if output.matrix and plan["tensors"][output.source]["scheme"] == "mxfp4"]
    scales = {output.matrix: output.name for output in outputs if output.part == "scale"}
    for output in outputs:
        if output.part == "codes":
            groups.setdefault(output.matrix.group, []).append(Member(output.matrix.expert or 0, output.name, scales[output.matrix], output))
    chosen = sorted(groups)[:: max(1, len(groups) // settings.evaluation.gemm_tensors)][:settings.evaluation.gemm_tensors]
    return {group: sorted(groups[group], key=lambda member: member.expert)[:MAXIMUM_EXPERTS] for group in chosen}


def _quantized_experts(reader: ShardReader, members: list[Member]) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed [experts, out, in/2], scale [experts, out, in/32]) of at most MAXIMUM_EXPERTS experts."""
    experts = reader.info(members[0].codes).shape[:-2]
    return tuple(reader.rows(names[0], 0, min(MAXIMUM_EXPERTS, experts[0])) if experts else torch.stack([reader.tensor(name) for name in names])
                 for names in ([member.codes for member in members], [member.scale for member in members]))


def _source_experts(settings: Settings, plan: Plan, members: list[Member], experts: int) -> torch.Tensor | None:
    """FORMAT_ROWS of the same weights as the source stores them, float64 [experts, rows, in]; None where they were downloaded, and are gone."""
    if not settings.source.path:
        return None
    directory = Path(settings.source.path)
    with ExitStack() as stack:
        readers: dict[str, ShardReader] = {}

        def place(name: str) -> ShardReader:
            shard = plan["tensors"][name]["shard"]
            if shard not in readers:
                readers[shard] = stack.enter_context(ShardReader(directory / shard))
            return readers[shard]

        def decoded(output: Output, expert: int | None) -> torch.Tensor:
            rows = range(*output.matrix.rows)[:FORMAT_ROWS]
            claim = Claim.from_entry(plan["tensors"][output.source])
            return decoded_rows(Tensors(place), output.source, claim, expert, rows[0], rows[-1] + 1)[::rows.step].double()

        output = members[0].output
        if len(members) == 1 and len(plan["tensors"][output.source]["matrix"]) == 3 and output.matrix.index is None:
            return torch.stack([decoded(output, expert) for expert in range(experts)])
        return torch.stack([decoded(output, output.matrix.index) for output in (member.output for member in members)])


def _offsets(experts: int, tokens: int) -> torch.Tensor:
    """int32 [experts + 1]: uneven groups, every third one empty, `tokens` in all."""
    shares = torch.tensor([0.0 if expert % 3 == 2 else 1.0 + expert for expert in range(experts)])
    bounds = (shares.cumsum(0) / shares.sum() * tokens).round().to(torch.int32)
    return torch.cat([torch.zeros(1, dtype=torch.int32), bounds])


def _interpreted() -> bool:
    """Whether `cuda` means Triton's interpreter here."""
    return os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()


def _products(x: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor, path: str) -> torch.Tensor:
    """What a path should compute, float64 [tokens, out]: x [tokens, in] times weights[0], or each expert's rows of x times its matrix of `weights`
    [experts, out, in]."""
    if path == "linear":
        return x.double() @ weights[0].T
    bounds = offsets.tolist()
    return torch.cat([x[begin:end].double() @ weights[expert].T for expert, (begin, end) in enumerate(pairwise(bounds))])


def check_tensor(settings: Settings, plan: Plan, shard: str, group: str, members: list[Member], backends: list[str]) -> list[dict]:
    """Rows of gemm.json for one quantized tensor: one per path and backend."""
    from kernels import gemm, mxfp4

    with ShardReader(settings.run_directory / "shards" / shard) as reader:
        packed, scale = _quantized_experts(reader, members)
    experts, tokens = len(packed), settings.evaluation.gemm_tokens
    source = _source_experts(settings, plan, members, experts)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, packed.shape[-1] * 2, generator=generator).to(torch.bfloat16)
    offsets = _offsets(experts, tokens)
    rows = []
    for backend in backends:
        interpreted = backend == "cuda" and _interpreted()
        height, width = packed.shape[1], packed.shape[2] * 2
        if interpreted:
            height, width = min(height, INTERPRETER_ROWS), min(width, INTERPRETER_COLUMNS)
        p, s, x = packed[:, :height, :width // 2].contiguous(), scale[:, :height, :width // 32].contiguous(), inputs[:, :width].contiguous()
        decoded = mxfp4.dequantize(p, s, torch.float32).double()
        truths = {"arithmetic": decoded} | ({} if source is None else {"format": source[:, :height, :width]})
        device = "cuda" if backend == "cuda" and not interpreted else "cpu"
        there = [tensor.to(device) for tensor in (x, p, s, offsets)]
        made = {
            "linear": gemm.linear(there[0], there[1][0], there[2][0], backend=backend),
            "grouped_experts": gemm.grouped_linear(*there, backend=backend),
        }
        for path, y in made.items():
            row = {"shard": shard, "tensor": group, "path": path, "backend": "triton-interpreter" if interpreted else backend,
                   "experts": experts if path != "linear" else 1, "tokens": tokens, "shape": [height, width]}
            for question, weights in truths.items():
                truth = _products(x, weights, offsets, path)
                row[f"{question}_db"] = round(signal_to_noise_db(y.cpu()[:, :truth.shape[1]], truth), 3)
            rows.append(row)
    return rows


def _is_wrong(row: dict) -> bool:
    return not row["arithmetic_db"] >= MINIMUM_ARITHMETIC_DB  # NaN, too


def _is_foreign(row: dict) -> bool:
    return not row.get("format_db", MINIMUM_FORMAT_DB) >= MINIMUM_FORMAT_DB


def _print_worst(result: dict) -> None:
    """A line for each backend and path of gemm.json."""
    if not result["rows"]:
        print("no weight is MXFP4: there is no GEMM to check")
    for row in worst_by_path(result):
        line = f"{row['backend']}, {row['path']}: {row['tensors']} tensors, worst {row['arithmetic_db']:.1f} dB"
        line += " against float64 of the decoded weights"
        if row["format_db"] is not None:
            line += f", {row['format_db']:.2f} dB against the source's weights"
        print(line)


def run(settings: Settings) -> dict:
    """Writes gemm.json; UserError when a kernel is wrong, or when a shard's weights are not the source's."""
    from kernels import mxfp4

    plan = read_plan(settings)
    receipts = read_receipts(settings, plan)
    check_source(settings)
    backends = [backend for backend in mxfp4.backends() if backend != "reference"]
    rows, shapes = [], set()
    for shard, made in release_outputs(plan).items():
        for group, members in _samples(settings, plan, made).items():
            shape = members[0].output.shape[-2:]
            skipped = {"cuda"} if _interpreted() and shape in shapes else set()
            rows += check_tensor(settings, plan, shard, group, members, [backend for backend in backends if backend not in skipped])
            shapes.add(shape)
    result = {"shards_sha256": shards_sha256(receipts), "sizes": gemm_sizes(settings.evaluation),
              "minimum_arithmetic_db": MINIMUM_ARITHMETIC_DB, "minimum_format_db": MINIMUM_FORMAT_DB,
              "backends": sorted({row["backend"] for row in rows}),
              "rows": rows}
    _print_worst(result)
    failed = settings.run_directory / "gemm.failed.json"
    if any(_is_wrong(row) or _is_foreign(row) for row in rows):
        write_json(failed, result)
    if bad := next(filter(_is_wrong, rows), None):
        raise UserError(f"{bad['shard']}: {bad['tensor']}: {bad['path']} on {bad['backend']} has {bad['arithmetic_db']} dB "
                        f"against float64, below {MINIMUM_ARITHMETIC_DB}: the kernel is wrong on this machine, report it with gemm.failed.json")
    if foreign := next(filter(_is_foreign, rows), None):
        raise UserError(f"{foreign['shard']}: {foreign['tensor']}: has {foreign['format_db']} dB against the weights in {settings.source.path}, "
                        f"below {MINIMUM_FORMAT_DB}: it was made from others; remove shards/{foreign['shard']} and its receipt and run again, it "
                        "is converted anew")
    failed.unlink(missing_ok=True)
    write_json(settings.run_directory / "gemm.json", result)
    return result


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    settings = load(stage_parser(__doc__).parse_args().overrides)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on numpy
    run(settings)


if __name__ == "__main__":
    main()
