"""Checks a compressed-tensors MXFP4 or MXFP8 checkpoint, ours or not, by its directory alone, and says what is wrong with it.

What an engine would take without a word is what is looked for: tensors that no target claims, targets that hit nothing, an
expert that is missing, a scale of another shape, an index that lies. Numbers are looked at, too: block scales that mean NaN,
blocks that leave their range unused, matrices whose size stands apart from that of their siblings. A shift of all exponents by
one cannot be seen in the codes; with a source to compare with, it is. A manifest.json, where there is one, is checked in full.

    mxforge verify DIRECTORY [--source DIRECTORY] [--quick] [--json]
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from kernels.difference import difference
from kernels.errors import NonFiniteError
from stages.checkpoint.files import read_json, sha256_file
from stages.checkpoint.header import INDEX, TensorInfo
from stages.checkpoint.reader import ShardReader, as_array, as_tensor
from stages.dialects import recognize
from stages.dialects.config import EXPERT_COUNTS, checked
from stages.dialects.reading import Tensors, decoded_rows, stored_rows
from stages.dialects.roles import is_routed_expert
from stages.errors import UserError
from stages.quantize_experts import USUAL_SIZES
from stages.schemes import SCHEMES, vllm_rules
from stages.schemes.architectures import UNKNOWN, architecture_of
from stages.schemes.kept import stored_as
from stages.schemes.modules import matrices

EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<expert>\d+)\.(?P<projection>[^.]+)$")
SCALE_DTYPE = "torch.uint8"
ARGUMENTS = {  # format -> what its group's `weights` must say
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
    "mxfp8-quantized": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
    "float-quantized": {"num_bits": 8, "type": "float", "symmetric": True},
}
LAYER = re.compile(r"(?:model\.language_model|language_model\.model|model)\.layers\.(?P<layer>\d+)\.(?P<tail>.+)$", re.S)
ROUTED = re.compile(r"\.experts\.|^\w+\.(gate|router)\.weight$")  # of a layer with experts, even one that has lost them
BLOCKS = {"mxfp4": 2, "mxfp8": 1}  # stored with a byte per 32 weights: how many weights an element of the codes holds
SAMPLED_ROWS = 32  # of each matrix, for the numbers
MOST_LAYERS = 10_000
MOST_THREADS = 32  # more do not make a disk faster
ROWS_AT_ONCE = 4 << 20  # weights decoded at once in a comparison
HIGH_CODES = {"mxfp4": (5, "3"), "mxfp8": (0x70, "128")}  # every rule puts a block's largest element at this code or above
UNUSED_BLOCKS = 0.02  # share of blocks whose largest code may be lower; 0 under the rules, some for clipped weights
APART = 0.75  # |log2| of a matrix's root mean square over its siblings' median, from which it is called apart ...
SPREADS = 8  # ... and a fault where it is so many times the median distance of its siblings, too
NOT_IN_MANIFEST = ("manifest.json", "README.md")
DECODED_DB = 40.0  # of FP8 that was decoded into BF16, which rounds once
LOWEST_SQNR_DB = 15.0  # against a source; round-to-nearest MXFP4 has 18 to 19.1


class Checkup:
    """All checks of one directory. Each yields faults, one line each; `notes` collects what is odd but loads."""

    def __init__(self, directory: Path, source: Path | None = None, quick: bool = False, section: dict | None = None,
                 config: dict | None = None):
        """section, config: the quantization_config and the config.json to assume instead of those that are there."""
        self.directory, self.source, self.quick = Path(directory), source and Path(source), quick
        self.readers: dict[str, ShardReader] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.where: dict[str, str] = {}
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        self._memory = threading.local()
        self.config = config or read_json(self.directory / "config.json")
        self.text = _object(self.config.get("text_config") or self.config, "config.json: text_config")
        names = self.config.get("architectures") or [None]
        self.architecture = names[0] if isinstance(names, list) else None
        if section is not None:
            self.section = section
            return
        section = self.config.get("quantization_config") or self.text.get("quantization_config")
        if section is None:
            raise UserError(f"{self.directory / 'config.json'}: has no quantization_config, so that an engine reads everything as "
                            "unquantized; name a quantized checkpoint, or make it one with `mxforge config`")
        self.section = _checked_section(section)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Shards that `containers` opens are closed behind the block."""
        with ExitStack() as self._stack:
            yield

    # -- what is there

    def containers(self) -> Iterator[str]:
        """Every shard's header is sound, and no tensor is in two."""
        for path in sorted(self.directory.glob("*.safetensors")):
            if not path.is_file():
                yield f"{path.name}: is no regular file, or a link to nothing"
                continue
            try:
                self.readers[path.name] = self._stack.enter_context(ShardReader(path))
            except (UserError, OSError) as error:
                yield str(error)
                continue
            for name, info in self.readers[path.name].header.tensors.items():
                if name in self.where:
                    yield f"{name}: is in {self.where[name]} and in {path.name}; an engine takes either"
                self.tensors[name], self.where[name] = info, path.name
        if not self.readers:
            yield f"{self.directory}: holds no *.safetensors file that can be read"
        self.counts["containers"] = len(self.readers)

    def index(self) -> Iterator[str]:
        """The index names every tensor in its shard, and the true number of bytes."""
        path = self.directory / INDEX
        if not path.exists():
            if len(self.readers) > 1:
                yield f"{INDEX}: is missing, though there are {len(self.readers)} shards"
            return
        index = _object(read_json(path), INDEX)
        listed = _object(index.get("weight_map") or {}, f"{INDEX}: weight_map")
        yield from _some(sorted(set(self.tensors) - set(listed)), f"{INDEX}: does not list", "engines that go by the index miss them")
        yield from _some(sorted(set(listed) - set(self.tensors)), f"{INDEX}: lists", "no shard holds them")
        yield from _some([f"{name} ({listed[name]}, is in {self.where[name]})" for name in sorted(set(listed) & set(self.tensors))
                          if listed[name] != self.where[name]], f"{INDEX}: names the wrong shard for", "loading fails")
        total = sum(info.nbytes for info in self.tensors.values())
        claimed = _object(index.get("metadata") or {}, f"{INDEX}: metadata").get("total_size")
        if claimed != total:
            yield f"{INDEX}: total_size is {claimed!r}, the tensors have {total} bytes"
        self.counts["index"] = len(listed)

    @cached_property
    def modules(self) -> dict[str, tuple[str, TensorInfo, str | None]]:
        """Module name -> (stored as, its weight's header entry, name of its scale): mxfp4, mxfp8, fp8 128x128 ..., or plain.

        FP8 whose scale fits none of these is stored as `fp8`, of which `pairs` says what is wrong.
        """
        found = {}
        for name, info in self.tensors.items():
            if name.endswith(".weight_packed"):
                stem = name.removesuffix("_packed")
                found[stem.removesuffix(".weight")] = ("mxfp4", info, f"{stem}_scale")
            elif re.search(r"[._]weight$", name) and len(info.shape) >= 2:
                scale = self.tensors.get(f"{name}_scale") if info.dtype == "F8_E4M3" else None
                kind = "plain" if scale is None else "mxfp8" if scale.dtype == "U8" else stored_as(info.shape, scale.dtype, scale.shape) or "fp8"
                found[re.sub(r"[._]weight$", "", name)] = (kind, info, None if scale is None else f"{name}_scale")
        return found

    def decodable(self) -> Iterator[tuple[str, str, TensorInfo, str, str]]:
        """(module, stored as, codes' header entry, their name, name of their scale) of every MXFP4 or MXFP8 pair that fits."""
        for module, (stored, info, scale) in self.modules.items():
            found = self.tensors.get(scale)
            if (stored in BLOCKS and len(info.shape) in (2, 3) and math.prod(info.shape) and found
                    and info.dtype == ("U8" if stored == "mxfp4" else "F8_E4M3")
                    and (found.dtype, found.shape) == ("U8", _scale_shape(info, BLOCKS[stored]))):
                yield module, stored, info, f"{module}.{SCHEMES[stored].CODES}", scale

    def pairs(self) -> Iterator[str]:
        """Packed weights and scales come in pairs whose dtypes and shapes fit."""
        claimed = set()
        for module, (stored, info, scale) in self.modules.items():
            if stored == "plain":
                if info.dtype.startswith("F8"):
                    yield f"{module}: its weight is {info.dtype}, but has no weight_scale; its values are lost"
                elif info.dtype not in ("BF16", "F16", "F32"):
                    yield f"{module}: its weight is {info.dtype}, but has no scale; an engine takes the numbers as they are"
                continue
            claimed.add(scale)
            name = f"{module}.weight" + ("_packed" if stored == "mxfp4" else "")
            if info.dtype != ("U8" if stored == "mxfp4" else "F8_E4M3"):
                yield f"{self.where[name]}: {name} is {info.dtype}; only MXFP4 (U8) and MXFP8 are verified here"
                continue
            if len(info.shape) not in (2, 3) or not math.prod(info.shape):
                yield f"{self.where[name]}: {name} has shape {list(info.shape)}, which is no matrix"
                continue
            if scale not in self.tensors:
                yield f"{self.where[name]}: {name} has no {scale}; an engine leaves the scale uninitialized"
                continue
            if stored.startswith("fp8"):
                if stored == "fp8":
                    yield (f"{self.where[scale]}: {scale} is {self.tensors[scale].dtype} {list(self.tensors[scale].shape)}, which is no scale "
                           f"per tensor, per channel or per 128x128 of {name} {list(info.shape)}")
                continue
            expected = _scale_shape(info, BLOCKS[stored])
            if (self.tensors[scale].dtype, self.tensors[scale].shape) != ("U8", expected):
                yield (f"{self.where[scale]}: {scale} is {self.tensors[scale].dtype} {list(self.tensors[scale].shape)}, expected U8 "
                       f"{list(expected)} for {name} {list(info.shape)}")
            if stored == "mxfp4" and f"{module}.weight" in self.tensors:
                yield f"{module}: is there as weight_packed and as weight; an engine takes one and drops the other"
        alone = [name for name in self.tensors if re.search(r"weight_(scale|scale_inv|packed|global_scale|zero_point)$", name)
                 and name not in claimed and not name.endswith("weight_packed")]
        yield from _some(alone, "no weight belongs to", "an engine drops them without a word")
        known = re.compile(r"(weight(_packed|_scale)?|bias|[a-z_]*bias|gamma|beta)$|\.(attn\.[kvq]_(scale|zero_point))$")
        odd = [name for name in self.tensors if not name.strip(".") or name.startswith((".", "/")) or "/" in name]
        odd += [name for name in self.tensors if re.search(r"\.(experts|layers)\.0\d", name)]
        odd += [name for name in self.tensors if re.search(r"weight_?\w+$", name) and not known.search(name) and name not in alone]
        yield from _some(odd, "no engine asks for names like", "a wrong suffix is dropped without a word")
        self.counts["pairs"] = len(claimed)

    def experts(self) -> Iterator[str]:
        """Every layer has all its routed experts, in one format, of one shape."""
        wanted = next((self.text[key] for key in EXPERT_COUNTS if key in self.text), None)
        if wanted is not None and not _is_count(wanted):
            yield f"config.json: the number of experts is {wanted!r}, which is no number"
            wanted = None
        groups: dict[tuple[str, str], dict[int, tuple]] = defaultdict(dict)
        formats: dict[str, set] = defaultdict(set)
        both: list[tuple[str, str, str]] = []
        for module, (stored, info, _) in self.modules.items():
            if match := EXPERT.match(module):
                groups[match["layer"], match["projection"]][int(match["expert"])] = (stored, info.shape)
                formats[match["layer"]].add(stored)
            elif len(info.shape) == 3 and (stacked := re.search(r"^(.*)\.(?:moe|experts)\.([^.]+)$", module)):
                both.append((re.sub(r"\.moe$", "", stacked[1]) + ".moe", stacked[2], module))
                if wanted and info.shape[0] != wanted:
                    yield f"{module}: holds {info.shape[0]} experts, config.json says {wanted}"
        yield from (f"{layer}.experts: stored as {' and '.join(sorted(kinds))}; an engine reads all experts of a layer as one format"
                    for layer, kinds in formats.items() if len(kinds) > 1)
        yield from (f"{module}: is there stacked and expert by expert; an engine takes either"
                    for layer, projection, module in both if (layer, projection) in groups)
        projections = defaultdict(set)
        for layer, projection in groups:
            projections[layer].add(projection)
        usual = set.union(*projections.values()) if projections else set()
        for layer, names in projections.items():
            yield from _some([f"{layer}.experts.*.{name}" for name in sorted(usual - names)], "no expert has", "the layer cannot run")
        for (layer, projection), members in groups.items():
            missing = sorted(set(range(wanted or max(members) + 1)) - set(members))
            yield from _some([f"{layer}.experts.{number}.{projection}" for number in missing], "there is no", "the expert stays uninitialized")
            extra = [number for number in members if wanted and number >= wanted]
            yield from _some([f"{layer}.experts.{number}.{projection}" for number in extra], f"config.json has {wanted} experts, but there is", "")
            shapes = {shape for _, shape in members.values()}
            if len(shapes) > 1:
                yield f"{layer}.experts.*.{projection}: has shapes {sorted(map(list, shapes))}"
        self.counts["experts"] = sum(map(len, groups.values()))

    def layers(self) -> Iterator[str]:
        """Every layer that config.json counts is there, with the tensors that layers of its kind have."""
        count, drafts = self.text.get("num_hidden_layers"), self.text.get("num_nextn_predict_layers", 0)
        if not _is_count(count) or not (_is_count(drafts) or drafts == 0):
            yield f"config.json: num_hidden_layers is {count!r} and num_nextn_predict_layers {drafts!r}; expected whole numbers"
            return
        held: dict[int, set[str]] = defaultdict(set)
        for name in self.tensors:
            if match := LAYER.match(name):
                tail = re.sub(r"\.experts\.\d+\.", ".experts.*.", "." + match["tail"])
                held[int(match["layer"][:9])].add(re.sub(r"\.weight_(packed|scale)$", ".weight", tail)[1:])
        if not held:
            return
        expected = count + (drafts if max(held) >= count else 0)  # a release may leave all draft layers out
        yield from _some([f"layer {layer}" for layer in range(min(expected, MOST_LAYERS)) if layer not in held],
                         "no shard holds anything of", f"config.json has {count} layers and {drafts} draft layers")
        yield from _some([f"layer {layer}" for layer in sorted(held) if layer >= count + drafts], "there are tensors of",
                         f"config.json has {count} layers and {drafts} draft layers")
        kinds: dict[frozenset, dict[int, set[str]]] = defaultdict(dict)
        for layer, tails in held.items():
            if layer < count:
                parts = {tail.split(".")[0] for tail in tails if tail.count(".") >= 2}
                parts |= {"experts" for tail in tails if ROUTED.search(tail)}  # a dense `mlp` beside one of experts
                kinds[frozenset(parts)][layer] = tails
        for members in kinds.values():
            usual = set.union(*members.values())
            for layer, tails in members.items():
                yield from _some([f"layer {layer}: {tail}" for tail in sorted(usual - tails)], "there is no",
                                 "other layers of its kind have it")
        self.counts["layers"] = len(held)

    # -- what an engine makes of it

    def scheme_arguments(self) -> Iterator[str]:
        """Groups say what is stored: bits, type, block, and a format for each."""
        groups = self.section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            yield "config.json: quantization_config has no config_groups, so that nothing is read as quantized"
            return
        for name, group in groups.items():
            form = group.get("format") or self.section.get("format")
            if form == "mixed-precision":
                yield f"config.json: {name} has no format of its own; mixed-precision needs one in every group"
                continue
            if form not in ARGUMENTS:
                self.notes.append(f"config.json: {name} has format {form}, which is not verified here")
                continue
            weights = group.get("weights") or {}
            for key, value in ARGUMENTS[form].items():
                if weights.get(key) != value:
                    yield f"config.json: {name}.weights.{key} is {weights.get(key)!r}, {form} needs {value!r}"
            if form != "float-quantized" and weights.get("scale_dtype") != SCALE_DTYPE:
                line = (f"config.json: {name}.weights.scale_dtype is {weights.get('scale_dtype')!r}, not {SCALE_DTYPE!r}; "
                        + ("vLLM does not take it for MXFP8" if form == "mxfp8-quantized" else "compressed-tensors takes its scales for floats"))
                yield line
            if weights.get("dynamic"):
                yield f"config.json: {name}.weights.dynamic is {weights['dynamic']!r}; the scales are stored"
            yield from self._activations(name, form, group.get("input_activations"))
        for key in ("transform_config", "sparsity_config"):
            if self.section.get(key):
                yield f"config.json: quantization_config has a {key}, by which an engine changes weights or inputs; nothing here vouches for that"
        if self.section.get("kv_cache_scheme"):
            self.notes.append("config.json: the KV cache is quantized, too")
        self.counts["scheme_arguments"] = len(groups)

    def _activations(self, group: str, form: str, activations: object) -> Iterator[str]:
        """Of weight-only formats nothing; of FP8 a float of 8 bits found on the fly, unless the checkpoint stores its scales."""
        if activations is None:
            if form == "float-quantized":
                yield f"config.json: {group} is FP8 without input_activations; vLLM takes that per channel only, and experts not at all"
            return
        if not isinstance(activations, dict) or activations.get("type") != "float":
            yield f"config.json: {group}.input_activations is {str(activations)[:80]!r}, expected none or floats"
        elif not activations.get("dynamic") and not any(name.endswith(("input_scale", "input_global_scale")) for name in self.tensors):
            yield f"config.json: {group}.input_activations is not dynamic, but the checkpoint holds no input_scale"
        elif form != "float-quantized":
            self.notes.append(f"config.json: {group} quantizes activations, too")

    def coverage(self) -> Iterator[str]:
        """vLLM's matching gives every module the format that it is stored in."""
        layers = self.text.get("num_hidden_layers")
        if not _is_count(layers):
            return  # `layers` says so
        row = architecture_of(self.architecture)
        known = row is not None
        if not known:
            self.notes.append(f"config.json: the runtime names of {self.architecture} are not known here; they are taken to be the "
                              "checkpoint's")
        linears, experts, formats = [], [], {}
        for module, (stored, info, _) in self.modules.items():
            if is_routed_expert(module, layers):
                experts.append(module)
            elif len(info.shape) == 2 or known:
                linears.append(module)
            if stored != "plain":
                formats[module] = stored
        modules = vllm_rules.runtime_modules(linears, experts, layers, row or UNKNOWN)
        unused = {f"{entry}: matches no module of the model" for entry in self.section.get("ignore") or []}
        for fault in vllm_rules.coverage_faults(modules, self.section, formats):
            if fault in unused:
                self.notes.append(f"config.json: ignore {fault}")
            else:
                yield fault
        self.counts["coverage"] = len(modules)

    # -- the numbers

    def numbers(self) -> Iterator[str]:
        """Scales are numbers, blocks use their range, no matrix stands apart from its siblings."""
        import torch

        sizes: dict[str, dict[str, float]] = defaultdict(dict)
        seen: dict[tuple[str, bytes], str] = {}
        same: list[str] = []
        for module, stored, info, codes_name, scale in self.decodable():
            codes_reader, scale_reader = self.readers[self.where[codes_name]], self.readers[self.where[scale]]
            for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
                label = module if expert is None else f"{module}[{expert}]"
                rows = info.shape[-2]
                exponents = scale_reader.matrix_rows(scale, expert, 0, rows)
                if bool((exponents == 255).any()):
                    yield f"{self.where[scale]}: {label}: a block scale is 255, which means NaN"
                    continue
                codes, sampled = _sample(codes_reader, codes_name, expert, rows, exponents)
                raw = codes.view(torch.uint8)
                key = EXPERT.sub(r"\g<layer>.experts.*.\g<projection>", module) if expert is None else module
                digest = hashlib.sha256(raw.numpy().tobytes() + sampled.numpy().tobytes()).digest()
                if bool(raw.any()) and seen.setdefault((key, digest), label) != label:
                    yield f"{label}: holds the bytes of {seen[key, digest]}; one expert was written twice"
                low, (_, high) = _unused(raw, stored), HIGH_CODES[stored]
                if low > UNUSED_BLOCKS:
                    yield (f"{self.where[codes_name]}: {label}: {100 * low:.1f} % of its blocks have no value of {high} or above; "
                           "exponents are too high, or the bytes are of another format")
                try:
                    weight = SCHEMES[stored].dequantize(codes, sampled).double()
                except NonFiniteError as error:
                    yield f"{self.where[codes_name]}: {label}: {error}"
                    continue
                size = weight.square().mean().sqrt().item()
                if not math.isfinite(size):
                    yield f"{label}: decodes to infinite weights; its block scales are out of range"
                elif not size and self.source is None:
                    yield f"{label}: decodes to nothing but zeros; if the source's does, too, compare with --source"
                elif size and not USUAL_SIZES[0] < size < USUAL_SIZES[1]:
                    yield f"{label}: decodes to weights of {size:.1e} (root mean square), which no network has; its block scales are wrong"
                else:
                    same += [label] if sampled.numel() >= 64 and bool((sampled == sampled.flatten()[0]).all()) and size else []
                    sizes[key][label] = size
        if same:
            self.notes.append(f"{same[0]}{f' and {len(same) - 1} more' if len(same) > 1 else ''}: all blocks looked at have the same scale, "
                              "which weights hardly ever come to; compare with --source")
        yield from self._fp8_numbers()
        yield from self._plain_numbers()
        for members in sizes.values() if self.source is None else ():  # a source knows better
            middle = statistics.median(members.values())
            if len(members) < 3 or not middle:
                continue
            octaves = {label: math.log2(size / middle) if size else -math.inf for label, size in members.items()}
            spread = statistics.median(map(abs, octaves.values()))
            for label, apart in octaves.items():
                if abs(apart) <= APART:
                    continue
                line = (f"{label}: its weights are {2.0**apart:.2f} times as large as its siblings', half of which lie within "
                        f"{100 * (2.0**spread - 1):.0f} %; exponents may be shifted, compare with --source")
                if abs(apart) > SPREADS * spread:
                    yield line
                else:
                    self.notes.append(line)
        self.counts["numbers"] = sum(map(len, sizes.values()))

    def _fp8_numbers(self) -> Iterator[str]:
        """FP8 under float scales: scales that are no positive numbers, codes that mean NaN."""
        import torch

        for module, (stored, _, scale) in self.modules.items():
            if not stored.startswith("fp8 "):
                continue
            name = f"{module}.weight"
            values = self.readers[self.where[scale]].tensor(scale).float()
            if not bool((torch.isfinite(values) & (values > 0)).all()):
                yield f"{self.where[scale]}: {scale} holds a scale that is NaN, infinite, zero or negative"
            for chunk in () if self.quick else self.readers[self.where[name]].chunks(name):
                if bool(((torch.frombuffer(chunk, dtype=torch.uint8) & 0x7F) == 0x7F).any()):
                    yield f"{self.where[name]}: {name} holds a code that means NaN"
                    break

    def _plain_numbers(self) -> Iterator[str]:
        """Unquantized weights that hold NaN or infinity, and matrices of nothing but zeros (a norm may be)."""
        import torch

        for name, info in self.tensors.items():
            if self.quick or info.dtype not in ("BF16", "F16", "F32") or not name.endswith("weight"):
                continue
            largest = torch.zeros(())
            for chunk in self.readers[self.where[name]].chunks(name):
                values = as_tensor(as_array(chunk, info.dtype, (-1,)), info.dtype)
                largest = torch.maximum(largest, values.abs().max().float())  # NaN stays
            if not bool(torch.isfinite(largest)):
                yield f"{self.where[name]}: {name} holds NaN or infinity"
            elif len(info.shape) > 1 and math.prod(info.shape) and not bool(largest):
                yield f"{self.where[name]}: {name} holds nothing but zeros"

    def manifest(self) -> Iterator[str]:
        """Every file has the size and the sha256 of manifest.json."""
        path = self.directory / "manifest.json"
        if not path.exists():
            return
        files = _object(_object(read_json(path), "manifest.json").get("files"), "manifest.json: files")
        names = [file.relative_to(self.directory) for file in self.directory.rglob("*") if file.is_file()]
        present = {str(name) for name in names if not any(part.startswith(".") for part in name.parts)}  # .git, .cache of a download
        yield from _some(sorted(present - {*files, *NOT_IN_MANIFEST}), "manifest.json does not list", "nothing vouches for its bytes")
        yield from _on_all_cores(lambda item: self._compare_file(*item), files.items())
        self.counts["manifest"] = len(files)

    def _compare_file(self, name: str, entry: object) -> str | None:
        """The fault of a file that manifest.json lists."""
        file, entry = self.directory / name, _object(entry, f"manifest.json: {name}")
        if not file.is_file():
            return f"{name}: is missing"
        if file.stat().st_size != entry.get("bytes") or (not self.quick and sha256_file(file) != entry.get("sha256")):
            return f"{name}: its bytes are not those of manifest.json"
        return None

    def open_source(self) -> None:
        """Reads the source's headers; UserError that names the source when it is none."""
        self.source_readers, self.source_tensors, self.source_where = {}, {}, {}
        if self.source is None:
            return
        for path in sorted(self.source.glob("*.safetensors")):
            self.source_readers[path.name] = self._stack.enter_context(ShardReader(path))
            for name, info in self.source_readers[path.name].header.tensors.items():
                self.source_tensors[name], self.source_where[name] = info, path.name
        if not self.source_tensors:
            raise UserError(f"--source {self.source}: holds no tensor; name the checkpoint that the release was made from")
        config = checked(read_json(self.source / "config.json"), f"{self.source}/config.json")
        self.claims = recognize(self.source_tensors, self.source_where, config)
        if self.source.resolve() == self.directory.resolve() or (self.source / "manifest.json").exists():
            raise UserError(f"--source {self.source}: is a release itself, not a source; name the checkpoint that the release was made from")
        self.source_places = Tensors(lambda name: self.source_readers[self.source_where[name]])
        self.origins = {}  # module of a release, in either layout -> (source weight, its Matrix)
        for name, claim in self.claims.items():
            for layout in ("stacked", "per_expert") if claim.matrix else ():
                self.origins |= {matrix.module: (name, matrix) for matrix in matrices(name, claim.matrix, layout)}

    def against_source(self) -> Iterator[str]:
        """Quantized matrices are the source's to LOWEST_SQNR_DB, everything else is bit-identical, and nothing is missing."""
        if self.source is None:
            return
        count, converted, compared, jobs = 0, defaultdict(set), set(), []
        for module, stored, info, codes, scale in self.decodable():
            compared.add(module)
            for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
                label = module if expert is None else f"{module}[{expert}]"
                prefix, _, projection = module.rpartition(".")
                found = self.origins.get(module) or self.origins.get(f"{prefix}.experts.{expert}.{projection}")
                if found is None:
                    yield f"{label}: the source has no weight that becomes it"
                    break
                name, matrix = found
                number = matrix.expert if expert is None or matrix.module != module else expert
                shape = self.claims[name].matrix
                made = (info.shape[-2], BLOCKS[stored] * info.shape[-1])
                has_it = len(shape) == 2 if number is None else len(shape) == 3 and number < shape[0]
                if not has_it or (len(range(*matrix.rows)), shape[-1]) != made:
                    yield f"{label}: decodes to {list(made)}, the source's {name} has {list(shape)}"
                    continue
                converted[name].add((number, matrix.rows))
                jobs.append((label, stored, codes, scale, expert, name, number, range(*matrix.rows)))
        with _one_torch_thread():
            yield from _on_all_cores(lambda job: self._compare(*job), jobs)
        count += len(jobs)
        covered, kept = set(converted), []
        for name, info in self.tensors.items():
            names = [name, f"{name}_inv", re.sub(r"weight_scale$", "scale", name)] if name.endswith("weight_scale") else [name]
            origin = next((candidate for candidate in names if candidate in self.source_tensors), None)
            found = self.source_tensors.get(origin)
            if found is None or re.sub(r"\.weight(_packed|_scale)?$", "", name) in compared:
                continue
            same = (found.dtype, found.shape) == (info.dtype, info.shape)
            covered.add(origin)
            if not same:
                yield from self._compare_decoded(name, info, origin, found)
            elif not self.quick:
                kept.append((name, origin))
            count += 1
        yield from _on_all_cores(lambda pair: self._compare_bytes(*pair), kept)
        companions = {name for name, claim in self.claims.items() if claim.belongs_to}
        for name, numbers in converted.items():
            wanted = {(matrix.expert, matrix.rows) for matrix in matrices(name, self.claims[name].matrix, "per_expert")}
            if len(self.claims[name].matrix) == 3 and {rows for _, rows in numbers} != {rows for _, rows in wanted}:
                wanted = {(number, (0, self.claims[name].matrix[1], 1)) for number in range(self.claims[name].matrix[0])}
            yield from _some([f"{name}[{number}]" for number, _ in sorted(wanted - numbers, key=str)], "there is nothing of the source's",
                             "the expert was lost")
        yield from _some(sorted(set(self.source_tensors) - covered - companions), "there is nothing of the source's", "it was lost")
        self.counts["against_source"] = count

    def _compare_decoded(self, name: str, info: TensorInfo, origin: str, found: TensorInfo) -> Iterator[str]:
        """A tensor of another dtype or shape than the source's is a fault, unless it is FP8 that whatever made it has decoded."""
        claim = self.claims[origin]
        line = f"{name}: is {info.dtype} {list(info.shape)}, the source's is {found.dtype} {list(found.shape)}"
        if not claim.scale or claim.matrix != info.shape or len(info.shape) != 2 or info.dtype not in ("BF16", "F16", "F32"):
            yield line
            return
        ours = self.readers[self.where[name]].tensor(name).double()
        theirs = decoded_rows(self.source_places, origin, claim, None, 0, claim.matrix[0]).double()
        error, signal = (ours - theirs).square().sum().item(), theirs.square().sum().item()
        if not error <= signal * 10 ** (-DECODED_DB / 10):  # NaN, too
            yield f"{line}, and its values are others than those of the source"
        else:
            self.notes.append(f"{line}; whatever made it has decoded it, its values are the source's")

    def _buffer(self, use: str) -> bytearray:
        """Memory of this thread's own for what is read: fresh memory costs more than reading."""
        if not hasattr(self._memory, use):
            setattr(self._memory, use, bytearray(4 * ROWS_AT_ONCE))
        return getattr(self._memory, use)

    def _compare_bytes(self, name: str, origin: str) -> str | None:
        """The fault of a tensor that should have passed through, of the same dtype and shape."""
        pairs = zip(self.readers[self.where[name]].chunks(name), self.source_readers[self.source_where[origin]].chunks(origin))
        if all(np.array_equal(np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)) for ours, theirs in pairs):
            return None
        return f"{self.where[name]}: {name} is not bit-identical to the source's"

    def _compare(self, label: str, stored: str, codes: str, scale: str, expert: int | None, name: str, number: int | None,
                 rows: range) -> str | None:
        """The fault of one matrix, by its SQNR against rows of the source's: over all of them, over four short runs of rows with
        `quick`."""
        claim = self.claims[name]
        step = claim.tile[0] if claim.tile else 1
        height = max(step, ROWS_AT_ONCE // (claim.matrix[-1] * rows.step) // step * step)
        spans = [(begin, min(begin + height, len(rows))) for begin in range(0, len(rows), height)]
        if self.quick:
            starts = sorted({len(rows) * quarter // 4 // step * step for quarter in range(4)})
            spans = [(begin, min(begin + SAMPLED_ROWS // 4, len(rows))) for begin in starts]
        signal = error = 0.0
        for begin, end in spans:
            panel = rows[begin:end]
            packed = self.readers[self.where[codes]].matrix_array(codes, expert, begin, end, self._buffer("codes"))
            scales = self.readers[self.where[scale]].matrix_array(scale, expert, begin, end)
            try:
                weight, tiles = stored_rows(self.source_places, name, claim, number, panel[0], panel[-1] + 1, self._buffer("source"))
                if rows.step > 1:  # every other row is another matrix's
                    if tiles is not None:
                        weight, tiles = decoded_rows(self.source_places, name, claim, number, panel[0], panel[-1] + 1).numpy(), None
                    weight = np.ascontiguousarray(weight[::rows.step])
                sums = difference(weight, tiles, claim.tile, packed, scales, stored)
                if not math.isfinite(sum(sums)):  # decoding says which number it is
                    decoded_rows(self.source_places, name, claim, number, panel[0], panel[-1] + 1)
            except NonFiniteError as fault:
                raise UserError(f"--source {self.source}: {name}: {fault}; the source is damaged") from None
            if not math.isfinite(sum(sums)):
                try:
                    SCHEMES[stored].dequantize(as_tensor(packed, self.tensors[codes].dtype), as_tensor(scales, self.tensors[scale].dtype))
                except NonFiniteError as fault:
                    return f"{label}: {fault}"
            signal, error = signal + sums[0], error + sums[1]
        if error and claim.dialect == stored:
            return f"{label}: the source's {name} is {stored} already, but the values are others"
        ratio = 10 * math.log10(signal / error) if 0 < signal < math.inf and 0 < error < math.inf else -math.inf
        if error and not ratio >= LOWEST_SQNR_DB:  # NaN, too
            return (f"{label}: has {ratio:.1f} dB SQNR against the source's {name}, less than {LOWEST_SQNR_DB:g}; it is another matrix, or "
                    "its exponents are shifted")
        return None

    CHECKS: tuple[tuple[str, str, Callable], ...] = (
        ("containers", "Shards are sound, no tensor is in two", containers),
        ("index", "The index names every tensor, its shard and the true size", index),
        ("pairs", "Packed weights and scales fit each other, no name is odd", pairs),
        ("experts", "Every layer has all its routed experts in one format", experts),
        ("layers", "Every layer is there, with what its kind has", layers),
        ("scheme_arguments", "The config's groups say what is stored", scheme_arguments),
        ("coverage", "vLLM's matching gives every module its stored format", coverage),
        ("numbers", "Scales are numbers, blocks use their range", numbers),
        ("manifest", "Files are those of manifest.json", manifest),
        ("against_source", "Weights are the source's", against_source),
    )

    def run(self) -> dict:
        """{"passed", "checks": [...], "notes": [...]}"""
        rows = []
        with self.opened():
            self.open_source()
            for key, title, check in self.CHECKS:
                faults = []
                try:
                    for fault in check(self):
                        faults.append(fault)
                except (UserError, OSError) as error:
                    faults.append(str(error))
                except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    # a stranger's file of a form that nobody foresaw is a fault of the file, and must not hide the other checks
                    faults.append(f"could not be checked, something has a form that it cannot have ({type(error).__name__}: {str(error)[:120]})")
                title += " (names and sizes, no hashes)" if key == "manifest" and self.quick else ""
                rows.append({"check": key, "title": title, "passed": not faults, "count": self.counts.get(key), "faults": faults})
        return {"directory": str(self.directory), "passed": all(row["passed"] for row in rows), "checks": rows, "notes": self.notes}


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Some sources are decoded by torch, which would start a thread per core in each of ours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_all_cores(fault_of: Callable, items: Iterable) -> Iterator[str]:
    """Faults of items, in their order; what `fault_of` does with an item leaves the interpreter alone: reading, hashing, sums."""
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS)) as pool:
        yield from filter(None, pool.map(fault_of, items))


def _object(value: object, where: str) -> dict:
    """The value, if it is a JSON object; UserError if not."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {'null' if value is None else type(value).__name__}, expected a JSON object")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _checked_section(section: object) -> dict:
    """quantization_config, if it has the form of compressed-tensors; UserError for the first value of another type."""
    where = "config.json: quantization_config"
    if _object(section, where).get("quant_method") != "compressed-tensors":
        raise UserError(f"{where}: quant_method is {section.get('quant_method')!r}; only compressed-tensors releases are verified; "
                        "`mxforge plan` shows what a source becomes")
    lists = [("ignore", section.get("ignore") or [])]
    for name, group in _object(section.get("config_groups") or {}, f"{where}.config_groups").items():
        _object(group, f"{where}.{name}")
        _object(group.get("weights") or {}, f"{where}.{name}.weights")
        if not isinstance(group.get("format") or "", str):
            raise UserError(f"{where}.{name}.format: is {group['format']!r}, expected a name")
        lists.append((f"{name}.targets", group.get("targets")))
    for name, entries in lists:
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{where}.{name}: is {str(entries)[:60]!r}, expected a list of names")
        for entry in entries:
            try:
                re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
            except re.error as error:
                raise UserError(f"{where}.{name}: {entry!r} is no regular expression: {error}") from None
    return section


def _scale_shape(info: TensorInfo, weights_per_element: int) -> tuple[int, ...]:
    """Shape of the block scales of a stored weight; a width that is no multiple of 32 gets one too many, which fits nothing."""
    return (*info.shape[:-1], -(-info.shape[-1] * weights_per_element // 32)) if info.shape else ()


def _some(names: list[str], before: str, after: str) -> Iterator[str]:
    """One line for many names of the same fault."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{before} {names[0]}{more}" + (f"; {after}" if after else "")


def _unused(codes, stored: str) -> float:
    """Share of the blocks with any value that hold none of HIGH_CODES or above; codes uint8 [rows, bytes]."""
    import torch

    values = codes & 0x7F if stored == "mxfp8" else torch.stack((codes & 7, (codes >> 4) & 7), -1).flatten(-2)
    largest = values.unflatten(-1, (-1, 32)).amax(-1)
    used = largest[largest > 0]
    return float((used < HIGH_CODES[stored][0]).double().mean()) if used.numel() else 0.0


def _sample(reader: ShardReader, name: str, expert: int | None, rows: int, exponents):
    """(packed, scales) of SAMPLED_ROWS rows: a run at the start and one at the end of the matrix."""
    import torch

    half = min(rows, SAMPLED_ROWS // 2)
    spans = [(0, half), (max(half, rows - half), rows)]
    packed = torch.cat([reader.matrix_rows(name, expert, begin, end) for begin, end in spans if end > begin])
    return packed, torch.cat([exponents[begin:end] for begin, end in spans if end > begin])


def print_result(result: dict) -> None:
    """One page."""
    for row in result["checks"]:
        skipped = row["count"] is None and row["passed"]
        count = "" if row["count"] is None else f" ({row['count']})"
        print(f"{'-   ' if skipped else 'pass' if row['passed'] else 'FAIL'}  {row['title']}{count}" + ("; nothing to check" if skipped else ""))
        for fault in row["faults"][:8]:
            print(f"        {fault}")
        if len(row["faults"]) > 8:
            print(f"        ... and {len(row['faults']) - 8} more")
    for note in result["notes"][:12]:
        print(f"note  {note}")
    if len(result["notes"]) > 12:
        print(f"note  ... and {len(result['notes']) - 12} more")


def run(directory: Path, source: Path | None, quick: bool, as_json: bool) -> None:
    """Prints the page, or the result as JSON; UserError when a check failed."""
    for place in filter(None, (directory, source)):
        if not place.is_dir():
            raise UserError(f"{place}: no such directory; name a checkpoint directory")
    result = Checkup(directory, source, quick).run()
    print(json.dumps(result, indent=2)) if as_json else print_result(result)
    if not result["passed"]:
        count = sum(len(row["faults"]) for row in result["checks"])
        raise UserError(f"{directory}: {count} fault{'s' if count > 1 else ''}; do not serve or publish it")
