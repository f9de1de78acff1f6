"""The closed loop's reading of a stream: what is a line, what is an event, and what a prompt is made of."""

import asyncio
import json

import pytest

from stages.errors import UserError
from stages.serving.load import ClosedLoop, completion_tokens, lines_of, pieces, text_ids, tokens_of_text
from tests.conftest import TINY


def read(*pieces):
    async def stream():
        for piece in pieces:
            yield piece

    async def collect():
        return [line async for line in lines_of(stream()) if line]

    return asyncio.run(collect())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_lines_end_where_an_event_stream_says_and_nowhere_else(end, size):
    lines = ["data: a\u0085b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e", ": comment", "data: \u00e4\U0001f600", "data: [DONE]"]
    text = (end + end).join(lines).encode()  # the last line has no end
    assert read(*(text[i:i + size] for i in range(0, len(text), size))) == lines


@pytest.mark.parametrize(("data", "words"), [
    ("null", "damaged event: 'null'"), ("[]", "damaged event"), ("3", "damaged event"), ('"x"', "damaged event"), ("[" * 100_000, "damaged event"),
    ('{"usage": [1]}', "damaged event"), ('{"usage": []}', "damaged event"), ('{"usage": 3}', "damaged event"),
    ('{"usage": "many"}', "damaged event"), ('{"usage": {"completion_tokens": "3"}}', "damaged event"),
    ('{"usage": {"completion_tokens": 3.0}}', "damaged event"), ('{"usage": {"completion_tokens": true}}', "damaged event"),
    ('{"choices": []}', "without usage counters"), ('{"usage": null}', "without usage counters"), ('{"usage": {}}', "without usage counters"),
    ('{"error": {"message": "engine core died", "code": 500}}', "reports an error in the stream: engine core died$"),
    ('{"error": "too long"}', "in the stream: too long$"), ('{"error": {"code": 500}}', "in the stream: .*500"),
    ('{"object": "error", "message": "engine dead", "code": 500}', "in the stream: engine dead$"),
    ('{"error": null, "object": "error", "message": "engine dead"}', "in the stream: engine dead$"), ('{"error": [1]}', r"in the stream: \[1\]"),
])
def test_an_event_that_is_none_or_tells_of_an_error_is_one_line(data, words):
    with pytest.raises(UserError, match=words) as caught:
        completion_tokens(data, "http://server/v1/completions")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("data", ['{"choices": [], "usage": {"completion_tokens": 3}}', '{"error": null, "usage": {"completion_tokens": 3}}'])
def test_a_good_event_gives_its_counter(data):
    assert completion_tokens(data, "http://server/v1/completions") == 3


def tokenizer(directory, vocabulary, added):
    """A tokenizer.json of words 0 to `vocabulary` - 1, with added tokens of these ids."""
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocabulary)}, "unk_token": "w0"},
        "added_tokens": [{"id": i, "content": f"w{i}" if i < vocabulary else f"<{i}>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": i % 2 == 0} for i in added]}))
    return directory


@pytest.mark.parametrize(("vocabulary", "added", "known", "expected"), [
    (100, (0, 1, 97, 98, 99, 100, 101), 128, range(2, 97)),  # special ones first, in the midst of the words, and behind them
    (100, (), 128, range(100)), (100, (100,), 50, range(50)),  # the model's embedding is shorter than the tokenizer
    (4, (0, 1, 2, 3), 64, range(16, 64)),  # nothing left: as without a tokenizer
])
def test_prompts_are_drawn_from_ids_that_stand_for_text(tmp_path, vocabulary, added, known, expected):
    assert list(text_ids(tokenizer(tmp_path, vocabulary, added), known)) == list(expected)


def test_without_a_tokenizer_prompts_leave_out_the_lowest_ids_and_a_damaged_one_is_refused(tmp_path):
    assert list(text_ids(tmp_path, 64)) == list(range(16, 64)) and list(text_ids(tmp_path, 1)) == [0]
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="tokenizer.json is damaged .*: restore the original"):
        text_ids(tmp_path, 64)


def test_no_prompt_of_the_tiny_model_holds_a_special_token():
    added = {entry["id"] for entry in json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]}
    loop = ClosedLoop(None, streams=1, output_tokens=1, prompt_tokens=64, vocabulary=text_ids(TINY, 512), seed=0, timeout_seconds=1)
    drawn = {number for _ in range(200) for number in loop.prompt()}
    assert len(added) == 10 and not drawn & added and len(drawn) == 512 - len(added)


def loop_of(text, prompt_tokens, seed=0):
    return ClosedLoop(None, streams=1, output_tokens=1, prompt_tokens=prompt_tokens, vocabulary=range(1000, 1100), seed=seed,
                      timeout_seconds=1, text=text)


def test_prompts_of_a_text_are_its_pieces_each_behind_a_beginning_of_its_own():
    text = list(range(100))
    assert pieces(text, 12) == [text[i:i + 10] for i in range(0, 100, 10)] and len(pieces(text[:99], 12)) == 9
    assert pieces(text, 2) == pieces([], 12) == []
    loop = loop_of(text, 12)
    made = [loop.prompt() for _ in range(20)]
    assert all(len(prompt) == 12 and min(prompt[:2]) >= 1000 for prompt in made) and len({tuple(prompt[:2]) for prompt in made}) == 20
    bodies = [prompt[2:] for prompt in made]
    assert sorted(bodies[:10]) == pieces(text, 12) != bodies[:10] and bodies[10:] == bodies[:10]  # all of them in another order, then again
    assert loop_of(text, 12, seed=1).prompt()[2:] != made[0][2:]


def test_a_text_becomes_tokens_without_special_ones(tmp_path):
    directory, text = tokenizer(tmp_path, 50, (0, 49, 60)), tmp_path / "text.txt"
    text.write_text("w1 w2 w49 w3 <60> w4 w48 unknown w5")
    assert tokens_of_text(text, directory, text_ids(directory, 48)) == [1, 2, 3, 4, 5]
    text.write_bytes(b"w1 \xff")
    with pytest.raises(UserError, match="text.txt is not UTF-8 .* byte 3"):
        tokens_of_text(text, directory, [1])
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        tokens_of_text(text, directory, [1])
