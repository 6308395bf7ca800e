"""Matrix products.

Y = alpha A' B' + beta C:   dA' = alpha g B'^T,   dB' = alpha A'^T g,   dC = beta g
"""

from __future__ import annotations

from jr_onnx.autodiff.registry import Call, vjp


@vjp("Gemm", 7, 9, 11, 13)
def gemm_a(call: Call) -> str:
    """For A, which is `(m, k)`, or `(k, m)` with transA."""
    trans_a, trans_b = call.attribute("transA", 0), call.attribute("transB", 0)
    alpha, b = call.attribute("alpha", 1.0), call.node.input[1]
    if trans_a:
        return call.emit.matmul(b, call.g, call.element, transA=trans_b, transB=1, alpha=alpha)
    return call.emit.matmul(call.g, b, call.element, transB=1 - trans_b, alpha=alpha)


@vjp("Gemm", 7, 9, 11, 13, wrt=1)
def gemm_b(call: Call) -> str:
    """For B, which is `(k, n)`, or `(n, k)` with transB."""
    trans_a, trans_b = call.attribute("transA", 0), call.attribute("transB", 0)
    alpha, a = call.attribute("alpha", 1.0), call.node.input[0]
    if trans_b:
        return call.emit.matmul(call.g, a, call.element, transA=1, transB=trans_a, alpha=alpha)
    return call.emit.matmul(a, call.g, call.element, transA=1 - trans_a, alpha=alpha)


@vjp("Gemm", 7, 9, 11, 13, wrt=2)
def gemm_c(call: Call) -> str:
    """For C, which is broadcast."""
    scale = call.emit.scalar(call.attribute("beta", 1.0), call.element)
    return call.unbroadcast(call.emit.op("Mul", call.g, scale))


@vjp("MatMul", 1, 9, 13)
def matmul_a(call: Call) -> str:
    """For A `(..., m, k)`: g B^T, summed over the axes along which A was broadcast."""
    product = call.emit.op("MatMul", call.g, _transposed(call, call.node.input[1]))
    return _unbroadcast(call, product)


@vjp("MatMul", 1, 9, 13, wrt=1)
def matmul_b(call: Call) -> str:
    """For B `(..., k, n)`: A^T g, summed over the axes along which B was broadcast."""
    product = call.emit.op("MatMul", _transposed(call, call.node.input[0]), call.g)
    return _unbroadcast(call, product)


def _transposed(call: Call, name: str) -> str:
    rank = len(call.shape(name))
    if rank < 2:
        raise NotImplementedError("MatMul with a vector")
    return call.emit.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


def _unbroadcast(call: Call, product: str) -> str:
    matrix, result = call.shape(call.x), call.shape(call.y)
    if len(matrix) < 2:
        raise NotImplementedError("MatMul with a vector")
    tensor = call.tensors[call.y]
    batched = type(tensor)(tensor.element, (*result[:-2], *matrix[-2:]))
    return call.emit.unbroadcast(product, batched, call.tensors[call.x], call.x)
