"""Policies as YAML: the list of the rules' fields. Whatever is wrong in a file is one PolicyError with its line.

Numbers are read as YAML 1.2 does, so that ``1e-5`` is a number and ``on:`` is a word (PyYAML follows YAML 1.1, where the first
is a string and the second is true). Tags are refused, since nothing in a policy needs one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from normwise.errors import NormwiseError, PolicyError, nearest, need
from normwise.parameters.inventory import selector_to_data
from normwise.parameters.layouts import Layout
from normwise.policy import radii, schedules
from normwise.policy.named import NAMED, Common
from normwise.policy.rule import FieldError, Rule, layout_from_data, layout_to_data, read_field

KEYS = ("rules", "roles", "layouts")
# Far above any policy; a file beyond them was not written by hand, or loops or explodes through its aliases. All are checked before the
# text is parsed, or while it is: the parser reads about 300 KB a second.
MOST_BYTES, MOST_NODES, MOST_DEPTH, MOST_RULES = 1 << 18, 20_000, 24, 1000

_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)


# Rules, roles by selector, layouts by selector.
Stated = tuple[list[Rule], dict[str, str], dict[str, Any]]


def read(text: str, source: str = "the policy") -> Stated:
    """What a YAML text states: a list of rules, or ``{rules: [...], roles: {...}, layouts: {...}}``.

    Raises PolicyError, with ``source`` and the line, for whatever is no policy.
    """
    return _Reader(source).policy(_compose(text, source))


def write(rules: Sequence[Rule], roles: Mapping[Any, str], layouts: Mapping[Any, Any]) -> str:
    """The YAML text that :func:`read` turns into the same rules, roles and layouts."""
    listed: Any = [rule.to_data() for rule in rules]
    for layout in layouts.values():
        if not isinstance(layout, Layout):
            raise PolicyError(f"a layout that is a function cannot be written to YAML: {layout!r}; give an nw.Layout(axes, shape).")
    stated = {"roles": _by_key(roles, "role"), "layouts": {k: layout_to_data(v) for k, v in _by_key(layouts, "layout").items()}}
    data = {"rules": listed, **{key: value for key, value in stated.items() if value}} if roles or layouts else listed
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined,misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def quoted(dumper: Any, text: str) -> Any:
        # Also the words which read as a number here, though not in YAML 1.1.
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain_scalar(text) == text else "'")

    Dumper.add_representer(str, quoted)
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def _by_key(given: Mapping[Any, Any], what: str) -> dict[str, Any]:
    written = {}
    for selector, value in given.items():
        text = selector_to_data(selector)
        if not isinstance(text, str):
            raise PolicyError(f"the selector {text!r} of a {what} is a list, which cannot be a key in YAML: give each its own entry.")
        written[text] = value
    return written


def plain_scalar(text: str) -> Any:
    """What an unquoted word of YAML means: null, a truth value, a number, or itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2])
    return float(text) if _FLOAT.fullmatch(text) else text


def _yaml() -> ModuleType:
    need("yaml", "yaml", what="a policy as YAML")
    import yaml

    return yaml


# ------------------------------------------------------------------------------------------------------------ reading


def _compose(text: str, source: str) -> Any:
    if not isinstance(text, str):
        raise PolicyError(f"{source} is {type(text).__name__}, but a policy is read from YAML text.")
    if len(text) > MOST_BYTES or len(text.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise PolicyError(f"{source} is too long: a policy has {MOST_BYTES} bytes at most. Name the parameters of many rules by patterns.")
    yaml = _yaml()
    try:
        return _compose_nodes(text, source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        about_alias = "alias" in f"{problem} {getattr(error, 'context', '')}"
        hint = " (a pattern that begins with * must be quoted: '*.weight')" if about_alias else ""
        raise PolicyError(f"{source}{f', line {mark.line + 1}' if mark else ''}: this is no YAML: {problem}{hint}.") from error
    except (ValueError, OverflowError, RecursionError) as error:
        # PyYAML lets these out for escapes beyond Unicode and for very deep nesting.
        raise PolicyError(f"{source}: this is no YAML that can be read: {type(error).__name__}: {error}") from error


def _compose_nodes(text: str, source: str) -> Any:
    """The text's nodes; PolicyError as soon as there are too many of them, or one lies too deep."""
    yaml = _yaml()

    class SafeLoader(yaml.BaseLoader):  # type: ignore[name-defined,misc]
        nodes, depth = 0, 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.nodes > MOST_NODES or self.depth > MOST_DEPTH + 2:    # a rule lies two below the root
                deep = self.nodes <= MOST_NODES
                what = f"this is nested more than {MOST_DEPTH} deep" if deep else f"there are more than {MOST_NODES} entries"
                raise PolicyError(f"{source}, line {self.peek_event().start_mark.line + 1}: {what}, which no policy needs.")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return yaml.compose(text, Loader=SafeLoader)


class _Reader:
    """Turns YAML nodes into rules, and knows the line of each."""

    def __init__(self, source: str) -> None:
        self.source, self.nodes = source, 0

    def policy(self, root: Any) -> Stated:
        if root is None:
            raise PolicyError(f"{self.source} is empty: write [] for a policy without rules.")
        if _is_sequence(root):
            return self.rules(root), {}, {}
        if not _is_mapping(root):
            raise self.error(root, "a policy is a list of rules, or a mapping of 'rules', 'roles' and 'layouts'.")
        parts = self.entries(root)
        if parts and not parts.keys() & {"rules", "roles"} and all(map(_is_sequence, parts.values())):
            several = f"this holds one policy each of {', '.join(parts)}: take the list under one of these names."
            raise self.error(root, f"unknown key {next(iter(parts))!r} of a policy; {several}")
        for key in parts:
            if key not in KEYS:
                raise self.error(_key_node(root, key), f"unknown key {key!r} of a policy.{nearest(key, KEYS)}")
        roles = self.plain(parts["roles"]) if "roles" in parts else {}
        layouts = self.plain(parts["layouts"]) if "layouts" in parts else {}
        rules = self.rules(parts.get("rules", root))
        if not isinstance(roles, dict) or not all(isinstance(word, str) for pair in roles.items() for word in pair):
            raise self.error(_key_node(root, "roles"), "roles are a mapping of patterns to roles: {'fc3.weight': head}.")
        if not isinstance(layouts, dict):
            shown = "{'*.c_attn.weight': {axes: iso, shape: [64, 3, 64]}}"
            raise self.error(_key_node(root, "layouts"), f"layouts are a mapping of patterns to axes: {shown}.")
        try:
            return rules, roles, {pattern: layout_from_data(layout) for pattern, layout in layouts.items()}
        except NormwiseError as error:
            raise self.error(_key_node(root, "layouts"), str(error)) from error

    def rules(self, node: Any) -> list[Rule]:
        if not _is_sequence(node):
            raise self.error(node, "the rules of a policy are a list: begin each rule with '- '.")
        if len(node.value) > MOST_RULES:
            raise self.error(node, f"a policy's file holds {MOST_RULES} rules at most, found {len(node.value)}.")
        found: list[Rule] = []
        for index, item in enumerate(node.value, 1):
            data = self.plain(item)
            try:
                found += rules_from_data(data)
            except PolicyError as error:
                at = _key_node(item, getattr(error, "field", None)) or item
                raise self.error(at, f"rule {index}: {error}") from error
        return found

    def plain(self, node: Any, depth: int = 0) -> Any:
        """The node as plain Python data."""
        self.nodes += 1
        if depth > MOST_DEPTH or self.nodes > MOST_NODES:
            raise self.error(node, "this is nested too deeply, or repeats itself through an alias.")
        if _is_sequence(node):
            return [self.plain(item, depth + 1) for item in node.value]
        if _is_mapping(node):
            return {key: self.plain(value, depth + 1) for key, value in self.entries(node).items()}
        if node.tag != "tag:yaml.org,2002:str":
            raise self.error(node, f"a policy has no use for the tag {node.tag!r}.")
        return node.value if node.style else plain_scalar(node.value)

    def entries(self, node: Any) -> dict[str, Any]:
        """The value nodes of a mapping by key; a key that is no word, or stands twice, is an error."""
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key.value, str):
                raise self.error(key, "a key is a word, not a list or a mapping.")
            if key.value in found:
                raise self.error(key, f"{key.value!r} stands twice in one mapping.")
            found[key.value] = value
        return found

    def error(self, node: Any, message: str) -> PolicyError:
        return PolicyError(f"{self.source}, line {node.start_mark.line + 1}: {message}")


def _is_sequence(node: Any) -> bool:
    return node.tag == "tag:yaml.org,2002:seq" and node.id == "sequence"


def _is_mapping(node: Any) -> bool:
    return node.tag == "tag:yaml.org,2002:map" and node.id == "mapping"


def _key_node(node: Any, name: str | None) -> Any:
    """The node of the key ``name``, also where it stands within a named rule; None without one."""
    if name is None or node.id != "mapping":
        return None
    here = [key for key, _ in node.value if key.value == name]
    inner = [found for _, value in node.value if len(node.value) == 1 and (found := _key_node(value, name))]
    return next(iter(here + inner), None)


# ----------------------------------------------------------------------------------------------------------- rules


def rules_from_data(data: Any) -> list[Rule]:
    """The rules that one item of a policy stands for: a rule's fields, or ``{max_norm: 3}``, or the bare name of a named rule.

    A list, since ``{elastic_net: [1e-5, 1e-4]}`` is two rules. PolicyError for anything else.
    """
    if isinstance(data, str):
        return _named(data, None)
    if isinstance(data, Mapping) and len(data) == 1 and "action" not in data:
        [(name, arguments)] = data.items()
        return _named(name, arguments)
    if isinstance(data, Mapping) and (named := next((key for key in data if key in NAMED), None)):
        raise FieldError(f"{named!r} is a named rule, which holds its arguments: {{{named}: {{params: ..., ...}}}}.", named)
    return [Rule.from_data(data)]


def _named(name: str, arguments: Any) -> list[Rule]:
    if name not in NAMED:
        raise FieldError(f"unknown named rule {name!r}.{nearest(name, NAMED)} (A rule by its fields needs an action.)", name)
    make = NAMED[name]
    signature = inspect.signature(make)
    names = [*(p.name for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD), *Common.__annotations__]
    if isinstance(arguments, Mapping) and len(arguments) == 1 and set(arguments) <= set(radii.FORMS) - set(names):
        arguments = [arguments]  # a schedule or a radius as the only argument: {max_norm: {linear: [3, 1, 100]}}
    for argument in arguments if isinstance(arguments, Mapping) else ():
        if argument not in names:
            raise FieldError(f"{name} has no argument {argument!r}.{nearest(argument, names)}", argument)
    data = schedules.arguments_by_name(names, arguments, name)
    written = inspect.get_annotations(make)
    fields = {key: key if key in Rule.__dataclass_fields__ else _FIELD_OF.get(written.get(key, ""), key) for key in data}
    given = {key: read_field(fields[key], value) for key, value in data.items()}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise PolicyError(f"{name}: {error}. It takes {', '.join(names)}.") from error
    made = make(**given)
    return [made] if isinstance(made, Rule) else made


# Arguments of named rules that are no fields, by their annotations: each is read like the field that takes the same kind of value.
_FIELD_OF = {"RadiusLike": "radius", "Varying": "strength", "Selector | None": "params", "NormLike": "norm"}
