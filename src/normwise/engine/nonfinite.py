"""What is done about gradients that are not finite: one place for every rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normwise.engine.block_tensors import own_grads
from normwise.engine.pack import here, is_sharded
from normwise.engine.sharded import collectives
from normwise.errors import NonFiniteError

OnNonFinite = Literal["raise", "skip", "zero", "ignore"]


def all_finite(grads: Sequence[Tensor]) -> bool:
    """Whether every entry is finite: one pass and one scalar synchronisation. A sum that overflows is looked at again, entry by entry."""
    if not grads:
        return True
    numbers = [_numbers(g) for g in grads]
    # A sum is not finite if an entry is not, and reads each number once; isfinite() would write a mask of the same size.
    sums = [n.sum(dtype=torch.float64 if n.dtype == torch.float64 else torch.float32).float() for n in numbers]
    together = torch.stack([s.to(sums[0].device) for s in sums])
    return bool(together.isfinite().all()) or all(bool((n.float() if n.itemsize == 1 else n).isfinite().all()) for n in numbers)


def everywhere(finite: bool, grads: Iterable[Tensor]) -> bool:
    """Whether it is so on every rank that has parts of the gradients: one collective a mesh, none for plain gradients."""
    meshes: dict[Any, None] = {g.device_mesh: None for g in grads if is_sharded(g)}    # type: ignore[attr-defined]
    for mesh in meshes:
        finite = collectives.all_agree(finite, mesh)
    return finite


def _numbers(grad: Tensor) -> Tensor:
    """The real numbers that a gradient holds, as a view: of a sparse one what is stored, of a complex one both parts."""
    if grad.layout == torch.sparse_coo:
        grad = grad._values()
    elif grad.layout != torch.strided:
        grad = grad.values()
    return torch.view_as_real(grad) if grad.is_complex() else grad


def handle(params: Mapping[str, nn.Parameter], mode: str) -> bool:
    """Applies ``mode`` to the gradients of ``params`` (by name). True where the step must be skipped.

    ``raise``: NonFiniteError naming the parameters; nothing was changed. ``skip``: the gradients are dropped (set to None), which makes
    the optimizer pass over its parameters. ``zero``: entries that are not finite become 0. ``ignore``: nothing is looked at.
    """
    grads = {name: p.grad for name, p in params.items() if p.grad is not None}
    if mode == "ignore" or (mode != "zero" and everywhere(all_finite(list(map(here, grads.values()))), grads.values())):
        return False
    if mode == "zero":
        own_grads(params.values())
        for g in [p.grad for p in params.values() if p.grad is not None]:
            torch.nan_to_num_(_numbers(here(g)), nan=0.0, posinf=0.0, neginf=0.0)
        return False
    if mode == "raise":
        raise NonFiniteError(_message(grads))
    for p in params.values():
        p.grad = None
    return True


def _message(grads: Mapping[str, Tensor]) -> str:
    bad = [name for name, g in grads.items() if not bool(_numbers(here(g)).isfinite().all())] or ["DTensors on other ranks"]
    listed = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    return (
        f"the gradients of {listed} are not finite. The weights were not changed. Look at the loss and the learning rate, or attach with "
        "on_nonfinite='skip' or 'zero'."
    )
