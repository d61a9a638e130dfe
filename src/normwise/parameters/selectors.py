"""Which parameters a rule acts on: globs, regular expressions, roles, parts of attentions, module classes, predicates, lists of these."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from normwise.errors import PolicyError, nearest
from normwise.parameters.attention import CIRCUITS, PARTS
from normwise.parameters.regex import LONGEST, finder
from normwise.parameters.roles import GROUPS, ROLES

if TYPE_CHECKING:
    from normwise.parameters.inventory import Entry

Predicate: TypeAlias = "Callable[[Entry], bool]"
One: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Predicate"
Selector: TypeAlias = "One | Sequence[One]"
"""What ``params=`` and ``exclude=`` take.

- a clean name, which means this parameter whatever characters it has, or a glob on the whole of it: ``"fc*"``, ``"*.weight"``,
  ``"blocks.[01].*"``;
- a regular expression, found anywhere in the clean name: ``"re:fc[12]"`` or ``re.compile("fc[12]")``; any but one that refers back to
  what another part matched (see ``parameters.regex``);
- a role, or a group of roles: ``"role:bias"``, ``"role:matrix"``, ``"role:all"``;
- a part of an attention, or two: ``"attention:q"``, ``"attention:qk"``, ``"attention:ov"``, ``"attention:all"``;
- the class of the module that holds the parameter, or a base of it: ``"class:Linear"``, ``"class:torch.nn.Linear"``, ``nn.Linear``;
- a predicate of the inventory's entry: ``lambda e: e.param.ndim == 4``;
- a list or tuple of these: whatever any of them matches.
"""

_LISTED = 30


def matches(selector: Selector, entry: Entry, names: Collection[str] = ()) -> bool:
    """Whether ``selector`` means this entry under any of its names; PolicyError for a selector that means nothing at all.

    names: those of all parameters, so that a selector that is one of them is not read as a glob.
    """
    return any(_predicate(one, names)(entry) for one in _several(selector))


def names_of(entries: Iterable[Entry]) -> frozenset[str]:
    """All names of all entries."""
    return frozenset(name for entry in entries for name in entry.names)


def select(entries: Iterable[Entry], params: Selector, exclude: Selector | None = None) -> list[Entry]:
    """The entries that ``params`` matches and ``exclude`` does not, in their own order.

    Raises PolicyError, with a list of what there is, if nothing is left or one element of either matches nothing: a rule that silently
    does less than it says is the hardest mistake to find.
    """
    listed = list(entries)
    wanted = _union(params, listed, "params")
    excluded = set() if exclude is None else _union(exclude, listed, "exclude")
    found = [entry for entry in listed if id(entry) in wanted - excluded]
    if not found:
        raise PolicyError(f"exclude={shown(exclude)} leaves nothing of what params={shown(params)} matches. {_inventory(listed)}")
    return found


def check_selector(selector: Selector) -> None:
    """PolicyError for an unknown role or part, a broken regular expression or something that is no selector; needs no model."""
    for one in _several(selector):
        _predicate(one)


def selector_to_data(selector: Selector) -> str | list[str]:
    """The selector as a string or a list of strings, for YAML; PolicyError for a predicate."""
    return [_written(one) for one in selector] if isinstance(selector, list | tuple) else _written(selector)


def selector_from_data(data: Any) -> str | list[str]:
    """The inverse of `selector_to_data`; PolicyError for anything but strings that are selectors."""
    texts = data if isinstance(data, list) else [data]
    if not all(isinstance(text, str) for text in texts):
        raise PolicyError(f"A selector is written as a string or a list of strings; given {data!r}.")
    check_selector(data)
    return list(data) if isinstance(data, list) else str(data)


# ------------------------------------------------------------------------------------------------------- one selector


def _several(selector: Selector) -> list[Any]:
    return list(selector) if isinstance(selector, list | tuple) else [selector]


def _predicate(one: Any, names: Collection[str] = ()) -> Predicate:
    if isinstance(one, str):
        return (lambda entry: one in entry.names) if one in names else _from_text(one)
    if isinstance(one, re.Pattern) and isinstance(one.pattern, str):
        found = finder(one.pattern, one.flags)
        return lambda entry: any(map(found, entry.names))
    if isinstance(one, type) and issubclass(one, nn.Module):
        return lambda entry: any(isinstance(owner, one) for owner in entry.owners)
    if callable(one) and not isinstance(one, type | nn.Module):
        return lambda entry: _judged(one, entry)
    raise PolicyError(
        f"{one!r} selects no parameters: a selector is a glob such as 'fc*', 're:...', 'role:...', 'attention:...', "
        "'class:...', a compiled pattern, a module class, a function of an entry, or a list of these."
    )


def _judged(predicate: Predicate, entry: Entry) -> bool:
    try:
        return bool(predicate(entry))
    # A predicate is the user's own code and may raise anything; the message says on which entry.
    except Exception as error:
        raise PolicyError(f"the selector {shown(predicate)} failed on {entry.name!r}: {type(error).__name__}: {error}.") from error


def _from_text(text: str) -> Predicate:
    kind, _, rest = text.partition(":")
    if kind == "re":
        found = finder(rest)
        return lambda entry: any(map(found, entry.names))
    if len(text) > LONGEST:
        raise PolicyError(f"the selector {text[:60]!r}... has {len(text)} characters, {LONGEST} at most are read.")
    if kind == "role":
        roles = _listed_in(GROUPS, ROLES, text, "role")
        return lambda entry: entry.role in roles
    if kind == "attention":
        parts = _listed_in(CIRCUITS, PARTS, text, "part of an attention")
        return lambda entry: entry.attention in parts
    if kind == "class":
        return lambda entry: any(rest in _class_names(cls) for owner in entry.owners for cls in type(owner).__mro__)
    return lambda entry: any(fnmatch.fnmatchcase(name, text) for name in entry.names)


def _listed_in(groups: Mapping[str, tuple[str, ...]], singles: tuple[str, ...], text: str, what: str) -> tuple[str, ...]:
    """What the selector ``text`` names behind its colon: one of ``singles``, or a group of them."""
    name = text.partition(":")[2]
    if name in singles:
        return (name,)
    if name in groups:
        return groups[name]
    raise PolicyError(f"{text!r} is no {what}.{nearest(name, (*singles, *groups))}")


def _class_names(cls: type) -> tuple[str, ...]:
    """Its name, its full path, and the public path of torch's own."""
    short = (f"torch.nn.{cls.__name__}",) if getattr(nn, cls.__name__, None) is cls else ()
    return (cls.__name__, f"{cls.__module__}.{cls.__qualname__}", *short)


def _written(one: Any) -> str:
    _predicate(one)
    if isinstance(one, str):
        return one
    if isinstance(one, re.Pattern):
        return f"re:{_with_flags(one)}"
    if isinstance(one, type):
        return f"class:{one.__module__}.{one.__qualname__}"
    raise PolicyError(f"a predicate cannot be written to YAML: {shown(one)}; use a glob, 're:...', 'role:...' or 'class:...'.")


def _with_flags(pattern: re.Pattern[str]) -> str:
    """The pattern's text with all its flags written inside, at the front, where alone they may stand."""
    flags = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}
    letters = "".join(letter for letter, flag in flags.items() if pattern.flags & flag)
    body = re.sub(r"\A(\(\?[aimsux]+\))+", "", pattern.pattern)
    return f"(?{letters}){body}" if letters else body


# ------------------------------------------------------------------------------------------------------------- errors


def _union(selector: Selector, entries: list[Entry], field: str) -> set[int]:
    """The ids of what any of the selector's elements matches; each has to match something."""
    found: set[int] = set()
    names = names_of(entries)
    for one in _several(selector):
        predicate = _predicate(one, names)
        ids = {id(entry) for entry in entries if predicate(entry)}
        if not ids:
            raise PolicyError(f"{field}={shown(one)} matches no parameter.{_near(one, entries)} {_inventory(entries)}")
        found |= ids
    if not found:
        raise PolicyError(f"{field}={shown(selector)} names nothing. {_inventory(entries)}")
    return found


def shown(selector: object, quoted: bool = True) -> str:
    """A selector as its user wrote it, for messages; without quotes where the message puts some around what it is a part of."""
    if isinstance(selector, list | tuple):
        return f"[{', '.join(shown(one, quoted) for one in selector)}]"
    if isinstance(selector, str) and not quoted:
        return selector
    return getattr(selector, "__qualname__", None) or repr(selector)


def _near(one: object, entries: list[Entry]) -> str:
    """The name or class nearest to what was written; a prefix counts as near, since a module's name is no parameter's."""
    if not isinstance(one, str) or one.startswith(("re:", "role:", "attention:")):
        return ""
    names = [name for entry in entries for name in entry.names]
    classes = [f"class:{type(owner).__name__}" for entry in entries for owner in entry.owners]
    options = classes if one.startswith("class:") else names
    inside = [option for option in options if option.startswith(f"{one}.")]
    close = inside or difflib.get_close_matches(one, options, n=1, cutoff=0.5)
    return f" Did you mean {(f'{one}.*' if inside else close[0])!r}?" if close else ""


def _inventory(entries: list[Entry]) -> str:
    shown = ", ".join(f"{entry.name} ({entry.role})" for entry in entries[:_LISTED])
    rest = f", ... and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return f"There are: {shown}{rest}." if entries else "The model has no parameters."
