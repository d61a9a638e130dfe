"""A policy: rules in order, and the roles and axes that the user states. It is data, and has a YAML form."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from normwise import files
from normwise.errors import DataError, OutputError, PolicyError, nearest
from normwise.parameters.inventory import LayoutLike, check_selector
from normwise.parameters.layouts import Layout
from normwise.parameters.roles import ROLES
from normwise.policy import yaml_form
from normwise.policy.rule import Rule

if TYPE_CHECKING:
    from torch import nn

    from normwise.policy.explain import Explanation

PolicyLike: TypeAlias = Union["Policy", Rule, Iterable["PolicyLike"]]
# Far above any policy; what is beyond them loops or never ends.
MOST_NESTING, MOST_RULES = 16, 10_000
ROLES_ARE = "roles must be a mapping of selectors to roles: {'decoder': 'head'}"
LAYOUTS_ARE = "must be a mapping of selectors: {'*.qkv.weight': nw.Layout(...)}"


class Policy:
    """Rules in the order in which they act within their phase.

    Compares by value.

    Args:
        rules: a Rule, a Policy, or a list of those, nested as you like (``elastic_net`` is a list).
        roles: selectors to roles, where the role found from the module's type is not the one you mean: ``{"decoder": "head"}``. Those of
            the policies within ``rules`` are kept, these win.
        layouts: selectors to the axes of what they match, where the module's type does not tell them or tells them otherwise: an
            ``nw.Layout``, or a function of (module, name, tensor) that gives one. Those of the policies within ``rules`` are kept, these
            win. A rule's own ``layout`` wins over them.

    Raises:
        PolicyError: anything that is no rule, two rules of one name, an unknown role.
    """

    def __init__(
        self, rules: PolicyLike = (), roles: Mapping[Any, str] | None = None, layouts: Mapping[Any, LayoutLike] | None = None
    ) -> None:
        inherited: _Stated = ({}, {})
        self.rules: tuple[Rule, ...] = tuple(itertools.islice(_flat(rules, inherited), MOST_RULES + 1))
        if len(self.rules) > MOST_RULES:
            raise PolicyError(f"a policy holds {MOST_RULES} rules at most, given more: {_short(rules)}.")
        names = [rule.name for rule in self.rules if rule.name is not None]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise PolicyError(f"{names.count(twice[0])} rules have the name {twice[0]!r}: logs could not tell them apart. Rename one.")
        self.roles: dict[Any, str] = {**inherited[0], **_checked(roles or {}, "roles", ROLES_ARE)}
        self.layouts: dict[Any, LayoutLike] = {**inherited[1], **_checked(layouts or {}, "layouts", LAYOUTS_ARE)}

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __getitem__(self, index: int) -> Rule:
        return self.rules[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.rules == other.rules and self.roles == other.roles and self.layouts == other.layouts

    def __hash__(self) -> int:
        return hash((self.rules, frozenset(self.roles.items()), frozenset(self.layouts.items())))

    def __repr__(self) -> str:
        stated = "".join(f", {name}={value!r}" for name, value in (("roles", self.roles), ("layouts", self.layouts)) if value)
        return f"Policy([{', '.join(map(repr, self.rules))}]{stated})"

    def explain(self, model: nn.Module) -> Explanation:
        """A table of every parameter of ``model``: its role, its layout, its blocks, and the rules that touch it.

        Raises:
            PolicyError, LayoutError: as ``nw.attach`` would, for a selector that matches nothing or a block that a parameter does not have.
        """
        from normwise.policy.explain import explain

        return explain(self, model)

    def to_yaml(self) -> str:
        """The policy as YAML: a list of the rules' fields that are not at their defaults, or with roles or layouts a mapping of these.

        Raises:
            PolicyError: a rule holds what has no such form: a function, tensors, a norm of your own.
            MissingExtraError: without PyYAML.
        """
        return yaml_form.write(self.rules, self.roles, self.layouts)

    @classmethod
    def from_yaml(cls, text: str, source: str = "the policy") -> Policy:
        """The inverse of :meth:`to_yaml`; ``{max_norm: 3}`` is taken for a named rule. PolicyError names ``source`` and the line."""
        rules, roles, layouts = yaml_form.read(text, source)
        try:
            return cls(rules, roles, layouts)
        except PolicyError as error:
            raise PolicyError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """A policy from a YAML file; PolicyError names the file and the line. DataError for what is no path."""
        files.check_path(path, " from_yaml() takes the text itself.")
        try:
            text = files.content(path, yaml_form.MOST_BYTES, "a policy").decode()
        except UnicodeDecodeError as error:
            raise PolicyError(f"the policy file {str(path)!r} cannot be read: it is no UTF-8 text.") from error
        except DataError as error:
            usual = {files.NOTHING: "No such file or directory.", files.FOLDER: "Is a directory."}
            reason = usual.get(files.what_is(path), str(error))
            raise PolicyError(f"the policy file {str(path)!r} cannot be read: {reason}") from error
        return cls.from_yaml(text, str(path))

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_yaml` to a file, whole or not at all. DataError for what is no path."""
        text = self.to_yaml()
        try:
            with files.whole(path) as file:
                file.write(text.encode())
        except OutputError as error:
            reason = getattr(error.__cause__, "strerror", None) or str(error)
            raise PolicyError(f"the policy file {str(path)!r} cannot be written: {reason.rstrip('.')}.") from error


_Stated: TypeAlias = "tuple[dict[Any, str], dict[Any, LayoutLike]]"


def _flat(rules: Any, stated: _Stated, depth: int = 0) -> Iterator[Rule]:
    if isinstance(rules, Rule):
        yield rules
        return
    if isinstance(rules, str | bytes | Mapping) or not isinstance(rules, Iterable) or depth > MOST_NESTING:
        hint = " For a policy file use nw.Policy.load(path)." if isinstance(rules, str | bytes) else ""
        raise PolicyError(f"a policy holds rules and lists of rules, given {_short(rules)}.{hint}")
    if isinstance(rules, Policy):
        stated[0].update(rules.roles)
        stated[1].update(rules.layouts)
    try:
        items = iter(rules)
    except TypeError:    # a tensor of no dimensions says that it can be iterated over
        raise PolicyError(f"a policy holds rules and lists of rules, given {_short(rules)}.") from None
    for rule in items:
        yield from _flat(rule, stated, depth + 1)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked(given: Any, what: str, example: str) -> dict[Any, Any]:
    """``roles`` or ``layouts`` as the user gave them."""
    if not isinstance(given, Mapping):
        raise PolicyError(f"{what} is {_short(given)}, but {example}.")
    for selector, value in given.items():
        check_selector(selector)
        if what == "roles" and value not in ROLES:
            raise PolicyError(f"{selector!r} is given the unknown role {value!r}.{nearest(str(value), ROLES)}")
        if what == "layouts" and not isinstance(value, Layout) and not callable(value):
            raise PolicyError(f"{selector!r} is given the layout {_short(value)}: give nw.Layout(axes, shape), or a function.")
    return dict(given)
