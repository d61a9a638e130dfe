"""Before the rules of a phase run: gradients where their parameters are, and the norms of all rules in one collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo

from normwise.engine.pack import is_sharded
from normwise.engine.sharded import collectives
from normwise.engine.sharded.norms import Share, complete
from normwise.engine.sharded.pack import Split
from normwise.errors import PolicyError
from normwise.norms import Norm

# A pack, a norm, and the tensors whose blocks are to be measured.
Request = tuple[Any, Norm, list[Tensor]]


@_disable_dynamo
def align(params: Iterable[Tensor]) -> None:
    """Brings gradients to their parameters' placements: some are whole on every rank, as a row-wise embedding's, or not yet summed."""
    for p in params:
        if not is_sharded(p) or p.grad is None:
            continue
        if not is_sharded(p.grad):
            raise PolicyError(f"a parameter of shape {tuple(p.shape)} is a DTensor, but its gradient is a plain tensor: give it one too.")
        p.grad = collectives.placed_as(p.grad, p)


def run_all(bounds: Sequence[Any], turn: Any) -> None:
    """Runs the rules of a phase in their order. Before one whose norms are not known yet, they are measured together with those of all
    later rules that act on other parameters than the rules between: one collective a mesh, and another only after a change."""
    known: set[int] = set()
    for i, bound in enumerate(bounds):
        if i not in known:
            wave = _wave(bounds, i, known)
            fulfil([request for j in wave for request in bounds[j].ahead(turn)])
            known.update(wave)
        # What was measured ahead is used here; a rule that an earlier one has made stale measures again.
        bound.run(turn)
    forget(bounds)


def _wave(bounds: Sequence[Any], first: int, known: set[int]) -> list[int]:
    touched: set[int] = set()
    wave = []
    for j in range(first, len(bounds)):
        mine = {id(m.param) for m in bounds[j].members}
        if j not in known and (not mine & touched or bounds[j].phase == "penalty"):    # which reads weights, and changes gradients
            wave.append(j)
        touched |= mine
    return wave


def fulfil(requests: Sequence[Request]) -> None:
    """Measures all of it together; the packs keep the values for when they are asked."""
    pending: list[tuple[Any, Norm, list[Share]]] = []
    for part, norm, tensors in requests:
        shares = part.shares(norm, tensors)
        if shares is not None:
            pending.append((part, norm, shares))
    # One collective for all of them; apart, each norm would cost a round trip.
    complete([s for _, _, shares in pending for s in shares])
    for part, norm, shares in pending:
        part.expect(norm, part.finished(norm, shares))


def run_together(going: Sequence[Iterator[Sequence[Request]]]) -> None:
    """Runs the steps of packs of DTensors side by side. Each stops before it measures and yields what; at every stop what all of them
    measure travels in one collective a mesh."""
    for asked in zip_longest(*going, fillvalue=()):    # plain zip would leave the others at their last stop once the first has ended
        fulfil([request for requests in asked for request in requests])


def forget(bounds: Sequence[Any]) -> None:
    """Drops what was measured and not used."""
    for bound in bounds:
        for part in bound.packs:
            if isinstance(part, Split):
                part.forget()
