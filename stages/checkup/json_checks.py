"""The form that a stranger's JSON must have for the checks to take it for granted."""

from __future__ import annotations

import re

from stages.errors import UserError


def json_object(value: object, where: str) -> dict:
    """The value, if it is a JSON object; UserError if not."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {'null' if value is None else type(value).__name__}, expected a JSON object")
    return value


def is_count(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def checked_section(section: object) -> dict:
    """quantization_config, if it has the form of compressed-tensors; UserError for the first value of another type."""
    where = "config.json: quantization_config"
    if json_object(section, where).get("quant_method") != "compressed-tensors":
        raise UserError(f"{where}: quant_method is {section.get('quant_method')!r}; only compressed-tensors releases are verified; "
                        "`mxforge plan` shows what a source becomes")
    lists = [("ignore", section.get("ignore") or [])]
    for name, group in json_object(section.get("config_groups") or {}, f"{where}.config_groups").items():
        json_object(group, f"{where}.{name}")
        json_object(group.get("weights") or {}, f"{where}.{name}.weights")
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
