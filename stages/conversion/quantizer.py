"""Quantizes the matrices of a shard in panels of rows."""

from __future__ import annotations

import math

import numpy as np

from kernels import mxfp4
from kernels.errors import NonFiniteError
from stages.checkpoint.files import memory
from stages.conversion.numbers import DAMAGED, UNUSABLE, USUAL_SIZES
from stages.conversion.places import Places
from stages.conversion.progress import ProgressReport
from stages.dialects import Claim
from stages.dialects.reading import Tensors, stored_rows
from stages.errors import UserError, loading_kernels
from stages.records import MatrixSums, Plan
from stages.schemes import SCHEMES
from stages.schemes.modules import Matrix

PANEL_WEIGHTS = 8 << 20  # weights quantized at once; a whole expert of Step-3.7 (1280 x 4096) fits
NO_TILE = (1, 1)  # of weights that come without tile scales


class Quantizer:
    """Quantizes matrices of one shard and keeps their sums for the receipt."""

    def __init__(self, places: Places, plan: Plan, shard: str, backend: str, progress: ProgressReport):
        if not mxfp4.available(backend):
            raise UserError(f"device.backend={backend} does not run on this machine; choose one of "
                            f"{', '.join(mxfp4.backends())}")
        weights = [entry for entry in plan["tensors"].values() if entry["shard"] == shard and entry["scheme"]]
        with loading_kernels():  # or compiling them, before the clock starts; Triton compiles others for a single row and for each rule
            for scheme in {entry["scheme"] for entry in weights}:
                SCHEMES[scheme].quantize(np.zeros((128, 256), np.uint8), np.ones((1, 2), np.float32), (128, 128), plan["exponent_rule"], backend)
        self._tensors, self._plan, self._backend, self._progress = Tensors(places), plan, backend, progress
        largest = max((entry["bytes"] // (entry["matrix"][0] if len(entry["matrix"]) == 3 else 1) for entry in weights), default=0)
        self._buffer = memory(min(largest, 4 * PANEL_WEIGHTS))
        self._codes = np.empty(0, np.uint8)  # memory for those of a panel
        self.sums: dict[str, list[MatrixSums]] = {}  # group -> those of its matrices
        self.zeros: list[str] = []  # weights of which nothing but zeros came

    def panels(self, source: str, matrix: Matrix, expert: int | None):
        """Yields (codes, scale) of consecutive row panels of a matrix; adds its sums to the receipt."""
        rows = range(*matrix.rows)
        entry = self._plan["tensors"][source]
        claim, scheme = Claim.from_entry(entry), SCHEMES[entry["scheme"]]
        height = max(1, PANEL_WEIGHTS // (claim.matrix[-1] * rows.step))
        if claim.tile:
            height = max(claim.tile[0], height // claim.tile[0] * claim.tile[0])
        row_bytes = entry["bytes"] // math.prod(claim.matrix[:-1])
        total = [0.0, 0.0, 0.0]
        for position in range(0, len(rows), height):
            panel = rows[position:position + height]
            try:
                weight, scale = stored_rows(self._tensors, source, claim, expert, panel[0], panel[-1] + 1, self._buffer)
            except NonFiniteError as error:
                raise self._unusable(source, claim, expert, range(panel[0], panel[-1] + 1), error) from None
            try:
                weight, scale = (part if part is None else np.ascontiguousarray(part[::rows.step]) for part in (weight, scale))
                if weight.size > 2 * self._codes.size:
                    self._codes = np.empty(weight.size // 2, np.uint8)
                codes, scales, sums = scheme.quantize(weight, scale, claim.tile or NO_TILE, self._plan["exponent_rule"], self._backend,
                                                      self._codes)
            except NonFiniteError as error:
                raise self._unusable(source, claim, expert, panel, error) from None
            for number, value in enumerate(sums):
                total[number] += value
            self._progress.advance(row_bytes * len(panel))
            yield codes, scales
        size = math.sqrt(total[0] / (len(rows) * claim.matrix[-1]))
        if not size:
            self.zeros.append(source if expert is None else f"{source}[{expert}]")
        elif not USUAL_SIZES[0] < size < USUAL_SIZES[1]:
            why = f"its scales are not those of {claim.dialect}, or are damaged" if claim.scale else DAMAGED
            raise UserError(f"{entry['shard']}: {source}{'' if expert is None else [expert]} decodes to weights of {size:.1e} (root mean "
                            f"square), which no network has; {why}")
        self.sums.setdefault(matrix.group, []).append(MatrixSums(expert if matrix.expert is None else matrix.expert, *total))

    def _unusable(self, source: str, claim: Claim, expert: int | None, rows: range, error: NonFiniteError) -> UserError:
        """The line that names the number of the source that no weight can be made of; `rows` are those that `error` counts from."""
        name, index = source, list(error.index)
        if error.what == "tensor scale":
            name = claim.parts["tensor_scale"]
            count = math.prod(self._plan["tensors"][name]["shape"])
            return self._refusal(name, [expert if expert is not None and count > 1 else 0], error)
        if claim.one_scale and error.what != "weight":
            name, index = claim.scale, [0]
        else:
            if error.what != "weight":
                name, index[0] = claim.scale_of(index[0] + rows[0] // claim.tile[0])
            else:
                index[0] = rows[index[0]]
            index = index[::-1] if claim.transposed else index
            index = index if expert is None else [expert, *index]
        return self._refusal(name, index, error)

    def _refusal(self, name: str, index: list[int], error: NonFiniteError) -> UserError:
        return UserError(f"{self._plan['tensors'][name]['shard']}: {name}{index} is {error.value}, {UNUSABLE}")
