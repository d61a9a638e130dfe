"""PEFT's adapters: which parameter is which part of which, and LoRA's products s·B·A as weights that rules act on.

A product is never formed. With Aᵀ = QR it is X·Qᵀ for X = s·B·Rᵀ, of as many columns as the rank, and Q has orthonormal columns: rows,
singular values and all norms that follow from them are those of X. So X is what rules see, and what they make of it goes back into B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import PolicyError
from normwise.norms.reduce import wide
from normwise.parameters.computed_weights import Computed, Way
from normwise.parameters.layouts import ROWS, Layout
from normwise.parameters.names import Site, adapter_of

PARTS = ("A", "B", "product", "magnitude", "modules_to_save")
"""What ``"peft:..."`` selects."""
PRODUCT = "lora_BA"
"""What stands in a product's name where its factors have ``lora_A`` and ``lora_B``."""
_CHANGED = ("lora_B", "lora_embedding_A")
"""The factors that rules on a product change: those on the side of the units, which start at zero."""
_KNOWN_VARIANTS = ("Dora", "ALora", "MiCA")
"""Of PEFT's variants of LoRA those that add s·B·A to the base as it is."""


def part_of(place: Site) -> tuple[str, str]:
    """Which of `PARTS` a parameter is, and the name of its adapter; empty where there is none."""
    steps = place.name.split(".")
    named = {"lora_magnitude_vector": "magnitude", "modules_to_save": "modules_to_save"}
    marks = [i for i, step in enumerate(steps) if step.startswith("lora_") or step in named]
    part = next((named[step] for step in steps if step in named), adapter_of(place) if place.param.ndim > 1 else "")
    if not part or not marks:
        return part, ""
    after = steps[marks[0] + 1 :]
    return part, after[0] if len(after) > 1 or (after and isinstance(place.module, nn.ParameterDict)) else ""


class LowRank(Way):
    """X of s·B·A, ``(units, min(rank, inputs))``; of an embedding, whose units are tokens, that of s·AᵀBᵀ. In float64, rounded to fp32."""

    how, selective = "LoRA's s·B·A", True

    def __init__(self, layer: Any, adapter: str, flipped: bool) -> None:
        self.layer, self.adapter, self.flipped = layer, adapter, flipped

    @property
    def refusal(self) -> str:    # type: ignore[override]
        return _why_not(self.layer, self.adapter, *self.factors(*self.parts()))

    @property
    def scale(self) -> float:
        """s, as the layer has it now."""
        return float(self.layer.scaling[self.adapter])

    def parts(self) -> list[Tensor]:
        """The factor that changes, then the other one."""
        if self.flipped:
            return [self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]]
        factors = (self.layer.lora_B[self.adapter], self.layer.lora_A[self.adapter])
        return [getattr(factor, "weight", factor) for factor in factors]

    def a_and_b(self) -> list[Tensor]:
        """As PEFT names them."""
        return self.parts() if self.flipped else self.parts()[::-1]

    def factors(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Both as matrices of as many columns as the rank: one row for each unit, and for each input."""
        changed, other = (part.detach().flatten(1) for part in parts)
        return (changed.mT, other) if self.flipped else (changed, other.mT)

    def _wide(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        changed, other = self.factors(*parts)
        return changed.to(wide(changed.device)), other.to(wide(other.device))

    def forward(self, *parts: Tensor) -> Tensor:
        changed, other = self._wide(*parts)
        r = torch.linalg.qr(other, mode="r").R
        x = (changed @ r.mT).mul_(self.scale)
        return x if parts[0].dtype == torch.float64 else x.float()

    def inverse(self, parts: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
        """B + (X' − X)·R⁺ᵀ/s: what does not change X stays as it is, and so does B where X does."""
        if self.adapter in self.layer.merged_adapters:
            raise PolicyError(
                f"the adapter {self.adapter!r} is merged into its base, which would keep the old product: call unmerge_adapter() before "
                "you train on, or remove the rule."
            )
        changed, other = self._wide(*parts)
        r = torch.linalg.qr(other, mode="r").R.nan_to_num(0, 0, 0)
        found = changed + (new - old).to(changed.dtype) @ torch.linalg.pinv(r).mT / self.scale
        return [(found.mT if self.flipped else found).to(parts[0].dtype).reshape(parts[0].shape), parts[1]]

    def pulled(self, wanted: Sequence[Tensor], pull: Tensor) -> list[Tensor | None]:
        """s·G·R for B and s·Bᵀ·G·Qᵀ for A, of the gradient G of X."""
        parts = self.parts()
        changed, other = self._wide(*parts)
        q, r = torch.linalg.qr(other)
        slope = pull.to(changed.dtype) * self.scale
        of_changed, of_other = slope @ r, q @ (slope.mT @ changed)
        found = (of_changed.mT, of_other) if self.flipped else (of_changed, of_other.mT)
        grads = {id(p): g.reshape(p.shape).to(p.dtype) for p, g in zip(parts, found, strict=True)}
        return [grads.get(id(p)) for p in wanted]

    def margin(self, new: Tensor) -> float:
        return 2 * torch.finfo(self.parts()[0].dtype).eps

    def base_weight(self) -> Tensor:
        """W₀ as numbers; of a quantised base as PEFT's own function dequantises it."""
        base = self.layer.get_base_layer()
        weight: Tensor = base.weight
        if weight.is_floating_point() and type(weight) in (nn.Parameter, Tensor):
            return weight.detach()
        from peft.utils.integrations import dequantize_module_weight

        found: Tensor = dequantize_module_weight(base)
        return found.detach()


def _why_not(layer: Any, adapter: str, changed: Tensor, other: Tensor) -> str:
    """Why no rule can act on a product; empty where one can."""
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if hasattr(layer, "lora_E"):
        return "AdaLoRA puts a diagonal between B and A, and prunes it itself"
    if type(layer).__name__ in ("ParamWrapper", "LoraParallelLinear"):
        return f"{type(layer).__name__} does not add one product s·B·A to one matrix"
    if variant != "NoneType" and not variant.startswith(_KNOWN_VARIANTS):
        return f"PEFT's {variant} does not add s·B·A to the base as it is"
    if changed.shape[1] != other.shape[1]:
        return "its base is a grouped convolution, and B has only a part of the rank for each group"
    if not layer.scaling[adapter]:
        return "its scale is 0, so that nothing of B and A reaches the base"
    if adapter in layer.merged_adapters:
        return "its adapter is merged into the base, which would keep the old product (unmerge_adapter() takes it out again)"
    return ""


# ------------------------------------------------------------------------------------------------------------- finding


def find_products(places: Iterable[Site]) -> Iterator[Computed]:
    """Every product of PEFT's LoRA layers, once, in the order of the factors that change."""
    seen: set[tuple[int, str]] = set()
    for place in places:
        at = next((i for i, step in enumerate(place.steps) if step in _CHANGED), -1)
        adapter, layer = part_of(place)[1], place.parents[at] if at >= 0 else None
        scaling: Any = getattr(layer, "scaling", None) if hasattr(layer, "merged_adapters") else None
        if not isinstance(scaling, Mapping) or adapter not in scaling or place.param.ndim < 2 or (id(layer), adapter) in seen:
            continue
        assert layer is not None
        seen.add((id(layer), adapter))
        way = LowRank(layer, adapter, place.steps[at] == "lora_embedding_A")
        dtype = torch.float64 if place.param.dtype == torch.float64 else torch.float32
        changed, other = way.factors(*way.parts())
        weight: Any = torch.empty(len(changed), min(other.shape), dtype=dtype, device="meta")
        holder = place.name.partition(f"{place.steps[at]}.")[0]
        site = replace(
            place, name=f"{holder}{PRODUCT}.{adapter}", param=weight, module=layer, local_name=PRODUCT, parents=place.parents[:at],
            steps=place.steps[:at],
        )
        yield Computed(way, site, [], ())


def product_layout(base: Layout | None, shape: Sequence[int]) -> Layout:
    """The base's units, heads and stacked matrices, and the rank in the place of its inputs."""
    if base is None or not base.certain or base.size(ROWS) != shape[0]:
        return Layout("oi", tuple(shape))
    kept = [(axis, size) for axis, size in zip(base.axes, base.shape, strict=True) if axis in ROWS]
    return Layout("".join(axis for axis, _ in kept) + "i", (*(size for _, size in kept), shape[1]), parts=base.parts)
