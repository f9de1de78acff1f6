"""Download: a hub and local directories, what goes wrong with them, and how little is moved."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from stages import download, evaluate
from stages.errors import UserError
from stages.settings import load
from tests.conftest import PROJECT, TINY, convert
from tests.hub_server import HubServer

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARDS = sorted(path.name for path in TINY.glob("*.safetensors"))
SHARD = "model-00003.safetensors"


@pytest.fixture
def hub(monkeypatch):
    with HubServer(TINY, "somebody/tiny", REVISION) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # retries wait
        yield server


@pytest.fixture
def settings(tmp_path):
    return load(hub_overrides(tmp_path))


def hub_overrides(tmp_path):
    return ["source=hub", "source.name=hub_tiny", "source.repository=somebody/tiny", f"source.revision={REVISION}",
            f"source.shards=[{','.join(SHARDS)}]", f"results={tmp_path / 'results'}"]


def test_a_hub_checkpoint_becomes_the_same_release_as_the_local_one(hub, tmp_path, converted):
    made = convert(*hub_overrides(tmp_path))
    ours, theirs = (json.loads((s.run_directory / "release/manifest.json").read_text()) for s in (made, converted))
    assert ours["tensors"] == theirs["tensors"] and ours["files"] == theirs["files"]
    assert ours["source"]["revision"] == REVISION
    quality = evaluate.run(made)  # the source's shards are gone by then
    assert "temporary" in quality["source_not_measured"] and "source" not in quality
    assert quality["release"]["perplexity"] < 51.2


def test_planning_a_hub_checkpoint_downloads_headers_and_no_weights(hub, settings):
    download.fetch_metadata(settings)
    headers = json.loads((settings.source_directory / "headers.json").read_text())
    assert set(headers) == set(SHARDS)
    for shard in SHARDS:
        assert hub.sent[shard] <= headers[shard]["data_start"] + download.FIRST_BYTES
    assert (settings.source_directory / "auxiliary/tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_an_interrupted_download_goes_on_where_it_stopped(hub, settings):
    """The next process must not start at zero: what is there is kept under a stable name and continued."""
    download.fetch_metadata(settings)
    target = settings.shard_directory / SHARD
    target.parent.mkdir(parents=True)
    data = (TINY / SHARD).read_bytes()
    target.with_name(SHARD + ".incomplete").write_bytes(data[:3_000_000])
    hub.sent.clear()
    assert download.fetch_shard(settings, SHARD).read_bytes() == data
    assert hub.sent[SHARD] == len(data) - 3_000_000


def test_a_connection_that_drops_in_the_middle_of_a_shard_is_resumed(hub, settings):
    download.fetch_metadata(settings)
    hub.drop_after = 1_000_000
    assert download.fetch_shard(settings, SHARD).read_bytes() == (TINY / SHARD).read_bytes()


def test_a_hub_that_is_briefly_unavailable_is_asked_again(hub, settings):
    hub.unavailable = 2
    download.fetch_metadata(settings)
    hub.unavailable = 2
    download.fetch_shard(settings, SHARD)


def test_a_server_that_ignores_ranges_still_gives_right_headers(hub, settings):
    hub.ignore_range = True
    download.fetch_metadata(settings)
    assert set(json.loads((settings.source_directory / "headers.json").read_text())) == set(SHARDS)


def test_bytes_that_are_not_those_the_hub_listed_are_deleted_and_refused(hub, settings):
    download.fetch_metadata(settings)
    hub.corrupt = SHARD
    with pytest.raises(UserError, match=rf"{SHARD} has sha256 .* the hub listed"):
        download.fetch_shard(settings, SHARD)
    assert not list((settings.shard_directory).glob("*"))
    hub.corrupt = None
    assert download.fetch_shard(settings, SHARD).exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda hub: setattr(hub, "token", "secret"), "HF_TOKEN"),
    (lambda hub: setattr(hub, "gated", True), "accept the licence"),
    (lambda hub: setattr(hub, "repository", "somebody/else"), "source.repository"),
    (lambda hub: setattr(hub, "revision", "f" * 40), "source.revision"),
])
def test_a_refusal_of_the_hub_is_one_line_with_the_remedy(hub, settings, change, words):
    change(hub)
    with pytest.raises(UserError, match=words):
        download.fetch_metadata(settings)


def test_the_token_of_the_environment_is_sent(hub, settings, monkeypatch):
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    download.fetch_metadata(settings)
    download.fetch_shard(settings, SHARD)


def test_a_hub_that_cannot_be_reached_is_one_line(settings, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="run the same command again"):
        download.fetch_metadata(settings)


def test_pinned_shards_that_are_not_the_repositorys_are_refused(hub, tmp_path):
    overrides = [o for o in hub_overrides(tmp_path) if not o.startswith("source.shards")]
    with pytest.raises(UserError, match="model-00005.safetensors"):
        download.fetch_metadata(load([*overrides, f"source.shards=[{','.join(SHARDS[:4] + SHARDS[5:])}]"]))


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(hub, settings, monkeypatch):
    download.fetch_metadata(settings)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
    hub.sent.clear()
    with pytest.raises(UserError, match="not enough disk: model-00003.safetensors needs 4.53 MB.*has 4.00 MB"):
        download.fetch_shard(settings, SHARD)
    assert hub.sent[SHARD] == 0


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "a\\b", "", "a\0b", "./a"])
def test_a_name_that_leaves_the_directory_is_refused(name):
    with pytest.raises(UserError, match="would leave"):
        download.safe_name(name, "index")


def test_an_index_with_a_path_in_it_is_refused(checkpoint, local):
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../model-00005.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="would leave"):
        download.fetch_metadata(load(local))


def test_a_link_out_of_the_checkpoint_is_not_copied_into_the_release(checkpoint, local, tmp_path):
    (tmp_path / "secret").write_text("x")
    (checkpoint / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leaves the checkpoint"):
        download.fetch_metadata(load(local))


def test_a_hub_cache_made_of_links_to_blobs_is_a_checkpoint(tmp_path, converted):
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in TINY.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    made = convert("source=local", f"source.path={snapshot}", "source.name=step37_tiny", f"results={tmp_path / 'results'}")
    ours, theirs = ((s.run_directory / "release/manifest.json").read_bytes() for s in (made, converted))
    assert ours == theirs


def test_what_the_index_omits_is_read_from_the_headers_and_noted(converted):
    listing = json.loads((converted.source_directory / "listing.json").read_text())
    assert listing["anomalies"] == ["model.safetensors.index.json omits 15 tensors that the shards hold"]


def test_duplicate_weights_in_other_formats_are_left_out(checkpoint, local):
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    (checkpoint / "original").mkdir()
    (checkpoint / "original/consolidated.safetensors").write_bytes(b"x")
    settings = load(local)
    download.fetch_metadata(settings)
    assert not (settings.source_directory / "auxiliary/pytorch_model.bin").exists()
    assert not (settings.source_directory / "auxiliary/original").exists()


def test_the_command_line_downloads_from_the_hub(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    for what in (["--metadata"], ["--shard", SHARD]):
        ran = subprocess.run([sys.executable, "-m", "stages.download", *hub_overrides(tmp_path), *what], cwd=PROJECT,
                             env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "results/hub_tiny/mxfp4_experts/source" / SHARD).read_bytes() == (TINY / SHARD).read_bytes()
