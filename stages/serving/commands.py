"""Commands to serve a release, made from its own facts, and which of them this run really used.

Only vLLM on a CPU can be tried without a GPU; every other row is a command that follows from the release's format and the
engines' documentation, and is marked as not run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from stages.checkpoint.files import human_bytes
from stages.records import Plan
from stages.schemes.architectures import architecture_of

DRAFT_FAULTS = ("Where the server's own counters of drafts contradict each other, its share of accepted drafts and tokens per step cannot be trusted; "
                "tokens per second and latencies are counted without them.")
OVERHEAD = 1.15  # memory that a server needs at least, over its weights: activations, graphs, some KV cache; an estimate


def served_by(engine: dict) -> str:
    """The server and what it ran on: a rate without that means nothing."""
    names = engine.get("hardware") or ["hardware not known"]
    where, ranks = names[0], Used(engine).gpus
    if engine.get("on_cpu") is False:  # the GPUs that the server could see, of which it may have used a part
        alike = len(set(names)) == 1 and ranks is not None and ranks <= len(names)
        where = f"{ranks} x {names[0]}" if alike else "on " + ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{engine_name(engine)}, {where}" + (f", {engine['identity']}" if engine.get("identity") else "")


def engine_name(engine: dict) -> str:
    """What served the release, by serving.json's facts."""
    version = engine.get("version")
    return f"vLLM {version}" if engine.get("engine") == "vllm" else f"an endpoint, {f'vLLM {version}' if version else 'version unknown'}"


def generated(serving: dict) -> str:
    """What the benchmark made the model write, by serving.json: acceptance of drafts depends on it more than on anything else."""
    return f"greedy, {'text' if _text(serving) else 'random'} prompts, ignore_eos"


def _text(serving: dict) -> dict | None:
    """The text whose pieces stood in the prompts, {"content": its name, "sha256"}; None for random token ids."""
    prompts = serving.get("prompts") or {}
    return prompts if "sha256" in prompts else None


def conditions(serving: dict) -> str:
    """How serving.json's figures were measured, in sentences: all that somebody needs to measure them again, but for the server's command."""
    asked, engine, text = serving["settings"], serving["engine"], _text(serving)
    several = asked["windows"] > 1
    limits = ", ".join(f"{name} at most {limit:g} ms" for name, limit in asked["goodput_ms"].items())
    sentences = [
        "Closed loop: each stream sends its next request when one has ended",
        f"Completions of {asked['output_tokens']} tokens (greedy, ignore_eos) to prompts of {asked['prompt_tokens']} "
        + (f"tokens, random ones and behind them pieces of {text['content']} (sha256 {text['sha256'][:12]})" if text else "random token ids"),
        f"{asked['windows']} window{'s' if several else ''} of {asked['window_seconds']:g} s after a ramp of {asked['ramp_seconds']:g} s",
        *(["± is half the width of a 95 % confidence interval of the mean over the windows"] if several else []),
        *([f"Goodput: requests per second with {limits}"] if limits else []),
        *([f"NVIDIA driver {engine['driver']}"] if engine.get("driver") else []),
        *(["Environment: " + ", ".join(f"{name}={value}" for name, value in engine["variables"].items())] if engine.get("variables") else []),
        *(["Each stream's first request is in no latency"] if any(level.get("first_requests_left_out") for level in serving["levels"]) else []),
    ]
    return ". ".join(sentences) + "."


def count_range(level: dict) -> str:
    """Lowest and highest ratio of the client's token count to the server's over a level's windows; `?` where the server did not count."""
    found = [window["client_over_server"] for window in level["windows"] if window.get("client_over_server") is not None]
    if not found:
        return "?"
    low, high = f"{min(found):.3f}", f"{max(found):.3f}"
    return low if low == high else f"{low} to {high}"


def has_draft_faults(serving: dict) -> bool:
    """Whether the server's draft counters contradict each other in any window."""
    return any(window.get("drafting", {}).get("faults") for level in serving.get("levels", []) for window in level["windows"])


def _with_dashes(word: str) -> str:
    """A flag as vLLM reads it: `--tensor_parallel_size`, too."""
    flag, equals, value = word.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size", "-ep": "--enable-expert-parallel",
         "-q": "--quantization", "-sc": "--speculative-config"}
# flags that decide whether a release fits, and how it is computed -> the value that leaving them out means, where that is fixed
DECISIVE = {"--max-model-len": None, "--max-num-seqs": None, "--gpu-memory-utilization": None, "--quantization": None, "--dtype": "auto",
            "--kv-cache-dtype": "auto", "--tensor-parallel-size": "1", "--pipeline-parallel-size": "1", "--data-parallel-size": "1",
            "--enable-expert-parallel": None, "--speculative-config": None}
ADDRESS = ("--host", "--port", "--api-key")  # flags of this run alone
SWITCHES = ("--enable-expert-parallel",)


def sets(flags: Iterable[str], name: str) -> bool:
    """Whether one of vLLM's flags is the one of this name, or a part of it (`--speculative-config.method`)."""
    words = (_with_dashes(word).partition("=")[0].partition(".")[0] for word in flags)
    return any(SHORT.get(word, word) == name for word in words)


def _decisive(command: list[str]) -> dict[str, object]:
    """DECISIVE flag -> value in a command, those left out that have the value that they have anyway; the last of the same flag counts."""
    found: dict[str, object] = {}
    for word, following in zip(command, [*command[1:], ""]):
        flag, equals, value = _with_dashes(word).partition("=")
        flag = SHORT.get(flag, flag)
        if flag.partition(".")[0] in DECISIVE:  # `--speculative-config.method`, too
            found[flag] = _parsed("yes" if flag in SWITCHES else value if equals else following)
    return {flag: value for flag, value in found.items() if value != DECISIVE.get(flag)}


def _parsed(value: str) -> object:
    """JSON as what it says, whatever its spaces; other values as they are."""
    try:
        return json.loads(value) if value.startswith("{") else value
    except ValueError:
        return value


class Used:
    """How this run's server was started, by serving.json's facts; of an endpoint that is not known, and nothing counts as tried."""

    def __init__(self, engine: dict):
        where = {True: " on a CPU, with the plugin", False: ""}.get(engine.get("on_cpu"), " on hardware that is not known")
        self._command = engine.get("command", [])
        self.how = engine_name(engine) + where if self._command else "not run"
        self._flags = _decisive(self._command)

    @property
    def gpus(self) -> int | None:
        """Ranks of tensor parallelism; None where the model was split in other ways, too."""
        size = str(self._flags.get("--tensor-parallel-size", "1"))
        others = ("--pipeline-parallel-size", "--data-parallel-size")
        return int(size) if size.isdigit() and not any(flag in self._flags for flag in others) else None

    def is_like(self, command: list[str]) -> bool:
        """Whether it ran so, by the flags in DECISIVE."""
        return bool(self._command) and self._flags == _decisive(command)

    @property
    def command(self) -> str | None:
        """What was run, for a shell, as it would be in the release's own directory; without the address and keys, which were this run's own."""
        words, left_out = [], False
        for place, word in enumerate(self._command):
            if word.startswith("-"):
                left_out = _with_dashes(word).partition("=")[0] in ADDRESS
            if not left_out:
                words.append("." if place == 2 else word)  # vllm serve DIRECTORY ...
        return shlex.join(words) if words else None


def serve_commands(plan: Plan, config: dict, engine: dict) -> list[dict]:
    """Rows {title, command, run}: `run` says with what the command was really tried, or that it was not.

    plan: plan.json; config: the release's config.json; engine: serving.json's facts, empty when nothing was served.
    """
    drafts, parallel = plan["draft_layers"], {row["tensor_parallel"]: row for row in plan["tensor_parallel"]}
    needed = human_bytes(plan["release_tensor_bytes"] * OVERHEAD)
    largest = max((size for size, row in parallel.items() if row["fits"]), default=1)
    plain = max((size for size, row in parallel.items() if row["fits"] and row["marlin"]), default=1)
    speculation = ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})]
    used = Used(engine)
    rows = []
    if drafts and architecture_of(plan["architecture"]).plugin:
        rows.append({"title": "The plugin, once per environment: vLLM 0.32 needs it for the draft layers, 0.33 for config.json, too",
                     "command": "pip install ./vllm_plugin", "run": used.how})

    def row(title: str, gpus: int, by_experts: bool = False) -> dict:
        drafting = bool(drafts) and parallel.get(gpus, {}).get("drafts") is None
        command = ["vllm", "serve", ".", *(["--trust-remote-code"] if "auto_map" in config else []),
                   *(["--tensor-parallel-size", str(gpus)] if gpus > 1 else []), *(["--enable-expert-parallel"] if by_experts else []),
                   *(speculation if drafting else [])]
        return {"title": title + (", drafting" if drafting else ", without drafting, whose layers cannot be split so" if drafts else ""),
                "command": shlex.join(command), "run": used.how if used.is_like(command) else "not run"}

    first = len(rows)
    rows.append(row(f"vLLM, one GPU with {needed} or more (weights, and room for little else)", 1))
    if plain > 1:
        rows.append(row(f"vLLM, {plain} GPUs", plain))
    if largest > plain:
        rows.append(row(f"vLLM, {largest} GPUs, experts split among them", largest, by_experts=True))
    if used.command and used.command not in [made["command"] for made in rows]:
        rows.insert(first, {"title": "vLLM as this run started it", "command": used.command, "run": used.how})
    found = next(row for row in plan["engines"] if row["engine"] == "transformers")
    if found["loads"] == "yes":  # no command for what is not known to load
        rows.append({"title": "transformers", "run": "; ".join(found["how"]), "command": 'AutoModelForCausalLM.from_pretrained(".", dtype="bfloat16")'})
    return rows


CLIENT = '''from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
question = [{"type": "text", "text": "What is the tallest mountain on Earth?"}]
{IMAGE}answer = client.chat.completions.create(model=client.models.list().data[0].id, max_tokens={TOKENS},
                                        messages=[{"role": "user", "content": question}])
print(answer.choices[0].message.content)
'''
IMAGE = '''# with an image:
# question = [{"type": "image_url", "image_url": {"url": "https://example.com/picture.png"}},
#             {"type": "text", "text": "What is in the picture?"}]
'''


PARSERS = {"Step3p7ForConditionalGeneration": "step3p5", "Step3p5ForCausalLM": "step3p5"}  # vLLM 0.32's name for both, by config.json's architecture


def thinks(release: Path) -> bool:
    """Whether a release's chat template has the model write its thoughts before it answers."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for name in ("chat_template.jinja", "tokenizer_config.json")
             if (path := release / name).exists()]
    return any("<think>" in text for text in texts)


def chat_flags(plan: Plan, thoughts: bool) -> str | None:
    """Flags of `vllm serve` that take a model's thoughts and calls of tools out of its answers; None where they are not known."""
    parser = PARSERS.get(plan["architecture"]) if thoughts else None
    return parser and f"--reasoning-parser {parser} --enable-auto-tool-choice --tool-call-parser {parser}"


def client_example(config: dict, thoughts: bool = False) -> str:
    """A chat, and for vision-language models an image, with the OpenAI client; a model that thinks first gets tokens to do so."""
    return CLIENT.replace("{IMAGE}", IMAGE if "vision_config" in config else "").replace("{TOKENS}", "4096" if thoughts else "200")
