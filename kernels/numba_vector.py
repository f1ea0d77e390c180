"""Vectors of 16 channels inside numba functions: what the compiled CPU kernels are written in.

One value of type `Vector` is one LLVM vector, so nothing depends on what a vectoriser makes of a loop: AVX-512 holds 16
float32 in one register, AVX2 in two, NEON in four, and LLVM cuts it accordingly. Products followed by sums may become
fused multiply-adds; nothing else is reordered, so a sum has the order that it is written in.
"""

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numba.np import arrayobj

LANES = 16
# No float is reordered and nothing is checked or raised; no entry from Python is needed.
COMPILED = {"nogil": True, "error_model": "numpy", "boundscheck": False, "no_cpython_wrapper": True}
LN2 = math.log(2.0)
_MAY_FUSE = ("contract",)


class Vector(types.Type):
    """16 numbers of one floating type."""

    def __init__(self, real: types.Float) -> None:
        self.real = real
        super().__init__(f"Vector({real})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        number = manager.lookup(vector.real).get_value_type()
        super().__init__(manager, vector, ir.VectorType(number, LANES))


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = LANES) -> ir.Value:
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, empty, everywhere)


def _constant(like: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(like, [value] * like.count)


def _arithmetic(operation: Any, name: str) -> None:
    @type_callable(operation)
    def typing(context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            return a if isinstance(a, Vector) and a == b else None

        return typer

    @lower_builtin(operation, Vector, Vector)
    def lower(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return getattr(builder, name)(*arguments, flags=_MAY_FUSE)


for _operation, _name in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_operation, _name)


@intrinsic
def splat(typingctx, number):
    """A vector with one number in all lanes."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return Vector(number)(number), generate


@intrinsic
def load(typingctx, array, index):
    """The vector that begins at an element (a tuple of indices) of a contiguous array."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def generate(context, builder, signature, arguments):
        return builder.load(_address(context, builder, signature, arguments), align=_alignment(array))

    return Vector(array.dtype)(array, index), generate


@intrinsic
def store(typingctx, array, index, vector):
    """Write a vector to the elements that begin at an index of a contiguous array."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _address(context, builder, signature, arguments), align=_alignment(array))
        return context.get_dummy_value()

    return types.void(array, index, vector), generate


def _alignment(array: types.Array) -> int:
    return array.dtype.bitwidth // 8


def _address(context, builder, signature, arguments):
    array_type, index_type = signature.args[:2]
    array = context.make_array(array_type)(context, builder, arguments[0])
    indices = cgutils.unpack_tuple(builder, arguments[1], count=index_type.count)
    indices = [context.cast(builder, i, t, types.intp) for i, t in zip(indices, index_type.types, strict=True)]
    element = cgutils.get_item_pointer(context, builder, array_type, array, indices, wraparound=False)
    number = context.get_data_type(array_type.dtype)
    return builder.bitcast(element, ir.VectorType(number, LANES).as_pointer())


@intrinsic
def array_at(typingctx, address, shape, number):
    """The contiguous array of a shape, of the type of `number`, that lies at an address."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], context.get_data_type(number).as_pointer())
        made = context.make_array(signature.return_type)(context, builder)
        extents = cgutils.unpack_tuple(builder, arguments[1], count=shape.count)
        size = ir.Constant(ir.IntType(64), number.bitwidth // 8)
        strides = [size]
        for extent in reversed(extents[1:]):
            strides.insert(0, builder.mul(strides[0], extent))
        arrayobj.populate_array(made, pointer, extents, strides, size, None)
        return made._getvalue()

    return types.Array(number, shape.count, "C")(address, shape, number), generate


@intrinsic
def fetch_add(typingctx, address):
    """Add one to the 64-bit integer at an address, atomically; returns what it was before."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(address), generate


@intrinsic
def call_for_number(typingctx, address):
    """What the C function `int f(void)` at an address returns."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        number = builder.call(builder.inttoptr(arguments[0], function), [])
        return builder.sext(number, ir.IntType(64))

    return types.int64(address), generate


# 2^f = 1 + f q(f) for |f| <= 1/2: in float32 the q of least relative error (9e-8), in float64 the Taylor series. Exact
# at f = 0, so that the decay of states that are hardly forgotten does not drift.
_EXP2 = {
    types.float32: (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957,
                    0.001326472731307149),
    types.float64: tuple(LN2**k / math.factorial(k) for k in range(1, 14)),
}  # fmt: skip
# Mantissa bits, and the smallest exponent of a normal number.
_LAYOUT = {types.float32: (23, -126.0), types.float64: (52, -1022.0)}
# atanh(z) / z as a series in z^2 <= 1/9.
_ATANH = {
    types.float32: tuple(1 / (2 * k + 1) for k in range(8)),
    types.float64: tuple(1 / (2 * k + 1) for k in range(18)),
}


def _polynomial(builder, x, coefficients):
    value = _constant(x.type, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = _multiply_add(builder, value, x, _constant(x.type, c))
    return value


def _multiply_add(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=_MAY_FUSE), c, flags=_MAY_FUSE)


def _largest(builder, x, least):
    # NaN stays NaN.
    return builder.select(builder.fcmp_ordered("<", x, least), least, x)


def _exp2(builder, real, x):
    mantissa, least = _LAYOUT[real]
    whole = ir.VectorType(ir.IntType(real.bitwidth), LANES)
    x = _largest(builder, x, _constant(x.type, least))
    # Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the lowest bits.
    magic = _constant(x.type, 1.5 * 2.0**mantissa)
    rounded = builder.fadd(x, magic)
    f = builder.fsub(x, builder.fsub(rounded, magic))
    value = _multiply_add(builder, f, _polynomial(builder, f, _EXP2[real]), _constant(x.type, 1.0))
    exponent = builder.shl(builder.bitcast(rounded, whole), ir.Constant(whole, [mantissa] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(value, whole), exponent), x.type)


@intrinsic
def exp2(typingctx, vector):
    """Two to the power of numbers not above 0; below the smallest normal number it stays there."""

    def generate(context, builder, signature, arguments):
        return _exp2(builder, vector.real, arguments[0])

    return vector(vector), generate


@intrinsic
def softplus(typingctx, vector):
    """log(1 + exp(v)) = max(v, 0) + 2 atanh(e / (2 + e)) with e = exp(-|v|): exact for small e, where 1 + e is not."""

    def generate(context, builder, signature, arguments):
        real, v = vector.real, arguments[0]
        zero, two = _constant(v.type, 0.0), _constant(v.type, 2.0)
        e = _exp_of_minus_magnitude(builder, real, v)
        z = builder.fdiv(e, builder.fadd(e, two))
        series = _polynomial(builder, builder.fmul(z, z), _ATANH[real])
        return _multiply_add(builder, builder.fmul(z, two), series, _largest(builder, v, zero))

    return vector(vector), generate


@intrinsic
def sigmoid(typingctx, vector):
    """1 / (1 + exp(-v)), the slope of softplus."""

    def generate(context, builder, signature, arguments):
        v = arguments[0]
        one = _constant(v.type, 1.0)
        e = _exp_of_minus_magnitude(builder, vector.real, v)
        negative = builder.fcmp_ordered("<", v, _constant(v.type, 0.0))
        return builder.fdiv(builder.select(negative, e, one), builder.fadd(e, one))

    return vector(vector), generate


def _exp_of_minus_magnitude(builder, real, v):
    negative = builder.fcmp_ordered("<", v, _constant(v.type, 0.0))
    minus = builder.select(negative, v, builder.fsub(_constant(v.type, 0.0), v))
    return _exp2(builder, real, builder.fmul(minus, _constant(v.type, 1 / LN2)))


@intrinsic
def row_sums(typingctx, array, index):
    """For 16 rows of 16 numbers that begin at an index of an array: the vector of their sums, in one fixed order."""

    def generate(context, builder, signature, arguments):
        first = _address(context, builder, signature, arguments)
        rows = [builder.gep(first, [ir.Constant(ir.IntType(32), i)]) for i in range(LANES)]
        rows = [builder.load(row, align=_alignment(array)) for row in rows]
        width = LANES
        while width > 1:
            # A vector holds pieces of `width` numbers, each of another row: add halves of pieces, and put the pieces
            # of two vectors together.
            half = width // 2
            low = [
                j for start in range(0, LANES, width) for v in (0, LANES) for j in range(v + start, v + start + half)
            ]
            picks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), [j + s for j in low]) for s in (0, half)]
            a, b = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            rows = [
                builder.fadd(*(builder.shuffle_vector(x, y, pick) for pick in picks)) for x, y in zip(a, b, strict=True)
            ]
            width = half
        return rows[0]

    return Vector(array.dtype)(array, index), generate


@intrinsic
def relu(typingctx, vector):
    """max(v, 0)."""

    def generate(context, builder, signature, arguments):
        return _largest(builder, arguments[0], _constant(arguments[0].type, 0.0))

    return vector(vector), generate


# log2 of the normal distribution's tail at a is -1 + a q(a): the q for which a times the tail is off by 9e-9 at most.
_TAIL = (
    -1.15111101, -0.459162146, -0.0526276194, 0.00724543352, -0.000272084086, -0.00013147007, 2.80563255e-05,
    -1.90201752e-06,
)  # fmt: skip


@intrinsic
def gelu(typingctx, vector):
    """v times the normal distribution's value at v, = max(v, 0) - |v| tail(|v|); for float32."""

    def generate(context, builder, signature, arguments):
        v = arguments[0]
        zero = _constant(v.type, 0.0)
        negative = builder.fcmp_ordered("<", v, zero)
        magnitude = builder.select(negative, builder.fsub(zero, v), v)
        logarithm = _multiply_add(builder, magnitude, _polynomial(builder, magnitude, _TAIL), _constant(v.type, -1.0))
        tail = _exp2(builder, vector.real, logarithm)
        return builder.fsub(_largest(builder, v, zero), builder.fmul(magnitude, tail))

    return vector(vector), generate


@intrinsic
def lane_sum(typingctx, vector):
    """The sum of the 16 numbers of a vector, halves added to halves."""

    def generate(context, builder, signature, arguments):
        v, width = arguments[0], LANES
        while width > 1:
            width //= 2
            picks = ir.VectorType(ir.IntType(32), width)
            low, high = (ir.Constant(picks, list(range(start, start + width))) for start in (0, width))
            v = builder.fadd(builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return vector.real(vector), generate
