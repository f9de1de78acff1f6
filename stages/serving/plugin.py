"""The vLLM plugin that releases bring along, and that the environment for a CPU installs."""

from __future__ import annotations

from pathlib import Path

PLUGIN = Path(__file__).resolve().parent / "vllm_plugin"


def plugin_files() -> list[Path]:
    """Files of the plugin, relative to its directory, sorted; without what an installation may have left there."""
    return [Path("README.md"), *sorted(path.relative_to(PLUGIN) for path in PLUGIN.glob("mxforge_vllm/*.py")),
            Path("pyproject.toml")]
