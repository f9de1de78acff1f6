"""A closed loop of N streams over the completions API, and every token event that came back, with its time.

Each stream sends a completion of a fixed length (`ignore_eos`), and the next one at once when it has ended, so that N are
always running. Prompts are random token ids, or such a beginning and a piece of a text: they differ from the first tokens on, so that
no prefix cache can answer for them. Which tokens follow, and so how often drafts are accepted, depends on what they hold.

A token is counted when the chunk that carries it arrives, by the server's own cumulative usage counter in that chunk
(`continuous_usage_stats`). Chunks are not tokens: with draft layers one chunk holds several.

Raw events are tuples (kind, seconds since start, stream, request, number):
    send      the request left                      number: its prompt tokens
    tokens    a chunk arrived                       number: completion tokens of this request so far
    end       the request is complete               number: its completion tokens
    sample    the server's gauges                   stream: requests running, request: waiting, number: generated tokens
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from stages.errors import UserError
from stages.serving.launcher import http_options
from stages.serving.secrets import without_key
from stages.tokenizer import TOKENIZER, read_tokenizer

LINE_END = re.compile(rb"\r\n|\n|\r")
SAMPLE = re.compile(r"^(vllm:[a-z_]+?)(?:_total)?(?:\{([^}]*)\})? ([0-9.eE+-]+)$", re.M)
POSITION = re.compile(r'position="(\d+)"')
COUNTERS = ("generation_tokens", "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
HEAD_TOKENS = 2  # first ids of a prompt, which no other one begins with
SPECIAL_TOKENS = 16  # lowest token ids, which prompts leave out where no tokenizer.json says which are special


@dataclass
class Events:
    """What happened, in the order in which it did, and the edges of the windows."""

    rows: list[tuple] = field(default_factory=list)
    scrapes: list[dict] = field(default_factory=list)  # server counters at window edges
    windows: list[tuple[float, float]] = field(default_factory=list)


def parse_metrics(text: str) -> dict:
    """vLLM's /metrics: counters and gauges summed over engines, and accepted tokens by draft position."""
    values: dict = {}
    positions: dict[int, float] = {}
    for name, labels, number in SAMPLE.findall(text):
        name = name.removeprefix("vllm:")
        if name == "spec_decode_num_accepted_tokens_per_pos":
            place = int(POSITION.search(labels).group(1))
            positions[place] = positions.get(place, 0.0) + float(number)
        elif name in COUNTERS or name in ("num_requests_running", "num_requests_waiting"):
            values[name] = values.get(name, 0.0) + float(number)
    values["accepted_per_position"] = [positions[place] for place in sorted(positions)]
    return values


def _higher_ids(vocabulary: int) -> range:
    return range(min(SPECIAL_TOKENS, vocabulary - 1), vocabulary)


def pieces(text: Sequence[int], prompt_tokens: int) -> list[Sequence[int]]:
    """What of a text stands in one prompt each, behind HEAD_TOKENS random ids: parts that do not overlap."""
    length = prompt_tokens - HEAD_TOKENS
    return [text[begin:begin + length] for begin in range(0, len(text) - length + 1, length)] if length > 0 else []


def text_ids(directory: Path, vocabulary: int) -> Sequence[int]:
    """Token ids that stand for text, to draw random prompts from: those of tokenizer.json below `vocabulary` that are no added tokens. Added ones,
    often at the end, are special: they would end a text, call for an image that is not there, or be read by nobody.

    Without a tokenizer.json: all of the vocabulary but its lowest ids. UserError for a tokenizer.json that cannot be read.
    """
    tokenizer, found = read_tokenizer(directory), []
    if tokenizer is not None:
        found = sorted({number for number in tokenizer.get_vocab(with_added_tokens=False).values() if number < vocabulary}
                       - tokenizer.get_added_tokens_decoder().keys())
    return found or _higher_ids(vocabulary)


def tokens_of_text(path: Path, directory: Path, known: Sequence[int]) -> list[int]:
    """Token ids of a UTF-8 text by the checkpoint's tokenizer.json, without those that are not `known`, special ones in the first place."""
    tokenizer = read_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"{directory / TOKENIZER} is missing, by which serving.prompts={path} becomes tokens: leave serving.prompts out")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"serving.prompts={path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    kept = set(known)
    return [number for number in tokenizer.encode(text, add_special_tokens=False).ids if number in kept]


async def lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Lines of an event stream. They end at CR LF, LF or CR only: httpx's own end at U+0085, U+2028 and U+2029, too, which generated text holds.

    A CR LF that two pieces share gives an empty line more, which means nothing here.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = LINE_END.split(rest + piece)
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def completion_tokens(data: str, where: str) -> int:
    """Completion tokens so far by the usage counter in one event's data. UserError for an error that the server reports, in its form of today or as
    older vLLM did ({"object": "error", "message": ...}), and for what is no event with a counter."""
    damaged = UserError(f"{where} sends a damaged event: {data[:80]!r}")
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(chunk, dict):
        raise damaged
    error = chunk.get("error")
    if error is None and chunk.get("object") == "error":
        error = chunk
    if error is not None:
        said = error.get("message") if isinstance(error, dict) else error
        raise UserError(f"{where} reports an error in the stream: {without_key(str(said or error))[:200]}")
    usage = {} if chunk.get("usage") is None else chunk["usage"]
    if not isinstance(usage, dict):
        raise damaged
    count = usage.get("completion_tokens")
    if count is None:
        raise UserError(f"{where} streams without usage counters; tokens cannot be counted by chunks (a chunk holds several under speculation): "
                        "use a server with stream_options.continuous_usage_stats")
    if type(count) is not int:
        raise damaged
    return count


class ClosedLoop:
    """One concurrency level against one server.

    vocabulary: the token ids that prompts are drawn from, or the number of all that there are. text: token ids whose `pieces` stand in the prompts,
    one after the other in random order, and then again.
    """

    def __init__(self, server, *, streams: int, output_tokens: int, prompt_tokens: int, vocabulary: int | Sequence[int], seed: int,
                 timeout_seconds: float, text: Sequence[int] = ()):
        self.server, self.streams, self.output_tokens = server, streams, output_tokens
        self.vocabulary = _higher_ids(vocabulary) if isinstance(vocabulary, int) else vocabulary
        self.timeout = timeout_seconds
        self.events = Events()
        self._random, self._heads = random.Random(seed), set()
        found = pieces(text, prompt_tokens)
        self._random.shuffle(found)
        self._drawn, self._bodies = (HEAD_TOKENS, itertools.cycle(found)) if found else (prompt_tokens, itertools.repeat(()))
        self._start = time.perf_counter()
        self._requests = 0
        self._active: set[int] = set()

    def now(self) -> float:
        """Seconds since the loop was made."""
        return time.perf_counter() - self._start

    def prompt(self) -> list[int]:
        """Random token ids, and a piece of the text if there is one; the first two tokens never occur again while there are pairs left."""
        for _ in range(1000):
            ids = self._random.choices(self.vocabulary, k=self._drawn)
            if tuple(ids[:HEAD_TOKENS]) not in self._heads:
                break
        self._heads.add(tuple(ids[:HEAD_TOKENS]))
        return [*ids, *next(self._bodies)]

    async def _request(self, client: httpx.AsyncClient, stream: int) -> None:
        self._requests += 1
        request, ids = self._requests, self.prompt()
        body = {"model": self.server.model, "prompt": ids, "max_tokens": self.output_tokens, "ignore_eos": True,
                "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        where = f"{self.server.base_url}/v1/completions"
        self.events.rows.append(("send", self.now(), stream, request, len(ids)))
        seen, finished = 0, False
        async with client.stream("POST", where, json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                raise UserError(f"{where} answers with {answer.status_code}: {without_key(text)[:200]}")
            async for line in lines_of(answer.aiter_bytes()):
                arrived = self.now()
                if not line.startswith("data:"):
                    if line.strip() and not line.startswith((":", "event:", "id:", "retry:")):
                        raise UserError(f"{where} sends {line[:80]!r}, which is no event of a stream")
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    finished = True
                    break
                count = completion_tokens(data, where)
                if count < seen:
                    raise UserError(f"{where} counts backwards, from {seen} to {count} completion tokens")
                if count > seen:
                    self.events.rows.append(("tokens", arrived, stream, request, count))
                    seen = count
                    self._active.add(stream)
        if not finished or seen != self.output_tokens:
            self.server.check()
            raise UserError(f"{where} ended a stream after {seen} of {self.output_tokens} tokens"
                            + ("" if finished else ", without its end mark"))
        self.events.rows.append(("end", self.now(), stream, request, seen))

    async def _stream(self, client: httpx.AsyncClient, stream: int) -> None:
        while True:
            await self._request(client, stream)

    async def scrape(self, client: httpx.AsyncClient) -> dict | None:
        """The server's counters now, with the time halfway through the request; None where it has no vLLM metrics."""
        before = self.now()
        answer = await client.get(f"{self.server.base_url}/metrics")
        after = self.now()
        found = parse_metrics(answer.text) if answer.status_code == 200 else {}
        if "generation_tokens" not in found:
            return None
        self.events.rows.append(("sample", (before + after) / 2, int(found.get("num_requests_running", -1)),
                                 int(found.get("num_requests_waiting", -1)), int(found["generation_tokens"])))
        return found | {"seconds": (before + after) / 2, "took": after - before}

    async def _measure(self, client: httpx.AsyncClient, windows: int, window_seconds: float, ramp_seconds: float, tick) -> None:
        while len(self._active) < self.streams:
            if self.now() > self.timeout:
                raise UserError(f"{self.server.base_url}: only {len(self._active)} of {self.streams} streams had a token after "
                                f"{self.timeout:g} s, while {self.streams} streams were running; the server hangs, or needs lower "
                                "serving.concurrencies or more serving.timeout_seconds")
            await asyncio.sleep(0.05)
        steady = self.now() + ramp_seconds
        while self.now() < steady:
            await asyncio.sleep(min(0.25, max(0.0, steady - self.now())))
            tick("ramp")
        for window in range(windows):
            edge = await self.scrape(client)
            begin = edge["seconds"] if edge else self.now()
            self.events.scrapes.append(edge or {})
            while self.now() < begin + window_seconds:
                await asyncio.sleep(min(0.5, max(0.0, begin + window_seconds - self.now())))
                edge = await self.scrape(client)
                tick(f"window {window + 1}")
            self.events.scrapes.append(edge or {})
            self.events.windows.append((begin, edge["seconds"] if edge else self.now()))

    async def run(self, windows: int, window_seconds: float, ramp_seconds: float, tick=lambda what: None) -> Events:
        """Runs the loop until the last window has closed, then drops the streams. UserError for anything irregular; what
        was recorded until then stays in `events`."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=httpx.Timeout(self.timeout, connect=30.0), limits=limits,
                                     **http_options(self.server.base_url)) as client:
            streams = [asyncio.create_task(self._stream(client, stream)) for stream in range(self.streams)]
            measuring = asyncio.create_task(self._measure(client, windows, window_seconds, ramp_seconds, tick))
            try:
                done, _ = await asyncio.wait([measuring, *streams], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except httpx.HTTPError as error:
                self.server.check()
                raise UserError(f"{self.server.base_url}: {type(error).__name__} {error}".rstrip()
                                + f" while {self.streams} streams were running; the server hangs or was stopped") from None
            finally:
                for task in (measuring, *streams):
                    task.cancel()
                await asyncio.gather(measuring, *streams, return_exceptions=True)
        return self.events
