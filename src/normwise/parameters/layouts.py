"""Parameter <-> batch of blocks: which axis of a tensor is what, told by the module's type and never guessed from the rank.

A `Layout` gives each axis a letter. `block_view` turns a layout and a `per=` into a `BlockView`, which opens a tensor as a batch of
blocks and writes the batch back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from normwise.errors import LayoutError, nearest

PER = ("tensor", "matrix", "unit", "input", "head", "expert", "element", "global")
ROWS, COLUMNS = "seho", "Hik"
REPEATABLE = "oik"
_BATCH = {
    "tensor": "", "global": "", "matrix": "se", "unit": "seho", "input": "seHi", "expert": "e", "element": ROWS + COLUMNS,
}
_HOLDS_MATRICES = ("tensor", "matrix", "head", "expert")
_NEEDS = {"input": "iH", "head": "hH", "expert": "e"}
_STATED_AS = {
    "head": 'layout=nw.Layout("hoi", (heads, d, e))',
    "expert": 'layout=nw.Layout("eoi", (experts, outputs, inputs))',
}


@dataclass(frozen=True)
class Layout:
    """The axes of a parameter, one letter each. Two layouts are equal whatever they call their parts.

    Args:
        axes: ``s`` stack (gate, q/k/v, group), ``e`` expert, ``h`` head on the output side, ``H`` head on the input side, ``o`` output
            unit, ``i`` input unit, ``k`` kernel. ``o``, ``i`` and ``k`` may repeat: a kernel of 3x3 is ``kk``, the gain of a LayerNorm
            over two dimensions ``oo`` (its unit is a pair of indices).
        shape: the size of each axis. The tensor's own dimensions are split, never merged: a ``(12, 8)`` weight of three stacked matrices
            is ``Layout("soi", (3, 4, 8))``.
        certain: False if nobody stated the orientation, as for a bare parameter of two or more dimensions; `block_view` then refuses to
            guess.
        parts: what the matrices along ``s`` are, one name each: ``("q", "k", "v")``, ``("gate", "up")``; empty if nobody said. A matrix
            that is larger than its neighbours is cut into pieces of their size, which keep its name: ``("q", "q", "q", "q", "k", "v")``
            where four query heads share one key head.
        owner: the class that holds the parameter, for the error about a layout that nobody stated.

    Raises:
        LayoutError: an unknown letter, a repeated ``s``, ``e``, ``h`` or ``H``, a shape of another length, or another number of parts.
    """

    axes: str
    shape: tuple[int, ...]
    certain: bool = True
    parts: tuple[str, ...] = field(default=(), compare=False)
    owner: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "parts", tuple(self.parts))
        unknown = sorted(set(self.axes) - set(ROWS + COLUMNS))
        if unknown or not self.axes:
            raise LayoutError(f"A layout's axes are letters of 'sehoHik'; given {self.axes!r}.")
        twice = sorted({a for a in self.axes if self.axes.count(a) > 1 and a not in REPEATABLE})
        if twice:
            raise LayoutError(f"Axis {twice[0]!r} stands twice in layout {self.axes!r}; only 'o', 'i' and 'k' may repeat.")
        if len(self.axes) != len(self.shape):
            raise LayoutError(f"Layout {self.axes!r} has {len(self.axes)} axes, but its shape {self.shape} has {len(self.shape)}.")
        if self.parts and len(self.parts) != self.size("s"):
            raise LayoutError(f"Layout {self} has {self.size('s')} matrices along 's', but names {len(self.parts)} parts: {self.parts}.")

    def __str__(self) -> str:
        return " ".join(f"{axis}{size}" for axis, size in zip(self.axes, self.shape, strict=True))

    def size(self, letters: str) -> int:
        """The product of the sizes of all axes in ``letters``; 1 where there is none."""
        return math.prod(n for a, n in zip(self.axes, self.shape, strict=True) if a in letters)

    def check(self, shape: Sequence[int], name: str = "parameter") -> Layout:
        """This layout, if it splits a tensor of ``shape``; LayoutError otherwise."""
        if not _splits(self.shape, tuple(shape)):
            raise LayoutError(
                f"Layout({self.axes!r}, {self.shape}) does not fit {name!r} of shape {tuple(shape)}: "
                "each dimension of the tensor must be the product of consecutive axes, in the tensor's own order."
            )
        return self


def _splits(fine: tuple[int, ...], coarse: tuple[int, ...]) -> bool:
    # Of an empty tensor every split is right, and the products below would never end.
    if math.prod(fine) == 0 or math.prod(coarse) == 0:
        return math.prod(fine) == math.prod(coarse)
    pieces = iter([n for n in fine if n != 1])
    for size in (n for n in coarse if n != 1):
        product = 1
        while product < size:
            product *= next(pieces, size + 1)
        if product != size:
            return False
    return next(pieces, None) is None


# ---------------------------------------------------------------------------------------------------------- module types

Describe = Callable[[nn.Module, str, Tensor], Layout | None]


@dataclass(frozen=True)
class Registration:
    """What `register_layout` was told of a class. ``child`` is the path of a submodule, "" for the module's own parameters."""

    describe: Describe
    role: str | None = None
    child: str = ""


_REGISTERED: dict[type[nn.Module] | str, list[Registration]] = {}
# Every `child` that some class is registered with: most paths are none, which is quickly told.
_CHILDREN: set[str] = set()


def register_layout(cls: type[nn.Module] | str, layout: Describe, *, role: str | None = None, child: str = "") -> None:
    """Teaches normwise the axes of a module class; subclasses inherit them.

    Args:
        cls: the class, or its name (``"GPT2Attention"``, or with its module ``"transformers.models.gpt2.modeling_gpt2.GPT2Attention"``)
            if importing it is slow or impossible.
        layout: ``layout(module, name, tensor)`` gets the module, the parameter's own name (``"weight"``) and the tensor. It returns a
            `Layout`, or None to leave the parameter to earlier registrations, then to base classes. The latest registration of a class is
            asked first, so you can replace a built-in layout.
        role: the role of parameters for which ``layout`` returns two or more letters; by default the role found otherwise, which for a
            bare parameter is "other". Stacked experts are ``"hidden"``. Biases stay biases.
        child: the path of a submodule, such as ``"c_attn"``, if the parent decides what a plain Linear in it means. ``layout`` is asked
            for that submodule's parameters and still gets the module of class ``cls``, which knows its heads.

    >>> nw.register_layout(Experts, lambda m, name, t: nw.Layout("eoi", t.shape) if t.ndim == 3 else None, role="hidden")
    >>> nw.register_layout(Attention, lambda m, name, t: nw.Layout("so" + "i" * (t.ndim - 1), (3, m.width, *t.shape[1:])), child="qkv")
    """
    _REGISTERED.setdefault(cls, []).insert(0, Registration(layout, role, child))
    if child:
        _CHILDREN.add(child)


def layout_of(module: nn.Module, name: str, tensor: Tensor, parent: nn.Module | None = None) -> Layout:
    """The layout of ``module``'s parameter ``name``; an unknown parameter of two or more dimensions has ``certain=False``.

    Args:
        parent: the module that holds ``module``, if known: only it tells the heads of ``MultiheadAttention.out_proj`` and the tensor
            behind a parametrization (there it is the parametrized module).

    Raises:
        LayoutError: a lazy parameter that has no shape yet, or a registered layout that does not fit the tensor.
    """
    if is_lazy(tensor):
        raise LayoutError(f"{name!r} of {type(module).__name__} has no shape yet; run one forward pass before using a policy.")
    owner = type(module).__name__
    if isinstance(module, ParametrizationList):
        return _parametrized(module, tensor, parent) or _unsure(tensor, owner if parent is None else type(parent).__name__)
    plain = plain_name(name)
    bare = _unsure(tensor, owner) if tensor.ndim >= 2 else Layout("o", tuple(tensor.shape) or (1,))
    return _attention_output(module, plain, tensor, parent) or _registered(module, plain, tensor) or bare


def is_known(module: nn.Module) -> bool:
    """Whether the module's type, or a base of it, has stated axes."""
    return any(key in _REGISTERED for cls in type(module).__mro__ for key in (cls, cls.__name__, f"{cls.__module__}.{cls.__qualname__}"))


def registered(module: nn.Module, name: str, tensor: Tensor, child: str = "") -> tuple[Layout, str | None] | None:
    """The layout and the role, if one was stated, that ``module``'s class is registered with: for its own parameter ``name``, or for that
    of its submodule ``child``."""
    if child and child not in _CHILDREN:
        return None
    keys = (key for cls in type(module).__mro__ for key in (cls, cls.__name__, f"{cls.__module__}.{cls.__qualname__}"))
    for known in (one for key in keys for one in _REGISTERED.get(key, ())):
        if known.child == child and (layout := known.describe(module, name, tensor)) is not None:
            where = f"{child}.{name}" if child else name
            return layout.check(tensor.shape, f"{type(module).__name__}.{where}"), known.role
    return None


def plain_name(name: str) -> str:
    """Pruning and the old weight_norm and spectral_norm keep 'weight' as 'weight_orig', or as 'weight_g' and 'weight_v'."""
    return name.removesuffix("_orig").removesuffix("_g").removesuffix("_v")


def _registered(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    found = registered(module, name, tensor)
    return found[0] if found is not None else _hugging_face_conv1d(module, name, tensor)


def _unsure(tensor: Tensor, owner: str = "") -> Layout:
    shape = tuple(tensor.shape) or (1,)
    return Layout(("oi" + "k" * len(shape))[: len(shape)], shape, certain=False, owner=owner)


QKV = ("q", "k", "v")


def _dense(axes: str, tensor: Tensor, *lead: int, parts: tuple[str, ...] = ()) -> Layout:
    """``axes`` with the first dimension split into ``lead`` and what remains; unsure where the tensor is no such thing (flattened,
    sharded or packed by somebody else)."""
    outer = math.prod(lead)
    if tensor.ndim != len(axes) - len(lead) or outer == 0 or tensor.shape[0] % outer:
        return _unsure(tensor)
    return Layout(axes, (*lead, tensor.shape[0] // outer, *tensor.shape[1:]), parts=parts)


def _by_name(**axes: str) -> Describe:
    """Of a class whose tensors are what their names say."""
    return lambda module, name, tensor: _dense(axes[name], tensor) if name in axes else None


def _convolution(module: Any, name: str, tensor: Tensor) -> Layout | None:
    if name != "weight":
        return None
    axes = ("io" if module.transposed else "oi") + "k" * len(module.kernel_size)
    return _dense(axes, tensor) if module.groups == 1 else _dense("s" + axes, tensor, module.groups)


def _recurrent(module: Any, name: str, tensor: Tensor) -> Layout | None:
    if name.startswith("weight_hr"):
        return _dense("oi", tensor)
    axes = {"weight": "oi", "bias": "o"}.get(name.split("_")[0])
    if axes is None or tensor.ndim == 0:
        return None
    gates = tensor.shape[0] // module.hidden_size if module.hidden_size else 1
    return _dense(axes, tensor) if gates == 1 else _dense("s" + axes, tensor, gates)


def _attention(module: Any, name: str, tensor: Tensor) -> Layout | None:
    if name == "in_proj_weight":
        return _dense("shoi", tensor, 3, module.num_heads, parts=QKV)
    if name == "in_proj_bias":
        return _dense("sho", tensor, 3, module.num_heads, parts=QKV)
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return _dense("hoi", tensor, module.num_heads)
    if name in ("bias_k", "bias_v"):
        return Layout("ooho", (1, 1, module.num_heads, tensor.shape[-1] // module.num_heads))
    return None


def _attention_output(module: nn.Module, name: str, tensor: Tensor, parent: nn.Module | None) -> Layout | None:
    if not isinstance(parent, nn.MultiheadAttention) or module is not parent.out_proj or name != "weight":
        return None
    if tensor.ndim != 2 or tensor.shape[1] % parent.num_heads:
        return None
    return Layout("oHi", (tensor.shape[0], parent.num_heads, tensor.shape[1] // parent.num_heads))


def _gain(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    shape = tuple(tensor.shape) or (1,)
    return Layout("o" * len(shape), shape) if name in ("weight", "bias") else None


def _hugging_face_conv1d(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    """GPT-2's ``Conv1D`` is a Linear whose weight is stored (in, out); known by its name, since importing transformers is slow."""
    known = hasattr(module, "nf") and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return _dense("io", tensor) if known and name == "weight" else None


def _parametrized(owner: ParametrizationList, tensor: Tensor, parent: nn.Module | None) -> Layout | None:
    """torch's own parametrizations keep the orientation of the tensor that they stand for; others may do anything."""
    parts: Any = getattr(parent, "parametrizations", {})
    names = [name for name in parts if parts[name] is owner]
    ours = all(type(p).__module__ == "torch.nn.utils.parametrizations" for p in owner)
    return _registered(parent, names[0], tensor) if parent is not None and names and ours else None


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
_TYPES: tuple[tuple[Describe, tuple[type[nn.Module], ...]], ...] = (
    (_by_name(weight="oi", bias="o"), (nn.Linear,)),
    # Linear in the products of its two inputs, so that an input unit is a pair.
    (_by_name(weight="oii"), (nn.Bilinear,)),
    # The unit is one token's vector, so that an embedding and a head tied to it mean the same.
    (_by_name(weight="oi"), (nn.Embedding, nn.EmbeddingBag)),
    (_convolution, (nn.modules.conv._ConvNd,)),
    (_recurrent, (nn.RNNBase, nn.RNNCellBase)),
    (_attention, (nn.MultiheadAttention,)),
    (_gain, _NORMS),
)
for _describe, _classes in _TYPES:
    for _cls in _classes:
        register_layout(_cls, _describe)


# ---------------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class BlockView:
    """One parameter as a batch of ``count`` blocks of ``block_shape``; made by `block_view`, hashable.

    Parameters of equal views can share a bucket. ``shape`` is the tensor with its axes split, ``order`` a permutation of these
    axes: the first ``batch`` of them say which block, the others hold it (rows before columns for a matrix). Within each of
    these parts the axes keep the tensor's order, so that as few views as possible are copies.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    batch: int
    block_shape: tuple[int, ...]
    count: int
    kernel: int = 1
    """The entries of the convolution kernel, which the columns of a matrix count too; 1 without one."""

    def open(self, t: Tensor) -> Tensor:
        """``t`` with its axes split, shape ``self.shape``: always a view, since splitting an axis needs no copy."""
        return t.view(self.shape)

    def blocks(self, t: Tensor) -> Tensor:
        """The batch ``(count, *block_shape)``: a view of ``t`` where its strides allow, otherwise a copy."""
        return self._permuted(t).reshape(self.count, *self.block_shape)

    def expand(self, values: Tensor) -> Tensor:
        """One value per block, ``(count,)``, shaped to broadcast against ``open(t)``."""
        sizes = [self.shape[axis] for axis in self.order[: self.batch]]
        opened = values.reshape(sizes + [1] * (len(self.order) - self.batch))
        return opened.permute([self.order.index(axis) for axis in range(len(self.order))])

    def write_(self, t: Tensor, blocks: Tensor) -> None:
        """``t`` <- ``blocks`` of shape ``(count, *block_shape)``, in place and rounded to ``t``'s dtype; call it under no_grad."""
        target = self._permuted(t)
        target.copy_(blocks.reshape(target.shape))

    def _permuted(self, t: Tensor) -> Tensor:
        return self.open(t).permute(self.order)


def block_view(
    layout: Layout, per: str, matrix: bool, *, oriented: bool = False, name: str = "parameter"
) -> BlockView:
    """The blocks of a parameter of this ``layout``.

    Args:
        per: one of `PER`. ``"global"`` gives the same single block as ``"tensor"``; the caller combines them.
        matrix: True for a norm of matrices: blocks are ``(m, n)``, outputs by inputs. False: blocks are vectors ``(n,)``.
        oriented: True for a norm or a scale that tells rows from columns, such as the norms of units. A spectral norm does not care.
        name: how errors call the parameter.

    Raises:
        LayoutError: a matrix norm on vectors, an axis that the parameter does not have, or an orientation that matters and that nobody
            stated.
    """
    _check_per(per, matrix, name)
    _check_certain(layout, per, matrix, oriented, name)
    _check_axes(layout, per, name)
    letters = _BATCH[per] if per != "head" else "seh" if "h" in layout.axes else "seH"
    batch, block = _part(layout, range(len(layout.axes)), letters)
    parts = _rows_and_columns(layout, block, name) if matrix else [block]
    sizes = [math.prod(layout.shape[axis] for axis in part) for part in (batch, *parts)]
    order = (*batch, *(axis for part in parts for axis in part))
    return BlockView(layout.shape, order, len(batch), tuple(sizes[1:]), sizes[0], layout.size("k"))


def _part(layout: Layout, axes: Sequence[int], letters: str) -> tuple[list[int], list[int]]:
    return [a for a in axes if layout.axes[a] in letters], [a for a in axes if layout.axes[a] not in letters]


def _rows_and_columns(layout: Layout, block: list[int], name: str) -> list[list[int]]:
    rows, columns = _part(layout, block, ROWS)
    if not rows or not columns:
        raise LayoutError(
            f"A spectral rule on a bias or a gain has no meaning: {name!r} (axes {layout}) holds no matrix. "
            "Use a norm of vectors, or leave it out, for instance with exclude=['role:bias', 'role:gain'] or params='role:matrix'."
        )
    return [rows, columns]


def _check_per(per: str, matrix: bool, name: str) -> None:
    if per not in PER:
        raise LayoutError(f"per={per!r} is no kind of block.{nearest(str(per), PER)}")
    if matrix and per not in _HOLDS_MATRICES:
        raise LayoutError(
            f"per={per!r} makes vectors of {name!r}, and a vector has no singular values; "
            f"a norm of matrices takes per= one of {', '.join(_HOLDS_MATRICES)}."
        )


def _check_certain(layout: Layout, per: str, matrix: bool, oriented: bool, name: str) -> None:
    one_block = per in ("tensor", "global")
    free = per == "element" or (one_block and not oriented and not (matrix and len(layout.axes) > 2))
    if not (layout.certain or free):
        raise LayoutError(
            f"Nothing states what the axes of {name!r}, shape {layout.shape}, are, and per={per!r} with this norm depends on it. "
            + _how_to_state(layout, name)
        )


# How a tensor of so many dimensions may be applied, and what its axes are then; above, it is a kernel.
_USES_OF = {
    2: (("oi", "F.linear(x, w), rows are outputs"), ("io", "x @ w, rows are inputs")),
    3: (("eoi", "F.linear(x, w[e]), a stack of experts"), ("eio", "x @ w[e]")),
}


def _how_to_state(layout: Layout, name: str) -> str:
    """The calls that state the axes, one for each way in which the module may apply the tensor; the user knows which it is."""
    dims, owner = len(layout.shape), layout.owner or "TheModule"
    uses = _USES_OF.get(dims, (("oi" + "k" * (dims - 2), "a convolution, rows are output channels"),))
    calls = "; ".join(
        f'nw.register_layout({owner}, lambda m, n, t: nw.Layout("{axes}", tuple(t.shape)) if t.ndim == {dims} else None, role="hidden") '
        f"if it is used as {use}"
        for axes, use in uses
    )
    return (
        f"State them once for the module's class: {calls}. Or for this parameter alone, in a rule by layout=nw.Layout({uses[0][0]!r}, "
        f"{layout.shape}), in a policy or a preset by layouts={{{name!r}: ...}}. Where it is no matrix, leave it out with exclude=."
    )


def _check_axes(layout: Layout, per: str, name: str) -> None:
    if per not in _NEEDS or set(_NEEDS[per]) & set(layout.axes):
        return
    state = f" If it has, state it: {_STATED_AS[per]} in the rule, or nw.register_layout(cls, ...)." if per in _STATED_AS else ""
    raise LayoutError(f"{name!r} (axes {layout}) has no {per} axis for per={per!r}; leave it out with exclude=.{state}")


# ----------------------------------------------------------------------------------------------------------- attention heads

# How many heads the outputs are; or (matrices, heads) where several matrices are stacked: `(3, 8)` for q, k and v of 8 heads each.
Heads: TypeAlias = int | tuple[int, int]


def split_heads(layout: Layout, heads: Heads, name: str) -> Layout:
    """``layout`` with its output axis split into (stack,) heads and the rest; one that has its heads already must have as many.

    LayoutError where there is no single output axis or its size is no multiple.
    """
    stack, number = heads if isinstance(heads, tuple) else (1, heads)
    if "h" in layout.axes:
        if (layout.size("s"), layout.size("h")) != (stack if isinstance(heads, tuple) else layout.size("s"), number):
            raise LayoutError(f"{name!r} has the axes {layout}, but the rule states heads={heads}: leave heads out.")
        return layout
    lead = (stack, number) if isinstance(heads, tuple) else (number,)
    at = layout.axes.find("o")
    if layout.axes.count("o") != 1 or "s" in layout.axes or layout.shape[at] % math.prod(lead):
        raise LayoutError(f"the outputs of {name!r} (axes {layout}) are no heads={heads}: state them as layout=nw.Layout('hoi', ...).")
    axes = layout.axes[:at] + "sh"[2 - len(lead) :] + layout.axes[at:]
    rest = layout.shape[at] // math.prod(lead)
    return replace(layout, axes=axes, shape=(*layout.shape[:at], *lead, rest, *layout.shape[at + 1 :]))


# ---------------------------------------------------------------------------------------------------------------- memory


@functools.lru_cache(4096)
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor fills one stretch of memory without gaps and overlaps, in whatever order of its axes."""
    span = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        if stride != span:
            return 0 in shape
        span *= size
    return True


@functools.lru_cache(4096)
def lie_alike(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two tensors of ``shape`` with these strides have their entries in the same order in memory; an axis of size 1 has no say."""
    return a == b or 0 in shape or all(x == y for n, x, y in zip(shape, a, b, strict=True) if n != 1)


@functools.lru_cache(4096)
def overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two entries of such a tensor lie at one place, as those of ``expand`` do: then writing one changes the other."""
    reach, sure = 0, True
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        sure = sure and stride > reach
        reach += stride * (size - 1)
    if sure or 0 in shape:
        return False
    if math.prod(shape) > reach + 1 or 0 in (st for st, n in zip(strides, shape, strict=True) if n != 1):
        return True
    places = torch.zeros(1, dtype=torch.int64)    # windows of as_strided: rare, and counted once
    for stride, size in zip(strides, shape, strict=True):
        places = (places[:, None] + torch.arange(size) * stride).flatten()
    return bool((places.sort().values.diff() == 0).any())
