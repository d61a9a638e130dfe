"""Every parameter of a model once: its names, module, role and layout. Rules are matched against this and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from normwise.errors import LayoutError, PolicyError, nearest
from normwise.parameters.attention import find_attention
from normwise.parameters.computed_weights import Computed, find_computed
from normwise.parameters.layout_registry import Statement, statement
from normwise.parameters.layouts import ROWS, Layout
from normwise.parameters.names import Site, clean_name, sites
from normwise.parameters.output_layers import Heads
from normwise.parameters.roles import ROLES, group_tied, may_be_matrix, refuse_placeholders, role_of

__all__ = ["Entry", "Inventory", "LayoutLike", "clean_name"]

LayoutLike: TypeAlias = "Layout | Callable[[nn.Module, str, nn.Parameter], Layout | None]"
"""The axes of a parameter, or a function of its module, its name in it and the tensor that gives them; None leaves them as found."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter; frozen and complex ones are listed too, see ``param.requires_grad`` and ``param.is_complex()``.

    ``name`` is its first clean name and ``tied`` its others. ``module`` holds it as ``local_name``. ``owners`` are the modules of all its
    names, and for a parametrized tensor also the module whose tensor it is. ``attention`` says what it is in an attention: ``"q"``,
    ``"k"``, ``"v"``, ``"out"``, ``"qkv"``, ``"kv"``, or nothing. ``adapter`` is ``"A"`` or ``"B"`` of a low-rank product B·A (LoRA), or
    nothing.
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
    adapter: str = ""

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

    ``entries`` is the tuple of `Entry`, ``trainable`` those of them that are not frozen, ``by_name`` finds one by any of its clean names.
    ``weights`` is what rules on weights act on: the same, but with one entry for each weight that a module computes from other tensors
    (parametrizations, masks) instead of its raw tensors.

    Args:
        roles: selector -> role, to correct what was found: ``{"decoder.out.weight": "head", "experts.*": "hidden"}``. Later items win.
            The selectors see the roles that were found.
        layouts: selector -> `Layout`, or a function that gives one, over what the modules' types say: ``{"*.c_attn.weight":
            nw.Layout("iso", (64, 3, 64))}``. Later items win. A bare parameter whose axes are stated to be outputs and inputs becomes
            "hidden", unless ``roles`` says otherwise.

    Raises:
        PolicyError: a role that does not exist, or a selector that matches nothing.
        LayoutError: a lazy parameter that has no shape yet.
    """

    def __init__(
        self, model: nn.Module, roles: Mapping[Any, str] | None = None, layouts: Mapping[Any, LayoutLike] | None = None
    ) -> None:
        places = sites(model)
        refuse_placeholders(places)
        heads = Heads(model, places)
        grouped = [(tied, _statement(tied)) for tied in group_tied(places)]
        attention = find_attention(places, {id(tied[0].param): told.layout.parts for tied, told in grouped if told.layout.parts})
        computed = find_computed(places)
        found = tuple(_entry(tied, told, heads, attention, computed) for tied, told in grouped)
        weights = _weights(found, computed, heads) if computed else found
        relaid = _relaid((*found, *weights), layouts or {})
        said = _with_roles(list(relaid.values()), roles or {})
        self.entries, self.weights = (tuple(said[id(relaid[id(e)])] for e in entries) for entries in (found, weights))
        self.trainable = tuple(entry for entry in self.entries if entry.param.requires_grad)
        self.by_name = {name: entry for entry in (*self.weights, *self.entries) for name in (entry.name, *entry.tied)}

    @property
    def unsure(self) -> tuple[Entry, ...]:
        """The trainable parameters that may be matrices and that nobody has said anything about: role "other", and two or more dimensions
        longer than 1. Tables of positions, tokens and the like, told by their names, are none."""
        return tuple(e for e in self.trainable if e.role == "other" and not e.layout.certain and may_be_matrix(e.name, e.param))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _entry(
    tied: list[Site], told: Statement, heads: Heads, attention: Mapping[int, str], computed: Sequence[Computed]
) -> Entry:
    first = tied[0]
    owners = {id(module): module for place in tied for module in (place.module, place.home[0])}
    names = tuple(place.name for place in tied[1:])
    role = role_of(tied, heads, told.role)
    part = next((attention[id(place.param)] for place in tied if id(place.param) in attention), "")
    of = [site.name for c in computed for site in (c.site, *c.tied) if {place.name for place in tied} & set(c.raw_names)]
    return Entry(
        first.name, first.param, first.module, first.local_name, role, told.layout, names, tuple(owners.values()), part, tuple(of),
        adapter=told.adapter,
    )  # fmt: skip


def _weights(entries: tuple[Entry, ...], computed: Sequence[Computed], heads: Heads) -> tuple[Entry, ...]:
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


def _computed_entry(computed: Computed, entries: tuple[Entry, ...], heads: Heads) -> Entry:
    site, all_sites = computed.site, [computed.site, *computed.tied]
    raw = [e for e in entries if set(computed.raw_names) & {e.name, *e.tied}]
    owners = {id(m): m for m in (*(s.module for s in all_sites), *(m for e in raw for m in e.owners))}
    part = next((e.attention for e in raw if e.attention), "")
    anchor = next(iter(computed.trained), computed.parameters[0])
    tied, told = tuple(other.name for other in computed.tied), _statement(all_sites)
    return Entry(
        site.name, anchor, site.module, site.local_name, role_of(all_sites, heads, told.role), told.layout, tied, tuple(owners.values()),
        part, computed.raw_names, computed, told.adapter,
    )  # fmt: skip


def _statement(tied: list[Site]) -> Statement:
    """The first whose layout is certain: a bare parameter tied to a Linear's weight has the Linear's axes."""
    told = []
    for place in tied:
        try:
            told.append(statement(place))
        except LayoutError as error:
            raise LayoutError(f"{place.name!r}: {error}") from error
    return next((one for one in told if one.layout.certain), told[0])


def _relaid(entries: Sequence[Entry], layouts: Mapping[Any, LayoutLike]) -> dict[int, Entry]:
    """The entries by their ids, with the axes that the user states by name."""
    from normwise.parameters.selectors import select

    said = {id(e): e for e in entries}
    together = list(said.values())
    for selector, layout, e in ((one, layout, e) for one, layout in layouts.items() for e in select(together, one)):
        stated = layout if isinstance(layout, Layout) else layout(e.module, e.local_name, e.param)
        if stated is None:
            continue
        if not isinstance(stated, Layout):
            raise PolicyError(f"layouts={{{selector!r}: ...}} gave {stated!r} for {e.name!r}: it must be an nw.Layout, or None.")
        # A bare parameter that the user calls a matrix, of outputs and inputs, is a hidden one.
        matrix = bool(set(stated.axes) & set(ROWS)) and bool(set(stated.axes) & set("iH"))
        role = "hidden" if e.role == "other" and matrix else e.role
        said[id(e)] = replace(e, layout=stated.check(e.shape, e.name), role=role)
    return said


def _with_roles(entries: Sequence[Entry], roles: Mapping[Any, str]) -> dict[int, Entry]:
    """The entries by their ids, with the roles that the user states by name."""
    from normwise.parameters.selectors import select

    said = {id(e): e for e in entries}
    together = list(said.values())
    for selector, role in roles.items():
        if role not in ROLES:
            raise PolicyError(f"Role {role!r} for {selector!r} is unknown.{nearest(str(role), ROLES)}")
        said |= {id(e): replace(e, role=role) for e in select(together, selector)}
    return said
