"""config.json of Step-3.7 read without remote code, into the classes that vLLM's own model code expects.

vLLM knows `step3p5`, the text model, but not `step3p7`, the wrapper: it then takes transformers' classes, which refuse to
give out attributes that differ from layer to layer (two head counts). The published repositories bring classes of their own
instead, behind --trust-remote-code; with this patch neither is needed.
"""

from __future__ import annotations


def _registry() -> dict:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    return _CONFIG_REGISTRY


def needed() -> bool:
    """Whether vLLM has no configuration class of its own for the wrapper."""
    return "step3p7" not in _registry()


def apply() -> None:
    """Registers the wrapper's class under its model type."""
    from transformers.configuration_utils import PreTrainedConfig
    from vllm.transformers_utils.configs.step3p5 import Step3p5Config

    class PerceptionEncoderConfig(PreTrainedConfig):
        model_type = "perception_encoder"

        def __init__(self, width=1536, mlp_ratio=8960 / 1536, use_ln_pre=True, use_abs_posemb=True, use_rope2d=True,
                     output_dim=None, **others):
            self.width, self.mlp_ratio, self.output_dim = width, mlp_ratio, output_dim
            self.use_ln_pre, self.use_abs_posemb, self.use_rope2d = use_ln_pre, use_abs_posemb, use_rope2d
            super().__init__(**others)

    class Step3p7Config(PreTrainedConfig):
        model_type = "step3p7"
        sub_configs = {"vision_config": PerceptionEncoderConfig, "text_config": Step3p5Config}

        def __init__(self, vision_config=None, text_config=None, understand_projector_stride=2, projector_bias=False,
                     image_token_id=128001, **others):
            if not isinstance(vision_config, PreTrainedConfig):
                vision_config = PerceptionEncoderConfig(**(vision_config or {}))
            if not isinstance(text_config, PreTrainedConfig):
                text_config = Step3p5Config(**(text_config or {}))
            self.vision_config, self.text_config = vision_config, text_config
            self.understand_projector_stride, self.projector_bias = understand_projector_stride, projector_bias
            self.image_token_id = image_token_id
            super().__init__(**others)

    _registry()["step3p7"] = Step3p7Config
