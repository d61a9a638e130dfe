"""Weights that a module computes from other tensors: parametrizations, the hooks of torch.nn.utils, masks of pruning.

A rule on weights means the weight that the module uses. For each kind of computation a `Way` says which raw tensors it reads, how it
computes, and which raw tensors would give another weight. ``engine.inverse_trials`` tries, when a rule is bound, whether that works for
what the rule does; nothing outside of this file asks which kind it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normwise.norms.reduce import HALF, may_branch, wide
from normwise.parameters.layouts import is_known
from normwise.parameters.names import Site

# torch's parametrizations that no raw tensor can give another norm.
_FIXED = {
    "_SpectralNorm": "spectral_norm divides by the largest singular value, which is 1 whatever the raw tensor is",
    "_Orthogonal": "an orthogonal parametrization fixes every singular value, and with them the norms",
}
_TWICE = "it is computed in two steps, one within the other"


class Way:
    """How one weight is computed from raw tensors. ``parts`` are all its raw tensors, in the order in which ``forward`` takes them."""

    how = ""
    """What computes it, for people."""
    refusal = ""
    """Why no raw tensors can be found for another weight; empty where they can."""
    differentiable = True
    """Whether a penalty can act even where ``refusal`` says that a bound cannot."""

    selective = False
    """Whether ``inverse`` leaves what did not change as it is, so that nobody must look whether there is anything to do."""

    together: Callable[[Sequence[Computed]], list[Any]] | None = None
    """What reads and writes many weights of this kind in fewer calls; None where each does by itself."""

    def parts(self) -> list[Tensor]:
        """The raw tensors as they are registered now."""
        raise NotImplementedError

    def inner(self) -> list[nn.Parameter]:
        """Further parameters that the weight depends on, such as LoRA's A and B."""
        return []

    def forward(self, *parts: Tensor) -> Tensor:
        """The weight. Differentiable, and without side effects: no step of a power iteration."""
        raise NotImplementedError

    def inverse(self, parts: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
        """Raw tensors that give ``new`` instead of ``old``; a part that need not change comes back as it is."""
        raise NotImplementedError

    def pulled(self, wanted: Sequence[Tensor], pull: Tensor) -> Sequence[Tensor | None]:
        """The gradients of the parameters ``wanted`` where the weight's is ``pull``."""
        if not wanted:
            return ()
        with torch.enable_grad():
            weight = self.forward(*self.parts())
        # Through the module's own graph, so that a penalty on the weight is exact whatever computes it.
        return torch.autograd.grad(weight, wanted, pull.to(weight.dtype), allow_unused=True)

    def twin(self) -> Way:
        """One on which ``inverse`` can be tried without touching the module."""
        return self

    def margin(self, new: Tensor) -> float:
        """By what share a norm of the weight may differ from that of what was assigned, because of rounding in ``forward``."""
        return 0.0

    def noise(self) -> Tensor | None:
        """How far each entry of the present weight may be from what another order of the same float64 operations gives, shaped as the
        weight. None where that is no more than a share of the entry."""
        return None

    def refresh(self) -> None:
        """Tells the module that its raw tensors have changed."""


class Parametrized(Way):
    """``torch.nn.utils.parametrize``: one parametrization or several in a chain."""

    def __init__(self, chain: ParametrizationList) -> None:
        self.chain: Any = chain
        self.layers: list[Any] = [chain[i] for i in range(len(chain))]
        self.how = " of ".join(_kind(layer) for layer in reversed(self.layers))
        self.selective = self.how == "weight_norm"
        self.refusal = _TWICE if chain._forward_pre_hooks else next(filter(None, map(_why_fixed, self.layers)), "")

    def parts(self) -> list[Tensor]:
        names = ["original"] if self.chain.is_tensor else [f"original{i}" for i in range(self.chain.ntensors)]
        return [getattr(self.chain, name) for name in names]

    def inner(self) -> list[nn.Parameter]:
        raw = {id(part) for part in self.parts()}
        return [p for p in self.chain.parameters() if id(p) not in raw]

    def forward(self, *parts: Tensor) -> Tensor:
        with _resting(self.chain):
            return self._through(self.layers[0](*parts))

    def _through(self, x: Tensor) -> Tensor:
        for layer in self.layers[1:]:
            x = layer(x)
        return x

    def inverse(self, parts: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
        first = self.layers[0]
        with _resting(self.chain):
            for layer in reversed(self.layers[1:]):
                new = layer.right_inverse(new)
            if _kind(first) == "weight_norm":
                old = old if len(self.layers) == 1 else first(*parts)
                return _magnitude_and_direction(parts[0], parts[1], old, new, first.dim)
            found = first.right_inverse(new)
        return [found] if isinstance(found, Tensor) else list(found)

    def twin(self) -> Way:
        return Parametrized(copy.deepcopy(self.chain))

    def margin(self, new: Tensor) -> float:
        if [_kind(layer) for layer in self.layers] == ["weight_norm"]:
            return _weight_norm_margin(new)
        return 4 * torch.finfo(new.dtype).eps


def _kind(layer: Any) -> str:
    ours = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm", "_Orthogonal": "orthogonal"}
    return ours.get(type(layer).__name__, type(layer).__name__) if _is_torchs(layer) else type(layer).__name__


def _is_torchs(layer: Any) -> bool:
    return type(layer).__module__ == "torch.nn.utils.parametrizations"


def _why_fixed(layer: Any) -> str:
    if _is_torchs(layer) and type(layer).__name__ in _FIXED:
        return _FIXED[type(layer).__name__]
    if not hasattr(layer, "right_inverse"):
        return f"its parametrization {type(layer).__name__} has no right_inverse, so nothing tells which raw tensors give another weight"
    return ""


@contextmanager
def _resting(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, so that looking at a weight takes no step of a power iteration and draws no noise."""
    # Spectral norm takes a power iteration in each forward pass in training mode, which would change its state.
    awake = [m for m in module.modules() if m.training]
    for m in awake:
        m.training = False
    try:
        yield
    finally:
        for m in awake:
            m.training = True


class Hooked(Way):
    """A forward hook of torch.nn.utils writes ``module.<name>`` anew before each forward pass."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, name: str, hook: Any) -> None:
        self.module, self.name, self.hook = module, name, hook

    def parts(self) -> list[Tensor]:
        return [getattr(self.module, self.name + suffix) for suffix in self.suffixes]

    def refresh(self) -> None:
        """The module keeps the weight of its last forward pass as an attribute; made as the hook makes it, with its graph."""
        with torch.enable_grad():
            setattr(self.module, self.name, self.forward(*self.parts()))


class OldWeightNorm(Hooked):
    """``torch.nn.utils.weight_norm``."""

    how, suffixes, selective = "weight_norm", ("_g", "_v"), True

    def forward(self, *parts: Tensor) -> Tensor:
        return torch._weight_norm(parts[1], parts[0], self.hook.dim)

    def inverse(self, parts: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
        return _magnitude_and_direction(parts[0], parts[1], old, new, self.hook.dim)

    def margin(self, new: Tensor) -> float:
        return _weight_norm_margin(new)


class OldSpectralNorm(Hooked):
    """``torch.nn.utils.spectral_norm``."""

    how, suffixes, refusal = "spectral_norm", ("_orig",), _FIXED["_SpectralNorm"]

    def forward(self, *parts: Tensor) -> Tensor:
        matrix = self.hook.reshape_weight_to_matrix(parts[0])
        u, v = (getattr(self.module, self.name + which) for which in ("_u", "_v"))
        return parts[0] / torch.dot(u, torch.mv(matrix, v))


class Masked(Hooked):
    """``torch.nn.utils.prune``: raw · mask. What is masked keeps its raw value."""

    how, suffixes, selective = "a pruning mask", ("_orig",), True

    def forward(self, *parts: Tensor) -> Tensor:
        return self._mask(parts[0]) * parts[0]

    def inverse(self, parts: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
        mask = self._mask(parts[0])
        return [torch.where((mask != 0) & (new != old), new / mask, parts[0])]

    def margin(self, new: Tensor) -> float:
        mask = self._mask(new)
        return 0.0 if bool(((mask == 0) | (mask == 1)).all()) else 2 * torch.finfo(new.dtype).eps

    def _mask(self, like: Tensor) -> Tensor:
        mask: Tensor = getattr(self.module, f"{self.name}_mask")
        return mask.to(like.dtype)


class Unknown(Hooked):
    """A weight that several hooks compute one after the other, or code of somebody's own."""

    how, differentiable = "code that normwise cannot follow", False

    def __init__(self, module: nn.Module, name: str, parts: Sequence[str], refusal: str) -> None:
        super().__init__(module, name, None)
        self.suffixes, self.refusal = tuple(part.removeprefix(name) for part in parts), refusal

    def forward(self, *parts: Tensor) -> Tensor:
        weight: Tensor = getattr(self.module, self.name)
        return weight


def _weight_norm_margin(new: Tensor) -> float:
    """Entries are rounded, g and v are, and so is their product. In fp32 and float64 the kernel sums the squares of a vector in the same
    precision, with an error of about √n eps at worst; in half precision it sums in fp32."""
    eps = torch.finfo(new.dtype).eps
    return 3 * eps if new.dtype in HALF else eps * (4 + new.numel() ** 0.5)


def _magnitude_and_direction(g: Tensor, v: Tensor, old: Tensor, new: Tensor, dim: int) -> list[Tensor]:
    """g and v of weight normalisation, w = g·v/‖v‖ (Salimans & Kingma, 2016), for another w.

    A vector that is only scaled gets another g and keeps its v. Otherwise v takes the new direction at its old length, since that length
    sets how fast v turns. A vector of zeros is g = 0: with v = 0 it would be 0/0.
    """
    work = wide(v.device)
    rows = [_vectors(t.to(work), dim) for t in (v, old, new)]
    length, was, now = (torch.linalg.vector_norm(r, dim=1, keepdim=True) for r in rows)
    ratio = torch.where(was > 0, now / was, 0.0)
    info = torch.finfo(v.dtype)    # each entry rounded once; a norm of the difference would pass over a single entry that was cut
    rounded = ((rows[2] - ratio * rows[1]).abs() <= info.eps * rows[2].abs() + info.tiny * info.eps).all(1, keepdim=True)
    same = (rows[2] == rows[1]).all(1, keepdim=True) | ~(now.isfinite() & (length > 0) & length.isfinite())
    # Told by every entry: a vector that only changed its length keeps its direction bit for bit.
    scaled = (now == 0) | ((was > 0) & rounded)
    turned = torch.where(same | scaled, rows[0], rows[2] * (length / now)).to(v.dtype)
    kept = torch.linalg.vector_norm(turned.to(work), dim=1, keepdim=True)
    size = g.to(work).reshape(-1, 1)
    magnitude = torch.where(same, size, torch.where(scaled, size * ratio, now * kept / length))
    return [magnitude.to(g.dtype).reshape(g.shape), _unvectors(turned, v, dim)]


def _vectors(t: Tensor, dim: int) -> Tensor:
    """The vectors that have one magnitude each, as rows; torch's ``dim=-1`` (``None``) is all of them as one."""
    return t.reshape(1, -1) if dim == -1 else t.movedim(dim, 0).reshape(t.shape[dim], -1)


def _unvectors(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    if dim == -1:
        return rows.reshape(like.shape)
    return rows.reshape(like.movedim(dim, 0).shape).movedim(0, dim)


# ------------------------------------------------------------------------------------------------------------ a weight


@dataclass(eq=False)
class Computed:
    """A computed weight with the memory that rules on it work in. ``site`` is where the module has it."""

    way: Way
    site: Site
    tied: list[Site]
    raw_names: tuple[str, ...]
    """The clean names of the raw tensors."""
    failure: str = ""
    """Why it could not be computed."""
    tensor: Tensor | None = field(default=None, repr=False)
    """What ``read`` found; rules change it, ``write`` makes it so."""
    _seen: Tensor | None = field(default=None, repr=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that the weight depends on, raw tensors first, those of the weight's own shape at the front."""
        raw = [p for p in self.way.parts() if isinstance(p, nn.Parameter)]
        return [*sorted(raw, key=lambda p: p.shape != self.site.param.shape), *self.way.inner()]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that are not frozen."""
        return [p for p in self.parameters if p.requires_grad]

    @property
    def refusal(self) -> str:
        """Why no rule can set it; empty where one can."""
        return self.way.refusal or self.failure

    def refused(self, phase: str) -> str:
        """Why no rule of this phase can act on it; empty where one can. A penalty needs a gradient and no inverse."""
        return "" if phase == "penalty" and self.way.differentiable and not self.failure else self.refusal

    @torch.no_grad()
    def fresh(self) -> Tensor:
        """The weight as the module computes it now."""
        return self.way.forward(*self.way.parts()).detach()

    @torch.no_grad()
    def read(self) -> Tensor:
        """As ``fresh``, in memory that the next ``read`` overwrites."""
        now = self.fresh()
        kind = now.shape, now.dtype, now.device
        if self.tensor is None or self._seen is None or (self.tensor.shape, self.tensor.dtype, self.tensor.device) != kind:
            self.tensor, self._seen = torch.empty_like(now), torch.empty_like(now)
        self._seen.copy_(now)
        return self.tensor.copy_(now)

    @torch.no_grad()
    def write(self) -> None:
        """Gives the raw tensors the values that make the weight what ``tensor`` has become; nothing where it is as it was read."""
        assert self.tensor is not None and self._seen is not None
        if (may_branch(self.tensor) or not self.way.selective) and torch.equal(self.tensor, self._seen):
            return
        parts = self.way.parts()
        for part, new in zip(parts, self.way.inverse(parts, self._seen, self.tensor), strict=True):
            if new is not part:
                part.copy_(torch.where(new.isfinite(), new, part))    # an inverse that leaves its domain must not spoil the raw tensor
        self.way.refresh()

    def pull_back(self, pull: Tensor) -> None:
        """Adds to the gradients of its parameters what a gradient ``pull`` of the weight is for them."""
        wanted = [p for p in self.trained if p.grad is not None]
        for p, grad in zip(wanted, self.way.pulled(wanted, pull), strict=True):
            if grad is not None and p.grad is not None:
                p.grad.add_(grad)


def in_batches(computed: Iterable[Computed]) -> list[Any]:
    """What reads and writes these weights: each itself, or a batch of them."""
    kinds: dict[Any, list[Computed]] = {}
    for c in computed:
        kinds.setdefault(c.way.together, []).append(c)
    return [one for together, alike in kinds.items() for one in (together(alike) if together else alike)]


# ------------------------------------------------------------------------------------------------------------- finding


def find_computed(places: Iterable[Site]) -> list[Computed]:
    """The computed weights of a model, in the order of the first parameters that they depend on."""
    found: dict[object, tuple[Way, dict[str, Site], dict[str, None]]] = {}
    for place in places:
        at = _in_parametrization(place) or _under_hook(place)
        if at is None:
            continue
        key, make, home, raw = at
        if key not in found:
            found[key] = make(), {}, {}
        _, homes, names = found[key]
        homes.setdefault(home.name, home)
        names |= {place.name: None} if raw else {}
    return [_computed(way, list(homes.values()), tuple(names)) for way, homes, names in found.values()]


# What tells one computed weight from others, what makes its way, where the module has it, and whether the place is a raw tensor of it.
_At = tuple[object, Callable[[], Way], Site, bool]


def _in_parametrization(place: Site) -> _At | None:
    """The weight that a raw tensor, or a parameter of a parametrization, is for."""
    above = (*place.parents, place.module)
    depth = max((i for i, module in enumerate(above) if isinstance(module, ParametrizationList)), default=0)
    if depth < 2:
        return None
    chain: Any = above[depth]
    holder, _, rest = place.name.rpartition("parametrizations.")
    local = rest.partition(".")[0]
    home = replace(place, name=holder + local, module=above[depth - 2], local_name=local, parents=above[: depth - 2],
        steps=place.steps[: depth - 2])
    return id(chain), lambda: Parametrized(chain), home, place.module is chain


_HOOKS: tuple[tuple[type[Any], str, type[Hooked]], ...] = (
    (WeightNorm, "name", OldWeightNorm), (SpectralNorm, "name", OldSpectralNorm), (BasePruningMethod, "_tensor_name", Masked),
)  # fmt: skip


def _under_hook(place: Site) -> _At | None:
    """The weight that a forward hook of the module computes from this tensor."""
    module: Any = place.module
    hooks = [(getattr(h, named), kind, h) for h in module._forward_pre_hooks.values() for cls, named, kind in _HOOKS if isinstance(h, cls)]
    reads = {name + suffix: name for name, kind, _ in hooks for suffix in kind.suffixes}
    local = place.local_name
    if local not in reads:
        return _under_strange_hook(place)
    while reads[local] in reads:
        local = reads[local]
    name = reads[local]
    home = replace(place, name=place.name.removesuffix(place.local_name) + name, local_name=name)
    if any(part in reads.values() for part, of in reads.items() if of == name):
        registered = [part for part in reads if part in module._parameters]
        return (id(module), name), lambda: Unknown(module, name, registered, _TWICE), home, True
    kind, hook = next((kind, hook) for of, kind, hook in hooks if of == name)
    return (id(module), name), lambda: kind(module, name, hook), home, True


def _under_strange_hook(place: Site) -> _At | None:
    """A module of a known type keeps its weight as a plain attribute, and parameters whose names begin with the weight's."""
    module, local = place.module, place.local_name
    usual = [name for name, value in vars(module).items() if isinstance(value, Tensor) and name.startswith(("weight", "bias"))]
    plain = [name for name in usual if local.startswith(f"{name}_")]
    if not plain or not is_known(module):
        return None
    name = plain[0]
    parts = [part for part in module._parameters if part.startswith(f"{name}_")]
    home = replace(place, name=place.name.removesuffix(local) + name, local_name=name)
    why = f"code of your own sets {type(module).__name__}.{name}, and nothing tells which raw tensors give another weight"
    return (id(module), name), lambda: Unknown(module, name, parts, why), home, True


def _computed(way: Way, homes: list[Site], raw_names: tuple[str, ...]) -> Computed:
    failure = ""
    try:
        with torch.no_grad():
            weight = way.forward(*way.parts())
        shape: Any = torch.empty_like(weight, device="meta")
    except Exception as error:
        shape = homes[0].param
        failure = f"computing it failed with {type(error).__name__}: {error}"
    here, *tied = [replace(home, param=shape) for home in homes]
    return Computed(way, here, tied, raw_names, failure)
