"""SHA-256 (FIPS 180-4) of several streams of bytes at once, on one core, with the processor's SHA instructions.

A hash is a chain: each of the 64 rounds waits for the one before it, four cycles or more on processors that could begin another every
two. hashlib hashes one stream, so that the units stand idle most of the time; rounds of two or three streams in turn fill them. A
converted shard has such streams: the source, the output, and a tensor that passes through. benchmarks/hash_cpu.py measures it.

Where the instructions are missing, `available` says so and callers use hashlib, which gives the same digests. The proof of a release
(stages/verify_release.py) hashes with hashlib always, so that an error here would show.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiled import jit

BLOCK_BYTES = 64
MOST_STREAMS = 3  # at once; the registers hold no more
ROUNDS = 64
AHEAD = 1024  # bytes asked for before their turn: a chain that waits for memory cannot go on with anything else
# The instructions keep the words A..H of a state as two vectors of four, from the lowest lane: F E B A and H G D C.
ORDER = (5, 4, 1, 0, 7, 6, 3, 2)
WORD = ir.IntType(32)
WORDS = ir.VectorType(WORD, 4)


def fractions_of_primes(count: int, root: int) -> list[int]:
    """First 32 bits of the fractional parts of square (root 2) or cube (root 3) roots of the first primes: the constants of FIPS 180-4, 4.2.2 and 5.3.3."""
    primes = [number for number in range(2, 400) if all(number % divisor for divisor in range(2, math.isqrt(number) + 1))][:count]
    result = []
    for prime in primes:
        scaled = prime << 32 * root
        low, high = 0, 1 << 40  # of floor(2^32 prime^(1/root))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if middle**root <= scaled else (low, middle)
        result.append(low & 0xFFFFFFFF)
    return result


INITIAL = fractions_of_primes(8, 2)
CONSTANTS = fractions_of_primes(ROUNDS, 3)


def lanes_of(builder, first, second, lanes):
    """Four of the eight lanes of two vectors."""
    return builder.shuffle_vector(first, second, ir.Constant(WORDS, list(lanes)))


def instruction(builder, name, *operands):
    """One instruction of the processor, by LLVM's name for it."""
    kind = ir.FunctionType(WORDS, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), operands)


def pointer(builder, address, offset, kind):
    """To a value of this LLVM type, `offset` bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), kind.as_pointer())


def loaded(builder, address, offset):
    """Four words at an address that is a multiple of nothing."""
    value = builder.load(pointer(builder, address, offset, WORDS))
    value.align = 1
    return value


def prefetch(builder, address, offset):
    """Asks for a line of memory; an address that is nobody's is passed over."""
    line = pointer(builder, address, offset, ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [line.type, WORD, WORD, WORD])
    reading, all_caches, data = ir.Constant(WORD, 0), ir.Constant(WORD, 3), ir.Constant(WORD, 1)
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [line, reading, all_caches, data])


def stored(builder, value, address, offset):
    """Writes what `loaded` reads."""
    builder.store(value, pointer(builder, address, offset, WORDS), align=1)


def rounds_of_a_block(builder, states, addresses):
    """64 rounds on 64 bytes at each address, four of each stream in turn; states are pairs of vectors."""
    for address in addresses:
        prefetch(builder, address, AHEAD)
    states, messages = [list(state) for state in states], [[] for _ in addresses]
    for step in range(ROUNDS // 4):
        constants = ir.Constant(WORDS, CONSTANTS[4 * step:4 * step + 4])
        for state, message, address in zip(states, messages, addresses):
            if step < 4:
                word = instruction(builder, "bswap.v4i32", loaded(builder, address, 16 * step))
            else:
                before = message[-4:]
                word = instruction(builder, "x86.sha256msg1", before[0], before[1])
                word = builder.add(word, lanes_of(builder, before[2], before[3], (1, 2, 3, 4)))
                word = instruction(builder, "x86.sha256msg2", word, before[3])
            message.append(word)
            mixed = builder.add(word, constants)
            state[1] = instruction(builder, "x86.sha256rnds2", state[1], state[0], mixed)
            state[0] = instruction(builder, "x86.sha256rnds2", state[0], state[1], lanes_of(builder, mixed, mixed, (2, 3, 0, 1)))
    return states


def compressor(streams):
    """The loop over blocks for a number of streams: code for LLVM, written once for each when its kernel is compiled."""

    @intrinsic
    def compress(typingctx, places, blocks):
        def generate(context, builder, signature, arguments):
            table, count = arguments
            places = [builder.load(pointer(builder, table, 8 * number, ir.IntType(64))) for number in range(2 * streams)]
            base, addresses = places[:streams], places[streams:]
            states = [[cgutils.alloca_once(builder, WORDS) for _ in range(2)] for _ in range(streams)]
            for stream in range(streams):
                for half in range(2):
                    builder.store(loaded(builder, base[stream], 16 * half), states[stream][half])
            with cgutils.for_range(builder, count) as loop:
                offset = builder.mul(loop.index, ir.Constant(loop.index.type, BLOCK_BYTES))
                begun = [[builder.load(half) for half in state] for state in states]
                done = rounds_of_a_block(builder, begun, [builder.add(address, offset) for address in addresses])
                for state, old, new in zip(states, begun, done):
                    for half in range(2):
                        builder.store(builder.add(old[half], new[half]), state[half])
            for stream in range(streams):
                for half in range(2):
                    stored(builder, builder.load(states[stream][half]), base[stream], 16 * half)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return compress


compress_one, compress_two, compress_three = (compressor(streams) for streams in range(1, MOST_STREAMS + 1))


@jit
def one(places, blocks):
    """Adds `blocks` blocks to a state, in place. places: int64 [2], the addresses of the state, uint32 [8], and of the blocks."""
    compress_one(places.ctypes.data, blocks)


@jit
def two(places, blocks):
    """`one` for two streams; the addresses of both states come first."""
    compress_two(places.ctypes.data, blocks)


@jit
def three(places, blocks):
    """`one` for three streams."""
    compress_three(places.ctypes.data, blocks)


KERNELS = (one, two, three)


@functools.cache
def available() -> bool:
    """Whether this processor has the instructions and numba compiles for it as it is (not for NUMBA_CPU_NAME)."""
    features = get_host_cpu_features()
    return bool(features.get("sha") and features.get("sse4.1")) and not (numba.config.CPU_NAME or numba.config.CPU_FEATURES)


def address_of(array: np.ndarray) -> int:
    """Where an array's memory begins; `array.ctypes.data` takes three times as long."""
    return array.__array_interface__["data"][0]


def load() -> None:
    """Loads the kernels, or compiles them, before they are needed."""
    digests, data = [Sha256() for _ in KERNELS], np.zeros(BLOCK_BYTES, np.uint8)
    for streams, kernel in enumerate(KERNELS, 1):
        kernel(np.array([digest.place for digest in digests[:streams]] + [address_of(data)] * streams), 1)


class Sha256:
    """Like hashlib.sha256(), for `update_together`."""

    def __init__(self):
        self.state = np.array([INITIAL[word] for word in ORDER], np.uint32)
        self.place = address_of(self.state)
        self.rest = b""  # less than a block
        self.size = 0  # bytes so far

    def begin(self, data) -> np.ndarray:
        """Adds all of uint8 [n] but its whole blocks, which are returned and are the caller's to compress."""
        self.size += len(data)
        if self.rest:
            missing = min(BLOCK_BYTES - len(self.rest), len(data))
            self.rest, data = self.rest + data[:missing].tobytes(), data[missing:]
            if len(self.rest) < BLOCK_BYTES:
                return data
            block, self.rest = np.frombuffer(self.rest, np.uint8), b""
            one(np.array([self.place, address_of(block)]), 1)
        whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
        self.rest = data[whole:].tobytes()
        return data[:whole]

    def update(self, data) -> None:
        """Adds bytes."""
        update_together([(self, data)])

    def hexdigest(self) -> str:
        """64 hexadecimal digits of what was added so far."""
        end = Sha256()
        end.state[:], padding = self.state, b"\x80" + bytes((55 - self.size) % BLOCK_BYTES) + (8 * self.size).to_bytes(8, "big")
        end.update(self.rest + padding)
        words = np.empty(8, ">u4")
        words[list(ORDER)] = end.state
        return words.tobytes().hex()


def update_together(updates: list) -> None:
    """Adds bytes to several digests in one go, three at a time; without the interpreter lock while it works.

    Args:
        updates: pairs of a digest and anything with bytes; a digest at most once.
    """
    waiting = []  # [state's address, data's address, blocks]; `updates` keeps the memory
    for digest, data in updates:
        blocks = digest.begin(np.frombuffer(data, np.uint8))
        if len(blocks):
            waiting.append([digest.place, address_of(blocks), len(blocks) // BLOCK_BYTES])
    while waiting:
        waiting.sort(key=lambda entry: -entry[2])
        now = waiting[:MOST_STREAMS]
        fewest = now[-1][2]
        KERNELS[len(now) - 1](np.array([entry[0] for entry in now] + [entry[1] for entry in now]), fewest)
        for entry in now:
            entry[1] += fewest * BLOCK_BYTES
            entry[2] -= fewest
        waiting = [entry for entry in waiting if entry[2]]
