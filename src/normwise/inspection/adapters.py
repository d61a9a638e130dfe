"""Adapters of PEFT as what they add to a weight: s · B·A, measured through r x r matrices without forming it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normwise.errors import DataError, PolicyError, a_kind_of
from normwise.inspection.checkpoint import Checkpoint
from normwise.inspection.stored import Stored
from normwise.parameters.regex import finder

_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.(lora_embedding_|lora_)([AB])(?:\.(?!bias$)[^.]+)?$")
_LEAD = "base_model.model."
_LARGEST = 3.4e38
"""Of a scale: what the factors' own types end at."""


@dataclass(frozen=True)
class Product:
    """One adapter: the weight that it changes, its factors A ``(r, n)`` and B ``(m, r)``, and its scale s."""

    layer: str
    a: Stored
    b: Stored
    scale: float
    embedding: bool
    transposed: bool
    """Whether the weight is (B·A)ᵀ: an embedding's, or Conv1D's."""

    @property
    def name(self) -> str:
        return f"{self.layer}.weight"

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of B·A as a matrix; a convolution's has its kernel's axes in n."""
        return self.b.shape[0], self.a.count // max(self.a.shape[0], 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B in float64."""
        return self.a.whole().flatten(1).double(), self.b.whole().flatten(1).double()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can be added to a weight of this shape, or to its transpose, as Conv1D keeps it."""
        m, n = self.shape
        flat = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
        return flat in ((m, n), (n, m))


def products(checkpoint: Checkpoint) -> list[Product]:
    """The low-rank products of an adapter; what belongs to none stays in ``checkpoint.tensors``.

    Raises:
        DataError: for a factor without the other, or factors that do not fit each other.
    """
    config = checkpoint.adapter or {}
    if config.get("peft_type") != "LORA":
        checkpoint.notes.append(f"an adapter of type {config.get('peft_type')} is no product B·A: its tensors are measured as they are")
        return []
    if config.get("use_dora"):
        checkpoint.notes.append("DoRA: s·BA is measured before the magnitude vectors, which are listed by themselves")
    return [_product_of(layer, pair, checkpoint, config) for layer, pair in _pairs(checkpoint)]


def _pairs(checkpoint: Checkpoint) -> Iterator[tuple[tuple[str, bool], dict[str, Stored]]]:
    pairs: dict[tuple[str, bool], dict[str, Stored]] = {}
    for name in list(checkpoint.tensors):
        found = _FACTOR.match(name)
        if found is None:
            _rename(checkpoint, name)
            continue
        pair = pairs.setdefault((found[1], "embedding" in found[2]), {})
        if found[3] in pair:
            raise DataError(f"{checkpoint.place}: {pair[found[3]].name} and {name} are both the factor {found[3]} of {found[1]}.")
        pair[found[3]] = checkpoint.tensors.pop(name)
    yield from pairs.items()


def _rename(checkpoint: Checkpoint, name: str) -> None:
    """Calls a tensor as the base does, unless another has that name."""
    plain = name.removeprefix(_LEAD).replace(".modules_to_save", "")
    if name.startswith(_LEAD) and plain not in checkpoint.tensors:
        one = checkpoint.tensors.pop(name)
        one.name = plain
        checkpoint.tensors[plain] = one
        checkpoint.shapes[plain] = one.shape


def _product_of(key: tuple[str, bool], pair: dict[str, Stored], checkpoint: Checkpoint, config: dict[str, Any]) -> Product:
    layer, embedding = key
    if len(pair) < 2:
        [one] = pair.values()
        other = [f"the other, {name}, is {why}" for name, why in checkpoint.skipped.items() if (m := _FACTOR.match(name)) and m[1] == layer]
        raise DataError(f"{checkpoint.place}: {one.name} is one factor of a product B·A, and {(*other, 'the other is not there')[0]}.")
    a, b = pair["A"], pair["B"]
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1] or any(n != 1 for n in b.shape[2:]):
        raise DataError(f"{checkpoint.place}: the factors of {layer}, {list(b.shape)} and {list(a.shape)}, do not make a product B·A.")
    rank = _of_pattern("rank", layer, config.get("r", a.shape[0]), checkpoint)
    if rank != a.shape[0]:
        raise DataError(f"{checkpoint.place}: adapter_config.json says rank {rank} for {layer}, whose factor A has {a.shape[0]} rows.")
    alpha = _of_pattern("alpha", layer, config.get("lora_alpha", rank), checkpoint)
    if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST:
        raise DataError(
            f"{checkpoint.place}: adapter_config.json gives {layer} the alpha {str(alpha)[:40]}, but it must be a number in fp32's range."
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Product(layer, a, b, scale, embedding, embedding or bool(config.get("fan_in_fan_out")))


def _of_pattern(what: str, layer: str, usual: Any, checkpoint: Checkpoint) -> Any:
    """PEFT's rule: the first key of ``rank_pattern`` or ``alpha_pattern`` that is the end of the layer's name, as a regular expression."""
    patterns = (checkpoint.adapter or {}).get(f"{what}_pattern") or {}
    if not isinstance(patterns, dict):
        raise DataError(f"{checkpoint.place}: {what}_pattern in adapter_config.json is {a_kind_of(patterns)}, but must be an object.")
    try:
        # The file may be a stranger's, and Python's own search for some patterns does not end.
        return next((value for pattern, value in patterns.items() if finder(rf"^(.*\.)?({pattern})$")(layer)), usual)
    except PolicyError as error:
        raise DataError(f"{checkpoint.place}: {what}_pattern in adapter_config.json cannot be read: {error}") from error

