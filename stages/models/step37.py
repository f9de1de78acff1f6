"""Step-3.7 checkpoints in transformers, every tensor accounted for.

transformers loads neither the block-FP8 nor the MXFP4 layout of this model correctly by itself: the scale of `down_proj` is
never applied to the first, and the experts of the second stay at random values with only a warning. So checkpoints are
expanded here, exactly (float32 holds every product, BF16 holds every MXFP4 value), handed over under their published
names, and the loading report must say 0 missing and 0 unexpected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.checkpoint.shards import Shards
from stages.dialects import recognize
from stages.dialects.config import read_source_config
from stages.dialects.reading import Tensors, decoded
from stages.dialects.roles import hidden_layers, layer_of
from stages.errors import UserError
from stages.schemes.architectures import architecture_of
from stages.schemes.draft_scales import NAME as DRAFT_SCALE
from stages.schemes.modules import module_of

if TYPE_CHECKING:
    from transformers import Step3p7ForConditionalGeneration, Step3p7TextConfig

    from stages.models.step37_drafts import Drafts

PER_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+\.weight)")


def expanded_tensors(directory: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight of a checkpoint or release under its published name, values expanded to `dtype`.

    Experts stored one by one come stacked, [experts, out, in], as `...moe.gate_proj.weight`. F32 tensors stay F32.
    """
    directory = Path(directory)
    config = read_source_config(directory)
    with Shards(directory) as opened:
        opened.open_all()
        if not opened.readers:
            raise UserError(f"{directory} holds no *.safetensors file; is it a checkpoint?")
        claims = recognize(opened.tensors, opened.shard_of, config)
        places = Tensors(opened.reader)

        def value(name: str) -> torch.Tensor:
            if claims[name].dialect != "plain":
                return decoded(places, name, claims[name]).to(dtype)
            tensor = opened.reader(name).tensor(name)
            return tensor if tensor.dtype == torch.float32 else tensor.to(dtype)

        experts: dict[str, dict[int, str]] = {}
        for name in sorted(opened.tensors):
            if claims[name].belongs_to or DRAFT_SCALE.fullmatch(name):
                continue
            published = name if claims[name].dialect == "plain" else f"{module_of(name)}.weight"
            if match := PER_EXPERT.fullmatch(published):
                experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = name
            else:
                yield published, value(name)
        for name, members in experts.items():
            yield name, torch.stack([value(members[expert]) for expert in sorted(members)])


def _published_name(name: str) -> str:
    """The name under which the FP8 and BF16 releases publish a tensor; other exports put prefixes of their own before it."""
    name = name.replace("model.language_model.", "model.", 1)
    return name.removeprefix("model.") if name.startswith(("model.vision_model.", "model.vit_large_projector")) else name


def load(directory: Path, dtype: torch.dtype) -> tuple[Step3p7ForConditionalGeneration, Drafts | None, dict[str, int]]:
    """(model, drafts or None, loading report) of a Step-3.7 checkpoint or release, in evaluation mode.

    The report is {"missing": 0, "unexpected": 0}: counts over the text, vision and draft parameters, of which UserError names what is wrong
    where they are not 0.
    """
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its loading report is turned into the error below
    raw = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    architecture = (raw.get("architectures") or ["?"])[0]
    row = architecture_of(architecture)
    if row is None or architecture not in row.in_process:
        raise UserError(f"{directory}: architecture {architecture} cannot be evaluated in process; measure perplexity through a server "
                        "(evaluation.via=vllm)")
    layers = hidden_layers(raw)
    raw.pop("quantization_config", None)
    raw.pop("auto_map", None)
    config = Step3p7Config(**raw)
    state, draft_state = {}, {}
    for name, tensor in expanded_tensors(directory, dtype):
        layer = layer_of(name)
        target = draft_state if layer is not None and layer >= layers else state
        target[_published_name(name)] = tensor
    model, report = Step3p7ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])  # refused below, not ignored
    drafts = None
    if config.text_config.num_nextn_predict_layers and draft_state:  # some copies are published without them
        drafts, missing_drafts, unexpected_drafts = _load_drafts(config.text_config, draft_state, dtype)
        missing += missing_drafts
        unexpected += unexpected_drafts
    if missing or unexpected or mismatched:
        raise UserError(f"{directory} does not fill the model: {len(missing)} tensors missing "
                        f"({', '.join(missing[:2])}), {len(unexpected)} unexpected ({', '.join(unexpected[:2])}), "
                        f"{len(mismatched)} of another shape ({', '.join(mismatched[:2])}); measure perplexity through a server "
                        "(evaluation.via=vllm), or get the checkpoint as its maker published it")
    return model.eval(), drafts, {"missing": len(missing), "unexpected": len(unexpected)}


def _load_drafts(text_config: Step3p7TextConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Drafts, list[str], list[str]]:
    """(draft layers in evaluation mode, names of tensors that they lack, names that they do not know), from tensors by their published names."""
    from stages.models.step37_drafts import Drafts, checkpoint_names

    drafts, names = Drafts(text_config), checkpoint_names(text_config)
    missing, unexpected = sorted(set(names.values()) - set(state)), sorted(set(state) - set(names.values()))
    if not missing:
        drafts.load_state_dict({inner: state[name] for inner, name in names.items()})
    for parameter in drafts.parameters():  # not .to(dtype): the rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return drafts.eval(), missing, unexpected
