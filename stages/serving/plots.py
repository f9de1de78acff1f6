"""Plots of the serving benchmark for the report, in its style: SVG from serving.json and the raw events beside it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from stages.plots import BLUE, GREEN, GRID, PLOT_STYLE, svg_of


def _bins(path: Path, width: float) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """(bin starts, tokens per second in each, windows) of a saved run, without the last bin, which ends early."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        windows = json.loads(next(file))["windows"]
        rows = [json.loads(line) for line in file]
    counts: dict[int, int] = {}
    before: dict[int, int] = {}
    for kind, seconds, _, request, number in rows:
        if kind == "tokens":
            counts[int(seconds / width)] = counts.get(int(seconds / width), 0) + number - before.get(request, 0)
            before[request] = number
    last = max(counts, default=0)
    return [i * width for i in range(last)], [counts.get(i, 0) / width for i in range(last)], windows


def serving_plot(serving: dict, directory: Path) -> str:
    """SVG: throughput by number of streams, tokens per second over time at the highest, acceptance by draft position."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = serving["levels"]
    drafting = levels[-1].get("drafting")
    with pyplot.rc_context(PLOT_STYLE):
        figure, axes = pyplot.subplots(1, 3 if drafting else 2, figsize=(7.2, 2.4),
                                       width_ratios=[1, 1.6, 0.9][:3 if drafting else 2])
        streams = [level["streams"] for level in levels]
        means = [level["tokens_per_second"]["mean"] for level in levels]
        halves = [level["tokens_per_second"]["half_interval_95"] or 0.0 for level in levels]
        axes[0].errorbar(streams, means, yerr=halves, marker="o", markersize=4, color=BLUE, capsize=3)
        axes[0].set(xlabel="streams", ylabel="tokens/s", ylim=(0, None), xticks=streams)
        starts, rates, windows = _bins(directory / f"{streams[-1]}.jsonl.gz", 1.0)
        axes[1].step(starts, rates, where="post", color=BLUE, linewidth=1.2)
        for begin, end in windows:
            axes[1].axvspan(begin, end, color=GRID, alpha=0.6, linewidth=0)
        axes[1].set(xlabel=f"seconds, {streams[-1]} streams (shaded: counted)", ylabel="tokens/s", ylim=(0, None))
        if drafting:
            values = [100 * value for value in drafting["acceptance_by_position"]]
            axes[2].bar(range(1, len(values) + 1), values, color=GREEN)
            axes[2].set(xlabel="draft position", ylabel="accepted (%)", ylim=(0, 100), xticks=range(1, len(values) + 1))
        figure.tight_layout()
        svg = svg_of(figure)
        pyplot.close(figure)
    return svg
