"""Trains the bundled tiny Step-3.7 model and writes it in the exact dialect of the 212.5-GB FP8 release.

    python -m tests.tiny.make_tiny --text english.txt [more.txt ...] --minutes 12

What comes out (tests/tiny/step37_tiny, about 20 MB) is a real `Step3p7ForConditionalGeneration` checkpoint: the text
model and its three MTP layers are trained on the given text, the vision tower is initialized and left as it is (no
images are at hand; nothing that is measured here depends on it), the routed experts are quantized to block FP8 with
128x128 float scales, everything else is BF16. Every trap of the real release is kept: the index omits the
`weight_scale_inv` names, the first, last and vision shards hold no FP8, `modules_to_not_convert` lists vLLM's runtime
names, the per-layer lists include the MTP entries, router_bias is F32.

The text is the user's own (the bundled weights were trained on the WikiText-2 validation and test articles, the last
twentieth held out); it is not part of the project. Training is seeded but not bit-reproducible across machines, so the
weights are in the repository and the release pinned in dvc.lock starts from them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import Step3p7Config, Step3p7ForConditionalGeneration

from stages.models.step37_drafts import Drafts, checkpoint_names

SPECIAL_TOKENS = ["<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_end|>", "<|im_start|>", "<im_patch>",
                  "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]
VOCABULARY = 512
HIDDEN, INTERMEDIATE, EXPERT_INTERMEDIATE, EXPERTS, TOP_K = 256, 512, 128, 16, 4
HEAD_DIM, GROUPS, FULL_HEADS, SLIDING_HEADS = 64, 2, 4, 6
TEXT_LAYERS, MTP_LAYERS = 6, 3
MOE_LAYERS = range(1, TEXT_LAYERS)
LIMITED_LAYERS = (TEXT_LAYERS - 2, TEXT_LAYERS - 1)
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, IMAGE_SIZE, PATCH_SIZE = 96, 2, 3, 728, 14
VISION_INTERMEDIATE = int(VISION_WIDTH * 8960 / 1536)
TILE, FP8_MAX = 128, 448.0


def hub_config() -> dict:
    """config.json in the dialect of the published repositories (remote-code keys, lists that include the MTP layers)."""
    total = TEXT_LAYERS + MTP_LAYERS
    full = [layer % 4 == 0 and layer < TEXT_LAYERS for layer in range(total)]
    limits = [layer in LIMITED_LAYERS for layer in range(total)]
    text = {
        "architectures": ["Step3p5ForCausalLM"],
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 2048,
                         "low_freq_factor": 1.0, "high_freq_factor": 32.0},
        "yarn_only_types": ["full_attention"], "model_type": "step3p5", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": TEXT_LAYERS, "max_seq_len": 4096,
        "max_position_embeddings": 4096, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
        "moe_layers_enum": ",".join(map(str, MOE_LAYERS)), "use_mfa": False, "num_attention_heads": FULL_HEADS,
        "num_attention_groups": GROUPS, "head_dim": HEAD_DIM, "use_moe": True, "moe_num_experts": EXPERTS,
        "moe_top_k": TOP_K, "moe_intermediate_size": EXPERT_INTERMEDIATE, "share_expert_dim": EXPERT_INTERMEDIATE,
        "moe_layer_offset": 0, "moe_every_n_layer": 1, "norm_expert_weight": True, "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 2.0, "att_impl_type": "GQA", "num_nextn_predict_layers": MTP_LAYERS,
        "rope_theta": [5000000.0 if f else 10000.0 for f in full], "use_head_wise_attn_gate": True,
        "sliding_window": 64, "use_moe_router_bias": True, "need_fp32_gate": True, "sink": False,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full], "use_rope_layers": [],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full], "eos_token_id": [1, 2], "bos_token_id": 0,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": SLIDING_HEADS,
                                    "num_attention_groups": GROUPS, "head_dim": HEAD_DIM, "true_head_dim": HEAD_DIM},
        "swiglu_limits": [7 if limited else 0.0 for limited in limits],
        "swiglu_limits_shared": [16 if limited else 0.0 for limited in limits],
    }
    vision = {"model_type": "perception_encoder", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
              "width": VISION_WIDTH, "layers": VISION_LAYERS, "heads": VISION_HEADS, "pool_type": "none",
              "output_dim": None, "use_cls_token": False, "ls_init_value": 0.1, "use_ln_post": False,
              "hidden_act": "quick_gelu"}
    return {
        "architectures": ["Step3p7ForConditionalGeneration"], "model_type": "step3p7", "im_end_token": "<im_end>",
        "im_patch_token": "<im_patch>", "im_start_token": "<im_start>", "image_token_len": 169, "patch_token_len": 81,
        "image_token_id": SPECIAL_TOKENS.index("<im_patch>"), "understand_projector_stride": 2,
        "use_im_start_end": "true", "vision_select_layer": -1, "projector_bias": False, "vision_config": vision,
        "text_config": text,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                                "weight_block_size": [TILE, TILE],
                                "modules_to_not_convert": modules_to_not_convert()},
    }


def modules_to_not_convert() -> list[str]:
    """vLLM's runtime names of all linear modules that stay BF16, in the order of the published list."""
    def fused_mlp(prefix):
        return [f"{prefix}.{name}_proj" for name in ("gate_up", "gate", "up", "down")]

    def attention(prefix):
        return [f"{prefix}.self_attn.{name}_proj" for name in ("g", "qkv", "q", "k", "v", "o")]

    names = ["lm_head", "model.embed_tokens", "model.norm"]
    for layer in range(TEXT_LAYERS):
        prefix = f"model.layers.{layer}"
        names += attention(prefix)
        names += ([f"{prefix}.moe.gate", *fused_mlp(f"{prefix}.share_expert")] if layer in MOE_LAYERS
                  else fused_mlp(f"{prefix}.mlp"))
    for layer in range(TEXT_LAYERS, TEXT_LAYERS + MTP_LAYERS):
        prefix = f"model.layers.{layer}"
        names += attention(f"{prefix}.mtp_block") + fused_mlp(f"{prefix}.mtp_block.mlp")
        names += [f"{prefix}.shared_head", f"{prefix}.shared_head.head"]
    for block in range(VISION_LAYERS):
        prefix = f"vision_model.transformer.resblocks.{block}"
        names += [f"{prefix}.attn.{name}" for name in ("qkv_proj", "q_proj", "k_proj", "v_proj", "out_proj")]
        names += [f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2"]
    return [*names, "vit_large_projector"]


def clean(text: str) -> str:
    """Undoes WikiText's tokenization (` , `, ` @-@ `, `<unk>`), so that the model learns ordinary English."""
    text = text.replace("<unk>", "").replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    text = re.sub(r" ([,.;:!?)\]'])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) ?"', r'"\1"', text)
    text = re.sub(r"n 't\b", "n't", text)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n\s*\n+", "\n\n", "\n".join(line.strip() for line in text.splitlines()))


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE of 512 entries: every input is representable, and a tenth of the vocabulary is a hard target."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def balance_experts(model: nn.Module, loads: dict, rate: float) -> None:
    """Moves each router bias towards an even load, by sign (the published models' loss-free balancing)."""
    for router, load in loads.items():
        router.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        load.zero_()


def train(tokens: torch.Tensor, held_out: torch.Tensor, minutes: float, seed: int):
    """tokens, held_out: int64 [n] -> (model, drafts), float32, trained for `minutes` of wall time."""
    torch.manual_seed(seed)
    settings = hub_config()
    settings.pop("quantization_config")
    config = Step3p7Config(**settings)
    model = Step3p7ForConditionalGeneration(config)
    drafts = Drafts(config.text_config)
    for name, parameter in drafts.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    text = model.model.language_model
    layers = text.layers
    residual = {}
    layers[-1].register_forward_hook(lambda module, inputs, output: residual.__setitem__("last", output))
    loads = {layer.mlp.gate: torch.zeros(EXPERTS) for layer in layers if hasattr(layer.mlp, "gate")}

    def count_load(router, inputs, output):
        loads[router] += torch.bincount(output[2].flatten(), minlength=EXPERTS)

    for router in loads:
        router.register_forward_hook(count_load)

    trainable = [p for p in [*text.parameters(), *model.lm_head.parameters(), *drafts.parameters()]]
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                   {"params": vectors, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.95))
    cross_entropy = nn.functional.cross_entropy
    batch, length = 6, 256
    generator = torch.Generator().manual_seed(seed)

    def run(rows):
        logits = model(input_ids=rows, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        draft_logits = drafts(text.embed_tokens(rows), residual["last"])
        draft_losses = [cross_entropy(d[:, :-1].flatten(0, 1), rows[:, k + 2:].flatten())
                        for k, d in enumerate(draft_logits)]
        return logits, loss, draft_logits, draft_losses

    start, step, finished = time.monotonic(), 0, False
    while not finished:
        elapsed = (time.monotonic() - start) / 60
        finished = elapsed >= minutes
        progress = min(elapsed / minutes, 1.0)
        rate = 2e-3 * min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(tokens) - length, (batch,), generator=generator)
        rows = torch.stack([tokens[s:s + length] for s in starts.tolist()])
        _, loss, _, draft_losses = run(rows)
        (loss + 0.2 * sum(draft_losses)).backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance_experts(model, loads, 2e-3 * (1 - progress))
        if step % 50 == 0 or finished:
            with torch.no_grad():
                rows = held_out[: len(held_out) // length * length].view(-1, length)[:24]
                logits, loss_held, draft_logits, _ = run(rows)
                for load in loads.values():
                    load.zero_()
                greedy = logits.argmax(-1)
                agreement = [(d[:, :-1].argmax(-1) == greedy[:, k + 1:-1]).float().mean().item()
                             for k, d in enumerate(draft_logits)]
            print(f"{elapsed:5.1f} min  step {step:5d}  loss {loss.item():.3f}  held-out perplexity "
                  f"{loss_held.exp().item():.2f}  drafts agree {' '.join(f'{a:.3f}' for a in agreement)}", flush=True)
        step += 1
    return model.eval(), drafts.eval(), config


def quantize_block_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [experts, out, in] -> (float8_e4m3fn codes, F32 scale of each 128x128 tile), as the FP8 release stores it."""
    experts, rows, columns = weight.shape
    tiles = weight.float().view(experts, rows // TILE, TILE, columns // TILE, TILE)
    scale = tiles.abs().amax(dim=(2, 4)).clamp_min(1e-12) / FP8_MAX
    codes = (tiles / scale[:, :, None, :, None]).view(experts, rows, columns).to(torch.float8_e4m3fn)
    return codes, scale.contiguous()


def checkpoint_tensors(model, drafts, config, seed: int) -> dict[str, torch.Tensor]:
    """All tensors under their published names and in their published dtypes."""
    tensors: dict[str, torch.Tensor] = {}

    def put(name, tensor, dtype=torch.bfloat16):
        tensors[name] = tensor.detach().to(dtype).contiguous()

    state = model.state_dict()
    for name, tensor in state.items():
        if not name.startswith(("model.language_model.", "lm_head.")):
            continue
        name = name.replace("model.language_model.", "model.")
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("mlp.experts.gate_up_proj") + "moe."
            for part, half in zip(("gate_proj", "up_proj"), tensor.detach().chunk(2, dim=1)):
                codes, scale = quantize_block_fp8(half)
                tensors[f"{prefix}{part}.weight"], tensors[f"{prefix}{part}.weight_scale_inv"] = codes, scale
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("mlp.experts.down_proj") + "moe.down_proj."
            tensors[prefix + "weight"], tensors[prefix + "weight_scale_inv"] = quantize_block_fp8(tensor.detach())
        elif name.endswith("mlp.gate.e_score_correction_bias"):
            put(name.replace("mlp.gate.e_score_correction_bias", "moe.router_bias"), tensor, torch.float32)
        elif name.endswith("mlp.gate.weight"):
            put(name.replace("mlp.gate.weight", "moe.gate.weight"), tensor)
        elif ".mlp.shared_experts." in name:
            put(name.replace(".mlp.shared_experts.", ".share_expert."), tensor)
        else:
            put(name, tensor)
    parameters = dict(drafts.named_parameters())
    for name, published in checkpoint_names(config.text_config).items():
        put(published, parameters[name])

    torch.manual_seed(seed)
    width, inner = VISION_WIDTH, VISION_INTERMEDIATE

    def random(*shape):
        return torch.randn(shape) * 0.02

    vision = {"conv1.weight": random(width, 3, PATCH_SIZE, PATCH_SIZE),
              "positional_embedding": random((IMAGE_SIZE // PATCH_SIZE) ** 2, width),
              "ln_pre.weight": torch.ones(width), "ln_pre.bias": torch.zeros(width),
              "vit_downsampler1.weight": random(2 * width, width, 3, 3), "vit_downsampler1.bias": torch.zeros(2 * width),
              "vit_downsampler2.weight": random(4 * width, 2 * width, 3, 3),
              "vit_downsampler2.bias": torch.zeros(4 * width)}
    for block in range(VISION_LAYERS):
        prefix = f"transformer.resblocks.{block}."
        vision |= {prefix + "attn.in_proj_weight": random(3 * width, width), prefix + "attn.in_proj_bias": random(3 * width),
                   prefix + "attn.out_proj.weight": random(width, width), prefix + "attn.out_proj.bias": random(width),
                   prefix + "mlp.c_fc.weight": random(inner, width), prefix + "mlp.c_fc.bias": random(inner),
                   prefix + "mlp.c_proj.weight": random(width, inner), prefix + "mlp.c_proj.bias": random(width)}
        for norm in ("ln_1", "ln_2"):
            vision |= {f"{prefix}{norm}.weight": torch.ones(width), f"{prefix}{norm}.bias": torch.zeros(width)}
        for scale in ("ls_1", "ls_2"):
            vision[f"{prefix}{scale}.gamma"] = torch.full((width,), 0.1)
    for name, tensor in vision.items():
        put(f"vision_model.{name}", tensor)
    put("vit_large_projector.weight", random(HIDDEN, 4 * width))
    return tensors


def shard_of(name: str) -> str:
    """The published sharding: two layers a shard; the heads and MTP layers in the last text shard; vision apart."""
    if name.startswith(("vision_model.", "vit_")):
        return "model-vit-00001.safetensors"
    match = re.match(r"model\.layers\.(\d+)\.", name)
    layer = int(match.group(1)) if match else TEXT_LAYERS
    return f"model-{(layer + 1) // 2 + 1 if layer < TEXT_LAYERS else TEXT_LAYERS // 2 + 2:05d}.safetensors"


def write_checkpoint(tensors: dict[str, torch.Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Shards, index (without the scales, as published), config, tokenizer and a card."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.safetensors"):
        stale.unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name in tensors:
        shards.setdefault(shard_of(name), {})[name] = tensors[name]
    for shard in sorted(shards):
        save_file(shards[shard], directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard in sorted(shards) for name in sorted(shards[shard])
                  if not name.endswith("weight_scale_inv")}
    total = sum(tensor.nbytes for tensor in tensors.values())

    def write(name, value):
        (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    write("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write("config.json", hub_config())
    tokenizer.save(str(directory / "tokenizer.json"))
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[1], "model_max_length": 4096, "clean_up_tokenization_spaces": False})
    write("special_tokens_map.json", {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]})
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", encoding="utf-8")
    (directory / "README.md").write_text(
        "# step37_tiny\n\nA Step-3.7 model small enough for a repository, in the dialect of the FP8 release: "
        f"{TEXT_LAYERS} text layers, {EXPERTS} routed experts (top {TOP_K}) and one shared expert, {MTP_LAYERS} MTP "
        "layers, a small vision tower (untrained). Made by `tests/tiny/make_tiny.py`; it exists to test conversions "
        "and serving, and knows some English.\n", encoding="utf-8")


def main() -> None:
    """Command line: text in, checkpoint directory out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, type=Path, help="UTF-8 text to train on")
    parser.add_argument("--minutes", type=float, default=12.0, help="wall time of the training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "step37_tiny")
    parser.add_argument("--seed", type=int, default=37)
    arguments = parser.parse_args()
    text = clean("\n\n".join(path.read_text(encoding="utf-8") for path in arguments.text))
    cut = int(len(text) * 0.95)
    tokenizer = train_tokenizer(text[:cut])
    ids = [torch.tensor(tokenizer.encode(part).ids) for part in (text[:cut], text[cut:])]
    print(f"{len(text) / 1e6:.2f} M characters, {len(ids[0]) / 1e6:.2f} M tokens to train on, "
          f"{len(text[:cut]) / len(ids[0]):.2f} characters a token", flush=True)
    model, drafts, config = train(*ids, arguments.minutes, arguments.seed)
    write_checkpoint(checkpoint_tensors(model, drafts, config, arguments.seed), tokenizer, arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(f"wrote {arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
