"""A spectral cap for every training step: a certified bound on what can have grown decides which matrices are looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.errors import NormError
from normwise.norms import native
from normwise.norms.decompose import eigh
from normwise.norms.linalg import paths
from normwise.norms.linalg.caps import cap_singular_values, inward, short_images
from normwise.norms.linalg.checks import as_batch, bounds, like_input, peak, positive
from normwise.norms.linalg.spectral_norm import upper_bound
from normwise.norms.reduce import root_sum_squares, up, wide

WIDTH = 8             # singular vectors followed at first: that many rows a product takes at full speed
CHUNK = 1 << 16       # entries of a difference at once: 256 KB
PANELS_FROM = 192     # short sides from which only half of a Gram matrix is computed, in panels of so many rows:
PANEL = 64
DEGREE = 6            # of the polynomial in the Gram matrix that turns the followed vectors towards the leading ones
CROWDED = 0.98        # a singular value from this share of the cap on is one to follow
DENSE_BELOW = 32      # short sides up to this are decomposed rather than followed: as cheap
MARGIN = 1 / 8        # of the tolerance: how far above the σ₁ that was found the one that is certified lies
ENOUGH = 15 / 16      # of the tolerance: where the first proof is tried, whose own rounding must fit below the whole
NARROW_UP_TO = 512    # short sides up to this are factored in fp32: beyond, its rounding would show beside a tolerance of 0.01
RUN = 256             # entries of a row that are multiplied and summed in fp32: longer rows in such runs, these summed in float64
RECUTS = 8            # a cut that rounding to the weights' dtype spoils is made again, each time lower


class Tracked(NamedTuple):
    """What ``cap`` keeps between its calls, for b matrices (m, n) of short side s. It belongs in the checkpoint.

    vectors: (b, k, s), orthonormal rows near the leading singular vectors of the short side. reference: (b, m, n), each matrix when it
    was last looked at. reach: (b,), a certified upper bound of σ₁ of the reference; infinite where it is not finite.
    """

    vectors: Tensor
    reference: Tensor
    reach: Tensor


class Found(NamedTuple):
    """What a look at b matrices found: the cut ones by position, and as in ``Tracked`` what is known of all of them afterwards."""

    cut: dict[int, Tensor]
    vectors: Tensor
    reach: Tensor


def cap(x: Tensor, radius: float | Tensor, state: Tracked | None = None, tolerance: float = 0.01) -> tuple[Tensor, Tracked]:
    """Holds σ₁ <= (1 + tolerance) radius through training, whatever the updates: ``(x, state) -> (capped x, state)``.

    It is cheapest where x has changed little since the call before.

    1. The state holds a copy of each matrix as it was last looked at, and a certified bound of its σ₁. σ₁ of the present matrix is at most
       that plus the Frobenius norm of the difference (Weyl), which one reading tells. Where that is within (1 + tolerance) radius, its bits
       stay and nothing else is computed.
    2. The others are looked at. c² I − xᵀx has a Cholesky factor only if σ₁ < c: if it has one for a c just below (1 + tolerance) radius,
       that is the new bound. Else the followed singular vectors are turned by a polynomial in the small Gram matrix (Zhou and Saad 2006)
       and say what σ₁ probably is; that nothing lies more than an eighth of the tolerance above is then proved in the same way. Where
       that fails, a direction was missed, and the matrix is decomposed.
    3. Where σ₁ exceeds the radius, all singular values above (1 − tolerance/2) radius are set to that: half of the tolerance is kept as
       room, so that a matrix is cut every few steps and not at each. What is left is proved in the same way before it is written.
    Matrices that are not finite come back as they are, and are looked at anew when they are finite again. Empty ones have σ₁ = 0.

    The bound counts rounding: k products in a row are allowed the size √k u with a factor of two, which is what k roundings add up to short
    of a conspiracy among them (Higham and Mary 2019); the worst case k u would exceed the tolerance from side 2000 on, in fp32.
    Memory: one copy of the matrices. Reads two flags a call, each a synchronisation on a GPU.
    Zhou, Saad 2006, "A Chebyshev–Davidson algorithm"; Higham, Mary 2019, "A new approach to probabilistic rounding error analysis".

    Args:
        x: (b, m, n).
        radius: a number or one a matrix (b,), >= 0.
        state: None at first, then what the call before returned; its tensors are not changed.
        tolerance: the share of the radius by which σ₁ may exceed it, >= 0.01.

    Returns:
        New tensors, or x itself where nothing exceeds.

    Raises:
        NormError: a tolerance below 0.01, a radius below zero, or x that is no stack of matrices.
    """
    if not 0.01 <= tolerance < math.inf:
        raise NormError(f"cap was given the tolerance {tolerance}: give 0.01 or more, since the proofs themselves need some of it")
    # The state is cloned: a caller may keep the old one, as a checkpoint does.
    batch = as_batch(x)
    own = None if state is None else Tracked(*(t.clone() for t in state))
    cut, own = follow([batch], bounds(radius, batch), own, tolerance)
    if not cut:
        return x, own
    out = batch.clone()
    for i, lowered in cut.items():
        out[i] = lowered
    return like_input(out, x), own


def follow(parts: Sequence[Tensor], limit: Tensor, state: Tracked | None, tolerance: float) -> tuple[dict[int, Tensor], Tracked]:
    """``cap`` of b matrices for an engine: what becomes of those that exceed, by position, and the state.

    parts: the matrices, (k, m, n) each, so that only those that are looked at need be copied together; may be scratch memory, nothing of
    it is kept. limit: (b,), >= 0. state: its tensors are changed in place.
    """
    limit = limit.to(wide(limit.device))
    state = _fitting(state, parts)
    if not parts[0][0:1].numel():
        return {}, state._replace(reach=torch.zeros_like(state.reach))
    grown = state.reach + torch.where(state.reach.isfinite(), _distance(parts, state.reference), 0.0)
    rows = (~(grown <= limit * (1 + tolerance))).nonzero().flatten().tolist()    # what is NaN has to be looked at, too
    if not rows:
        return {}, state
    if len(parts) == 1:
        x = parts[0] if len(rows) == len(parts[0]) else parts[0][rows]
    else:
        matrices = [m for part in parts for m in part.unbind()]
        x = torch.stack([matrices[i] for i in rows])
    found = _look(x, limit[rows], state.vectors[rows], state.reach[rows].isfinite(), tolerance)
    missing = found.vectors.shape[1] - state.vectors.shape[1]
    if missing > 0:    # rows of zeros take part in a search as what it still has room for
        state = state._replace(vectors=torch.nn.functional.pad(state.vectors, (0, 0, missing, 0)))
    state.vectors[rows], state.reach[rows], state.reference[rows] = found.vectors, found.reach, x
    for i, lowered in found.cut.items():
        state.reference[rows[i]] = lowered
    return {rows[i]: lowered for i, lowered in found.cut.items()}, state


def _fitting(state: Tracked | None, parts: Sequence[Tensor]) -> Tracked:
    """The state if it belongs to such matrices; otherwise the one before anything is known."""
    first, count = parts[0], sum(len(p) for p in parts)
    shape, short = first.shape[1:], min(first.shape[1:])
    dense = short <= DENSE_BELOW
    if state is not None and state.reference.shape == (count, *shape) and state.reference.dtype == first.dtype:
        width = state.vectors.shape[1]
        if state.vectors.shape == (count, width, short) and (width > 0) != dense and width <= max(short, 0):
            return state
    vectors = torch.zeros(count, 0 if dense else WIDTH, short, dtype=up(first[:0]).dtype, device=first.device)
    reference = torch.zeros(count, *shape, dtype=first.dtype, device=first.device)
    return Tracked(vectors, reference, torch.full((count,), math.inf, dtype=wide(first.device), device=first.device))


def _distance(parts: Sequence[Tensor], reference: Tensor) -> Tensor:
    """(b,): the Frobenius norm of what has changed since, never below it."""
    found, start = [], 0
    for part in parts:
        before = reference[start : start + len(part)]
        start += len(part)
        squares = native.squared_distances(part.unbind(), before.unbind())
        if squares is not None:
            found.append(torch.tensor(squares, dtype=torch.float64).sqrt())
        elif part.numel() >= CHUNK and part.dtype == torch.float32 and part.device.type == "cpu" and part.is_contiguous():
            found.append(torch.stack([_length_of_difference(*pair) for pair in zip(part.flatten(1), before.flatten(1), strict=True)]))
        else:
            found.append(root_sum_squares((up(part) - up(before)).flatten(1)).to(wide(part.device)))
    # The bound must not be below the true distance: fp32 sums of squares may err by a part in 10⁴.
    return torch.cat(found) * (1 + 1e-3)


def _length_of_difference(one: Tensor, other: Tensor) -> Tensor:
    """‖one − other‖ of two long vectors, in pieces that stay in the cache: a difference that goes to memory and back costs twice as much.

    A dot product in fp32 may be off by a part in 10⁴, and loses squares below the dtype's range, of which each can hide √tiny.
    """
    buffer = torch.empty(min(CHUNK, len(one)), dtype=one.dtype)
    squares = []
    for a, b in zip(torch.split(one, CHUNK), torch.split(other, CHUNK), strict=True):
        moved = torch.sub(a, b, out=buffer[: len(a)])
        squares.append(torch.dot(moved, moved))
    return (torch.stack(squares).double().sum() + len(one) * torch.finfo(one.dtype).tiny).sqrt()


def _look(x: Tensor, limit: Tensor, vectors: Tensor, known: Tensor, tolerance: float) -> Found:
    """Finds what exceeds and cuts it. known: of which of the matrices (b, m, n) the vectors say something; the others are decomposed."""
    reach = torch.full_like(limit, math.inf)
    cut: dict[int, Tensor] = {}
    if vectors.shape[1] and bool(known.any()):
        cut, vectors, reach = _search(x, limit, vectors, known, tolerance)
    # Not certified: a direction was missed, or the matrix is new. Decomposing is exact, and rare.
    lost = (~reach.isfinite()).nonzero().flatten().tolist()
    if not lost:
        return Found(cut, vectors, reach)
    found = _decompose(x[lost], limit[lost], vectors.shape[1], tolerance)
    missing = found.vectors.shape[1] - vectors.shape[1]
    vectors = torch.nn.functional.pad(vectors, (0, 0, missing, 0)) if missing else vectors.clone()
    vectors[lost], reach[lost] = found.vectors, found.reach
    return Found(cut | {lost[i]: y for i, y in found.cut.items()}, vectors, reach)


def _search(x: Tensor, limit: Tensor, vectors: Tensor, known: Tensor, tolerance: float) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """What is cut, the vectors, and what is certified after the cut: infinite where nothing could be.

    All is done at the scale of the radius, by powers of two, so that neither squares nor their sums leave the range.
    """
    exponent = torch.frexp(limit).exponent.clamp(-100, 120)    # within fp32's range
    scale = torch.where(limit > 0, torch.ldexp(torch.ones_like(limit), exponent), 1.0).to(vectors.dtype)
    y = up(x) / scale[:, None, None]
    bound = (limit / scale)[:, None]
    gram = _gram(y)
    # Most matrices that are looked at have not grown beyond the tolerance, and the proof alone is a third of a search.
    inside = _certified(gram, bound * (1 + ENOUGH * tolerance), _slack(gram, y))[:, 0]
    inside = torch.where(known & (inside <= bound[:, 0] * (1 + tolerance)), inside, math.inf)
    rest = inside.isinf().nonzero().flatten()
    reach = inside * scale.to(inside.dtype)
    if not len(rest):
        return {}, vectors, reach
    chosen = rest.tolist()
    cut, turned, found = _search_further(x[rest], y[rest], gram[rest], bound[rest], scale[rest], vectors[rest], known[rest], tolerance)
    vectors = vectors.clone()
    vectors[rest], reach[rest] = turned, found.to(reach.dtype)
    return {chosen[i]: lowered for i, lowered in cut.items()}, vectors, reach


def _search_further(
    x: Tensor, y: Tensor, gram: Tensor, bound: Tensor, scale: Tensor, vectors: Tensor, known: Tensor, tolerance: float
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """As a search, of matrices that are not proven to be inside; y: at the scale of the radius, and its Gram matrices."""
    vectors, squares, usable = _turned(gram, vectors)
    sigma = squares.clamp(min=0).sqrt().to(bound.dtype)
    most, aim = sigma[:, -1:], bound * (1 - tolerance / 2)
    exceeds = (most > bound) & usable[:, None]
    left, cut, rows = most, {}, (exceeds[:, 0] & known).nonzero().flatten().tolist()
    slack = _slack(gram, y)
    if rows:
        excess = torch.where(exceeds & (sigma > aim), 1 - aim * (1 - inward(y.dtype)) / positive(sigma), 0.0).to(y.dtype)[..., None]
        lowered, gram[rows] = _lowered(y[rows], gram[rows], vectors[rows], excess[rows])
        written = (lowered * scale[rows][:, None, None]).to(x.dtype)
        if x.dtype != y.dtype:    # what rounding to it adds is no matter of a margin
            gram[rows] = _gram(up(written) / scale[rows][:, None, None])
        cut = dict(zip(rows, written, strict=True))
        left = torch.where(exceeds, aim, most)
    near = left * (1 + MARGIN * tolerance)
    far = torch.where(1.05 * left < bound, 1.05 * left, bound * (1 + MARGIN * tolerance))
    reach = torch.full_like(left, math.inf)
    # The near guess is tight and costs a second proof only if it fails; the far one saves later looks.
    for guess in (near, torch.maximum(near, far)):
        open_ = (reach.isinf()[:, 0] & known & usable).nonzero().flatten().tolist()
        if open_:
            reach[open_] = _certified(gram[open_], guess[open_], slack[open_])
    unit = torch.finfo(y.dtype).eps / 2
    reach[rows] += 2 * math.sqrt(y.shape[-1]) * unit * _trace(gram)[rows].sqrt()    # the rounding of the images and of what is written
    reach = torch.where(reach <= bound * (1 + tolerance), reach, math.inf)[:, 0] * scale.to(reach.dtype)
    return {i: w for i, w in cut.items() if bool(reach[i].isfinite())}, vectors, reach


def _turned(gram: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, k, s) rows nearer to the leading eigenvectors, their Ritz values (b, k) in rising order, and whether they are usable (b,).

    A Chebyshev polynomial in the Gram matrix, small on [0, β] and steep above, where β is the least that the followed vectors reach.
    """
    step = vectors @ gram
    mean = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    least = (step * vectors).sum(2).amin(1, keepdim=True)
    # Below the mean eigenvalue nothing is worth following, and a β of 0 would divide by it.
    share = (2 / positive(torch.maximum(least, mean)))[..., None]
    before, now = vectors, share * step - vectors
    for _ in range(DEGREE - 1):
        before, now = now, torch.baddbmm(before + 2 * now, 2 * share * now, gram, beta=-1)
    # Six steps grow like σ¹²: without scaling QR would overflow in fp32.
    now = now / positive(now.abs().amax((1, 2), keepdim=True))
    usable = now.isfinite().flatten(1).all(1) & mean[:, 0].isfinite()    # no entry of a Gram matrix is larger than its trace
    if not bool(usable.all()):
        now, gram = (torch.where(usable[:, None, None], t, 0.0) for t in (now, gram))
    basis = torch.linalg.qr(now.mT).Q.mT
    squares, rotation = eigh(basis @ gram @ basis.mT)
    return rotation.mT @ basis, squares, usable & basis.isfinite().flatten(1).all(1)


def _lowered(y: Tensor, gram: Tensor, vectors: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices less the shares ``excess`` (b, k, 1) of what they do to these vectors, and the Gram matrices of what is left."""
    less, images = vectors * excess, short_images(y, vectors)
    left, right = (less, images) if y.shape[-2] < y.shape[-1] else (images, less)
    lowered = torch.baddbmm(y, left.mT, right, alpha=-1)
    through = vectors @ gram
    inner = torch.baddbmm(through, (through @ vectors.mT), less, beta=-1, alpha=0.5)    # G − less' (through − ½ H less) − its transpose
    update = less.mT @ inner
    return lowered, gram + update + update.mT


def _gram(y: Tensor) -> Tensor:
    """xᵀx on the short side, in fp32 or float64; long sums in runs, so that its rounding stays far below the tolerance."""
    rows = y if y.shape[1] < y.shape[2] else y.mT
    if y.dtype == torch.float64 or rows.shape[2] <= 4 * RUN:
        return paths.gram_in_panels(rows, PANEL) if rows.shape[1] >= PANELS_FROM and y.device.type == "cpu" else rows @ rows.mT
    total = torch.zeros(len(y), rows.shape[1], rows.shape[1], dtype=wide(y.device), device=y.device)
    for run in torch.split(rows, RUN, dim=2):
        total += run @ run.mT
    return total.to(y.dtype)


def _trace(gram: Tensor) -> Tensor:
    """(b, 1): Σσ², in the widest dtype."""
    return gram.diagonal(dim1=1, dim2=2).to(wide(gram.device)).sum(1, keepdim=True)


def _slack(gram: Tensor, y: Tensor) -> Tensor:
    """(b, 1): by how much rounding may have moved an eigenvalue of xᵀx, when it was formed and when a cut was taken from it."""
    unit, longest = torch.finfo(gram.dtype).eps / 2, max(y.shape[1:])
    summed = longest if y.dtype == torch.float64 or longest <= 4 * RUN else RUN
    return (2 * math.sqrt(summed) + 16) * unit * _trace(gram) + math.prod(y.shape[1:]) * torch.finfo(gram.dtype).tiny


def _certified(gram: Tensor, guess: Tensor, slack: Tensor) -> Tensor:
    """(b, 1): a number that σ₁ does not exceed, hardly above the guess (b, 1); infinite where the guess is too small.

    c² I − G is factored: that succeeds only where it is positive definite but for the factorisation's own rounding.
    """
    side = gram.shape[1]
    if side > NARROW_UP_TO:
        gram = gram.to(wide(gram.device))
    unit = torch.finfo(gram.dtype).eps / 2
    square = guess.square() + 2 * slack
    room = square - slack - 2 * math.sqrt(side) * side * unit * square
    shifted = -gram
    shifted.diagonal(dim1=1, dim2=2).add_(room.to(gram.dtype))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    sure = (failed == 0) & factor.diagonal(dim1=1, dim2=2).isfinite().all(1)
    return torch.where(sure[:, None], square.sqrt(), math.inf)


def _decompose(x: Tensor, limit: Tensor, width: int, tolerance: float) -> Found:
    """As a look, for matrices of which nothing is known; at least ``width`` vectors are followed, or none.

    A matrix that is not finite is left alone, and nothing is known of it afterwards.
    """
    finite = x.isfinite().flatten(1).all(1)
    out = torch.where(finite[:, None, None], x, 0.0)
    sigma, vectors, reach = _spectrum(out, tolerance)
    over = (sigma[:, -1] > limit) | (reach > limit * (1 + tolerance))
    cut, aim = torch.zeros_like(over), limit
    for _ in range(RECUTS):
        rows = over.nonzero().flatten().tolist()
        if not rows:
            break
        aim = aim * (1 - tolerance / 2)
        out[rows] = cap_singular_values(out[rows], aim[rows])
        sigma[rows], vectors[rows], reach[rows] = _spectrum(out[rows], tolerance)
        cut[rows] = True
        over = over & (reach > limit * (1 + tolerance / 2))
    crowd = int((sigma > (CROWDED * limit)[:, None]).sum(1).max())
    side = vectors.shape[1]
    width = min(max(width, 2 * crowd if 8 * crowd <= side else 0), side) if width else 0
    reach = torch.where(finite, reach, math.inf)
    kept = (cut & finite).nonzero().flatten().tolist()
    return Found({i: out[i] for i in kept}, vectors[:, side - width :], reach)


def _spectrum(x: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """σ in rising order, the singular vectors of the short side as rows, and a certified bound of σ₁; of finite matrices."""
    size = peak(x)
    y = up(x) / size
    gram = _gram(y)
    squares, vectors = eigh(gram)
    sigma = squares.clamp(min=0).to(wide(x.device)).sqrt()
    reach = _certified(gram, sigma[:, -1:] * (1 + MARGIN * tolerance), _slack(gram, y))[:, 0]
    if not bool(reach.isfinite().all()):    # eigenvalues that are wrong, or none: their bound is not
        reach = torch.where(reach.isfinite(), reach, upper_bound(y).to(reach.dtype))
    scale = size[:, 0].to(sigma.dtype)
    sigma = torch.where(sigma.isnan(), reach[:, None], sigma)    # so that what has no eigenvalues is cut by its bound
    return sigma * scale, vectors.mT.nan_to_num(nan=0.0), reach * scale[:, 0]
