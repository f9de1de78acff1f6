"""Commands to serve a release, made from its own facts, and which of them this run really used.

Only vLLM on a CPU can be tried without a GPU; every other row is a command that follows from the release's format and the
engines' documentation, and is marked as not run.
"""

from __future__ import annotations

import json

from stages.checkpoint.files import human_bytes
from stages.records import Plan
from stages.schemes.architectures import architecture_of

OVERHEAD = 1.15  # memory that a server needs at least, over its weights: activations, graphs, some KV cache; an estimate


def served_by(engine: dict) -> str:
    """The server and what it ran on: a rate without that means nothing."""
    names = engine.get("hardware") or ["hardware not known"]
    where, ranks = names[0], Used(engine).gpus
    if engine.get("on_cpu") is False:  # the GPUs that the server could see, of which it may have used a part
        alike = len(set(names)) == 1 and ranks is not None and ranks <= len(names)
        where = f"{ranks} x {names[0]}" if alike else "on " + ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{engine_name(engine)}, {where}"


def engine_name(engine: dict) -> str:
    """What served the release, by serving.json's facts."""
    version = engine.get("version")
    return f"vLLM {version}" if engine.get("engine") == "vllm" else f"an endpoint, {f'vLLM {version}' if version else 'version unknown'}"


def _with_dashes(word: str) -> str:
    """A flag as vLLM reads it: `--tensor_parallel_size`, too."""
    flag, equals, value = word.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


class Used:
    """How this run's server was started, by serving.json's facts; of an endpoint that is not known, and nothing counts as tried."""

    def __init__(self, engine: dict):
        where = {True: " on a CPU, with the plugin", False: ""}.get(engine.get("on_cpu"), " on hardware that is not known")
        self._command = [_with_dashes(word) for word in engine.get("command", [])]
        self.how = engine_name(engine) + where if self._command else "not run"

    def _has(self, *names: str) -> bool:
        return any(word.partition("=")[0] in names for word in self._command)

    def _value(self, *names: str) -> str | None:
        """What follows a flag, or stands behind its `=`; the last counts."""
        found = None
        for word, following in zip(self._command, [*self._command[1:], ""]):
            flag, equals, value = word.partition("=")
            if flag in names:
                found = value if equals else following
        return found

    @property
    def gpus(self) -> int | None:
        """Ranks of tensor parallelism; None where the model was split in other ways, too."""
        size = self._value("--tensor-parallel-size", "-tp") or "1"
        others = ("--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp")
        return int(size) if size.isdigit() and not self._has(*others) else None

    def is_like(self, gpus: int, by_experts: bool, drafting: bool) -> bool:
        """Whether it ran so."""
        return (gpus, by_experts, drafting) == (self.gpus, self._has("--enable-expert-parallel", "-ep"), self._has("--speculative-config"))


def serve_commands(plan: Plan, config: dict, engine: dict) -> list[dict]:
    """Rows {title, command, run}: `run` says with what the command was really tried, or that it was not.

    plan: plan.json; config: the release's config.json; engine: serving.json's facts, empty when nothing was served.
    """
    drafts, parallel = plan["draft_layers"], {row["tensor_parallel"]: row for row in plan["tensor_parallel"]}
    needed = human_bytes(plan["release_tensor_bytes"] * OVERHEAD)
    largest = max((size for size, row in parallel.items() if row["fits"]), default=1)
    plain = max((size for size, row in parallel.items() if row["fits"] and row["marlin"]), default=1)
    speculation = f"--speculative-config '{json.dumps({'method': 'mtp', 'num_speculative_tokens': drafts})}'"
    used = Used(engine)
    rows = []
    if drafts and architecture_of(plan["architecture"]).plugin:
        rows.append({"title": "The plugin, once per environment: vLLM 0.32 needs it for the draft layers, 0.33 for config.json, too",
                     "command": "pip install ./vllm_plugin", "run": used.how})

    def row(title: str, gpus: int, by_experts: bool = False) -> dict:
        drafting = bool(drafts) and parallel.get(gpus, {}).get("drafts") is None
        flags = [*(["--trust-remote-code"] if "auto_map" in config else []), *([f"--tensor-parallel-size {gpus}"] if gpus > 1 else []),
                 *(["--enable-expert-parallel"] if by_experts else []), *([speculation] if drafting else [])]
        return {"title": title + (", drafting" if drafting else ", without drafting, whose layers cannot be split so" if drafts else ""),
                "command": " ".join(["vllm serve .", *flags]), "run": used.how if used.is_like(gpus, by_experts, drafting) else "not run"}

    rows.append(row(f"vLLM, one GPU with {needed} or more (weights, and room for little else)", 1))
    if plain > 1:
        rows.append(row(f"vLLM, {plain} GPUs", plain))
    if largest > plain:
        rows.append(row(f"vLLM, {largest} GPUs, experts split among them", largest, by_experts=True))
    found = next(row for row in plan["engines"] if row["engine"] == "transformers")
    if found["loads"] == "yes":  # no command for what is not known to load
        rows.append({"title": "transformers", "run": "; ".join(found["how"]), "command": 'AutoModelForCausalLM.from_pretrained(".", dtype="bfloat16")'})
    return rows


CLIENT = '''from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
question = [{"type": "text", "text": "What is the tallest mountain on Earth?"}]
{IMAGE}answer = client.chat.completions.create(model=client.models.list().data[0].id, max_tokens=200,
                                        messages=[{"role": "user", "content": question}])
print(answer.choices[0].message.content)
'''
IMAGE = '''# with an image:
# question = [{"type": "image_url", "image_url": {"url": "https://example.com/picture.png"}},
#             {"type": "text", "text": "What is in the picture?"}]
'''


def client_example(config: dict) -> str:
    """A chat, and for vision-language models an image, with the OpenAI client."""
    return CLIENT.replace("{IMAGE}", IMAGE if "vision_config" in config else "")
