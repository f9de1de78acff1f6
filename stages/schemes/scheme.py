"""What a scheme is: a way in which releases store quantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from stages.schemes.modules import Output

if TYPE_CHECKING:
    import numpy as np
    import torch


class Scheme(Protocol):
    """What a module in SCHEMES has."""

    NAME: str  # in recipes
    LABEL: str  # for a person
    NEEDS: str  # of a GPU, for a person
    FORMAT: str  # of a group in compressed-tensors' config
    CODES: str  # suffix of the tensor of codes; that of scales is `weight_scale`
    CODES_DTYPE: str  # as safetensors spells it
    WEIGHTS_PER_CODE: int  # in an element of that dtype
    HIGH_CODE: tuple[int, str]  # the code, without sign, that the largest element of each block reaches under every rule, and its value
    BLOCK: int  # inputs under one scale
    BYTES_PER_BLOCK: int
    WEIGHTS: dict  # arguments of a group's weights in compressed-tensors' config
    ACTIVATIONS: dict | None  # of its input activations

    @staticmethod
    def outputs(name: str, shape: tuple[int, ...], layout: str) -> list[Output]:
        """The release's tensors made from source weight `name` of shape [out, in] or [experts, out, in]."""

    @staticmethod
    def quantize(weight: np.ndarray, tile_scale: np.ndarray | None, tile: tuple[int, int], rule: str, backend: str,
                 memory: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Rows in float [rows, in], or FP8 codes and float32 scales of their tiles, in the form of kernels/arrays.py -> (codes, scale, sums of
        squares of signal, error and what was decoded). kernels.errors.NonFiniteError for NaN, infinity or an unusable scale.

        In `memory`, flat uint8 and large enough, the codes may lie until it is used again. A scheme with one exponent rule ignores `rule`.
        """

    @staticmethod
    def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes and scales of the release -> float32, exact."""
