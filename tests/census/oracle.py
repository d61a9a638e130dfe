"""What the forward pass says, whatever anything is called: which outputs of a projection are queries, keys and values, which axis of an
expert's tensor is its input, whether a layer gives the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-9
"""In float64: what is zero in exact arithmetic comes out as 1e-17 or so, what is not as 1e-5 or more in these networks."""
Run = Callable[[Any, int], Tensor]
"""(model, length) -> the output for an input of that length, (1, length, …)."""


def part_rows(model: nn.Module, name: str, run: Run) -> dict[str, list[int]]:
    """Which outputs of the projection ``name``, a module in the model's last layer of attention, are queries, keys, values.

    With one position a softmax is 1 whatever the scores: only values reach the output. With several, the last position's output depends
    on the query at the last position alone, and on the keys at all of them.
    """
    model = model.double().eval()
    values = _gradient(model, name, run, 1).abs().amax(0) > TINY
    earlier = _gradient(model, name, run, 5)[:-1].abs().amax(0) > TINY
    parts = {"q": ~values & ~earlier, "k": ~values & earlier, "v": values}
    return {part: torch.nonzero(rows).flatten().tolist() for part, rows in parts.items()}


def _gradient(model: nn.Module, name: str, run: Run, length: int) -> Tensor:
    """d(last position's output)/d(outputs of the projection), (length, outputs)."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        first.retain_grad()
        seen.append(first)

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        last = run(model, length)[0, -1]
        (last * torch.randn(last.shape, generator=torch.Generator().manual_seed(1), dtype=last.dtype)).sum().backward()
    finally:
        handle.remove()
    grad = seen[-1].grad
    assert grad is not None
    return grad.reshape(-1, grad.shape[-1])


def input_axis(weight: Tensor, forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Which axis of an expert's tensor is its input: with only coordinate 1 of x not zero, its gradient lives in one slice of that axis."""
    one = torch.zeros_like(x)
    one[..., 1] = x[..., 1]
    (grad,) = torch.autograd.grad(forward(one).square().sum(), weight)
    return _slice_axis(grad, 1)


def output_axis(weight: Tensor, forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Which axis is its output: the gradient of coordinate 1 of the result lives in one slice of it."""
    (grad,) = torch.autograd.grad(forward(x)[..., 1].sum(), weight)
    return _slice_axis(grad, 1)


def _slice_axis(grad: Tensor, at: int) -> int:
    """The axis, after the first, along which ``grad`` is zero everywhere but at index ``at``."""
    assert grad.abs().max() > 0, "the tensor does not take part"
    found = []
    for axis in range(1, grad.ndim):
        rest = torch.tensor([i for i in range(grad.shape[axis]) if i != at])
        if grad.index_select(axis, rest).abs().max() == 0:
            found.append(axis)
    assert len(found) == 1, f"the gradient lives in one slice along each of {found}"
    return found[0]


def gives_output(model: nn.Module, names: list[str], inputs: dict[str, Any]) -> bool:
    """Whether every number of some output of the model is a number that one of these modules gave."""
    given: list[Tensor] = []
    handles = [model.get_submodule(name).register_forward_hook(lambda _m, _i, output: given.append(output)) for name in names]
    try:
        with torch.no_grad():
            outputs = list(_tensors(model(**inputs)))
    finally:
        for handle in handles:
            handle.remove()
    everything = torch.cat([t.flatten() for t in given])
    return any(bool(torch.isin(t, everything).all()) for t in outputs if t.is_floating_point())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
