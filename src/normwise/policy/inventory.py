"""Every parameter of a model once: its names, module, role and layout. Rules are matched against this and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from normwise.errors import LayoutError, PolicyError, nearest
from normwise.layouts import Layout, layout_of
from normwise.policy.attention import find_attention
from normwise.policy.computed import Computed, find_computed
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
    aliases: tuple[str, ...] = ()
    """Of a raw tensor the name of the weight that is computed from it; of a computed weight the names of its raw tensors."""
    computed: Computed | None = None
    """How the weight is computed, in `Inventory.weights`; ``param`` is then the parameter whose gradient and rate count for it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All clean names, the first one first."""
        return (self.name, *self.tied, *self.aliases)

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.param.shape if self.computed is None else self.computed.site.param.shape

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameter; of a computed weight all that it depends on."""
        return [self.param] if self.computed is None else self.computed.parameters

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those of its parameters that are not frozen."""
        return [p for p in self.parameters if p.requires_grad]


class Inventory:
    """The parameters of ``model`` in the order of ``named_parameters``; iterable, with a length.

    Parameters
    ----------
    roles:
        Selector -> role, to correct what was found: ``{"decoder.out.weight": "head", "experts.*": "hidden"}``. Later items win.
        The selectors see the roles that were found.

    ``entries`` is the tuple of `Entry`, ``trainable`` those of them that are not frozen, ``by_name`` finds one by any of its clean names.
    ``weights`` is what rules on weights are about: the same, but one entry for each weight that a module computes from other tensors
    (parametrizations, masks) in the place of its raw tensors.
    Raises PolicyError for a role that does not exist or a selector that matches nothing, LayoutError for a lazy parameter that has
    no shape yet.
    """

    def __init__(self, model: nn.Module, roles: Mapping[Any, str] | None = None) -> None:
        places = sites(model)
        heads = find_heads(model, places)
        attention = find_attention(places)
        computed = find_computed(places)
        found = tuple(_entry(tied, heads, attention, computed) for tied in group_tied(places))
        weights = _weights(found, computed, heads) if computed else found
        self.entries, self.weights = _override(found, weights, roles or {})
        self.trainable = tuple(entry for entry in self.entries if entry.param.requires_grad)
        self.by_name = {name: entry for entry in (*self.weights, *self.entries) for name in (entry.name, *entry.tied)}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _entry(tied: list[Site], heads: set[int], attention: Mapping[int, str], computed: Sequence[Computed]) -> Entry:
    first = tied[0]
    layout = _layout(tied)
    owners = {id(module): module for place in tied for module in (place.module, place.home[0])}
    names = tuple(place.name for place in tied[1:])
    role = role_of(tied, heads)
    part = next((attention[id(place.param)] for place in tied if id(place.param) in attention), "")
    of = [site.name for c in computed for site in (c.site, *c.tied) if {place.name for place in tied} & set(c.raw_names)]
    return Entry(first.name, first.param, first.module, first.local_name, role, layout, names, tuple(owners.values()), part, tuple(of))


def _weights(entries: tuple[Entry, ...], computed: Sequence[Computed], heads: set[int]) -> tuple[Entry, ...]:
    """The entries, with one for each computed weight where the first parameter that it depends on stands. A raw tensor that is also used
    as it is stays, under its plain names."""
    first: dict[int, list[Computed]] = {}
    for c in computed:
        first.setdefault(id(c.parameters[0]), []).append(c)
    raw = {name for c in computed for name in c.raw_names}
    found: list[Entry] = []
    for entry in entries:
        found += [_computed_entry(c, entries, heads) for c in first.get(id(entry.param), ())]
        plain = [name for name in (entry.name, *entry.tied) if name not in raw]
        if plain:
            found.append(entry if not entry.aliases else replace(entry, name=plain[0], tied=tuple(plain[1:]), aliases=()))
    return tuple(found)


def _computed_entry(computed: Computed, entries: tuple[Entry, ...], heads: set[int]) -> Entry:
    site, all_sites = computed.site, [computed.site, *computed.tied]
    raw = [e for e in entries if set(computed.raw_names) & {e.name, *e.tied}]
    owners = {id(m): m for m in (*(s.module for s in all_sites), *(m for e in raw for m in e.owners))}
    part = next((e.attention for e in raw if e.attention), "")
    anchor = next(iter(computed.trained), computed.parameters[0])
    tied = tuple(other.name for other in computed.tied)
    return Entry(
        site.name, anchor, site.module, site.local_name, role_of(all_sites, heads), _layout(all_sites), tied, tuple(owners.values()), part,
        computed.raw_names, computed,
    )  # fmt: skip


def _layout(tied: list[Site]) -> Layout:
    """The first layout that is certain: a bare parameter tied to a Linear's weight has the Linear's axes."""
    layouts = [_layout_at(place) for place in tied]
    return next((layout for layout in layouts if layout.certain), layouts[0])


def _layout_at(place: Site) -> Layout:
    try:
        return layout_of(place.module, place.local_name, place.param, place.parent)
    except LayoutError as error:
        raise LayoutError(f"{place.name!r}: {error}") from error


def _override(
    entries: tuple[Entry, ...], weights: tuple[Entry, ...], roles: Mapping[Any, str]
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    from normwise.policy.select import select

    given: dict[int, str] = {}
    together = list({id(entry): entry for entry in (*entries, *weights)}.values())
    for selector, role in roles.items():
        if role not in ROLES:
            raise PolicyError(f"Role {role!r} for {selector!r} is unknown.{nearest(str(role), ROLES)}")
        given |= {id(entry): role for entry in select(together, selector)}
    said = {id(entry): replace(entry, role=given[id(entry)]) if id(entry) in given else entry for entry in together}
    return tuple(said[id(entry)] for entry in entries), tuple(said[id(entry)] for entry in weights)
