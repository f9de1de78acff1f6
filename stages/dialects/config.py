"""config.json of a stranger: of the form that everything else takes for granted, or one line that says where it is not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from stages.checkpoint.files import read_json
from stages.errors import UserError

EXPERT_COUNTS = ("moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts")  # keys of config.json, by family
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size", "share_expert_dim")
TOWER_DEPTHS = ("depth", "num_hidden_layers", "layers", "vt_num_hidden_layers")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_attention_groups")
TRANSFORMS = ("transform_config", "sparsity_config", "rotation_config", "spinquant_config", "hadamard_config", "online_rotations")
FOLDED = ("awq", "gptq", "smoothquant", "autosmoothquant", "qronos", "rotation")  # Quark's algorithms whose work is in the stored weights
ONLINE = ("r3", "r4")  # rotations that Quark does when a model runs, beside those that are named so
MODELOPT = "hf_quant_config.json"  # older exports of ModelOpt say there, and there alone, how they are quantized; engines read it


def text_part(config: dict) -> dict:
    """What config.json says of the text model: text_config, or all of it where there is none."""
    return config.get("text_config") or config


def whole_number(config: dict, *keys: str) -> int | None:
    """The number that the text model has under the first of these keys that is there, None where there is none; UserError for no whole number
    above 0."""
    text = text_part(config)
    key = next((key for key in keys if text.get(key) is not None), None)
    if key is not None and not (type(text[key]) is int and text[key] > 0):
        raise UserError(f"config.json: {key} is {_shown(text[key])}, expected a whole number above 0; restore the original")
    return None if key is None else text[key]


def declared(config: dict) -> dict:
    """The quantization_config, at the top or in text_config; empty where there is none."""
    section = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    return section if isinstance(section, dict) else {}


def declared_weights(config: dict) -> list[dict]:
    """The `weights` of each compressed-tensors group."""
    groups = declared(config).get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]


def read_source_config(directory: Path, shown: Path | None = None) -> dict:
    """config.json of a checkpoint, with what MODELOPT declares as its quantization_config where it has none itself.

    `shown` is the directory to name where this one is a copy of ours. UserError where a part has a form that it cannot have.
    """
    place = shown or directory
    config = checked(_renamed(read_json(directory / "config.json", shown=place / "config.json")), f"{place}/config.json")
    if declared(config) or not (directory / MODELOPT).exists():
        return config
    section = read_json(directory / MODELOPT, shown=place / MODELOPT).get("quantization")
    if isinstance(section, dict):
        section = {"quant_method": "modelopt"} | section
    return checked(config | {"quantization_config": section}, f"{place}/{MODELOPT}")


def _renamed(config: object) -> object:
    """The config with its quantization_config under that name, which compressed-tensors called compression_config at first."""
    if isinstance(config, dict) and "compression_config" in config and config.get("quantization_config") is None:
        config = {key: value for key, value in config.items() if key != "compression_config"} | {"quantization_config": config["compression_config"]}
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        return config | {"text_config": _renamed(config["text_config"])}
    return config


def block_edges(block: object) -> object:
    """A block size of config.json, of which compressed-tensors takes "128x128" for [128, 128]."""
    return [int(edge) for edge in block.split("x")] if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block) else block


def checked(config: object, where: str = "config.json") -> dict:
    """The config, if its parts that are read here have the form that they must have; UserError for the first that has not."""
    _check_object(config, where)
    text = config.get("text_config")
    if text is not None:
        _check_object(text, f"{where}: text_config")
    for number in ("hidden_size", "num_hidden_layers"):
        value = (text if text is not None else config).get(number)
        if value is not None and type(value) is not int:
            raise UserError(f"{where}: {number} is {_shown(value)}, expected a whole number; restore the original")
    architectures = config.get("architectures")
    if architectures is not None and not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise UserError(f"{where}: architectures is {_shown(architectures)}, expected a list of names; restore the original")
    for part, place in ((config, where), (text or {}, f"{where}: text_config")):
        if part.get("quantization_config") is not None:
            _check_section(part["quantization_config"], place)
    return config


def _check_object(value: object, where: str) -> None:
    """UserError unless a part of a config is a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {_shown(value)}, expected a JSON object; restore the original")


def _check_words(part: dict, keys: Iterable[str], where: str) -> None:
    """UserError where one of these entries is a list or an object, which have no place where a word is looked up."""
    if wrong := next((key for key in keys if isinstance(part.get(key), list | dict)), None):
        raise UserError(f"{where}: {wrong} is {_shown(part[wrong])}, expected a word; restore the original")


def _check_section(section: object, where: str) -> None:
    """`checked` for a quantization_config that stands in `where`."""
    _check_object(section, f"{where}: quantization_config")
    _check_words(section, ("quant_method",), f"{where}: quantization_config")
    groups = {} if section.get("config_groups") is None else section["config_groups"]
    _check_object(groups, f"{where}: config_groups")
    for key, group in groups.items():
        _check_object(group, f"{where}: {key}")
        weights = group.get("weights") or {}
        _check_object(weights, f"{where}: {key}.weights")
        _check_words(weights, ("type", "strategy", "symmetric"), f"{where}: {key}.weights")
        for number in ("num_bits", "group_size"):
            if weights.get(number) is not None and type(weights[number]) is not int:
                raise UserError(f"{where}: {key}.weights.{number} is {_shown(weights[number])}, expected a whole number; restore the original")


def changes_weights(section: dict) -> list[str]:
    """Parts of a quantization_config by which an engine changes weights or inputs, beyond what the stored numbers mean."""
    found = [key for key in TRANSFORMS if _says_something(section.get(key))
             and not (key == "sparsity_config" and isinstance(section[key], dict) and section[key].get("format") == "dense")]
    algorithms = section.get("algo_config") or []
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = algorithm.get("name") if isinstance(algorithm, dict) else algorithm
        if not isinstance(name, str) or name.lower() not in FOLDED:
            found.append(f"algo_config of an algorithm that is not known here ({_shown(name)})")
        elif isinstance(algorithm, dict) and any(_says_something(value) for key, value in algorithm.items() if key in ONLINE or "online" in key):
            found.append(f"algo_config of {name} that is online")
    return found


def _says_something(value: object) -> bool:
    """Whether a part of a config is more than an object of empty or false entries."""
    return any(value.values()) if isinstance(value, dict) else bool(value)


def layers_apart(config: dict, layers: Iterable[int]) -> list[int]:
    """Of these layers, those of a kind of their own, by whichever key says so: that have no indexer but use an earlier layer's choice of tokens
    (GLM-5.2), or a sliding window and sinks (MiMo-V2)."""
    text = text_part(config)
    windows = text.get("hybrid_layer_pattern")
    if isinstance(windows, list):
        return [layer for layer in layers if layer < len(windows) and windows[layer] == 1]
    kinds = text.get("indexer_types") or text.get("index_topk_pattern")
    if isinstance(kinds, list | str):
        return [layer for layer in layers if layer < len(kinds) and kinds[layer] in ("shared", "S")]
    if text.get("index_topk_freq") in (None, 0, 1):
        return []
    period, first = whole_number(config, "index_topk_freq"), text.get("index_skip_topk_offset")
    if type(first) not in (int, type(None)):
        raise UserError(f"config.json: index_skip_topk_offset is {_shown(first)}, expected a whole number; restore the original")
    first = 2 if first is None else first
    return [layer for layer in layers if max(layer - first + 1, 0) % period]


def is_tied(config: dict, default: bool) -> bool:
    """Whether the head is the embedding, by config.json or, where it does not say, by the architecture's default."""
    said = (config.get("text_config") or {}).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return default if said is None else said is not False


def has_shared_experts(config: dict) -> bool:
    """Whether config.json says that layers of routed experts have shared ones, too."""
    text = text_part(config)
    return any(type(text.get(key)) is int and text[key] > 0 for key in SHARED_EXPERTS)


def tower_blocks(config: dict) -> int | None:
    """Blocks of the vision tower by config.json, None where it does not say."""
    tower = config.get("vision_config")
    found = [tower[key] for key in TOWER_DEPTHS if type(tower.get(key)) is int] if isinstance(tower, dict) else []
    return found[0] if found else None


def expert_count(config: dict) -> int | None:
    """Routed experts of a layer by config.json, None where it does not say; 0 says nothing where another key has a number."""
    text = text_part(config)
    return whole_number(config, *([key for key in EXPERT_COUNTS if text.get(key)] or EXPERT_COUNTS))


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)[:60]
