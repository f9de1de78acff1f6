"""Which code decides what: parameters of Snakemake's rules, so that what other code made is made again."""

from __future__ import annotations

import hashlib

from stages.settings import PROJECT

CONVERTING = (  # the code on which a shard's bytes depend; dvc.yaml names it, too
    *(f"kernels/{name}.py" for name in ("arrays", "compiled", "formats", "fp8", "mxfp8", "panels", "sha256")), "kernels/mxfp4", "stages/checkpoint", "stages/conversion",
    "stages/dialects", "stages/planning", "stages/schemes", "stages/sources",
    *(f"stages/{name}.py" for name in ("download", "inspect_format", "plan", "quantize_experts", "receipts")))
RESULTS_FORMAT = 10  # of listing.json, inspect.json, plan.json and receipts; raised with their meaning, so that older results are made again


def code_of(*parts: str) -> str:
    """sha256 of files of this project, and of all Python files in its directories: a rule's parameter, so that what other code made is
    made again."""
    digest = hashlib.sha256()
    for part in parts:
        path = PROJECT / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(PROJECT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
