"""A spectral cap for every training step: matrices far inside are left alone, the largest singular vectors of the others are followed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.norms.linalg.caps import cap_singular_values, inward, short_gram, short_images
from normwise.norms.linalg.checks import as_batch, bounds, like_input, peak, positive
from normwise.norms.reduce import up

WIDTH = 8         # singular vectors followed at first: that many rows a product takes at full speed
PROBES = 8        # random combinations of its rows: what they become tells how far a matrix has moved
SHOWN = 4         # of the changes in those combinations, sums that the search takes in as new directions
DEPTH = 1         # products with xᵀx a search, one more after a long move
LONG = 0.2        # a move from this share of the cap on, as in the first steps of Adam, is long
SAFETY = 1.5      # an estimated move is taken this many times, since of rank one it may be seen at half its size
WAIT = 50         # calls after which a matrix is looked at though nothing was seen to move: what the probes miss lasts that long at most
CROWDED = 0.98    # a singular value from this share of the cap on is one to follow
FULL = 0.75       # when so many of the followed are such ones, some may be missing: the matrix is decomposed, and twice as many followed
JUMP = 1.5        # from this many caps on Ritz vectors are not exact enough, and the matrix is decomposed
DENSE_BELOW = 32  # short sides up to this are decomposed rather than searched: as cheap


class Tracked(NamedTuple):
    """What ``cap`` keeps between its calls, for b matrices of short side s and long side l. It belongs in the checkpoint.

    vectors: (b, k, s), orthonormal rows (or zero) that span the leading singular vectors of the short side. sketch: (b, PROBES, s),
    random combinations of the matrix's long side when it was last looked at. reach: (b,), its σ₁ then. age: (b,), the calls since.
    """

    vectors: Tensor
    sketch: Tensor
    reach: Tensor
    age: Tensor


class Found(NamedTuple):
    """What a look at b matrices found: the cut ones by position, those it could not deal with, and as in ``Tracked`` the state."""

    cut: dict[int, Tensor]
    lost: list[int]
    vectors: Tensor
    sketch: Tensor
    reach: Tensor


class Seen(NamedTuple):
    """b matrices (b, m, n) in the compute dtype, their limits (b,), and what is known of them before a look."""

    x: Tensor
    limit: Tensor
    sketch: Tensor
    moved: Tensor
    vectors: Tensor


def cap(x: Tensor, radius: float | Tensor, state: Tracked | None = None, tolerance: float = 0.01) -> tuple[Tensor, Tracked]:
    """Holds σ₁ <= (1 + tolerance) radius through training: ``(x, state) -> (capped x, state)`` at the price of a few thin products.

    x: (b, m, n), changed a little since the call before; radius: a number or one a matrix (b,); tolerance: >= 0.01. state: None at
    first, then what the call before returned; its tensors are not changed. Returns new tensors, or x itself where nothing exceeds.

    1. Eight random combinations of its rows (columns, where it is wide), one product, estimate how far each matrix has moved since
       it was last looked at, in the Frobenius norm, which no singular value's move exceeds. Where its σ₁ then and 1.5 times the move
       stay within (1 + tolerance) radius, that is all, at most 50 times in a row.
    2. The others are searched: a Krylov space of the followed vectors, and the directions of the move. Small ones are decomposed.
    3. Where σ₁ exceeds the radius, all singular values above (1 − tolerance/2) radius are set to that: half of the tolerance is kept as
       room, so that a matrix is cut every few steps and not at each. A matrix within the radius keeps its bits.
    The first call, matrices that leapt by 1.5 radii, and those with values from 0.98 radius on in three quarters of what is followed, so
    that one might be missing there, go through ``cap_singular_values``; the state widens to twice as many. Matrices that are not finite
    come back as they are.

    What it can miss: of a move of rank one that is spread over the rows, 8 estimate² / move² is about χ² with eight degrees of freedom, so
    that 1.5 times the estimate is below the move for 10% of all directions, below half of it for 0.1%, below a tenth for 4e-9; of moves
    of higher rank less. Such a move has to be along the leading singular vectors besides to bring σ₁ above the radius, and is found at
    the next look, 50 calls later at most. Nor is the search certain of a *new* direction in the step in which it appears.
    docs/linalg.md has the σ₁ measured by float64 SVD after every step. It is no certificate: ``upper_bound`` is. Reads two flags a
    call, each a synchronisation on a GPU.
    Musco, Musco 2015, "Randomized Block Krylov Methods" (the search); Saad 2011, chapter 4 (Rayleigh–Ritz); Charikar, Chen,
    Farach-Colton 2002, "Finding Frequent Items in Data Streams" (each row in one combination only).
    """
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
    """``cap`` of b >= 1 matrices for an engine: what becomes of those that exceed, by position, and the state.

    parts: the matrices, (k, m, n) each, so that only those that are looked at need be copied together; may be scratch memory, nothing of
    it is kept. limit: (b,), >= 0. state: its tensors are changed in place.
    """
    sketch = torch.cat([_sketch(up(p)) for p in parts])
    if state is None or not _fits(state, sketch, parts[0][0]):
        return _first(torch.cat(list(parts)), limit, tolerance)
    state.age.add_(1)
    moved = sketch - state.sketch
    length = _length(moved)
    due = (state.reach + SAFETY * length > limit * (1 + tolerance)) | (state.age >= WAIT)
    how = due * (1 + (length > LONG * limit).to(torch.int64))
    codes = torch.where(length.isnan(), 0, torch.where(length > JUMP * limit, 3, how)).tolist()
    short, long, lost = ([i for i, code in enumerate(codes) if code == which] for which in (1, 2, 3))
    cut: dict[int, Tensor] = {}
    for rows, depth in ((short, DEPTH), (long, DEPTH + 1)):
        if rows:
            all_of = slice(None) if len(rows) == len(sketch) else rows
            found = _look(Seen(up(_chosen(parts, rows)), *(t[all_of] for t in (limit, sketch, moved, state.vectors))), depth, tolerance)
            lost += [rows[i] for i in found.lost]
            state = _store(state, rows, found, cut)
    if lost:
        found = _decompose(_chosen(parts, lost), limit[lost], state.vectors.shape[1], tolerance)
        state = _store(state, lost, found, cut)
    return cut, state


def _chosen(parts: Sequence[Tensor], rows: list[int]) -> Tensor:
    """Some of the matrices as one batch, which is the only part itself where that is all."""
    if len(parts) == 1:
        return parts[0] if len(rows) == len(parts[0]) else parts[0][rows]
    matrices = [m for part in parts for m in part.unbind()]
    return torch.stack([matrices[i] for i in rows])


def _store(state: Tracked, rows: list[int], found: Found, cut: dict[int, Tensor]) -> Tracked:
    """Takes what was found about some matrices into the state, and what was cut into ``cut``."""
    cut |= {rows[i]: y for i, y in found.cut.items()}
    if len(rows) == len(state.age) and found.vectors.shape == state.vectors.shape:
        return Tracked(found.vectors, found.sketch, found.reach.to(state.reach.dtype), torch.zeros_like(state.age))
    missing = found.vectors.shape[1] - state.vectors.shape[1]
    if missing > 0:    # rows of zeros take part in a search as what it still has room for
        state = state._replace(vectors=torch.nn.functional.pad(state.vectors, (0, 0, missing, 0)))
    state.vectors[rows], state.sketch[rows], state.reach[rows] = found.vectors, found.sketch, found.reach.to(state.reach.dtype)
    state.age[rows] = 0
    return state


def _first(x: Tensor, limit: Tensor, tolerance: float) -> tuple[dict[int, Tensor], Tracked]:
    """Every matrix decomposed, and twice as many vectors followed as there are singular values at the radius."""
    found = _decompose(x, limit, 0 if _small(x[0]) else WIDTH, tolerance)
    return found.cut, Tracked(found.vectors, found.sketch, found.reach, torch.zeros_like(found.reach))


def _look(seen: Seen, depth: int, tolerance: float) -> Found:
    """Finds what exceeds and cuts it."""
    x, v, sketch = seen.x, seen.vectors, seen.sketch
    limit = seen.limit.to(v.dtype)[:, None]
    small, aim = _small(x[0]), limit * (1 - tolerance / 2)
    vectors, images, sigma = _eigen(x) if small else _ritz(x, v, seen.moved, depth)
    most = sigma[:, -1:]
    exceeds = most > limit
    full = vectors.shape[1] if small else FULL * vectors.shape[1]
    lost = (most > JUMP * limit) | ((sigma > CROWDED * limit).sum(1, keepdim=True) > full)
    codes = torch.where(lost, 2, exceeds.to(torch.int64)).flatten().tolist()
    cut: dict[int, Tensor] = {}
    if 1 in codes:
        sigma = sigma[:, -vectors.shape[1]:]
        excess = torch.where(exceeds & (sigma > aim), 1 - aim * (1 - inward(v.dtype)) / positive(sigma), 0.0)
        less = vectors * excess[..., None]
        sketch = torch.baddbmm(sketch, _sums(images.mT), less, alpha=-1)
        cut = {i: _without(x[i], less[i], images[i]) for i, code in enumerate(codes) if code == 1}
    reach = torch.where(exceeds, aim, most)[:, 0]
    return Found(cut, [i for i, code in enumerate(codes) if code == 2], v if small else vectors, sketch, reach)


def _decompose(x: Tensor, limit: Tensor, width: int, tolerance: float) -> Found:
    """As a look, for matrices of which nothing is known; at least ``width`` vectors are followed, or none.

    Of a matrix that is not finite nothing is known afterwards, either.
    """
    aim = limit * (1 - tolerance / 2)
    finite = x.isfinite().flatten(1).all(1)
    exceeds = _spectrum(x)[0][:, -1] > limit
    rows = exceeds.nonzero().flatten()
    lowered = cap_singular_values(x[rows], aim[rows]) if len(rows) else x[rows]
    out = x.index_copy(0, rows, lowered)
    sigma, vectors = _spectrum(out)
    crowd = int((sigma > (CROWDED * limit)[:, None]).sum(1).max())
    width = max(width, 2 * crowd) if width else 0
    known = torch.where(finite[:, None, None], up(out), 0.0)
    reach = torch.where(finite, sigma[:, -1], math.inf)
    vectors = vectors[:, vectors.shape[1] - min(width, vectors.shape[1]):]
    return Found(dict(zip(rows.tolist(), lowered, strict=True)), [], vectors, _sketch(known), reach)


def _spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ in rising order, and the singular vectors of the short side as rows; of a matrix that is not finite, those of zero."""
    size = peak(x)
    usable = size.isfinite() & (size > 0)
    size = torch.where(usable, size, 1.0)
    squares, vectors = torch.linalg.eigh(short_gram(torch.where(usable, up(x) / size, 0.0)))
    return squares.clamp(min=0).sqrt() * size[..., 0], vectors.mT


def _eigen(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_ritz``, with every singular vector."""
    squares, rotation = torch.linalg.eigh(short_gram(x))
    return rotation.mT, short_images(x, rotation.mT), squares.clamp(min=0).sqrt()


def _ritz(x: Tensor, v: Tensor, moved: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """As many approximate singular vectors (rows) as v has, from the Krylov space of v and the move; their images; all Ritz values.

    Each product with xᵀx is followed by taking away what the space already holds, so that the images of an orthonormal basis are exact
    and are rotated, not computed again.
    """
    basis, images = v, short_images(x, v)
    last, shown = images, moved.view(len(v), -1, SHOWN, v.shape[2]).sum(1)
    for _ in range(min(depth, v.shape[2] // (v.shape[1] + SHOWN) - 1)):
        new = _beyond(torch.cat([last @ _tall(x), shown], 1), basis)
        last = short_images(x, new)
        basis, images = torch.cat([basis, new], 1), torch.cat([images, last], 1)
    squares, rotation = torch.linalg.eigh(images @ images.mT)
    turn = rotation[..., -v.shape[1]:].mT
    return turn @ basis, turn @ images, squares.clamp(min=0).sqrt()


def _beyond(z: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows for what the rows of z have outside the span of the basis; zero rows where they have less."""
    for _ in range(2):    # once leaves what rounding leaves, which for converged vectors is all there is
        z = torch.baddbmm(z, z @ basis.mT, basis, alpha=-1)
    z = z / positive(torch.linalg.vector_norm(z, dim=-1, keepdim=True))
    spread, rotation = torch.linalg.eigh(z @ z.mT)
    share = torch.where(spread > 1e-3, spread.clamp(min=1e-3).rsqrt(), 0.0)
    orthonormal: Tensor = (share[..., None] * rotation.mT) @ z
    return orthonormal


def _without(x: Tensor, vectors: Tensor, images: Tensor) -> Tensor:
    """x (m, n) less the part that takes some multiples of orthonormal vectors of its short side to these images."""
    left, right = (vectors, images) if x.shape[0] < x.shape[1] else (images, vectors)
    return torch.addmm(x, left.mT, right, alpha=-1)


def _tall(x: Tensor) -> Tensor:
    """x with its long side first, a view."""
    return x if x.shape[-2] >= x.shape[-1] else x.mT


def _sketch(x: Tensor) -> Tensor:
    """(b, PROBES, s): random combinations along the long side, so that ‖sketch‖² is ‖x‖_F² in the mean."""
    return _sums(_tall(x))


def _sums(tall: Tensor) -> Tensor:
    """(b, l, s) -> (b, PROBES, s): sums of the l rows, each with its random weight in one of the sums."""
    count, length, short = tall.shape
    size = length // PROBES
    runs, rest = _weighting(length, tall.dtype, tall.device)
    rows = tall[:, : PROBES * size].reshape(count * PROBES, size, short)
    sums = torch.bmm(runs if count == 1 else runs.repeat(count, 1, 1), rows).view(count, PROBES, short)
    if len(rest):
        sums[:, : len(rest)] += rest * tall[:, PROBES * size :]
    return sums


@functools.lru_cache(maxsize=64)    # one a length and device: a copy to a GPU at each step would be a synchronisation
def _weighting(length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The weights of the rows in runs, (PROBES, 1, size), and of those that are left over, (rest, 1)."""
    size = length // PROBES
    runs, rest = torch.split(_weights(length).to(device, dtype), [PROBES * size, length - PROBES * size])
    return runs.view(PROBES, 1, size), rest[:, None]


def _weights(length: int) -> Tensor:
    """Random signs times 0.5 to 1.5, of mean square one: the same for every call. Unequal, so that two equal entries do not cancel."""
    draws = torch.rand(2, length, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
    weights = torch.where(draws[0] < 0.5, -0.5, 0.5) * (1 + 2 * draws[1])
    normed: Tensor = weights / weights.square().mean().sqrt()
    return normed


def _length(moved: Tensor) -> Tensor:
    """(b,): the Frobenius norm of a change, estimated from what it changes in the sketch."""
    length: Tensor = torch.linalg.vector_norm(moved, dim=(1, 2))
    return length


def _small(x: Tensor) -> bool:
    return min(x.shape) <= DENSE_BELOW


def _fits(state: Tracked, sketch: Tensor, x: Tensor) -> bool:
    """Whether the state belongs to such matrices and its search space to the short side."""
    short, width = min(x.shape), state.vectors.shape[1]
    alike = state.sketch.shape == sketch.shape and state.vectors.shape[::2] == (len(sketch), short)
    return alike and (_small(x) or (width > 0 and (DEPTH + 1) * (width + SHOWN) <= short))
