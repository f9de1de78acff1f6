"""MXFP4 on one CPU core with numba and LLVM's own vector types; 32 lanes, one block at a time.

Every block, whatever its source, takes the same steps:

    e0        from the bits of its largest magnitude, by integer arithmetic
    change    mse only: is a neighbour of e0 better? From exponent b to b + 1 the squared error, in units of 4^b, grows by
                  sum of max(0, r - 1/4) over x < 2   less   4 sum of max(0, x - 7)        x = |w| 2^-b <= 10, r = |x - round(x)|
              because the two grids differ below 2 and above 7 only. Float32's bits count both terms in whole ulps, of 2^-25 and
              2^-21, so the sums are exact in int32. One comparison is enough: e0 + 1 can win only where the largest x for b = e0
              exceeds 7, and e0 - 1 only where that for b = e0 - 1 is below 8.9375: above, the second term alone is 31/4, the
              most that the other 31 weights can bring in the first. Blocks in between keep e0
    codes     how many of the seven midpoints a magnitude has passed
    sums      of w^2, (w - w_hat)^2 and w_hat^2. w - w_hat is exact in float32 (w_hat lies within a factor of two of w, or is 0).
              Squares are added in float64, those of w and w - w_hat from block-FP8 in float32 first, 8 per lane, scaled by a
              power of two so that none leaves float32's range: relative error at most 6e-7. Those of w_hat from block-FP8 are whole
              numbers below 256 times 4^e / 4, added as such for each e: exact

Block-FP8. All codes of a tile share one scale, so a tile has 127 magnitudes |w| = float32(code) * scale, rounded to float32,
in the order of their codes; 2^octave is the scale's own power of two. Tables per tile give b by code, and per exponent the
codes at which the seven midpoints are passed: `codes` compares bytes. A row of the matrix goes through three loops
(exponents, changes, bytes), because a branch on what a block needs, taken at random, costs more than reading the row from
the cache again. The processor's vector units are what limits the third loop, so it is their instructions that count there.

BF16, F16 and F32 weights, `importance`, and tiles too small to pay for tables come as float32 row panels.

Why vectors by hand: numba's own loops over 32 bytes with a decision for each block do not become vector instructions, and
lookups in tables per weight reached 0.5 GB/s. LLVM maps 32 lanes to what the machine has; the order of every sum is written
down here, so statistics do not depend on the machine either. All kernels are in one file because numba's cache on disk notices
a change of the file that a kernel is in, and of no other; the host side is kernels/mxfp4/cpu.py.
"""

from __future__ import annotations

import operator

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

from kernels.compiled import jit

BLOCK = 32
MSE, FLOOR, EVEN, RCEIL = range(4)
SPAN = 4  # blocks of one tile whose squares are added in float32 before float64 takes over
OCTAVES = 24  # e4m3 spans 18 octaves of e0, and e runs one past either end
ZERO_BLOCK = OCTAVES - 1  # row of the tables for blocks of zeros, which belong to no octave
OPEN, LOW = 64, 32  # added to a block's exponent index b: b + 1 may be better; b is e0 - 1
REFUSED = -1
TABLE_SCALES = 2.0**-117, 2.0**112  # with a tile scale outside a tensor goes through panels: here all |w| > 0 are normal float32
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
POWER = 2.0 ** np.arange(-160, 161)  # POWER[e + 160] is 2^e; a call of ldexp costs as much as half a block
LESS = -(2.0 ** np.arange(-160, 128)).astype(np.float32)  # LESS[e + 160] is -2^e
LOWEST = 128  # no exponent of a block, nor its tile's lowest, is below -LOWEST


# --- Vectors ----------------------------------------------------------------------------------------------------------


class Vector(types.Type):
    """`lanes` elements in the machine's vector registers; numba code passes it around like a number."""

    def __init__(self, element, lanes):
        self.element, self.lanes = element, lanes
        super().__init__(f"vector({element}, {lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """LLVM's type of a Vector."""

    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.element).get_value_type(), vector.lanes))


U8, U16, U32, I64, F32, F64 = types.uint8, types.uint16, types.uint32, types.int64, types.float32, types.float64
INDEX = ir.IntType(32)


def shuffled(builder, vector, lanes):
    """The given lanes of a vector, in that order."""
    mask = ir.Constant(ir.VectorType(INDEX, len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def at(context, builder, signature, args):
    """Pointer to element args[1] of the array args[0], as a pointer to the vector of `signature`."""
    vector = signature.args[2] if len(signature.args) == 3 else signature.return_type
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), context.get_value_type(vector).as_pointer())


def halves(builder, vector):
    """The lower and the upper half of a vector's lanes."""
    width = vector.type.count // 2
    return shuffled(builder, vector, range(width)), shuffled(builder, vector, range(width, 2 * width))


@intrinsic
def load(typingctx, array, index):
    """32 elements of a contiguous array from `index` on."""

    def generate(context, builder, signature, args):
        value = builder.load(at(context, builder, signature, args))
        value.align = array.dtype.bitwidth // 8
        return value

    return Vector(array.dtype, BLOCK)(array, index), generate


@intrinsic
def store(typingctx, array, index, vector):
    """Writes a vector to a contiguous array from `index` on."""

    def generate(context, builder, signature, args):
        builder.store(args[2], at(context, builder, signature, args)).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.none(array, index, vector), generate


def define_fill(lanes):
    """`lanes` times the same number."""

    @intrinsic
    def fill(typingctx, number):
        def generate(context, builder, signature, args):
            vector = context.get_value_type(signature.return_type)
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[0], ir.Constant(INDEX, 0))
            return shuffled(builder, first, [0] * lanes)

        return Vector(number, lanes)(number), generate

    return fill


fill, eight = define_fill(BLOCK), define_fill(8)  # eight float64, or eight times the same four bytes


def define_operator(symbol, of_integers, of_floats):
    """Gives vectors of one type an operator, from builder methods for integers and floats (None where there is none)."""

    @intrinsic
    def emit(typingctx, a, b):
        method = of_floats if isinstance(a.element, types.Float) else of_integers
        return a(a, b), lambda context, builder, signature, args: getattr(builder, method)(*args)

    @overload(symbol, jit_options={"forceinline": True})
    def apply(a, b):
        if isinstance(a, Vector) and a == b:
            return lambda a, b: emit(a, b)


define_operator(operator.add, "add", "fadd")
define_operator(operator.sub, "sub", "fsub")
define_operator(operator.mul, "mul", "fmul")
define_operator(operator.and_, "and_", None)
define_operator(operator.or_, "or_", None)
define_operator(operator.lshift, "shl", None)
define_operator(operator.rshift, "lshr", None)


def larger(builder, a, b, relation=">"):
    """Lane by lane; neither is NaN."""
    is_float = isinstance(a.type.element if isinstance(a.type, ir.VectorType) else a.type, ir.FloatType)
    return builder.select((builder.fcmp_ordered if is_float else builder.icmp_unsigned)(relation, a, b), a, b)


@intrinsic
def maximum(typingctx, a, b):
    """The larger of two vectors, lane by lane."""
    return a(a, b), lambda context, builder, signature, args: larger(builder, *args)


@intrinsic
def minimum(typingctx, a, b):
    """The smaller of two vectors, lane by lane."""
    return a(a, b), lambda context, builder, signature, args: larger(builder, *args, relation="<")


def define_comparison(relation):
    """-1 in the lanes where the relation holds, else 0; integers as wide as what is compared, which counts as signed."""

    @intrinsic
    def compare(typingctx, a, b):
        def generate(context, builder, signature, args):
            is_float = isinstance(a.element, types.Float)
            found = (builder.fcmp_ordered if is_float else builder.icmp_signed)(relation, args[0], args[1])
            return builder.sext(found, context.get_value_type(signature.return_type))

        return Vector(U32 if a.element == F32 else a.element, a.lanes)(a, b), generate

    return compare


above = define_comparison(">")
reached = define_comparison(">=")


@intrinsic
def magnitude(typingctx, a):
    """|a| of a float32 vector."""

    def generate(context, builder, signature, args):
        whole = ir.VectorType(ir.IntType(32), a.lanes)
        bits = builder.and_(builder.bitcast(args[0], whole), ir.Constant(whole, [0x7FFFFFFF] * a.lanes))
        return builder.bitcast(bits, args[0].type)

    return a(a), generate


def define_reduction(combine):
    """Folds halves onto each other until one lane is left: lane i meets lane i + 16, then i + 8, ..."""

    @intrinsic
    def reduce(typingctx, a):
        def generate(context, builder, signature, args):
            value = args[0]
            while value.type.count > 1:
                value = combine(builder, *halves(builder, value))
            return builder.extract_element(value, ir.Constant(INDEX, 0))

        return a.element(a), generate

    return reduce


largest = define_reduction(larger)
total = define_reduction(lambda builder, a, b: builder.fadd(a, b))
count = define_reduction(lambda builder, a, b: builder.add(a, b))


def fused(builder, a, b, c):
    """a * b + c, rounded once, also where the machine has no instruction for it: sums are the same everywhere."""
    bits = 64 if isinstance(a.type.element, ir.DoubleType) else 32
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f{bits}")
    return builder.call(function, [a, b, c])


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a * b + c, rounded once."""
    return c(a, b, c), lambda context, builder, signature, args: fused(builder, *args)


@intrinsic
def fold(typingctx, a):
    """Half as many lanes: lane i of the upper half is added to lane i."""
    half = Vector(a.element, a.lanes // 2)
    return half(a), lambda context, builder, signature, args: builder.fadd(*halves(builder, args[0]))


def define_conversion(method, element, lanes=BLOCK):
    """Converts a vector with a method of LLVM's builder."""

    @intrinsic
    def convert(typingctx, a):
        kind = Vector(element, lanes)
        return kind(a), lambda context, builder, signature, args: getattr(builder, method)(args[0], context.get_value_type(kind))

    return convert


widen_to_64 = define_conversion("fpext", F64, 8)
bits_of = define_conversion("bitcast", U32)
as_bytes = define_conversion("bitcast", U8)
as_pairs = define_conversion("bitcast", U16, BLOCK // 2)
narrow = define_conversion("trunc", U8)
number = define_conversion("sitofp", F32)


@intrinsic
def high_bytes(typingctx, v):
    """uint16 with the bytes as their upper halves, in the order in which x86 puts them into its registers with one instruction each."""

    def generate(context, builder, signature, args):
        order = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
        zero = ir.Constant(args[0].type, [0] * v.lanes)
        mask = ir.Constant(ir.VectorType(INDEX, 2 * v.lanes), [place for lane in order for place in (lane, v.lanes + lane)])
        return builder.bitcast(builder.shuffle_vector(zero, args[0], mask), context.get_value_type(signature.return_type))

    return Vector(U16, v.lanes)(v), generate


@intrinsic
def half_precision(typingctx, bits):
    """float32 values of non-negative finite IEEE float16 bits.

    One instruction on nearly all machines, for which subnormals cost nothing, unlike for a multiplication: that is why small formats
    go through it. Where LLVM would call a library that numba does not bring, the bits move to float32's place and are scaled.
    """

    def generate(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type)
        triple, _, features = context.codegen().magic_tuple()
        if "+f16c" in features.split(",") or triple.startswith(("aarch64", "arm64")):
            return builder.fpext(builder.bitcast(args[0], ir.VectorType(ir.HalfType(), bits.lanes)), kind)
        wide = ir.VectorType(ir.IntType(32), bits.lanes)
        moved = builder.shl(builder.zext(args[0], wide), ir.Constant(wide, [13] * bits.lanes))
        return builder.fmul(builder.bitcast(moved, kind), ir.Constant(kind, [2.0**112] * bits.lanes))

    return Vector(F32, bits.lanes)(bits), generate


@intrinsic
def fold_pairs(typingctx, pairs):
    """uint16 pairs of nibbles, even column low, to bytes."""

    def generate(context, builder, signature, args):
        four = ir.Constant(args[0].type, [4] * pairs.lanes)
        return builder.trunc(builder.or_(args[0], builder.lshr(args[0], four)), context.get_value_type(signature.return_type))

    return Vector(U8, pairs.lanes)(pairs), generate


@intrinsic
def add_squares(typingctx, sums, v):
    """Adds the squares of a float32 vector to sums of fewer lanes, float32 or float64: lane i to i modulo their number."""

    def generate(context, builder, signature, args):
        value, kind = args[0], context.get_value_type(sums)
        for begin in range(0, v.lanes, sums.lanes):
            part = shuffled(builder, args[1], range(begin, begin + sums.lanes))
            part = builder.fpext(part, kind) if sums.element == F64 else part
            value = fused(builder, part, part, value)
        return value

    return sums(sums, v), generate


def define_no_sums(element, lanes):
    """Sums of nothing."""

    @intrinsic
    def no_sums(typingctx):
        kind = Vector(element, lanes)
        return kind(), lambda context, builder, signature, args: ir.Constant(context.get_value_type(kind), [0.0] * lanes)

    return no_sums


no_sums, no_short_sums = define_no_sums(F64, 8), define_no_sums(F32, 16)


def has_avx2(context):
    """Whether code is made for a processor with x86's instructions on 32 bytes."""
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")


def call(builder, name, result, *operands):
    """One of LLVM's intrinsics."""
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [part.type for part in operands]), name), operands)


@intrinsic
def squares(typingctx, code):
    """Four times the squared values of E2M1 codes (0-7): whole numbers below 256, so a byte each."""

    def generate(context, builder, signature, args):
        kind, table = args[0].type, [int(4 * value * value) for value in VALUES]
        if has_avx2(context):
            return call(builder, "llvm.x86.avx2.pshuf.b", kind, ir.Constant(kind, (table + [0] * 8) * 2), args[0])
        result = ir.Constant(kind, [0] * code.lanes)
        for value in range(1, 8):
            found = builder.icmp_unsigned("==", args[0], ir.Constant(kind, [value] * code.lanes))
            result = builder.select(found, ir.Constant(kind, [table[value]] * code.lanes), result)
        return result

    return code(code), generate


@intrinsic
def add_bytes(typingctx, array, index, v):
    """Adds a vector of uint8 to four int64 of an array from `index` on, which share the sum between them."""
    four = Vector(I64, 4)

    def generate(context, builder, signature, args):
        kind = context.get_value_type(four)
        if has_avx2(context):
            part = call(builder, "llvm.x86.avx2.psad.bw", kind, args[2], ir.Constant(args[2].type, [0] * v.lanes))
        else:
            part = builder.zext(args[2], ir.VectorType(ir.IntType(64), v.lanes))
            while part.type.count > 4:
                part = builder.add(*halves(builder, part))
        place = at(context, builder, types.none(array, index, four), args)
        before = builder.load(place)
        before.align = 8
        builder.store(builder.add(before, part), place).align = 8
        return context.get_dummy_value()

    return types.none(array, index, v), generate


inline = numba.njit(forceinline=True, boundscheck=False)


# --- One block --------------------------------------------------------------------------------------------------------


@inline
def power(e):
    """2^e in float64, for |e| up to 160."""
    return POWER[np.uint64(e + 160)]


@inline
def exponent_of(bits, rule):
    """Exponent of a block under a rule that looks at amax alone, e0 for mse; from amax's float32 bits.

    A subnormal amax counts as 2^-127 here, which is too much, but every rule ends at -127 there anyway.
    """
    e = np.int64(bits >> 23) - 129
    mantissa = bits & 0x7FFFFF
    if (rule == EVEN and mantissa >= 0x600000) or (rule == RCEIL and mantissa > 0x400000):
        e += 1
    return -127 if bits == 0 else max(e, -127)


@inline
def undecided(bits):
    """From amax's float32 bits under mse: OPEN where e0 + 1 may be better than e0, OPEN + LOW where e0 - 1 may be, else 0.

    x = 4 * mantissa of amax for b = e0, so x > 7 where the mantissa exceeds 1.75, and below 8.9375 / 2 where it is below
    1.1171875. Up to 2^-124 e0 is -127, the least there is; below 2^-125 it is so because it was clamped, and x < 4.
    """
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if exponent >= 2 and mantissa > 0x600000:
        return OPEN
    return OPEN + LOW if exponent > 2 and mantissa < 0xF0000 else 0


@inline
def floats(x):
    """A vector of the float32 nearest to a constant."""
    return fill(np.float32(x))


@inline
def step_up(x, low):
    """1 where exponent b + 1 is better than b, else 0, by x = |w| 2^-b <= 10; among equals e0 is, which is b + 1 if `low`."""
    near = minimum(x, floats(2.0))
    r = magnitude(near - ((near + floats(8388608.0)) - floats(8388608.0)))  # adding 2^23 rounds to an integer
    lost = count(bits_of(maximum(r, floats(0.25))) - fill(np.uint32(0x3E800000)))  # bits of .25 to .5 count 2^-25
    gained = count(bits_of(maximum(x - floats(3.0), floats(4.0))) - fill(np.uint32(0x40800000)))  # those of 4 to 8: 2^-21
    difference = np.int64(lost) - 64 * np.int64(gained)
    return np.int64(difference < 0 or (difference == 0 and low))


@jit
def value_of(x):
    """The E2M1 value nearest to x >= 0, ties to the even code, saturating."""
    code = 0
    for i in range(7):
        if x > MIDPOINTS[i] or (x == MIDPOINTS[i] and i & 1):
            code = i + 1
    return VALUES[code]


@jit
def weighted_change(block, e0, importance, first):
    """The mse rule's decision for 32 magnitudes with importance: float64 sums in the reference's stated order."""
    same = up = down = 0.0
    for j in range(BLOCK):
        u, factor = np.float64(block[j]) * power(-e0), np.float64(importance[first + j])
        q = value_of(u)
        same += factor * (q * q - 2.0 * u * q)
        q = 2.0 * value_of(0.5 * u)
        up += factor * (q * q - 2.0 * u * q)
        q = 0.5 * value_of(2.0 * u)
        down += factor * (q * q - 2.0 * u * q)
    change = 0
    if up < same:
        change, same = 1, up
    if down < same and e0 > -127:
        change = -1
    return change


@inline
def write_block(code, signs, at, packed):
    """Packs 32 codes (0-7) with their signs (bit 3) as block `at` of flat `packed`."""
    store(packed, at << np.uint64(4), fold_pairs(as_pairs(code | signs)))


# --- Block-FP8 --------------------------------------------------------------------------------------------------------


@inline
def magnitudes(source, begin):
    """Code magnitudes of the block at `begin`."""
    return load(source, begin) & fill(np.uint8(127))


@inline
def decoded(codes, unit):
    """float32(code) * scale * 2^-n from code magnitudes, rounded once. unit: the tile's scale * 2^(8 - n).

    Code bits moved to a float16's exponent and mantissa make the code's value * 2^-8, subnormal codes included. In the order of
    `high_bytes`.
    """
    return half_precision(high_bytes(codes) >> fill(np.uint16(1))) * floats(unit)


@inline
def nearest(code):
    """float32 values of E2M1 codes (0-7) * 2^-14, in the order of `high_bytes`."""
    return half_precision(high_bytes(code + code))


@jit
def fill_exponents(exponent, bits, lowest, rule):
    """exponent[tile, code] = index of b above lowest[tile] by a block's largest code, with OPEN and LOW; or REFUSED."""
    for t in range(len(lowest)):
        lowest[t] = exponent_of(bits[t, 1], FLOOR) - 1
        exponent[t, 0] = ZERO_BLOCK
        for code in range(1, 128):
            if bits[t, code] >= 0x7F800000:
                exponent[t, code] = REFUSED
                continue
            exponent[t, code] = exponent_of(bits[t, code], rule) - lowest[t]
            if rule == MSE:
                more = undecided(bits[t, code])
                exponent[t, code] += more - (more & LOW) // LOW


@jit
def fill_last(last, begin, weight, t, e, scale):
    """last[begin + i] = four times the largest code that does not pass midpoint i under exponent e, 126 if none does."""
    for i in range(7):
        middle = MIDPOINTS[i] * power(e)
        # near the code: e4m3's exponent and mantissa in the bits of float32, or whole multiples of its smallest number
        near = np.float32(middle / scale)
        code = min(126, (np.int64(near.view(np.uint32)) >> 20) - 960 if near >= np.float32(2.0**-6) else np.int64(near * np.float32(512.0)))
        while code < 126 and not passes(weight[t, code + 1], middle, i):
            code += 1
        while passes(weight[t, code], middle, i):
            code -= 1
        last[begin + i] = code * 0x01010101


@inline
def passes(w, middle, i):
    """Whether a magnitude is rounded up at midpoint i, given scaled."""
    return w > middle or (w == middle and i & 1)


@inline
def find_exponents(source, begin, blocks, shift, exponent, chosen, open_blocks):
    """Loop 1: chosen[block] = index of b, with LOW; lists the blocks that are OPEN. Their number, -1 if a weight is not finite."""
    found = 0
    for block in range(blocks):
        top = largest(magnitudes(source, begin + np.uint64(BLOCK * block)))
        k = exponent[np.uint64(block) >> shift, top]
        if k < 0:
            return -1
        chosen[block] = k & (OPEN - 1)
        open_blocks[found] = block
        found += k // OPEN
    return found


@inline
def decide_exponents(source, begin, shift, lowest, unit, octave, chosen, open_blocks):
    """Loop 2, mse only: of the listed blocks, those rise to b + 1 for which it is better."""
    for block in open_blocks:
        t, low = np.uint64(block) >> shift, chosen[block] & LOW
        k = chosen[block] - low
        x = decoded(magnitudes(source, begin + np.uint64(BLOCK * block)), np.float32(unit[t] * power(octave[t] - lowest[t] - k)))
        chosen[block] = k + step_up(x, low != 0)


@inline
def write_row(source, begin, blocks, shift, lowest, unit, octave, weight, scale, chosen, last, has_last,
              packed, scales, statistics, square):
    """Loop 3: bytes of a row, and its share of the statistics."""
    signal, error = no_sums(), no_sums()
    zero = fill(np.uint8(0))
    span = SPAN if shift >= np.uint64(2) else 1 << np.int64(shift)
    for first in range(0, blocks, span):
        t = np.uint64(first) >> shift
        signal_of, error_of = no_short_sums(), no_short_sums()
        for block in range(first, min(first + span, blocks)):
            k = np.uint64(chosen[block])
            e = lowest[t] + chosen[block]
            table = t * np.uint64(OCTAVES) + k
            passed = table << np.uint64(3)
            if not has_last[table]:
                fill_last(last, passed, weight, t, e, scale[t])
                has_last[table] = True
            start = begin + np.uint64(BLOCK * block)
            target = start >> np.uint64(5)
            source_codes = load(source, start)
            codes = source_codes & fill(np.uint8(127))
            # each comparison gives -1 where a midpoint is passed
            code = above(codes, as_bytes(eight(last[passed]))) + above(codes, as_bytes(eight(last[passed + np.uint64(1)])))
            code = code + above(codes, as_bytes(eight(last[passed + np.uint64(2)]))) + above(codes, as_bytes(eight(last[passed + np.uint64(3)])))
            code = code + above(codes, as_bytes(eight(last[passed + np.uint64(4)]))) + above(codes, as_bytes(eight(last[passed + np.uint64(5)])))
            code = zero - (code + above(codes, as_bytes(eight(last[passed + np.uint64(6)]))))
            write_block(code, (source_codes >> fill(np.uint8(4))) & fill(np.uint8(8)), target, packed)
            scales[target] = 0 if k == ZERO_BLOCK else e + 127
            w = decoded(codes, unit[t])
            difference = multiply_add(nearest(code), fill(LESS[np.uint64(e - octave[t] + 174)]), w)
            signal_of, error_of = add_squares(signal_of, w), add_squares(error_of, difference)
            add_bytes(square, np.uint64(e + LOWEST) << np.uint64(2), squares(code))
        factor = eight(power(octave[t]) * power(octave[t]))
        signal = multiply_add(factor, widen_to_64(fold(signal_of)), signal)
        error = multiply_add(factor, widen_to_64(fold(error_of)), error)
    statistics[0] += total(signal)
    statistics[1] += total(error)


@jit
def fp8_matrix(source, rows, columns, tile_scale, tile_rows, shift, base, rule, packed, scales, statistics):
    """Convert one matrix, row by row; False if a weight is not finite.

    source, packed, scales: uint8, flat. base: float32 [256], the values of codes. A block's tile is block >> shift.
    """
    blocks, tiles = columns // BLOCK, tile_scale.shape[1]
    weight = np.empty((tiles, 128), np.float32)
    bits = weight.view(np.uint32)
    lowest, octave, unit = np.empty(tiles, np.int64), np.empty(tiles, np.int64), np.empty(tiles, np.float32)
    exponent = np.empty((tiles, 128), np.int8)
    last = np.empty(tiles * OCTAVES * 8, np.uint32)
    has_last = np.empty(tiles * OCTAVES, np.bool_)
    square = np.zeros(4 * 256, np.int64)  # four sums of (2 w_hat 2^-e)^2 for each exponent e, from -LOWEST on
    chosen = np.empty(blocks, np.int8)
    open_blocks = np.empty(blocks + 1, np.int32)
    for row in range(rows):
        if row % tile_rows == 0:
            for t in range(tiles):
                scale = tile_scale[row // tile_rows, t]
                octave[t] = exponent_of(np.float32(scale).view(np.uint32), FLOOR) + 2
                unit[t] = scale * power(8 - octave[t])
                for code in range(128):
                    weight[t, code] = base[code] * scale
            fill_exponents(exponent, bits, lowest, rule)
            has_last[:] = False
        begin = np.uint64(row * columns)
        found = find_exponents(source, begin, blocks, shift, exponent, chosen, open_blocks)
        if found < 0:
            return False
        decide_exponents(source, begin, shift, lowest, unit, octave, chosen, open_blocks[:found])
        write_row(source, begin, blocks, shift, lowest, unit, octave, weight, tile_scale[row // tile_rows], chosen, last, has_last,
                  packed, scales, statistics, square)
    for e in range(256):
        of_exponent = square[4 * e] + square[4 * e + 1] + square[4 * e + 2] + square[4 * e + 3]
        statistics[2] += of_exponent * (power(e - LOWEST) * power(e - LOWEST)) * 0.25
    return True


# --- Floats -----------------------------------------------------------------------------------------------------------


@jit
def float_rows(weight, bits, importance, weighted, rule, packed, scales, statistics):
    """Convert float32 rows [rows, in]; `bits` is the same memory as uint32, packed and scales are flat. False if a weight
    is not finite."""
    rows, columns = weight.shape
    flat, flat_bits = weight.reshape(-1), bits.reshape(-1)
    block_of = np.empty(BLOCK, np.float32)
    for row in range(rows):
        signal, error, square = no_sums(), no_sums(), no_sums()
        for column in range(0, columns, BLOCK):
            start = np.uint64(row * columns + column)
            target = start >> np.uint64(5)
            w, word = magnitude(load(flat, start)), load(flat_bits, start)
            top = largest(word & fill(np.uint32(0x7FFFFFFF)))
            if top >= 0x7F800000:
                return False
            e = exponent_of(top, rule)
            if rule == MSE and top and weighted:
                store(block_of, np.uint64(0), w)
                e += weighted_change(block_of, e, importance, column)
            elif rule == MSE:
                more = undecided(top)
                if more:
                    low = (more & LOW) // LOW
                    e += step_up(w * floats(power(low - e)), low == 1) - low
            u = w * floats(power(-e))
            ones = above(u, floats(0.25)) + reached(u, floats(0.75))
            ones = ones + above(u, floats(1.25)) + reached(u, floats(1.75))
            twos = above(u, floats(2.5)) + reached(u, floats(3.5))
            four = above(u, floats(5.0))
            zero = fill(np.uint32(0))
            code = zero - (ones + twos + four)
            halves = code - (twos + four + four + four)
            write_block(narrow(code), narrow((word >> fill(np.uint32(28))) & fill(np.uint32(8))), target, packed)
            scales[target] = e + 127
            q, step2 = number(halves) * floats(0.5), eight(power(e) * power(e))
            signal = signal + step2 * add_squares(no_sums(), u)
            error = error + step2 * add_squares(no_sums(), u - q)
            square = square + step2 * add_squares(no_sums(), q)
        statistics[0] += total(signal)
        statistics[1] += total(error)
        statistics[2] += total(square)
    return True


# --- Decoding ---------------------------------------------------------------------------------------------------------


@jit
def decode_rows(packed, scale, bits, value_bits, exponent_at):
    """packed uint8 [rows, in/2] -> the bits of floats [rows, in], whose exponent field begins at bit `exponent_at`.

    value * 2^(s - 127) is value's bits with s - 127 added to the exponent field, except for zero and where the sum
    leaves the field (s below 3 or above 252): there float64 arithmetic, rounded once, gives subnormals and infinity.
    """
    rows, half = packed.shape
    table = np.empty(16, value_bits.dtype)
    for row in range(rows):
        for block in range(half // 16):
            s = scale[row, block]
            if 3 <= s <= 252:
                shift = (np.int64(s) - 127) << exponent_at
                for code in range(16):
                    table[code] = value_bits[code, 127] if code & 7 == 0 else value_bits[code, 127] + shift
            else:
                for code in range(16):
                    table[code] = value_bits[code, s]
            for j in range(16):
                byte = packed[row, 16 * block + j]
                bits[row, 32 * block + 2 * j] = table[byte & 15]
                bits[row, 32 * block + 2 * j + 1] = table[byte >> 4]
