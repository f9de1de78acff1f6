"""conf/ and a user's overrides, composed by Hydra; whatever it refuses becomes one line.

Hydra composes the YAML files, nothing else: no launcher, no run directories.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.errors import UserError
from stages.settings.conf import CONF, PROJECT, choices
from stages.settings.schema import GroupSettings, Settings, SourceSettings

OPEN_DICTIONARY = re.compile(r"\+{0,2}serving\.(goodput_ms|variables)\b")  # whose keys the user names, for which Hydra wants `++`
ConfigStore.instance().store(name="schema", node=Settings)  # the first entry of conf/config.yaml's defaults list


def _keys() -> list[str]:
    """All settings as dotted keys."""
    tree = OmegaConf.structured(Settings)
    keys = [f"{group}.{key}" for group in tree if group != "results" for key in tree[group]]
    return ["results", *keys, *(f"recipe.groups.{field_.name}" for field_ in dataclasses.fields(GroupSettings))]


def _one_line(error: Exception) -> str:
    text = str(error) + (f"\n{error.__cause__}" if error.__cause__ else "")
    missing = re.search(r"Could not find '(\w+)/([^']*)'", text)
    if missing:
        group, name = missing.groups()
        return f"conf: there is no {group} {name!r}; choose one of {', '.join(choices(group))}"
    override = re.search(r"Could not override '([\w.]+)'", text)
    unknown = re.search(r"Key '(\w+)' (?:is )?not in", text)
    if override or unknown:
        key = override.group(1) if override else unknown.group(1)
        if override and unknown and unknown.group(1) not in key.split("."):
            key = f"{key}.{unknown.group(1)}"
        keys = _keys()
        by_name = {known.rpartition(".")[2]: known for known in reversed(keys)}  # whatever group it was looked for in
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.8) or [
            by_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.7)]
        return f"conf: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                       "; stages/settings/schema.py lists them all")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    keep = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "Set the", "Error merging"))]
    if any(words in text for words in ("LexerNoViableAlt", "mismatched input", "Error parsing override", "Ambiguous value")):
        found = re.search(r"(?:Error parsing override|Ambiguous value for argument) '(.*)'", text)
        shown = re.sub(r"^\w+Exception: ", "", text.splitlines()[0])
        return (f"conf: cannot read the setting {found.group(1) if found else shown!r}; put values with commas, "
                "braces, quotes, ~ or other than ASCII letters in quotes, as in \"source.license='mine, all mine'\"")
    key = re.search(r"full_key: (\S+)", text)
    return "conf: " + (f"{key.group(1)}: " if key else "") + " ".join(keep[:2])


def _keys_of(*kinds: object) -> set[str]:
    """Dotted keys of the settings of these types."""
    return {f"{group.name}.{key}" for group in dataclasses.fields(Settings) if group.name != "results"
            for key, kind in get_type_hints(group.default_factory).items() if kind in kinds}


TEXT, TEXTS = {"results", *_keys_of(str, str | None)}, _keys_of(list[str])
WORD = r"[\w.+-]+"  # what needs no quotes in Hydra's notation
PATHS = ("results", "source.path", "evaluation.text", "serving.environment", "serving.prompts")


def _quoted(override: str) -> str:
    """An override of a text, or of a list of them, that looks like a number, in quotes: Hydra would make 20261127 of 2026_11_27 and 1.1 of 1.10.

    A path needs no quotes of the user's, unless it holds quotes, backslashes, braces or $ itself, and begins at home with ~/ as in a shell.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not equals:
        return override
    if name in PATHS and not re.search(r"['\"\\{}$]", value) and value.lower() not in ("", "null"):
        return f"{key}='{os.path.expanduser(value) if value.startswith('~/') else value}'"
    if name in TEXTS and re.fullmatch(rf"\[{WORD}(,{WORD})*\]", value, re.ASCII):
        return f"{key}=[{','.join(repr(part) for part in value[1:-1].split(','))}]"
    is_text = name in TEXT or key.startswith("++serving.variables.")
    words = re.fullmatch(WORD, value, re.ASCII) and value.lower() != "null"
    return f"{key}='{value}'" if is_text and (words or (key, value) == ("results", "")) else override


def composed(overrides: Iterable[str]) -> Settings:
    """conf/ with overrides, not yet checked beyond keys and types."""
    if hydras := [item for item in overrides if re.match(r"[+~]*hydra\b", item)]:
        raise UserError(f"conf: {hydras[0]}: Hydra only composes conf/ here, its own settings would change nothing; leave it out")
    overrides = [_quoted("++" + item.lstrip("+") if OPEN_DICTIONARY.match(item) else item) for item in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="mxforge"):
            made = compose(config_name="config", overrides=overrides)
        # merged once more because Hydra's `+key=value` may add keys that the schema does not have
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.to_container(made)))
    except ValueError as error:
        if isinstance(error, OmegaConfBaseException):
            raise UserError(_one_line(error)) from None
        if "Config group override" not in str(error):
            raise
        groups = ", ".join(field_.name for field_ in dataclasses.fields(Settings) if field_.name != "results")
        raise UserError(f"conf: each of {groups} is chosen by the name of a file in conf/, not by null, a number or true and false: "
                        f"got {' '.join(overrides)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"conf: {f'{mark.name}, line {mark.line + 1}' if mark else 'a file'}: is no YAML: {getattr(error, 'problem', None) or error}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from None
    _refuse_a_path_alone(settings, overrides)
    return settings


def _refuse_a_path_alone(settings: Settings, overrides: list[str]) -> None:
    """UserError for another source.path without a word on which source it is of: it would get the name and the licence of conf/'s default."""
    keys = {item.lstrip("+").partition("=")[0] for item in overrides}
    if "source.path" not in keys or "source" in keys or not settings.source.path:
        return
    default = _default_source()
    if not default.path or Path(settings.source.path).resolve() != (PROJECT / default.path).resolve():
        raise UserError(f"conf: source.path={settings.source.path} without source=local would take its name and licence from source={default.name}, the "
                        "default: add source=local")


@cache
def _default_source() -> SourceSettings:
    """The source that conf/ chooses where nobody does; composing takes a quarter of a second."""
    return composed([]).source
