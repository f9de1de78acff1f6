"""Where conf/ is, and which choices it offers."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
CONF = PROJECT / "conf"


def located(path: str) -> str:
    """A path of a setting: relative ones start at the working directory or, where nothing is there, at the project, as those in conf/ do."""
    return str(PROJECT / path) if not Path(path).exists() and (PROJECT / path).exists() else path


def choices(group: str) -> list[str]:
    """Names of the alternatives that conf/ offers for one settings group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
