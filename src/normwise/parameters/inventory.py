"""Every parameter of a model once: its names, module, role and layout; and selectors, which pick some of them.

Rules are matched against this and nothing else. A selector is a glob, a regular expression, a role, a part of attentions, a module class,
a predicate, or a list of these.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from normwise.errors import LayoutError, PolicyError, nearest
from normwise.parameters.adapters import PARTS as ADAPTER_PARTS
from normwise.parameters.adapters import PRODUCT, LowRank, find_products, part_of, product_layout
from normwise.parameters.attention import CIRCUITS, FUSED_NAMES, PARTS, TELLING, find_attention
from normwise.parameters.computed_weights import Computed, find_computed
from normwise.parameters.layout_registry import Statement, by_source, split_by_source, stated_experts
from normwise.parameters.layouts import ROWS, Layout, layout_of, registered
from normwise.parameters.names import Site, adapter_of, clean_name, sites
from normwise.parameters.regex import LONGEST, finder
from normwise.parameters.roles import GROUPS, ROLES, Heads, group_tied, may_be_matrix, refuse_placeholders, role_of

__all__ = ["Entry", "Inventory", "LayoutLike", "Selector", "clean_name", "find_roles"]

LayoutLike: TypeAlias = "Layout | Callable[[nn.Module, str, nn.Parameter], Layout | None]"
"""The axes of a parameter, or a function of its module, its name in it and the tensor that gives them; None leaves them as found."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter; frozen and complex ones are listed too, see ``param.requires_grad`` and ``param.is_complex()``.

    ``name`` is its first clean name and ``tied`` its others. ``module`` holds it as ``local_name``. ``owners`` are the modules of all its
    names, and for a parametrized tensor also the module whose tensor it is. ``attention`` says what it is in an attention: ``"q"``,
    ``"k"``, ``"v"``, ``"out"``, ``"qkv"``, ``"kv"``, or nothing. ``adapter`` is ``"A"`` or ``"B"`` of a low-rank product s·B·A (LoRA),
    ``"product"`` for that itself, ``"magnitude"`` (DoRA), ``"modules_to_save"``, or nothing; ``adapter_name`` says of which adapter.
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
    adapter_name: str = ""
    base: Entry | None = None
    """Of a product the weight that it is added to."""

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
    def factors(self) -> list[Any]:
        """A and B of a product; empty for other weights."""
        return self.computed.way.a_and_b() if self.computed is not None and isinstance(self.computed.way, LowRank) else []

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those of its parameters that are not frozen."""
        return [p for p in self.parameters if p.requires_grad]


class Inventory:
    """The parameters of ``model`` in the order of ``named_parameters``; iterable, with a length.

    ``entries`` is the tuple of `Entry`, ``trainable`` those of them that are not frozen, ``by_name`` finds one by any of its clean names.
    ``weights`` is what rules on weights act on: the same, but with one entry for each weight that a module computes from other tensors
    (parametrizations, masks) instead of its raw tensors, and with LoRA's products s·B·A beside their factors.

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
        # Most models have neither attention nor computed weights; a look at names and hooks tells, and spares them the search.
        steps = {step.removesuffix("_orig") for place in places for step in place.name.split(".")}
        parts_of = {id(tied[0].param): told.layout.parts for tied, told in grouped if told.layout.parts}
        attention = find_attention(places, parts_of) if steps & TELLING else {}
        raw = [place for place in places if _may_be_raw(place)]
        computed = find_computed(raw) if raw else []
        found = tuple(_entry(tied, told, heads, attention, computed) for tied, told in grouped)
        weights = _weights(found, computed, heads) if computed else found
        relaid = _relaid((*found, *weights), layouts or {})
        said = _with_roles(list(relaid.values()), roles or {})
        self.entries, whole = (tuple(said[id(relaid[id(e)])] for e in entries) for entries in (found, weights))
        after: dict[int, list[Entry]] = {}
        for product in _products(places, self.entries) if any(e.adapter for e in self.entries) else ():
            after.setdefault(id(product.factors[1]), []).append(product)
        self.weights = tuple(e for one in whole for e in (one, *after.get(id(one.param), ()))) if after else whole
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
        None, *_adapter(first, told),
    )  # fmt: skip


def _adapter(place: Site, told: Statement) -> tuple[str, str]:
    """The part of an adapter that it is, and which adapter's; without a look at models that have none."""
    return part_of(place) if told.adapter or "lora_" in place.name or "modules_to_save" in place.name else ("", "")


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
        part, computed.raw_names, computed, *_adapter(site, told),
    )  # fmt: skip


def _products(places: Sequence[Site], entries: Sequence[Entry]) -> Iterator[Entry]:
    """LoRA's products, each with the units and the role of its base."""
    by_param = {id(e.param): e for e in entries}
    for computed in find_products(places):
        way, site = computed.way, computed.site
        assert isinstance(way, LowRank)
        base = by_param.get(id(getattr(way.layer.get_base_layer(), "weight", None)))
        anchor: Any = next(iter(computed.trained), way.parts()[0])
        owners = (way.layer, *(base.owners if base else ()))
        yield Entry(
            site.name, anchor, way.layer, site.local_name, base.role if base else "hidden",
            product_layout(base.layout if base else None, site.param.shape), (), owners, base.attention if base else "", (), computed,
            "product", way.adapter, base,
        )  # fmt: skip


def _may_be_raw(place: Site) -> bool:
    """Whether a weight may be computed from it: it is a parametrization's, or hooks run before its module, or that keeps a plain tensor."""
    module = place.module
    parametrized = any(isinstance(above, ParametrizationList) for above in (*place.parents, module))
    return parametrized or bool(module._forward_pre_hooks) or any(isinstance(value, Tensor) for value in vars(module).values())


def find_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter, by clean name; a tied parameter is listed under its first name only. It may have no shape yet.

    >>> find_roles(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 10)))
    {'0.weight': 'conv', '0.bias': 'bias', '2.weight': 'head', '2.bias': 'bias'}
    """
    places = sites(model)
    heads = Heads(model, places)
    found = {}
    for tied in group_tied(places):
        stated = None if is_lazy(tied[0].param) else next((s.role for place in tied if (s := statement(place)).role is not None), None)
        found[tied[0].name] = role_of(tied, heads, stated)
    return found


def statement(place: Site) -> Statement:
    """What is known of the parameter at ``place``, from the first that tells: what is registered for a class that holds its layer
    (``register_layout(child=)``), its module's type, what transformers' modules say of themselves, the source of the forward pass.
    LayoutError where a registered layout does not fit it, or it has no shape yet."""
    module, name = place.home
    tensor, plain = place.param, name.removesuffix("_orig")
    whole = module is place.module    # what stands behind a parametrization has axes of its own
    holders = [(parent, path) for parent, path in place.above() if path]
    for parent, path in holders if whole else ():
        if (told := registered(parent, plain, tensor, path)) is not None:
            return Statement(*told)
    layout = layout_of(place.module, place.local_name, tensor, place.parent)
    own = registered(module, plain, tensor) if whole else None
    if own is not None and own[1] is not None:
        return Statement(*own)
    adapter = adapter_of(place)
    if adapter and tensor.ndim == 2:
        # A bare matrix of PEFT's embeddings and AdaLoRA in a ParameterDict: (rank, tokens) and (width, rank), else (outputs, inputs).
        if "lora_embedding_A" in place.name.split("."):
            return Statement(Layout("io", tuple(tensor.shape)), "embedding", adapter)
        return Statement(layout if layout.certain else replace(layout, axes="oi", certain=True), "hidden", adapter)
    # Only a layer that is called as one of q, k and v in one: any projection may be cut into three.
    if layout.certain and plain == "weight" and holders and holders[0][1] in FUSED_NAMES:
        split = split_by_source(*holders[0], tensor)
        if split is not None:
            return Statement(split)
    if layout.certain or not whole:
        return Statement(layout, None, adapter)
    return stated_experts(module, plain, tensor) or by_source(module, plain, tensor) or Statement(layout)


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
    said = {id(e): e for e in entries}
    together = list(said.values())
    for selector, role in roles.items():
        if role not in ROLES:
            raise PolicyError(f"Role {role!r} for {selector!r} is unknown.{nearest(str(role), ROLES)}")
        said |= {id(e): replace(e, role=role) for e in select(together, selector)}
    return said


# ------------------------------------------------------------------------------------------------------------ selectors

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
- a part of PEFT's adapters, of all or of one: ``"peft:A"``, ``"peft:B:default"``, ``"peft:magnitude"``, ``"peft:modules_to_save"``;
  ``"peft:product"`` means LoRA's products s·B·A, which ``params`` picks by this or by a name with ``lora_BA`` alone;
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


def means(selector: Selector, entry: Entry, names: Collection[str] = ()) -> bool:
    """As `matches`, for what a rule acts on: a product of LoRA is meant only by what names products, since its factors are listed too."""
    return any(_predicate(one, names)(entry) for one in _several(selector) if entry.adapter != "product" or _names_products(one))


def _names_products(one: Any) -> bool:
    text = one.pattern if isinstance(one, re.Pattern) else one
    return isinstance(text, str) and (text.startswith("peft:product") or PRODUCT in text)


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
    given = f"a tensor of shape {tuple(one.shape)}" if isinstance(one, Tensor) else repr(one)
    raise PolicyError(
        f"{given} selects no parameters: a selector is a glob such as 'fc*', 're:...', 'role:...', 'attention:...', "
        "'peft:...', 'class:...', a compiled pattern, a module class, a function of an entry, or a list of these."
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
    if kind == "peft":
        part, _, adapter = rest.partition(":")
        if part not in ADAPTER_PARTS:
            raise PolicyError(f"{text!r} is no part of an adapter.{nearest(part, ADAPTER_PARTS)}")
        return lambda entry: entry.adapter == part and adapter in ("", entry.adapter_name)
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
        listed = entries if field == "exclude" or _names_products(one) else [e for e in entries if e.adapter != "product"]
        ids = {id(entry) for entry in listed if predicate(entry)}
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
    if isinstance(one, str) and one.startswith("peft:"):
        there = dict.fromkeys(f"peft:{e.adapter}:{e.adapter_name}".rstrip(":") for e in entries if e.adapter)
        alone = one.startswith("peft:product") and there and not any(e.adapter == "product" for e in entries)
        return f"{' A product has no gradient of its own.' if alone else ''} Of adapters there are {', '.join(there) or 'none'}."
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
