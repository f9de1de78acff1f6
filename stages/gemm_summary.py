"""gemm.json in a row for each backend and path, as the stage prints it and the report shows it."""

from __future__ import annotations

PATHS = ("linear", "grouped_experts")


def worst_by_path(gemm: dict) -> list[dict]:
    """The least signal-to-noise ratios in gemm.json, in dB, per backend and path; `format_db` is None where the source was gone."""
    result = []
    for backend in gemm["backends"]:
        for path in PATHS:
            rows = [row for row in gemm["rows"] if (row["backend"], row["path"]) == (backend, path)]
            result.append({"backend": backend, "path": path, "tensors": len(rows), "arithmetic_db": min(row["arithmetic_db"] for row in rows),
                           "format_db": min((row["format_db"] for row in rows if "format_db" in row), default=None)})
    return result
