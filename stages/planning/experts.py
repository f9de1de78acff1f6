"""Whether the routed experts of a source are all there and fit each other, before a byte of them is converted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from stages.dialects.completeness import first_gap
from stages.errors import UserError
from stages.schemes.modules import matrices

INPUTS = ("gate_proj", "up_proj", "w1", "w3")  # take hidden_size inputs; the others give as many outputs


def check_experts(entries: Mapping[str, Mapping], count: int | None, hidden_size: int | None) -> None:
    """UserError for an expert or projection that is missing, one too many, or one whose shape does not fit its siblings'.

    entries: routed experts' weights, name -> {"shard", "matrix", ...}. count: experts of a layer by config.json, if it says.
    """
    layers: dict[str, dict[str, dict[int, tuple[str, int, int]]]] = defaultdict(lambda: defaultdict(dict))
    for name, entry in entries.items():
        for matrix in matrices(name, tuple(entry["matrix"]), "per_expert"):
            experts, _, projection = matrix.module.rpartition(".")
            if matrix.expert is None:
                raise UserError(f"{entry['shard']}: {name} has the role of routed experts, but its name holds no expert's number, so it cannot be "
                                "given a place in the release; rename it as its maker published it")
            layer = experts.rpartition(".")[0]
            layers[layer][projection][matrix.expert] = (name, len(range(*matrix.rows)), entry["matrix"][-1])
    if count and not layers:
        raise UserError(f"config.json has {count} experts in a layer, but no shard holds a routed expert; the checkpoint is incomplete or of another "
                        "config, download it again with its own config.json")
    usual = set().union(*layers.values()) if layers else set()
    largest = max((max(members) for projections in layers.values() for members in projections.values()), default=0)
    expected = count or 1 + largest  # of all layers: the last expert of one may be what is missing
    for layer, projections in layers.items():
        for projection in sorted(usual):
            members = projections.get(projection, {})
            gap = first_gap(members)
            if gap < expected or len(members) != expected:
                odd, what = (gap, "is missing") if gap < expected else (max(members), "is one too many")
                raise UserError(f"{layer}.{odd}.{projection}: {what}, a layer has {expected} experts"
                                f"{' by config.json' if count else ''} with {', '.join(sorted(usual))}; the checkpoint is incomplete "
                                "or of another config, download it again with its own config.json")
        _check_shapes(layer, projections, hidden_size)


def _check_shapes(layer: str, projections: Mapping[str, Mapping[int, tuple[str, int, int]]], hidden_size: int | None) -> None:
    """All experts of a layer have one width, and hidden_size on the other side."""
    first = None
    for projection, members in projections.items():
        takes = projection in INPUTS
        for name, rows, columns in members.values():
            hidden, inner = (columns, rows) if takes else (rows, columns)
            if hidden_size is not None and hidden != hidden_size:
                raise UserError(f"{name}: has {hidden} {'inputs' if takes else 'outputs'}, but hidden_size is {hidden_size} in config.json: "
                                "it is stored transposed, [in, out], which is not read, or of another checkpoint")
            first = first or (hidden, inner, name)
            if (hidden, inner) != first[:2]:
                raise UserError(f"{name}: is {rows} x {columns}, which does not fit {first[2]} of the same layer ({layer}): experts have one width")
