"""What every backend raises for a number that no weight can be made of. Imports nothing."""


class NonFiniteError(ValueError):
    """A number that MXFP4 cannot hold.

    Attributes:
        what: "weight" (NaN, infinite, or overflowing float32 when decoded), "tile scale" (NaN, infinite, zero or negative)
            or "block scale" (E8M0 byte 255, which means NaN).
        index: position of the first offending element of that tensor, in row-major order.
        value: what stands there, None if unknown.
    """

    def __init__(self, what: str, index: tuple[int, ...], value: float | None = None):
        self.what, self.index, self.value = what, tuple(int(i) for i in index), value
        shown = "" if value is None else f": {value}"
        super().__init__(f"{what} at index {self.index} is not usable{shown}")

    def __reduce__(self):  # worker processes send it back by pickle, which would call __init__ with the message
        return type(self), (self.what, self.index, self.value)
