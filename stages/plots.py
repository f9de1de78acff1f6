"""Plots of the report and the style that they share: SVG, the same bytes for the same figures. matplotlib is imported where it is used."""

from __future__ import annotations

import io
import re

BLUE, GREEN, GRID = "#2a78d6", "#1baf7a", "#e1e0d9"
PROJECTION_COLORS = {"gate": BLUE, "up": GREEN, "down": "#eda100"}
OTHER_COLOR = "#4a3aa7"
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


def layer_plot(noise: dict) -> str:
    """SVG: SQNR of each layer's projections."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(PLOT_STYLE):
        figure, axes = pyplot.subplots(figsize=(7.2, 2.6))
        series: dict[str, list] = {}
        for entry in noise["tensors"].values():
            series.setdefault(entry["projection"] or "weight", []).append((entry["layer"], entry["sqnr_db"]))
        for projection, points in sorted(series.items()):
            points = sorted(point for point in points if point[1] is not None)
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=4, linewidth=1.8,
                      label=projection, color=PROJECTION_COLORS.get(projection, OTHER_COLOR))
        axes.set_xlabel("layer")
        axes.set_ylabel("SQNR (dB)")
        values = [value for points in series.values() for _, value in points if value is not None]
        if values:
            axes.set_ylim(*spread(values, LEAST_SPAN_DB))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2))
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
