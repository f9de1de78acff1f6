"""The draft (MTP) layers of Step-3.5/3.7 under a compressed-tensors config.

Two things stand in the way in vLLM 0.32:

1. vLLM cuts `layer_types` to num_hidden_layers, but builds draft layer num_hidden_layers + k with entry
   num_hidden_layers + k of that list: IndexError.
2. Any compressed-tensors config gives each attention layer three KV-cache scales and three zero points as parameters. Their
   defaults (1 and 0) are right and no checkpoint needs to hold them, but the draft layers' loader, alone among vLLM's
   loaders, insists on every parameter: "... are not in the checkpoint and will falsely use random initialization".
   (A release can also carry these 72 bytes itself; then 2 is not needed.)
"""

from __future__ import annotations

import inspect
import re

from mxforge_vllm.configuration import vllms_text_config

OPTIONAL = re.compile(r".*\.attn\.(q|k|v|prob)_(scale|zero_point)")


def layer_types_needed() -> bool:
    """Whether a list with entries for draft layers is cut; 0.33 has no class of its own that could."""
    text_class = vllms_text_config()
    if text_class is None:
        return False
    config = text_class(num_hidden_layers=1, num_nextn_predict_layers=1,
                        layer_types=["full_attention", "sliding_attention"])
    return len(config.layer_types) == 1


def keep_layer_types() -> None:
    """Puts the uncut list back where it has exactly one entry per layer, draft layers included."""
    text_class = vllms_text_config()
    stock = text_class.__init__

    def __init__(self, *positional, **keywords):
        stock(self, *positional, **keywords)
        whole = keywords.get("layer_types")
        if whole is not None and len(whole) == self.num_hidden_layers + self.num_nextn_predict_layers:
            self.layer_types = whole

    __init__.__signature__ = inspect.signature(stock)
    text_class.__init__ = __init__


def optional_scales_needed() -> bool:
    """Whether compressed-tensors registers zero points and the draft layers' loader checks for completeness."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsKVCacheMethod
    from vllm.model_executor.models import step3p5_mtp

    return ("zero_point" in inspect.getsource(CompressedTensorsKVCacheMethod.create_weights)
            and "is_mtp_completeness_check_enabled" in vars(step3p5_mtp))


def make_scales_optional() -> None:
    """The completeness check stays, but forgives scalars whose defaults are right."""
    from vllm.model_executor.model_loader.mtp_validation import (disable_mtp_completeness_check,
                                                                 is_mtp_completeness_check_enabled)
    from vllm.model_executor.models.step3p5_mtp import Step3p5MTP

    stock = Step3p5MTP.load_weights

    def load_weights(self, weights):
        strict = is_mtp_completeness_check_enabled()
        with disable_mtp_completeness_check():
            loaded = stock(self, weights)
        forgiven = {name for name, parameter in self.named_parameters()
                    if OPTIONAL.fullmatch(name) and parameter.numel() == 1}
        missing = sorted(set(dict(self.named_parameters())) - loaded - forgiven)
        if strict and missing:
            raise RuntimeError(f"{len(missing)} parameters of the draft layers are not in the checkpoint, {missing[0]} first; "
                               "they would be random")
        return loaded | forgiven

    Step3p5MTP.load_weights = load_weights
