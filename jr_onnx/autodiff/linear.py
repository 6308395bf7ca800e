"""Matrix products and other linear maps.

Y = alpha A' B' + beta C:   dA' = alpha g B'^T,   dB' = alpha A'^T g,   dC = beta g
Einsum ab,bc->ac:           ac,bc->ab for the first, ab,ac->bc for the second
CumSum: the sum from the other end      Trilu: the same triangle of g
Range, y[i] = start + i delta: sum(g), sum(i g), and 0 for the limit
"""

from __future__ import annotations

from collections import defaultdict
from string import ascii_letters

import numpy as np

from jr_onnx.autodiff.registry import Call, vjp
from jr_onnx.model.types import Dimension, Tensor


@vjp("Gemm", 9, 11, 13)
def gemm_a(call: Call) -> str:
    """For A, which is `(m, k)`, or `(k, m)` with transA."""
    trans_a, trans_b = call.attribute("transA", 0), call.attribute("transB", 0)
    alpha, b = call.attribute("alpha", 1.0), call.node.input[1]
    if trans_a:
        return call.emit.matmul(b, call.g, call.element, transA=trans_b, transB=1, alpha=alpha)
    return call.emit.matmul(call.g, b, call.element, transB=1 - trans_b, alpha=alpha)


@vjp("Gemm", 9, 11, 13, wrt=1)
def gemm_b(call: Call) -> str:
    """For B, which is `(k, n)`, or `(n, k)` with transB."""
    trans_a, trans_b = call.attribute("transA", 0), call.attribute("transB", 0)
    alpha, a = call.attribute("alpha", 1.0), call.node.input[0]
    if trans_b:
        return call.emit.matmul(call.g, a, call.element, transA=1, transB=trans_a, alpha=alpha)
    return call.emit.matmul(a, call.g, call.element, transA=1 - trans_a, alpha=alpha)


@vjp("Gemm", 9, 11, 13, wrt=2)
def gemm_c(call: Call) -> str:
    """For C, which is broadcast."""
    scale = call.emit.scalar(call.attribute("beta", 1.0), call.element)
    return call.unbroadcast(call.emit.op("Mul", call.g, scale))


@vjp("MatMul", 9, 13)
def matmul_a(call: Call) -> str:
    """For A `(..., m, k)`: g B^T, summed over the axes along which A was broadcast."""
    b, g = _as_matrix(call, 1), _as_product(call)
    return _as_operand(call, call.emit.op("MatMul", g, _swapped(call, b, 1)))


@vjp("MatMul", 9, 13, wrt=1)
def matmul_b(call: Call) -> str:
    """For B `(..., k, n)`: A^T g, summed over the axes along which B was broadcast."""
    a, g = _as_matrix(call, 0), _as_product(call)
    return _as_operand(call, call.emit.op("MatMul", _swapped(call, a, 0), g))


def _matrix_shape(call: Call, index: int) -> tuple[Dimension, ...]:
    """Returns an operand's shape; a vector on the left is a row, on the right a column."""
    shape = call.shape(call.node.input[index])
    if len(shape) == 1:
        return (1, *shape) if index == 0 else (*shape, 1)
    return shape


def _as_matrix(call: Call, index: int) -> str:
    name = str(call.node.input[index])
    return name if len(call.shape(name)) > 1 else call.emit.unsqueeze(name, [index])


def _as_product(call: Call) -> str:
    """Gives g the axes that vectors left out."""
    vectors = [len(call.shape(name)) == 1 for name in call.node.input]
    g, rank = call.g, max(len(_matrix_shape(call, index)) for index in (0, 1))
    if vectors[1]:
        g = call.emit.unsqueeze(g, [rank - 1 - vectors[0]])
    return call.emit.unsqueeze(g, [rank - 2]) if vectors[0] else g


def _swapped(call: Call, matrix: str, index: int) -> str:
    rank = len(_matrix_shape(call, index))
    return call.emit.op("Transpose", matrix, perm=[*range(rank - 2), rank - 1, rank - 2])


def _as_operand(call: Call, product: str) -> str:
    vectors = sum(len(call.shape(name)) == 1 for name in call.node.input)
    matrix, result = _matrix_shape(call, call.wrt), call.shape(call.y)
    batch = result[: len(result) - 2 + vectors]
    batched = Tensor(call.element, (*batch, *matrix[-2:]))
    summed = call.emit.unbroadcast(product, batched, Tensor(call.element, matrix), call.x)
    vector = len(call.shape(call.x)) == 1
    return call.emit.reshape_like(summed, call.x) if vector else summed


@vjp("Einsum", 12, 28, wrt=None)
def einsum(call: Call) -> str:
    """The operand's term from g and the other operands.

    An axis that only the operand has was summed: g is repeated along it.
    """
    emit, (*terms, result) = call.emit, _terms(call)
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise NotImplementedError(f"a diagonal in {call.attribute('equation')!r}")
    if _broadcasts_letters(call, terms):
        raise NotImplementedError(f"one letter, two sizes in {call.attribute('equation')!r}")
    mine = terms.pop(call.wrt)
    others = [name for index, name in enumerate(call.node.input) if index != call.wrt]
    known = set(result).union(*terms)
    kept = "".join(letter for letter in mine if letter in known)
    product = emit.op("Einsum", call.g, *others, equation=f"{','.join((result, *terms))}->{kept}")
    alone = [axis for axis, letter in enumerate(mine) if letter not in known]
    if alone:
        product = emit.unsqueeze(product, alone)
        return emit.op("Expand", product, emit.op("Shape", call.x))
    if "..." not in call.attribute("equation"):
        return product
    shape, wide = call.shape(call.x), dict(zip(result, call.shape(call.y), strict=True))
    of = Tensor(call.element, tuple(map(wide.get, mine, shape)))
    return emit.unbroadcast(product, of, call.tensors[call.x], call.x)


def _broadcasts_letters(call: Call, terms: list[str]) -> bool:
    """Whether a size of 1 meets another outside the ellipsis, which onnxruntime lets pass."""
    sizes: dict[str, set[int]] = defaultdict(set)
    for term, name in zip(terms, call.node.input, strict=True):
        for letter, size in zip(term, call.shape(name), strict=True):
            if letter in call.attribute("equation") and isinstance(size, int):
                sizes[letter].add(size)
    return any(len(each) > 1 for each in sizes.values())


def _terms(call: Call) -> list[str]:
    """Returns the terms of the operands and the result, the ellipsis spelled in letters."""
    equation = str(call.attribute("equation")).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    letters = left.replace(",", "").replace("...", "")
    if not arrow:
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    spare = [letter for letter in ascii_letters if letter not in letters]
    longest = ""
    for index, (term, name) in enumerate(zip(terms, call.node.input, strict=True)):
        if "..." in term:
            length = len(call.shape(name)) - len(term) + 3
            last = "".join(spare[:length][::-1])
            terms[index] = term.replace("...", last)
            longest = max(longest, last, key=len)
    return [*terms, result.replace("...", longest)]


@vjp("CumSum", 11, 14)
def cum_sum(call: Call) -> str:
    """The sum from the other end."""
    return call.emit.op(
        "CumSum",
        call.g,
        call.node.input[1],
        exclusive=call.attribute("exclusive", 0),
        reverse=1 - call.attribute("reverse", 0),
    )


@vjp("Trilu", 14)
def trilu(call: Call) -> str:
    """The same triangle of g."""
    return call.emit.op("Trilu", call.g, *call.node.input[1:], upper=call.attribute("upper", 1))


@vjp("Range", 11, 27)
def range_start(call: Call) -> str:
    """y[i] = start + i delta, for the start."""
    return call.emit.reduce_sum(call.g, [0], keepdims=False)


@vjp("Range", 11, 27, wrt=1)
def range_limit(call: Call) -> str:
    """It only says how many: piecewise constant."""
    return ""


@vjp("Range", 11, 27, wrt=2)
def range_step(call: Call) -> str:
    """y[i] = start + i delta, for delta."""
    emit, wide = call.emit, call.emit.constant
    count = emit.op("Squeeze", emit.op("Shape", call.g))
    places = emit.op("Range", wide(np.array(0)), count, wide(np.array(1)))
    weighed = emit.op("Mul", call.g, emit.op("Cast", places, to=call.element))
    return emit.reduce_sum(weighed, [0], keepdims=False)
