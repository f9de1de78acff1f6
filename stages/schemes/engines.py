"""Which engines are known to load a release, and how it is known: a run here, a proof over names, or nothing at all."""

from __future__ import annotations

from stages.schemes.architectures import TRANSFORMERS, VLLM, architecture_of

PARTS = {"routed_experts": "experts", "mtp": "drafts"}


def form_of(plan: dict) -> str:
    """What of a release is quantized, and how: "experts mxfp4", "stacked experts mxfp4", "experts mxfp4, rest fp8 128x128"."""
    formats: dict[str, set[str]] = {}
    for entry in plan["tensors"].values():
        if entry["stored"] not in (None, "plain"):
            formats.setdefault(PARTS.get(entry["role"], "rest"), set()).add(entry["stored"])
    stacked = "stacked " if plan["layout"] == "stacked" else ""
    return stacked + ", ".join(f"{part} {' and '.join(sorted(formats[part]))}" for part in ("experts", "rest", "drafts") if part in formats)


def engines(plan: dict) -> list[dict]:
    """{"engine", "loads": yes (run here) | by its names | no | unknown, "how": lines} for each engine."""
    row, form = architecture_of(plan["architecture"]), form_of(plan)
    formats = {entry["stored"] for entry in plan["tensors"].values() if entry["stored"]}
    tried = {entry.engine: (entry.loads, entry.how) for entry in row.tried if form in entry.forms}
    loads, known = tried.get(VLLM, ("by its names", None))
    lines = [f"each of its {plan['runtime_modules']} modules is claimed in the format it is stored in", *([known] if known else []), *row.cautions]
    if "mxfp4" in formats:
        lines.append("MXFP4 needs compute capability 8.0; weights stay 4 bits with BF16 activations (Marlin) but for B200 and B300, where "
                     "activations become 4 bits, too")
    if "mxfp8" in formats:
        lines.append("MXFP8 needs compute capability 7.5")
    if any(stored.startswith("fp8") for stored in formats):
        lines.append("FP8 activations need compute capability 8.9; below, FP8 experts do not run")
    result = [{"engine": VLLM, "loads": loads, "how": lines}]
    for engine in (TRANSFORMERS, "SGLang"):
        others = any(entry.engine == engine for entry in row.tried)
        loads, known = tried.get(engine, ("unknown", "not tried with this recipe" if others else "not tried"))
        result.append({"engine": engine, "loads": loads, "how": [known]})
    return result
