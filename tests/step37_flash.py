"""The real Step-3.7-Flash checkpoints without their weights: every tensor's name, dtype, shape and shard, and the config.

Made from the published architecture; the sums (1,597 tensors, 212,523,475,712 bytes) are those of the real release, which
is what makes a plan over these headers a plan for the real thing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from stages.checkpoint.header import DTYPE_BYTES, render_header, sorted_specs

HIDDEN, VOCABULARY, INTERMEDIATE, EXPERT, EXPERTS, HEAD = 4096, 128896, 11264, 1280, 288, 128
TEXT_LAYERS, MTP_LAYERS, VISION, VISION_INNER, BLOCKS = 45, 3, 1536, 8960, 47


def tensors(fp8: bool = True) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Shard -> tensor -> (dtype, shape) of the FP8 or the BF16 release."""
    shards: dict[str, dict] = {}

    def put(shard, name, *shape, dtype="BF16"):
        shards.setdefault(shard, {})[name] = (dtype, shape)

    for layer in range(TEXT_LAYERS + MTP_LAYERS):
        mtp = layer >= TEXT_LAYERS
        shard = f"model-{24 if mtp else layer // 2 + 1:05d}.safetensors"
        prefix = f"model.layers.{layer}."
        heads = 64 if layer % 4 == 0 and not mtp else 96
        put(shard, prefix + "self_attn.q_proj.weight", heads * HEAD, HIDDEN)
        put(shard, prefix + "self_attn.k_proj.weight", 8 * HEAD, HIDDEN)
        put(shard, prefix + "self_attn.v_proj.weight", 8 * HEAD, HIDDEN)
        put(shard, prefix + "self_attn.o_proj.weight", HIDDEN, heads * HEAD)
        put(shard, prefix + "self_attn.g_proj.weight", heads, HIDDEN)
        for norm, size in (("self_attn.q_norm", HEAD), ("self_attn.k_norm", HEAD), ("input_layernorm", HIDDEN),
                           ("post_attention_layernorm", HIDDEN)):
            put(shard, f"{prefix}{norm}.weight", size)
        if layer < 3 or mtp:
            put(shard, prefix + "mlp.gate_proj.weight", INTERMEDIATE, HIDDEN)
            put(shard, prefix + "mlp.up_proj.weight", INTERMEDIATE, HIDDEN)
            put(shard, prefix + "mlp.down_proj.weight", HIDDEN, INTERMEDIATE)
        else:
            put(shard, prefix + "moe.gate.weight", EXPERTS, HIDDEN)
            put(shard, prefix + "moe.router_bias", EXPERTS, dtype="F32")
            for name, rows, columns in (("gate", EXPERT, HIDDEN), ("up", EXPERT, HIDDEN), ("down", HIDDEN, EXPERT)):
                put(shard, f"{prefix}moe.{name}_proj.weight", EXPERTS, rows, columns, dtype="F8_E4M3" if fp8 else "BF16")
                if fp8:
                    put(shard, f"{prefix}moe.{name}_proj.weight_scale_inv", EXPERTS, rows // 128, columns // 128,
                        dtype="F32")
                put(shard, f"{prefix}share_expert.{name}_proj.weight", rows, columns)
        if mtp:
            for norm in ("enorm", "hnorm", "transformer.shared_head.norm"):
                put(shard, f"{prefix}{norm}.weight", HIDDEN)
            put(shard, prefix + "eh_proj.weight", HIDDEN, 2 * HIDDEN)
            put(shard, prefix + "transformer.shared_head.output.weight", VOCABULARY, HIDDEN)
    last, first_vision, second_vision = ("model-00024.safetensors", "model-vit-00001.safetensors",
                                         "model-vit-00002.safetensors")
    put(last, "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    put(last, "lm_head.weight", VOCABULARY, HIDDEN)
    put(last, "model.norm.weight", HIDDEN)
    for block in range(BLOCKS):
        shard, prefix = first_vision if block <= 20 else second_vision, f"vision_model.transformer.resblocks.{block}."
        put(shard, prefix + "attn.in_proj_weight", 3 * VISION, VISION)
        put(shard, prefix + "attn.in_proj_bias", 3 * VISION)
        put(shard, prefix + "attn.out_proj.weight", VISION, VISION)
        put(shard, prefix + "mlp.c_fc.weight", VISION_INNER, VISION)
        put(shard, prefix + "mlp.c_fc.bias", VISION_INNER)
        put(shard, prefix + "mlp.c_proj.weight", VISION, VISION_INNER)
        for name in ("attn.out_proj.bias", "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
                     "ls_1.gamma", "ls_2.gamma"):
            put(shard, prefix + name, VISION)
    put(first_vision, "vision_model.conv1.weight", VISION, 3, 14, 14)
    put(first_vision, "vision_model.positional_embedding", 2704, VISION)
    put(first_vision, "vision_model.ln_pre.weight", VISION)
    put(first_vision, "vision_model.ln_pre.bias", VISION)
    put(first_vision, "vit_large_projector.weight", HIDDEN, 4 * VISION)
    for number, width in ((1, 2), (2, 4)):
        put(second_vision, f"vision_model.vit_downsampler{number}.weight", width * VISION, width // 2 * VISION, 3, 3)
        put(second_vision, f"vision_model.vit_downsampler{number}.bias", width * VISION)
    return shards


def empty_listing(source) -> dict:
    """listing.json of a source of which nothing but headers and config.json is there."""
    return {"path": source.path, "repository": source.repository, "revision": source.revision, "anomalies": [], "files": {}}


def write_metadata(settings, fp8: bool = True) -> None:
    """Writes what `download --metadata` would have written: headers.json, listing.json, auxiliary/config.json."""
    directory = settings.source_directory
    headers = {}
    for shard, entries in tensors(fp8).items():
        specs = sorted_specs([(name, dtype, shape) for name, (dtype, shape) in entries.items()])
        prefix = len(render_header(specs, {"format": "pt"} if fp8 else None))
        offset, table = 0, {}
        for name, dtype, shape in specs:
            size = math.prod(shape) * DTYPE_BYTES[dtype]
            table[name] = [dtype, list(shape), offset, offset + size]
            offset += size
        headers[shard] = {"file_size": prefix + offset, "metadata": {"format": "pt"} if fp8 else None,
                          "data_start": prefix, "tensors": table}
    (directory / "auxiliary").mkdir(parents=True)
    (directory / "headers.json").write_text(json.dumps(headers))
    (directory / "listing.json").write_text(json.dumps(empty_listing(settings.source)))
    (directory / "auxiliary" / "config.json").write_text(json.dumps(config(fp8)))


def config(fp8: bool) -> dict:
    """The part of config.json that matters to a plan."""
    result = {"architectures": ["Step3p7ForConditionalGeneration"], "model_type": "step3p7",
              "text_config": {"num_hidden_layers": TEXT_LAYERS, "num_nextn_predict_layers": MTP_LAYERS}}
    if fp8:
        result["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": [128, 128]}
    return result


def write_checkpoint(directory: Path) -> None:
    """The FP8 release as files of their true size: real headers, an index that omits all scales, and holes for weights."""
    directory.mkdir(parents=True)
    weight_map = {}
    for shard, entries in tensors().items():
        specs = sorted_specs([(name, dtype, shape) for name, (dtype, shape) in entries.items()])
        with open(directory / shard, "wb") as file:
            header = render_header(specs, {"format": "pt"})
            file.write(header)
            file.truncate(len(header) + sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in specs))
        weight_map |= {name: shard for name in entries if not name.endswith("_scale_inv")}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config(True)))
