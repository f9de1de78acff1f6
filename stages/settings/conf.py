"""Where conf/ is, and which choices it offers."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
CONF = PROJECT / "conf"


def choices(group: str) -> list[str]:
    """Names of the alternatives that conf/ offers for one settings group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
