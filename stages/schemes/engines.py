"""Which engines are known to load a release, and how it is known: a proof over names, a run here, or nothing at all."""

from __future__ import annotations

from stages.schemes.architectures import architecture_of

STEP = ("Step3p7ForConditionalGeneration", "Step3p5ForCausalLM")


def _vllm(plan: dict) -> list[str]:
    formats = {entry["stored"] for entry in plan["tensors"].values() if entry["stored"]}
    lines = [f"each of its {plan['runtime_modules']} modules is claimed in the format it is stored in"]
    if plan["architecture"] in STEP:
        lines.append("run on a CPU with the plugin that the release bundles; without it the draft layers do not load")
    lines += architecture_of(plan["architecture"]).cautions
    if "mxfp4" in formats:
        lines.append("MXFP4 needs compute capability 8.0; weights stay 4 bits with BF16 activations (Marlin) but for B200 and B300, where "
                     "activations become 4 bits, too")
    if "mxfp8" in formats:
        lines.append("MXFP8 needs compute capability 7.5")
    if any(stored.startswith("fp8") for stored in formats):
        lines.append("FP8 activations need compute capability 8.9; below, FP8 experts do not run")
    return lines


def engines(plan: dict) -> list[dict]:
    """{"engine", "loads": yes (run here) | by its names | no | unknown, "how": lines} for each engine."""
    stacked = plan["layout"] == "stacked"
    if plan["architecture"] in STEP:
        transformers = ("no", ["stacked experts were not tried" if stacked else
                               "5.19 leaves the experts of this model at random values, with only a warning; evaluate here expands them first"])
    elif plan["architecture"] == "Qwen3MoeForCausalLM" and not stacked:
        transformers = ("yes", ["5.19 with compressed-tensors 0.17: log-probabilities were those of the same values in BF16"])
    else:
        transformers = ("unknown", ["not tried"])
    return [{"engine": "vLLM 0.32", "loads": "yes" if plan["architecture"] in STEP else "by its names", "how": _vllm(plan)},
            {"engine": "transformers", "loads": transformers[0], "how": transformers[1]},
            {"engine": "SGLang", "loads": "unknown", "how": ["not tried"]}]
