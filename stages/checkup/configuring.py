"""The config.json of a release, made again from its tensors: what its groups must say follows from how each weight is stored."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.files import read_json, render_json, sha256_file, write_text
from stages.checkup import completeness, structure
from stages.checkup.checkpoint import Checkpoint
from stages.checkup.json_checks import json_object
from stages.dialects.config import changes_weights, declared
from stages.dialects.roles import hidden_layers
from stages.errors import UserError
from stages.planning.outputs import config_json
from stages.schemes import SCHEMES, compressed_tensors, vllm_rules
from stages.schemes.architectures import architecture_of

FORMATS = [scheme.FORMAT for scheme in SCHEMES.values()]


def section_for(checkpoint: Checkpoint) -> tuple[dict, int]:
    """(quantization_config that fits the tensors, number of vLLM's modules that it claims).

    Opens the shards. UserError for tensors that do not fit each other, and for an architecture or a mixture that no config makes right.
    """
    row = architecture_of(checkpoint.architecture)
    if row is None:
        raise UserError(f"{checkpoint.directory / 'config.json'}: vLLM's module names for architecture {checkpoint.architecture} are not known; "
                        "add a row to stages/schemes/architectures.py")
    for check in (structure.containers, structure.pairs, completeness.experts, completeness.layers):
        for fault in check(checkpoint):
            raise UserError(f"{fault}; fix that first")
    layers = hidden_layers(checkpoint.config)
    linears, experts, stored = checkpoint.engine_modules(layers)
    if not stored:
        raise UserError(f"{checkpoint.directory}: holds no quantized weight; nothing to configure")
    runtime = vllm_rules.runtime_modules(linears, experts, layers, row)
    if fault := checkpoint.model_fault(row, layers, experts):
        raise UserError(f"{checkpoint.directory}: {fault}")
    names, stacked = checkpoint.quantized_experts(layers)
    for fault in vllm_rules.expert_faults(row, names, stacked):
        raise UserError(f"{checkpoint.directory}: {fault}; no config makes that right")
    section = compressed_tensors.quantization_config(runtime, stored, tuple(sorted(names)))
    if faults := vllm_rules.coverage_faults(runtime, section, stored, row):
        raise UserError(f"{checkpoint.directory}: vLLM could not serve these tensors under any config that mxforge can write: {faults[0]}")
    return section, len(runtime)


def _keep(section: dict, before: dict, where: str, is_base: bool) -> None:
    """Takes over what an engine does beside reading the stored weights and no tensor tells: the KV cache's scheme, and each group's activations.

    UserError for what cannot be said again without changing the model. is_base: `before` is another checkpoint's, whose groups may be of weights
    that this one stores otherwise.
    """
    if before.get("quant_method") != "compressed-tensors":
        if before and not is_base and not any(group["format"] in FORMATS for group in section["config_groups"].values()):
            raise UserError(f"{where}: declares quant_method {before.get('quant_method')!r}, and no tensor is MXFP4 or MXFP8: it is of no release, and "
                            "what it says of activations would be lost")
        return  # the source's, which the conversion has replaced
    for part in changes_weights(before):
        raise UserError(f"{where}: quantization_config has {part}, by which an engine changes weights or inputs; it cannot be made again")
    section["kv_cache_scheme"] = before.get("kv_cache_scheme")
    kept: dict[str, tuple[str, dict]] = {}  # group made again -> the group that it has its activations from
    for name, group in json_object(before.get("config_groups") or {}, f"{where}: config_groups").items():
        weights = json_object(json_object(group, f"{where}: {name}").get("weights") or {}, f"{where}: {name}.weights")
        activations = {key: group.get(key) for key in ("input_activations", "output_activations")}
        made = next((made for made, other in section["config_groups"].items()
                     if all(weights.get(key) == other["weights"][key] for key in ("num_bits", "type", "strategy"))), None)
        if made is None and any(activations.values()) and not is_base:
            raise UserError(f"{where}: {name} quantizes activations, but no tensor is stored as its weights say; correct them, or take its "
                            "activations out")
        if made and kept.setdefault(made, (name, activations))[1] != activations:
            raise UserError(f"{where}: {kept[made][0]} and {name} quantize activations in two ways, but their weights in one; mxforge config "
                            "makes one group of them")
        if made:
            section["config_groups"][made] |= activations


def _manifest(path: Path) -> dict | None:
    """The manifest beside the config, which must follow it; None where there is none."""
    if not path.exists():
        return None
    content = read_json(path, "assemble_release")
    if not isinstance(content.get("files"), dict):
        raise UserError(f"{path}: has no table of files; restore it or remove it first")
    return content


def run(directory: Path, base: Path | None, dry_run: bool) -> None:
    """Writes directory/config.json: that of `base` or its own, with the quantization_config that fits the tensors. Printed only with
    `dry_run`."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name a release")
    path = directory / "config.json"
    config = read_json(base or path)
    with Checkpoint(directory, section={}, config=config) as checkpoint:
        section, modules = section_for(checkpoint)
    _keep(section, declared(config), str(base or path), is_base=base is not None)
    text = config_json(config, section)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        print(f"{path}: is right as it is ({modules} modules)")
        return
    if dry_run:
        print(text, end="")
        return
    manifest = _manifest(directory / "manifest.json")
    write_text(path, text)
    if manifest is not None:
        manifest["files"]["config.json"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_text(directory / "manifest.json", render_json(manifest))
    print(f"{path}: written; it gives all {modules} modules their format" + ("; manifest.json follows it" if manifest is not None else ""))
