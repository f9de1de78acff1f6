"""Plots of the report and the style that they share: SVG, the same bytes for the same figures. matplotlib is imported where it is used."""

from __future__ import annotations

import io
import re

BLUE, GREEN, GRID = "#2a78d6", "#1baf7a", "#e1e0d9"
PROJECTION_COLORS = dict.fromkeys(("gate", "w1", "gate_up"), BLUE) | dict.fromkeys(("up", "w3"), GREEN) | dict.fromkeys(("down", "w2"), "#eda100")
OTHER_COLORS = ("#4a3aa7", "#c2407a", "#7a7873", "#9c5a1e", "#16808f", "#b32626", "#86a01c", "#b08ae0")  # of further projections, in turn
ROLE_STYLES = {"routed_experts": ("o", "-"), "shared_experts": ("s", "--"), "dense_mlp": ("^", ":"), "attention": ("D", "-"), "linear_attention": ("v", "--")}
OTHER_STYLE = ("x", ":")
LEAST_SPAN_DB = 3.0  # of the SQNR axes
PLOT_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c3c2b7",
              "axes.labelcolor": "#52514e", "xtick.color": "#898781", "ytick.color": "#898781", "svg.fonttype": "none",
              "svg.hashsalt": "mxforge", "font.family": "sans-serif"}


def svg_of(figure) -> str:
    """A figure as inline SVG that fills its box, the same bytes for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text[text.index("<svg"):], count=1)


def spread(values: list[float], least: float) -> tuple[float, float]:
    """Limits of an axis around the values, never closer than `least`: noise must not look like a finding."""
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), (least - (high - low)) / 2)
    return low - margin, high + margin


def layer_series(noise: dict) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(role, projection) -> (layer, SQNR in dB) in the order of layers, of sqnr.json; exact ones, which have no value, are left out."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in noise["projections"]:
        if row["sqnr_db"] is not None:
            series.setdefault((row["role"], row["projection"]), []).append((row["layer"], row["sqnr_db"]))
    order = list(ROLE_STYLES)
    return {key: sorted(series[key]) for key in sorted(series, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key))}


def layer_plot(noise: dict) -> str:
    """SVG: SQNR of each layer's projections, apart by their role: routed and shared experts of a layer are different weights."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = layer_series(noise)
    others = sorted({key for key in series if key[1] not in PROJECTION_COLORS})
    with pyplot.rc_context(PLOT_STYLE):
        figure, axes = pyplot.subplots(figsize=(6.0, max(2.6, 0.4 + 0.17 * len(series))))
        for key, points in series.items():
            role, projection = key
            color = PROJECTION_COLORS.get(projection) or OTHER_COLORS[others.index(key) % len(OTHER_COLORS)]
            marker, line = ROLE_STYLES.get(role, OTHER_STYLE)
            axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, linestyle=line, markersize=3.5, linewidth=1.3,
                      label=f"{role.replace('_', ' ')}: {projection}", color=color)
        axes.set_xlabel("layer")
        axes.set_ylabel("SQNR (dB)")
        values = [value for points in series.values() for _, value in points]
        if values:
            axes.set_ylim(*spread(values, LEAST_SPAN_DB))
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, handlelength=2.6)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        svg = svg_of(figure)
        pyplot.close(figure)
    return svg


def expert_plot(noise: dict) -> str:
    """SVG: SQNR of every expert's matrix, one row per tensor, one column per expert."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    rows = [(f"{entry['layer']} {entry['projection']}", entry["experts_db"]) for entry in noise["tensors"].values()
            if len(entry["experts_db"]) > 1]
    if not rows:
        return ""
    width = max(len(values) for _, values in rows)
    grid = [[float("nan") if v is None else v for v in values] + [float("nan")] * (width - len(values)) for _, values in rows]
    ramp = colors.LinearSegmentedColormap.from_list("sequential", ["#cde2fb", "#3987e5", "#0d366b"])
    with pyplot.rc_context(PLOT_STYLE):
        figure, axes = pyplot.subplots(figsize=(7.2, 0.9 + 0.13 * min(len(rows), 60)))
        values = [value for row in grid for value in row if value == value]
        low, high = spread(values, LEAST_SPAN_DB) if values else (None, None)
        image = axes.imshow(grid, aspect="auto", cmap=ramp, interpolation="nearest", vmin=low, vmax=high)
        step = max(1, len(rows) // 24)
        axes.set_yticks(range(0, len(rows), step), [rows[i][0] for i in range(0, len(rows), step)], fontsize=7)
        axes.set_xlabel("expert")
        figure.colorbar(image, ax=axes, label="SQNR (dB)", pad=0.02).outline.set_visible(False)
        svg = svg_of(figure)
        pyplot.close(figure)
    return svg
