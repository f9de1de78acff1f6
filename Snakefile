# The whole conversion as a table of contents. Settings live in conf/, what a node does in stages/<node>.py.
#   snakemake --cores all --config source=step37_fp8 recipe=mxfp4_experts 'overrides=["device.lane=4"]'
import re, sys
from snakemake.io import IOFile
sys.path.insert(0, workflow.basedir)
from stages import download, plan
from stages.errors import UserError
from stages.provenance import code_of
from stages.serving.environment import fingerprint, ingredients
from stages.settings import as_json
from stages.settings.handed_over import hand_over
from stages.workflow import RESULTS, Workflow, serving_code, stage
try:
    W = Workflow(config)
except UserError as error:
    sys.exit(f"error: {error}")

hand_over(W.overrides, W.settings)  # to the stages
W.unprotect()  # what DVC has write-protected
S, RUN, SOURCE = W.settings, W.run, W.source
RELEASE, CODE = f"{RUN}/release/manifest.json", W.converting
workflow.global_resources.setdefault("lane", S.device.lane)  # source shards on disk and in work at any time
workflow.global_resources.setdefault("server", 1)  # one model at a time is run
wildcard_constraints: shard="|".join(map(re.escape, W.shards))
localrules: all

onerror:
    print("stopped: correct what the line with `error:` above says, if there is one, and run the same command again; what is finished is kept",
          file=sys.stderr)

rule all:
    input: RELEASE, [f"{RUN}/{name}" for name in RESULTS], expand(f"{RUN}/shards/{{shard}}.safetensors", shard=W.shards)

rule download_metadata:
    input: W.files
    output: listing=f"{SOURCE}/listing.json", headers=f"{SOURCE}/headers.json", auxiliary=directory(f"{SOURCE}/auxiliary")
    params: **W.params("listing.json"), code=code_of("stages/download.py", "stages/sources", "stages/checkpoint/header.py")
    log: f"{SOURCE}/logs/metadata.log"
    shell: stage("download", "--metadata")

rule inspect_format:
    input: rules.download_metadata.output
    output: f"{RUN}/inspect.json"
    params: code=CODE
    log: f"{RUN}/logs/inspect_format.log"
    shell: stage("inspect_format")

def known_results(wildcards):
    W.refuse_foreign_results(lambda path: workflow.persistence.metadata(IOFile(str(path))), download.refuse, plan.refuse)
    return []

rule plan:
    input: f"{RUN}/inspect.json", known_results
    output: f"{RUN}/plan.json"
    params: code=CODE, **W.params("plan.json")
    log: f"{RUN}/logs/plan.log"
    shell: stage("plan")

if S.source.repository:
    rule download_shard:
        input: f"{RUN}/plan.json"
        output: temp(f"{S.shard_directory}/{{shard}}.safetensors")
        log: f"{RUN}/logs/download_shard/{{shard}}.log"
        resources: lane=1
        group: "shard"
        shell: stage("download", "--shard {wildcards.shard:q}.safetensors")

rule quantize_experts:
    input: plan=f"{RUN}/plan.json", source=f"{S.shard_directory}/{{shard}}.safetensors"
    output: shard=f"{RUN}/shards/{{shard}}.safetensors", receipt=f"{RUN}/shards/{{shard}}.json"
    log: f"{RUN}/logs/quantize_experts/{{shard}}.log"
    params: code=CODE, **W.params("shards"), source=lambda wildcards: W.watched.get(f"{S.shard_directory}/{wildcards.shard}.safetensors")
    resources: lane=1, mem_mb=S.device.memory_mb
    priority: 10
    group: "shard"
    shell: stage("quantize_experts", "--shard {wildcards.shard:q}.safetensors")

rule validate_gemm:
    input: f"{RUN}/plan.json", expand(f"{RUN}/shards/{{shard}}.json", shard=W.shards)
    output: f"{RUN}/gemm.json"
    params: **W.params("gemm.json"), code=code_of("stages/validate_gemm.py", "stages/gemm_summary.py", "kernels/gemm", "kernels/decibels.py")
    log: f"{RUN}/logs/validate_gemm.log"
    shell: stage("validate_gemm")

rule assemble_release:
    input: f"{RUN}/plan.json", rules.download_metadata.output.listing, W.plugin, expand(f"{RUN}/shards/{{shard}}.json", shard=W.shards)
    output: RELEASE
    params: **W.params("shards"), files=[W.watched[path] for path in W.files], code=code_of("stages/assemble_release.py", "stages/release.py")
    log: f"{RUN}/logs/assemble_release.log"
    shell: stage("assemble_release")

rule verify_release:
    input: RELEASE, expand(f"{RUN}/shards/{{shard}}.safetensors", shard=W.shards)
    output: f"{RUN}/verify.json"
    params: **W.params("verify.json"), code=code_of("stages/verify_release.py", "stages/release.py", "kernels/energy.py", "kernels/decibels.py")
    log: f"{RUN}/logs/verify_release.log"
    threads: 64  # as many as there are
    shell: stage("verify_release")

rule evaluate:
    input: RELEASE, ancient(f"{RUN}/verify.json"), W.text, W.server if W.served else []
    output: f"{RUN}/sqnr.json", f"{RUN}/perplexity.json"
    params: **W.params("perplexity.json", server=as_json(S.serving) if W.served else ""),
        code=code_of("stages/evaluate.py", "stages/tokenizer.py", "stages/models", "kernels/decibels.py",
                     *(serving_code("score", "launcher", "secrets") if W.served else []))
    resources: mem_mb=int(1000 * S.evaluation.memory_gb), server=1
    log: f"{RUN}/logs/evaluate.log"
    threads: 64  # as many as there are
    shell: stage("evaluate")

rule serve_environment:
    input: ingredients()
    output: "{environment}/installed.json"
    params: made_of=fingerprint()
    wildcard_constraints: environment=re.escape(S.serving.environment or "-")
    shell: "{W.python} -m stages.serving.environment --directory {wildcards.environment:q}"

rule serve_bench:
    input: RELEASE, ancient(f"{RUN}/verify.json"), W.server, W.prompts
    output: f"{RUN}/serving.json"
    params: **W.params("serving.json"),
        code=code_of("stages/serve_bench.py", "stages/tokenizer.py", *serving_code("launcher", "load", "secrets", "statistics"))
    resources: server=1
    log: f"{RUN}/logs/serve_bench.log"
    threads: 64  # as many as there are
    shell: stage("serve_bench")

rule report:
    input: f"{RUN}/plan.json", f"{RUN}/verify.json", f"{RUN}/gemm.json", f"{RUN}/sqnr.json", f"{RUN}/perplexity.json", f"{RUN}/serving.json"
    output: f"{RUN}/report.html", f"{RUN}/card.md", f"{RUN}/metrics.json", f"{RUN}/settings.yaml"
    params: **W.params(settings=[as_json(part) for part in (S.source, S.recipe, S.release)]),
        code=code_of("stages/report.py", "stages/gemm_summary.py", "stages/plots.py", *serving_code("commands", "plots"),
                     "stages/templates/card.md.j2", "stages/templates/report.html.j2")
    log: f"{RUN}/logs/report.log"
    shell: stage("report")
