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


def pytest_configure(config):
    """Of several processes of `pytest -n`, each computes on its share of the cores."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if processes > 1:
        import torch

        torch.set_num_threads(max(1, os.cpu_count() // processes))


def pytest_collection_modifyitems(items):
    """Those that take longest begin first, so that no process of `pytest -n` is left with one of them at the end."""
    items.sort(key=lambda item: ("dvc_rebuilds" not in item.nodeid, not (item.get_closest_marker("workflow") or "triton" in item.nodeid)))


def planned(*overrides: str):
    """Runs the stages in process up to the plan; returns the settings and the plan."""
    from stages import download, inspect_format, plan
    from stages.settings import load

    settings = load([*overrides])
    download.fetch_metadata(settings)
    inspect_format.run(settings)
    return settings, plan.run(settings)


def convert(*overrides: str):
    """Runs the conversion's stages in process up to the verified release; returns the settings."""
    from stages import assemble_release, download, quantize_experts, verify_release
    from stages.sources import shards_of

    settings, made = planned(*overrides)
    for shard in shards_of(settings.source):
        download.fetch_shard(settings, shard)
        quantize_experts.convert_shard(settings, made, shard)
    assemble_release.run(settings)
    verify_release.run(settings)
    return settings


def copy_of(converted, *overrides: str):
    """Settings with these overrides, and under their `results=` a copy of all that was made of the converted tiny model."""
    from stages.settings import load

    settings = load([f"source.path={TINY}", *overrides])
    shutil.copytree(converted.source_directory, settings.source_directory)
    shutil.copytree(converted.run_directory, settings.run_directory)
    return settings


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The tiny model under the default recipe: verified release and all results before evaluation."""
    return convert(f"results={tmp_path_factory.mktemp('results')}", f"source.path={TINY}", "serving=none")


@pytest.fixture
def release(converted, tmp_path) -> Path:
    """A private copy of the tiny release without its manifest, to be damaged: a wrong tool would have written a fitting one."""
    copy = tmp_path / "release"
    shutil.copytree(converted.run_directory / "release", copy)
    (copy / "manifest.json").unlink()
    return copy


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
