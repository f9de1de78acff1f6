"""What the report's plots show apart."""

import re

import pytest

from stages import evaluate, plots
from stages.records import MatrixSums


def noise_of(names):
    return evaluate.sqnr({"shard": {"quantized": {name: [MatrixSums(number, 1.0, error, 1.0) for number, error in enumerate(errors)]
                                                  for name, errors in names.items()}}})


def test_routed_shared_and_dense_experts_of_the_same_projection_are_series_of_their_own():
    names = {f"model.layers.{layer}.{block}.{projection}_proj.weight": [0.01 * (layer + 1)] for layer in range(3) for projection in ("gate", "up", "down")
             for block in ("moe", "share_expert")}
    names |= {"model.layers.0.mlp.gate_proj.weight": [0.01]} | {f"model.layers.0.self_attn.{name}_proj.weight": [0.01] for name in "qkvo"}
    series = plots.layer_series(noise_of(names))
    assert len(series) == 3 + 3 + 1 + 4 and list(series)[0] == ("routed_experts", "down") and list(series)[-1] == ("attention", "v")
    assert all([layer for layer, _ in points] == sorted({layer for layer, _ in points}) for points in series.values()), "one value of each layer"
    drawn = plots.layer_plot(noise_of(names))
    assert "shared experts: gate" in drawn and "attention: q" in drawn
    colors = set(re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: 1.3", drawn))
    assert len(colors) == 3 + 4, "gate, up and down, and each of attention's"


def test_experts_stored_one_by_one_are_one_value_of_their_layer():
    names = {f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": [0.01 * (expert + 1)] for layer in range(2) for expert in range(3)
             for name in ("w1", "w2", "w3")}
    noise = noise_of(names)
    series = plots.layer_series(noise)
    assert list(series) == [("routed_experts", name) for name in ("w1", "w2", "w3")]
    assert series["routed_experts", "w1"] == [(0, pytest.approx(16.9897, abs=1e-4)), (1, pytest.approx(16.9897, abs=1e-4))], "10 log10(3 / 0.06)"
    assert all(plots.PROJECTION_COLORS[a] == plots.PROJECTION_COLORS[b] for a, b in (("w1", "gate"), ("w3", "up"), ("w2", "down")))
    assert "routed experts: w1" in plots.layer_plot(noise)
