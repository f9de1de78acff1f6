"""Servers that somebody else started: ordinary ones are used, and what is wrong with others is one line."""

import http.server
import json
import threading

import pytest
import torch

from stages import serve_bench
from stages.errors import UserError
from stages.serving import launcher, secrets
from stages.serving.commands import served_by
from stages.serving.launcher import server
from stages.serving.score import token_log_probabilities
from stages.settings import load
from tests.serving.paced_server import PacedServer

SECRET = "sk-very-secret-9"


def pages(method, path, headers, calls):
    """A vLLM server that offers `release`."""
    if path == "/v1/models":
        return 200, json.dumps({"data": [{"id": "release", "max_model_len": 4096, "root": "/models/x", "owned_by": "vllm"}]})
    if path == "/version":
        return 200, '{"version": "0.32.0"}'
    return (200, "{}") if path in ("/health", "/v1/completions") else (404, '{"detail": "Not Found"}')


def without_health(method, path, headers, calls):
    return (404, "Not Found") if path == "/health" else pages(method, path, headers, calls)


def completions_only(method, path, headers, calls):
    return pages(method, path, headers, calls) if path == "/v1/completions" else (404, "Not Found")


def loading(method, path, headers, calls):
    return (503, "loading") if calls < 3 else pages(method, path, headers, calls)


def with_key(method, path, headers, calls):
    if headers.get("authorization") == f"Bearer {SECRET}" or path == "/health":
        return pages(method, path, headers, calls)
    return 401, f"Unauthorized: {headers.get('authorization')}"


def of_another_name(method, path, headers, calls):
    return (404, "model not found") if path == "/v1/completions" else pages(method, path, headers, calls)


def odd(method, path, headers, calls):
    return 200, "[1]"


class Endpoint:
    """`with Endpoint(answer) as url:` serves what answer(method, path, headers, calls so far) gives."""

    def __init__(self, answer):
        calls = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status, text = answer(self.command, self.path, self.headers, len(calls))
                calls.append((self.command, self.path))
                self.send_response(status)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.calls, self.server = calls, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def fast_and_without_a_key(monkeypatch):
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.05)
    monkeypatch.delenv(secrets.KEY, raising=False)


def facts_of(url, tmp_path, *overrides):
    with server(load(["serving=endpoint", f"serving.url={url}", f"results={tmp_path}", *overrides])) as running:
        assert running.base_url == url.removesuffix("/").removesuffix("/v1")
        return running.facts


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("answer", [pages, without_health, loading])
def test_ordinary_endpoints_are_used(tmp_path, answer, suffix):
    with Endpoint(answer) as url:
        facts = facts_of(url + suffix, tmp_path)
    assert facts == {"engine": "endpoint", "version": "0.32.0", "identity": "not verified to be this release", "differences": [],
                     "offers": {"id": "release", "max_model_len": 4096, "root": "/models/x"}}


@pytest.mark.parametrize("answer", [completions_only, odd])
def test_an_endpoint_that_says_nothing_of_itself_is_used(tmp_path, answer):
    with Endpoint(answer) as url:
        facts = facts_of(url, tmp_path)
    assert (facts["version"], facts["offers"], facts["differences"]) == (None, None, [])


def test_what_an_endpoint_says_of_its_model_is_compared_with_the_settings(tmp_path, capsys):
    with Endpoint(pages) as url:
        facts = facts_of(url, tmp_path, "serving.output_tokens=4096", "evaluation.via=vllm", "evaluation.context=4096")
        other = facts_of(url, tmp_path, "serving.model=other")
    assert facts["differences"] == ["its max_model_len is 4096, below serving.prompt_tokens + serving.output_tokens = 4128",
                                    "its max_model_len is 4096, below evaluation.context + 1 = 4097"]
    assert other["differences"] == ["/v1/models lists release, not serving.model=other"] and other["offers"] is None
    assert f"note: {url}: its max_model_len is 4096, below serving.prompt_tokens" in capsys.readouterr().out


def test_the_hardware_that_cannot_be_seen_is_what_the_settings_say(tmp_path):
    with Endpoint(pages) as url:
        facts = facts_of(url, tmp_path, "serving.hardware='8 x H200'")
        assert "hardware" not in facts_of(url, tmp_path)
    assert facts["hardware"] == ["8 x H200"] and served_by(facts) == f"an endpoint, vLLM 0.32.0, 8 x H200, {launcher.UNVERIFIED}"
    with pytest.raises(UserError, match="serving.hardware says what an endpoint runs on"):
        load(["serving=vllm_cuda", "serving.hardware=H200"])


@pytest.mark.parametrize(("key", "words"), [
    (None, "answers a completion with 401: .*; the environment variable MXFORGE_API_KEY must hold its key"),
    ("wrong-key-1", r"Unauthorized: Bearer \[MXFORGE_API_KEY\]; the environment variable MXFORGE_API_KEY holds another key than its"),
    ("sch\u00f6n", "characters that no HTTP header can"),
])
def test_a_key_that_is_missing_or_wrong_is_one_line_without_the_key(tmp_path, monkeypatch, key, words):
    if key:
        monkeypatch.setenv(secrets.KEY, key)
    with Endpoint(with_key) as url, pytest.raises(UserError, match=words) as caught:
        facts_of(url, tmp_path)
    assert "\n" not in str(caught.value) and (not key or key not in str(caught.value))


@pytest.mark.parametrize("url", ["http://me:word@127.0.0.1:9", "https://sk-1@host/v1"])
def test_an_address_with_a_key_in_it_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match="serving.url has a name or key .* MXFORGE_API_KEY") as caught:
        load(["serving=endpoint", f"serving.url='{url}'"])
    assert "me:word" not in str(caught.value) and "sk-1" not in str(caught.value)


def test_a_key_is_sent_with_every_request_and_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv(secrets.KEY, SECRET + "\n")
    with Endpoint(with_key) as url:
        facts = facts_of(url, tmp_path)
        running = launcher.Server(url, "release", {})
        with pytest.raises(UserError, match="no answer in the form of"):  # but none that says 401
            token_log_probabilities(running, torch.arange(20), [(0, 20, 1)])
    assert SECRET not in json.dumps(facts)
    with PacedServer(rate=400.0) as paced:
        settings = load(["serving=endpoint", f"serving.url={paced.url}/v1", f"results={tmp_path}", "serving.concurrencies=[2]",
                         "serving.output_tokens=16", "serving.window_seconds=0.3", "serving.ramp_seconds=0"])
        release = settings.run_directory / "release"
        release.mkdir(parents=True)
        (release / "config.json").write_text('{"vocab_size": 512}')
        (release / "manifest.json").write_text('{"files": {}}')
        serve_bench.run(settings)
    assert paced.keys == {f"Bearer {SECRET}"}
    assert not any(SECRET in path.read_text(errors="replace") for path in tmp_path.rglob("*.json"))
    assert secrets.KEY not in launcher.environment_of(settings)


def test_an_endpoint_that_never_finishes_loading_is_given_up_with_what_it_said(tmp_path):
    with Endpoint(lambda *_: (503, "loading weights")) as url:
        with pytest.raises(UserError, match="did not answer within serving.startup_seconds=0.3: /health answers with 503: loading weights$"):
            facts_of(url, tmp_path, "serving.startup_seconds=0.3")


def test_a_model_that_an_endpoint_does_not_offer_is_named_with_those_that_it_does(tmp_path):
    with Endpoint(of_another_name) as url, pytest.raises(UserError, match="with 404: model not found; it offers release, serving.model is mine"):
        facts_of(url, tmp_path, "serving.model=mine")


@pytest.mark.parametrize(("url", "words"), [
    ("http://127.0.0.1:1", r"nothing answers there \(ConnectError .*refused\); start the server or fix the address"),
    ("http://127.0.0.1:x9", "Invalid port: 'x9'; correct the address in serving.url"),
])
def test_an_address_without_a_server_says_what_went_wrong(tmp_path, url, words):
    with pytest.raises(UserError, match=words):
        facts_of(url, tmp_path)


def test_certificates_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with Endpoint(pages) as url:
        assert facts_of(url, tmp_path)["version"] == "0.32.0"  # http needs none
    with pytest.raises(UserError, match="none.pem cannot be read .*PEM"):
        facts_of("https://127.0.0.1:1", tmp_path)
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(UserError, match="none.pem cannot be read .*PEM"):
        facts_of("https://127.0.0.1:1", tmp_path)
