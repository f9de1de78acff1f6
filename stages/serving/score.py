"""Perplexity through a server: what a released model is worth on the engine that serves it, however large it is.

Windows of token ids go to /v1/completions with `prompt_logprobs`; the log-probability of each scored token is that of the
token itself, looked up by its id (the first entry of the answer's dictionary is the *likeliest* token, another thing). The
windows and the tokens are those of the in-process evaluation, so both can be compared token by token.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import torch

from stages.errors import UserError
from stages.serving.launcher import Server

PARALLEL = 8  # windows in flight
TIMEOUT_SECONDS = 600.0


def _scored(entries: list, tokens: list[int], first: int, where: str) -> list[float]:
    """Log-probabilities of tokens[first:] from `prompt_logprobs`, one dictionary per token, id (a string) -> entry."""
    if not isinstance(entries, list) or len(entries) != len(tokens):
        raise UserError(f"{where} gave {len(entries) if isinstance(entries, list) else 'no'} prompt_logprobs for "
                        f"{len(tokens)} tokens; evaluation.via=vllm needs a vLLM server")
    values = []
    for token, entry in zip(tokens[first:], entries[first:]):
        try:
            values.append(float(entry[str(token)]["logprob"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: no log-probability of the realized token {token} in {str(entry)[:80]}") from None
    return values


def token_log_probabilities(server: Server, tokens: torch.Tensor, windows: list[tuple[int, int, int]]) -> torch.Tensor:
    """float64 [number of scored tokens]: natural log-probability of each, given the window's tokens before it.

    tokens: ids [n]. windows: (begin, end, first scored token). UserError when the server refuses or answers otherwise.
    """
    ids = tokens.tolist()

    def one(client: httpx.Client, window: tuple[int, int, int]) -> list[float]:
        begin, end, scored = window
        body = {"model": server.model, "prompt": ids[begin:end], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        where = f"{server.base_url}/v1/completions"
        try:
            answer = client.post(where, json=body)
            if answer.status_code != 200:
                raise UserError(f"{where} answers a prompt of {end - begin} tokens with {answer.status_code}: "
                                f"{answer.text[:200]}")
            return _scored(answer.json()["choices"][0].get("prompt_logprobs"), ids[begin:end], scored - begin, where)
        except httpx.HTTPError as error:
            server.check()
            raise UserError(f"{where}: {type(error).__name__} {error}; see the server's log") from None
        except (ValueError, KeyError, IndexError, AttributeError):
            raise UserError(f"{where} gave no answer in the form of vLLM's completions; name a vLLM server") from None

    with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as client, ThreadPoolExecutor(PARALLEL) as pool:
        parts = list(pool.map(lambda window: one(client, window), windows))
    return torch.tensor([value for part in parts for value in part], dtype=torch.float64)


def scored_tokens(server: Server, tokens: torch.Tensor, windows: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities float64, most likely token ids int64), [number of scored tokens] each; as token_log_probabilities."""
    ids, where = tokens.tolist(), f"{server.base_url}/v1/completions"

    def one(client: httpx.Client, window: tuple[int, int, int]) -> list[tuple[float, int]]:
        begin, end, scored = window
        body = {"model": server.model, "prompt": ids[begin:end], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        entries = client.post(where, json=body).raise_for_status().json()["choices"][0]["prompt_logprobs"]
        values = _scored(entries, ids[begin:end], scored - begin, where)
        return [(value, int(max(entry, key=lambda token: entry[token]["logprob"]))) for value, entry in zip(values, entries[scored - begin:])]

    with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as client, ThreadPoolExecutor(PARALLEL) as pool:
        rows = [row for part in pool.map(lambda window: one(client, window), windows) for row in part]
    return torch.tensor([row[0] for row in rows], dtype=torch.float64), torch.tensor([row[1] for row in rows], dtype=torch.int64)
