"""Which engines are known to load a release, and how it is known: a run here, a proof over names, or nothing at all."""

from __future__ import annotations

from stages.schemes.architectures import architecture_of

VLLM = "vLLM 0.32"


def engines(plan: dict) -> list[dict]:
    """{"engine", "loads": yes (run here) | by its names | no | unknown, "how": lines} for each engine."""
    row = architecture_of(plan["architecture"])
    formats = {entry["stored"] for entry in plan["tensors"].values() if entry["stored"]}
    # what was run were routed experts in MXFP4, stored one by one, and nothing else quantized
    as_tried = plan["layout"] == "per_expert" and all(
        entry["role"] == "routed_experts" and entry["stored"] == "mxfp4" for entry in plan["tensors"].values() if entry["stored"] not in (None, "plain"))
    tried = row.tried if as_tried else {}
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
    for engine in ("transformers", "SGLang"):
        loads, known = tried.get(engine, ("unknown", "not tried" if as_tried else "not tried with this recipe"))
        result.append({"engine": engine, "loads": loads, "how": [known]})
    return result
