"""Tensor inventories and config fields of published checkpoints, for header-only ("meta") checkpoints in tests.

Every inventory is a table with one row per group of tensors: kind, shape, names. In a name, "[0-60]" runs over numbers
and "[q_proj,k_proj]" over words. The kind is a safetensors dtype (the names are then complete), "biased" (BF16 weight
and bias) or a scheme of `linear` (weight with its scales). Configs hold the fields that decide on tensors.
Facts only; `# unconfirmed` marks what no public source at hand settled.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Tensors = dict[str, tuple[str, tuple[int, ...]]]
Config = dict[str, Any]

DTYPE_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1, "I32": 4}


@dataclass(frozen=True)
class Family:
    """One published checkpoint: its repository, the config.json fields that matter and its tensors."""

    repository: str
    config: Config
    tensors: Callable[[], Tensors]

    @property
    def total_size(self) -> int:
        """Bytes of all tensors, as "total_size" in an index file (safetensors headers not counted)."""
        return sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in self.tensors().values())


def linear(name: str, kind: str, rows: int, columns: int) -> Tensors:
    """The tensors of one linear layer under a scheme."""
    weight = f"{name}.weight"
    blocks = (math.ceil(rows / 128), math.ceil(columns / 128))
    if kind == "int4":
        return {
            f"{weight}_packed": ("I32", (rows, columns // 8)),
            f"{weight}_scale": ("BF16", (rows, columns // 32)),
            f"{weight}_shape": ("I32", (2,)),
        }
    scales: dict[str, Tensors] = {
        "bf16": {},
        "block_f32": {f"{weight}_scale_inv": ("F32", blocks)},
        "block_bf16": {f"{weight}_scale_inv": ("BF16", blocks)},
        "channel": {f"{weight}_scale": ("F32", (rows, 1))},  # unconfirmed: F32 (only it fits the size of GLM-4.5-Air-FP8)
        "mxfp8": {f"{weight}_scale_inv": ("U8", (rows, columns // 32))},
    }
    return {weight: ("BF16" if kind == "bf16" else "F8_E4M3", (rows, columns))} | scales[kind]


def names(pattern: str) -> list[str]:
    """All names of a pattern."""
    choices = []
    for part in re.split(r"\[(.*?)\]", pattern):
        first, _, last = part.partition("-")
        numbers = first.isdigit() and last.isdigit()
        choices.append([str(number) for number in range(int(first), int(last) + 1)] if numbers else part.split(","))
    return ["".join(parts) for parts in itertools.product(*choices)]


def expand(table: str) -> Tensors:
    """All tensors of a table."""
    found: Tensors = {}
    for kind, sizes, pattern in (row.split() for row in table.strip().splitlines()):
        shape = tuple(int(size) for size in sizes.split("x"))
        for name in names(pattern):
            if kind in DTYPE_BYTES:
                found[name] = (kind, shape)
            elif kind == "biased":
                found |= {f"{name}.weight": ("BF16", shape), f"{name}.bias": ("BF16", shape[:1])}
            else:
                found |= linear(name, kind, *shape)
    return found


def attention(prefix: str, hidden: int, queries: int, keys: int, scheme: str, *, gated: bool = False) -> str:
    """Rows of grouped-query attention; gated: q_proj also makes the output gate."""
    return f"""
{scheme} {queries * (1 + gated)}x{hidden} {prefix}.q_proj
{scheme} {keys}x{hidden} {prefix}.[k_proj,v_proj]
{scheme} {hidden}x{queries} {prefix}.o_proj"""


def experts(prefix: str, hidden: int, inner: int, scheme: str, into: str = "gate_proj,up_proj", out: str = "down_proj") -> str:
    """Rows of gated MLPs: routed experts, shared experts or a dense MLP."""
    return f"\n{scheme} {inner}x{hidden} {prefix}.[{into}]\n{scheme} {hidden}x{inner} {prefix}.{out}"


def body(prefix: str, hidden: int, vocabulary: int, layers: str, head: str = "lm_head") -> str:
    """Rows that every decoder has: embedding, head and norms."""
    return f"""
BF16 {vocabulary}x{hidden} [{prefix}.embed_tokens,{head}].weight
BF16 {hidden} {prefix}.norm.weight
BF16 {hidden} {prefix}.layers.[{layers}].[input_layernorm,post_attention_layernorm].weight"""


def deepseek(layers: str, dense: str, moe: str, heads: int, routed: int, vocabulary: int, scheme: str, expert: str) -> str:
    """Rows of DeepSeek-V3 and Kimi-K2 without MTP extras; `scheme` is that of all layers but the routed experts."""
    attend, mlp = f"model.layers.[{layers}].self_attn", f"model.layers.[{moe}].mlp"
    return f"""
{scheme} 1536x7168 {attend}.q_a_proj
{scheme} {heads * 192}x1536 {attend}.q_b_proj
{scheme} 576x7168 {attend}.kv_a_proj_with_mqa
{scheme} {heads * 256}x512 {attend}.kv_b_proj
{scheme} 7168x{heads * 128} {attend}.o_proj
BF16 1536 {attend}.q_a_layernorm.weight
BF16 512 {attend}.kv_a_layernorm.weight
BF16 {routed}x7168 {mlp}.gate.weight
F32 {routed} {mlp}.gate.e_score_correction_bias""" + (
        body("model", 7168, vocabulary, layers)
        + experts(f"model.layers.[{dense}].mlp", 7168, 18432, scheme)
        + experts(f"{mlp}.experts.[0-{routed - 1}]", 7168, 2048, expert)
        + experts(f"{mlp}.shared_experts", 7168, 2048, scheme)
    )


def qwen3(layers: int, hidden: int, queries: int, keys: int, scheme: str) -> str:
    """Rows of Qwen3 without the MLPs."""
    attend = f"model.layers.[0-{layers - 1}].self_attn"
    return (
        body("model", hidden, 151936, f"0-{layers - 1}")
        + attention(attend, hidden, queries, keys, scheme)
        + f"\nBF16 128 {attend}.[q_norm,k_norm].weight"
    )


def qwen3_moe(layers: int, hidden: int, queries: int, inner: int) -> str:
    """Rows of Qwen3-MoE in FP8 (seen in Qwen3-30B-A3B-Thinking-2507-FP8)."""  # unconfirmed: same scales in the first release
    mlp = f"model.layers.[0-{layers - 1}].mlp"
    return (
        qwen3(layers, hidden, queries, 512, "block_bf16")
        + f"\nBF16 128x{hidden} {mlp}.gate.weight"
        + experts(f"{mlp}.experts.[0-127]", hidden, inner, "block_bf16")
    )


def qwen35_shared(layer: str, full: str) -> str:
    """Rows that a layer of Qwen3.5-35B-A3B and its MTP layer have in common; `full` names layers of full attention."""
    return f"""
BF16 256x2048 {layer}.mlp.gate.weight
BF16 1x2048 {layer}.mlp.shared_expert_gate.weight
BF16 256 {full}.self_attn.[q_norm,k_norm].weight""" + (
        experts(f"{layer}.mlp.shared_expert", 2048, 512, "bf16")
        + attention(f"{full}.self_attn", 2048, 4096, 512, "bf16", gated=True)
    )


def minimax_m3(scheme: str) -> str:
    """Rows of MiniMax-M3; no MTP tensors are published."""
    layers = "language_model.model.layers"
    attend, moe, vision = f"{layers}.[3-59].self_attn", f"{layers}.[3-59].block_sparse_moe", "vision_tower.vision_model"
    return f"""
BF16 128 {layers}.[0-59].self_attn.[q_norm,k_norm].weight
BF16 128 {attend}.[index_q_norm,index_k_norm].weight
{scheme} 512x6144 {attend}.index_q_proj
{scheme} 128x6144 {attend}.index_k_proj
F32 128x6144 {moe}.gate.weight
F32 128 {moe}.e_score_correction_bias
F32 1280x3x2x14x14 {vision}.embeddings.patch_embedding.weight
biased 1280 {vision}.pre_layrnorm
biased 1280 {vision}.encoder.layers.[0-31].[layer_norm1,layer_norm2]
biased 1280x1280 {vision}.encoder.layers.[0-31].self_attn.[q_proj,k_proj,v_proj,out_proj]
biased 5120x1280 {vision}.encoder.layers.[0-31].mlp.fc1
biased 1280x5120 {vision}.encoder.layers.[0-31].mlp.fc2
biased 6144x1280 multi_modal_projector.linear_1
biased 6144x24576 patch_merge_mlp.linear_1
biased 6144x6144 [multi_modal_projector,patch_merge_mlp].linear_2""" + (
        body("language_model.model", 6144, 200064, "0-59", "language_model.lm_head")
        + attention(f"{layers}.[0-59].self_attn", 6144, 8192, 512, scheme)
        + experts(f"{layers}.[0-2].mlp", 6144, 12288, scheme)
        + experts(f"{moe}.shared_experts", 6144, 3072, scheme)
        + experts(f"{moe}.experts.[0-127]", 6144, 3072, scheme, "w1,w3", "w2")
    )


def gpt_oss(layers: int, routed: int) -> str:
    """Rows of gpt-oss: MXFP4 experts in blocks of 32 values, all else BF16."""
    layer = f"model.layers.[0-{layers - 1}]"
    attend, mlp = f"{layer}.self_attn", f"{layer}.mlp.experts"
    return f"""
BF16 64 {attend}.sinks
biased 4096x2880 {attend}.q_proj
biased 512x2880 {attend}.[k_proj,v_proj]
biased 2880x4096 {attend}.o_proj
biased {routed}x2880 {layer}.mlp.router
U8 {routed}x5760x90x16 {mlp}.gate_up_proj_blocks
U8 {routed}x5760x90 {mlp}.gate_up_proj_scales
BF16 {routed}x5760 {mlp}.gate_up_proj_bias
U8 {routed}x2880x90x16 {mlp}.down_proj_blocks
U8 {routed}x2880x90 {mlp}.down_proj_scales
BF16 {routed}x2880 {mlp}.down_proj_bias""" + body("model", 2880, 201088, f"0-{layers - 1}")


# Seen in DeepSeek-R1, which has the same layout; adding headers of some 130 bytes a tensor gives the bytes of V3's files.
DEEPSEEK_V3_ROWS = deepseek("0-61", "0-2", "3-61", 128, 256, 129280, "block_f32", "block_f32") + """
BF16 7168 model.layers.61.[enorm,hnorm,shared_head.norm].weight
BF16 7168x14336 model.layers.61.eh_proj.weight
BF16 129280x7168 model.layers.61.[embed_tokens,shared_head.head].weight"""

# DeepSeek-Coder-V2 and DeepSeek-V2.5 are the same. Sizes as public trainers have them; they add up to the published 235.7B parameters.
DEEPSEEK_V2_ROWS = """
BF16 1536 model.layers.[0-59].self_attn.q_a_layernorm.weight
BF16 512 model.layers.[0-59].self_attn.kv_a_layernorm.weight
bf16 1536x5120 model.layers.[0-59].self_attn.q_a_proj
bf16 24576x1536 model.layers.[0-59].self_attn.q_b_proj
bf16 576x5120 model.layers.[0-59].self_attn.kv_a_proj_with_mqa
bf16 32768x512 model.layers.[0-59].self_attn.kv_b_proj
bf16 5120x16384 model.layers.[0-59].self_attn.o_proj
BF16 160x5120 model.layers.[1-59].mlp.gate.weight""" + (
    body("model", 5120, 102400, "0-59")
    + experts("model.layers.[0-0].mlp", 5120, 12288, "bf16")
    + experts("model.layers.[1-59].mlp.experts.[0-159]", 5120, 1536, "bf16")
    + experts("model.layers.[1-59].mlp.shared_experts", 5120, 3072, "bf16")
)

# Sizes add up to the published 142.8B parameters.  # unconfirmed: F32 for the bias
DOTS1_ROWS = """
BF16 128 model.layers.[0-61].self_attn.[q_norm,k_norm].weight
BF16 128x4096 model.layers.[1-61].mlp.gate.weight
F32 128 model.layers.[1-61].mlp.gate.e_score_correction_bias""" + (
    body("model", 4096, 152064, "0-61")
    + attention("model.layers.[0-61].self_attn", 4096, 4096, 4096, "bf16")
    + experts("model.layers.[0-0].mlp", 4096, 10944, "bf16")
    + experts("model.layers.[1-61].mlp.experts.[0-127]", 4096, 1408, "bf16")
    + experts("model.layers.[1-61].mlp.shared_experts", 4096, 2816, "bf16")
)

# Kimi-K2 has no MTP layer, but a stray rotary buffer in every layer.
KIMI_K2_ROWS = deepseek("0-60", "0-0", "1-60", 64, 384, 163840, "block_f32", "block_f32") + """
BF16 56 model.layers.[0-60].self_attn.rotary_emb.inv_freq"""
# unconfirmed: dtype and shape of the buffer (its 256 bytes and the number of tensors are known)
KIMI_K2_THINKING_ROWS = deepseek("0-60", "0-0", "1-60", 64, 384, 163840, "bf16", "int4") + """
F32 64 model.layers.[0-60].self_attn.rotary_emb.inv_freq"""

# The MTP layer 92 has no embedding and no head, as in GLM-4.6 and unlike GLM-4.5 and 4.7.
# unconfirmed: vllm#31757 reports a "model.layers.92.shared_head.head.weight_scale" for GLM-4.6-FP8.
GLM46_ROWS = """
BF16 12288 model.layers.[0-92].self_attn.q_proj.bias
BF16 1024 model.layers.[0-92].self_attn.[k_proj,v_proj].bias
BF16 128 model.layers.[0-92].self_attn.[q_norm,k_norm].weight
BF16 160x5120 model.layers.[3-92].mlp.gate.weight
F32 160 model.layers.[3-92].mlp.gate.e_score_correction_bias
BF16 5120 model.layers.92.[enorm,hnorm,shared_head.norm].weight
BF16 5120x10240 model.layers.92.eh_proj.weight""" + (
    body("model", 5120, 151552, "0-92")
    + attention("model.layers.[0-92].self_attn", 5120, 12288, 1024, "channel")
    + experts("model.layers.[0-2].mlp", 5120, 12288, "channel")
    + experts("model.layers.[3-92].mlp.experts.[0-159]", 5120, 1536, "channel")
    + experts("model.layers.[3-92].mlp.shared_experts", 5120, 1536, "channel")
)

QWEN35_LAYERS = "model.language_model.layers"
QWEN35_FULL = f"{QWEN35_LAYERS}.[{','.join(str(layer) for layer in range(3, 40, 4))}]"
QWEN35_LINEAR = f"{QWEN35_LAYERS}.[{','.join(str(layer) for layer in range(40) if layer % 4 != 3)}].linear_attn"
# The experts are fused (3D) in the decoder, but single in the MTP layer.
QWEN35_ROWS = f"""
BF16 256x1024x2048 {QWEN35_LAYERS}.[0-39].mlp.experts.gate_up_proj
BF16 256x2048x512 {QWEN35_LAYERS}.[0-39].mlp.experts.down_proj
BF16 8192x2048 {QWEN35_LINEAR}.in_proj_qkv.weight
BF16 4096x2048 {QWEN35_LINEAR}.in_proj_z.weight
BF16 32x2048 {QWEN35_LINEAR}.[in_proj_a,in_proj_b].weight
BF16 2048x4096 {QWEN35_LINEAR}.out_proj.weight
BF16 8192x1x4 {QWEN35_LINEAR}.conv1d.weight
BF16 32 {QWEN35_LINEAR}.dt_bias
F32 32 {QWEN35_LINEAR}.A_log
F32 128 {QWEN35_LINEAR}.norm.weight
BF16 2048 mtp.[norm,pre_fc_norm_embedding,pre_fc_norm_hidden].weight
BF16 2048 mtp.layers.0.[input_layernorm,post_attention_layernorm].weight
BF16 2048x4096 mtp.fc.weight
biased 1152x3x2x16x16 model.visual.patch_embed.proj
BF16 2304x1152 model.visual.pos_embed.weight
biased 1152 model.visual.blocks.[0-26].[norm1,norm2]
biased 3456x1152 model.visual.blocks.[0-26].attn.qkv
biased 1152x1152 model.visual.blocks.[0-26].attn.proj
biased 4304x1152 model.visual.blocks.[0-26].mlp.linear_fc1
biased 1152x4304 model.visual.blocks.[0-26].mlp.linear_fc2
biased 1152 model.visual.merger.norm
biased 4608x4608 model.visual.merger.linear_fc1
biased 2048x4608 model.visual.merger.linear_fc2""" + (
    body("model.language_model", 2048, 248320, "0-39")
    + qwen35_shared(f"{QWEN35_LAYERS}.[0-39]", QWEN35_FULL)
    + qwen35_shared("mtp.layers.0", "mtp.layers.0")
    + experts("mtp.layers.0.mlp.experts.[0-255]", 2048, 512, "bf16")
)



def qwen35_text() -> Tensors:
    """Qwen3.5 without its vision tower, as its text model is published alone."""  # unconfirmed: stacked experts, as in the whole one
    return {name.replace("model.language_model.", "model."): entry for name, entry in expand(QWEN35_ROWS).items() if ".visual." not in name}


# Linear attention has q, k, v and z in one tensor, b and a in another. A draft layer lies under mtp; config.json does not count it.
QWEN3_NEXT_FULL = f"model.layers.[{','.join(str(layer) for layer in range(3, 48, 4))}]"
QWEN3_NEXT_LINEAR = f"model.layers.[{','.join(str(layer) for layer in range(48) if layer % 4 != 3)}].linear_attn"


def qwen3_next_shared(layer: str, full: str) -> str:
    """Rows that a layer of Qwen3-Next and its MTP layer have in common; `full` names layers of full attention."""
    return f"""
BF16 512x2048 {layer}.mlp.gate.weight
BF16 1x2048 {layer}.mlp.shared_expert_gate.weight
BF16 256 {full}.self_attn.[q_norm,k_norm].weight""" + (
        experts(f"{layer}.mlp.shared_expert", 2048, 512, "bf16")
        + experts(f"{layer}.mlp.experts.[0-511]", 2048, 512, "bf16")
        + attention(f"{full}.self_attn", 2048, 4096, 512, "bf16", gated=True)
    )


QWEN3_NEXT_ROWS = f"""
BF16 12288x2048 {QWEN3_NEXT_LINEAR}.in_proj_qkvz.weight
BF16 64x2048 {QWEN3_NEXT_LINEAR}.in_proj_ba.weight
BF16 2048x4096 {QWEN3_NEXT_LINEAR}.out_proj.weight
BF16 8192x1x4 {QWEN3_NEXT_LINEAR}.conv1d.weight
BF16 32 {QWEN3_NEXT_LINEAR}.[dt_bias,A_log]
BF16 128 {QWEN3_NEXT_LINEAR}.norm.weight
BF16 2048 mtp.[norm,pre_fc_norm_embedding,pre_fc_norm_hidden].weight
BF16 2048 mtp.layers.0.[input_layernorm,post_attention_layernorm].weight
BF16 2048x4096 mtp.fc.weight""" + (  # unconfirmed: BF16 for A_log and the norm in it
    body("model", 2048, 151936, "0-47")
    + qwen3_next_shared("model.layers.[0-47]", QWEN3_NEXT_FULL)
    + qwen3_next_shared("mtp.layers.0", "mtp.layers.0")
)

LING_MINI_ROWS = """
BF16 157184x2048 [model.word_embeddings,lm_head].weight
BF16 2048 model.norm.weight
BF16 2048 model.layers.[0-19].[input_layernorm,post_attention_layernorm].weight
BF16 3072x2048 model.layers.[0-19].attention.query_key_value.weight
BF16 2048x2048 model.layers.[0-19].attention.dense.weight
BF16 128 model.layers.[0-19].attention.[query_layernorm,key_layernorm].weight
BF16 256x2048 model.layers.[1-19].mlp.gate.weight
F32 256 model.layers.[1-19].mlp.gate.expert_bias""" + (  # unconfirmed: F32
    experts("model.layers.[0-0].mlp", 2048, 5120, "bf16")
    + experts("model.layers.[1-19].mlp.experts.[0-255]", 2048, 512, "bf16")
    + experts("model.layers.[1-19].mlp.shared_experts", 2048, 512, "bf16")
)

# Layers of full attention have half as many heads of keys and values. Their k has two rows of scales for each head of 192, v one for its 128.
# unconfirmed: F32 for scales; BF16 for sinks and for what joins the draft layers to the model; that there are three of these
MIMO_WINDOWS = [int(layer > 0 and layer % 6 != 5) for layer in range(48)]
MIMO_FULL, MIMO_SLIDING = (f"model.layers.[{','.join(str(layer) for layer, window in enumerate(MIMO_WINDOWS) if window == kind)}].self_attn"
                           for kind in (0, 1))
MIMO_DRAFT = "model.mtp.layers.[0-2]"


def mimo_attention(attend: str, values: int) -> str:
    """Rows of attention but for k_proj."""
    return f"""
block_f32 12288x4096 {attend}.q_proj
block_f32 {values}x4096 {attend}.v_proj
BF16 4096x8192 {attend}.o_proj.weight"""


MIMO_V2_FLASH_ROWS = f"""
F8_E4M3 768x4096 {MIMO_FULL}.k_proj.weight
F32 8x32 {MIMO_FULL}.k_proj.weight_scale_inv
block_f32 1536x4096 {MIMO_SLIDING}.k_proj
block_f32 1536x4096 {MIMO_DRAFT}.self_attn.k_proj
BF16 64 {MIMO_SLIDING}.attention_sink_bias
BF16 64 {MIMO_DRAFT}.self_attn.attention_sink_bias
BF16 4096 {MIMO_DRAFT}.[enorm,hnorm,input_layernorm,pre_mlp_layernorm,final_layernorm].weight
BF16 4096x8192 {MIMO_DRAFT}.eh_proj.weight
F32 256x4096 model.layers.[1-47].mlp.gate.weight
F32 256 model.layers.[1-47].mlp.gate.e_score_correction_bias""" + (
    body("model", 4096, 152576, "0-47")
    + mimo_attention(MIMO_FULL, 512)
    + mimo_attention(MIMO_SLIDING, 1024)
    + mimo_attention(f"{MIMO_DRAFT}.self_attn", 1024)
    + experts("model.layers.[0-0].mlp", 4096, 16384, "block_f32")
    + experts("model.layers.[1-47].mlp.experts.[0-255]", 4096, 2048, "block_f32")
    + experts(f"{MIMO_DRAFT}.mlp", 4096, 16384, "block_f32")
)

# The draft layer lies under mtp and is dense; config.json counts it. Sizes as public tests have them; they add up to the published 474 GB, and to
# the 245 GB of K-EXAONE-236B-A23B-FP8 where attention and drafts stay BF16.
K_EXAONE_ROWS = """
BF16 128x6144 model.layers.[1-47].mlp.gate.weight
F32 128 model.layers.[1-47].mlp.e_score_correction_bias
BF16 128 model.layers.[0-47].self_attn.[q_norm,k_norm].weight
BF16 128 mtp.layers.0.self_attn.[q_norm,k_norm].weight
BF16 6144 mtp.layers.0.[input_layernorm,post_attention_layernorm].weight
BF16 6144 mtp.[norm,pre_fc_norm_embedding,pre_fc_norm_hidden].weight
BF16 6144x12288 mtp.fc.weight""" + (  # unconfirmed: F32 for the bias
    body("model", 6144, 153600, "0-47")
    + attention("model.layers.[0-47].self_attn", 6144, 8192, 1024, "bf16")
    + attention("mtp.layers.0.self_attn", 6144, 8192, 1024, "bf16")
    + experts("[model.layers.0,mtp.layers.0].mlp", 6144, 18432, "bf16")
    + experts("model.layers.[1-47].mlp.experts.[0-127]", 6144, 2048, "bf16")
    + experts("model.layers.[1-47].mlp.shared_experts", 6144, 2048, "bf16")
)

# The output gate of attention is as wide as all heads; so the sizes add up to the published 398B parameters, and to the 403.8 GB of
# Trinity-Large-Thinking-FP8-Block where attention stays BF16.
TRINITY_ROWS = """
BF16 6144x3072 model.layers.[0-59].self_attn.gate_proj.weight
BF16 128 model.layers.[0-59].self_attn.[q_norm,k_norm].weight
BF16 3072 model.layers.[0-59].[pre_mlp_layernorm,post_mlp_layernorm].weight
BF16 256x3072 model.layers.[6-59].mlp.router.gate.weight
F32 256 model.layers.[6-59].mlp.expert_bias""" + (  # unconfirmed: F32
    body("model", 3072, 200192, "0-59")
    + attention("model.layers.[0-59].self_attn", 3072, 6144, 1024, "bf16")
    + experts("model.layers.[0-5].mlp", 3072, 12288, "bf16")
    + experts("model.layers.[6-59].mlp.experts.[0-255]", 3072, 3072, "bf16")
    + experts("model.layers.[6-59].mlp.shared_experts", 3072, 3072, "bf16")
)

# The draft layer 80 has no embedding and no head of its own. Names and sizes as public converters have them; they add up to the published 597.6 GB.
HY3_ROWS = """
BF16 128 model.layers.[0-80].self_attn.[q_norm,k_norm].weight
BF16 192x4096 model.layers.[1-80].mlp.router.gate.weight
F32 192 model.layers.[1-80].mlp.expert_bias
BF16 4096 model.layers.80.[enorm,hnorm,final_layernorm].weight
BF16 4096x8192 model.layers.80.eh_proj.weight""" + (  # unconfirmed: BF16 for the router, F32 for its bias
    body("model", 4096, 120832, "0-80")
    + attention("model.layers.[0-80].self_attn", 4096, 8192, 1024, "bf16")
    + experts("model.layers.[0-0].mlp", 4096, 13312, "bf16")
    + experts("model.layers.[1-80].mlp.experts.[0-191]", 4096, 1536, "bf16")
    + experts("model.layers.[1-80].mlp.shared_mlp", 4096, 1536, "bf16")
)

# Qwen3-235B with another vocabulary, InternViT-6B before it. Names and sizes as InternLM's own trainer writes them.
INTERN_S1_LAYER = "model.language_model.layers.[0-93]"
INTERN_S1_TOWER = "model.vision_tower.encoder.layer.[0-44]"
INTERN_S1_ROWS = f"""
BF16 128 {INTERN_S1_LAYER}.self_attn.[q_norm,k_norm].weight
BF16 128x4096 {INTERN_S1_LAYER}.mlp.gate.weight
BF16 1x1x3200 model.vision_tower.embeddings.cls_token
BF16 1x1025x3200 model.vision_tower.embeddings.position_embeddings
biased 3200x3x14x14 model.vision_tower.embeddings.patch_embeddings.projection
BF16 3200 {INTERN_S1_TOWER}.[lambda_1,lambda_2]
BF16 3200 {INTERN_S1_TOWER}.[layernorm_before,layernorm_after,attention.q_norm,attention.k_norm].weight
BF16 3200x3200 {INTERN_S1_TOWER}.attention.[q_proj,k_proj,v_proj].weight
biased 3200x3200 {INTERN_S1_TOWER}.attention.projection_layer
biased 12800x3200 {INTERN_S1_TOWER}.mlp.fc1
biased 3200x12800 {INTERN_S1_TOWER}.mlp.fc2
biased 12800 model.multi_modal_projector.layer_norm
biased 4096x12800 model.multi_modal_projector.linear_1
biased 4096x4096 model.multi_modal_projector.linear_2""" + (
    body("model.language_model", 4096, 153216, "0-93")
    + attention(f"{INTERN_S1_LAYER}.self_attn", 4096, 8192, 512, "bf16")
    + experts(f"{INTERN_S1_LAYER}.mlp.experts.[0-127]", 4096, 1536, "bf16")
)

GLM45V_LAYERS = "model.language_model.layers"
GLM45V_ROWS = f"""
BF16 12288 {GLM45V_LAYERS}.[0-45].self_attn.q_proj.bias
BF16 1024 {GLM45V_LAYERS}.[0-45].self_attn.[k_proj,v_proj].bias
BF16 128x4096 {GLM45V_LAYERS}.[1-45].mlp.gate.weight
F32 128 {GLM45V_LAYERS}.[1-45].mlp.gate.e_score_correction_bias
biased 1536x3x2x14x14 model.visual.patch_embed.proj
BF16 576x1536 model.visual.embeddings.position_embedding.weight
BF16 1536 model.visual.[post_conv_layernorm,post_layernorm].weight
BF16 1536 model.visual.blocks.[0-23].[norm1,norm2].weight
BF16 4608x1536 model.visual.blocks.[0-23].attn.qkv.weight
BF16 1536x1536 model.visual.blocks.[0-23].attn.proj.weight
biased 4096x1536x2x2 model.visual.downsample
biased 4096 model.visual.merger.post_projection_norm
BF16 4096x4096 model.visual.merger.proj.weight""" + (
    body("model.language_model", 4096, 151552, "0-45")
    + attention(f"{GLM45V_LAYERS}.[0-45].self_attn", 4096, 12288, 1024, "bf16")
    + experts(f"{GLM45V_LAYERS}.[0-0].mlp", 4096, 10944, "bf16")
    + experts(f"{GLM45V_LAYERS}.[1-45].mlp.experts.[0-127]", 4096, 1408, "bf16")
    + experts(f"{GLM45V_LAYERS}.[1-45].mlp.shared_experts", 4096, 1408, "bf16")
    + experts("model.visual.blocks.[0-23].mlp", 1536, 4096, "bf16")
    + experts("model.visual.merger", 4096, 10944, "bf16")
)

def qwen3_vl_moe(layers: int, hidden: int, queries: int, inner: int, scheme: str = "bf16") -> str:
    """Rows of Qwen3-VL-MoE; experts are fused (3D) and transposed: inputs first. In BF16 as many parameters as are published."""
    layer, vision, kind = f"model.language_model.layers.[0-{layers - 1}]", "model.visual", "BF16" if scheme == "bf16" else "F8_E4M3"
    # unconfirmed: that FP8 is stacked, too (so mcore-bridge and vllm.rs read it, and vLLM turns the scales), and its scales' dtype
    scales = "" if scheme == "bf16" else f"""
BF16 128x{hidden // 128}x{2 * inner // 128} {layer}.mlp.experts.gate_up_proj_scale_inv
BF16 128x{inner // 128}x{hidden // 128} {layer}.mlp.experts.down_proj_scale_inv"""
    return f"""
{kind} 128x{hidden}x{2 * inner} {layer}.mlp.experts.gate_up_proj
{kind} 128x{inner}x{hidden} {layer}.mlp.experts.down_proj
BF16 128x{hidden} {layer}.mlp.gate.weight
BF16 128 {layer}.self_attn.[q_norm,k_norm].weight
biased 1152x3x2x16x16 {vision}.patch_embed.proj
BF16 2304x1152 {vision}.pos_embed.weight
biased 1152 {vision}.blocks.[0-26].[norm1,norm2]
biased 3456x1152 {vision}.blocks.[0-26].attn.qkv
biased 1152x1152 {vision}.blocks.[0-26].attn.proj
biased 4304x1152 {vision}.blocks.[0-26].mlp.linear_fc1
biased 1152x4304 {vision}.blocks.[0-26].mlp.linear_fc2
biased 1152 {vision}.merger.norm
biased 4608 {vision}.deepstack_merger_list.[0-2].norm
biased 4608x4608 {vision}.[merger,deepstack_merger_list.0,deepstack_merger_list.1,deepstack_merger_list.2].linear_fc1
biased {hidden}x4608 {vision}.[merger,deepstack_merger_list.0,deepstack_merger_list.1,deepstack_merger_list.2].linear_fc2""" + scales + (
        body("model.language_model", hidden, 151936, f"0-{layers - 1}")
        + attention(f"{layer}.self_attn", hidden, queries, 512, scheme)
    )


# The config announces three MTP modules, but their tensors are not published.
MINIMAX_M2_ROWS = """
BF16 6144 model.layers.[0-61].self_attn.q_norm.weight
BF16 1024 model.layers.[0-61].self_attn.k_norm.weight
F32 256x3072 model.layers.[0-61].block_sparse_moe.gate.weight
F32 256 model.layers.[0-61].block_sparse_moe.e_score_correction_bias""" + (
    body("model", 3072, 200064, "0-61")
    + attention("model.layers.[0-61].self_attn", 3072, 6144, 1024, "block_f32")
    + experts("model.layers.[0-61].block_sparse_moe.experts.[0-255]", 3072, 1536, "block_f32", "w1,w3", "w2")
)
QWEN3_8B_ROWS = qwen3(36, 4096, 4096, 1024, "bf16") + experts("model.layers.[0-35].mlp", 4096, 12288, "bf16")


def fields(text: str, **more: Any) -> Config:
    """A config from "key=value" words (JSON values, else strings) and what does not fit in a word."""
    config: Config = {}
    for word in text.split():
        key, value = word.split("=")
        config[key] = value if value[0].isalpha() and value not in ("true", "false") else json.loads(value)
    return config | more


def block_fp8(form: str = "e4m3", **more: Any) -> Config:
    """The quantization_config of FP8 with 128x128 blocks."""
    return fields(f"activation_scheme=dynamic fmt={form} quant_method=fp8 weight_block_size=[128,128]") | more


def compressed(form: str, weights: Config, inputs: Config | None, ignore: list[str]) -> Config:
    """A quantization_config of compressed-tensors with one group for all linear layers."""
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights}
    config = fields(f"quant_method=compressed-tensors format={form} quantization_status=compressed")
    return config | {"config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None}


DEEPSEEK_V3 = fields(
    """model_type=deepseek_v3 torch_dtype=bfloat16 num_hidden_layers=61 num_nextn_predict_layers=1 hidden_size=7168
    intermediate_size=18432 moe_intermediate_size=2048 n_routed_experts=256 n_shared_experts=1 num_experts_per_tok=8
    first_k_dense_replace=3 moe_layer_freq=1 num_attention_heads=128 num_key_value_heads=128 q_lora_rank=1536
    kv_lora_rank=512 qk_nope_head_dim=128 qk_rope_head_dim=64 v_head_dim=128 vocab_size=129280 tie_word_embeddings=false""",
    architectures=["DeepseekV3ForCausalLM"],
    quantization_config=block_fp8(),
)
DEEPSEEK_V2 = fields(
    """model_type=deepseek_v2 torch_dtype=bfloat16 num_hidden_layers=60 hidden_size=5120 intermediate_size=12288 moe_intermediate_size=1536
    n_routed_experts=160 n_shared_experts=2 num_experts_per_tok=6 n_group=8 topk_group=3 topk_method=group_limited_greedy scoring_func=softmax
    norm_topk_prob=false routed_scaling_factor=16.0 first_k_dense_replace=1 moe_layer_freq=1 num_attention_heads=128 num_key_value_heads=128
    q_lora_rank=1536 kv_lora_rank=512 qk_nope_head_dim=128 qk_rope_head_dim=64 v_head_dim=128 vocab_size=102400 tie_word_embeddings=false""",
    architectures=["DeepseekV2ForCausalLM"],
)
DOTS1 = fields(
    """model_type=dots1 torch_dtype=bfloat16 num_hidden_layers=62 hidden_size=4096 intermediate_size=10944 moe_intermediate_size=1408
    n_routed_experts=128 n_shared_experts=2 num_experts_per_tok=6 n_group=1 topk_group=1 norm_topk_prob=true
    routed_scaling_factor=2.5 first_k_dense_replace=1 num_attention_heads=32 num_key_value_heads=32 vocab_size=152064
    tie_word_embeddings=false""",
    architectures=["Dots1ForCausalLM"],
)
KIMI_K2 = DEEPSEEK_V3 | fields(
    """model_type=kimi_k2 n_routed_experts=384 first_k_dense_replace=1 num_nextn_predict_layers=0 num_attention_heads=64
    num_key_value_heads=64 vocab_size=163840"""
)
INT4 = fields("dynamic=false group_size=32 num_bits=4 observer=minmax strategy=group symmetric=true type=int") | {
    "actorder": None,
    "block_structure": None,
    "observer_kwargs": {},
}
INT4_SKIPPED = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
KIMI_K2_THINKING = KIMI_K2 | {"quantization_config": compressed("pack-quantized", INT4, None, INT4_SKIPPED)}

GLM46 = fields(
    """model_type=glm4_moe num_hidden_layers=92 num_nextn_predict_layers=1 hidden_size=5120 intermediate_size=12288
    moe_intermediate_size=1536 n_routed_experts=160 n_shared_experts=1 num_experts_per_tok=8 first_k_dense_replace=3
    num_attention_heads=96 num_key_value_heads=8 head_dim=128 attention_bias=true use_qk_norm=true vocab_size=151552
    tie_word_embeddings=false""",
    architectures=["Glm4MoeForCausalLM"],
    quantization_config=compressed(
        "float-quantized",
        fields("dynamic=false num_bits=8 observer=minmax strategy=channel symmetric=true type=float"),  # unconfirmed
        fields("dynamic=true num_bits=8 strategy=token symmetric=true type=float"),  # unconfirmed
        ["lm_head", r"re:.*mlp\.gate$", "model.layers.92.eh_proj"],  # unconfirmed
    ),
)

QWEN3_DENSE = fields(
    """model_type=qwen3 torch_dtype=bfloat16 num_hidden_layers=36 hidden_size=4096 intermediate_size=12288
    num_attention_heads=32 num_key_value_heads=8 head_dim=128 vocab_size=151936 tie_word_embeddings=false""",
    architectures=["Qwen3ForCausalLM"],
)
QWEN3_MOE = QWEN3_DENSE | fields(
    """model_type=qwen3_moe num_hidden_layers=48 hidden_size=2048 intermediate_size=6144 moe_intermediate_size=768
    num_experts=128 num_experts_per_tok=8 decoder_sparse_step=1 mlp_only_layers=[] num_key_value_heads=4""",
    architectures=["Qwen3MoeForCausalLM"],
)
QWEN3_MOE_235B = QWEN3_MOE | fields(
    "num_hidden_layers=94 hidden_size=4096 intermediate_size=12288 moe_intermediate_size=1536 num_attention_heads=64"
)
for _config in (QWEN3_MOE, QWEN3_MOE_235B):
    _config["quantization_config"] = block_fp8(
        modules_to_not_convert=["lm_head"]
        + [
            f"model.layers.{layer}.{name}"
            for layer in range(_config["num_hidden_layers"])
            for name in ("input_layernorm", "mlp.gate", "post_attention_layernorm")
        ]
    )
QWEN35_TEXT = fields(
    """model_type=qwen3_5_moe_text dtype=bfloat16 num_hidden_layers=40 mtp_num_hidden_layers=1 full_attention_interval=4
    mtp_use_dedicated_embeddings=false hidden_size=2048 moe_intermediate_size=512 shared_expert_intermediate_size=512
    num_experts=256 num_experts_per_tok=8 num_attention_heads=16 num_key_value_heads=2 head_dim=256 attn_output_gate=true
    linear_conv_kernel_dim=4 linear_key_head_dim=128 linear_num_key_heads=16 linear_num_value_heads=32
    linear_value_head_dim=128 vocab_size=248320 tie_word_embeddings=false""",
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10,
)
QWEN35_VISION = fields(
    """model_type=qwen3_5_moe deepstack_visual_indexes=[] depth=27 hidden_size=1152 in_channels=3 intermediate_size=4304
    num_heads=16 num_position_embeddings=2304 out_hidden_size=2048 patch_size=16 spatial_merge_size=2
    temporal_patch_size=2"""  # unconfirmed: model_type (Transformers 5.7 writes qwen3_5_moe_vision)
)
QWEN35 = fields(
    "model_type=qwen3_5_moe tie_word_embeddings=false",
    architectures=["Qwen3_5MoeForConditionalGeneration"],
    text_config=QWEN35_TEXT,
    vision_config=QWEN35_VISION,
)

QWEN3_VL_MOE = fields(
    """model_type=qwen3_vl_moe image_token_id=151655 video_token_id=151656 vision_start_token_id=151652 vision_end_token_id=151653
    tie_word_embeddings=false""",
    architectures=["Qwen3VLMoeForConditionalGeneration"],
    text_config=fields(
        """model_type=qwen3_vl_moe_text num_hidden_layers=48 hidden_size=2048 intermediate_size=6144 moe_intermediate_size=768
        num_experts=128 num_experts_per_tok=8 norm_topk_prob=true decoder_sparse_step=1 mlp_only_layers=[] num_attention_heads=32
        num_key_value_heads=4 head_dim=128 attention_bias=false vocab_size=151936"""
    ),
    vision_config=QWEN35_VISION | fields("model_type=qwen3_vl_moe deepstack_visual_indexes=[8,16,24]"),
)
QWEN3_VL_MOE_235B = QWEN3_VL_MOE | {
    "text_config": QWEN3_VL_MOE["text_config"] | fields(
        "num_hidden_layers=94 hidden_size=4096 intermediate_size=12288 moe_intermediate_size=1536 num_attention_heads=64"
    ),
    "vision_config": QWEN3_VL_MOE["vision_config"] | {"out_hidden_size": 4096},
}

INTERN_S1 = fields(
    "model_type=interns1 image_token_id=152957 downsample_ratio=0.5 vision_feature_layer=-1 tie_word_embeddings=false",
    architectures=["InternS1ForConditionalGeneration"],
    text_config=QWEN3_MOE_235B | fields("vocab_size=153216"),
    vision_config=fields(
        """model_type=interns1_vision hidden_size=3200 intermediate_size=12800 num_hidden_layers=45 num_attention_heads=25 attention_bias=false
        use_qk_norm=true norm_type=rms_norm image_size=[448,448] patch_size=[14,14]"""
    ),
)
del INTERN_S1["text_config"]["quantization_config"]

QWEN3_NEXT = fields(
    """model_type=qwen3_next num_hidden_layers=48 full_attention_interval=4 hidden_size=2048 intermediate_size=5120
    moe_intermediate_size=512 shared_expert_intermediate_size=512 num_experts=512 num_experts_per_tok=10 decoder_sparse_step=1
    mlp_only_layers=[] num_attention_heads=16 num_key_value_heads=2 head_dim=256 linear_conv_kernel_dim=4 linear_key_head_dim=128
    linear_num_key_heads=16 linear_num_value_heads=32 linear_value_head_dim=128 vocab_size=151936 tie_word_embeddings=false""",
    architectures=["Qwen3NextForCausalLM"],
)
LING_MINI = fields(
    """model_type=bailing_moe num_hidden_layers=20 num_nextn_predict_layers=0 hidden_size=2048 intermediate_size=5120
    moe_intermediate_size=512 moe_shared_expert_intermediate_size=512 num_experts=256 num_shared_experts=1 num_experts_per_tok=8
    first_k_dense_replace=1 n_group=8 topk_group=4 num_attention_heads=16 num_key_value_heads=4 head_dim=128 use_qk_norm=true
    score_function=sigmoid moe_router_enable_expert_bias=true vocab_size=157184 tie_word_embeddings=false""",
    architectures=["BailingMoeV2ForCausalLM"],
)
MIMO_V2_FLASH = fields(
    """model_type=mimo_v2_flash num_hidden_layers=48 hidden_size=4096 intermediate_size=16384 moe_intermediate_size=2048 n_routed_experts=256
    num_experts_per_tok=8 num_attention_heads=64 num_key_value_heads=4 head_dim=192 v_head_dim=128 swa_num_attention_heads=64
    swa_num_key_value_heads=8 swa_head_dim=192 swa_v_head_dim=128 sliding_window=128 sliding_window_size=128 add_swa_attention_sink_bias=true
    add_full_attention_sink_bias=false attention_value_scale=0.707 attention_bias=false partial_rotary_factor=0.334 rope_theta=5000000
    swa_rope_theta=10000 layernorm_epsilon=0.00001 n_group=1 topk_group=1 norm_topk_prob=true scoring_func=sigmoid topk_method=noaux_tc
    vocab_size=152576 tie_word_embeddings=false""",
    architectures=["MiMoV2FlashForCausalLM"],
    hybrid_layer_pattern=MIMO_WINDOWS,
    moe_layer_freq=[0] + [1] * 47,
    quantization_config=block_fp8(  # unconfirmed: the last of these names is that of later models
        ignored_layers=[f"model.layers.{layer}.self_attn.o_proj" for layer in range(48)] + ["model.decoder.self_attn.o_proj"]),
)
K_EXAONE = fields(
    """model_type=exaone_moe dtype=bfloat16 num_hidden_layers=48 num_nextn_predict_layers=1 hidden_size=6144 intermediate_size=18432
    moe_intermediate_size=2048 num_experts=128 num_shared_experts=1 num_experts_per_tok=8 n_group=1 topk_group=1
    num_attention_heads=64 num_key_value_heads=8 head_dim=128 sliding_window=128 sliding_window_pattern=LLLG vocab_size=153600
    tie_word_embeddings=false""",
    architectures=["ExaoneMoEForCausalLM"],
)
TRINITY = fields(
    """model_type=afmoe num_hidden_layers=60 num_dense_layers=6 hidden_size=3072 intermediate_size=12288 moe_intermediate_size=3072
    num_experts=256 num_shared_experts=1 num_experts_per_tok=4 n_group=1 topk_group=1 route_norm=true score_func=sigmoid
    num_attention_heads=48 num_key_value_heads=8 head_dim=128 sliding_window=4096 vocab_size=200192 tie_word_embeddings=false""",
    architectures=["AfmoeForCausalLM"],
)
HY3 = fields(
    """model_type=hy_v3 num_hidden_layers=80 num_nextn_predict_layers=1 first_k_dense_replace=1 hidden_size=4096 intermediate_size=13312
    moe_intermediate_size=1536 expert_hidden_dim=1536 num_experts=192 num_shared_experts=1 num_experts_per_tok=8 route_norm=true
    num_attention_heads=64 num_key_value_heads=8 head_dim=128 qk_norm=true vocab_size=120832 tie_word_embeddings=false""",
    architectures=["HYV3ForCausalLM"],
)
GLM45V = fields(
    "model_type=glm4v_moe tie_word_embeddings=false",
    architectures=["Glm4vMoeForConditionalGeneration"],
    text_config=fields(
        """model_type=glm4v_moe_text num_hidden_layers=46 hidden_size=4096 intermediate_size=10944 moe_intermediate_size=1408
        n_routed_experts=128 n_shared_experts=1 num_experts_per_tok=8 first_k_dense_replace=1 num_attention_heads=96
        num_key_value_heads=8 head_dim=128 attention_bias=true use_qk_norm=false vocab_size=151552"""
    ),
    vision_config=fields(
        """depth=24 hidden_size=1536 num_heads=12 in_channels=3 image_size=336 patch_size=14 intermediate_size=10944
        out_hidden_size=4096 spatial_merge_size=2 temporal_patch_size=2"""  # unconfirmed: intermediate_size
    ),
)

MINIMAX_M2 = fields(
    """model_type=minimax_m2 num_hidden_layers=62 use_mtp=true num_mtp_modules=3 mtp_transformer_layers=1 hidden_size=3072
    intermediate_size=1536 shared_intermediate_size=0 num_local_experts=256 num_experts_per_tok=8 num_attention_heads=48
    num_key_value_heads=8 head_dim=128 qk_norm_type=per_layer use_qk_norm=true use_routing_bias=true vocab_size=200064
    tie_word_embeddings=false""",
    architectures=["MiniMaxM2ForCausalLM"],
    quantization_config=block_fp8("float8_e4m3fn", modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"]),
)
M3_ROUTED = [0] * 3 + [1] * 57
M3_TEXT = fields(
    """dtype=bfloat16 num_hidden_layers=60 num_mtp_modules=1 hidden_size=6144 intermediate_size=3072
    dense_intermediate_size=12288 shared_intermediate_size=3072 num_local_experts=128 n_shared_experts=1
    num_experts_per_tok=4 num_attention_heads=64 num_key_value_heads=4 head_dim=128 qk_norm_type=per_head use_qk_norm=true
    use_routing_bias=true attention_output_gate=false vocab_size=200064 tie_word_embeddings=false""",
    architectures=["MiniMaxM3SparseForCausalLM"],
    moe_layer_freq=M3_ROUTED,
    sparse_attention_config=fields(
        """use_sparse_attention=true sparse_index_dim=128 sparse_num_index_heads=4 sparse_topk_blocks=16
        sparse_block_size=128 sparse_score_type=max sparse_init_block=0 sparse_local_block=1""",
        sparse_disable_index_value=M3_ROUTED,
        sparse_attention_freq=M3_ROUTED,
    ),
)
M3_SKIPPED = ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp"]
MINIMAX_M3 = fields(
    "model_type=minimax_m3_vl torch_dtype=bfloat16 projector_hidden_size=6144",
    architectures=["MiniMaxM3SparseForConditionalGeneration"],
    text_config=M3_TEXT,
    vision_config=fields(
        """model_type=clip_vision_model hidden_size=1280 num_attention_heads=16 num_hidden_layers=32 intermediate_size=5120
        patch_size=14 image_size=2016 projection_dim=6144 num_channels=3""",
        img_token_compression_config=fields(
            "image_token_compression_method=patch_merge spatial_merge_size=2 temporal_patch_size=2"
        ),
    ),
    quantization_config=fields(
        "quant_method=mxfp8 activation_scheme=dynamic weight_block_size=[1,32]",
        ignored_layers=M3_SKIPPED
        + sorted(f"language_model.model.layers.{layer}.block_sparse_moe.gate" for layer in range(3, 60)),
    ),
)

GPT_OSS = fields(
    """model_type=gpt_oss num_hidden_layers=24 hidden_size=2880 intermediate_size=2880 num_local_experts=32
    num_experts_per_tok=4 experts_per_token=4 num_attention_heads=64 num_key_value_heads=8 head_dim=64 attention_bias=true
    vocab_size=201088 tie_word_embeddings=false""",
    architectures=["GptOssForCausalLM"],
    layer_types=["sliding_attention", "full_attention"] * 12,
    quantization_config={
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
)
GPT_OSS_120B = GPT_OSS | fields("num_hidden_layers=36 num_local_experts=128") | {
    "layer_types": ["sliding_attention", "full_attention"] * 18
}


def family(repository: str, config: Config, table: str) -> Family:
    """A family from its table."""
    return Family(repository, config, partial(expand, table))


FAMILIES: dict[str, Family] = {
    "deepseek_v3": family("deepseek-ai/DeepSeek-V3", DEEPSEEK_V3, DEEPSEEK_V3_ROWS),
    "qwen3_moe_fp8": family("Qwen/Qwen3-30B-A3B-FP8", QWEN3_MOE, qwen3_moe(48, 2048, 4096, 768)),
    "qwen35_moe_bf16": family("Qwen/Qwen3.5-35B-A3B", QWEN35, QWEN35_ROWS),
    "dots1": family("rednote-hilab/dots.llm1.inst", DOTS1, DOTS1_ROWS),
    "deepseek_v2": family("deepseek-ai/DeepSeek-V2", DEEPSEEK_V2, DEEPSEEK_V2_ROWS),
    "qwen35_moe_text": Family("Qwen/Qwen3.5-35B-A3B, its text model", QWEN35_TEXT | {"architectures": ["Qwen3_5MoeForCausalLM"]}, qwen35_text),
    "intern_s1": family("internlm/Intern-S1", INTERN_S1, INTERN_S1_ROWS),
    "qwen3_vl_moe": family("Qwen/Qwen3-VL-235B-A22B-Instruct", QWEN3_VL_MOE_235B, qwen3_vl_moe(94, 4096, 8192, 1536)),
    "qwen3_vl_moe_fp8": family("Qwen/Qwen3-VL-235B-A22B-Instruct-FP8", QWEN3_VL_MOE_235B | {"quantization_config": block_fp8()},
                               qwen3_vl_moe(94, 4096, 8192, 1536, "block_bf16")),
    "qwen3_next": family("Qwen/Qwen3-Next-80B-A3B-Instruct", QWEN3_NEXT, QWEN3_NEXT_ROWS),
    "ling_mini": family("inclusionAI/Ling-mini-2.0", LING_MINI, LING_MINI_ROWS),
    "mimo_v2_flash": family("XiaomiMiMo/MiMo-V2-Flash", MIMO_V2_FLASH, MIMO_V2_FLASH_ROWS),
    "k_exaone": family("LGAI-EXAONE/K-EXAONE-236B-A23B", K_EXAONE, K_EXAONE_ROWS),
    "trinity_large": family("arcee-ai/Trinity-Large-Thinking", TRINITY, TRINITY_ROWS),
    "hy3": family("tencent/Hy3", HY3, HY3_ROWS),
    "glm45v": family("zai-org/GLM-4.5V", GLM45V, GLM45V_ROWS),
    "glm46_fp8": family("zai-org/GLM-4.6-FP8", GLM46, GLM46_ROWS),
    "minimax_m2": family("MiniMaxAI/MiniMax-M2", MINIMAX_M2, MINIMAX_M2_ROWS),
    "minimax_m3": family("MiniMaxAI/MiniMax-M3-MXFP8", MINIMAX_M3, minimax_m3("mxfp8")),
    "kimi_k2": family("moonshotai/Kimi-K2-Instruct", KIMI_K2, KIMI_K2_ROWS),
    "kimi_k2_thinking": family("moonshotai/Kimi-K2-Thinking", KIMI_K2_THINKING, KIMI_K2_THINKING_ROWS),
    "gpt_oss": family("openai/gpt-oss-20b", GPT_OSS, gpt_oss(24, 32)),
    "qwen3_dense": family("Qwen/Qwen3-8B", QWEN3_DENSE, QWEN3_8B_ROWS),
}
# Larger siblings: same layout, other numbers.
VARIANTS: dict[str, Family] = {
    "qwen3_vl_moe_30b": family("Qwen/Qwen3-VL-30B-A3B-Instruct", QWEN3_VL_MOE, qwen3_vl_moe(48, 2048, 4096, 768)),
    "qwen3_moe_fp8_235b": family("Qwen/Qwen3-235B-A22B-FP8", QWEN3_MOE_235B, qwen3_moe(94, 4096, 8192, 1536)),
    "gpt_oss_120b": family("openai/gpt-oss-120b", GPT_OSS_120B, gpt_oss(36, 128)),
}
