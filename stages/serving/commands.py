"""Commands to serve a release, made from its own facts, and which of them this run really used.

Only vLLM on a CPU can be tried without a GPU; every other row is a command that follows from the release's format and the
engines' documentation, and is marked as not run.
"""

from __future__ import annotations

import json

from stages.checkpoint.files import human_bytes
from stages.schemes.architectures import architecture_of

OVERHEAD = 1.15  # memory that a server needs at least, over its weights: activations, graphs, some KV cache; an estimate


def engine_name(engine: dict) -> str:
    """What served the release, by serving.json's facts."""
    version = engine.get("version")
    return f"vLLM {version}" if engine.get("engine") == "vllm" else f"an endpoint, {f'vLLM {version}' if version else 'version unknown'}"


def serve_commands(plan: dict, config: dict, engine: dict) -> list[dict]:
    """Rows {title, command, run}: `run` says with what the command was really tried, or that it was not.

    plan: plan.json; config: the release's config.json; engine: serving.json's facts, empty when nothing was served.
    """
    drafts = plan["draft_layers"]
    needed = human_bytes(plan["release_tensor_bytes"] * OVERHEAD)
    fitting = [row["tensor_parallel"] for row in plan["tensor_parallel"] if row["fits"]]
    plain = max((row["tensor_parallel"] for row in plan["tensor_parallel"] if row["fits"] and row["marlin"]), default=1)
    speculation = [f"--speculative-config '{json.dumps({'method': 'mtp', 'num_speculative_tokens': drafts})}'"] if drafts else []
    remote = ["--trust-remote-code"] if "auto_map" in config else []
    base = ["vllm serve .", *remote]
    used = engine.get("command", [])  # none of an endpoint: how it was started is not known
    tried = f"{engine_name(engine)}{' on a CPU, with the plugin' if '--enforce-eager' in used else ''}" if used else "not run"
    rows = []
    if drafts and architecture_of(plan["architecture"]).plugin:
        rows.append({"title": "The plugin, once per environment: vLLM 0.32 needs it for the draft layers, 0.33 for config.json, too",
                     "command": "pip install ./vllm_plugin", "run": tried})
    rows.append({"title": f"vLLM, one GPU with {needed} or more (weights, and room for little else)" + (", drafting" if drafts else ""),
                 "command": " ".join([*base, *speculation]),
                 "run": tried if ("--speculative-config" in used) == bool(speculation) else "not run"})
    largest = max(fitting, default=1)
    if plain > 1:
        rows.append({"title": f"vLLM, {plain} GPUs", "command": " ".join([*base, f"--tensor-parallel-size {plain}", *speculation]), "run": "not run"})
    if largest > plain:
        rows.append({"title": f"vLLM, {largest} GPUs, experts split among them",
                     "command": " ".join([*base, f"--tensor-parallel-size {largest}", "--enable-expert-parallel", *speculation]),
                     "run": "not run"})
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
