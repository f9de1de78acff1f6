"""The closed loop's reading of a stream: what is a line, what is an event, and what a prompt is made of."""

import asyncio

import pytest

from stages.serving.load import lines_of


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
