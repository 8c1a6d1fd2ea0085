"""Products of eight-bit integers where a CPU multiplies nothing narrower than words (AVX2).

``VPMADDWD`` adds the products of two neighbouring words, twice as many as a multiply-add of float32 does.
Four bytes become two pairs of words, the even bytes and the odd ones, which leaves every sum in the lane
where the instruction for bytes would have it: weights and results are laid out alike on all machines, and
the sums are the same whole numbers. On two Zen 3 cores, the products of 32 rows of a 135M-parameter model
take 44 ms a step, those of bfloat16 79.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from daskllm.engine.kernels.cpu.registers import INT8_COLUMNS, INT8_ROWS, LANES

__all__ = ["dot", "write_tile"]

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_HALVES = 2
_HALF = ir.VectorType(_I32, LANES // _HALVES)
_WORDS = ir.VectorType(_I16, LANES)


def _all(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _pairs(builder: Any, half: Any, signed: bool) -> tuple[Any, Any]:
    """The even and the odd bytes of a vector as words."""
    words = builder.bitcast(half, _WORDS)
    if signed:
        return builder.ashr(builder.shl(words, _all(8)), _all(8)), builder.ashr(words, _all(8))
    return builder.and_(words, _all(255)), builder.lshr(words, _all(8))


def _add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a * b, pair by pair."""
    kind, name = ir.FunctionType(_HALF, [_WORDS] * 2), "llvm.x86.avx2.pmadd.wd"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.add(total, builder.call(function, (a, b)))


def dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each of sixteen lanes' total and the products of its four unsigned with its four signed bytes."""
    lanes = ir.VectorType(_I32, LANES)
    grown = []
    for half in range(_HALVES):
        mask = ir.Constant(_HALF, list(range(half * LANES // 2, (half + 1) * LANES // 2)))
        sums, left, right = (
            builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), mask)
            for one in (total, unsigned, signed)
        )
        for a, b in zip(_pairs(builder, left, False), _pairs(builder, right, True), strict=True):
            sums = _add(builder, sums, a, b)
        grown.append(sums)
    return builder.shuffle_vector(*grown, ir.Constant(lanes, list(range(LANES))))


def write_tile(builder: Any, x: Any, w: Any, quads: Any, minus: Any, out: Any) -> None:
    """Write the instructions of one tile; see `vnni.dot_tile`.

    Rows are split into words once for all channels; then sixteen channels at a time, since that is what the
    registers hold: eight sums, and the words of their weights.
    """
    count = builder.mul(quads, _I64(INT8_ROWS))
    even, odd = (builder.alloca(_I32, size=count) for _ in range(2))
    _split(builder, builder.bitcast(x, _I32.as_pointer()), count, even, odd)
    width = builder.mul(_I64(4), quads)
    for column in range(INT8_COLUMNS):
        place = builder.gep(w, [builder.mul(_I64(LANES * column), width)])
        weights = builder.bitcast(place, _HALF.as_pointer())
        _channels(builder, weights, quads, (even, odd), minus, builder.gep(out, [_I64(LANES * column)]))


def _split(builder: Any, x: Any, count: Any, even: Any, odd: Any) -> None:
    """Even and odd bytes of so many fours as pairs of words."""
    with cgutils.for_range(builder, count) as loop:
        four = builder.load(builder.gep(x, [loop.index]), align=1)

        def byte(number: int, four: Any = four) -> Any:
            """Sign and all, as the low or the high word."""
            wide = builder.ashr(builder.shl(four, _I32(24 - 8 * number)), _I32(24))
            return builder.and_(wide, _I32(0xFFFF)) if number < 2 else builder.shl(wide, _I32(16))

        for first, into in enumerate((even, odd)):
            pair = builder.or_(byte(first), byte(first + 2))
            builder.store(pair, builder.gep(into, [loop.index]))


def _channels(builder: Any, w: Any, quads: Any, rows: tuple[Any, Any], minus: Any, out: Any) -> None:
    """Sixteen channels of all rows."""
    first = [
        _splat(builder, builder.neg(builder.load(builder.gep(minus, [_I64(r)]), align=4)))
        for r in range(INT8_ROWS)
    ]
    before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("k", "end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [[builder.phi(_HALF) for _ in range(_HALVES)] for _ in first]
    at = builder.mul(k, _I64(_HALVES))
    halves = [
        _pairs(builder, builder.load(builder.gep(w, [builder.add(at, _I64(h))]), align=1), False)
        for h in range(_HALVES)
    ]
    grown: list[list[Any]] = []
    for r, totals in enumerate(sums):
        place = builder.add(k, builder.mul(quads, _I64(r)))
        for part, words in enumerate(rows):
            pair = _splat(builder, builder.load(builder.gep(words, [place]), align=4))
            pair = builder.bitcast(pair, _WORDS)
            totals = [
                _add(builder, total, half[part], pair) for total, half in zip(totals, halves, strict=True)
            ]
        grown.append(totals)
    following = builder.add(k, _I64(1))
    k.add_incoming(_I64(0), before)
    k.add_incoming(following, loop)
    for r, totals in enumerate(sums):
        for phi, new in zip(totals, grown[r], strict=True):
            phi.add_incoming(first[r], before)
            phi.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, quads), loop, after)
    builder.position_at_end(after)
    for r, totals in enumerate(grown):
        line = builder.gep(out, [_I64(r * INT8_COLUMNS * LANES)])
        into = builder.bitcast(line, _HALF.as_pointer())
        for h, total in enumerate(totals):
            builder.store(total, builder.gep(into, [_I64(h)]), align=4)


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_HALF, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, scalar, _I32(0)), undefined, ir.Constant(_HALF, [0] * (LANES // 2))
    )
