"""The kernels in Triton that :mod:`normwise.norms.cuda_kernels` launches: blocks brought to a norm, all tensors as one vector, X Xᵀ.

Tensors of one dtype are found through ``at``, their addresses as int64 on the device; ``like`` is any tensor of that dtype. Squares are
summed in fp32, four to a lane, and these sums in float64; where they leave the range that fp32 keeps, and on a sphere, all in float64.
Only finite norms above zero bring about a factor, so zero blocks and blocks that are not finite stay as they are.

Nothing here reads a number back, so a CUDA graph may hold every launch.
"""

import triton
import triton.language as tl

RUN = tl.constexpr(4)
TRUSTED = tl.constexpr(8e-31)
"""Of a mean square: below it squares that fp32 flushed to zero may count."""
SMALLEST, LARGEST = tl.constexpr(2.4e-38), tl.constexpr(3.4e38)
"""Factors between them are numbers of fp32 that have all their digits."""


@triton.jit
def _places(first, entry, units, inner, ROWS: tl.constexpr):
    """Offsets of a block's entries from the tensor's start, ``(blocks, entries)``. first: of each block's first entry."""
    if ROWS:
        offsets = first[:, None] + entry[None, :]
    else:
        offsets = first[:, None] + ((entry // inner).to(tl.int64) * units * inner + entry % inner)[None, :]
    return offsets


@triton.jit
def _squares(x, first, there, size, units, inner, ROWS: tl.constexpr, EXACT: tl.constexpr, B: tl.constexpr, K: tl.constexpr):
    """Σ x² of each of B blocks of ``size`` entries, in float64."""
    total = tl.zeros([B, K], tl.float64)
    for start in range(0, size, K * RUN):
        run = tl.zeros([B, K], tl.float64 if EXACT else tl.float32)
        for part in tl.static_range(RUN):
            entry = start + part * K + tl.arange(0, K)
            mask = there[:, None] & (entry < size)[None, :]
            value = tl.load(x + _places(first, entry, units, inner, ROWS), mask=mask, other=0.0).to(run.dtype)
            run += value * value
        total += run.to(tl.float64)
    return tl.sum(total, 1)


@triton.jit
def _safe_squares(x, first, there, size, units, inner, ROWS: tl.constexpr, EXACT: tl.constexpr, B: tl.constexpr, K: tl.constexpr):
    """The same, again in float64 where fp32 did not hold the squares."""
    total = _squares(x, first, there, size, units, inner, ROWS, EXACT, B, K)
    if not EXACT:
        held = (total >= size * TRUSTED) & (total < float("inf"))
        if tl.min((held | (there == 0)).to(tl.int32), 0) == 0:
            total = _squares(x, first, there, size, units, inner, ROWS, True, B, K)
    return total


@triton.jit
def _factor(norm, aim, SPHERE: tl.constexpr):
    moves = (norm > 0.0) & (norm < float("inf"))
    if not SPHERE:
        moves = moves & (norm > aim)
    return tl.where(moves, aim / tl.where(moves, norm, 1.0), 1.0)


@triton.jit
def _multiply(x, first, factor, size, units, inner, ROWS: tl.constexpr, B: tl.constexpr, K: tl.constexpr):
    """Each of B blocks times its factor, in place, rounded once; those whose factor is 1 are not touched."""
    plain = tl.min(((factor >= SMALLEST) & (factor <= LARGEST)).to(tl.int32), 0) == 1
    for start in range(0, size, K):
        entry = start + tl.arange(0, K)
        mask = (factor != 1.0)[:, None] & (entry < size)[None, :]
        place = x + _places(first, entry, units, inner, ROWS)
        value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        product = value * factor.to(tl.float32)[:, None]
        if not plain:
            product = (value.to(tl.float64) * factor[:, None]).to(tl.float32)
        tl.store(place, product.to(x.dtype.element_ty), mask=mask)


@triton.jit
def bound_blocks(
    at, like, aims, each, norms, factors, units, inner, size,
    SPHERE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program (i, t): B of the ``units`` blocks of tensor t, each of ``size`` entries, measured and brought to its aim.

    A tensor is (outer, units, inner); ROWS: outer is 1. each: 1 where ``aims`` has one number a block, 0 where it has one for all.
    """
    tensor = tl.program_id(1)
    x = tl.load(at + tensor).to(like.dtype)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    unit = tl.program_id(0) * B + tl.arange(0, B)
    there, block, first = unit < units, tensor * units + unit, unit.to(tl.int64) * inner
    norm = tl.sqrt(_safe_squares(x, first, there, size, units, inner, ROWS, SPHERE, B, K))
    factor = tl.where(there, _factor(norm, tl.load(aims + block * each, mask=there, other=0.0), SPHERE), 1.0)
    tl.store(norms + block, norm, mask=there)
    tl.store(factors + block, factor, mask=there)
    if tl.max((factor != 1.0).to(tl.int32), 0) == 1:
        _multiply(x, first, factor, size, units, inner, ROWS, B, K)


@triton.jit
def _piece(at, like, piece, ALIGNED: tl.constexpr):
    """Of a row (tensor, from, to, block): the tensor's address, where the piece begins, and how many entries it has."""
    x, first = tl.load(at + tl.load(piece)).to(like.dtype), tl.load(piece + 1) + tl.arange(0, 1)
    size = tl.load(piece + 2) - tl.load(piece + 1)
    if ALIGNED:
        x, first = tl.multiple_of(x, 16), first // 16 * 16
    return x, first, size


@triton.jit
def square_pieces(at, like, pieces, sums, EXACT: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr):
    """Program i: Σ x² of piece i."""
    x, first, size = _piece(at, like, pieces + 4 * tl.program_id(0), ALIGNED)
    if size % 16 == 0:    # said so that the compiler knows, and reads 16 bytes at a time
        total = _safe_squares(x, first, first >= 0, size // 16 * 16, 1, 1, True, EXACT, 1, K)
    else:
        total = _safe_squares(x, first, first >= 0, size, 1, 1, True, EXACT, 1, K)
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def scale_pieces(
    at, like, pieces, ends, sums, aims, each, norms, factors, SPHERE: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Program i, after ``square_pieces``: the norm of the block of piece i, whose pieces are those from ``ends[block]`` to
    ``ends[block + 1]``, and the piece brought along to the block's aim."""
    piece = pieces + 4 * tl.program_id(0)
    block = tl.load(piece + 3) + tl.arange(0, 1)
    begin, end = tl.load(ends + tl.load(piece + 3)), tl.load(ends + tl.load(piece + 3) + 1)
    total = tl.zeros([1, K], tl.float64)
    for start in range(begin, end, K):
        other = (start + tl.arange(0, K))[None, :]
        total += tl.load(sums + other, mask=other < end, other=0.0)
    norm = tl.sqrt(tl.sum(total, 1))
    factor = _factor(norm, tl.load(aims + block * each), SPHERE)
    owner = begin + tl.arange(0, 1) == tl.program_id(0)    # a tensor: Triton 3.9's interpreter takes no scalar in a mask
    tl.store(norms + block, norm, mask=owner)
    tl.store(factors + block, factor, mask=owner)
    if tl.max((factor != 1.0).to(tl.int32), 0) == 1:
        x, first, size = _piece(at, like, piece, ALIGNED)
        if size % 16 == 0:
            _multiply(x, first, factor, size // 16 * 16, 1, 1, True, 1, K)
        else:
            _multiply(x, first, factor, size, 1, 1, True, 1, K)


@triton.jit
def gram(
    x, base, out, m, n, x_batch, x_row, x_column, beta, alpha, ADDS: tl.constexpr, T: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Program (i, j, b): the tile (i, j) of beta·base + alpha·X Xᵀ of matrix b, (m, n), and its mirror image; nothing where i < j."""
    i, j, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j <= i:
        row, column = i * T + tl.arange(0, T), j * T + tl.arange(0, T)
        x += batch * x_batch
        total = tl.zeros([T, T], tl.float32)
        for start in range(0, n, K):
            k = start + tl.arange(0, K)
            left = tl.load(x + row[:, None] * x_row + k[None, :] * x_column, mask=(row < m)[:, None] & (k < n)[None, :], other=0.0)
            right = tl.load(x + column[None, :] * x_row + k[:, None] * x_column, mask=(k < n)[:, None] & (column < m)[None, :], other=0.0)
            total = tl.dot(left, right, total)
        inside, place = (row < m)[:, None] & (column < m)[None, :], batch * m * m + row[:, None] * m + column[None, :]
        total *= alpha
        if ADDS:
            total += beta * tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        result = total.to(out.dtype.element_ty)
        tl.store(out + place, result, mask=inside)
        if j < i:
            tl.store(out + batch * m * m + column[None, :] * m + row[:, None], result, mask=inside)
