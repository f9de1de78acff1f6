"""A vLLM plugin for Step-3.7 MXFP4 releases. vLLM calls `register` in each of its processes.

Two kinds of patches, each a row of PATCHES:

- `drafts`: what stock vLLM (0.32, 0.33) lacks for the draft (MTP) layers of a compressed-tensors checkpoint, on any device.
- `cpu`: what a machine without a GPU lacks: MXFP4, MXFP8 and FP8 weights are expanded to BF16 when they are loaded, sigmoid
  routing and the SwiGLU limit run in plain torch. Slow and exact; for checks, not for service.

A patch is applied only where its `needed` says that this vLLM lacks the thing; one that is no longer needed, or whose place
is gone, is left out with a line in the log, never an error at import. MXFORGE_VLLM_SKIP=name,name leaves patches out on
purpose, `all` leaves out every one (used to prove which releases load without them).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from vllm.logger import init_logger

from mxforge_vllm import configuration, cpu, drafts

logger = init_logger("vllm.mxforge")


@dataclass(frozen=True)
class Patch:
    """One change to vLLM: `needed()` looks at the running vLLM, `apply()` changes it."""

    name: str
    why: str
    needed: Callable[[], bool]
    apply: Callable[[], None]


PATCHES = (
    Patch("configuration", "config.json without remote code: transformers' own Step-3.7 classes refuse per-layer attributes",
          configuration.needed, configuration.apply),
    Patch("draft_layer_types", "per-layer lists keep the entries of the draft layers",
          drafts.layer_types_needed, drafts.keep_layer_types),
    Patch("draft_scales", "KV-cache scales and zero points are optional in the draft layers' strict loader",
          drafts.optional_scales_needed, drafts.make_scales_optional),
    Patch("cpu_tiles", "permission to use AMX tiles, asked for before vLLM's expert kernels use them", cpu.tiles_needed, cpu.request_tiles),
    Patch("cpu_routing", "sigmoid routing with a bias", cpu.routing_needed, cpu.patch_routing),
    Patch("cpu_experts", "experts with a SwiGLU limit", cpu.experts_needed, cpu.patch_experts),
    Patch("cpu_formats", "MXFP4, MXFP8 and FP8 of compressed-tensors are expanded at load", cpu.is_cpu, cpu.patch_formats),
    Patch("cpu_block_fp8", "block-FP8 experts are expanded at load", cpu.is_cpu, cpu.patch_block_fp8),
    Patch("cpu_vision", "the vision tower hands contiguous images on", cpu.is_cpu, cpu.patch_vision),
)

_done: set[str] = set()


def register() -> None:
    """Entry point of `vllm.general_plugins`; may be called more than once in a process."""
    skipped = {name.strip() for name in os.environ.get("MXFORGE_VLLM_SKIP", "").split(",") if name.strip()}
    unknown = skipped - {patch.name for patch in PATCHES} - {"all"}
    if unknown:
        logger.warning("MXFORGE_VLLM_SKIP names no patch: %s (there are %s)", ", ".join(sorted(unknown)),
                       ", ".join(patch.name for patch in PATCHES))
    for patch in PATCHES:
        if patch.name in _done:
            continue
        _done.add(patch.name)
        if patch.name in skipped or "all" in skipped:
            logger.info("mxforge: %s left out (MXFORGE_VLLM_SKIP)", patch.name)
            continue
        try:
            if not patch.needed():
                logger.info("mxforge: %s not needed here", patch.name)
                continue
            patch.apply()
        except (ImportError, AttributeError, OSError) as error:  # another vLLM: its own code must cope, and says so if it cannot
            logger.warning("mxforge: %s does not fit here (%s); %s is left to it", patch.name, error, patch.why)
            continue
        logger.info("mxforge: %s: %s", patch.name, patch.why)
