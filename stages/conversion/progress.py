"""How far the conversion of a shard is."""

from __future__ import annotations

import sys
import time

from stages.checkpoint.files import human_bytes

REPORT_SECONDS = 10.0  # between progress lines where the output is no terminal


class ProgressReport:
    """Rate and time left: a bar on a terminal, a line every few seconds in a log."""

    def __init__(self, shard: str, total_bytes: int):
        self._shard, self._total, self._done = shard, total_bytes, 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            self._bar = Progress(TextColumn(shard), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                                 TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(shard, total=total_bytes)
            self._bar.start()

    def advance(self, count: int) -> None:
        """Counts source bytes done."""
        self._done += count
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._last > REPORT_SECONDS and 100 * self._done >= self._total:  # what the first bytes waited for, kernels, is no rate
            self._last = time.monotonic()
            rate = self._done / (self._last - self._start)
            print(f"{self._shard}: {100 * self._done / self._total:3.0f} %, {human_bytes(rate)}/s, "
                  f"{(self._total - self._done) / rate:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
