"""A completions server whose rate is known: it emits tokens by absolute time and remembers when.

It runs in a thread of the test's process, so that both read the same clock. Chunks hold the numbers of tokens in `chunks`,
in turn. `fault` makes it misbehave in one of the ways that real servers do. Their text holds characters at which Python, but
not an event stream, begins a new line.
"""

import asyncio
import itertools
import json
import threading
import time

TEXT = "x\u0085\u2028\u2029\u00e4"  # not escaped in the events, as vLLM sends them


class PacedServer:
    """`with PacedServer(rate=100) as server:` serves on server.url until the block ends."""

    def __init__(self, rate=200.0, chunks=(1, 2, 3, 4), fault=None, stall=None, counter_factor=1.0, metrics=True):
        self.rate, self.chunks, self.fault, self.stall = rate, chunks, fault, stall  # tokens/s of each stream; stall: (at, for)
        self.counter_factor, self.metrics = counter_factor, metrics
        self.emitted, self.prompts, self.running, self.requests = [], [], 0, 0
        self.keys = set()  # that came as authorization, None for none
        self.ready, self.started_at = threading.Event(), None

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.ready.set()
        await self._stop.wait()
        server.close()

    def emitted_between(self, begin, end):
        """Tokens that left in [begin, end) of time.perf_counter."""
        return sum(tokens for at, tokens in list(self.emitted) if begin <= at < end)

    async def _connection(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split(b" ", 2)[1].decode()
                length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
                self.keys.add(next((line.split(b": ")[1].decode() for line in head.split(b"\r\n") if line.lower().startswith(b"authorization")),
                                   None))
                body = json.loads(await reader.readexactly(length)) if length else {}
                if path == "/metrics":
                    self._plain(writer, 200 if self.metrics else 404, self._metrics())
                elif path != "/v1/completions":
                    self._plain(writer, 200, "{}")
                elif not body.get("stream"):
                    self._plain(writer, 200, "{}")
                else:
                    await self._completion(writer, body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # the client left, or the test has ended
            pass
        finally:
            writer.close()

    def _plain(self, writer, status, text):
        data = text.encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    def _metrics(self):
        total = self.counter_factor * sum(tokens for _, tokens in self.emitted)
        return (f'vllm:generation_tokens_total{{engine="0"}} {total}\nvllm:generation_tokens_created{{engine="0"}} 1.7e9\n'
                f'vllm:num_requests_running{{engine="0"}} {self.running}\nvllm:num_requests_waiting{{engine="0"}} 0.0\n')

    def _event(self, writer, text):
        data = f"data: {text}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def _completion(self, writer, body):
        self.prompts.append(body["prompt"])
        self.requests += 1
        fault = self.fault
        if fault == "500":
            return self._plain(writer, 500, "out of memory in layer 7")
        if fault == "404":
            return self._plain(writer, 404, "no such model")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self.running += 1
        begin, sent, total = time.perf_counter(), 0, body["max_tokens"]
        self.started_at = self.started_at or begin
        try:
            for size in itertools.cycle(self.chunks):
                size = min(size, total - sent)
                due = begin + (sent + size) / self.rate
                if self.stall and due > self.started_at + self.stall[0] > begin:
                    due += self.stall[1]
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if fault == "hang":
                    await asyncio.sleep(60)
                if fault == "die" and sent > total // 2:
                    return writer.close()
                sent += size
                self.emitted.append((time.perf_counter(), size))
                usage = {"completion_tokens": sent - 2 * (sent > total // 2) * (size + 1) if fault == "backwards" else sent}
                if fault == "malformed":
                    self._event(writer, '{"choices": [')
                elif fault == "null_event":
                    self._event(writer, "null")
                elif fault == "error_event":
                    self._event(writer, '{"error": {"message": "engine core died"}}')
                else:
                    self._event(writer, json.dumps({"choices": [{"text": TEXT}], **({} if fault == "no_usage" else {"usage": usage})},
                                                   ensure_ascii=False))
                await writer.drain()
                if sent == total or (fault == "short" and sent > total // 2):
                    break
            self._event(writer, "[DONE]")
            writer.write(b"0\r\n\r\n")
        finally:
            self.running -= 1
