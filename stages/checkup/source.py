"""The checkpoint that a release was made from, opened: what its weights are, and which modules of a release they become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.checkpoint.shards import Shards
from stages.dialects import recognize
from stages.dialects.claim import Claim
from stages.dialects.config import read_source_config
from stages.dialects.reading import Tensors
from stages.errors import UserError
from stages.schemes.modules import Matrix, matrices
from stages.sources.index import weight_map_of


class Source(Shards):
    """`config` is its config.json, `claims` say how each tensor is stored, `places` reads them; `origins` leads from a release's module, in
    either layout, to the weight that becomes it and to its Matrix."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.places = Tensors(self.reader)
        self.config: dict = {}
        self.claims: dict[str, Claim] = {}
        self.origins: dict[str, tuple[str, Matrix]] = {}

    def read(self, release: Path) -> None:
        """Opens everything; UserError that names the source when it is none, or the release itself."""
        self.open_all()
        if not self.tensors:
            raise UserError(f"--source {self.directory}: holds no tensor; name the checkpoint that the release was made from")
        weight_map_of(self.directory, {shard: reader.header for shard, reader in self.readers.items()}, f"--source {self.directory}")
        self.config = read_source_config(self.directory)
        self.claims = recognize(self.tensors, self.shard_of, self.config)
        if all((release / shard).exists() and reader.path.samefile(release / shard)
               for shard, reader in self.readers.items()):  # by links, too; another release may be a source
            raise UserError(f"--source {self.directory}: is a release itself, not a source; name the checkpoint that the release was made from")
        for name, claim in self.claims.items():
            for layout in ("stacked", "per_expert") if claim.matrix else ():
                self.origins |= {matrix.module: (name, matrix) for matrix in matrices(name, claim.matrix, layout)}


@contextmanager
def open_source(directory: Path | None, release: Path) -> Iterator[Source | None]:
    """The source of a release, closed behind the block; None where none is named."""
    if directory is None:
        yield None
        return
    with Source(directory) as source:
        source.read(release)
        yield source
