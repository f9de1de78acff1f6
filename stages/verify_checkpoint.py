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
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.checkpoint.files import read_json, sha256_file
from stages.checkpoint.header import TensorInfo
from stages.checkpoint.reader import ShardReader
from stages.dialects import recognize, tile_scales
from stages.dialects.roles import role_of
from stages.errors import UserError
from stages.schemes import vllm_rules

INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<expert>\d+)\.(?P<projection>[^.]+)$")
EXPERT_COUNTS = ("moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts")  # keys of config.json, by family
SCALE_DTYPE = "torch.uint8"
ARGUMENTS = {  # format -> what its group's `weights` must say
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
    "mxfp8-quantized": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True},
}
FORMATS = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}  # how tensors are stored -> format
SAMPLED_ROWS = 32  # of each matrix, for the numbers
HIGH_CODE = 5  # of E2M1: every rule puts a block's largest element at 3 or above
UNUSED_BLOCKS = 0.02  # share of blocks whose largest code may be lower; 0 under the rules, some for clipped weights
APART = 0.75  # |log2| of a matrix's root mean square over its siblings' median, from which it is called apart ...
SPREADS = 8  # ... and a fault where it is so many times the median distance of its siblings, too
LOWEST_SQNR_DB = 15.0  # against a source; round-to-nearest MXFP4 has 18 to 19.1


class Checkup:
    """All checks of one directory. Each yields faults, one line each; `notes` collects what is odd but loads."""

    def __init__(self, directory: Path, source: Path | None = None, quick: bool = False, section: dict | None = None):
        """section: the quantization_config to assume instead of the one in config.json."""
        self.directory, self.source, self.quick = Path(directory), source and Path(source), quick
        self.readers: dict[str, ShardReader] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.where: dict[str, str] = {}
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        self.config = read_json(self.directory / "config.json", "whatever made the checkpoint")
        if section is not None:
            self.section = section
            return
        section = self.config.get("quantization_config") or (self.config.get("text_config") or {}).get("quantization_config")
        if not isinstance(section, dict):
            raise UserError(f"{self.directory / 'config.json'}: has no quantization_config, so that an engine reads everything as "
                            "unquantized; name a quantized checkpoint, or make it one with `mxforge config`")
        if section.get("quant_method") != "compressed-tensors":
            raise UserError(f"{self.directory / 'config.json'}: quant_method is {section.get('quant_method')!r}; only "
                            "compressed-tensors checkpoints are verified")
        self.section = section

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Shards that `containers` opens are closed behind the block."""
        with ExitStack() as self._stack:
            yield

    # -- what is there

    def containers(self) -> Iterator[str]:
        """Every shard's header is sound, and no tensor is in two."""
        for path in sorted(self.directory.glob("*.safetensors")):
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
        index = read_json(path, "whatever made the checkpoint")
        listed = index.get("weight_map") or {}
        yield from _some(sorted(set(self.tensors) - set(listed)), f"{INDEX}: does not list", "engines that go by the index miss them")
        yield from _some(sorted(set(listed) - set(self.tensors)), f"{INDEX}: lists", "no shard holds them")
        yield from _some([f"{name} ({listed[name]}, is in {self.where[name]})" for name in sorted(set(listed) & set(self.tensors))
                          if listed[name] != self.where[name]], f"{INDEX}: names the wrong shard for", "loading fails")
        total, claimed = sum(info.nbytes for info in self.tensors.values()), (index.get("metadata") or {}).get("total_size")
        if claimed != total:
            yield f"{INDEX}: total_size is {claimed}, the tensors have {total} bytes"
        self.counts["index"] = len(listed)

    def modules(self) -> dict[str, tuple[str, TensorInfo, str | None]]:
        """Module name -> (stored as, its weight's header entry, name of its scale): mxfp4, mxfp8 or plain."""
        found = {}
        for name, info in self.tensors.items():
            if name.endswith("weight_packed"):
                stem = name.removesuffix("_packed")
                found[stem.removesuffix(".weight")] = ("mxfp4", info, f"{stem}_scale")
            elif name.endswith("weight") and len(info.shape) >= 2:
                scaled = info.dtype == "F8_E4M3" and f"{name}_scale" in self.tensors
                found[re.sub(r"[._]weight$", "", name)] = ("mxfp8" if scaled else "plain", info, f"{name}_scale" if scaled else None)
        return found

    def decodable(self) -> Iterator[tuple[str, TensorInfo, str]]:
        """(module, packed weight, name of its scale) of every MXFP4 pair whose dtypes and shapes fit."""
        for module, (stored, info, scale) in self.modules().items():
            found = self.tensors.get(scale)
            if stored == "mxfp4" and info.dtype == "U8" and found and (found.dtype, found.shape) == ("U8", _scale_shape(info, 2)):
                yield module, info, scale

    def pairs(self) -> Iterator[str]:
        """Packed weights and scales come in pairs whose dtypes and shapes fit."""
        claimed = set()
        for module, (stored, info, scale) in self.modules().items():
            if stored == "plain":
                if info.dtype.startswith("F8"):
                    yield f"{self.where[module + '.weight']}: {module}.weight is {info.dtype}, but has no weight_scale; its values are lost"
                continue
            claimed.add(scale)
            name = f"{module}.weight" + ("_packed" if stored == "mxfp4" else "")
            if info.dtype != ("U8" if stored == "mxfp4" else "F8_E4M3"):
                yield f"{self.where[name]}: {name} is {info.dtype}; only MXFP4 (U8) and MXFP8 are verified here"
                continue
            if scale not in self.tensors:
                yield f"{self.where[name]}: {name} has no {scale}; an engine leaves the scale uninitialized"
                continue
            expected = _scale_shape(info, 2 if stored == "mxfp4" else 1)
            if (self.tensors[scale].dtype, self.tensors[scale].shape) != ("U8", expected):
                yield (f"{self.where[scale]}: {scale} is {self.tensors[scale].dtype} {list(self.tensors[scale].shape)}, expected U8 "
                       f"{list(expected)} for {name} {list(info.shape)}")
            if stored == "mxfp4" and f"{module}.weight" in self.tensors:
                yield f"{module}: is there as weight_packed and as weight; an engine takes one and drops the other"
        alone = [name for name in self.tensors if re.search(r"weight_(scale|scale_inv|packed|global_scale|zero_point)$", name)
                 and name not in claimed and not name.endswith("weight_packed")]
        yield from _some(alone, "no weight belongs to", "an engine drops them without a word")
        known = re.compile(r"(weight(_packed|_scale)?|bias|[a-z_]*bias|gamma|beta)$|\.(attn\.[kvq]_(scale|zero_point))$")
        odd = [name for name in self.tensors if re.search(r"weight_?\w+$", name) and not known.search(name) and name not in alone]
        yield from _some(odd, "no engine asks for names like", "a wrong suffix is dropped without a word")
        self.counts["pairs"] = len(claimed)

    def experts(self) -> Iterator[str]:
        """Every layer has all its routed experts, in one format, of one shape."""
        text = self.config.get("text_config") or self.config
        wanted = next((text[key] for key in EXPERT_COUNTS if isinstance(text.get(key), int)), None)
        groups: dict[tuple[str, str], dict[int, tuple]] = defaultdict(dict)
        formats: dict[str, set] = defaultdict(set)
        for module, (stored, info, _) in self.modules().items():
            if match := EXPERT.match(module):
                groups[match["layer"], match["projection"]][int(match["expert"])] = (stored, info.shape)
                formats[match["layer"]].add(stored)
            elif len(info.shape) == 3 and re.search(r"\.(moe|experts)\.[^.]+$", module):
                if wanted and info.shape[0] != wanted:
                    yield f"{module}: holds {info.shape[0]} experts, config.json says {wanted}"
        yield from (f"{layer}.experts: stored as {' and '.join(sorted(kinds))}; an engine reads all experts of a layer as one format"
                    for layer, kinds in formats.items() if len(kinds) > 1)
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
            if weights.get("scale_dtype") != SCALE_DTYPE:
                line = (f"config.json: {name}.weights.scale_dtype is {weights.get('scale_dtype')!r}, not {SCALE_DTYPE!r}; "
                        + ("vLLM does not take it for MXFP8" if form == "mxfp8-quantized" else "compressed-tensors takes its scales for floats"))
                yield line
            if group.get("input_activations"):
                self.notes.append(f"config.json: {name} quantizes activations, too")
        self.counts["scheme_arguments"] = len(groups)

    def coverage(self) -> Iterator[str]:
        """vLLM's matching gives every module the format that it is stored in."""
        text = self.config.get("text_config") or self.config
        layers = text.get("num_hidden_layers")
        if not isinstance(layers, int):
            yield "config.json: num_hidden_layers is missing"
            return
        architecture = (self.config.get("architectures") or [None])[0]
        if architecture not in vllm_rules.ARCHITECTURES:
            self.notes.append(f"config.json: the runtime names of {architecture} are not known here; they are taken to be the checkpoint's")
        linears, experts, quantized = [], [], set()
        for module, (stored, info, _) in self.modules().items():
            routed = EXPERT.match(module) or (len(info.shape) == 3 and role_of(f"{module}.weight", layers) == "routed_experts")
            if routed:
                experts.append(module)
            else:
                linears.append(module)
            if stored != "plain":
                quantized.add(module)
        modules = vllm_rules.runtime_modules(linears, experts, layers, architecture)
        yield from vllm_rules.coverage_faults(modules, self.section, quantized)
        self.counts["coverage"] = len(modules)

    # -- the numbers

    def numbers(self) -> Iterator[str]:
        """Scales are numbers, blocks use their range, no matrix stands apart from its siblings."""
        import torch

        from kernels import mxfp4

        sizes: dict[str, dict[str, float]] = defaultdict(dict)
        for module, info, scale in self.decodable():
            packed_name = f"{module}.weight_packed"
            packed_reader, scale_reader = self.readers[self.where[packed_name]], self.readers[self.where[scale]]
            for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
                label = module if expert is None else f"{module}[{expert}]"
                rows = info.shape[-2]
                exponents = scale_reader.matrix_rows(scale, expert, 0, rows)
                if bool((exponents == 255).any()):
                    yield f"{self.where[scale]}: {label}: a block scale is 255, which means NaN"
                    continue
                packed, sampled = _sample(packed_reader, packed_name, expert, rows, exponents)
                codes = torch.stack((packed & 7, (packed >> 4) & 7), -1).flatten(-2).unflatten(-1, (-1, 32)).amax(-1)
                used = codes[codes > 0]
                low = float((used < HIGH_CODE).double().mean()) if used.numel() else 0.0
                if low > UNUSED_BLOCKS:
                    yield (f"{self.where[packed_name]}: {label}: {100 * low:.1f} % of its blocks have no value of 3 or above; "
                           "exponents are too high, or the bytes are of another format")
                weight = mxfp4.dequantize(packed, sampled, torch.float32, backend="reference").double()
                key = EXPERT.sub(r"\g<layer>.experts.*.\g<projection>", module) if expert is None else module
                sizes[key][label] = weight.square().mean().sqrt().item()
        for members in sizes.values():
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

    def manifest(self) -> Iterator[str]:
        """Every file has the size and the sha256 of manifest.json."""
        path = self.directory / "manifest.json"
        if not path.exists():
            return
        files = read_json(path, "whatever made the checkpoint").get("files") or {}
        for name, entry in files.items():
            file = self.directory / name
            if not file.is_file():
                yield f"{name}: is missing"
            elif file.stat().st_size != entry["bytes"] or (not self.quick and sha256_file(file) != entry["sha256"]):
                yield f"{name}: its bytes are not those of manifest.json"
        self.counts["manifest"] = len(files)

    def against_source(self) -> Iterator[str]:
        """Quantized matrices are the source's to LOWEST_SQNR_DB, everything else is bit-identical."""
        import torch

        from kernels import mxfp4

        if self.source is None:
            return
        readers, tensors, where = {}, {}, {}
        for path in sorted(self.source.glob("*.safetensors")):
            readers[path.name] = self._stack.enter_context(ShardReader(path))
            for name, info in readers[path.name].header.tensors.items():
                tensors[name], where[name] = info, path.name
        claims = recognize(tensors, where, read_json(self.source / "config.json", "whatever made the source"))
        count = 0
        for module, info, scale in self.decodable():
            match = EXPERT.match(module)
            stacked = match and f"{match['layer']}.{match['projection']}.weight"
            for expert in range(info.shape[0]) if len(info.shape) == 3 else (None,):
                label = module if expert is None else f"{module}[{expert}]"
                name, number = f"{module}.weight", expert
                if name not in tensors and stacked in tensors:
                    name, number = stacked, int(match["expert"])
                if name not in tensors:
                    yield f"{label}: the source has no {name}" + (f" and no {stacked}" if stacked else "")
                    break
                rows = info.shape[-2]
                claim = claims[name]
                step = claim.tile[0] if claim.tile else 1
                end = min(rows, max(SAMPLED_ROWS, step))
                weight = readers[where[name]].matrix_rows(name, number, 0, end)
                if claim.scale:
                    last = readers[where[claim.scale]]
                    stored_scale = (last.tensor(claim.scale) if math.prod(last.info(claim.scale).shape) == 1
                                    else last.matrix_rows(claim.scale, number, 0, -(-end // step)))
                    weight = mxfp4.decode_block_fp8(weight, tile_scales(stored_scale, tuple(weight.shape), claim.tile), claim.tile)
                weight = weight.double()
                made = mxfp4.dequantize(self.readers[self.where[f"{module}.weight_packed"]].matrix_rows(f"{module}.weight_packed", expert, 0, end),
                                        self.readers[self.where[scale]].matrix_rows(scale, expert, 0, end),
                                        torch.float32, backend="reference").double()
                if made.shape != weight.shape:
                    yield f"{label}: decodes to {list(made.shape)}, the source's {name} has {list(weight.shape)}"
                    continue
                signal, error = weight.square().sum().item(), (weight - made).square().sum().item()
                if error and (not signal or 10 * math.log10(signal / error) < LOWEST_SQNR_DB):
                    ratio = 10 * math.log10(signal / error) if signal else -math.inf
                    yield (f"{label}: has {ratio:.1f} dB SQNR against the source's {name}, less than {LOWEST_SQNR_DB:g}; it is "
                           "another matrix, or its exponents are shifted")
                count += 1
        for name, info in self.tensors.items():
            if name in tensors and not self.quick and tensors[name].dtype == info.dtype:
                if _sha256(self.readers[self.where[name]], name) != _sha256(readers[where[name]], name):
                    yield f"{self.where[name]}: {name} is not bit-identical to the source's"
                count += 1
        self.counts["against_source"] = count

    CHECKS: tuple[tuple[str, str, Callable], ...] = (
        ("containers", "Shards are sound, no tensor is in two", containers),
        ("index", "The index names every tensor, its shard and the true size", index),
        ("pairs", "Packed weights and scales fit each other, no name is odd", pairs),
        ("experts", "Every layer has all its routed experts in one format", experts),
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
            for key, title, check in self.CHECKS:
                try:
                    faults = list(check(self))
                except (UserError, OSError) as error:
                    faults = [str(error)]
                rows.append({"check": key, "title": title, "passed": not faults, "count": self.counts.get(key), "faults": faults})
        return {"directory": str(self.directory), "passed": all(row["passed"] for row in rows), "checks": rows, "notes": self.notes}


def _scale_shape(info: TensorInfo, weights_per_element: int) -> tuple[int, ...]:
    """Shape of the block scales of a stored weight; a width that is no multiple of 32 gets one too many, which fits nothing."""
    return (*info.shape[:-1], -(-info.shape[-1] * weights_per_element // 32))


def _some(names: list[str], before: str, after: str) -> Iterator[str]:
    """One line for many names of the same fault."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{before} {names[0]}{more}" + (f"; {after}" if after else "")


def _sample(reader: ShardReader, name: str, expert: int | None, rows: int, exponents):
    """(packed, scales) of SAMPLED_ROWS rows: a run at the start and one at the end of the matrix."""
    import torch

    half = min(rows, SAMPLED_ROWS // 2)
    spans = [(0, half), (max(half, rows - half), rows)]
    packed = torch.cat([reader.matrix_rows(name, expert, begin, end) for begin, end in spans if end > begin])
    return packed, torch.cat([exponents[begin:end] for begin, end in spans if end > begin])


def _sha256(reader: ShardReader, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in reader.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()


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
