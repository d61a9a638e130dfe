"""Every parameter of a model once: its names, module, role and layout. Rules are matched against this and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from normwise.errors import LayoutError, PolicyError, nearest
from normwise.layouts import Layout, layout_of
from normwise.policy.attention import find_attention
from normwise.policy.names import Site, clean_name, sites
from normwise.policy.roles import ROLES, find_heads, group_tied, role_of

__all__ = ["Entry", "Inventory", "clean_name"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter.

    ``name`` is its first clean name and ``tied`` its others. ``module`` holds it as ``local_name``; ``owners`` are the modules of
    all its names, and for a parametrized tensor also the module whose tensor it is. ``attention`` says what it is in an attention: ``"q"``,
    ``"k"``, ``"v"``, ``"out"``, ``"qkv"``, or nothing. Frozen and complex parameters are listed too: see ``param.requires_grad`` and
    ``param.is_complex()``.
    """

    name: str
    param: nn.Parameter
    module: nn.Module
    local_name: str
    role: str
    layout: Layout
    tied: tuple[str, ...] = ()
    owners: tuple[nn.Module, ...] = ()
    attention: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All clean names, the first one first."""
        return (self.name, *self.tied)


class Inventory:
    """The parameters of ``model`` in the order of ``named_parameters``; iterable, with a length.

    Parameters
    ----------
    roles:
        Selector -> role, to correct what was found: ``{"decoder.out.weight": "head", "experts.*": "hidden"}``. Later items win.
        The selectors see the roles that were found.

    ``entries`` is the tuple of `Entry`, ``trainable`` those of them that are not frozen, ``by_name`` finds one by any of its clean names.
    Raises PolicyError for a role that does not exist or a selector that matches nothing, LayoutError for a lazy parameter that has
    no shape yet.
    """

    def __init__(self, model: nn.Module, roles: Mapping[Any, str] | None = None) -> None:
        places = sites(model)
        heads = find_heads(model, places)
        attention = find_attention(places)
        found = tuple(_entry(tied, heads, attention) for tied in group_tied(places))
        self.entries = _override(found, roles or {})
        self.trainable = tuple(entry for entry in self.entries if entry.param.requires_grad)
        self.by_name = {name: entry for entry in self.entries for name in entry.names}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _entry(tied: list[Site], heads: set[int], attention: Mapping[int, str]) -> Entry:
    first = tied[0]
    layout = _layout(tied)
    owners = {id(module): module for place in tied for module in (place.module, place.home[0])}
    names = tuple(place.name for place in tied[1:])
    role = role_of(tied, heads)
    part = next((attention[id(place.param)] for place in tied if id(place.param) in attention), "")
    return Entry(first.name, first.param, first.module, first.local_name, role, layout, names, tuple(owners.values()), part)


def _layout(tied: list[Site]) -> Layout:
    """The first layout that is certain: a bare parameter tied to a Linear's weight has the Linear's axes."""
    layouts = [_layout_at(place) for place in tied]
    return next((layout for layout in layouts if layout.certain), layouts[0])


def _layout_at(place: Site) -> Layout:
    try:
        return layout_of(place.module, place.local_name, place.param, place.parent)
    except LayoutError as error:
        raise LayoutError(f"{place.name!r}: {error}") from error


def _override(entries: tuple[Entry, ...], roles: Mapping[Any, str]) -> tuple[Entry, ...]:
    from normwise.policy.select import select

    given: dict[int, str] = {}
    for selector, role in roles.items():
        if role not in ROLES:
            raise PolicyError(f"Role {role!r} for {selector!r} is unknown.{nearest(str(role), ROLES)}")
        given |= {id(entry): role for entry in select(entries, selector)}
    return tuple(replace(entry, role=given[id(entry)]) if id(entry) in given else entry for entry in entries)
