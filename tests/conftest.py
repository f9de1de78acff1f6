"""Fixtures: settings that write to a temporary directory, the tiny model converted once, and damaged copies of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
TINY = PROJECT / "tests" / "tiny" / "step37_tiny"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in these tests may reach a real hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def convert(*overrides: str):
    """Runs the conversion's stages in process up to the verified release; returns the settings."""
    from stages import assemble_release, download, inspect_format, plan, quantize_experts, verify_release
    from stages.settings import load
    from stages.sources import shards_of

    settings = load([*overrides])
    download.fetch_metadata(settings)
    inspect_format.run(settings)
    made = plan.run(settings)
    for shard in shards_of(settings.source):
        download.fetch_shard(settings, shard)
        quantize_experts.convert_shard(settings, made, shard)
    assemble_release.run(settings)
    verify_release.run(settings)
    return settings


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The tiny model under the default recipe: verified release and all results before evaluation."""
    return convert(f"results={tmp_path_factory.mktemp('results')}", f"source.path={TINY}", "serving=none")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A private copy of the tiny checkpoint, to be damaged."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(TINY, copy)
    return copy


@pytest.fixture
def local(tmp_path, checkpoint):
    """Overrides that convert the private copy into a temporary results directory."""
    return ["source=local", f"source.path={checkpoint}", f"results={tmp_path / 'results'}"]
