"""A checkpoint that is looked at, opened: its config.json, its shards, and how the weight of each module is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from stages.checkpoint.files import read_json
from stages.checkpoint.header import TensorInfo
from stages.checkpoint.shards import Shards
from stages.checkup.json_checks import checked_section, json_object
from stages.dialects.config import text_part
from stages.dialects.plain import FUSED_EXPERTS
from stages.dialects.roles import is_routed_expert, layer_of
from stages.errors import UserError
from stages.schemes import SCHEMES, vllm_rules
from stages.schemes.architectures import Architecture
from stages.schemes.kept import stored_as
from stages.schemes.modules import is_weight, module_of

SAMPLED_ROWS = 32  # of each matrix, where not all are looked at


class Module(NamedTuple):
    """How the weight of a module is stored."""

    stored: str  # mxfp4, mxfp8, fp8 128x128 ..., or plain
    info: TensorInfo  # header entry of its weight
    name: str  # of the weight, or of its codes
    scale: str | None  # name of its scale


class Pair(NamedTuple):
    """Codes and scales that fit each other: a quantized matrix, or one for each expert."""

    module: str
    stored: str  # mxfp4 | mxfp8
    info: TensorInfo  # header entry of the codes
    codes: str  # names of the two tensors
    scale: str

    def members(self) -> Iterator[tuple[int | None, str]]:
        """(expert, what faults call it) of each matrix; the expert is None where there is one matrix only."""
        for expert in range(self.info.shape[0]) if len(self.info.shape) == 3 else (None,):
            yield expert, self.module if expert is None else f"{self.module}[{expert}]"

    @property
    def shape(self) -> tuple[int, int]:
        """Of one matrix, decoded."""
        return self.info.shape[-2], SCHEMES[self.stored].WEIGHTS_PER_CODE * self.info.shape[-1]


class Checkpoint(Shards):
    """What every check is given. `notes` collects what is odd but loads, `counts` how many things a check has looked at."""

    def __init__(self, directory: Path, quick: bool = False, section: dict | None = None, config: dict | None = None):
        """section, config: the quantization_config and the config.json to assume instead of those that are there."""
        super().__init__(directory)
        self.quick = quick
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        if config is None and not (self.directory / "config.json").exists():
            raise UserError(f"{self.directory}/config.json is missing: complete the checkpoint, or make it from the source's with "
                            f"`mxforge config {self.directory} --base SOURCE/config.json`")
        self.config = read_json(self.directory / "config.json") if config is None else config
        self.text = json_object(text_part(self.config), "config.json: text_config")
        names = self.config.get("architectures")
        self.architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
        if section is not None:
            self.section = section
            return
        section = self.config.get("quantization_config") or self.text.get("quantization_config")
        if section is None:
            raise UserError(f"{self.directory / 'config.json'}: has no quantization_config, so that an engine reads everything as "
                            "unquantized; name a quantized checkpoint, or make it one with `mxforge config`")
        self.section = checked_section(section)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """How each module with a weight is stored, by the module's name; asked for when the shards are open.

        FP8 whose scale fits none of the formats is stored as `fp8`, of which `pairs` says what is wrong.
        """
        found = {}
        for name, info in self.tensors.items():
            if name.endswith(".weight_packed"):
                found[module_of(name)] = Module("mxfp4", info, name, f"{name.removesuffix('_packed')}_scale")
            elif is_weight(name, info.shape) or (len(info.shape) == 3 and FUSED_EXPERTS.fullmatch(name)):
                scale = self.tensors.get(f"{name}_scale") if info.dtype == "F8_E4M3" else None
                kind = "plain" if scale is None else "mxfp8" if scale.dtype == "U8" else stored_as(info.shape, scale.dtype, scale.shape) or "fp8"
                found[module_of(name)] = Module(kind, info, name, None if scale is None else f"{name}_scale")
        return found

    def engine_modules(self, layers: int, known: bool = True) -> tuple[list[str], list[str], dict[str, str]]:
        """(linear modules, those of routed experts, module -> format of what is quantized), as `vllm_rules.runtime_modules` takes them.

        layers: text layers. known: whether the architecture has a row; of others a 3D weight that is no expert's says nothing.
        """
        linears, experts, formats = [], [], {}
        for module, (stored, info, _, _) in self.modules.items():
            if is_routed_expert(module, layers):
                experts.append(module)
            elif len(info.shape) == 2 or known:
                linears.append(module)
            if stored != "plain":
                formats[module] = stored
        return linears, experts, formats

    def model_fault(self, row: Architecture, layers: int, experts: list[str]) -> str | None:
        """`text_fault` or `model_fault` (vllm_rules) of this checkpoint; layers: text layers; experts: modules of routed experts, as
        `engine_modules` gives them."""
        expert_layers = {layer for module in experts if (layer := layer_of(module)) is not None}
        return (vllm_rules.text_fault(row, self.architecture, self.text.get("model_type"))
                or vllm_rules.model_fault(row, self.architecture, self.tensors, expert_layers, layers))

    def quantized_experts(self, layers: int) -> tuple[set[str], bool]:
        """(projections under which routed experts are stored quantized, whether some are stacked in 3D); of text layers and draft layers."""
        found = {module: info for module, (stored, info, _, _) in self.modules.items() if stored != "plain" and is_routed_expert(module, layers)}
        return {module.rpartition(".")[2] for module in found}, any(len(info.shape) == 3 for info in found.values())

    def decodable(self) -> Iterator[Pair]:
        """Every MXFP4 or MXFP8 pair that fits."""
        for module, (stored, info, name, scale) in self.modules.items():
            found = self.tensors.get(scale)
            if (stored in SCHEMES and len(info.shape) in (2, 3) and math.prod(info.shape) and found
                    and info.dtype == SCHEMES[stored].CODES_DTYPE and (found.dtype, found.shape) == ("U8", scale_shape(info, stored))):
                yield Pair(module, stored, info, name, scale)


def scale_shape(info: TensorInfo, stored: str) -> tuple[int, ...]:
    """Shape of the block scales of codes stored as mxfp4 or mxfp8; a width that is no multiple of a block gets one too many, which fits nothing."""
    scheme = SCHEMES[stored]
    return (*info.shape[:-1], -(-info.shape[-1] * scheme.WEIGHTS_PER_CODE // scheme.BLOCK)) if info.shape else ()
