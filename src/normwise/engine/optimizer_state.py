"""The control's state in its optimizers' ``state_dict()``: whoever saves an optimizer saves the rules that are attached to it.

It lies in the first parameter group, under one key, as a list of one part a control. There torch's own ``load_state_dict`` keeps it as it
is (what lies in ``state`` it casts to the parameter's dtype, and what lies beside the groups it drops), an optimizer without a control
carries it along until one is attached, and ``torch.distributed.checkpoint``, which knows nothing but ``state`` and ``param_groups``, takes
it with the group.
"""

from __future__ import annotations

import base64
import json
import math
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from normwise.engine.pack import is_sharded
from normwise.engine.state import KEPT, Saved
from normwise.errors import PolicyError
from normwise.low_precision import CARRY

KEY = "normwise"
"""Of the parameter group. While a control is attached the group itself has it, with nothing in it: ``flatten_optimizer_state_dict`` loads
only the keys that the groups of the optimizer have."""
OWN_SHAPE = ("center", CARRY)
"""Of what is stored and found the names of what has the shape of its parameter."""
T = TypeVar("T")
Part = dict[str, Any]
Group = MutableMapping[str, Any]


class Attached(Generic[T]):
    """What is attached to each optimizer, in order. Weak: it holds the optimizer, which would never be freed; the optimizer's hooks hold
    it."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Optimizer, list[ref[T]]] = WeakKeyDictionary()

    def of(self, optimizer: Optimizer) -> list[T]:
        return [one for known in self._known.get(optimizer, ()) if (one := known()) is not None]

    def add(self, optimizer: Optimizer, one: T) -> None:
        self._known[optimizer] = [ref(other) for other in (*self.of(optimizer), one)]

    def remove(self, optimizer: Optimizer, one: T) -> None:
        self._known[optimizer] = [ref(other) for other in self.of(optimizer) if other is not one]


_HOOKS = ("state_dict_post_hook", "load_state_dict_pre_hook", "load_state_dict_post_hook")


def carries(optimizer: Any) -> bool:
    """Whether a state can travel in the optimizer's: not in a wrapper's that sets up its step hooks by itself and knows no others."""
    kept = isinstance(optimizer, Optimizer)
    return all(hasattr(optimizer, f"_optimizer_{hook}s" if kept else f"register_{hook}") for hook in _HOOKS)


_ATTACHED: Attached[Traveller] = Attached()
"""In the order in which their hooks run."""


class Traveller:
    """What one control has in one optimizer's ``state_dict()``: made by ``pack``, given back by ``unpack``.

    unpack: checks a part and returns what loads it; it raises PolicyError before anything is changed. forgets: whether the rules have
    anything to lose where a state has no part of them.
    """

    def __init__(
        self, optimizer: Optimizer, pack: Callable[[], Part], unpack: Callable[[Part], Callable[[], None]], forgets: Callable[[], bool]
    ) -> None:
        self.optimizer, self._pack, self._unpack, self._forgets = optimizer, pack, unpack, forgets
        self._pending: Callable[[], None] | None = None
        self._warned = False
        self._adopt()
        _ATTACHED.add(optimizer, self)
        _mark(optimizer)
        self._handles = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Takes the hooks off, and the mark out of the group where this was the last control."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _ATTACHED.remove(self.optimizer, self)
        group = _home(self.optimizer.param_groups)
        if not _ATTACHED.of(self.optimizer) and group is not None and group.get(KEY) == []:
            del group[KEY]

    def _adopt(self) -> None:
        """Takes what was loaded into the optimizer before the control was attached, as in a callback that trainers call after loading."""
        group = _holder(self.optimizer.param_groups)
        if group is not None:
            self._unpack(group[KEY][0])()
            group[KEY] = group[KEY][1:]

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Puts this control's part in its place among those of all that are attached; what waits for a later one comes last."""
        group = _home(state["param_groups"])
        if group is not None:
            parts = list(group.get(KEY) or [])
            parts.insert(_ATTACHED.of(optimizer).index(self), self._pack())
            group[KEY] = parts

    def _before_load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Takes the first part out; ``state`` is a shallow copy of what the user gave, which stays as it is."""
        self._pending = None
        groups = state.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
            return    # torch says what is wrong
        groups = state["param_groups"] = [dict(g) for g in groups]
        group = _holder(groups)
        if group is not None:
            self._pending = self._unpack(group[KEY][0])
            group[KEY] = group[KEY][1:]
        elif self._forgets() and not self._warned:
            self._warned = True
            warnings.warn(
                "the optimizer's state was saved without these rules, or by an earlier version: they start anew, with their schedules, "
                "radii 'init' and what they find in training. If their state was saved apart, load it with control.load_state_dict().",
                stacklevel=4,
            )

    def _after_load(self, optimizer: Optimizer) -> None:
        if self._pending is not None:
            self._pending()
            self._pending = None
        _mark(optimizer)


def waiting(optimizer: Optimizer) -> list[Part]:
    """The parts in an optimizer's groups that no control has taken."""
    group = _holder(optimizer.param_groups)
    return [] if group is None else list(group[KEY])


def with_part(state: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """An optimizer's state with a part in it."""
    groups = [dict(g) for g in state["param_groups"]]
    home = _home(groups)
    if home is not None:
        home[KEY] = [part, *(home.get(KEY) or [])]
    return {**state, "param_groups": groups}


def _home(groups: Sequence[Group]) -> Group | None:
    """The group in which the parts are put: the first that has parameters, which distributed checkpoints know it by."""
    return next((g for g in groups if g["params"]), groups[0] if groups else None)


def _holder(groups: Sequence[Group]) -> Group | None:
    """The group that has parts; groups may have been put together in another order."""
    return next((g for g in groups if isinstance(g.get(KEY), list) and g[KEY]), None)


def _mark(optimizer: Optimizer) -> None:
    group = _home(optimizer.param_groups)
    if group is not None and _holder(optimizer.param_groups) is None:
        group[KEY] = []


# ---------------------------------------------------------------------------------------------------- few tensors


def fold(rules: Sequence[Saved], growing: Sequence[Sequence[str]], device: torch.device, names: Sequence[str]) -> Part:
    """The states of rules as one JSON text and a tensor a dtype, end to end. What has a parameter's own shape stays by itself.

    Few entries, since flattened distributed checkpoints repeat those of a group for each of its parameters. Which entries there are depends
    on the parameters alone and not on where they lie, so that split ones are saved and whole ones loaded, and the other way round.
    growing: of each rule what is found with shapes that change in training. It is in the text: distributed checkpoints read tensors into
    ones of equal shape. names: of all parameters, in the model's order.
    """
    ends: dict[str, int] = {}
    parts: dict[str, list[Tensor]] = {}
    whole: dict[str, Tensor] = {}

    def put(kind: str, what: str, t: Tensor) -> list[Any]:
        if what in OWN_SHAPE or is_sharded(t):
            wide = t.int() if t.dtype == torch.int16 else t    # a carry; neither gloo nor NCCL can gather int16
            whole[f"{kind}_whole_{len(whole)}"] = wide.detach().contiguous()
            return [list(whole)[-1]]
        name = f"{kind}_{_dtype(t)}"
        start = ends.get(name, 0)
        ends[name] = start + t.numel()
        parts.setdefault(name, []).append(t.detach().reshape(-1).to(device))
        return [name, start, list(t.shape)]

    tree = []
    for rule, texts in zip(rules, growing, strict=True):
        kept = {what: {n: put("kept", what, t) for n, t in _in_order(rule[what], names).items()} for what in KEPT}
        found = {
            n: {w: as_text(t) if w in texts else put("found", w, t) for w, t in own.items()}
            for n, own in _in_order(rule["found"], names).items()
        }
        tree.append({"rule": rule["rule"], **kept, "found": found})
    return {"rules": json.dumps(tree), **{name: torch.cat(each) for name, each in parts.items()}, **whole}


def _in_order(known: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What is known by name: equal shapes together, in the model's order. Packs have it, too, unless some parameters are split in another
    way; so distributed checkpoints of before, which follow the packs, mostly have these entries."""
    place = {name: i for i, name in enumerate(names)}
    ordered = sorted(known, key=lambda name: (place.get(name, len(place)), name))
    groups: dict[Any, list[str]] = {}
    for name in ordered:
        tensors = known[name].values() if isinstance(known[name], Mapping) else [known[name]]
        groups.setdefault(tuple(t.shape for t in tensors), []).append(name)
    return {name: known[name] for group in groups.values() for name in group}


def unfold(part: Mapping[str, Any]) -> list[Saved]:
    """The inverse of :func:`fold`; PolicyError for what it did not make."""

    def take(place: Any) -> Tensor:
        if isinstance(place, str):
            return from_text(place)
        name, *where = place
        held = part[name]
        if not isinstance(held, Tensor):
            raise TypeError(f"{name} is no tensor")
        return held[where[0] : where[0] + math.prod(where[1])].view(where[1]) if where else held

    try:
        return [
            {"rule": rule["rule"], **{what: {n: take(t) for n, t in rule[what].items()} for what in KEPT},
             "found": {n: {w: take(t) for w, t in own.items()} for n, own in rule["found"].items()}}
            for rule in json.loads(part["rules"])
        ]  # fmt: skip
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise PolicyError(f"the state in the optimizer's is none that a control put there ({error!r}).") from error


def as_text(value: Tensor) -> str:
    """A tensor as ``dtype:shape:bytes``, exactly."""
    plain = value.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return f"{_dtype(plain)}:{'x'.join(map(str, plain.shape))}:{base64.b64encode(data).decode()}"


def from_text(text: str) -> Tensor:
    """The inverse of :func:`as_text`; ValueError or KeyError for what it did not make."""
    name, shape, data = text.split(":")
    raw = bytearray(base64.b64decode(data, validate=True))
    flat = torch.frombuffer(raw, dtype=DTYPES[name]).clone() if raw else torch.empty(0, dtype=DTYPES[name])
    return flat.reshape([int(n) for n in shape.split("x") if n])


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)}
