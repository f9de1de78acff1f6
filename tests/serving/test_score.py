"""Scores from a server whose distributions are known, in the form in which vLLM gives `prompt_logprobs`."""

import http.server
import json
import math
import threading

import pytest
import torch

from stages.errors import UserError
from stages.serving.launcher import Server
from stages.serving.score import scored_tokens, token_log_probabilities

VOCABULARY = 11
TOKENS = torch.tensor([3, 1, 0, 1, 5, 9, 2, 6, 5, 3])
WINDOWS = [(0, 6, 1), (4, 10, 6)]


def likelihoods(before):
    """Log-probabilities [VOCABULARY] of the token that follows `before`."""
    generator = torch.Generator().manual_seed(sum((i + 1) * token for i, token in enumerate(before)))
    return torch.randn(VOCABULARY, dtype=torch.float64, generator=generator).log_softmax(0)


TOKENS[2] = likelihoods([3, 1]).argmax()  # one that is the likeliest itself


def of_vllm(prompt, wanted):
    """The realized token of each place first, then the `wanted` likeliest that are not it; None for the first place."""
    entries = [None]
    for place in range(1, len(prompt)):
        found = likelihoods(prompt[:place])
        ids = dict.fromkeys([prompt[place], *found.topk(wanted).indices.tolist()])
        entries.append({str(i): {"logprob": found[i].item(), "rank": 1 + int((found > found[i]).sum()), "decoded_token": "x"} for i in ids})
    return entries


def tied(prompt, wanted):
    return [None, *({str(token): {"logprob": -0.5}, "10": {"logprob": -0.5}} for token in prompt[1:])]


@pytest.fixture
def served():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = json.dumps({"choices": [{"prompt_logprobs": self.server.answer(body["prompt"], body["prompt_logprobs"])}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer = of_vllm
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server, Server(f"http://127.0.0.1:{server.server_port}", "release", {})
    server.shutdown()
    server.server_close()


def test_each_scored_token_has_its_own_log_probability_and_the_likeliest_token_of_its_place(served):
    _, running = served
    expected = [likelihoods(TOKENS[begin:place].tolist()) for begin, end, scored in WINDOWS for place in range(scored, end)]
    values, likeliest = scored_tokens(running, TOKENS, WINDOWS)
    assert values.dtype == torch.float64 and likeliest.dtype == torch.int64
    assert values.tolist() == [found[token].item() for found, token in zip(expected, TOKENS[1:].tolist(), strict=True)]
    assert likeliest.tolist() == [found.argmax().item() for found in expected]
    assert (likeliest == TOKENS[1:]).tolist()[:2] == [False, True]  # entries of two tokens, and of one
    assert torch.equal(token_log_probabilities(running, TOKENS, WINDOWS), values)


def test_of_two_tokens_that_are_equally_likely_the_one_that_the_server_picks_counts(served):
    server, running = served
    server.answer = tied
    values, likeliest = scored_tokens(running, TOKENS, WINDOWS)
    assert set(values.tolist()) == {-0.5} and set(likeliest.tolist()) == {10}


@pytest.mark.parametrize("entry", [None, [], {}, {"7": {"logprob": math.log(0.5)}}, {"1": {}}, {"1": {"logprob": None}}, {"x": {"logprob": -1}}, 3])
def test_an_entry_without_the_realized_token_is_one_line(served, entry):
    server, running = served
    server.answer = lambda prompt, wanted: [None, *[entry] * (len(prompt) - 1)]
    with pytest.raises(UserError, match="no log-probability of the realized token 1 in"):
        scored_tokens(running, TOKENS, WINDOWS)
