"""What vLLM calls the modules of a model: one row per architecture of config.json, read from vLLM 0.32's model code.

A config that quantizes is matched against runtime names, which are not the checkpoint's: prefixes are mapped, projections
are merged, draft layers get names of their own, and some modules never see the config. An architecture that has no row is
not converted, because nothing could be proven of its config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.dialects.roles import TEXT_ROOT

QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
STANDARD = {**QKV, **GATE_UP}
VLLM, TRANSFORMERS = "vLLM 0.32", "transformers"
SWIGLU, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
EMBEDDING, HEAD = "VocabParallelEmbedding", "ParallelLMHead"
INSIDE = "language_model.model"  # root of a text model that is part of another
DRAFT_LAYER = re.compile(rf"{TEXT_ROOT}\.layers\.(\d+)\.(.*)")

# leaf of a runtime name -> the class that vLLM builds, which class-name targets are compared with
CLASSES = (
    (r".*(embed_tokens|word_embeddings|\.embeddings)$", EMBEDDING), (r".*(lm_head|shared_head\.head|\.head)$", HEAD),
    (r".*(qkv_proj|qkv|query_key_value)$", "QKVParallelLinear"), (r".*(gate_up_proj|in_proj_qkvz|in_proj_ba)$", "MergedColumnParallelLinear"),
    (r".*fused_qkv_a_proj$", "DeepSeekV2FusedQkvAProjLinear"), (r".*(kv_a_proj_with_mqa|shared_expert_gate)$", "ReplicatedLinear"),
    (r".*\.gate$", "GateLinear"), (r".*(o_proj|out_proj|down_proj|fc2|attention\.dense)$", "RowParallelLinear"),
    (r".*", "ColumnParallelLinear"),
)


@dataclass(frozen=True)
class EngineRun:
    """Releases that an engine was really given, by their form (see engines.form_of), and what came of it."""

    engine: str
    loads: str  # yes | no
    how: str
    forms: tuple[str, ...] = ("experts mxfp4",)


@dataclass(frozen=True)
class Architecture:
    """Names of one family of models in vLLM."""

    names: tuple[str, ...]  # as config.json spells them
    renames: tuple[tuple[str, str], ...] = ()  # regular expressions, checkpoint module -> runtime name, applied in order; vLLM applies them to
    # plain names in a config, too
    inner: tuple[tuple[str, str], ...] = ()  # the same, behind those, for modules only
    root: str = "model"  # what the runtime names of the text model's layers begin with: vLLM stops at others
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: STANDARD)  # runtime leaf -> the checkpoint's leaves
    visible: tuple[str, ...] = ("qkv_proj", "gate_up_proj")  # merged leaves whose parts the config may name, too
    unseen: str = r"(?!)"  # modules that know nothing of `visible`: only their own names count
    never: str = r"(?!)"  # modules that no quantization config reaches
    expanded: str = r"(?!)"  # of these, those that the loader decodes from FP8 itself
    draft: tuple[tuple[str, str], ...] = ()  # renames of what follows `layers.N.` in layers past num_hidden_layers
    draftless: bool = False  # vLLM stops at draft layers that a checkpoint has
    probes: tuple[str, ...] = SWIGLU  # projections of expert 0 whose targets decide for all experts
    experts: tuple[str, ...] = SWIGLU  # projections under which the checkpoint must store experts to be loaded
    stacked: bool = False  # the loader reads quantized experts that are stacked in 3D, too
    projector: str | None = None  # beginning of the names of what joins the vision tower to the text model
    tied: bool = False  # whether the head is the embedding where config.json does not say
    text: tuple[str, ...] = ()  # model types of text_config that the row is of, where vLLM builds the architecture around any text model
    needed: str | None = None  # what each layer with experts must have: without it vLLM routes by uninitialized memory and says nothing
    borrowed: bool = False  # vLLM has no class of its own: it runs that of transformers, in which modules are merged or not by its version
    plugin: bool = False  # a release bundles the plugin that vLLM needs for its draft layers
    in_process: tuple[str, ...] = ()  # of the names, those that stages/models can run
    tried: tuple[EngineRun, ...] = ()  # what was really run, with the first of `names`
    cautions: tuple[str, ...] = ()  # what a user of the release must know
    refused: str | None = None  # why a release of it would not load


_NEVER = r".*\.(mlp|moe|block_sparse_moe)\.(gate|router|shared_expert_gate)$|.*\.eh_proj$|.*\.conv1d?$"
_DEEPSEEK = {**GATE_UP, "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
_QWEN_LINEAR = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
_MINIMAX = {"qkv_proj": ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"), **GATE_UP}
_LIMITS = "whether vLLM passes the limits on to MXFP4 experts is open (vllm#51028)"
_M3 = {
    "merged": _MINIMAX, "experts": MIXTRAL, "projector": r"multi_modal_projector\.",
    "renames": ((r"^multi_modal_projector\.", "vision_tower.multi_modal_projector."), (r"^patch_merge_mlp\.", "vision_tower.patch_merge_mlp.")),
    "inner": ((r"\.mlp\.fc(\d)$", r".fc\1"),), "never": _NEVER.replace(r".*\.eh_proj$|", ""),
    "cautions": ("its experts limit their activations; " + _LIMITS,)}
_INTERN = {  # around Qwen3-MoE, whose router sees the config; the tower is built without it
    "root": INSIDE, "visible": ("qkv_proj",), "never": r"(vision_tower|multi_modal_projector)\..*", "text": ("qwen3_moe",),
    "projector": r"(model\.)?multi_modal_projector\.",
    "renames": ((r"^lm_head", "language_model.lm_head"), (r"^model\.language_model\.", "language_model.model."),
                (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."))}
_LING = {"merged": GATE_UP, "visible": ("gate_up_proj",), "never": _NEVER, "draftless": True}  # q, k and v are stored merged, as query_key_value


def _run(*forms: str, transformers: tuple[str, ...] = ()) -> tuple[EngineRun, ...]:
    """The small random models of tests/serving/test_families_in_vllm.py and tests/test_families.py."""
    same = "log-probabilities are those of the same values in BF16"
    return (EngineRun(VLLM, "yes", f"a small random model was run on a CPU, weights expanded when loaded: {same}; no GPU's kernel was", forms),
            *([EngineRun(TRANSFORMERS, "yes", f"5.23 with compressed-tensors 0.20, a small random model: {same}", transformers)] if transformers else ()))


ARCHITECTURES = (
    Architecture(
        ("Step3p7ForConditionalGeneration", "Step3p5ForCausalLM"), root=INSIDE,
        renames=((r"^model\.vision_model\.", "vision_model."), (r"^model\.vit_large_projector", "vit_large_projector"),
                 (r"^model\.language_model\.(?!model\.)", "language_model.model."), (r"^model\.", "language_model.model."),
                 (r"^lm_head", "language_model.lm_head"), (r"\.share_expert\.", ".moe.share_expert."),
                 (r"\.mlp\.c_fc$", ".mlp.fc1"), (r"\.mlp\.c_proj$", ".mlp.fc2")),
        inner=((r"\.attn\.in_proj$", ".attn.qkv_proj"),),
        unseen=r"model\.layers\.|vision_model\.|vit_large_projector",  # drafts and tower are built before the mapping is set
        never=_NEVER + r"|.*embed_tokens$|.*vit_downsampler\d$",
        stacked=True, projector=r"(model\.)?vit_large_projector\.", plugin=True, in_process=("Step3p7ForConditionalGeneration",),
        tried=(EngineRun(VLLM, "yes", "run on a CPU with the plugin that the release bundles; without it the draft layers do not load",
                     ("experts mxfp4", "stacked experts mxfp4", "experts mxfp4, rest mxfp8")),
               EngineRun(TRANSFORMERS, "no", "5.19 leaves the experts of this model at random values, with only a warning; mxforge expands them "
                                         "itself before it measures")),
        draft=((r"^transformer\.shared_head\.output$", "shared_head.head"), (r"^(?!shared_head|eh_proj)", "mtp_block."))),
    Architecture(
        ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"), merged=_DEEPSEEK,
        visible=("gate_up_proj", "fused_qkv_a_proj"), never=_NEVER + r"|.*\.indexer\.(wk|weights_proj)$", expanded=r".*\.indexer\.wk$",
        draft=((r"^shared_head\.head$", "head"),),
        tried=_run("experts mxfp4, rest fp8 128x128, drafts fp8 128x128", "experts mxfp4, rest mxfp4", transformers=("experts mxfp4",))),
    Architecture(("DeepseekV2ForCausalLM",), merged=_DEEPSEEK, visible=("gate_up_proj", "fused_qkv_a_proj"), never=_NEVER,
                 tried=_run("experts mxfp4", "experts mxfp4, rest mxfp8")),
    Architecture(("KimiK25ForConditionalGeneration",), root=INSIDE, merged=_DEEPSEEK, projector=r"mm_projector\.",
                 visible=("gate_up_proj", "fused_qkv_a_proj"), never=_NEVER + r"|(vision_tower|mm_projector)\..*", tried=_run("experts mxfp4")),
    Architecture(("Qwen3MoeForCausalLM",), visible=("qkv_proj",), never=r".*\.shared_expert_gate$",  # its router sees the config
                 tried=_run("experts mxfp4, rest fp8 128x128", "experts mxfp8", "experts mxfp4, rest mxfp4", transformers=("experts mxfp4",))),
    Architecture(
        ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration"), root=INSIDE, merged={**STANDARD, **_QWEN_LINEAR},
        renames=((r"^model\.visual\.", "visual."), (r"^lm_head", "language_model.lm_head"),
                 (r"^model\.language_model\.", "language_model.model.")),
        visible=("qkv_proj", "gate_up_proj", "in_proj_qkvz", "in_proj_ba"),
        never=_NEVER + r"|visual\.(pos_embed|patch_embed).*", projector=r"model\.visual\.merger\.",
        tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128 and plain, drafts fp8 128x128", "experts mxfp4, rest mxfp8",
                   "experts mxfp4, rest mxfp4")),
    Architecture(  # the text model alone, under the names that it has in the whole one, or shorter ones
        ("Qwen3_5MoeForCausalLM", "Qwen3_5ForCausalLM"), merged={**STANDARD, **_QWEN_LINEAR},
        renames=((r"^model\.language_model\.", "model."),), visible=("qkv_proj", "gate_up_proj", "in_proj_qkvz", "in_proj_ba"),
        never=_NEVER + r"|model\.embed_tokens$", tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128 and plain, drafts fp8 128x128")),
    Architecture(
        ("Qwen3VLMoeForConditionalGeneration",), visible=("qkv_proj",), never=r"visual\.(pos_embed|patch_embed).*",  # its router sees the config
        root=INSIDE, projector=r"model\.visual\.merger\.",
        renames=((r"^model\.visual\.", "visual."), (r"^lm_head", "language_model.lm_head"),
                 (r"^model\.language_model\.", "language_model.model.")),
        tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128", "experts mxfp4, rest mxfp8", "experts mxfp4, rest mxfp4")),
    Architecture(("InternS1ForConditionalGeneration",), **_INTERN, tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128")),
    Architecture(("InternVLForConditionalGeneration",), **_INTERN, tried=_run("experts mxfp4")),  # the same class of vLLM's
    # its in_proj_qkvz and in_proj_ba are stored merged, rows interleaved by head; embedding and head never see the config
    Architecture(("Qwen3NextForCausalLM",), never=_NEVER + r"|lm_head$|model\.embed_tokens$",
                 tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128 and plain, drafts fp8 128x128", "experts mxfp4, rest mxfp8")),
    Architecture(("Glm4MoeForCausalLM",), never=_NEVER, draft=((r"^shared_head\.head$", "head"),),
                 tried=_run("experts mxfp4", "experts mxfp4, rest mxfp8, drafts fp8 128x128", transformers=("experts mxfp4",))),
    Architecture(
        ("Glm4vMoeForConditionalGeneration",), never=_NEVER + r"|visual\.(patch_embed|embeddings|downsample).*", projector=r"model\.visual\.merger\.",
        root=INSIDE,
        renames=((r"^model\.visual\.", "visual."), (r"^lm_head", "language_model.lm_head"),
                 (r"^model\.language_model\.", "language_model.model.")),
        inner=((r"^(visual\..*\.attn\.qkv)$", r"\1_proj"),),
        tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128", "experts mxfp4, rest mxfp8")),
    Architecture(("MiniMaxM2ForCausalLM",), inner=((r"\.block_sparse_moe\.experts\.", ".mlp.experts."),), visible=("qkv_proj",),
                 never=_NEVER, probes=MIXTRAL, experts=MIXTRAL,
                 tried=_run("experts mxfp4, rest fp8 128x128", transformers=("experts mxfp4",))),
    Architecture(("MiniMaxM3SparseForConditionalGeneration",), root=INSIDE, **_M3),
    Architecture(("MiniMaxM3SparseForCausalLM",), **_M3),
    # K-EXAONE 2 has the second name; embedding and head of it and of Trinity see the config without names, or not at all
    Architecture(
        ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"), never=_NEVER + r"|lm_head$|model\.embed_tokens$",
        needed="mlp.e_score_correction_bias",
        tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128 and plain", "experts mxfp4, rest fp8 128x128, drafts fp8 128x128",
                   "experts mxfp4, rest mxfp8"),
        cautions=("where config.json has swiglu_limits (K-EXAONE 2): " + _LIMITS,)),
    Architecture(("AfmoeForCausalLM",), inner=((r"\.router\.gate$", ".gate"),), never=_NEVER + r"|lm_head$|model\.embed_tokens$",
                 needed="mlp.expert_bias",
                 tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128 and plain", "experts mxfp4, rest mxfp8")),
    Architecture(("HYV3ForCausalLM",), inner=((r"\.router\.gate$", ".gate"),), draft=((r"\.router\.gate$", ".gate"),),
                 never=_NEVER + r"|model\.embed_tokens$", needed="mlp.expert_bias",
                 tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128, drafts fp8 128x128", "experts mxfp4, rest mxfp8")),
    Architecture(("Ernie4_5_MoeForCausalLM",), tied=True, never=_NEVER, tried=_run("experts mxfp4", "experts mxfp4, rest mxfp8")),
    Architecture(("BailingMoeV2ForCausalLM",), **_LING, tried=_run("experts mxfp4", "experts mxfp4, rest fp8 128x128", "experts mxfp4, rest mxfp8")),
    Architecture(("BailingMoeForCausalLM",), **_LING, tried=_run("experts mxfp4")),
    Architecture(  # its draft layers lie under model.mtp; they are built before the mapping is set
        ("MiMoV2FlashForCausalLM",), unseen=r"model\.mtp\.", never=_NEVER + r"|model\.mtp\..*\.o_proj$",
        tried=_run("experts mxfp4", "experts mxfp4, rest mxfp8, drafts fp8 128x128"),
        cautions=("vLLM runs the first of its draft layers only, and cannot split their FP8 attention over 8 GPUs",)),
    Architecture(("MiMoV2ForCausalLM",), merged=GATE_UP, visible=("gate_up_proj",),
                 refused="its qkv_proj is stored as the parts of several GPUs one behind the other, which vLLM puts in order only where it is FP8 as "
                         "published; in a release it would load wrong silently"),
    Architecture(
        ("Dots1ForCausalLM",), borrowed=True, never=_NEVER, tried=_run("experts mxfp4"),
        cautions=("vLLM 0.32 has no class of its own for it and runs that of transformers, which was 5.19 where it was tried",)),
    Architecture(("MixtralForCausalLM",), visible=("qkv_proj",), never=_NEVER, probes=MIXTRAL, experts=MIXTRAL,
                 tried=_run("experts mxfp4", transformers=("experts mxfp4",))),
    Architecture(("Qwen3ForCausalLM",), tried=_run("rest mxfp4")),
    Architecture(("Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")),
    Architecture(("GptOssForCausalLM",), renames=((r"\.self_attn\.", ".attn."),), inner=((r"\.embed_tokens$", ".embedding"),), visible=("qkv_proj",),
                 never=_NEVER + "|lm_head",
                 refused="vLLM loads its experts in gpt-oss's own MXFP4 layout only, which mxforge does not write; the published checkpoint has it and is "
                    "served as it is"),
)
UNKNOWN = Architecture(())  # names are taken to be the checkpoint's
_BY_NAME = {name: row for row in ARCHITECTURES for name in row.names}


def architecture_of(name: str | None) -> Architecture | None:
    """The row of an architecture, None where there is none."""
    return _BY_NAME.get(name)


def runtime_name(module: str, row: Architecture, text_layers: int) -> str:
    """Checkpoint module name (no `.weight`) -> vLLM's name of it, before merging."""
    layer = DRAFT_LAYER.match(module)
    if layer and int(layer.group(1)) >= text_layers:  # draft models have names of their own and no mapper
        rest = layer.group(2)
        for pattern, replacement in row.draft:
            rest = re.sub(pattern, replacement, rest)
        return f"model.layers.{layer.group(1)}.{rest}"
    for pattern, replacement in (*row.renames, *row.inner):
        module = re.sub(pattern, replacement, module)
    return module


def config_name(entry: str, row: Architecture) -> str:
    """A target or an ignore entry as vLLM's mapper leaves it: of plain names with a dot that of the module, all others as they are."""
    if "." in entry and not entry.startswith("re:"):
        for pattern, replacement in row.renames:
            entry = re.sub(pattern, replacement, entry)
    return entry
