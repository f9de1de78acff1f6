"""What vLLM on a CPU lacks to run Step-3.7, and MXFP4, MXFP8 and FP8 weights. Exact and slow: for checks, not for service.

Stock code keeps what a check is about: it resolves the scheme of every module, creates the parameters, loads and places the
weights. Only then they are expanded to BF16 (exact for MXFP4 and MXFP8; FP8 with float scales is rounded once) and handed to vLLM's
unquantized path; activations are not quantized. A run on a CPU therefore proves names, schemes, shapes and loading, not the kernels of a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from pathlib import Path

import torch

BLOCK = 32
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # x86-64 Linux: system call, its code, the state of AMX tiles


def is_cpu() -> bool:
    """Whether this vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def tiles_needed() -> bool:
    """Whether the processor has AMX tiles."""
    info = Path("/proc/cpuinfo")
    return is_cpu() and info.is_file() and " amx_tile" in info.read_text(encoding="utf-8", errors="replace")


def request_tiles() -> None:
    """Linux ends a process that touches AMX tiles before it has asked (SIGILL). oneDNN asks; vLLM's expert kernels, which few
    tokens reach first, do not."""
    if ctypes.CDLL(None, use_errno=True).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA):
        raise OSError(ctypes.get_errno(), "the kernel refuses AMX tiles")


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
    """uint8 [out, in/2] and E8M0 bytes [out, in/32] -> `dtype` [out, in]; low nibble first. BF16 holds every value."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    exponent = (scale.to(torch.int32) - 127).repeat_interleave(BLOCK, dim=-1)
    return torch.ldexp(values[code], exponent).to(dtype)


def expand_mxfp8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn [out, in] and E8M0 bytes [out, in/32] -> `dtype` [out, in]. BF16 holds every value."""
    return torch.ldexp(codes.float(), (scale.to(torch.int32) - 127).repeat_interleave(BLOCK, dim=-1)).to(dtype)


def expand_fp8(codes: torch.Tensor, scale: torch.Tensor, tile: list[int] | None, widths: list[int], dtype: torch.dtype) -> torch.Tensor:
    """float8_e4m3fn [out, in] and its scales -> `dtype`, through float32: per tile where there is one, else per output, or per tensor
    of several joined in `out`, `widths` rows each."""
    rows, columns = codes.shape
    scale = scale.float()
    if tile:
        wide = scale.repeat_interleave(tile[0], dim=0)[:rows].repeat_interleave(tile[1], dim=1)[:, :columns]
    elif scale.shape == (rows, 1):
        wide = scale
    else:
        scale = torch.where(scale == torch.finfo(torch.float32).min, scale.max(), scale)  # parts that were joined on disk have one
        wide = scale.reshape(-1).repeat_interleave(torch.tensor(widths))[:, None]
    return (codes.float() * wide).to(dtype)


def _take(layer, *names: str) -> list[torch.Tensor]:
    """Values of parameters, which leave the layer."""
    values = [getattr(layer, name).data for name in names]
    for name in names:
        delattr(layer, name)
    return values


def _by_expert(expand: Callable, values: torch.Tensor, scales: torch.Tensor, *others) -> torch.Tensor:
    """Expands one expert after the other where there are several: working memory of one."""
    if values.ndim == 2:
        return expand(values, scales, *others)
    return torch.stack([expand(value, scale, *others) for value, scale in zip(values, scales)])


def _become_unquantized(method, layer, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Gives expanded weights to vLLM's unquantized path and makes `method` run its kernel."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    layer.w13_weight = torch.nn.Parameter(w13, requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(w2, requires_grad=False)
    inner = UnquantizedFusedMoEMethod(method.moe)
    inner.process_weights_after_loading(layer)
    method.moe_kernel, method.moe_quant_config = inner.moe_kernel, inner.moe_quant_config


def patch_formats() -> None:
    """compressed-tensors MXFP4, MXFP8 and FP8, experts and linear layers: stock parameters and loading, expanded afterwards."""
    place = "vllm.model_executor.layers.quantization.compressed_tensors"

    def mxfp4(layer, part: str, dtype):
        return _by_expert(expand_mxfp4, *_take(layer, f"{part}weight_packed", f"{part}weight_scale"), dtype)

    def mxfp8(layer, part: str, dtype):
        return _by_expert(expand_mxfp8, *_take(layer, f"{part}weight", f"{part}weight_scale"), dtype)

    def fp8(layer, part: str, dtype):
        codes, scale = _take(layer, f"{part}weight", f"{part}weight_scale")
        rows = codes.shape[-2]
        widths = {"": getattr(layer, "logical_widths", None), "w13_": [rows // 2] * 2, "w2_": [rows]}[part]
        return _by_expert(expand_fp8, codes, scale, layer.weight_block_size, widths, dtype)

    for name, class_name, select, expand in (
            ("w4a4_mxfp4", "W4A4Mxfp4", None, mxfp4), ("w8a8_mxfp8", "W8A8Mxfp8", "select_mxfp8_moe_backend", mxfp8),
            ("w8a8_fp8", "W8A8Fp8", "select_fp8_moe_backend", fp8)):
        module = importlib.import_module(f"{place}.compressed_tensors_moe.compressed_tensors_moe_{name}")
        _expand_experts(module, getattr(module, f"CompressedTensors{class_name}MoEMethod"), select, expand)
    for name, class_name, select, expand in (
            ("w4a4_mxfp4", "W4A4Mxfp4", "init_mxfp4_linear_kernel", mxfp4), ("w8a8_mxfp8", "W8A8Mxfp8", "init_mxfp8_linear_kernel", mxfp8),
            ("w8a8_fp8", "W8A8Fp8", "init_fp8_linear_kernel", fp8)):
        module = importlib.import_module(f"{place}.schemes.compressed_tensors_{name}")
        _expand_linear(module, getattr(module, f"CompressedTensors{class_name}"), select, expand)


def _expand_experts(module, method_class, select: str | None, expand) -> None:
    def process_weights_after_loading(self, layer):
        _become_unquantized(self, layer, *(expand(layer, part, self.moe.in_dtype) for part in ("w13_", "w2_")))

    if select:
        getattr(module, select)  # its place must be there
        setattr(module, select, lambda *positional, **keywords: (None, None))  # no kernel of a GPU is chosen
    method_class.process_weights_after_loading = process_weights_after_loading
    method_class.get_fused_moe_quant_config = lambda self, layer: self.moe_quant_config


def _expand_linear(module, scheme_class, select: str, expand) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    def process_weights_after_loading(self, layer):
        weight = expand(layer, "", getattr(layer, "orig_dtype", None) or layer.params_dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.quant_method = UnquantizedLinearMethod()
        layer.quant_method.process_weights_after_loading(layer)

    getattr(module, select)
    setattr(module, select, lambda *positional, **keywords: None)
    if hasattr(module, "expose_input_quant_key"):  # nothing quantizes activations here
        module.expose_input_quant_key = lambda *positional, **keywords: None
    scheme_class.process_weights_after_loading = process_weights_after_loading


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
            _become_unquantized(self, layer, *(
                _by_expert(expand_fp8, *_take(layer, f"{part}_weight", f"{part}_{self.weight_scale_name}"), self.weight_block_size, [],
                           self.moe.in_dtype) for part in ("w13", "w2")))

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
