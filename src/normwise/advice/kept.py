"""A model may be trained here, and is afterwards what it was."""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IN_MEMORY = 512 << 20
"""Bytes of weights that are kept in host memory; what is more goes to a temporary file, so that no model takes more than that."""


class Kept:
    """Within, a model may be trained. At its end weights, buffers and gradients of ``model`` and the random generators are bit for bit as
    before, whatever was raised.

    Args:
        weights: whether trainable weights are kept; False where a copy is trained.
        sources: what batches come from: the generators that a DataLoader and its sampler own are put back too.
    """

    def __init__(self, model: nn.Module, weights: bool, sources: Any = None) -> None:
        self.model, self.weights = model, weights
        self.bytes = 0
        loaders = (sources, getattr(sources, "sampler", None))
        owned = [getattr(one, "generator", None) for one in loaders]
        self._generators = [g for g in owned if isinstance(g, torch.Generator)]
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Kept:
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []    # type: ignore[no-untyped-call]
        self._states = [g.get_state() for g in self._generators]
        self._grads = [(p, p.grad) for p in self.model.parameters()]
        self._buffers = [(module, dict(module._buffers)) for module in self.model.modules()]
        self._modes = [(module, module.training) for module in self.model.modules()]
        changing = [p for p in self.model.parameters() if self.weights and p.requires_grad] + list(self.model.buffers())
        try:
            for tensor in changing:
                self._saved.append((tensor, self._keep(tensor.detach())))
        except BaseException:
            self._stack.close()
            raise
        # Hooks after accumulation are how an optimizer steps within the backward pass: its state could not be put back.
        found = (getattr(p, "_post_accumulate_grad_hooks", None) for p in self.model.parameters())
        self._hooks = [(hooks, dict(hooks)) for hooks in found if hooks]
        for hooks, _ in self._hooks:
            hooks.clear()
        for p, _ in self._grads:
            p.grad = None    # a gradient that is there would be added to
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        self.bytes += size
        if self.bytes <= IN_MEMORY or not tensor.numel():
            return tensor.to("cpu", copy=True)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="normwise-"))
        kept = torch.from_file(str(Path(folder) / "weight"), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        return kept.copy_(tensor)

    def __exit__(self, *raised: object) -> None:
        with self._stack, torch.no_grad():
            for module, buffers in self._buffers:
                module._buffers.clear()
                module._buffers.update(buffers)
            for module, mode in self._modes:
                module.training = mode
            for tensor, kept in self._saved:
                tensor.copy_(kept)
            for p, grad in self._grads:
                p.grad = grad
            for hooks, own in self._hooks:
                hooks.update(own)
            self._saved.clear()
            random.setstate(self._random[0])
            np.random.set_state(self._random[1])
            torch.set_rng_state(self._random[2])
            if self._devices:
                torch.cuda.set_rng_state_all(self._devices)
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)
