"""The launcher with programs that behave as badly as servers do: one line, and never an orphan."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from stages.errors import UserError
from stages.serving import launcher
from stages.settings import load
from tests.conftest import PROJECT

ANSWERING = """
import http.server, json, os, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.answer(200, b'{"version": "0.0"}')
    def do_POST(self): self.answer(int(os.environ.get("STATUS", 200)), b"worker 3 is out of memory")
    def answer(self, status, data):
        self.send_response(status); self.send_header("content-length", str(len(data))); self.end_headers(); self.wfile.write(data)
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DYING = """
import sys
print("INFO 11-25 loading")
print("(Worker pid=1) ERROR [x.py:1] ValueError: no kernel for this device")
print("RuntimeError: Engine core initialization failed. See root cause above.")
sys.exit(3)
"""
SILENT = "import time; time.sleep(600)"


def settings_with(program, tmp_path, **variables):
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    command = environment / "bin" / "vllm"
    command.write_text(f"#!{sys.executable}\n{program}")
    command.chmod(0o755)
    pairs = [f"+serving.variables.{key}='{value}'" for key, value in {"PIDS": tmp_path / "pids", **variables}.items()]
    settings = load(["serving=vllm_cpu", f"serving.environment={environment}", f"results={tmp_path / 'results'}",
                     *pairs, "serving.startup_seconds=20"])
    release = settings.run_directory / "release"
    release.mkdir(parents=True)
    (release / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 3}}))
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(5)]
    (release / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    return settings


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def pids_of(tmp_path):
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def test_a_server_that_answers_is_used_and_every_process_of_it_ends(tmp_path):
    with launcher.server(settings_with(ANSWERING, tmp_path)) as running:
        pids = pids_of(tmp_path)
        assert all(map(alive, pids)) and running.facts["version"] == "0.0"
        assert running.base_url.startswith("http://127.0.0.1:")
    assert gone(pids)


LOG = """Triton is installed, but doesn't include CPU backend. Disabling Triton.
(EngineCore pid=187) INFO 05-01 19:35:13 [cuda.py:368] Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'FLEX_ATTENTION'].
\x1b[0;36m(Worker_TP0 pid=3)\x1b[0m INFO 03-16 11:27:40 [flash_attn.py:587] Using FlashAttention version 3
(Worker_TP0 pid=3) INFO 11-28 00:44:17 [mxfp4.py:352] Using 'MARLIN' Mxfp4 MoE backend.
(Worker_TP1 pid=4) INFO 11-28 00:44:18 [mxfp4.py:352] Using 'MARLIN' Mxfp4 MoE backend.
(Worker pid=3) INFO 11-28 00:44:17 [x.py:77] Using MarlinExperts for MXFP4 MoE
(Worker pid=3) INFO 11-28 00:44:17 [x.py:7] Selected FlashInferFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8 (kernel 2)
(APIServer pid=2) INFO 11-28 00:43:44 [model.py:2152] Using max model len 2048
(Worker pid=3) INFO 11-28 00:44:16 [parallel_state.py:1906] world_size=1 rank=0 backend=gloo
"""


def test_the_backends_that_a_log_names_are_kept_once_each(tmp_path):
    log = tmp_path / "server.log"
    assert launcher.backends_of(log) == []
    log.write_text(LOG)
    assert launcher.backends_of(log) == [
        "Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'FLEX_ATTENTION'].", "Using FlashAttention version 3",
        "Using 'MARLIN' Mxfp4 MoE backend.", "Using MarlinExperts for MXFP4 MoE",
        "Selected FlashInferFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8 (kernel 2)"]


def test_facts_hold_what_a_figure_depends_on_and_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH_ATTN")
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    monkeypatch.setattr(launcher, "driver_version", lambda: "580.1")
    monkeypatch.setattr(launcher, "hardware", lambda *_: {"on_cpu": False, "hardware": ["A GPU"]})
    settings = settings_with(f"print({LOG!r}, flush=True)" + ANSWERING, tmp_path, VLLM_NVFP4_MAX_TOKENS=8)
    settings.serving.flags += ["--api-key", "secret1", "secret2", "--enforce-eager"]
    with launcher.server(settings) as running:
        facts = running.facts
    assert facts["variables"].items() >= {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN", "VLLM_API_KEY": "(left out)", "VLLM_NVFP4_MAX_TOKENS": "8"}.items()
    assert all(name.startswith("VLLM_") for name in facts["variables"])
    assert facts["driver"] == "580.1" and "Using 'MARLIN' Mxfp4 MoE backend." in facts["backends"]
    assert not any(word in json.dumps(facts) for word in ("secret1", "secret2", "abc"))
    assert facts["command"][-6:-2] == ["--api-key", "(left out)", "(left out)", "--enforce-eager"]


@pytest.mark.parametrize(("name", "value", "shown"), [
    ("VLLM_API_KEY", "x", False), ("HF_TOKEN", "x", False), ("AWS_SECRET_ACCESS_KEY", "x", False), ("A", "sk-1", False), ("A", "hf_abc", False),
    ("A", "http://me:word@host/x", False), ("A", "0123456789abcdef0123456789abcdef", False),
    ("VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "163840", True), ("VLLM_CACHE_ROOT", "/a/very/long/path/with/numbers/0123456789abcdef", True),
    ("VLLM_NO_USAGE_STATS", "1", True), ("VLLM_KEYS_FAST", "1", True), ("A", "http://host:80/x", True),
])
def test_what_is_called_or_looks_like_a_key_is_left_out_of_results(name, value, shown):
    assert launcher.without_secrets({name: value}) == {name: value if shown else "(left out)"}


@pytest.mark.parametrize(("words", "shown"), [
    (["--api-key", "a"], ["--api-key", "(left out)"]), (["--api_key=a", "b"], ["--api-key=(left out)", "b"]), (["--port", "1"], ["--port", "1"]),
    (["--api-key", "a", "b", "--port", "1"], ["--api-key", "(left out)", "(left out)", "--port", "1"]),
])
def test_a_key_among_the_flags_is_left_out_of_results(words, shown):
    assert launcher.without_api_key(words) == shown


@pytest.mark.parametrize(("script", "version"), [("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", None), ("true", None), (None, None)])
def test_the_driver_is_what_nvidia_smi_says(tmp_path, monkeypatch, script, version):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.driver_version() == version


def test_thread_counts_of_the_workflow_do_not_reach_the_server(tmp_path, monkeypatch):
    for name in launcher.THREAD_VARIABLES:
        monkeypatch.setenv(name, "64")
    settings = settings_with(ANSWERING, tmp_path, MKL_NUM_THREADS=1)
    with launcher.server(settings) as running:
        got = dict(pair.split("=", 1) for pair in open(f"/proc/{running.process.pid}/environ").read().split("\0") if "=" in pair)
    assert {name: got.get(name) for name in launcher.THREAD_VARIABLES if name in got} == {"MKL_NUM_THREADS": "1"}


def test_a_failure_while_serving_ends_the_server_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with launcher.server(settings_with(ANSWERING, tmp_path)):
            pids = pids_of(tmp_path)
            1 / 0
    assert gone(pids)


def test_a_server_that_dies_says_its_own_reason(tmp_path):
    with pytest.raises(UserError, match="stopped with status 3: ValueError: no kernel for this device; see .*server-release.log"):
        with launcher.server(settings_with(DYING, tmp_path)):
            pass


def test_a_server_that_is_up_but_cannot_complete_is_refused(tmp_path):
    with pytest.raises(UserError, match="answers a completion with 500: worker 3 is out of memory"):
        with launcher.server(settings_with(ANSWERING, tmp_path, STATUS=500)):
            pass
    assert gone(pids_of(tmp_path))


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path):
    settings = settings_with(SILENT, tmp_path)
    settings.serving.startup_seconds = 1.0
    with pytest.raises(UserError, match="did not answer within serving.startup_seconds=1"):
        with launcher.server(settings):
            pass


def test_death_of_the_server_while_it_is_used_is_noticed(tmp_path):
    with launcher.server(settings_with(ANSWERING, tmp_path)) as running:
        running.check()
        running.process.kill()
        running.process.wait()
        with pytest.raises(UserError, match="the server stopped with status -9"):
            running.check()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_a_run_that_is_ended_from_outside(tmp_path, how):
    settings = settings_with(ANSWERING, tmp_path)
    overrides = ["serving=vllm_cpu", f"serving.environment={settings.serving.environment}", f"results={tmp_path / 'results'}",
                 f"+serving.variables.PIDS='{tmp_path / 'pids'}'"]
    code = ("import sys, time\nfrom stages.serving import launcher\nfrom stages.settings import load\n"
            f"with launcher.server(load({overrides!r})):\n    print('up', flush=True)\n    time.sleep(600)\n")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("up") for line in run.stdout)
    server = pids_of(tmp_path)[0]
    os.kill(run.pid, how)
    run.wait()
    assert gone([server])


def test_missing_environment_and_missing_command_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="make serve-env"):
        launcher.executable(load(["serving=vllm_cpu", f"serving.environment={tmp_path}"]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no `vllm` on the PATH"):
        launcher.executable(load(["serving=vllm_cuda"]))


def test_draft_layers_are_asked_for_where_the_release_has_them(tmp_path):
    settings = settings_with(SILENT, tmp_path)
    release = settings.run_directory / "release"
    assert '"num_speculative_tokens": 3' in " ".join(launcher.command_line(settings, release, 1))
    for flags in (["--speculative_config", '{"method": "ngram"}'], ["-sc", "{}"], ["--speculative-config.method=ngram"]):
        settings.serving.flags = flags
        assert launcher.command_line(settings, release, 1)[-len(flags):] == flags
    settings.serving.flags, settings.serving.drafts = [], False
    assert "--speculative-config" not in launcher.command_line(settings, release, 1)


def test_draft_layers_under_names_of_their_own_are_asked_for(tmp_path):
    """Qwen3.5 counts them in `mtp_num_hidden_layers` and names them `mtp.layers.N`; copies of it are published without them, too."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 2, "mtp_num_hidden_layers": 1}}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.language_model.layers.1.mlp.gate.weight": "a", "mtp.layers.0.mlp.gate.weight": "a"}}))
    assert launcher.drafts_of(tmp_path) == 1
    index.write_text(json.dumps({"weight_map": {"model.language_model.layers.1.mlp.gate.weight": "a"}}))
    assert launcher.drafts_of(tmp_path) == 0


def test_draft_layers_that_only_config_json_knows_of_are_not_asked_for(tmp_path):
    settings = settings_with(SILENT, tmp_path)
    release = settings.run_directory / "release"
    (release / "model.safetensors.index.json").unlink()
    save_file({"model.layers.1.input_layernorm.weight": torch.ones(4)}, release / "model.safetensors")
    assert "--speculative-config" not in launcher.command_line(settings, release, 1)


def test_what_pydantic_finds_is_told_with_its_reason(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("(APIServer) pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, max_model_len is too large\n")
    assert launcher.reason(log).endswith("1 validation error for ModelConfig: Value error, max_model_len is too large")
