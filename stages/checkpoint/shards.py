"""All shards of a directory at once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from stages.checkpoint.header import TensorInfo
from stages.checkpoint.reader import ShardReader
from stages.errors import UserError


class Shards:
    """The shards of a directory, used in a `with`.

    readers: by shard (its file's name). tensors: header entries by name. shard_of: tensor -> shard.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.readers: dict[str, ShardReader] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.shard_of: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def open_shard(self, path: Path) -> list[tuple[str, str]]:
        """Opens one more; (name, other file) of each of its tensors that another shard has, too."""
        reader = self.readers[path.name] = self._stack.enter_context(ShardReader(path))
        twice = [(name, self.shard_of[name]) for name in reader.header.tensors if name in self.shard_of]
        self.tensors |= reader.header.tensors
        self.shard_of |= dict.fromkeys(reader.header.tensors, path.name)
        return twice

    def open_all(self) -> None:
        """Opens every *.safetensors file of the directory; UserError for a tensor that is in two of them: which of them counts is up to a reader."""
        for path in sorted(self.directory.glob("*.safetensors")):
            for name, other in self.open_shard(path):
                raise UserError(f"{path}: holds {name}, and so does {other}; a tensor belongs to one shard, remove the file that does not belong here")

    def reader(self, name: str) -> ShardReader:
        """The reader that holds a tensor."""
        return self.readers[self.shard_of[name]]
