"""What a model puts out, and whether a smaller one puts out the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.generators import same_draws

# Of a tensor's largest entry. In float64 sums in another order differ by 1e-15, which a deep network enlarges by far less than this.
_ROUNDING = 1e-7
_NOTHING = 1e-12  # of a tensor that is nothing but rounding, such as a difference of equal numbers


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses; Hugging Face's outputs are dicts. What caches hold is no output."""
    if isinstance(output, Tensor):
        return [output]
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, list | tuple):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    return [tensor for part in parts for tensor in tensors(part)]


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """The tensors that the model gives for each of the batches. What it draws at random, it draws from ``seed``."""
    found: list[Tensor] = []
    for batch in batches:
        with same_draws(seed):
            found += tensors(model(batch))
    return found


def check(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Runs the model before anything is done with it. ``batches``: the example input first.

    Raises:
        StudyError: it does not take one of them, or gives nothing that could be compared.
    """
    found: list[Tensor] = []
    for batch in batches:
        try:
            found += outputs(model, [batch])
        except Exception as error:
            what = "example_input" if batch is batches[0] else "noise in the place of example_input"
            raise StudyError(
                f"the model, as a float64 copy in evaluation mode, does not take {what}, of shape {tuple(batch.shape)} and {batch.dtype} "
                f"({said(error)}): give one batch that it takes, as one tensor (n, …), of a model that takes any n."
            ) from error
    if not any(tensor.isfinite().any() for tensor in found):
        raise StudyError(
            f"the model's output has no {'finite number' if found else 'tensor'} in it, so a smaller model could not be compared with it: "
            "give out a tensor, or a tuple, list, dict or dataclass with tensors, that is not infinite or nan everywhere."
        )


def difference(full: Sequence[Tensor], less: Sequence[Tensor]) -> float:
    """The largest difference of any entry; inf where tensors or their shapes are not the same, or only one entry is a number."""
    return max(map(_apart, full, less)) if len(full) == len(less) else math.inf


def same(full: Sequence[Tensor], less: Sequence[Tensor]) -> bool:
    """Whether no entry differs by more than rounding in float64 explains."""
    near = all(_apart(a, b) <= _ROUNDING * _largest(a) + _NOTHING for a, b in zip(full, less, strict=False))
    return near and len(full) == len(less)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else math.inf
    a, b = _wide(a), _wide(b)
    # Infinities less each other are nan, and nan is not nan, though both models may be meant to give them.
    alike = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).abs().masked_fill(alike, 0).nan_to_num(nan=math.inf, posinf=math.inf).max())


def _largest(tensor: Tensor) -> float:
    sizes = _wide(tensor).abs()
    return float(torch.where(sizes.isfinite(), sizes, 0).max()) if sizes.numel() else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def said(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    first = (str(error).splitlines() or [""])[0][:200].rstrip(". ")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
