"""A checkpoint's own tokenizer.json, by which text becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint or release, None where it has no tokenizer.json; UserError for one that is damaged."""
    path = Path(directory) / TOKENIZER
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of no kind of its own
        raise UserError(f"{path} is damaged ({str(error)[:120]}): restore the original") from None
    tokenizer.no_truncation()  # which tools that calibrate leave in the file
    tokenizer.no_padding()
    return tokenizer
