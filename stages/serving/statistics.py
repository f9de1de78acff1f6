"""Every figure of the serving benchmark, computed from its raw events (see load.py) and nothing else.

    throughput      completion tokens that arrived in [begin, end) of a window / its seconds
    TTFT            first chunk with a token - sending
    ITL             time between two chunks of a request; under speculation a chunk holds several tokens, so that ITL is the
                    time between bursts
    TPOT            (last token - first chunk) / (tokens after the first chunk): time per token, also under speculation
    end to end      last token - sending

Latencies, and goodput under limits of them, are those of requests that ended inside a window, but for each stream's first request:
all of these were sent together, so that their times are those of the benchmark's start and not of a server at work. Their tokens
count like all others. Goodput is requests within the limits per second; it leaves out the first ones, so that short windows read low.

The server's own counter over the same window must agree with the count here. The two cannot be equal: chunks are on their way
when a window's edge is read, at most one chunk of each stream on either side, and the scrape itself takes time in which tokens are
made; `edge_tokens` bounds both.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy

from stages.serving.load import Events

PERCENTILES = (50, 90, 95, 99)
FEWEST = {99: 100}  # values that a percentile is given from: of fewer, the 99th would be little but the largest
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 1 to 10 degrees of freedom


def save(path: Path, events: Events, facts: dict) -> None:
    """Writes the events as gzipped JSON lines: one of facts, then windows, scrapes, and a line per event."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"facts": facts, "windows": events.windows, "scrapes": events.scrapes}) + "\n")
        for row in events.rows:
            file.write(json.dumps(row) + "\n")


def recompute(path: Path) -> dict:
    """The figures of a saved run."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        head = json.loads(next(file))
        rows = [tuple(json.loads(line)) for line in file]
    events = Events(rows, head["scrapes"], [tuple(window) for window in head["windows"]])
    return figures(events, **head["facts"])


def summary(values: list[float]) -> dict | None:
    """Count, mean and percentiles in milliseconds of values in seconds; None without values, and for the 99th percentile of fewer than 100."""
    if not values:
        return None
    return {"count": len(values), "mean_ms": 1000 * statistics.fmean(values),
            **{f"p{percent}_ms": 1000 * float(numpy.percentile(values, percent)) if len(values) >= FEWEST.get(percent, 1) else None for percent in PERCENTILES}}


def mean_and_interval(values: list[float]) -> dict:
    """Mean over windows and half the width of its 95 % confidence interval (None for a single window)."""
    half = None
    if len(values) > 1:
        t = T_975[min(len(values) - 1, len(T_975)) - 1]
        half = t * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half_interval_95": half, "windows": len(values)}


def drafting(before: dict, after: dict) -> dict | None:
    """Acceptance over a window from the server's counters; None where nothing was drafted. `faults` must be empty."""
    def change(name):
        return after.get(name, 0.0) - before.get(name, 0.0)

    drafts = change("spec_decode_num_drafts")
    if drafts <= 0:
        return None
    drafted, accepted = change("spec_decode_num_draft_tokens"), change("spec_decode_num_accepted_tokens")
    positions = [b - a for a, b in zip(before["accepted_per_position"], after["accepted_per_position"])]
    faults = []
    if abs(sum(positions) - accepted) > 0.5:
        faults.append(f"accepted tokens by position sum to {sum(positions):g}, the counter says {accepted:g}")
    if any(later > earlier for earlier, later in zip(positions, positions[1:])):
        faults.append(f"a later position accepts more than an earlier one: {positions}")
    if drafted > len(positions) * drafts:
        faults.append(f"{drafted:g} tokens drafted in {drafts:g} drafts of {len(positions)}")
    return {"drafts": drafts, "draft_tokens": drafted, "accepted_tokens": accepted, "acceptance_rate": accepted / drafted,
            "mean_acceptance_length": 1 + accepted / drafts, "acceptance_by_position": [p / drafts for p in positions],
            "faults": faults}


class Timeline:
    """A run's events, by what they are. Times are seconds since its start."""

    def __init__(self, events: Events):
        self.sent: dict[int, float] = {}  # request -> time
        self.ended: dict[int, float] = {}
        self.chunks: dict[int, list[tuple[float, int]]] = defaultdict(list)  # request -> (time, its tokens so far) of each chunk
        self.samples: list[tuple[float, int, int]] = []  # (time, requests running, requests waiting)
        first_of: dict[int, int] = {}
        for kind, seconds, stream, request, number in events.rows:
            if kind == "send":
                self.sent[request] = seconds
                first_of.setdefault(stream, request)
            elif kind == "tokens":
                self.chunks[request].append((seconds, number))
            elif kind == "end":
                self.ended[request] = seconds
            elif kind == "sample":
                self.samples.append((seconds, stream, request))
        self.firsts = set(first_of.values())  # each stream's first request
        self.arrivals = sorted((seconds, count - before) for rows in self.chunks.values()
                               for (seconds, count), before in zip(rows, [0, *(count for _, count in rows)]))  # (time, tokens) of each chunk

    def tokens(self, begin: float, end: float) -> int:
        """Completion tokens that arrived in [begin, end)."""
        return sum(tokens for seconds, tokens in self.arrivals if begin <= seconds < end)

    def ended_in(self, begin: float, end: float) -> list[int]:
        """Requests that ended in [begin, end)."""
        return [request for request, seconds in self.ended.items() if begin <= seconds < end]

    def latencies(self, request: int) -> dict[str, float]:
        """TTFT, end to end and, where tokens came after the first chunk, TPOT of a request, in seconds."""
        sent, (first, first_tokens), (last, tokens) = self.sent[request], self.chunks[request][0], self.chunks[request][-1]
        found = {"ttft": first - sent, "end_to_end": last - sent}
        return found | ({"tpot": (last - first) / (tokens - first_tokens)} if tokens > first_tokens else {})

    def inter_token_latencies(self, request: int) -> list[float]:
        """ITL between each two chunks of a request, in seconds."""
        return [later - earlier for (earlier, _), (later, _) in pairwise(self.chunks[request])]


def _window(timeline: Timeline, begin: float, end: float) -> dict:
    """What the client counted in a window."""
    middle, tokens = (begin + end) / 2, timeline.tokens(begin, end)
    return {"begin": begin, "end": end, "tokens": tokens, "tokens_per_second": tokens / (end - begin),
            "requests": sum(request not in timeline.firsts for request in timeline.ended_in(begin, end)),
            "halves_tokens_per_second": [timeline.tokens(begin, middle) / (middle - begin), timeline.tokens(middle, end) / (end - middle)]}


def _by_server(timeline: Timeline, window: dict, before: dict, after: dict, streams: int) -> dict:
    """What the server's counters say of a window, from the scrapes at its edges, and how far the client's count may be from theirs."""
    begin, end = window["begin"], window["end"]
    counted = after["generation_tokens"] - before["generation_tokens"]
    largest = max((tokens for seconds, tokens in timeline.arrivals if begin <= seconds < end), default=0)
    inside = [(running, waiting) for seconds, running, waiting in timeline.samples if begin <= seconds <= end]
    found = {"server_tokens": counted, "client_over_server": window["tokens"] / counted if counted else None,
             "edge_tokens": 2 * streams * largest + window["tokens_per_second"] * (before["took"] + after["took"]) / 2,
             "samples": len(inside), "running": [running for running, _ in inside], "waiting": [waiting for _, waiting in inside],
             "saturated": all(waiting == 0 for _, waiting in inside) and statistics.median(running for running, _ in inside) == streams}
    drafted = drafting(before, after)
    return found | ({"drafting": drafted} if drafted else {})


def _mean_drafting(windows: list[dict]) -> dict:
    """Acceptance over all windows, from the `drafting` of each."""
    accepted, drafted, drafts = (sum(row[key] for row in windows) for key in ("accepted_tokens", "draft_tokens", "drafts"))
    return {"acceptance_rate": accepted / drafted, "mean_acceptance_length": 1 + accepted / drafts,
            "acceptance_by_position": [sum(row["acceptance_by_position"][place] * row["drafts"] for row in windows) / drafts
                                       for place in range(len(windows[0]["acceptance_by_position"]))]}


def figures(events: Events, *, streams: int, output_tokens: int, goodput_limits: dict[str, float] | None = None) -> dict:
    """All figures of one concurrency level; see the module docstring for their definitions. goodput_limits: latency -> milliseconds at most."""
    timeline = Timeline(events)
    windows = [_window(timeline, begin, end) for begin, end in events.windows]
    for index, window in enumerate(windows):
        before, after = (events.scrapes + [{}, {}])[2 * index:2 * index + 2]
        if before and after:
            window |= _by_server(timeline, window, before, after, streams)
    ended = [request for begin, end in events.windows for request in timeline.ended_in(begin, end)]
    requests = [request for request in ended if request not in timeline.firsts]
    by_request = [timeline.latencies(request) for request in requests]
    latencies = {name: [found[name] for found in by_request if name in found] for name in ("ttft", "itl", "tpot", "end_to_end")}
    latencies["itl"] = [seconds for request in requests for seconds in timeline.inter_token_latencies(request)]
    result = {"streams": streams, "output_tokens": output_tokens, "windows": windows,
              "tokens_per_second": mean_and_interval([window["tokens_per_second"] for window in windows]),
              "requests": len(requests), "first_requests_left_out": len(ended) - len(requests),
              "latency": {name: summary(values) for name, values in latencies.items()}}
    if goodput_limits:
        good = sum(all(1000 * found.get(name, 0.0) <= limit for name, limit in goodput_limits.items()) for found in by_request)
        result["goodput"] = {"limits_ms": goodput_limits, "requests_per_second": good / sum(end - begin for begin, end in events.windows),
                             "share": good / len(requests) if requests else None}
    if drafts := [window["drafting"] for window in windows if "drafting" in window]:
        result["drafting"] = _mean_drafting(drafts)
    result["warnings"] = warnings(result)
    return result


def warnings(result: dict) -> list[str]:
    """What a reader must know before quoting the figures; empty when everything holds."""
    found = []
    for number, row in enumerate(result["windows"], 1):
        where = f"{result['streams']} streams, window {number}"
        first, second = row["halves_tokens_per_second"]
        if not row["tokens"]:
            found.append(f"{where}: no token arrived; the server stood still")
        elif max(first, second) > 1.1 * min(first, second):
            found.append(f"{where}: not steady, {first:.1f} then {second:.1f} tokens/s in its halves")
        if not row["requests"]:
            found.append(f"{where}: no request but each stream's first ended in this window: latencies are not measured; lengthen "
                         "serving.window_seconds")
        if "server_tokens" not in row:
            found.append(f"{where}: the server has no vLLM metrics; neither saturation nor the count could be checked")
            continue
        if abs(row["tokens"] - row["server_tokens"]) > max(row["edge_tokens"], 0.01 * row["server_tokens"]):
            found.append(f"{where}: {row['tokens']} tokens arrived, the server counted {row['server_tokens']:g}; more than the "
                         f"{row['edge_tokens']:.0f} that a window's edges explain")
        if not row["saturated"]:
            found.append(f"{where}: not saturated, {min(row['running'])} to {max(row['running'])} of {result['streams']} requests "
                         f"running, up to {max(row['waiting'])} waiting")
        found += [f"{where}: {fault}" for fault in row.get("drafting", {}).get("faults", [])]
    return found
