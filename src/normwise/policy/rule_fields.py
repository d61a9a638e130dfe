"""The fields of a rule, one by one: what each accepts, what it becomes, and its plain form in YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from torch import Tensor

from normwise.errors import NormError, PolicyError, nearest
from normwise.norms import FORMS, NORMS, SETS, Box, Norm, Set, get_norm
from normwise.parameters import inventory
from normwise.parameters.layouts import Heads, Layout
from normwise.policy import radii, schedules

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
    """A dataclass field that is converted and checked when it is set, so that a rule holds one form of each value.

    ``to_data`` gives its plain form in YAML, ``from_data`` takes that back; without them the value is plain.
    """

    def __init__(
        self, convert: Callable[[Any], Kept], default: Given, to_data: Callable[[Any], Any] = _same, from_data: Callable[[Any], Any] = _same
    ) -> None:
        self.convert, self.default, self.to_data, self.from_data = convert, default, to_data, from_data

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
            rule.__dict__[self.name] = self.convert(value)
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
    inventory.check_selector(selector)
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


def convert_rate(value: Any) -> float:
    rate = schedules.number(value, "rate")
    if rate > 1:
        raise PolicyError(f"rate is {rate:g}, but rate must be in (0, 1]: the share of the way that is gone at each step.")
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
