"""What the forward pass says, independent of names and of the library: which rows of a fused projection are q, k and v, which axis of an
expert's tensor is its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def value_rows(model: nn.Module, name: str, run: Callable[[Any, int], Tensor]) -> dict[str, list[int]]:
    """Which outputs of the projection ``name`` (a module) are queries, keys, values: ``{"q": rows, "k": rows, "v": rows}``.

    The model must have one layer of attention, or ``name`` be in its last. ``run(model, length)`` gives the output (1, length, …) for an
    input of that length. With one position a softmax is 1 whatever the scores: only values reach the output. With several, the last
    position's output depends on the query at the last position alone, and on keys at all of them.
    """
    alone = _gradient(model, name, run, 1).abs().amax(0)
    several = _gradient(model, name, run, 5).abs()
    values = alone > 1e-4 * alone.max()
    earlier = several[:-1].amax(0)
    keys = ~values & (earlier > 1e-4 * earlier[~values].max())
    parts = {"q": ~values & ~keys, "k": keys, "v": values}
    return {part: torch.nonzero(rows).flatten().tolist() for part, rows in parts.items()}


def _gradient(model: nn.Module, name: str, run: Callable[[Any, int], Tensor], length: int) -> Tensor:
    """d(last position's output)/d(outputs of the projection), (length, outputs)."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        out = run(model, length)
        weights = torch.randn(out[0, -1].shape, generator=torch.Generator().manual_seed(1))
        (out[0, -1] * weights).sum().backward()
    finally:
        handle.remove()
    grad = seen[-1].grad
    assert grad is not None
    return grad.reshape(-1, grad.shape[-1])


def input_axis(weight: Tensor, forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Which axis of an expert's tensor is its input: with only coordinate 1 of x not zero, the gradient lives in one slice of it."""
    one = torch.zeros_like(x)
    one[..., 1] = x[..., 1]
    (grad,) = torch.autograd.grad(forward(one).square().sum(), weight)
    return _slice_axis(grad, 1)


def output_axis(weight: Tensor, forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Which axis is its output: the gradient of coordinate 1 of the result lives in one slice of it."""
    (grad,) = torch.autograd.grad(forward(x)[..., 1].sum(), weight)
    return _slice_axis(grad, 1)


def _slice_axis(grad: Tensor, at: int) -> int:
    """The axis along which ``grad`` is zero everywhere but at index ``at``."""
    assert grad.abs().max() > 0, "the tensor does not take part"
    found = []
    for axis in range(1, grad.ndim):
        rest = [i for i in range(grad.shape[axis]) if i != at]
        if grad.index_select(axis, torch.tensor(rest)).abs().max() == 0:
            found.append(axis)
    assert len(found) == 1, f"the gradient lives in one slice along each of {found}"
    return found[0]
