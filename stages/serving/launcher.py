"""Starts vLLM on a release, waits until it really answers, and stops it, whatever happens in between.

`server(settings, directory)` is a context manager. With `serving.kind: vllm` it starts `vllm serve` on loopback with a free
port; ready means that a completion came back, since a server's health page answers before its first forward pass, which may
fail. With `serving.kind: endpoint` it uses the server at serving.url, once that has answered one, and starts nothing.

The server runs in a session of its own and is stopped by its process id: SIGTERM first, after STOP_SECONDS SIGKILL for all
processes of that session. The kernel sends it SIGTERM, too, when this process dies without a chance to clean up.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from stages.checkpoint.files import read_json
from stages.checkpoint.header import INDEX, read_header
from stages.dialects.roles import declared_drafts, draft_layers
from stages.errors import UserError
from stages.serving.commands import sets
from stages.serving.secrets import KEY, without_api_key, without_key, without_secrets
from stages.settings import Settings

THREAD_VARIABLES = tuple(f"{library}_NUM_THREADS" for library in
                         ("OMP", "GOTO", "OPENBLAS", "MKL", "VECLIB_MAXIMUM", "NUMEXPR"))  # Snakemake sets these for every job
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5
NO_SUCH_PAGE, LOADING = (404, 405), (429, 502, 503, 504)  # HTTP statuses
UNVERIFIED = "not verified to be this release"  # what an endpoint serves
PR_SET_PDEATHSIG = 1
TELL_TALE = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception)|error): (.+)")
CONSEQUENCES = ("Engine core initialization failed", "core proc", "WorkerProc initialization failed", "leaked")
BACKEND = re.compile(r"\b(?:Using|Selected) (?=.*(?:[Bb]ackend|[Kk]ernel\b|Experts\b|FlashAttention version)).+")
MOST_BACKENDS = 40  # lines


class Server:
    """A server that answers: where it is, what it runs, and whether it still lives."""

    def __init__(self, base_url: str, model: str, facts: dict, process: subprocess.Popen | None = None, log: Path | None = None):
        self.base_url, self.model, self.process, self.log = base_url, model, process, log
        self.facts = facts  # engine, version, hardware, backends and the command that started it, for serving.json and the card

    def check(self) -> None:
        """UserError with what the server's log says, when the process has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise UserError(f"the server stopped with status {self.process.returncode}: {reason(self.log)}; see {self.log}")


def http_options(url: str) -> dict:
    """What every client of a server gets: no proxies, the API key of $MXFORGE_API_KEY, and for https the certificates in $SSL_CERT_FILE.

    The key stands in this variable only, never in settings, which are written into results; and in no other tool's variable, whose key would go to
    whatever address a run names. UserError for a key that no header can hold, and for certificates that cannot be read.
    """
    options: dict = {"trust_env": False}
    if key := os.environ.get(KEY, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{KEY} holds characters that no HTTP header can: set it to the key alone")
        options["headers"] = {"Authorization": f"Bearer {key}"}
    path = os.environ.get("SSL_CERT_FILE")
    if path and url.startswith("https"):
        try:
            options["verify"] = ssl.create_default_context(cafile=path)
        except OSError as error:
            raise UserError(f"SSL_CERT_FILE={path} cannot be read ({error.strerror or error}): name a file of certificates in PEM form") from None
    return options


def reason(log: Path) -> str:
    """The line of a log that most likely says why: the first error that is not the consequence of another."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    for line, following in zip(lines, [*lines[1:], ""]):
        match = TELL_TALE.search(line)
        if match and not any(word in line for word in CONSEQUENCES) and "WARNING" not in line and " INFO " not in line:
            what = match.group(0)
            if "validation error" in what:  # pydantic says what is wrong on the next line only
                what = f"{what}: {following.strip()}"
            return what[:300]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it left no log")


def backends_of(log: Path) -> list[str]:
    """What a server's log says of the kernels behind its figures, each line once and without its time: vLLM names its choice for experts, attention
    and linear layers, which depends on the GPU, its version and environment variables."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace")).splitlines() if log.exists() else []
    return list(dict.fromkeys(found.group()[:200] for line in lines if (found := BACKEND.search(line))))[:MOST_BACKENDS]


def driver_version() -> str | None:
    """Version of this machine's NVIDIA driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def executable(settings: Settings) -> Path:
    """The `vllm` command that the settings mean; UserError when it is not there."""
    if settings.serving.environment:
        command = Path(settings.serving.environment) / "bin" / "vllm"
        if not command.exists():
            raise UserError(f"{command} is missing: make the serving environment with `make serve-env`, or set serving=none")
        return command.absolute()
    found = shutil.which("vllm")
    if not found:
        raise UserError("there is no `vllm` on the PATH: install vLLM, name its environment in serving.environment, or use "
                        "serving=endpoint serving.url=http://HOST:PORT")
    return Path(found)


def drafts_of(directory: Path) -> int:
    """Number of MTP layers of a checkpoint or release that can draft: declared by config.json, and there."""
    config = read_json(directory / "config.json")
    if not declared_drafts(config):
        return 0
    index = read_json(directory / INDEX) if (directory / INDEX).exists() else {}
    if isinstance(index.get("weight_map"), dict):
        return draft_layers(config, index["weight_map"])
    return draft_layers(config, [name for path in directory.glob("*.safetensors") for name in read_header(path).tensors])


def command_line(settings: Settings, release: Path, port: int, program: Path | str = "vllm") -> list[str]:
    """`vllm serve ...` for a release; draft layers are used when it has some and serving.drafts is set."""
    serving = settings.serving
    command = [str(program), "serve", str(release), "--host", "127.0.0.1", "--port", str(port),
               "--served-model-name", serving.model, *serving.flags]
    layers = drafts_of(release) if serving.drafts else 0
    if layers and not sets(serving.flags, "--speculative-config"):  # of two, vLLM would take the last
        command += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": layers})]
    return command


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _said(answer: httpx.Response) -> str:
    return f"{answer.url.path} answers with {answer.status_code}: {without_key(answer.text)[:200]}"


def _not_ready(server: Server, client: httpx.Client) -> str | None:
    """What a server says that may yet answer; None once a completion has come back. UserError for one that never will.

    An endpoint must be there when it is asked, but may still load; whether it has a health page is its own affair.
    """
    ours = server.process is not None
    try:
        health = client.get(f"{server.base_url}/health")
        if health.status_code in NO_SUCH_PAGE:
            health = client.get(f"{server.base_url}/v1/models")
        if health.status_code in LOADING or (ours and health.status_code != 200):
            return _said(health)
        answer = client.post(f"{server.base_url}/v1/completions", timeout=120.0,
                             json={"model": server.model, "prompt": [0, 1, 2], "max_tokens": 1, "temperature": 0})
    except httpx.TransportError as error:
        if ours or isinstance(error, httpx.ReadTimeout):
            return _named(error)
        raise _unreachable(server, error) from None
    except httpx.InvalidURL as error:
        raise UserError(f"serving.url, {server.base_url}: {error}; correct the address in serving.url") from None
    if answer.status_code == 200:
        return None
    if not ours and answer.status_code in LOADING:
        return _said(answer)
    server.check()
    raise _refused(server, answer)


def _named(error: httpx.TransportError) -> str:
    return f"{type(error).__name__} {error}".rstrip()


def _unreachable(server: Server, error: httpx.TransportError) -> UserError:
    """That an endpoint cannot be reached, and what to do."""
    what = _named(error)
    if "CERTIFICATE" in what:
        what += "; name the certificates that vouch for it in the environment variable SSL_CERT_FILE"
    elif isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        what = f"nothing answers there ({what}); start the server or fix the address"
    return UserError(f"serving.url, {server.base_url}: {what}")


def _refused(server: Server, answer: httpx.Response) -> UserError:
    """That a server answers a completion with an error, and what to do about a wrong key or model."""
    remedy = ""
    if answer.status_code in (401, 403):
        remedy = f"; the environment variable {KEY} " + ("holds another key than its" if os.environ.get(KEY) else "must hold its key")
    elif answer.status_code == 404 and (names := [row["id"] for row in offered(server)]):
        remedy = f"; it offers {', '.join(names[:10])}, serving.model is {server.model}"
    return UserError(f"the server at {server.base_url} is up but answers a completion with {answer.status_code}: "
                     f"{without_key(answer.text)[:200]}{remedy}" + (f"; see {server.log}" if server.log else ""))


def _wait(server: Server, seconds: float) -> None:
    deadline, told = time.monotonic() + seconds, server.process is not None
    with httpx.Client(timeout=10.0, **http_options(server.base_url)) as client:
        while said := _not_ready(server, client):
            server.check()
            if time.monotonic() > deadline:
                raise UserError(f"the server did not answer within serving.startup_seconds={seconds:g}: {said}"
                                + (f"; see {server.log}" if server.log else ""))
            if not told:
                print(f"waiting for {server.base_url}: {said}", flush=True)
                told = True
            time.sleep(POLL_SECONDS)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def stop(process: subprocess.Popen) -> None:
    """Ends the server and every process of its group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    for _ in range(20):  # what a server that died left behind gets a moment to see it
        if not _alive(process.pid):
            break
        time.sleep(0.1)
    with suppress(ProcessLookupError):  # it may end in this moment
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that a cancelled run stops its server on the way out."""
    try:
        before = signal.signal(signal.SIGTERM, _raise_exit)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_exit(*_) -> None:
    raise SystemExit(143)


def environment_of(settings: Settings) -> dict[str, str]:
    """This process's environment without thread counts and the key of an endpoint, then serving.variables.

    A job of the workflow is told to use every core. vLLM keeps a core for its polling engine process unless it is told so, too:
    then both wait for each other, and two cores give 5 tokens a second in place of 200.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in (*THREAD_VARIABLES, KEY)}
    return inherited | settings.serving.variables


def version_of(server: Server) -> str | None:
    """What the server says of its own version."""
    try:
        answer = httpx.get(f"{server.base_url}/version", timeout=10.0, **http_options(server.base_url))
        return answer.json().get("version") if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError, AttributeError):
        return None


def offered(server: Server) -> list[dict]:
    """{"id", "root", "max_model_len"} of each model that /v1/models lists, without what it does not say; empty where it lists none."""
    try:
        rows = httpx.get(f"{server.base_url}/v1/models", timeout=10.0, **http_options(server.base_url)).json()["data"]
        rows = [{key: row[key] for key in ("id", "root", "max_model_len") if row.get(key) is not None} for row in rows]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [row for row in rows if isinstance(row.get("id"), str)]


def _endpoint_facts(server: Server, settings: Settings) -> dict:
    """What can be known of a server that somebody else started: what it says of itself, and where that is at odds with the settings."""
    serving, evaluation, rows = settings.serving, settings.evaluation, offered(server)
    row = next((row for row in rows if row["id"] == server.model), None)
    differences = [] if row or not rows else [f"/v1/models lists {', '.join(row['id'] for row in rows[:10])}, not serving.model={server.model}"]
    length = (row or {}).get("max_model_len")
    needs = {"serving.prompt_tokens + serving.output_tokens": serving.prompt_tokens + serving.output_tokens}
    if evaluation.via == "vllm":
        needs["evaluation.context + 1"] = evaluation.context + 1
    if isinstance(length, int):
        differences += [f"its max_model_len is {length}, below {what} = {need}" for what, need in needs.items() if need > length]
    for difference in differences:
        print(f"note: {server.base_url}: {difference}", flush=True)
    return {"version": version_of(server), "identity": UNVERIFIED, "offers": row, "differences": differences,
            **({"hardware": [serving.hardware]} if serving.hardware else {})}


def _interpreter(program: Path) -> list[str]:
    """The command of the Python that runs a script: behind `#!`, or on the line after it, where pip writes one that is too long for that."""
    with open(program, encoding="utf-8") as file:
        first, second = file.readline(), file.readline()
    return shlex.split(second)[1:2] if first.startswith("#!/bin/sh") and second.startswith("'''exec'") else shlex.split(first.removeprefix("#!"))


def hardware(program: Path, variables: dict[str, str]) -> dict:
    """{"on_cpu", "hardware"} of a vLLM of this machine, started with these environment variables: whether its torch has no GPU, and the name of
    each that it sees, or of this CPU; empty where its environment does not say. GPUs are those of CUDA or ROCm."""
    code = "import json, torch; print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))"
    try:
        said = subprocess.run([*_interpreter(program), "-c", code], env=variables, capture_output=True, text=True, timeout=120, check=True)
        names = json.loads(said.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"on_cpu": not names, "hardware": names or [f"{platform.machine()}, {os.cpu_count()} cores"]}


@contextmanager
def server(settings: Settings, directory: Path | None = None) -> Iterator[Server]:
    """A server for a checkpoint directory (default: the run's release) that has answered a completion.

    UserError when it cannot be started, ends, answers with an error, or does not answer in time.
    """
    serving = settings.serving
    if serving.kind == "endpoint":
        found = Server(serving.url.rstrip("/").removesuffix("/v1").rstrip("/"), serving.model, {"engine": "endpoint"})
        _wait(found, serving.startup_seconds)
        found.facts |= _endpoint_facts(found, settings)
        yield found
        return
    if serving.kind != "vllm":
        raise UserError(f"serving={serving.name} starts no server; choose serving=vllm_cpu, vllm_cuda or endpoint")
    with _started(settings, Path(directory or settings.run_directory / "release")) as running:
        yield running


@contextmanager
def _started(settings: Settings, directory: Path) -> Iterator[Server]:
    """`server` by `vllm serve`, which is stopped at the end."""
    serving = settings.serving
    program, port = executable(settings), free_port()
    command = command_line(settings, directory.absolute(), port, program)
    log = settings.run_directory / "logs" / f"server-{directory.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    shown = without_api_key(command_line(settings, directory, port, "vllm"))
    print(f"starting {' '.join(shown)}", flush=True)
    variables = environment_of(settings)
    facts = {"engine": "vllm", "command": shown, **hardware(program, variables),
             "variables": without_secrets({name: value for name, value in variables.items() if name.startswith("VLLM_")})}
    if not facts.get("on_cpu") and (driver := driver_version()):
        facts["driver"] = driver
    with _terminated_as_exit(), open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=variables, start_new_session=True,
                                   preexec_fn=_die_with_parent)
        try:
            running = Server(f"http://127.0.0.1:{port}", serving.model, facts, process, log)
            start = time.monotonic()
            _wait(running, serving.startup_seconds)
            running.facts |= {"version": version_of(running), "startup_seconds": round(time.monotonic() - start, 1), "backends": backends_of(log)}
            print(f"vLLM {running.facts['version']} answers after {running.facts['startup_seconds']} s", flush=True)
            yield running
        finally:
            stop(process)
