# The whole conversion as a table of contents. Settings live in conf/, what a node does in stages/<node>.py.
#   snakemake --cores all --config source=step37_fp8 recipe=mxfp4_experts 'overrides=["device.lane=4"]'
import re, shlex, sys
from snakemake.io import IOFile
sys.path.insert(0, workflow.basedir)
from stages.errors import UserError
from stages.current import of_other_settings
from stages.serving.environment import fingerprint, ingredients, marker_inputs
from stages.serving.plugin import PLUGIN, plugin_files
from stages.provenance import CONVERTING, RESULTS_FORMAT, code_of
from stages.settings import as_json, load, scoring, text_path
from stages.settings.commands import overrides_from
from stages.sources import shards_of
from stages.sources.hub import resolve
from stages.sources.local import identities, local_files
try:
    OVERRIDES = overrides_from(config)
    S = load(OVERRIDES, resolve=resolve)
    SHARDS = [name.removesuffix(".safetensors") for name in shards_of(S.source)]
    FILES, TEXT, SERVER = local_files(S.source), str(text_path(S)), marker_inputs(S.serving)
    WATCHED = dict(identities([*FILES, TEXT]))  # by size and time: an older file in the place of another one is new, too
    if S.evaluation.via == "vllm" and S.serving.if_installed and S.serving.makes_environment and not SERVER:
        raise UserError("evaluation.via=vllm needs a server: run make serve-env, or choose serving=vllm_cpu, vllm_cuda or endpoint")
except UserError as error:
    sys.exit(f"error: {error}")

PLUGIN = [str(PLUGIN / path) for path in plugin_files()]
SOURCE, RUN = str(S.source_directory), str(S.run_directory)
RELEASE = f"{RUN}/release/manifest.json"
RESULTS = ("report.html", "card.md", "metrics.json", "settings.yaml", "verify.json", "sqnr.json", "perplexity.json", "gemm.json", "serving.json")
TEMPLATES = [f"stages/templates/{name}.j2" for name in ("card.md", "report.html")]
CODE = code_of(*CONVERTING)
SOURCE_OF = [S.source.path, S.source.repository, S.source.revision]
PARAMS = {"listing.json": {"source": SOURCE_OF}, "plan.json": {"recipe": as_json(S.recipe), "draft_scales": S.release.draft_scales},
          "verify.json": {"release": as_json(S.release)}, "perplexity.json": {"evaluation": as_json(scoring(S.evaluation))}}
MADE_FROM = [*PARAMS["plan.json"].values(), *SOURCE_OF]  # of what is made of a plan: a refused run leaves no plan, and must be refused again
serving_code = lambda *names: [f"stages/serving/{name}.py" for name in names]
PYTHON, SETTINGS = shlex.quote(sys.executable), shlex.join(OVERRIDES)  # filled in late: they are no part of a rule's code
stage = lambda name, extra="": (f"{{PYTHON}} -m stages.{name} {{SETTINGS}} {extra} 2>&1 | tee {{log:q}} "
                                f"| sed -u 's/^/{name:16} | /'")
workflow.global_resources.setdefault("lane", S.device.lane)  # source shards on disk and in work at any time
workflow.global_resources.setdefault("server", 1)  # one model at a time is run
wildcard_constraints: shard="|".join(map(re.escape, SHARDS))
localrules: all

rule all:
    input: RELEASE, [f"{RUN}/{name}" for name in RESULTS], expand(f"{RUN}/shards/{{shard}}.safetensors", shard=SHARDS)

rule download_metadata:
    input: FILES
    output: listing=f"{SOURCE}/listing.json", headers=f"{SOURCE}/headers.json", auxiliary=directory(f"{SOURCE}/auxiliary")
    params: **PARAMS["listing.json"], format=RESULTS_FORMAT, files=[WATCHED[path] for path in FILES]
    log: f"{SOURCE}/logs/metadata.log"
    shell: stage("download", "--metadata")

rule inspect_format:
    input: rules.download_metadata.output
    output: f"{RUN}/inspect.json"
    params: code=CODE
    log: f"{RUN}/logs/inspect_format.log"
    shell: stage("inspect_format")

def known_results(wildcards):
    """Nothing; ends the run where results of other settings would be taken for these: Snakemake has no record of how they were made, or
    they are not what it recorded, because somebody ran a stage by hand."""
    for stale in of_other_settings(S):
        record = workflow.persistence.metadata(IOFile(str(stale)))
        if record is None or (stale.name in PARAMS and {repr(value) for value in PARAMS[stale.name].values()} <= set(record["params"])):
            sys.exit(f"error: {stale} was made for other settings, and not by a run that this working directory knows of: remove it, or choose other results=")
    return []

rule plan:
    input: f"{RUN}/inspect.json", known_results
    output: f"{RUN}/plan.json"
    params: code=CODE, **PARAMS["plan.json"]
    log: f"{RUN}/logs/plan.log"
    shell: stage("plan")

rule download_shard:
    input: f"{RUN}/plan.json", [f"{S.source.path}/{{shard}}.safetensors"] if S.source.path else []
    output: temp(f"{RUN}/source/{{shard}}.safetensors")
    log: f"{RUN}/logs/download_shard/{{shard}}.log"
    resources: lane=1
    group: "shard"
    shell: stage("download", "--shard {wildcards.shard:q}.safetensors")

rule quantize_experts:
    input: plan=f"{RUN}/plan.json", source=f"{RUN}/source/{{shard}}.safetensors"
    output: shard=f"{RUN}/shards/{{shard}}.safetensors", receipt=f"{RUN}/shards/{{shard}}.json"
    log: f"{RUN}/logs/quantize_experts/{{shard}}.log"
    params: code=CODE, made_from=MADE_FROM, source=lambda wildcards: WATCHED.get(f"{S.source.path}/{wildcards.shard}.safetensors")
    benchmark: f"{RUN}/benchmarks/quantize_experts/{{shard}}.tsv"
    resources: lane=1, mem_mb=S.device.memory_mb
    priority: 10
    group: "shard"
    shell: stage("quantize_experts", "--shard {wildcards.shard:q}.safetensors")

rule validate_gemm:
    input: f"{RUN}/plan.json", expand(f"{RUN}/shards/{{shard}}.json", shard=SHARDS)
    output: f"{RUN}/gemm.json"
    params: tensors=S.evaluation.gemm_tensors, tokens=S.evaluation.gemm_tokens, code=code_of("stages/validate_gemm.py", "kernels/gemm")
    log: f"{RUN}/logs/validate_gemm.log"
    shell: stage("validate_gemm")

rule assemble_release:
    input: f"{RUN}/plan.json", rules.download_metadata.output.listing, PLUGIN, expand(f"{RUN}/shards/{{shard}}.json", shard=SHARDS)
    output: RELEASE
    params: made_from=MADE_FROM, files=[WATCHED[path] for path in FILES], code=code_of("stages/assemble_release.py")
    log: f"{RUN}/logs/assemble_release.log"
    shell: stage("assemble_release")

rule verify_release:
    input: RELEASE, expand(f"{RUN}/shards/{{shard}}.safetensors", shard=SHARDS)
    output: f"{RUN}/verify.json"
    params: **PARAMS["verify.json"], code=code_of("stages/verify_release.py", "kernels/energy.py", "kernels/decibels.py")
    log: f"{RUN}/logs/verify_release.log"
    threads: 64  # as many as there are
    shell: stage("verify_release")

rule evaluate:
    input: RELEASE, ancient(f"{RUN}/verify.json"), TEXT, SERVER if S.evaluation.via == "vllm" else []
    output: f"{RUN}/sqnr.json", f"{RUN}/perplexity.json"
    params: **PARAMS["perplexity.json"], text=WATCHED[TEXT], server=as_json(S.serving) if S.evaluation.via == "vllm" else "",
        code=code_of("stages/evaluate.py", "stages/models", *(serving_code("score", "launcher") if S.evaluation.via == "vllm" else []))
    resources: mem_mb=int(1000 * S.evaluation.memory_gb), server=1
    log: f"{RUN}/logs/evaluate.log"
    threads: 64  # as many as there are
    shell: stage("evaluate")

rule serve_environment:
    input: ingredients()
    output: "{environment}/installed.json"
    params: made_of=fingerprint()
    wildcard_constraints: environment=re.escape(S.serving.environment or "-")
    shell: "{PYTHON} -m stages.serving.environment --directory {wildcards.environment:q}"

rule serve_bench:
    input: RELEASE, ancient(f"{RUN}/verify.json"), SERVER
    output: f"{RUN}/serving.json"
    params: serving=as_json(S.serving), code=code_of("stages/serve_bench.py", *serving_code("launcher", "load", "statistics"))
    resources: server=1
    log: f"{RUN}/logs/serve_bench.log"
    threads: 64  # as many as there are
    shell: stage("serve_bench")

rule report:
    input: f"{RUN}/plan.json", f"{RUN}/verify.json", f"{RUN}/gemm.json", f"{RUN}/sqnr.json", f"{RUN}/perplexity.json", f"{RUN}/serving.json"
    output: f"{RUN}/report.html", f"{RUN}/card.md", f"{RUN}/metrics.json", f"{RUN}/settings.yaml"
    params: settings=[as_json(part) for part in (S.source, S.recipe, S.release)], code=code_of("stages/report.py", "stages/plots.py", *serving_code("commands", "plots"), *TEMPLATES)
    log: f"{RUN}/logs/report.log"
    shell: stage("report")
