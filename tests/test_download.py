"""Download: a hub and local directories, what goes wrong with them, and how little is moved."""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from stages import assemble_release, download, evaluate, inspect_format, plan, quantize_experts
from stages.checkpoint.files import only_one
from stages.checkpoint.header import INDEX, LFS_POINTER, render_header
from stages.errors import UserError
from stages.settings import load
from stages.sources.files import safe_name
from stages.sources.hub import FIRST_BYTES, PAUSES, HashedFile, Hub, resolve
from stages.sources.listing import read_listing
from stages.stale_results import refuse_another_source
from tests.conftest import PROJECT, TINY, convert
from tests.hub_server import HubServer

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARDS = sorted(path.name for path in TINY.glob("*.safetensors"))
SHARD = "model-00003.safetensors"


@pytest.fixture
def hub(monkeypatch, pauses):
    with HubServer(TINY, "somebody/tiny", REVISION) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", pauses.append)
        yield server


@pytest.fixture
def pauses():
    """Seconds that retries would have waited."""
    return []


@pytest.fixture
def settings(tmp_path):
    return load(hub_overrides(tmp_path))


def hub_overrides(tmp_path):
    return ["source=hub", "source.name=hub_tiny", "source.repository=somebody/tiny", f"source.revision={REVISION}",
            f"source.shards=[{','.join(SHARDS)}]", f"results={tmp_path / 'results'}"]


def test_a_hub_checkpoint_becomes_the_same_release_as_the_local_one(hub, tmp_path, converted, capsys):
    made = convert(*hub_overrides(tmp_path))
    ours, theirs = (json.loads((s.run_directory / "release/manifest.json").read_text()) for s in (made, converted))
    assert ours["tensors"] == theirs["tensors"] and ours["files"] == theirs["files"]
    assert ours["source"]["revision"] == REVISION
    quality = evaluate.run(made)  # the source's shards are gone by then
    assert "temporary" in quality["source_not_measured"] and "source" not in quality
    assert quality["release"]["perplexity"] < 51.2
    assert "source not measured: the source's shards are temporary" in capsys.readouterr().out


def test_a_source_without_a_revision_is_pinned_once_and_stays_there(hub, tmp_path):
    overrides = ["source=hub", "source.repository=somebody/tiny", f"results={tmp_path}"]
    with pytest.raises(UserError, match="revision.json is missing: somebody/tiny was given without a revision, which snakemake looks up"):
        load(overrides)
    assert load(overrides, resolve=resolve).source.revision == REVISION
    hub.answered_revision = hub.revision = "f" * 40  # the branch moves on
    for settings in (load(overrides), load(overrides, resolve=resolve)):
        assert settings.source.revision == REVISION and settings.source.shards == SHARDS


def test_a_repository_of_the_same_name_is_refused_and_the_recorded_commit_is_kept(hub, tmp_path):
    overrides = ["source=hub", f"results={tmp_path}"]
    load([*overrides, "source.repository=somebody/tiny"], resolve=resolve)
    hub.repository = "else/tiny"
    with pytest.raises(UserError, match="revision.json: the results there are of somebody/tiny, not of else/tiny: set source.name"):
        load([*overrides, "source.repository=else/tiny"], resolve=resolve)
    assert load([*overrides, "source.repository=somebody/tiny"]).source.revision == REVISION
    assert load([*overrides, "source.repository=else/tiny", "source.name=another"], resolve=resolve).source.revision == REVISION
    shutil.rmtree(tmp_path / "tiny/source")  # as the line says
    assert load([*overrides, "source.repository=else/tiny"], resolve=resolve).source.revision == REVISION


def test_another_repository_or_directory_of_the_same_name_is_refused_and_another_revision_is_not(hub, tmp_path):
    settings = load(hub_overrides(tmp_path))
    download.fetch_metadata(settings)
    refuse_another_source(load([*hub_overrides(tmp_path), f"source.revision={'f' * 40}"]))
    for override in ("source.repository=else/tiny", "source.path=tests/tiny/step37_tiny"):
        others = [item for item in hub_overrides(tmp_path) if "path" not in override or not item.startswith(("source.re", "source.sh", "source=hub"))]
        with pytest.raises(UserError, match="listing.json: the results there are of somebody/tiny, not of .*: set source.name"):
            refuse_another_source(load([*others, override]))


def test_planning_a_hub_checkpoint_downloads_headers_and_no_weights(hub, settings):
    download.fetch_metadata(settings)
    headers = json.loads((settings.source_directory / "headers.json").read_text())
    assert set(headers) == set(SHARDS)
    for shard in SHARDS:
        assert hub.sent[shard] <= headers[shard]["data_start"] + FIRST_BYTES
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


def serve(monkeypatch, directory):
    """A server of a checkpoint of the test's own, and the overrides that name it."""
    server = HubServer(directory, "somebody/own", REVISION)
    server.__enter__()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    return server, ["source=hub", "source.repository=somebody/own", f"source.revision={REVISION}",
                    f"source.shards=[{','.join(shards)}]", f"results={directory.parent / 'results'}"]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """One shard of 32 MB: more than the 10 MB that the hub's client hands over at a time."""
    directory = tmp_path / "large"
    directory.mkdir()
    save_file({"a": torch.arange(8_000_000, dtype=torch.int32)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    server, overrides = serve(monkeypatch, directory)
    yield server, overrides, directory / "model.safetensors"
    server.__exit__()


def test_a_download_that_was_killed_goes_on_where_it_stopped(large):
    server, overrides, original = large
    settings = load(overrides)
    download.fetch_metadata(settings)
    server.stall_after = 25_000_000
    part = settings.shard_directory / "model.safetensors.incomplete"
    command = [sys.executable, "-m", "stages.download", *overrides, "--shard", "model.safetensors"]
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    for _ in range(300):
        if part.exists() and part.stat().st_size >= 20_000_000:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert kept >= 20_000_000
    server.stall_after = None
    server.go_on.set()
    server.sent.clear()
    server.requests.clear()
    subprocess.run(command, cwd=PROJECT, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert server.requests == [("GET", "model.safetensors", f"bytes={kept}-")]
    assert (settings.shard_directory / "model.safetensors").read_bytes() == original.read_bytes()
    assert not part.exists()


def test_a_line_that_drops_again_and_again_still_brings_a_large_shard_home(large, monkeypatch):
    """What counts is failures without a new byte; a limit on failures in all would never finish a 9-GB shard."""
    server, overrides, original = large
    settings = load(overrides)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("stages.sources.hub.PAUSES", (0,))
    download.fetch_metadata(settings)
    server.drop_after, server.drop_always = 11_000_000, True
    assert download.fetch_shard(settings, "model.safetensors").read_bytes() == original.read_bytes()
    assert len([method for method, *_ in server.requests if method == "GET"]) > 3


def test_resets_behind_new_bytes_are_forgiven_and_resets_without_are_counted(settings, monkeypatch):
    """The hub's client does not go on after a reset connection; then ours has to, but not for ever."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    received, calls = [0], [0]

    def resets():
        calls[0] += 1
        received[0] += calls[0] <= 20
        raise ConnectionResetError("reset by peer")

    with pytest.raises(UserError, match="reset by peer.*finished bytes are kept"):
        Hub(settings.source).patiently("downloading x", resets, lambda: received[0])
    assert calls[0] == 20 + len(PAUSES)


def test_a_second_download_of_the_same_shard_is_refused_and_the_first_goes_on(hub, settings):
    """Two that append to one file would interleave; a killed workflow may leave a stage running."""
    download.fetch_metadata(settings)
    target = settings.shard_directory / SHARD
    target.parent.mkdir(parents=True)
    with HashedFile(target.with_name(SHARD + ".incomplete")) as first:
        first.write((TINY / SHARD).read_bytes()[:1000])
        with pytest.raises(UserError, match="another process is downloading this file"):
            download.fetch_shard(settings, SHARD)
    assert download.fetch_shard(settings, SHARD).read_bytes() == (TINY / SHARD).read_bytes()


@pytest.fixture
def read_back(monkeypatch):
    """Bytes of a download that were read to hash them, reading by reading."""
    sizes = []

    def read(file, size=-1):
        data = io.FileIO.read(file, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(HashedFile, "read", read)
    return sizes


def incomplete(settings, beginning):
    """What an interrupted run would have left of SHARD."""
    settings.shard_directory.mkdir(parents=True)
    (settings.shard_directory / (SHARD + ".incomplete")).write_bytes(beginning)


@pytest.mark.parametrize("there", [0, 3_000_000])
def test_what_comes_is_hashed_on_its_way_and_only_what_was_there_is_read(hub, settings, read_back, there):
    download.fetch_metadata(settings)
    data = (TINY / SHARD).read_bytes()
    incomplete(settings, data[:there])
    read_back.clear()
    assert download.fetch_shard(settings, SHARD).read_bytes() == data
    assert sum(read_back) == there


def test_a_download_that_goes_on_behind_other_bytes_is_deleted_and_refused(hub, settings):
    download.fetch_metadata(settings)
    incomplete(settings, bytes(3_000_000))
    with pytest.raises(UserError, match=rf"{SHARD} has sha256 .* the hub listed .* the download was deleted, run again"):
        download.fetch_shard(settings, SHARD)
    assert not list(settings.shard_directory.glob("*"))


def test_a_server_that_ignores_ranges_makes_the_download_start_again(hub, settings, read_back):
    """The hub's client then cuts off what was there, and the hash must forget it."""
    download.fetch_metadata(settings)
    incomplete(settings, bytes(3_000_000))
    hub.ignore_range = True
    hub.sent.clear()
    read_back.clear()
    data = (TINY / SHARD).read_bytes()
    assert download.fetch_shard(settings, SHARD).read_bytes() == data
    assert hub.sent[SHARD] == len(data) and sum(read_back) == 3_000_000


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_failure_in_the_middle_is_mended_in_the_same_process_and_nothing_is_read_again(large, monkeypatch, read_back, ignore_range):
    """The line drops, the hub's client asks again and is refused, ours asks once more; the file stays open and its hash goes on."""
    server, overrides, original = large
    settings = load(overrides)
    download.fetch_metadata(settings)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        server.unavailable = int(len(pauses) == 1)  # the client's own attempt

    monkeypatch.setattr("time.sleep", pause)
    server.drop_after, server.ignore_range = 25_000_000, ignore_range
    server.requests.clear()
    read_back.clear()
    assert download.fetch_shard(settings, "model.safetensors").read_bytes() == original.read_bytes()
    (_, _, first), (_, _, second) = server.requests
    assert first is None and second == f"bytes={20 << 20}-" and len(pauses) == 2  # two pieces of the client's 10 MiB came
    assert sum(read_back) == 0


def test_a_pointer_in_place_of_a_shard_is_deleted_and_refused(large):
    _, overrides, original = large
    settings = load(overrides)
    download.fetch_metadata(settings)
    original.write_bytes((LFS_POINTER + b".github.com/spec/v1\n").ljust(original.stat().st_size))
    with pytest.raises(UserError, match="model.safetensors is a Git LFS pointer, not the data; the download was deleted, run again"):
        download.fetch_shard(settings, "model.safetensors")
    assert not list(settings.shard_directory.glob("*"))


def test_the_hash_is_that_of_the_file_after_a_write_that_failed_and_after_a_cut(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 500)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with HashedFile(path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                file.write(b"b" * 900)  # the system takes 500 of them, then none
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == 1000 and file.digest.digest() == hashlib.sha256(path.read_bytes()).digest()
        file.seek(0)
        assert file.write(b"c") == 1  # at the end nevertheless
        file.seek(700)
        assert file.truncate() == 700
        assert file.write(b"d" * 5) == 5
        expected = b"a" * 500 + b"b" * 200 + b"d" * 5
        assert path.read_bytes() == expected and file.digest.digest() == hashlib.sha256(expected).digest()


def test_headers_of_every_length_come_exactly(tmp_path, monkeypatch):
    """Inclusive ranges invite off-by-one errors, which show only at certain lengths."""
    directory = tmp_path / "lengths"
    directory.mkdir()
    lengths = [56, 64, 65_528, 65_536, 65_544, 99_992, 100_000, 100_008, 1_000_000]
    for initial, length in zip("abcdefghi", lengths, strict=True):
        prefix = render_header([(initial + "x" * (length - 56), "U8", (4,))], None)
        assert len(prefix) == 8 + length
        (directory / f"{length}.safetensors").write_bytes(prefix + b"1234")
    (directory / "config.json").write_text("{}")
    server, overrides = serve(monkeypatch, directory)
    try:
        settings = load(overrides)
        download.fetch_metadata(settings)
    finally:
        server.__exit__()
    headers = json.loads((settings.source_directory / "headers.json").read_text())
    for length in lengths:
        assert headers[f"{length}.safetensors"]["data_start"] == 8 + length


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("path", ["/api/", SHARD, "config.json"])
def test_a_hub_that_is_briefly_unavailable_is_asked_again(hub, settings, status, path):
    hub.unavailable, hub.unavailable_status, hub.unavailable_path = 2, status, path
    download.fetch_metadata(settings)
    assert hub.unavailable == 0


def test_a_hub_that_limits_the_rate_is_given_the_time_it_asks_for(hub, settings, pauses):
    hub.unavailable, hub.unavailable_status, hub.retry_after = 1, 429, 17
    download.fetch_metadata(settings)
    assert pauses == [17]


def test_a_hub_that_stays_unavailable_is_told_in_one_line_after_a_bounded_time(hub, settings, pauses):
    hub.unavailable = 10**6
    with pytest.raises(UserError, match="listing its files.*503.*run the same command again"):
        download.fetch_metadata(settings)
    assert pauses == [1, 2, 4, 8]


def test_a_hub_that_is_gone_for_minutes_in_the_middle_of_a_run_is_waited_for_and_each_attempt_is_told(hub, settings, pauses, capsys):
    download.fetch_metadata(settings)
    hub.unavailable = len(PAUSES)
    assert download.fetch_shard(settings, SHARD).read_bytes() == (TINY / SHARD).read_bytes()
    assert tuple(pauses) == PAUSES and 600 <= sum(PAUSES) <= 660 and max(PAUSES) == 60
    lines = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(lines) == len(PAUSES) and lines[3].startswith(f"somebody/tiny: downloading {SHARD}: ") and "503" in lines[3]
    assert lines[3].endswith(f"; trying again in 8 s (4 of {len(PAUSES)})")


def test_an_error_of_the_own_disk_is_not_taken_for_one_of_the_network(hub, settings, pauses, monkeypatch):
    download.fetch_metadata(settings)

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        download.fetch_shard(settings, SHARD)
    assert pauses == []


def test_bytes_of_another_range_than_asked_for_are_refused(hub, settings):
    hub.wrong_range = True
    with pytest.raises(UserError, match="asked for bytes 0-63/.*the server answered 'bytes 1-64/"):
        download.fetch_metadata(settings)


def test_large_files_come_from_the_storage_and_the_token_does_not_go_there(hub, settings, monkeypatch):
    """The hub redirects to signed addresses, which refuse a request that carries a token as well."""
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with HubServer(TINY, "somebody/tiny", REVISION) as storage:
        storage.refuse_tokens = True
        hub.storage = storage.endpoint
        download.fetch_metadata(settings)
        assert download.fetch_shard(settings, SHARD).read_bytes() == (TINY / SHARD).read_bytes()
    assert not hub.sent[SHARD]


def test_a_mirror_that_answers_with_another_revision_is_refused(hub, settings):
    hub.answered_revision = "f" * 40
    with pytest.raises(UserError, match="asked for revision 0123.*answered with ffff"):
        download.fetch_metadata(settings)


def test_bytes_that_are_not_those_the_hub_listed_are_deleted_and_refused(hub, settings):
    download.fetch_metadata(settings)
    hub.corrupt = SHARD
    with pytest.raises(UserError, match=rf"{SHARD} has sha256 .* the hub listed"):
        download.fetch_shard(settings, SHARD)
    assert not list((settings.shard_directory).glob("*"))
    hub.corrupt = None
    assert download.fetch_shard(settings, SHARD).exists()


def test_a_small_file_with_another_byte_than_the_one_the_hub_hashed_is_refused(hub, settings):
    hub.corrupt = "tokenizer.json"
    with pytest.raises(UserError, match="tokenizer.json is not what git's hash of it says"):
        download.fetch_metadata(settings)


def test_a_copy_that_changed_after_it_was_read_is_not_released(local, checkpoint):
    settings = convert(*local)
    copy = settings.source_directory / "auxiliary" / "tokenizer.json"
    copy.write_bytes(copy.read_bytes() + b" ")
    with pytest.raises(UserError, match="tokenizer.json: is not what was read from the source"):
        assemble_release.run(settings)


def test_two_do_not_assemble_a_release_at_once(local, checkpoint):
    settings = convert(*local)
    with only_one(settings.run_directory / ".release.lock", "assembling a release"):
        with pytest.raises(UserError, match="another process is assembling a release"):
            assemble_release.run(settings)


@pytest.mark.parametrize("variable, value, words", [
    ("HF_TOKEN", "hf_secret word", "HF_TOKEN holds characters"), ("HF_TOKEN", "hf_s\u00e9cret", "HF_TOKEN holds characters"),
    ("HF_ENDPOINT", "huggingface.co", "expected http://HOST"), ("HF_ENDPOINT", "http://127.0.0.1:99999", "expected http://HOST"),
    ("HF_ENDPOINT", "http://[::1", "expected http://HOST"),
])
def test_a_mistake_in_the_environment_is_one_line_without_the_secret(hub, settings, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        download.fetch_metadata(settings)
    assert words in str(caught.value) and "hf_" not in str(caught.value)


def test_a_token_may_end_in_a_newline_as_files_of_secrets_do(hub, settings, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    download.fetch_metadata(settings)
    assert read_listing(settings)[SHARD]["kind"] == "shard"


@pytest.mark.parametrize("change", [{"siblings": None}, {"siblings": [{"size": 3}]}, {"siblings": [{"rfilename": "config.json", "size": "3"}]}])
def test_an_answer_that_is_no_hubs_is_one_line(hub, settings, monkeypatch, change):
    answer = hub._info() | change
    monkeypatch.setattr(hub, "_info", lambda: answer)
    with pytest.raises(UserError, match="somebody/tiny: "):
        download.fetch_metadata(settings)


def test_a_download_that_changed_before_it_is_converted_is_deleted_and_refused(hub, settings):
    download.fetch_metadata(settings)
    inspect_format.run(settings)
    made = plan.run(settings)
    path = download.fetch_shard(settings, SHARD)
    last = path.read_bytes()[-1]
    with open(path, "r+b") as file:  # one bit of a weight, which no other check could see
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(UserError, match=rf"{SHARD}: has sha256 .* the hub listed .* changed after it was downloaded"):
        quantize_experts.convert_shard(settings, made, SHARD)
    assert not path.exists() and not list((settings.run_directory / "shards").glob("*"))
    download.fetch_shard(settings, SHARD)
    assert quantize_experts.convert_shard(settings, made, SHARD)["source"]["sha256"] == hashlib.sha256((TINY / SHARD).read_bytes()).hexdigest()


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
    assert download.fetch_shard(settings, SHARD).read_bytes() == (TINY / SHARD).read_bytes()


def test_a_hub_that_cannot_be_reached_is_one_line(settings, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="check the network, HF_ENDPOINT.*run the same command again"):
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


def test_a_shard_that_the_hubs_client_refuses_to_download_is_told_by_the_plan_with_the_way_out(hub, settings, monkeypatch):
    download.fetch_metadata(settings)
    inspect_format.run(settings)
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 1_000_000)
    words = rf"model-\d+.safetensors has \d.\d\d MB, and files over 1.00 MB .* run hf download somebody/tiny --revision {REVISION} .* source=local"
    with pytest.raises(UserError, match=words):
        plan.run(settings)
    with pytest.raises(UserError, match=words):
        download.fetch_shard(settings, SHARD)
    assert not list(settings.run_directory.glob("source/*"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "", "./a", "a//b"])
def test_a_name_that_leaves_the_directory_is_refused(name):
    with pytest.raises(UserError, match="would leave"):
        safe_name(name, "index")


@pytest.mark.parametrize("name", ["a\\b", "a\0b", "a\nb", "a\udcffb"])
def test_a_name_that_no_result_could_carry_is_refused(name):
    with pytest.raises(UserError, match="not accepted"):
        safe_name(name, "index")


def test_a_local_file_with_a_hostile_name_is_refused(checkpoint, local):
    (checkpoint / "tokenizer\\up.json").write_text("{}")
    with pytest.raises(UserError, match="not accepted"):
        download.fetch_metadata(load(local))


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, '"\xff"'])
def test_a_damaged_index_is_refused_in_one_line(checkpoint, local, text):
    (checkpoint / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"model.safetensors.index.json (is not valid JSON|has no weight_map).*restore"):
        download.fetch_metadata(load(local))


def test_a_shard_that_the_index_does_not_name_is_refused(checkpoint, local):
    """It would be converted beside the rest: the same weights in the original format, or what an older revision left behind."""
    save_file({"an.extra.tensor": torch.zeros(3)}, checkpoint / "consolidated.safetensors")
    with pytest.raises(UserError, match="does not name consolidated.safetensors"):
        download.fetch_metadata(load(local))


def test_results_of_another_source_of_the_same_name_are_not_gone_on_with(checkpoint, local, tmp_path):
    download.fetch_metadata(load(local))
    other = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, other)
    with pytest.raises(UserError, match="not the source that the settings name"):
        download.fetch_shard(load([*local, f"source.path={other}"]), SHARD)
    moved = load([*local, f"source.path={checkpoint.parent}/./{checkpoint.name}"])  # the same, spelt differently
    assert download.fetch_shard(moved, SHARD).exists()


def test_a_linked_directory_is_refused_not_left_out(checkpoint, local, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "code").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="code: is a link to a directory"):
        download.fetch_metadata(load(local))


def test_a_shard_that_was_swapped_for_another_of_its_size_is_refused(checkpoint, local):
    path = checkpoint / SHARD
    settings = load(local)
    download.fetch_metadata(settings)
    assert download.fetch_shard(settings, SHARD).resolve() == path
    raw, status = path.read_bytes(), path.stat()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:8] + raw[8:8 + length].replace(b"model.layers.3.", b"model.layers.9.") + raw[8 + length:])
    with pytest.raises(UserError, match="was changed since the source was listed"):
        download.fetch_shard(settings, SHARD)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match="not the one that was inspected"):
        download.fetch_shard(settings, SHARD)


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


def test_a_link_to_any_directory_that_is_called_blobs_is_no_hub_cache(checkpoint, local, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/secret").write_text("x")
    (checkpoint / "notes.txt").symlink_to(tmp_path / "blobs/secret")
    with pytest.raises(UserError, match="leaves the checkpoint"):
        download.fetch_metadata(load(local))


def test_links_and_special_files_that_nobody_needs_do_not_stop_a_conversion(checkpoint, local, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret.txt").write_text("x")
    (checkpoint / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere/secret.txt")
    (checkpoint / ".lock").symlink_to(tmp_path / "missing")
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache/model.safetensors").write_bytes(b"x")
    settings = load(local)
    download.fetch_metadata(settings)
    copied = {path.name for path in (settings.source_directory / "auxiliary").rglob("*")}
    assert copied == {path.name for path in TINY.iterdir() if path.suffix != ".safetensors"}


def test_a_pipe_in_the_checkpoint_is_refused_and_not_waited_for(checkpoint, local):
    os.mkfifo(checkpoint / "notes.txt")
    with pytest.raises(UserError, match="no regular file"):
        download.fetch_metadata(load(local))


def test_a_shard_that_is_a_link_is_linked_to(checkpoint, local, tmp_path):
    shutil.move(checkpoint / SHARD, tmp_path / "elsewhere")
    (checkpoint / SHARD).symlink_to(tmp_path / "elsewhere")
    settings = load(local)
    download.fetch_metadata(settings)
    assert download.fetch_shard(settings, SHARD).resolve() == tmp_path / "elsewhere"


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
    assert listing["anomalies"] == ["the source's model.safetensors.index.json omits 15 tensors that its shards hold"]


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


def test_a_hub_that_cannot_be_asked_for_a_revision_is_one_line(hub, tmp_path):
    with pytest.raises(UserError, match="somebody/tiniest: .*no such repository"):
        resolve("somebody/tiniest", None)
