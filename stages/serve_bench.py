"""Measures the release behind a server: N saturated streams, tokens counted strictly inside a steady window.

For each number of streams in `serving.concurrencies`: a closed loop is started, runs through a ramp, then K windows are
measured. Raw events go to serving/<streams>.jsonl.gz, every figure in serving.json is computed from that file. Where the
client's count and the server's counter disagree, the streams were not all running, or the halves of a window differ, the
result carries a warning that the report and the card repeat.

With `serving=none`, or `auto` without an environment, serving.json says that nothing was measured, and why.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone

from rich.console import Console
from rich.live import Live

from stages.checkpoint.files import read_json, sha256_file, write_json
from stages.dialects.config import whole_number
from stages.errors import UserError, exit_with_one_line
from stages.release import measured_release
from stages.serving.environment import marker_inputs
from stages.serving.launcher import server
from stages.serving.load import HEAD_TOKENS, ClosedLoop, pieces, text_ids, tokens_of_text
from stages.serving.secrets import settings_shown
from stages.serving.statistics import figures, recompute, save
from stages.settings import Settings, load, stage_parser, text_file
from stages.settings.schema import ServingSettings

REPORT_SECONDS = 10.0  # between progress lines where the output is no terminal


class Progress:
    """What the loop is doing: a line that changes on a terminal, a line now and then in a log."""

    def __init__(self, loop: ClosedLoop):
        self._loop, self._last, self._seen, self._live = loop, time.monotonic(), 0, None
        if sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        if self._live is None and now - self._last < REPORT_SECONDS:
            return
        rows = self._loop.events.rows
        recent = [row for row in rows[self._seen:] if row[0] == "end"]
        line = (f"{self._loop.streams} streams, {what}: {self._loop.now():.0f} s, {len(recent)} requests ended in the last "
                f"{now - self._last:.0f} s")
        if self._live:
            self._live.update(line)
        else:
            print(line, flush=True)
            self._last, self._seen = now, len(rows)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._live:
            self._live.stop()


def now_utc() -> str:
    """The time, to the second, as ISO 8601 writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def prompts_of(settings: Settings, known: Sequence[int]) -> tuple[list[int], dict]:
    """(token ids of serving.prompts, empty for random ones; what serving.json says of the prompts). UserError for a text that does not do."""
    serving = settings.serving
    if not serving.prompts:
        return [], {"content": "random token ids"}
    path = text_file("serving.prompts", serving.prompts)
    tokens = tokens_of_text(path, settings.run_directory / "release", known)
    found, needed = len(pieces(tokens, serving.prompt_tokens)), max(serving.concurrencies)
    if found < needed:
        raise UserError(f"serving.prompts={serving.prompts}: {len(tokens)} tokens give {found} prompts of "
                        f"serving.prompt_tokens={serving.prompt_tokens} (of which {HEAD_TOKENS} are random), fewer than {needed} streams; give a longer text")
    return tokens, {"content": path.name, "sha256": sha256_file(path), "tokens": len(tokens), "pieces": found}


def measure(settings: Settings, running, streams: int, vocabulary: Sequence[int], text: Sequence[int] = ()) -> dict:
    """Figures of one concurrency level; its raw events are saved even if it fails."""
    serving = settings.serving
    loop = ClosedLoop(running, streams=streams, output_tokens=serving.output_tokens, prompt_tokens=serving.prompt_tokens,
                      vocabulary=vocabulary, seed=serving.seed + streams, timeout_seconds=serving.timeout_seconds, text=text)
    facts = {"streams": streams, "output_tokens": serving.output_tokens, "goodput_limits": serving.goodput_ms or None}
    path = settings.run_directory / "serving" / f"{streams}.jsonl.gz"
    progress = Progress(loop)
    try:
        asyncio.run(loop.run(serving.windows, serving.window_seconds, serving.ramp_seconds, progress))
    except BaseException:  # Ctrl-C, and mistakes of ours, too: what was measured is worth a look
        save(path.with_name(f"{streams}.partial.jsonl.gz"), loop.events, facts)
        raise
    finally:
        progress.close()
    save(path, loop.events, facts)
    result = recompute(path)
    assert result == figures(loop.events, **facts), f"{path}: the figures cannot be recomputed"
    return result


def _not_measured(serving: ServingSettings) -> str | None:
    """Why these settings start no server; None where they do, or name one."""
    if serving.kind == "none":
        return "no server was started in this run"
    return f"{serving.environment} has not been made; `make serve-env` makes it" if serving.if_installed and not marker_inputs(serving) else None


def _print_level(level: dict, serving: ServingSettings) -> None:
    """The figures of a concurrency level in a line, and a line for each warning."""
    line = (f"{level['streams']} streams: {level['tokens_per_second']['mean']:.1f} tokens/s over {serving.windows} x "
            f"{serving.window_seconds:g} s")
    window = level["windows"][0]
    if window.get("client_over_server") is not None:
        line += f", client / server count {window['client_over_server']:.4f}"
    if "drafting" in level:
        line += f", {100 * level['drafting']['acceptance_rate']:.1f} % of drafted tokens accepted"
    print(line, flush=True)
    for warning in level["warnings"]:
        print(f"note: {warning}", flush=True)


def run(settings: Settings) -> dict:
    """Writes serving.json. A failure leaves serving.partial.json with the levels that were measured, and raises UserError; Ctrl-C leaves it, too."""
    serving, target = settings.serving, settings.run_directory / "serving.json"
    partial = target.with_name("serving.partial.json")
    if why := _not_measured(serving):
        result = {"server": serving.name, "not_measured": f"serving={serving.name}: {why}"}
        write_json(target, result)
        print(result["not_measured"])
        return result
    release = settings.run_directory / "release"
    config = read_json(release / "config.json", "assemble_release")
    vocabulary = whole_number(config, "vocab_size")
    if vocabulary is None:
        raise UserError("config.json: has no vocab_size, from which the random prompts are drawn; restore the original, or choose serving=none")
    drawn = text_ids(release, vocabulary)
    text, prompts = prompts_of(settings, drawn)
    result = {"manifest_sha256": measured_release(settings), "server": serving.name, "settings": settings_shown(serving), "prompts": prompts,
              "engine": {}, "levels": []}
    try:
        with server(settings) as running:
            result["engine"] = running.facts
            running.facts["begin_utc"] = now_utc()
            for streams in serving.concurrencies:
                level = measure(settings, running, streams, drawn, text)
                result["levels"].append(level)
                running.facts["end_utc"] = now_utc()
                _print_level(level, serving)
    except BaseException as error:
        write_json(partial, result | {"failed": str(error) or type(error).__name__})
        if not isinstance(error, UserError):
            raise
        raise UserError(f"{error} ({len(result['levels'])} of {len(serving.concurrencies)} levels are in {partial})") from None
    write_json(target, result)
    partial.unlink(missing_ok=True)
    return result


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
