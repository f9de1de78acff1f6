"""The closed loop's reading of a stream: what is a line, what is an event, and what a prompt is made of."""

import asyncio

import pytest

from stages.errors import UserError
from stages.serving.load import completion_tokens, lines_of


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
