"""Small random models of the families, as transformers saves them: 3 layers, 8 experts top-2, vocabulary 512, tokenizer of the tiny model.

`save(family, directory)` writes BF16, `save(family, directory, fp8=True)` the same with linear weights in block FP8, as these families
are published. Weights are drawn wide enough that any wrong expert, scale or nibble changes what the model says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY

TILE = 128
COMMON = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 4096, "dtype": "bfloat16",
          "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
SHARED = {**SPARSE, "n_routed_experts": 8, "n_shared_experts": 1, "intermediate_size": 512, "first_k_dense_replace": 1, "norm_topk_prob": True,
          "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 1}
FAMILIES = {  # family -> (class of transformers, configuration)
    "qwen3": ("Qwen3", HEADS | {"intermediate_size": 512}),
    "qwen3_moe": ("Qwen3Moe", HEADS | SPARSE | {"num_experts": 8, "intermediate_size": 512, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": None}),
    "glm4_moe": ("Glm4Moe", HEADS | SHARED | {"n_group": 1, "topk_group": 1}),
    "minimax_m2": ("MiniMaxM2", HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "rotary_dim": 32,
                                         "scoring_func": "sigmoid", "use_routing_bias": True}),
    # engines take latent attention in its published sizes only
    "deepseek_v3": ("DeepseekV3", SHARED | {"num_attention_heads": 2, "num_key_value_heads": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": 128,
                                            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
                                            "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
}


def block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> E4M3 codes and the F32 scales of its 128x128 tiles."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % TILE, 0, -rows % TILE))
    scale = padded.unfold(0, TILE, TILE).unfold(1, TILE, TILE).abs().amax((2, 3)) / 448
    wide = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return (weight.float() / wide).to(torch.float8_e4m3fn), scale


def add_draft_layer(tensors: dict[str, torch.Tensor]) -> None:
    """A draft layer as DeepSeek and GLM publish it, which transformers leaves out: the last layer again, and what joins it to the model."""
    last, hidden = COMMON["num_hidden_layers"] - 1, COMMON["hidden_size"]
    tensors |= {key.replace(f".layers.{last}.", f".layers.{last + 1}."): tensor.clone() for key, tensor in tensors.items() if f".layers.{last}." in key}
    prefix = f"model.layers.{last + 1}."
    tensors |= {f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{prefix}eh_proj.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], dim=1).bfloat16()
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()


def save(family: str, directory: Path, fp8: bool = False) -> Path:
    """Writes the model and returns its directory."""
    import transformers

    name, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**COMMON, **fields)).to(torch.bfloat16)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "correction" in key:
                tensor.uniform_(-0.1, 0.1)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.08)
    model.save_pretrained(directory)
    for path in TINY.glob("token*"):
        shutil.copy(path, directory)
    tensors = load_file(directory / "model.safetensors")
    if fields.get("num_nextn_predict_layers"):
        add_draft_layer(tensors)
    if fp8:
        for key, tensor in list(tensors.items()):
            if tensor.ndim == 2 and not any(part in key for part in ("embed", "head", "eh_proj", ".gate.weight")):
                tensors[key], tensors[f"{key}_scale_inv"] = block_fp8(tensor)
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]}
        (directory / "config.json").write_text(json.dumps(config))
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
