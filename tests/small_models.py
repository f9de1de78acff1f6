"""Small random models of the families, under the names they are published with: 3 or 4 layers, 8 experts top-2, vocabulary 512,
tokenizer of the tiny model.

`save(family, directory)` writes BF16, `save(family, directory, fp8=True)` the same with linear weights in block FP8, as these families
are published. Weights are drawn wide enough that any wrong expert, scale or nibble changes what the model says.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stages.dialects.config import text_part
from tests.conftest import TINY

TILE = 128
COMMON = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 4096, "dtype": "bfloat16",
          "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
SHARED = {**SPARSE, "n_routed_experts": 8, "n_shared_experts": 1, "intermediate_size": 512, "first_k_dense_replace": 1, "norm_topk_prob": True,
          "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 1}
LATENT = SHARED | {"num_attention_heads": 2, "num_key_value_heads": 2, "topk_group": 1, "q_lora_rank": 128, "kv_lora_rank": 512,
                   "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
LINEAR = {"num_hidden_layers": 4, "full_attention_interval": 4, "shared_expert_intermediate_size": 128, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64}  # linear attention in all layers but the last
QWEN3_MOE = HEADS | SPARSE | {"num_experts": 8, "intermediate_size": 512, "norm_topk_prob": True}
INTERN = {"image_token_id": 500, "text_config": COMMON | QWEN3_MOE | {"model_type": "qwen3_moe"}, "vision_config": {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "image_size": [56, 56], "patch_size": [14, 14],
    "use_qk_norm": True, "norm_type": "rms_norm"}}
IMAGES = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
FAMILIES = {  # family -> (class of transformers, configuration)
    "qwen3": ("Qwen3", HEADS | {"intermediate_size": 512}),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE),
    "qwen3_next": ("Qwen3Next", HEADS | SPARSE | LINEAR | {"num_experts": 8, "intermediate_size": 512, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": None}),
    "glm4_moe": ("Glm4Moe", HEADS | SHARED | {"n_group": 1, "topk_group": 1}),
    "dots1": ("Dots1", HEADS | SHARED | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}),
    "minimax_m2": ("MiniMaxM2", HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "rotary_dim": 32,
                                         "scoring_func": "sigmoid", "use_routing_bias": True}),
    "ernie4_5_moe": ("Ernie4_5_Moe", HEADS | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 128,
                                              "intermediate_size": 512, "moe_layer_start_index": 1, "moe_layer_end_index": 2, "use_bias": False}),
    "exaone_moe": ("ExaoneMoe", HEADS | SPARSE | {"num_experts": 8, "intermediate_size": 512, "routed_scaling_factor": 1.5, "sliding_window": 64,
                                                  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "afmoe": ("Afmoe", HEADS | SPARSE | {"num_experts": 8, "num_shared_experts": 1, "num_dense_layers": 1, "intermediate_size": 512,
                                         "route_scale": 1.5, "sliding_window": 64, "mup_enabled": True, "score_func": "sigmoid", "route_norm": True,
                                         "n_group": 1, "topk_group": 1, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "hy_v3": ("HYV3", HEADS | SPARSE | {"num_experts": 8, "num_shared_experts": 1, "intermediate_size": 512, "router_scaling_factor": 1.5,
                                        "expert_hidden_dim": 128, "first_k_dense_replace": 1, "route_norm": True, "qk_norm": True,
                                        "num_nextn_predict_layers": 1}),
    "bailing_moe_v2": ("Glm4Moe", HEADS | SHARED | {"n_group": 2, "topk_group": 1, "use_qk_norm": True, "num_nextn_predict_layers": 0}),
    "bailing_moe": ("Glm4Moe", HEADS | SHARED | {"n_shared_experts": 2, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}),
    "mimo_v2_flash": ("MiMoV2Flash", SPARSE | {
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 192, "v_head_dim": 192, "intermediate_size": 512,
        "n_routed_experts": 8, "norm_topk_prob": True, "sliding_window": 32, "mlp_layer_types": ["dense"] + 3 * ["sparse"],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
    # engines take latent attention in its published sizes only
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_group": 2}),
    "deepseek_v2": ("DeepseekV2", LATENT | {"n_group": 2, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
                                            "scoring_func": "softmax", "num_nextn_predict_layers": 0}),
    "moonlight": ("DeepseekV3", LATENT | {"n_group": 1, "q_lora_rank": None}),
    "kimi_k25": ("Kimi_K25", IMAGES | {
        "text_config": COMMON | LATENT | {"model_type": "deepseek_v3", "n_group": 1, "num_nextn_predict_layers": 0}, "projection_hidden_size": 64,
        "vision_config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}}),
    "glm4v_moe": ("Glm4vMoe", {
        "image_token_id": 500, "video_token_id": 501, "image_start_token_id": 502, "image_end_token_id": 503, "video_start_token_id": 504,
        "video_end_token_id": 505, "text_config": COMMON | HEADS | SHARED | {
            "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1, "use_qk_norm": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}},
        "vision_config": {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 256}}),
    "qwen3_vl_moe": ("Qwen3VLMoe", IMAGES | {  # 256 inputs are twice the width of an expert: shapes alone do not say which way these lie
        "text_config": COMMON | HEADS | SPARSE | {
            "num_experts": 8, "intermediate_size": 512, "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True, "mrope_section": [12, 10, 10]}},
        "vision_config": {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 256,
                          "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}}),
    "internvl": ("InternVL", INTERN),
    "interns1": ("InternVL", INTERN),
    "qwen3_5_moe_text": ("Qwen3_5Moe", HEADS | SPARSE | LINEAR | {"num_experts": 8}),
    "qwen3_5_moe": ("Qwen3_5Moe", IMAGES | {
        "text_config": COMMON | HEADS | SPARSE | LINEAR | {"num_experts": 8},
        "vision_config": {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 256,
                          "num_position_embeddings": 64}}),
}
# how a family is published where transformers writes other names (or has only a class that is like it): pattern -> replacement
LING = ((r"embed_tokens", "word_embeddings"), (r"\.self_attn\.", ".attention."), (r"\.o_proj\.", ".dense."), (r"\.q_norm\.", ".query_layernorm."),
        (r"\.k_norm\.", ".key_layernorm."), (r"e_score_correction_bias", "expert_bias"))
PUBLISHED = {"kimi_k25": ((r"^language_model\.model\.blocks\.", "language_model.model.layers."), (r"^model\.mm_projector\.", "mm_projector."),
                          (r"^vision_tower\.encoder\.patch_embed", "vision_tower.patch_embed")),
             "interns1": ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
                          (r"^(vision_tower|multi_modal_projector)\.", r"model.\1.")),
             "bailing_moe": LING, "bailing_moe_v2": LING}
CONFIG = {"kimi_k25": {"architectures": ["KimiK25ForConditionalGeneration"]},
          "interns1": {"architectures": ["InternS1ForConditionalGeneration"], "model_type": "interns1",
                       "auto_map": {"AutoConfig": "configuration_interns1.InternS1Config"}},
          "exaone_moe": {"architectures": ["ExaoneMoEForCausalLM"], "num_nextn_predict_layers": 1}}
LING_CONFIG = COMMON | HEADS | SPARSE | {
    "model_type": "bailing_moe", "num_experts": 8, "norm_topk_prob": True, "use_bias": False, "use_qkv_bias": False, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "embedding_dropout": 0.0, "output_dropout": 0.0, "rope_theta": 10000.0}
MIMO_HEADS = {"num_attention_heads": 4, "head_dim": 192, "v_head_dim": 192}  # published are 192 and 128, which vLLM runs on GPUs only
AS_PUBLISHED = {  # config.json of families where transformers writes other keys, or has no class: auto_map names one that comes along
    "mimo_v2_flash": COMMON | SPARSE | MIMO_HEADS | {f"swa_{key}": value for key, value in MIMO_HEADS.items()} | {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "num_hidden_layers": 4, "num_key_value_heads": 2,
        "swa_num_key_value_heads": 4, "intermediate_size": 512, "n_routed_experts": 8, "n_shared_experts": None, "norm_topk_prob": True,
        "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": None, "hidden_act": "silu",
        "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1], "sliding_window": 32, "sliding_window_size": 32,
        "attention_chunk_size": 32, "attention_bias": False, "attention_value_scale": 0.707, "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "layernorm_epsilon": 1e-5, "partial_rotary_factor": 0.334, "rope_theta": 5000000,
        "swa_rope_theta": 10000},
    "bailing_moe": LING_CONFIG | {
        "architectures": ["BailingMoeForCausalLM"], "auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
        "intermediate_size": 128, "num_shared_experts": 2, "first_k_dense_replace": 0, "norm_head": False},
    "bailing_moe_v2": LING_CONFIG | {
        "architectures": ["BailingMoeV2ForCausalLM"], "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
        "intermediate_size": 512, "num_shared_experts": 1, "moe_shared_expert_intermediate_size": 128, "first_k_dense_replace": 1, "n_group": 2,
        "topk_group": 1, "routed_scaling_factor": 1.5, "score_function": "sigmoid", "router_dtype": "fp32", "moe_router_enable_expert_bias": True,
        "use_qk_norm": True, "use_rmsnorm": True, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0}}
REMOTE_CLASS = """from transformers import {base}


class {name}({base}):
    model_type = "{model_type}"
"""
IMAGE_PROCESSOR = {"kimi_k25": {"media_proc_cfg": {
    "patch_size": 14, "merge_kernel_size": 2, "temporal_merge_kernel_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "in_patch_limit": 64,
    "in_patch_limit_each_frame": 64, "in_patch_limit_video": 256, "patch_limit_on_one_side": 16, "fixed_output_tokens": None}}}
UNQUANTIZED = r"embed|head|eh_proj|\.gate\.|shared_expert_gate|in_proj_(?:a|b|ba)\.|conv1d|visual|vision|mm_projector|multi_modal|mtp\.fc|norm"
PLAIN = {"mimo_v2_flash": UNQUANTIZED + "|o_proj"}  # of families that leave more


def block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in], or stacked matrices -> E4M3 codes and the F32 scales of its 128x128 tiles."""
    if weight.ndim == 3:
        return tuple(map(torch.stack, zip(*map(block_fp8, weight))))
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % TILE, 0, -rows % TILE))
    scale = padded.unfold(0, TILE, TILE).unfold(1, TILE, TILE).abs().amax((2, 3)) / 448
    wide = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return (weight.float() / wide).to(torch.float8_e4m3fn), scale


def merged_fp8(tensors: dict[str, torch.Tensor], shares: int) -> None:
    """q, k and v in block FP8 as MiMo-V2-Flash is published: quantized as each of `shares` GPUs holds them, merged, and split apart again."""
    for prefix in sorted({match[1] for key in tensors if (match := re.match(r"(.*\.self_attn\.)q_proj\.", key))}):
        weights = {part: tensors[f"{prefix}{part}_proj.weight"].chunk(shares) for part in "qkv"}
        made = [block_fp8(torch.cat(share)) for share in zip(*weights.values())]
        begin = 0
        for part, (weight, *_) in weights.items():
            end = begin + len(weight)
            tiles = slice(-(-begin // TILE), -(-end // TILE))
            tensors[f"{prefix}{part}_proj.weight"] = torch.cat([codes[begin:end] for codes, _ in made])
            tensors[f"{prefix}{part}_proj.weight_scale_inv"] = torch.cat([scale[tiles] for _, scale in made])
            begin = end


def add_draft_layer(tensors: dict[str, torch.Tensor]) -> None:
    """A draft layer as DeepSeek and GLM publish it, which transformers leaves out: the last layer again, and what joins it to the model."""
    last, hidden = COMMON["num_hidden_layers"] - 1, COMMON["hidden_size"]
    tensors |= {key.replace(f".layers.{last}.", f".layers.{last + 1}."): tensor.clone() for key, tensor in tensors.items() if f".layers.{last}." in key}
    prefix = f"model.layers.{last + 1}."
    tensors |= {f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{prefix}eh_proj.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], dim=1).bfloat16()
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()


def stack_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Experts of a layer in two tensors, gate and up joined, as Qwen3.5 is published in BF16; not those of its draft layer."""
    for prefix in sorted({match[1] for key in tensors if (match := re.match(r"(model\..*\.experts\.)\d+\.", key))}):
        count = sum(key.startswith(prefix) and key.endswith(".up_proj.weight") for key in tensors)
        taken = {name: [tensors.pop(f"{prefix}{number}.{name}_proj.weight") for number in range(count)] for name in ("gate", "up", "down")}
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(taken["gate"], taken["up"])])
        tensors[f"{prefix}down_proj"] = torch.stack(taken["down"])


def transpose_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Stacked experts as [experts, in, out], as Qwen3-VL is published; transformers 5 reads them so, but saves them the other way."""
    for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]:
        tensors[key] = tensors[key].transpose(1, 2).contiguous()


def as_ling(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """q, k and v of a layer in one tensor, as Ling is published; a bias of the router only where config.json has one."""
    if not config.get("moe_router_enable_expert_bias"):
        for key in [key for key in tensors if key.endswith("expert_bias")]:
            del tensors[key]
    for prefix in sorted({match[1] for key in tensors if (match := re.match(r"(.*\.attention\.)q_proj\.", key))}):
        tensors[f"{prefix}query_key_value.weight"] = torch.cat([tensors.pop(f"{prefix}{name}_proj.weight") for name in "qkv"])


def add_mtp(tensors: dict[str, torch.Tensor], layer: str, norm: float = 0.0) -> None:
    """A draft layer as Qwen3-Next, Qwen3.5 and K-EXAONE publish it: this layer again, and what joins it to the model; Qwen's norms add 1."""
    hidden = COMMON["hidden_size"]
    tensors |= {key.replace(layer, "mtp.layers.0."): tensor.clone() for key, tensor in tensors.items() if key.startswith(layer)}
    tensors |= {f"mtp.{name}.weight": torch.full((hidden,), norm).bfloat16() for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    tensors["mtp.fc.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], dim=1).bfloat16()


def add_mimo_drafts(tensors: dict[str, torch.Tensor]) -> None:
    """A draft layer as MiMo-V2 publishes it: a dense one with a sliding window, and what joins it to the model."""
    hidden, layer = COMMON["hidden_size"], "model.mtp.layers.0."
    for taken, number in (("self_attn.", 1), ("mlp.", 0)):
        prefix = f"model.layers.{number}.{taken}"
        tensors |= {key.replace(prefix, layer + taken): tensor.clone() for key, tensor in tensors.items() if key.startswith(prefix)}
    tensors |= {f"{layer}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
                for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")}
    tensors[f"{layer}eh_proj.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], dim=1).bfloat16()


def save(family: str, directory: Path, fp8: bool | str = False) -> Path:
    """Writes the model and returns its directory. fp8: in block FP8, all that families publish so, or all but what this expression finds."""
    import transformers

    name, fields = FAMILIES[family]
    nested = "text_config" in fields
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}For{'ConditionalGeneration' if nested else 'CausalLM'}")
    model = model_class(model_class.config_class(**({"tie_word_embeddings": False} if nested else COMMON) | fields)).to(torch.bfloat16)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "correction" in key or "expert_bias" in key or key.endswith(".sinks"):
                tensor.uniform_(-0.1, 0.1)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.08)
    model.save_pretrained(directory)
    for path in TINY.glob("token*"):
        shutil.copy(path, directory)
    tensors = load_file(directory / "model.safetensors")
    for pattern, replacement in PUBLISHED.get(family, ()):
        tensors = {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}
    config = dict(AS_PUBLISHED[family]) if family in AS_PUBLISHED else json.loads((directory / "config.json").read_text()) | CONFIG.get(family, {})
    if fields.get("num_nextn_predict_layers"):
        add_draft_layer(tensors)
    if family == "hy_v3":  # its draft layer uses the embedding and the head of the model
        tensors = {key.replace(".shared_head.norm.", ".final_layernorm."): tensor for key, tensor in tensors.items()
                   if not re.search(r"layers\.3\.(embed_tokens|shared_head\.head)", key)}
    if family.startswith("qwen3_5_moe"):
        add_mtp(tensors, f"model.{'language_model.' if nested else ''}layers.3.")
        text_part(config).update(mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)
    if family == "qwen3_vl_moe":
        transpose_experts(tensors)
    if config["model_type"] == "bailing_moe":
        as_ling(tensors, config)
    if family == "mimo_v2_flash":
        add_mimo_drafts(tensors)
    if family == "qwen3_next":
        add_mtp(tensors, "model.layers.3.")
    if family == "exaone_moe":
        add_mtp(tensors, "model.layers.0.", norm=1.0)
    if fp8:
        if family == "mimo_v2_flash":
            merged_fp8(tensors, config["num_key_value_heads"])
        for key, tensor in list(tensors.items()):
            if (tensor.ndim in (2, 3) and tensor.dtype == torch.bfloat16 and not re.search(PLAIN.get(family, UNQUANTIZED), key)
                    and not (isinstance(fp8, str) and re.search(fp8, key))):
                tensors[key], tensors[f"{key}_scale_inv"] = block_fp8(tensor)
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]}
        if family in PLAIN:
            config["quantization_config"]["ignored_layers"] = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)]
    elif family.startswith("qwen3_5_moe"):
        stack_experts(tensors)
    (directory / "config.json").write_text(json.dumps(config))
    if "auto_map" in config:
        module, name = config["auto_map"]["AutoConfig"].split(".")
        base = model_class.config_class.__name__ if nested else "PreTrainedConfig"  # with its nested parts
        (directory / f"{module}.py").write_text(REMOTE_CLASS.format(base=base, name=name, model_type=config["model_type"]))
    if family in IMAGE_PROCESSOR:
        (directory / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR[family]))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def unquantized(release: Path, target: Path, values: dict[str, torch.Tensor]) -> Path:
    """A copy of a release with these tensors in place of its own and no quantization_config."""
    shutil.copytree(release, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "manifest.json", "vllm_plugin"))
    save_file(values, target / "model.safetensors", {"format": "pt"})
    config = json.loads((release / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def expanded(release: Path, target: Path) -> Path:
    """The release's values in BF16 under the names of the model, without a quantization_config."""
    from stages.checkpoint.reader import ShardReader
    from stages.dialects import recognize
    from stages.dialects.reading import Tensors, decoded
    from stages.schemes.modules import module_of

    config = json.loads((release / "config.json").read_text())
    values = {}
    for path in release.glob("*.safetensors"):
        with ShardReader(path) as reader:
            claims = recognize(reader.header.tensors, {name: path.name for name in reader.header.tensors}, config)
            for name, claim in claims.items():
                if claim.belongs_to:
                    continue
                if claim.dialect == "plain":
                    values[name] = reader.tensor(name).clone()
                else:
                    places = Tensors(lambda name, reader=reader: reader)
                    values[f"{module_of(name)}.weight"] = decoded(places, name, claim).to(torch.bfloat16).contiguous()
    return unquantized(release, target, values)
