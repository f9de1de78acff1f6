"""config.json of Step-3.7 read without remote code, into the classes that vLLM's own model code expects.

vLLM knows `step3p5`, the text model, but not `step3p7`, the wrapper: it then takes transformers' classes, which refuse to
give out attributes that differ from layer to layer (two head counts). The published repositories bring classes of their own
instead, behind --trust-remote-code; with this patch neither is needed. vLLM 0.32 has a class for the text model, 0.33 reads
transformers' or that of the remote code; there one of the latter's form is made here.
"""

from __future__ import annotations

PER_LAYER = ("layer_types", "rope_theta", "rope_scaling", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared", "attention_other_setting")
DEFAULTS = {  # of what the model's code reads and config.json may leave out
    "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0, "use_moe_router_bias": True, "need_fp32_gate": True, "norm_expert_weight": True,
    "moe_router_scaling_factor": 1.0, "sliding_window": None, "use_rope_layers": None, "yarn_only_types": None, "tie_word_embeddings": False}


def _registry() -> dict:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    return _CONFIG_REGISTRY


def needed() -> bool:
    """Whether vLLM has no configuration class of its own for the wrapper."""
    return "step3p7" not in _registry()


def vllms_text_config() -> type | None:
    """vLLM's own class for the text model, None where it has none."""
    try:
        from vllm.transformers_utils.configs.step3p5 import Step3p5Config
    except ImportError:
        return None
    return Step3p5Config


def made_text_config() -> type:
    """A class for the text model that holds what config.json says as it is, per-layer lists with their entries for draft layers."""
    from transformers.configuration_utils import PreTrainedConfig

    class Step3p5Config(PreTrainedConfig):
        model_type = "step3p5"

        def __init__(self, moe_top_k=8, **others):
            values = DEFAULTS | others
            lists = {name: values.pop(name, None) for name in PER_LAYER}  # set last: transformers would check and recast them
            super().__init__(**values)
            self.moe_top_k = self.num_experts_per_tok = moe_top_k
            for name, value in lists.items():
                setattr(self, name, value)

    return Step3p5Config


def apply() -> None:
    """Registers the wrapper's class under its model type, and the text model's where vLLM has none."""
    from transformers.configuration_utils import PreTrainedConfig

    text_class = vllms_text_config()
    if text_class is None:
        text_class = _registry()["step3p5"] = made_text_config()

    class PerceptionEncoderConfig(PreTrainedConfig):
        model_type = "perception_encoder"

        def __init__(self, width=1536, mlp_ratio=8960 / 1536, use_ln_pre=True, use_abs_posemb=True, use_rope2d=True,
                     output_dim=None, **others):
            self.width, self.mlp_ratio, self.output_dim = width, mlp_ratio, output_dim
            self.use_ln_pre, self.use_abs_posemb, self.use_rope2d = use_ln_pre, use_abs_posemb, use_rope2d
            super().__init__(**others)

    class Step3p7Config(PreTrainedConfig):
        model_type = "step3p7"
        sub_configs = {"vision_config": PerceptionEncoderConfig, "text_config": text_class}

        def __init__(self, vision_config=None, text_config=None, understand_projector_stride=2, projector_bias=False,
                     image_token_id=128001, **others):
            if not isinstance(vision_config, PreTrainedConfig):
                vision_config = PerceptionEncoderConfig(**(vision_config or {}))
            if not isinstance(text_config, PreTrainedConfig):
                text_config = text_class(**(text_config or {}))
            self.vision_config, self.text_config = vision_config, text_config
            self.understand_projector_stride, self.projector_bias = understand_projector_stride, projector_bias
            self.image_token_id = image_token_id
            super().__init__(**others)

    _registry()["step3p7"] = Step3p7Config
