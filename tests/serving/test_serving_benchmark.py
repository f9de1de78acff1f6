"""The serving benchmark against a server whose true rate is known: right figures, or one line that says what is wrong."""

import asyncio
import gzip
import json
import shutil
from datetime import datetime, timedelta

import pytest
from tokenizers import Tokenizer

from stages import serve_bench
from stages.checkpoint.files import sha256_file
from stages.errors import UserError
from stages.serving.load import ClosedLoop, Events, parse_metrics
from stages.serving.statistics import drafting, figures, mean_and_interval, recompute, save, summary
from stages.settings import load
from tests.conftest import TINY
from tests.serving.paced_server import PacedServer


class Endpoint:
    """What the loop needs to know of a server."""

    def __init__(self, url):
        self.base_url, self.model = url, "release"

    def check(self):
        pass


def measured(server, streams=4, output_tokens=64, windows=1, window_seconds=1.5, ramp_seconds=0.2, timeout_seconds=20.0):
    loop = ClosedLoop(Endpoint(server.url), streams=streams, output_tokens=output_tokens, prompt_tokens=8, vocabulary=512,
                      seed=1, timeout_seconds=timeout_seconds)
    events = asyncio.run(loop.run(windows, window_seconds, ramp_seconds))
    return loop, figures(events, streams=streams, output_tokens=output_tokens)


def in_flight(server, loop, at):
    """Tokens that had left the server and not yet arrived, `at` seconds after the loop's start."""
    arrived, seen = 0, {}
    for kind, seconds, _, request, count in loop.events.rows:
        if kind == "tokens" and seconds < at:
            arrived, seen[request] = arrived + count - seen.get(request, 0), count
    return server.emitted_between(0, loop._start + at) - arrived


def assert_every_token_is_accounted_for(server, loop, window):
    """The count is the server's own, but for tokens on their way at the edges; how many those are depends on the machine's load."""
    begin, end = window["begin"], window["end"]
    true = server.emitted_between(loop._start + begin, loop._start + end)
    edges = in_flight(server, loop, begin), in_flight(server, loop, end)
    assert window["tokens"] == true + edges[0] - edges[1], (true, edges)
    assert min(edges) >= 0 and max(edges) < 0.1 * true, "tokens are seen late"
    return edges


@pytest.mark.parametrize("chunks", [(1,), (4,), (1, 2, 3, 4)])
def test_the_true_rate_is_found_however_many_tokens_a_chunk_holds(chunks):
    with PacedServer(rate=100.0, chunks=chunks) as server:
        loop, found = measured(server)
    window = found["windows"][0]
    edges = assert_every_token_is_accounted_for(server, loop, window)
    seconds = window["end"] - window["begin"]
    assert window["tokens"] <= 4 * (100.0 * seconds + max(chunks)) + edges[0]  # no stream can be faster than its pace
    assert abs(window["tokens"] - window["server_tokens"]) <= window["edge_tokens"] + max(edges)


def test_tokens_of_requests_that_straddle_the_edges_of_a_window_count_by_time():
    with PacedServer(rate=100.0, chunks=(2,)) as server:
        loop, found = measured(server, output_tokens=400, window_seconds=1.0)  # no request begins or ends inside
    assert found["requests"] == 0
    assert_every_token_is_accounted_for(server, loop, found["windows"][0])


def test_a_stall_lowers_the_rate_and_is_reported():
    with PacedServer(rate=100.0, chunks=(1,), stall=(0.4, 0.8)) as server:
        loop, found = measured(server, output_tokens=400, window_seconds=1.6)
    assert_every_token_is_accounted_for(server, loop, found["windows"][0])
    assert any("not steady" in warning for warning in found["warnings"])


def test_a_server_that_counts_otherwise_is_reported():
    with PacedServer(rate=200.0, chunks=(1,), counter_factor=1.5) as server:
        _, found = measured(server)
    assert any("the server counted" in warning for warning in found["warnings"])


def test_a_server_without_metrics_is_measured_but_not_vouched_for():
    with PacedServer(rate=100.0, metrics=False) as server:
        _, found = measured(server, window_seconds=0.5)
    assert found["windows"][0]["tokens"] > 0 and any("no vLLM metrics" in warning for warning in found["warnings"])


def test_requests_waiting_or_missing_are_reported():
    with PacedServer(rate=100.0) as server:
        loop, _ = measured(server, window_seconds=0.5)
    events = loop.events
    events.rows = [(*row[:3], 2, row[4]) if row[0] == "sample" else row for row in events.rows]
    assert any("not saturated" in warning for warning in figures(events, streams=4, output_tokens=64)["warnings"])


def test_no_two_prompts_begin_alike():
    with PacedServer(rate=2000.0) as server:
        measured(server, streams=8, window_seconds=0.5)
    heads = [tuple(prompt[:2]) for prompt in server.prompts]
    assert len(heads) > 8 and len(set(heads)) == len(heads)
    assert all(len(prompt) == 8 and min(prompt) >= 16 and max(prompt) < 512 for prompt in server.prompts)


def test_every_figure_can_be_recomputed_from_the_saved_events(tmp_path):
    with PacedServer(rate=200.0) as server:
        loop, found = measured(server, windows=2, window_seconds=0.5)
    save(tmp_path / "events.jsonl.gz", loop.events, {"streams": 4, "output_tokens": 64})
    assert recompute(tmp_path / "events.jsonl.gz") == found
    assert found["tokens_per_second"]["windows"] == 2 and found["tokens_per_second"]["half_interval_95"] is not None


def test_latencies_are_those_of_the_definitions():
    rows = [("send", 0.0, 0, 1, 8), ("tokens", 0.5, 0, 1, 6), ("end", 0.5, 0, 1, 6),
            ("send", 1.0, 0, 2, 8), ("tokens", 1.5, 0, 2, 2), ("tokens", 2.0, 0, 2, 4), ("tokens", 2.5, 0, 2, 6),
            ("end", 2.5, 0, 2, 6)]
    found = figures(Events(rows, [], [(1.0, 3.0)]), streams=1, output_tokens=6, goodput_limits={"ttft": 400})
    assert found["latency"]["ttft"]["mean_ms"] == 500 and found["latency"]["itl"]["mean_ms"] == 500
    assert found["latency"]["tpot"]["mean_ms"] == 250 and found["latency"]["end_to_end"]["mean_ms"] == 1500
    assert found["windows"][0]["tokens"] == 6 and found["goodput"]["share"] == 0


def burst(streams, burst_seconds, ttft, per_token, output_tokens, horizon):
    """Rows of streams that all send at 0: the first tokens come one stream after the other within `burst_seconds`, later ones after `ttft`."""
    rows, request = [], 0
    for stream in range(streams):
        at, first = 0.0, burst_seconds * (stream + 1) / streams
        while at < horizon:
            request += 1
            rows.append(("send", at, stream, request, 8))
            at += first
            rows.append(("tokens", at, stream, request, 1))
            for count in range(2, output_tokens + 1):
                at += per_token
                rows.append(("tokens", at, stream, request, count))
            rows.append(("end", at, stream, request, output_tokens))
            first = ttft
    return sorted(rows, key=lambda row: row[1])


def test_the_burst_at_the_start_is_in_no_latency():
    """Windows begin before the first requests have ended, as they do with completions longer than the ramp."""
    rows = burst(streams=4, burst_seconds=5.0, ttft=0.2, per_token=0.1, output_tokens=64, horizon=60)
    window = (6.0, 36.0)
    found = figures(Events(rows, [], [window]), streams=4, output_tokens=64, goodput_limits={"ttft": 300})
    assert found["first_requests_left_out"] == 4 and found["requests"] == found["windows"][0]["requests"] > 8
    assert found["latency"]["ttft"]["count"] == found["requests"] and found["latency"]["ttft"]["p95_ms"] == pytest.approx(200)
    assert found["latency"]["end_to_end"]["p95_ms"] == pytest.approx(6500) and found["latency"]["tpot"]["p50_ms"] == pytest.approx(100)
    assert found["goodput"]["share"] == 1
    counted = sum(window[0] <= row[1] < window[1] for row in rows if row[0] == "tokens")  # one token each; those of the first requests, too
    assert found["windows"][0]["tokens"] == counted
    assert not any("latencies are not measured" in warning for warning in found["warnings"])


@pytest.mark.parametrize("window", [(6.0, 7.0), (6.0, 11.5)])  # in which none ends, and the first of each stream only
def test_a_window_without_a_request_to_take_latencies_from_is_warned_of(window):
    rows = burst(streams=4, burst_seconds=5.0, ttft=0.2, per_token=0.1, output_tokens=64, horizon=60)
    found = figures(Events(rows, [{}] * 4, [(20.0, 40.0), window]), streams=4, output_tokens=64)
    assert [row["requests"] > 0 for row in found["windows"]] == [True, False]
    assert [warning for warning in found["warnings"] if "latencies" in warning] == [
        "4 streams, window 2: no request but each stream's first ended in this window: latencies are not measured; lengthen serving.window_seconds"]


def test_draft_counters_that_contradict_each_other_are_faults():
    def counters(drafts, drafted, accepted, positions):
        return {"spec_decode_num_drafts": drafts, "spec_decode_num_draft_tokens": drafted,
                "spec_decode_num_accepted_tokens": accepted, "accepted_per_position": positions}

    zero = counters(0, 0, 0, [0, 0, 0])
    good = drafting(zero, counters(10, 30, 18, [9, 6, 3]))
    assert not good["faults"] and good["acceptance_rate"] == 0.6 and good["mean_acceptance_length"] == 2.8
    assert good["acceptance_by_position"] == [0.9, 0.6, 0.3]
    for bad in (counters(10, 30, 20, [9, 6, 3]), counters(10, 30, 18, [6, 9, 3]), counters(10, 31, 18, [9, 6, 3])):
        assert drafting(zero, bad)["faults"]
    assert drafting(zero, zero) is None


def test_metrics_are_read_as_vllm_writes_them():
    text = ('# HELP vllm:generation_tokens_total x\nvllm:generation_tokens_total{engine="0",model_name="m"} 40.0\n'
            'vllm:generation_tokens_total{engine="1",model_name="m"} 2.0\nvllm:generation_tokens_created{engine="0"} 1.79e+09\n'
            'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting_by_reason{engine="0",reason="x"} 9.0\n'
            'vllm:num_requests_waiting{engine="0"} 1.0\n'
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 8.0\n'
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 11.0\n')
    found = parse_metrics(text)
    assert found["generation_tokens"] == 42 and found["num_requests_running"] == 3 and found["num_requests_waiting"] == 1
    assert found["accepted_per_position"] == [11.0, 8.0]


def test_means_and_percentiles_are_the_textbook_ones():
    assert summary([0.001 * value for value in range(1, 101)])["p90_ms"] == pytest.approx(90.1)
    assert summary([0.001 * value for value in range(1, 101)])["p99_ms"] == pytest.approx(99.01)
    found = mean_and_interval([10.0, 12.0, 14.0])
    assert found["mean"] == 12.0 and found["half_interval_95"] == pytest.approx(4.303 * 2 / 3**0.5)


def test_a_99th_percentile_is_not_given_from_fewer_than_100_values():
    found = summary([0.001 * value for value in range(1, 100)])
    assert found["count"] == 99 and found["p99_ms"] is None and found["p95_ms"] == pytest.approx(94.1)
    assert summary([]) is None


def settings_for(server, tmp_path, **others):
    overrides = ["serving=endpoint", f"serving.url={server.url}", f"results={tmp_path}", "serving.concurrencies=[2,4]",
                 "serving.output_tokens=32", "serving.window_seconds=0.5", "serving.ramp_seconds=0",
                 *(f"serving.{key}={value}" for key, value in others.items())]
    settings = load(overrides)
    (settings.run_directory / "release").mkdir(parents=True)
    (settings.run_directory / "release" / "config.json").write_text(json.dumps({"vocab_size": 512}))
    (settings.run_directory / "release" / "manifest.json").write_text(json.dumps({"files": {}}))
    return settings


def test_the_stage_measures_every_level_through_an_endpoint(tmp_path):
    with PacedServer(rate=200.0) as server:
        settings = settings_for(server, tmp_path)
        serve_bench.run(settings)
    found = json.loads((settings.run_directory / "serving.json").read_text())
    assert [level["streams"] for level in found["levels"]] == [2, 4]
    assert found["prompts"] == {"content": "random token ids"}
    begin, end = (datetime.fromisoformat(found["engine"][key]) for key in ("begin_utc", "end_utc"))
    assert 1 <= (end - begin).total_seconds() < 60 and begin.utcoffset() == timedelta(0)
    for level in found["levels"]:
        assert recompute(settings.run_directory / "serving" / f"{level['streams']}.jsonl.gz") == level


def test_prompts_can_come_from_a_text_which_the_result_names(tmp_path):
    text = tmp_path / "questions.txt"
    text.write_text("".join(f"What is {i} times {i + 7}? " for i in range(200)))
    with PacedServer(rate=400.0) as server:
        settings = settings_for(server, tmp_path / "results", prompts=f"'{text}'", prompt_tokens=16)
        release = settings.run_directory / "release"
        with pytest.raises(UserError, match="tokenizer.json is missing"):
            serve_bench.run(settings)
        shutil.copy(TINY / "tokenizer.json", release)
        serve_bench.run(settings)
        found = json.loads((settings.run_directory / "serving.json").read_text())["prompts"]
        assert found.items() >= {"content": "questions.txt", "sha256": sha256_file(text)}.items() and found["pieces"] == found["tokens"] // 14
        assert len(server.prompts) > 6 and all(len(prompt) == 16 for prompt in server.prompts)
        words = Tokenizer.from_file(str(TINY / "tokenizer.json")).decode([number for prompt in server.prompts for number in prompt[2:]])
        assert "times" in words
        text.write_text("too short a text")
        with pytest.raises(UserError, match="tokens give 0 prompts of serving.prompt_tokens=16 .*, fewer than 4 streams"):
            serve_bench.run(settings)
        settings.serving.prompts = "nowhere.txt"
        with pytest.raises(UserError, match="serving.prompts=nowhere.txt: no such file"):
            serve_bench.run(settings)


def test_a_window_in_which_the_server_stands_still_is_measured_and_warned_of(tmp_path):
    with PacedServer(rate=200.0, stall=(0.2, 3.0)) as server:
        settings = settings_for(server, tmp_path, ramp_seconds=0.4, concurrencies="[2]")
        serve_bench.run(settings)
    found = json.loads((settings.run_directory / "serving.json").read_text())["levels"][0]
    assert found["windows"][0]["tokens"] == found["windows"][0]["server_tokens"] == 0
    assert any("no token arrived" in warning for warning in found["warnings"])


@pytest.mark.parametrize(("fault", "words"), [
    ("500", "answers with 500: out of memory in layer 7"), ("404", "answers with 404: no such model"),
    ("malformed", "damaged event"), ("null_event", "damaged event"), ("error_event", "engine core died"), ("no_usage", "without usage counters"),
    ("short", "ended a stream after"), ("die", "while 4 streams were running"), ("backwards", "counts backwards"),
    ("hang", "while 4 streams were running"),
])
def test_a_server_that_fails_ends_the_run_with_one_line_and_keeps_what_was_measured(tmp_path, monkeypatch, fault, words):
    with PacedServer(rate=400.0, fault=fault) as server:
        settings = settings_for(server, tmp_path, timeout_seconds=1.5)
        server.fault = None

        def failing(*arguments, measure=serve_bench.measure, **keywords):
            if arguments[2] == 4:
                server.fault = fault
            return measure(*arguments, **keywords)

        monkeypatch.setattr(serve_bench, "measure", failing)
        with pytest.raises(UserError, match=words) as caught:
            serve_bench.run(settings)
    assert "\n" not in str(caught.value) and "1 of 2 levels" in str(caught.value)
    assert not (settings.run_directory / "serving.json").exists()
    partial = json.loads((settings.run_directory / "serving.partial.json").read_text())
    assert [level["streams"] for level in partial["levels"]] == [2] and partial["failed"]
    assert (settings.run_directory / "serving" / "4.partial.jsonl.gz").exists()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_what_was_measured_is_kept_whatever_ends_the_run(tmp_path, monkeypatch, kind):
    def ends(self, what):
        if what == "window 1":
            raise kind("ended")

    monkeypatch.setattr(serve_bench.Progress, "__call__", ends)
    with PacedServer(rate=400.0) as server:
        settings = settings_for(server, tmp_path)
        with pytest.raises(kind):
            serve_bench.run(settings)
    assert not (settings.run_directory / "serving.json").exists()
    assert json.loads((settings.run_directory / "serving.partial.json").read_text())["failed"]
    with gzip.open(settings.run_directory / "serving" / "2.partial.jsonl.gz", "rt") as file:
        assert sum(json.loads(line)[0] == "tokens" for line in [*file][1:]) > 0


def test_an_address_where_nobody_listens_is_one_line(tmp_path):
    with PacedServer() as server:
        settings = settings_for(server, tmp_path)
    with pytest.raises(UserError, match="nothing answers there"):
        serve_bench.run(settings)
