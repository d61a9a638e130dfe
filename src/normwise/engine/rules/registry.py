"""Which class runs a rule: each says so itself, by its action or by the kind of radius that it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from normwise.engine import rules
from normwise.engine.sharded import is_sharded
from normwise.parameters.inventory import Entry
from normwise.policy import Rule

if TYPE_CHECKING:
    from normwise.engine.rules.base import BoundRule

C = TypeVar("C", bound="type[BoundRule]")


@dataclass(frozen=True)
class _Runner:
    """A class, and the rules that it is for."""

    cls: type[BoundRule]
    actions: tuple[str, ...]
    radius: type[Any] | None
    when: Callable[[Rule], bool] | None
    whole: bool

    def takes(self, rule: Rule, entries: Sequence[Entry]) -> bool:
        named = rule.action in self.actions if self.radius is None else isinstance(rule.radius, self.radius)
        return named and (self.when is None or self.when(rule)) and not (self.whole and any(is_sharded(e.param) for e in entries))


_RUNNERS: list[_Runner] = []


def load() -> None:
    """Every file of the folder registers its classes and actions when it is imported, so that a new one needs no list elsewhere."""
    for module in iter_modules(rules.__path__):
        import_module(f"{rules.__name__}.{module.name}")


def runs(
    *actions: str, radius: type[Any] | None = None, when: Callable[[Rule], bool] | None = None, whole: bool = False
) -> Callable[[C], C]:
    """Registers a class of bound rules.

    Args:
        actions: the actions that it runs; without any, those of rules with ``radius``.
        radius: the kind of radius that it finds in training; such a rule is not for the class of its action.
        when: for some rules of the action alone. Such a class comes before the one that takes all.
        whole: not where a parameter is a DTensor.
    """

    def register(cls: C) -> C:
        runner = _Runner(cls, actions, radius, when, whole)
        # The more a class asks for, the earlier it is asked.
        _RUNNERS.append(runner)
        _RUNNERS.sort(key=lambda r: (r.when is None, r.radius is None))
        return cls

    return register


def bind(rule: Rule, entries: Sequence[Entry], owner: dict[int, int], index: int) -> BoundRule:
    """The bound form of a rule: what its radius or its action asks for."""
    return next(r for r in _RUNNERS if r.takes(rule, entries)).cls(rule, entries, owner, index)
