"""A model may be trained here, and is afterwards what it was."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normwise.errors import DataError
from normwise.generators import same_draws
from normwise.parameters.layouts import overlaps

IN_MEMORY = 512 << 20
"""Bytes of weights that are kept in host memory; what is more goes to a temporary file, so that no model takes more than that."""


class Kept:
    """Within, a model may be trained. At its end weights, buffers and gradients of ``model`` and the random generators, its own among them,
    are bit for bit as before, whatever was raised.

    Frozen weights are kept, too, where all that is kept fits into host memory. Where it does not, they are only watched.

    Args:
        weights: whether weights are kept; False where a copy is trained.
        sources: what batches come from: the generators that a DataLoader, its samplers and its dataset own are put back too.

    Raises:
        DataError: at the end, for a model that writes to frozen weights which were only watched.
    """

    def __init__(self, model: nn.Module, weights: bool, sources: Any = None) -> None:
        self.model, self.weights = model, weights
        self.bytes = 0
        self._generators = [*(one for module in model.modules() for one in _owned(module)), *_generators(sources)]

    def __enter__(self) -> Kept:
        # Last in, first out, and each whether or not the others could be: generators come back last.
        with ExitStack() as stack:
            self._keep_generators(stack)
            self._keep_gradients(stack)
            self._keep_tensors(stack)
            self._keep_modules(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        with torch.no_grad():
            self._stack.__exit__(None, None, None)    # what was raised within is not for the callbacks

    def _keep_generators(self, stack: ExitStack) -> None:
        stack.enter_context(same_draws())
        for generator in self._generators:
            stack.callback(_put_back(generator))

    def _keep_gradients(self, stack: ExitStack) -> None:
        for p in self.model.parameters():
            stack.callback(setattr, p, "grad", p.grad)
            stack.callback(p.requires_grad_, p.requires_grad)
            # Hooks after accumulation are how an optimizer steps within the backward pass: its state could not be put back.
            hooks = getattr(p, "_post_accumulate_grad_hooks", None)
            if hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
            p.grad = None    # a gradient that is there would be added to

    def _keep_modules(self, stack: ExitStack) -> None:
        for module in self.model.modules():
            stack.callback(setattr, module, "training", module.training)
            fixed = isinstance(module, torch.jit.ScriptModule)    # of which nothing can be exchanged
            for held in () if fixed else (module._parameters, module._buffers, module._modules):
                stack.callback(_put_members, held, dict(held))

    def _keep_tensors(self, stack: ExitStack) -> None:
        params = list(self.model.parameters()) if self.weights else []
        trained, frozen = ([p for p in params if p.requires_grad is wanted] for wanted in (True, False))
        for tensor in (*self.model.buffers(), *trained):
            self._keep(tensor, stack)
        if self.bytes + sum(map(_size, frozen)) <= IN_MEMORY:
            for tensor in frozen:
                self._keep(tensor, stack)
        elif frozen:
            names = {id(p): name for name, p in self.model.named_parameters()}
            stack.callback(_watch, [(names[id(p)], p, *_print(p)) for p in frozen])

    def _keep(self, tensor: Tensor, stack: ExitStack) -> None:
        self.bytes += _size(tensor)
        there = tensor.detach()
        if self.bytes <= IN_MEMORY or not tensor.numel() or tensor.layout != torch.strided:
            kept = there.to("cpu", copy=True)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="normwise-"))
            kept = torch.from_file(str(Path(folder) / "weight"), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            kept.copy_(there)
        stack.callback(_put, tensor, there, kept)


def _size(tensor: Tensor) -> int:
    numbers = tensor.numel() if tensor.layout == torch.strided else tensor.detach()._nnz()
    return numbers * tensor.element_size()


def _put(tensor: Tensor, there: Tensor, kept: Tensor) -> None:
    """there: ``tensor`` as it was, which code may since have given another storage (``p.data = ...``) or size."""
    if tensor.layout != torch.strided:
        tensor.detach().copy_(kept)
        return
    moved = tensor.data_ptr() != there.data_ptr() or tensor.shape != kept.shape
    # What cannot be written to, an expanded buffer or a read-only file, has not been; only on the host is it free to ask for sameness.
    if not moved and (overlaps(tuple(tensor.shape), tensor.stride()) or (tensor.device.type == "cpu" and _same(tensor, kept))):
        return
    if tensor.is_inference():
        with torch.inference_mode():
            tensor.copy_(kept)
    elif moved and there.shape == kept.shape:
        there.copy_(kept)
        tensor.data = there
    elif moved:
        tensor.data = kept.to(tensor.device)
    else:
        tensor.copy_(kept)


def _same(tensor: Tensor, kept: Tensor) -> bool:
    """Bit for bit: a NaN is itself, and zero has a sign."""
    one, other = tensor.detach().contiguous(), kept.contiguous()
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other)
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)) if one.numel() else True


def _put_members(held: dict[str, Any], before: dict[str, Any]) -> None:
    """What code has registered, replaced or taken away; what is as it was is not written to, since a compiled model watches it."""
    if list(held) != list(before) or any(held[name] is not one for name, one in before.items()):
        held.clear()
        held.update(before)


def _print(p: Tensor) -> tuple[int, int, float]:
    """What changes when somebody writes to a tensor: its version, its place, or its sum."""
    return p._version, p.data_ptr(), float(p.detach().sum(dtype=torch.float64 if p.dtype.is_floating_point else None).real)


def _watch(frozen: list[tuple[str, Tensor, int, int, float]]) -> None:
    moved = [name for name, p, *before in frozen if not _alike(_print(p), before)]
    if moved:
        raise DataError(
            f"the model writes to {len(moved)} frozen weights when it runs ({', '.join(moved[:3])}). They were not kept, since its weights "
            f"take more than {IN_MEMORY >> 20} MB, and have moved on by the batches of the probe. Probe a copy: copy=True."
        )


def _alike(now: tuple[int, int, float], before: list[Any]) -> bool:
    return list(now[:2]) == before[:2] and (now[2] == before[2] or (now[2] != now[2] and before[2] != before[2]))


def _generators(source: Any) -> Iterator[Any]:
    """The generators of a DataLoader, its samplers and its dataset."""
    owners = [source, *(getattr(source, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
    known: set[int] = set()
    for owner in owners:
        if id(owner) in known:
            continue
        known.add(id(owner))
        # What Subset and ConcatDataset wrap.
        inner = getattr(owner, "datasets", None)
        owners += [getattr(owner, "dataset", None), *(inner if isinstance(inner, list | tuple) else ())]
        for one in (owner, getattr(owner, "sampler", None)):
            yield from _owned(one)
            yield from _among(getattr(one, "generator", None))    # a wrapper hands on what it wraps


def _owned(owner: Any) -> Iterator[Any]:
    """The generators among the attributes of ``owner``."""
    for held in vars(owner).values() if hasattr(owner, "__dict__") and not isinstance(owner, type) else ():
        yield from _among(*held.values()) if isinstance(held, dict) else _among(*held) if isinstance(held, list | tuple) else _among(held)


def _among(*things: Any) -> Iterator[Any]:
    return (one for one in things if isinstance(one, torch.Generator | random.Random | np.random.Generator | np.random.RandomState))


def _put_back(generator: Any) -> Callable[[], Any]:
    """What gives a generator the state that it has now."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        known = generator.getstate()
        return lambda: generator.setstate(known)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    bits = generator.bit_generator.state
    return lambda: setattr(generator.bit_generator, "state", bits)
