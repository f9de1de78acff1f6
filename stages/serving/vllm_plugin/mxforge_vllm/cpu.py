"""What vLLM on a CPU lacks to run Step-3.7 and MXFP4 or block-FP8 experts. Exact and slow: for checks, not for service.

Stock code keeps what a check is about: it resolves the scheme of every module, creates the parameters, loads and places the
weights. Only then experts are expanded to BF16 (exact for MXFP4; block FP8 is rounded once) and handed to vLLM's unquantized
path. A run on a CPU therefore proves names, schemes, shapes and loading, not the kernels of a GPU.
"""

from __future__ import annotations

import torch

BLOCK = 32


def is_cpu() -> bool:
    """Whether this vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def routing_needed() -> bool:
    """CPU router of 0.32: softmax or grouped top-k only."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router  # noqa: F401

    return is_cpu()


def patch_routing() -> None:
    """Ungrouped sigmoid routing is grouped routing with a single group."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter, _grouped_topk

    stock = CPURouter._compute_routing

    def _compute_routing(self, hidden_states, router_logits, indices_type, **keywords):
        if self.use_grouped_topk or self.custom_routing_function is not None or self.scoring_func != "sigmoid":
            return stock(self, hidden_states, router_logits, indices_type, **keywords)
        return _grouped_topk(router_logits, self.top_k, self.renormalize, 1, 1, self.scoring_func,
                             self.routed_scaling_factor, self.e_score_correction_bias)

    CPURouter._compute_routing = _compute_routing


def experts_needed() -> bool:
    """Whether no CPU experts class knows the limited SwiGLU."""
    if not is_cpu():
        return False
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    return not CPUUnquantizedExperts._supports_activation(MoEActivation.SWIGLUSTEP)


def patch_experts() -> None:
    """Adds a plain torch experts class behind vLLM's own ones, for activations that those refuse."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class TorchExperts(CPUUnquantizedExperts):
        """Experts one after the other: two matrix products in the model's dtype, the activation between them."""

        @staticmethod
        def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
            limited = moe_config.activation == MoEActivation.SWIGLUSTEP
            return limited, None if limited else "vLLM's own CPU experts run this activation"

        def process_weights_after_loading(self, layer):
            pass  # nothing is packed

        def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
                  a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input):
            result = torch.zeros(hidden_states.shape, dtype=torch.float32)
            for expert in range(w1.shape[0]):
                token, choice = torch.nonzero(topk_ids == expert, as_tuple=True)
                if token.numel() == 0:
                    continue
                gate, up = (hidden_states[token] @ w1[expert].T).chunk(2, dim=-1)
                if activation == MoEActivation.SWIGLUSTEP:  # the limit is vLLM's own constant
                    inner = torch.nn.functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)
                else:
                    raise NotImplementedError(f"activation {activation}")
                weight = 1.0 if apply_router_weight_on_input else topk_weights[token, choice, None].float()
                result.index_add_(0, token, (inner @ w2[expert].T).float() * weight)
            output.copy_(result)

    stock = unquantized.backend_to_kernel_cls

    def backend_to_kernel_cls(backend):
        found = stock(backend)
        return [*found, TorchExperts] if backend == unquantized.UnquantizedMoeBackend.CPU else found

    unquantized.backend_to_kernel_cls = backend_to_kernel_cls


def expand_mxfp4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., in/2] and E8M0 bytes [..., in/32] -> `dtype` [..., in]; low nibble first. BF16 holds every value."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    exponent = (scale.to(torch.int32) - 127).repeat_interleave(BLOCK, dim=-1)
    return torch.ldexp(values[code], exponent).to(dtype)


def expand_block_fp8(codes: torch.Tensor, scale: torch.Tensor, tile: list[int], dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn [..., out, in] and tile scales -> `dtype`, through float32."""
    rows, columns = codes.shape[-2:]
    wide = scale.float().repeat_interleave(tile[0], dim=-2)[..., :rows, :].repeat_interleave(tile[1], dim=-1)[..., :columns]
    return (codes.float() * wide).to(dtype)


def _become_unquantized(method, layer, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Gives expanded weights to vLLM's unquantized path and makes `method` run its kernel."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    layer.w13_weight = torch.nn.Parameter(w13, requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(w2, requires_grad=False)
    inner = UnquantizedFusedMoEMethod(method.moe)
    inner.process_weights_after_loading(layer)
    method.moe_kernel, method.moe_quant_config = inner.moe_kernel, inner.moe_quant_config


def patch_mxfp4() -> None:
    """compressed-tensors MXFP4 experts: stock parameters and loading, expanded afterwards."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_mxfp4 as module)

    method_class = module.CompressedTensorsW4A4Mxfp4MoEMethod

    def process_weights_after_loading(self, layer):
        dtype = layer.params_dtype
        expanded = [torch.stack([expand_mxfp4(packed, scale, dtype) for packed, scale in
                                 zip(getattr(layer, f"{part}_weight_packed"), getattr(layer, f"{part}_weight_scale"))])
                    for part in ("w13", "w2")]
        for part in ("w13", "w2"):
            delattr(layer, f"{part}_weight_packed")
            delattr(layer, f"{part}_weight_scale")
        _become_unquantized(self, layer, *expanded)

    method_class.process_weights_after_loading = process_weights_after_loading


def patch_block_fp8() -> None:
    """Block-FP8 experts: vLLM's parameters and loading, without a choice among kernels that a CPU does not have."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization import fp8

    class ExpandedFp8MoEMethod(fp8.Fp8MoEMethod):
        def __init__(self, quant_config, layer):
            fp8.FusedMoEMethodBase.__init__(self, layer.moe_config)
            self.quant_config = quant_config
            self.weight_block_size = quant_config.weight_block_size
            self.block_quant = self.weight_block_size is not None
            self.weight_scale_name = "weight_scale_inv" if self.block_quant else "weight_scale"
            self.weight_scale_refine, self.moe_block_shape = None, self.weight_block_size
            self.fp8_backend = self.experts_cls = None

        def process_weights_after_loading(self, layer):
            dtype = self.moe.in_dtype
            expanded = [torch.stack([expand_block_fp8(codes, scale, self.weight_block_size, dtype) for codes, scale in
                                     zip(getattr(layer, f"{part}_weight"), getattr(layer, f"{part}_{self.weight_scale_name}"))])
                        for part in ("w13", "w2")]
            _become_unquantized(self, layer, *expanded)

        def get_fused_moe_quant_config(self, layer):
            return self.moe_quant_config

        apply = UnquantizedFusedMoEMethod.forward_native

    stock = fp8.Fp8Config.get_quant_method

    def get_quant_method(self, layer, prefix):
        if isinstance(layer, fp8.RoutedExperts) and self.weight_block_size is not None and self.is_checkpoint_fp8_serialized:
            if not fp8.is_layer_skipped(prefix=prefix, ignored_layers=self.ignored_layers,
                                        fused_mapping=self.packed_modules_mapping, match_mode=self.ignored_layers_match_mode):
                return ExpandedFp8MoEMethod(self, layer)
        return stock(self, layer, prefix)

    fp8.Fp8Config.get_quant_method = get_quant_method


def patch_vision() -> None:
    """The tower's output keeps the strides of a transpose, which a CPU kernel after it does not take."""
    from vllm.model_executor.models.step_vl import PerceptionEncoder

    stock = PerceptionEncoder.forward

    def forward(self, *positional, **keywords):
        return stock(self, *positional, **keywords).contiguous()

    PerceptionEncoder.forward = forward
