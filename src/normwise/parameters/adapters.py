"""PEFT's adapters: which parameter is which part of which, and LoRA's products s·B·A as weights that rules act on.

A product is never formed. With Aᵀ = QR it is X·Qᵀ for X = s·B·Rᵀ, of as many columns as the rank, and Q has orthonormal columns: rows,
singular values and all norms that follow from them are those of X. So X is what rules see, and what they make of it goes back into B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from normwise.errors import PolicyError
from normwise.norms.reduce import may_branch, wide
from normwise.parameters.computed_weights import Computed, Way
from normwise.parameters.layouts import ROWS, Layout
from normwise.parameters.names import Site, adapter_of

PARTS = ("A", "B", "product", "magnitude", "modules_to_save")
"""What ``"peft:..."`` selects."""
PRODUCT = "lora_BA"
"""What stands in a product's name where its factors have ``lora_A`` and ``lora_B``."""
_CHANGED = ("lora_B", "lora_embedding_A")
"""The factors that rules on a product change: those on the side of the units, which start at zero."""
WELL_CONDITIONED = 1e10
"""Up to here the inverse of a triangle in float64 has all digits of fp32."""
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

    how, selective, differentiable = "LoRA's s·B·A", True, False    # by `pulled`, of products that are s·B·A; what is refused is none

    @staticmethod
    def together(computed: Sequence[Computed]) -> list[Any]:
        """Those whose factors have equal shapes in one batch each."""
        alike: dict[Any, list[Computed]] = {}
        for c in computed:
            way = cast(LowRank, c.way)
            key = [(part.shape, part.dtype, part.device) for part in way.parts()]
            alike.setdefault((way.flipped, *key), []).append(c)
        return [Products(batch) for batch in alike.values()]

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
        """Both, or batches of both, as matrices of as many columns as the rank: one row for each unit, and for each input."""
        changed, other = (part.detach().flatten(part.ndim - self.parts()[0].ndim + 1) for part in parts)
        return (changed.mT, other) if self.flipped else (changed, other.mT)

    def forward(self, *parts: Tensor) -> Tensor:
        changed, other = self.factors(*parts)
        x = (self.scale * _triangle(other) @ changed.to(wide(changed.device)).mT).mT
        return x.to(coordinates_dtype(changed.dtype)).contiguous()

    def inverse(self, parts: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
        self.refuse_merged()
        changed, other = self.factors(*parts)
        found = _moved(changed, self.scale * _triangle(other), old, new)
        return [(found.mT if self.flipped else found).reshape(parts[0].shape), parts[1]]

    def refuse_merged(self) -> None:
        """PolicyError where the base would keep what a changed factor no longer is."""
        if self.adapter in self.layer.merged_adapters:
            raise PolicyError(
                f"the adapter {self.adapter!r} is merged into its base, which would keep the old product: call unmerge_adapter() before "
                "you train on, or remove the rule."
            )

    def pulled(self, wanted: Sequence[Tensor], pull: Tensor) -> list[Tensor | None]:
        """s·G·R for B and s·Bᵀ·G·Qᵀ for A, of the gradient G of X."""
        parts = self.parts()
        changed, other = (factor.to(wide(factor.device)) for factor in self.factors(*parts))
        q, r = torch.linalg.qr(other)
        slope = pull.to(changed.dtype) * self.scale
        of_changed, of_other = slope @ r, q @ (slope.mT @ changed)
        found = (of_changed.mT, of_other) if self.flipped else (of_changed, of_other.mT)
        grads = {id(p): g.reshape(p.shape).to(p.dtype) for p, g in zip(parts, found, strict=True)}
        return [grads.get(id(p)) for p in wanted]

    def margin(self, new: Tensor) -> float:
        return 2 * torch.finfo(self.parts()[0].dtype).eps

    def noise(self) -> Tensor | None:
        changed, other = self.factors(*self.parts())
        if changed.dtype != torch.float64:    # X is computed wider than it is kept, which `margin` covers
            return None
        sizes = abs(self.scale) * _triangle(other).abs() @ changed.abs().mT
        return (8 + 2 * changed.shape[-1]) * torch.finfo(changed.dtype).eps * sizes.mT

    def base_weight(self) -> Tensor:
        """W₀ as numbers; of a quantised base as PEFT's own function dequantises it."""
        base = self.layer.get_base_layer()
        weight: Tensor = base.weight
        if weight.is_floating_point() and type(weight) in (nn.Parameter, Tensor):
            return weight.detach()
        from peft.utils.integrations import dequantize_module_weight

        found: Tensor = dequantize_module_weight(base)
        return found.detach()


class Products:
    """Products whose factors have equal shapes, read and written in one batch. The memory that rules work in is one tensor's."""

    def __init__(self, computed: Sequence[Computed]) -> None:
        self.computed, self.ways = computed, [cast(LowRank, c.way) for c in computed]
        self._changed, self._others = map(list, zip(*(way.parts() for way in self.ways), strict=True))
        shape, device = computed[0].site.param.shape, self._changed[0].device
        self._x = torch.empty(len(computed), *shape, dtype=coordinates_dtype(self._changed[0].dtype), device=device)
        self.tensors = list(self._x.unbind())
        for c, x in zip(computed, self.tensors, strict=True):
            c.tensor = x
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """As `Computed.read` of each."""
        scales = [way.scale for way in self.ways]
        device = self._x.device
        scale: Any = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, dtype=wide(device), device=device)[:, None, None]
        self._factor, other = self.ways[0].factors(torch.stack(self._changed), torch.stack(self._others))
        self._r = _triangle(other).mul_(scale)
        self._x.copy_((self._r @ self._factor.to(self._r.dtype).mT).mT)
        self._seen = self._x.clone()
        self._versions = [x._version for x in self.tensors]

    @torch.no_grad()
    def write(self) -> None:
        """As `Computed.write` of each."""
        if [x._version for x in self.tensors] == self._versions:
            return
        self.refuse_merged()
        found = _moved(self._factor, self._r, self._seen, self._x)
        found = (found.mT if self.ways[0].flipped else found).reshape(-1, *self._changed[0].shape)
        torch._foreach_copy_(self._changed, list(found.unbind()))

    def scalable(self) -> dict[int, Tensor]:
        """By the id of each tensor the factor of which it is a multiple, (units, rank): to scale units of that is to scale those of X.
        Not in float64, where who has scaled looks at X again."""
        if self._x.dtype == torch.float64:
            return {}
        self.refuse_merged()
        factors = [p.detach().mT if way.flipped else p.detach().flatten(1) for way, p in zip(self.ways, self._changed, strict=True)]
        return {id(x): factor for x, factor in zip(self.tensors, factors, strict=True)}

    def refuse_merged(self) -> None:
        """See `LowRank.refuse_merged`."""
        for way in self.ways:
            way.refuse_merged()


# Below, factors are (..., units, rank) and (..., inputs, rank). Products of small and long matrices are taken as R·Bᵀ, which torch's CPU
# kernels compute several times as fast as B·Rᵀ.


def coordinates_dtype(factor: torch.dtype) -> torch.dtype:
    """Of X: fp32 or better."""
    return torch.float64 if factor == torch.float64 else torch.float32


def _triangle(other: Tensor) -> Tensor:
    """R of the QR decomposition, in float64 where there is one."""
    return torch.linalg.qr(other.to(wide(other.device)), mode="r").R


def _moved(changed: Tensor, r: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The factor plus (new − old)·R⁺ᵀ, in its own dtype: bit for bit the same where nothing changes, and where that is not finite."""
    back, failed = torch.linalg.inv_ex(r) if r.shape[-2] == r.shape[-1] else (r, None)
    # A triangle that is all but singular has no inverse worth having; on a device, where looking would wait, the pseudoinverse is taken.
    fits = failed is not None and may_branch(r) and bool((back.norm(dim=(-2, -1)) * r.norm(dim=(-2, -1)) < WELL_CONDITIONED).all())
    back = back if fits else torch.linalg.pinv(r.nan_to_num(0, 0, 0))
    change = (new - old).to(r.dtype).mT
    found = changed.to(r.dtype).mT + back @ change
    if changed.dtype == r.dtype:    # float64: no rounding to a narrower dtype hides the errors of the inverse and of a long way to go
        found = found + torch.where((change != 0).any(-2, keepdim=True), back @ (new.mT - r @ found), 0.0)
    found = found.mT
    return torch.where(found.isfinite(), found, changed.to(r.dtype)).to(changed.dtype)


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
        changed, other = way.factors(*way.parts())
        weight: Any = torch.empty(len(changed), min(other.shape), dtype=coordinates_dtype(place.param.dtype), device="meta")
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
