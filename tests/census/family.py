"""One architecture, and what is expected of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Attention = Mapping[str, Sequence[str]]
Table = Mapping[str, tuple[str, str]]
MATRIX_ROLES = ("hidden", "conv", "recurrent")
"""What a matrix method steps: said by `normwise.optim.Muon`'s documentation."""


class Unavailable(Exception):
    """The architecture cannot be built here; the message says why."""


@dataclass(frozen=True)
class Family:
    """
    name: of the family, as transformers calls its folder, with the head where a family stands here with several.
    build: makes the model with random weights. Raises `Unavailable`.
    heads: the weights that give the outputs, as globs; empty for a bare backbone, and where the head is tied to the embedding.
    tied: the embedding that serves as a head too, as a glob; "" for none.
    table: glob -> (role, pattern of `axes`), for what torch's own module types do not say. The first that matches counts. A role may be
        ``"a|b"``: both are right; the pattern may be ``"p|q"``, or "" where a tensor is no matrix (a table of positions, a token).
    attention: part -> globs of its weights. ``"free"``: weights whose part is not judged.
    sizes: of the letters that patterns split by.
    normalised: whether there are normalisation layers.
    adamw: matrices that a matrix method leaves to AdamW all the same, as globs.
    inputs: model -> keywords of its forward, for the oracles.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    heads: tuple[str, ...] = ()
    tied: str = ""
    table: Table = field(default_factory=dict)
    attention: Attention = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    normalised: bool = True
    adamw: tuple[str, ...] = ()
    inputs: Callable[[nn.Module], dict[str, Any]] | None = None
    note: str = ""
    default: bool = False

    def but(self, **changes: Any) -> Family:
        return replace(self, **changes)


@dataclass(frozen=True)
class Expected:
    """Of one parameter. ``patterns`` is empty where it is no matrix, or a vector."""

    roles: tuple[str, ...]
    patterns: tuple[str, ...]
    sizes: Mapping[str, Any]


def expected(family: Family, model: nn.Module) -> dict[int, Expected]:
    """id of a parameter -> what is expected of it; AssertionError for one that nobody has said anything about."""
    found: dict[int, Expected] = {}
    unused = {*family.heads}
    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        for local, param in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(param), []).append(Place(f"{path}.{local}".lstrip("."), module, local, param))
    for key, of in places.items():
        mine = [(glob, statement) for glob, statement in family.table.items() if any(fnmatchcase(p.name, glob) for p in of)]
        heads = [glob for glob in family.heads if any(fnmatchcase(p.name, glob) for p in of)]
        unused -= {*heads}
        role, pattern, sizes = (*mine[0][1], family.sizes) if mine else _by_type(of[0])
        if any(isinstance(p.module, nn.Embedding | nn.EmbeddingBag) for p in of) and not mine:
            assert not heads, f"{family.name}: {of[0].name} is the table of an embedding"
            role = "embedding"  # though it may serve as the head, too
        elif heads:
            role = "head"
        what = f"{of[0].name} {tuple(of[0].param.shape)} of {type(of[0].module).__name__}"
        assert role, f"{family.name}: nobody has said what {what} is"
        found[key] = Expected(tuple(role.split("|")), tuple(pattern.split("|")) if pattern else (), sizes)
    assert not unused, f"{family.name}: {sorted(unused)} match no parameter"
    shared = [p[0].name for p in places.values() if all(any(isinstance(x.module, cls) for x in p) for cls in (nn.Embedding, nn.Linear))]
    assert bool(shared) == bool(family.tied) and all(fnmatchcase(name, family.tied) for name in shared), f"{family.name}: tied are {shared}"
    return found


@dataclass(frozen=True)
class Place:
    """A name under which a module holds a parameter."""

    name: str
    module: nn.Module
    local: str
    param: Tensor


def _by_type(place: Place) -> tuple[str, str, Mapping[str, Any]]:
    """What torch's documentation says of its own modules: role, pattern, sizes; an empty role where it says nothing."""
    module, local, param = place.module, place.local, place.param
    if local.endswith("bias") or (isinstance(module, nn.RNNBase | nn.RNNCellBase) and local.startswith("bias")):
        return "bias", "", {}
    if param.ndim <= 1 and not is_lazy(param):
        return "gain", "", {}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase):
        return "gain", "", {}
    if local != "weight":
        return "", "", {}
    if isinstance(module, nn.Linear):
        return "hidden", "o i", {}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", "o i", {}
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = " k" * len(module.kernel_size)
        return "conv", ("(s i) o" if module.transposed else "(s o) i") + kernel, {"s": module.groups}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "hidden", "i o", {}  # Hugging Face's, of GPT-2: y = x @ weight
    return "", "", {}


def hf(model: str, config: Mapping[str, Any] = {}, **more: Any) -> Callable[[], nn.Module]:
    """Builds a transformers model of this class from a small configuration, with random weights: nothing is read from anywhere."""

    def build() -> nn.Module:
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise Unavailable(f"transformers is not installed: {error}") from error
        cls = getattr(transformers, model, None)
        if cls is None:
            raise Unavailable(f"transformers {transformers.__version__} has no {model}")
        torch.manual_seed(0)
        try:
            return cls(cls.config_class(**{**config, **more})).eval()
        except (ImportError, OSError) as error:
            raise Unavailable(f"{type(error).__name__}: {str(error).strip().splitlines()[0].partition('. ')[0]}") from error

    return build


def tokens(model: nn.Module) -> dict[str, Any]:
    """One sentence of three tokens."""
    return {"input_ids": torch.tensor([[5, 7, 11]])}
