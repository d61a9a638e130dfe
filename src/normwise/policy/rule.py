"""A rule is data: which parameters, what is done, under which norm, on which blocks, how strongly and when.

First its fields: what each accepts, what it becomes, and its plain form in YAML. Then the rule, and what its fields may say together.
"""


from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from torch import Tensor

from normwise.errors import NormError, NormwiseError, PolicyError, nearest
from normwise.low_precision import ROUNDINGS
from normwise.norms import FORMS, L2, NORMS, SETS, Box, Norm, Orthogonal, Set, Spectral, get_norm
from normwise.parameters.inventory import Entry, Selector, check_selector, matches, means, names_of, select, selector_to_data, shown
from normwise.parameters.layouts import PER, BlockView, Heads, Layout, block_view, split_heads
from normwise.policy import radii, schedules
from normwise.policy.actions import ACTIONS

Given = TypeVar("Given")
Kept = TypeVar("Kept")

NormLike: TypeAlias = str | Norm | Set
LONGEST_NAME = 100
RadiusLike: TypeAlias = radii.Radius | str | None


class FieldError(PolicyError):
    """A PolicyError that knows which field of the rule it is about, so that a YAML file can be told the line."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def _same(value: Any) -> Any:
    return value


class Field(Generic[Given, Kept]):
    """A dataclass field that is converted and checked when it is set, so that a rule holds one form of each value; a default once for all.

    ``to_data`` gives its plain form in YAML, ``from_data`` takes that back; without them the value is plain.
    """

    def __init__(
        self, convert: Callable[[Any], Kept], default: Given, to_data: Callable[[Any], Any] = _same, from_data: Callable[[Any], Any] = _same
    ) -> None:
        self.convert, self.default, self.to_data, self.from_data = convert, default, to_data, from_data
        self.usual = convert(default)

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, rule: None, owner: type[Any]) -> Given: ...
    @overload
    def __get__(self, rule: object, owner: type[Any]) -> Kept: ...
    def __get__(self, rule: object | None, owner: type[Any]) -> Given | Kept:
        # Asked of the class, as the dataclass machinery does, a descriptor tells the default.
        return self.default if rule is None else rule.__dict__[self.name]

    def __set__(self, rule: object, value: Given) -> None:
        try:
            rule.__dict__[self.name] = self.usual if value is self.default else self.convert(value)
        except (PolicyError, NormError) as error:
            raise FieldError(str(error), self.name) from error


# -------------------------------------------------------------------------------------------------------------- norm


def convert_norm(norm: object) -> Norm | Set:
    """A name or an object as the object."""
    if not isinstance(norm, str | Norm | Set):
        raise PolicyError(f"norm is {norm!r}, but norm must be a name ({', '.join(_norm_names())}) or an object of normwise.norms.")
    if norm == Box.name:
        raise PolicyError("norm 'box' needs its two ends: norm=nw.Box(low, high), in YAML norm: {box: [low, high]}.")
    return get_norm(norm)


def _norm_names() -> list[str]:
    return [*NORMS, *FORMS, *SETS]


def norm_name(norm: Norm | Set) -> str | None:
    """The name that :func:`get_norm` takes for this object, None where it has none."""
    if isinstance(norm, Norm) and NORMS.get(norm.name) == norm:    # nearly every norm, without a search
        return norm.name
    return next((name for name in _norm_names() if name != Box.name and get_norm(name) == norm), None)


def norm_label(norm: Norm | Set) -> str:
    """For tables and messages: ``l2``, ``box(-1, 1)``."""
    return f"box({norm.low:g}, {norm.high:g})" if isinstance(norm, Box) else norm_name(norm) or repr(norm)


def norm_to_data(norm: Norm | Set) -> Any:
    """``"l2"``, or ``{"box": [low, high]}``; a norm of the user's own has no YAML form: PolicyError."""
    if isinstance(norm, Box):
        return {Box.name: [float(norm.low), float(norm.high)]}
    name = norm_name(norm)
    if name is None:
        raise PolicyError(f"{norm!r} cannot be written to YAML, which knows {', '.join(_norm_names())}: keep this rule in Python.")
    return name


def norm_from_data(data: Any) -> Any:
    """The inverse of :func:`norm_to_data`; ``{box: {low: -1, high: 1}}`` is taken as well."""
    if not isinstance(data, Mapping):
        return data
    _, arguments = schedules.one_entry(data, "norm", {Box.name: Box})
    given = schedules.arguments_by_name(["low", "high"], arguments, "norm's box")
    if set(given) != {"low", "high"} or not all(schedules.is_number(end) for end in given.values()):
        raise PolicyError(f"norm's box has {given!r}, but it needs two numbers: {{box: [low, high]}}.")
    return Box(*(schedules.as_float(given[end]) for end in ("low", "high")))


# ---------------------------------------------------------------------------------------- selectors, centres, layouts


def convert_selector(selector: Any) -> Any:
    """Checked, with lists as tuples, so that a rule can be hashed; an empty list selects nothing and is an error."""
    if selector is None:
        return None
    if isinstance(selector, list | tuple) and not selector:
        raise PolicyError("an empty list of selectors selects nothing: leave it out for the default.")
    check_selector(selector)
    return tuple(selector) if isinstance(selector, list) else selector


class Weights(dict[str, Tensor]):
    """Weights by parameter name, to be a center. Compared by identity: comparing tensors is no way to compare rules."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Weights({len(self)} tensors)"


CenterLike: TypeAlias = Literal["init"] | Mapping[str, Tensor] | None
Center: TypeAlias = Literal["init"] | Weights | None


def convert_center(center: Any) -> Center:
    """None, ``"init"`` or weights by name."""
    if center is None or isinstance(center, Weights):
        return center
    if isinstance(center, str) and center == "init":
        return "init"
    if isinstance(center, Mapping) and center and all(isinstance(t, Tensor) for t in center.values()):
        return Weights(center)
    raise PolicyError(f"center is {center!r}, but center must be None, 'init', or tensors by parameter name (a state_dict).")


def center_to_data(center: Center) -> Any:
    """``"init"``; tensors: PolicyError."""
    if isinstance(center, Weights):
        raise PolicyError("a center given as tensors cannot be written to YAML: use center='init', or keep this rule in Python.")
    return center


def layout_to_data(layout: Layout) -> Any:
    """``{"axes": "hoi", "shape": [8, 64, 512]}``, and ``"parts"`` where it has them."""
    return {"axes": layout.axes, "shape": list(layout.shape), **({"parts": list(layout.parts)} if layout.parts else {})}


def layout_from_data(data: Any) -> Any:
    """``{axes: hoi, shape: [8, 64, 512]}`` as a Layout; with ``parts: [q, k, v]``, the names of the matrices along s, where it has them."""
    if not isinstance(data, Mapping):
        return data
    given = schedules.arguments_by_name(["axes", "shape", "parts"], data, "layout")
    shape, parts = given.get("shape"), given.get("parts") or []
    if not isinstance(given.get("axes"), str) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise PolicyError(f"layout is {given!r}, but it needs its axes and its shape: {{axes: hoi, shape: [8, 64, 512]}}.")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise PolicyError(f"the parts of a layout are {parts!r}, but they are a list of names: [q, k, v].")
    return Layout(given["axes"], tuple(shape), parts=tuple(parts))


def selector_from_data(data: Any) -> Any:
    """The inverse of :func:`normwise.parameters.inventory.selector_to_data`."""
    if data is not None and not isinstance(data, str | list):
        raise PolicyError(f"a selector is {data!r}, but it must be a string, or a list of strings.")
    return data


# ------------------------------------------------------------------------------------------------------------ numbers


def word(value: object, what: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of the words allowed; otherwise PolicyError with the nearest."""
    if not isinstance(value, str) or value not in allowed:
        raise FieldError(f"{what} is {value!r}, which is unknown.{nearest(str(value), allowed)}", what)
    return value


def or_none(convert: Callable[[Any], Kept]) -> Callable[[Any], Kept | None]:
    """``convert`` that lets None pass."""
    return lambda value: None if value is None else convert(value)


def required(what: str, test: Callable[[Any], bool], must_be: str, kind: Callable[[Any], Kept] = _same) -> Callable[[Any], Kept]:
    """A value that passes the test, as ``kind``; of any other a PolicyError says what it must be."""

    def convert(value: Any) -> Kept:
        if not test(value):
            raise PolicyError(f"{what} is {value!r}, but {what} must be {must_be}.")
        return kind(value)

    return convert


convert_power = required("power", lambda v: schedules.is_number(v) and v in (1, 2), "1 (the norm) or 2 (half of its square)", int)
convert_flag: Callable[[Any], bool] = required("optional", lambda v: isinstance(v, bool), "true or false")
convert_layout: Callable[[Any], Layout] = required(
    "layout", lambda v: isinstance(v, Layout), "nw.Layout(axes, shape), e.g. nw.Layout('hoi', (8, 64, 512))"
)
convert_name: Callable[[Any], str] = required(
    "name", lambda v: isinstance(v, str) and bool(v.strip()) and v.isprintable() and len(v) <= LONGEST_NAME,
    f"a text of one line, {LONGEST_NAME} characters at most",
)  # fmt: skip


def convert_radius(value: Any) -> radii.Radius | None:
    """None, or what ``radii.radius`` makes of it; a plain number above zero is what it is."""
    if value is None or (type(value) is float and 0 < value < math.inf):
        return value
    return radii.radius(value)


def convert_rate(value: Any) -> float:
    rate = schedules.number(value, "rate")
    if rate > 1:
        raise PolicyError(f"rate is {rate:g}, but rate must be in (0, 1]: the fraction of the correction applied at each step.")
    return rate


def convert_tolerance(value: Any) -> float:
    tolerance = schedules.number(value, "tolerance", zero=True)
    if tolerance and not 0.01 <= tolerance < 1:
        raise PolicyError(f"tolerance is {tolerance:g}, but tolerance must be 0 (exact) or in [0.01, 1): less is not promised.")
    return tolerance


def convert_heads(value: Any) -> Heads | None:
    """None, a number of heads, or (stacked matrices, heads); a list becomes a tuple."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if value is None:
        return None
    if not all(type(n) is int and n >= 1 for n in listed) or (isinstance(value, list | tuple) and len(listed) != 2):
        raise PolicyError(f"heads is {value!r}, but heads must be a whole number >= 1, or two of them: (stacked matrices, heads).")
    return (listed[0], listed[1]) if len(listed) == 2 else int(listed[0])


# -------------------------------------------------------------------------------------------------------------- rule

ON = ("weight", "grad", "update")
PHASES = ("penalty", "gradient", "decay", "cpr", "update", "prox", "qk_clip", "weight")
DEFAULT_PARAMS, EVERYTHING = "role:matrix", "role:all"
# What the matrix methods act on: no embeddings and heads, whose rows are not mixed by a layer.
MATRICES = ("role:hidden", "role:conv", "role:recurrent")
WEIGHT_ONLY = ("min_radius", "rate", "center")
VECTOR_PER = ("unit", "input", "element", "global")

SELECTOR = (or_none(selector_to_data), selector_from_data)
_T = TypeVar("_T", bound=type[Any])


def _names_its_fields(cls: _T) -> _T:
    """Turns the TypeError for an unknown or a missing field into one that says which fields there are."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        _check_names(given)
        init(self, *args, **given)

    cls.__init__ = checked
    return cls


def _check_names(given: Mapping[Any, Any]) -> None:
    known = [f.name for f in fields(Rule)]
    for name in given:
        if name not in known:
            raise FieldError(f"unknown field {name!r} of a rule.{nearest(str(name), known)}", str(name))
    if "action" not in given:
        raise FieldError(f"a rule needs an action.{nearest('', ACTIONS)}")


@_names_its_fields
@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing to do to some parameters, at every step. Checked when it is made, bound to a model by ``nw.attach``.

    Args:
        params, exclude: selectors of parameters: a glob on the clean name (``"fc*"``), ``"re:..."``, ``"role:..."``,
            ``"class:..."``, a module class, a function of the entry, or a list of those. Default: ``"role:matrix"``, since norms
            of biases and gains mean something else than norms of weights.
        action: "penalty", "weight_decay", "prox", "clip_norm", "project", "normalize" or "lmo"; or one that a single method is made of,
            "cpr" (see ``nw.cpr``) and "qk_clip" (see ``nw.qk_clip``).
        norm: a name (``"l2"``, the default, ``"spectral"``, ...), or an object of ``normwise.norms``: a norm, or for "project" a set.
        per: the block that the norm is measured on: "tensor" (default), "matrix", "unit", "input", "head", "expert", "element"
            or "global" (all matched parameters as one vector).
        on: "weight", "grad" or "update"; the default is the action's first meaning (weights; gradients for "lmo").
        radius: for clip_norm, project, normalize: a number > 0, a schedule, ``"init"``, ``"1.5*init"``, ``"0.1*base"`` for LoRA's products,
            ``nw.radii.Relative(scale)``, or one of ``nw.radii`` that is found in training. For cpr the bound on the mean square, for
            qk_clip that on the logits.
        strength: for penalty, weight_decay, prox: a number >= 0 or a schedule. For cpr the rate of its multiplier, default 1.
        power: 1 penalises the norm, 2 half of its square; default 1. For qk_clip: 1 scales queries and keys by √γ, 2 queries alone by γ.
        heads: how many attention heads the outputs of a plain Linear are, where its type does not tell; ``(3, heads)`` for q, k, v stacked.
        center: None (zero), ``"init"`` (the weights when attached) or weights by name: the norm of the difference is meant.
        floor: the radius that ``radius="init"`` gives a block that starts at (or nearer to) zero; without it a zero block is an error.
        min_radius: for clip_norm on weights: shorter blocks are stretched to it.
        tolerance: for projecting weights under the spectral norm: the share of the radius by which σ₁ may exceed it for the sake of speed;
            default 0, exact. From 0.01 on, singular vectors are followed from step to step instead of decomposing.
        rate: the fraction of the correction applied at each step; default 1, all of it (Keras's MinMaxNorm).
        rounding: of fp16 and bf16 weights after weight_decay and prox: "nearest", which loses what is below half an ulp, "stochastic", or
            "compensated", which carries it over; see ``normwise.low_precision``.
        every, start, stop: acts on steps ``start, start + every, ...`` below ``stop``; by default on all.
        layout: the axes of the matched parameters stated by hand, where the module's type does not tell them.
        optional: True lets a selector of a list, or the exclusion, match nothing, as long as the rule as a whole matches something.
        name: what logs, tables and errors call the rule, unique in its policy; default what it does, such as ``clip_norm l2/unit <= 3``.

    Raises:
        PolicyError: whatever cannot mean anything; the message says what is allowed.
    """

    params: Field[Selector | None, Selector | None] = Field(convert_selector, None, *SELECTOR)
    action: str
    norm: Field[NormLike, Norm | Set] = Field(convert_norm, "l2", norm_to_data, norm_from_data)
    per: str = "tensor"
    on: str | None = None
    radius: Field[RadiusLike, radii.Radius | None] = Field(
        convert_radius, None, schedules.to_data, partial(radii.from_data, what="radius")
    )
    strength: Field[schedules.Varying | None, schedules.Varying | None] = Field(
        or_none(partial(schedules.varying, what="strength", zero=True)), None, schedules.to_data,
        partial(radii.from_data, what="strength"),
    )  # fmt: skip
    power: Field[int, int] = Field(convert_power, 1)
    heads: Field[Heads | list[int] | None, Heads | None] = Field(
        convert_heads, None, lambda heads: list(heads) if isinstance(heads, tuple) else heads
    )
    center: Field[CenterLike, Center] = Field(convert_center, None, center_to_data)
    floor: Field[float | None, float | None] = Field(or_none(partial(schedules.number, what="floor")), None)
    min_radius: Field[float | None, float | None] = Field(or_none(partial(schedules.number, what="min_radius")), None)
    tolerance: Field[float, float] = Field(convert_tolerance, 0.0)
    rate: Field[float, float] = Field(convert_rate, 1.0)
    rounding: Field[str, str] = Field(partial(word, what="rounding", allowed=tuple(ROUNDINGS)), "nearest")
    every: Field[int, int] = Field(partial(schedules.count, what="every", least=1), 1)
    start: Field[int, int] = Field(partial(schedules.count, what="start", least=0), 0)
    stop: Field[int | None, int | None] = Field(or_none(partial(schedules.count, what="stop", least=1)), None)
    exclude: Field[Selector | None, Selector | None] = Field(convert_selector, None, *SELECTOR)
    layout: Field[Layout | None, Layout | None] = Field(
        or_none(convert_layout), None, or_none(layout_to_data), layout_from_data
    )
    optional: Field[bool, bool] = Field(convert_flag, False)
    name: Field[str | None, str | None] = Field(or_none(convert_name), None)

    def __post_init__(self) -> None:
        word(self.action, "action", tuple(ACTIONS))
        word(self.per, "per", PER)
        self._resolve()
        for check in (_check_fields, _check_norm, _check_radius, _check_blocks):
            check(self)

    def _resolve(self) -> None:
        """Fills in the defaults that depend on other fields."""
        if self.on is None:
            object.__setattr__(self, "on", ACTIONS[self.action].targets[0])
        if self.action == "project" and isinstance(self.norm, Set) and self.norm.needs_radius and self.radius is None:
            object.__setattr__(self, "radius", 1.0)
        for name, value in ACTIONS[self.action].defaults.items():
            if getattr(self, name) == getattr(Rule, name):
                object.__setattr__(self, name, value)

    @property
    def phase(self) -> str:
        """When in a step it acts: "penalty", "gradient", "decay", "cpr", "update", "prox", "qk_clip" or "weight"."""
        return ACTIONS[self.action].phase or {"grad": "gradient", "update": "update"}.get(str(self.on), "weight")

    @property
    def _blocks(self) -> str:
        """The kind of block that it acts on: ``per``, or the only one that its action has."""
        action = ACTIONS[self.action]
        return self.per if "per" in action.uses else action.blocks[0]

    def active(self, step: int) -> bool:
        """Whether it acts at ``step``, counted from 0 when attached."""
        within = self.start <= step and (self.stop is None or step < self.stop)
        return within and (step - self.start) % self.every == 0

    def targets(self, entries: Iterable[Entry]) -> list[Entry]:
        """The entries of an inventory that the rule acts on; PolicyError, listing what there is, where it matches nothing."""
        params, listed = DEFAULT_PARAMS if self.params is None else self.params, list(entries)
        if not self.optional:
            return select(listed, params, self.exclude)
        found = self.matched(listed)
        if not found:
            select(listed, params)
            raise PolicyError(f"rule '{self.label()}' matches nothing: all it selects is excluded by {self.exclude!r}.")
        return found

    def kind(self) -> tuple[Any, ...]:
        """What two rules have in common that do the same to different amounts: action, target, norm and blocks."""
        return self.action, self.on, norm_label(self.norm) if "norm" in ACTIONS[self.action].uses else None, self.per

    def matched(self, entries: Iterable[Entry]) -> list[Entry]:
        """As :meth:`targets`, but empty where the rule matches nothing."""
        params, listed = DEFAULT_PARAMS if self.params is None else self.params, list(entries)
        names = names_of(listed)
        return [e for e in listed if means(params, e, names) and not (self.exclude is not None and matches(self.exclude, e, names))]

    def axes(self, entry: Entry) -> Layout:
        """The axes of one parameter as the rule sees them; LayoutError where its own layout or heads do not fit."""
        layout = self.layout.check(entry.shape, entry.name) if self.layout else entry.layout
        return layout if self.heads is None else split_heads(layout, self.heads, entry.name)

    def view(self, entry: Entry) -> BlockView:
        """The blocks of one parameter that the rule acts on; LayoutError where it has none such."""
        oriented = isinstance(self.norm, Norm) and self.norm.matrix and self.norm.oriented
        return block_view(self.axes(entry), self._blocks, self.norm.matrix, oriented=oriented, name=entry.name)

    def label(self) -> str:
        """What tables and messages call it: its name, or what it does and to which parameters, as ``params`` says it."""
        usual = self.params in (None, EVERYTHING, MATRICES)    # by default, and so nothing that its user wrote
        return self.name or self.summary() + ("" if usual else f", params={shown(self.params, quoted=False)}")

    def summary(self) -> str:
        """What it does, in short, whatever it is called: ``clip_norm l2/unit <= 3``."""
        action = ACTIONS[self.action]
        target = "" if self.on == action.targets[0] else f" {self.on}"
        measured = action.measures or (norm_label(self.norm) if "norm" in action.uses else "")
        if measured and self.power == 2:
            measured = f"half {measured}^2"
        if measured and (isinstance(self.norm, Norm) or self.norm.matrix):
            measured += f"/{self.per}"
        return " ".join(filter(None, (self.action + target, measured, self._amount())))

    def _amount(self) -> str:
        around = " around init" if self.center == "init" else " around given weights" if self.center else ""
        around += f" at rate {self.rate:g}" if self.rate != 1 else ""
        around += f", rounding {self.rounding}" if self.rounding != "nearest" else ""
        if self.radius is None:
            return around.strip() if self.strength is None else f"x {schedules.label(self.strength)}{around}"
        amount = schedules.label(self.radius)
        around += "" if self.strength is None else f" at rate {schedules.label(self.strength)}"
        around += f" {power_2}" if self.power == 2 and (power_2 := ACTIONS[self.action].power_2) else ""
        if self.min_radius is not None:
            return f"in [{self.min_radius:g}, {amount}]{around}"
        relation = "=" if self.action == "normalize" or isinstance(self.norm, Set) else "<="
        return f"{relation} {amount}{around}"

    def _given(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != _default(self, name)}

    def __repr__(self) -> str:
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in self._given().items())})"

    def to_data(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as plain YAML types; PolicyError where a value has no such form."""
        return {name: _written(name, value) for name, value in self._given().items()}

    def described(self) -> dict[str, str]:
        """The fields that are not at their defaults, each as a text, to tell rules apart, whatever they are called; what has no YAML form
        by its name."""
        return {name: _text(name, value) for name, value in self._given().items() if name != "name"}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Rule:
        """The inverse of :meth:`to_data`; PolicyError for anything that is no rule."""
        if not isinstance(data, Mapping):
            raise FieldError(f"a rule is {data!r}, but it must be a mapping of fields such as {{action: clip_norm, radius: 3}}.")
        _check_names(data)
        return cls(**{name: read_field(name, value) for name, value in data.items()})


# ------------------------------------------------------------------------------------------------------- plain data

_FIELDS: dict[str, Any] = {name: vars(Rule)[name] for name in Rule.__dataclass_fields__ if isinstance(vars(Rule).get(name), Field)}


def _written(name: str, value: Any) -> Any:
    return _about(name, _FIELDS[name].to_data, value) if name in _FIELDS else value


def _text(name: str, value: Any) -> str:
    try:
        return json.dumps(_written(name, value), sort_keys=True)
    except (NormwiseError, TypeError, ValueError):    # a function, weights, a norm of the user's own
        return str(getattr(value, "__name__", None) or getattr(value, "name", None) or type(value).__name__)


def read_field(name: str, value: Any) -> Any:
    """What the field ``name`` is in a rule, from its YAML form."""
    return _about(name, _FIELDS[name].from_data, value) if name in _FIELDS else value


def _about(name: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except NormwiseError as error:
        raise FieldError(str(error), name) from error


def _default(rule: Rule, name: str) -> Any:
    fixed = {"action": None, "on": ACTIONS[rule.action].targets[0], "norm": L2(), "per": "tensor"}
    return fixed[name] if name in fixed else getattr(Rule, name)


# ----------------------------------------------------------------------------------------------------------- checks


def _check_fields(rule: Rule) -> None:
    """What the action acts on, the fields that it reads, and the number that it needs."""
    action = ACTIONS[rule.action]
    word(rule.on, "on", ON)
    if rule.on not in action.targets:
        raise FieldError(f"action {rule.action!r} has no meaning on={rule.on!r}. Allowed for it: {', '.join(action.targets)}.", "on")
    for name in sorted(set[str]().union(*(other.uses for other in ACTIONS.values())) - action.uses):
        if getattr(rule, name) != _default(rule, name):
            raise FieldError(f"action {rule.action!r} does not use {name}: leave it out. It uses {', '.join(sorted(action.uses))}.", name)
    for name in WEIGHT_ONLY:
        if rule.on != "weight" and getattr(rule, name) != _default(rule, name):
            raise FieldError(f"{name} has a meaning on='weight' only, but this rule is on={rule.on!r}: leave it out.", name)
    if action.needs and getattr(rule, action.needs) is None and (isinstance(rule.norm, Norm) or action.needs == "strength"):
        example = "a number > 0, a schedule or 'init'" if action.needs == "radius" else "a number >= 0 or a schedule"
        raise FieldError(f"action {rule.action!r} needs {action.needs}=: {example}.", action.needs)


def _check_norm(rule: Rule) -> None:
    """What a set takes, and what a norm has a meaning on."""
    norm, label = rule.norm, norm_label(rule.norm)
    soft = rule.action == "penalty" and isinstance(norm, Orthogonal) and rule.center is None and rule.power == 1
    if isinstance(norm, Set) and not soft:
        if rule.action != "project":
            raise FieldError(f"{label!r} is a set, not a norm: use it with action 'project', given {rule.action!r}.", "norm")
        if not norm.needs_radius and rule.radius is not None:
            raise FieldError(f"norm {label!r} takes no radius: leave it out.", "radius")
        if isinstance(rule.radius, radii.Init | radii.Relative | radii.RadiusRule):
            raise FieldError(f"norm {label!r} takes a number or a schedule as its radius, given {rule.radius.label()!r}.", "radius")
        if rule.center is not None:
            raise FieldError(f"norm {label!r} takes no center: use norm 'linf' for a box around a center.", "center")
        if not norm.matrix and rule.per not in ("tensor", "element"):
            raise FieldError(f"norm {label!r} is the same for every block: leave per={rule.per!r} out.", "per")
    if rule.norm.matrix and rule.per in VECTOR_PER:
        allowed = ", ".join(per for per in PER if per not in VECTOR_PER)
        raise FieldError(f"norm {label!r} is a norm of matrices, and per={rule.per!r} has none. Allowed per: {allowed}.", "per")
    if rule.per == "global" and isinstance(rule.norm, Norm) and rule.norm.p is None:
        raise FieldError(f"per='global' is defined for the norms l1, l2 and linf, given {label!r}.", "per")
    if rule.tolerance and not (isinstance(rule.norm, Spectral) and rule.on == "weight"):
        raise FieldError(f"tolerance is for projecting weights under the norm 'spectral', given {label!r} on={rule.on!r}.", "tolerance")
    if rule.action == "prox" and rule.power == 2 and not (isinstance(rule.norm, Norm) and rule.norm.p == 2):
        raise FieldError(f"prox with power=2 is defined for norm l2, given {label!r}: use power=1, or a penalty.", "power")


def _check_radius(rule: Rule) -> None:
    radius = rule.radius
    if isinstance(radius, radii.Init) and rule.on != "weight":
        what = f"radius {radius.name!r} has a meaning on='weight' only"
        raise FieldError(f"{what}, given on={rule.on!r}: use nw.radii.Relative(scale).", "radius")
    if isinstance(radius, radii.Relative) and rule.on == "weight":
        raise FieldError("a relative radius is for on='grad' or on='update'; for weights use 'init' or a multiple of it.", "radius")
    if rule.floor is not None and not (isinstance(radius, radii.Init) or getattr(radius, "of", "number") != "number"):
        raise FieldError("floor belongs to radius='init' (or a multiple of it): leave it out.", "floor")
    if rule.min_radius is not None and schedules.is_number(radius) and rule.min_radius > radius:  # type: ignore[operator]
        raise FieldError(f"min_radius {rule.min_radius:g} is above radius {radius:g}: give min_radius <= radius.", "min_radius")


def _check_blocks(rule: Rule) -> None:
    """Radii that are found in training, the blocks that these or an action have a meaning on, and the steps of the rule."""
    radius, action = rule.radius, ACTIONS[rule.action]
    if isinstance(radius, radii.RadiusRule) and (rule.action, rule.on) not in radius.allowed:
        allowed = ", ".join(f"{action} on={on!r}" for action, on in radius.allowed)
        raise FieldError(f"radius {radius.label()!r} has no meaning for {rule.action} on={rule.on!r}. Allowed: {allowed}.", "radius")
    if action.bounds and isinstance(radius, radii.Init):
        raise FieldError(f"{rule.action}'s radius is a bound on {action.bounds}: give a number or a schedule.", "radius")
    if isinstance(radius, radii.Brake) and (rule.center is not None or rule.min_radius is not None or rule.rate != 1):
        raise FieldError("a brake takes no center, min_radius or rate: leave them out.", "radius")
    blocks = [per for per in (radius._blocks if isinstance(radius, radii.RadiusRule) else PER) if per in action.blocks]
    if rule._blocks not in blocks:
        what = f"radius {radius.label()!r}" if isinstance(radius, radii.RadiusRule) else f"action {rule.action!r}"
        raise FieldError(f"{what} has no meaning per={rule.per!r}. Allowed per: {', '.join(blocks)}.", "per")
    if rule.heads is not None and rule._blocks != "head":
        raise FieldError(f"heads has a meaning for per='head' only, given per={rule.per!r}: leave it out.", "heads")
    if rule.stop is not None and rule.stop <= rule.start:
        raise FieldError(f"stop {rule.stop} is not after start {rule.start}: the rule would never act. Give stop > start.", "stop")
