"""Measures the release behind a server. With `serving=none`, the only choice there is yet, it records that nothing was.

The record is written rather than left out, so that the report and the card say "not measured" and why.
"""

from __future__ import annotations

from stages.checkpoint.files import write_json
from stages.errors import exit_with_one_line
from stages.settings import Settings, load, stage_parser


def run(settings: Settings) -> dict:
    """Writes serving.json."""
    result = {"server": settings.serving.name, "not_measured": "serving=none: no server was started in this run"}
    write_json(settings.run_directory / "serving.json", result)
    print(result["not_measured"])
    return result


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
