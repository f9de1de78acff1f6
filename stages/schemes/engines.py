"""Which engines are known to load a release, and how it is known: a run here, a proof over names, or nothing at all."""

from __future__ import annotations

from stages.dialects.roles import QUANTIZABLE
from stages.records import Engine, Plan
from stages.schemes import SCHEMES
from stages.schemes.architectures import TRANSFORMERS, VLLM, architecture_of

PARTS = {"routed_experts": "experts", "mtp": "drafts"} | {role: "rest" for role in QUANTIZABLE if role != "routed_experts"}


def form_of(plan: Plan) -> str:
    """What of a release is quantized, and how: "experts mxfp4", "stacked experts mxfp4", "experts mxfp4, rest fp8 128x128".

    `rest` are the other linear weights of the text model; a part of which some stays as it is has "plain", too.
    """
    formats: dict[str, set[str]] = {}
    for entry in plan["tensors"].values():
        if entry["matrix"]:
            formats.setdefault(PARTS.get(entry["role"], entry["role"]), set()).add(entry["stored"] or "plain")
    stacked = "stacked " if plan["layout"] == "stacked" else ""
    places = {part: place for place, part in enumerate(("experts", "rest", "drafts"))}
    parts = [part for part in sorted(formats, key=lambda part: (places.get(part, len(places)), part)) if formats[part] != {"plain"}]
    return stacked + ", ".join(f"{part} {' and '.join(sorted(formats[part] - ({'plain'} if part == 'drafts' else set())))}" for part in parts)


def engines(plan: Plan) -> list[Engine]:
    """Whether each engine loads the release."""
    row, form = architecture_of(plan["architecture"]), form_of(plan)
    formats = {entry["stored"] for entry in plan["tensors"].values() if entry["stored"]}
    was_run = row.tried if plan["architecture"] == row.names[0] else ()
    tried = {entry.engine: (entry.loads, entry.how) for entry in was_run if form in entry.forms}
    loads, known = tried.get(VLLM, ("expected", None))
    lines = [*([] if known else ["not run in this form"]), f"each of its {plan['runtime_modules']} modules is claimed in the format it is stored in",
             *([known] if known else []), *row.cautions]
    lines += [scheme.NEEDS for name, scheme in SCHEMES.items() if name in formats]
    if any(stored.startswith("fp8") for stored in formats):
        lines.append("FP8 activations need compute capability 8.9; below, FP8 experts do not run")
    result = [{"engine": VLLM, "loads": loads, "how": lines}]
    for engine in (TRANSFORMERS, "SGLang"):
        others = any(entry.engine == engine for entry in was_run)
        loads, known = tried.get(engine, ("unknown", "not tried with this recipe" if others else "not tried"))
        result.append({"engine": engine, "loads": loads, "how": [known]})
    return result
