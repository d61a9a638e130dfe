"""Broken and odd policies from a seed: as YAML text and as Python objects. Equal seeds give equal policies."""

from __future__ import annotations

import decimal
import fractions
import inspect
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

import normwise as nw
from normwise.norms import FORMS, NORMS, SETS
from normwise.policy import NAMED, Policy, Rule, radii
from normwise.policy.actions import ACTIONS

Data = list[Any]
HUGE = "9" * 400

# ------------------------------------------------------------------------------------------------- valid policies as data

SELECTORS = ["*.weight", "role:matrix", "role:all", "fc.*", "re:fc|conv", "class:Linear", ["conv.weight", "fc.weight"], "role:hidden"]
RADII = [3, 0.5, 1e-3, "init", "1.5*init", {"linear": [3, 1, 10]}, {"cosine": {"start": 2, "end": 1, "steps": 5}}, {"constant": 1}]
TARGETS = {name: action.targets for name, action in ACTIONS.items()}
NEEDS = {name: action.needs for name, action in ACTIONS.items()}
NORM_NAMES = [*NORMS, *FORMS, *SETS]
NAMED_DATA: list[Any] = [
    {"max_norm": 3}, {"max_norm": {"radius": "init", "params": "*.weight"}}, {"l1_penalty": 1e-4}, {"l2_penalty": {"strength": 0.1}},
    {"elastic_net": [1e-5, 1e-4]}, {"weight_decay": 0.1}, {"l1_prox": 0.01}, {"group_lasso": {"strength": 0.1, "per": "input"}},
    {"nuclear_prox": 0.1}, "unit_norm", {"min_max_norm": [0.5, 2]}, {"clip_weight_value": [-1, 1]}, {"clip_weight_norm": 1},
    "non_negative", {"l1_ball": 1}, {"spectral_cap": 1}, {"spectral_cap": {"radius": 1, "tolerance": 0.01}}, "spectral_normalize",
    {"clip_grad_norm": 1}, {"clip_grad_value": 0.5}, "normalize_grad", {"agc": 0.02}, "hyperball", "relative_update", "radial_brake",
    "cpr", {"autoclip": {"window": 50}}, "zclip", {"orthogonal_penalty": 0.1}, "orthogonal", {"decay_to_init": 0.1}, "qk_clip",
]  # fmt: skip


def rule_data(rnd: random.Random) -> Any:
    """A rule that means something nearly always: by its name, or by its fields."""
    if rnd.random() < 0.5:
        return rnd.choice(NAMED_DATA)
    action = rnd.choice(list(TARGETS))
    rule: dict[str, Any] = {"action": action}
    if NEEDS[action]:
        rule[NEEDS[action]] = rnd.choice(RADII) if NEEDS[action] == "radius" else rnd.choice([0.1, 1e-5, 0, {"warmup": [0.1, 5]}])
    for name, values in (
        ("params", SELECTORS), ("norm", ["l2", "l1", "linf", "spectral", "nuclear"]), ("per", ["tensor", "unit", "matrix", "global"]),
        ("on", list(TARGETS[action])), ("every", [1, 2]), ("exclude", ["*.bias"]),
    ):  # fmt: skip
        if rnd.random() < 0.3:
            rule[name] = rnd.choice(values)
    return rule


# ----------------------------------------------------------------------------------------------------- broken as data


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


EXTREME = [1e308, 1e-308, 5e-324, 1e39, 1e-30, 1e-45, 65504, 1, 2, 10**9, 2**63, 10**300, "init", "1e300*init", {"linear": [3, 1, 10**300]}]


def odd_value(rnd: random.Random) -> Any:
    return rnd.choice([
        math.nan, math.inf, -math.inf, -1, 0, -0.0, 1e308, 1e-308, 5e-324, 10**300, -(10**300), 2**63, 1e39, True, False, None, "", " ",
        "~", "init", "-1*init", "0*init", "1e999*init", "nan", "*", "re:(", "re:[", "re:*", "re:" + "(" * 500, "re:(?P<a>.)(?P<a>.)",
        "re:.{99999999999}", "role:", "role:nobody", "class:", "class:Nothing", "[", "[!", "no.such.*", "\x00", "é", "😀", "a" * 5000, [],
        {}, [[]], [None], {"": ""}, [1, 2, 3], {"linear": [1]}, {"linear": [1, 2, 0]}, {"linear": [1, -2, 3]},
        {"linear": [3, 1, 10**300]}, {"warmup": [1, 3]}, {"cosine": {"start": 1}}, {"relative": 0.1}, {"init": -1}, {"init": {"scale": {}}},
        {"quantile": [101, 5]}, {"quantile": [10, 10**12]}, {"quantile": [10, 10**300]}, {"zscore": [0]}, {"brake": 2},
        {"step_length": "init"}, {"step_length": ["weight", -1]}, {"warm_start": 1e9}, {"inflection": 0}, {"box": [1, -1]}, {"box": []},
        {"box": [".nan", 1]}, {"axes": "oi", "shape": [1, 10**9]}, {"axes": "", "shape": []}, {"axes": "oo", "shape": "x"}, deep(30),
        {"a": {"b": {"c": 1}}}, "2020-01-01", "0x10", "1_000", "yes", "lambda: 0", "__import__('os')", "!!python/object:os.system",
        [3, 8], [0, 0], 10**9, "linf", "spectral", "unit", "input", "head", "expert", "element", "grad", "update", "weight",
    ])  # fmt: skip


def spoil(rnd: random.Random, policy: Data) -> Data:
    """One thing of the policy is another."""
    policy = list(policy)
    at = rnd.randrange(len(policy))
    rule = policy[at]
    kind = rnd.randrange(10)
    if not isinstance(rule, dict) or not rule or kind == 0:
        policy[at] = odd_value(rnd)
    elif kind == 1:
        policy.insert(at, rule_data(rnd))
    elif kind == 2:
        policy[at] = {**rule, rnd.choice(["radus", "nrom", "", "1", "action ", "__class__", "max_norm"]): odd_value(rnd)}
    elif kind == 3:
        policy[at] = {k: v for k, v in rule.items() if k != rnd.choice(list(rule))}
    elif kind == 4:
        contrary = [{"unit_norm": 5}, {"max_norm": 0.1}, {"clip_weight_value": [2, 3]}, {"clip_weight_value": [-3, -2]}, "unit_norm"]
        policy += rnd.sample(contrary, 2)
    elif len(rule) == 1 and kind < 8:
        policy[at] = _spoiled_named(rnd, rule)
    else:
        fields = [*rule, "radius", "strength", "params", "exclude", "norm", "per", "on", "heads", "layout", "center", "every", "start",
                  "stop", "floor", "min_radius", "rate", "power", "tolerance", "optional"]  # fmt: skip
        name = rnd.choice(fields)
        policy[at] = {**rule, name: rnd.choice(EXTREME) if rnd.random() < 0.5 else odd_value(rnd)}
    return policy


def _spoiled_named(rnd: random.Random, rule: dict[str, Any]) -> dict[str, Any]:
    [(name, arguments)] = rule.items()
    kind = rnd.randrange(4)
    if kind == 0 or name not in NAMED:
        return {rnd.choice([name + "x", name.upper(), *NAMED]): odd_value(rnd)}
    if kind == 1:
        return {name: [arguments, odd_value(rnd)]}
    if kind == 2:
        return {name: odd_value(rnd)}
    names = [*inspect.signature(NAMED[name]).parameters, "params", "every", "layout", "heads"]
    mapping = arguments if isinstance(arguments, dict) else {names[0]: arguments}
    return {name: {**mapping, rnd.choice(names): odd_value(rnd)}}


# ------------------------------------------------------------------------------------------------------ broken as text

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
TEXTS: list[str] = [
    "", " ", "\n", "---", "...", "--- []\n--- []", "null", "~", "3", "abc", "[", "]", "{", "}", "- ", "-", "[[]]", "{}", "- {}", "- []",
    BOMB, BOMB + "rules: *i", "rules:\n- max_norm: &x [*x]", "&r [*r]", "- &r {max_norm: *r}", "- <<: {max_norm: 3}", "<<: *x",
    "- {max_norm: 3, max_norm: 4}", "- {action: clip_norm, radius: 1, radius: 2}", "rules: []\nrules: []", "roles: {fc: head}\nrules: [",
    "rules: []\nroles: [head]", "rules: []\nroles: {'re:(': head}", "rules: []\nroles: {'re:" + "(" * 3000 + "': head}",
    "rules: []\nroles: {'re:.{99999999999}': head}", "rules: []\nroles: {'no.such': head}", "rules: []\nroles: {'fc.weight': 3}",
    "rules: []\nroles: {? [a] : head}", "rules: 3", "rule: []", "- {? {a: b} : c}", "- {1: 2}", "- {null: 2}", "- {true: 2}",
    "[" * 3000, "- " * 3000, "{a: " * 3000, "- {max_norm: " + "[" * 100 + "]" * 100 + "}", "- {max_norm: " + HUGE + "}",
    "- {max_norm: -" + HUGE + "}", "- {max_norm: 1e" + HUGE + "}", "- {max_norm: 0." + HUGE + "}",
    "- {max_norm: {radius: 1, every: " + HUGE + "}}",
    "- !!python/object/apply:os.system ['true']", "- !!python/name:os.system", "- !!python/module:os", "- !!set {a}", "- !!binary aGk=",
    "- {max_norm: !!python/object:builtins.object {}}", "- {max_norm: !!float 3}", "- {max_norm: !!int '3'}", "- {max_norm: !local 3}",
    "- {max_norm: !<tag:yaml.org,2002:python/none> 3}", "- ! {max_norm: 3}", "- {! max_norm: 3}", "!!omap []", "!!map {rules: []}",
    "!!seq []",
    "%YAML 9.9\n---\n[]", "%TAG ! tag:x,2000:\n---\n- !y {max_norm: 3}", "%NONSENSE\n---\n[]", "\t- a", "- {max_norm:\t3}",
    "- 'abc", '- "\\x"',
    '- "\\U99999999"', '- "\\ud800"', "\x00", "- \x07", "\ufeff[]", "\ufeff- max_norm: 3", "- @x", "- `x`", "*x", "- params: *.weight",
    "- |\n  max_norm", "- >-\n  unit_norm", "- ? max_norm\n  : 3", "- {max_norm: 3}\n- {max_norm", "# only a comment",
    "- max_norm:3", "-max_norm: 3",
    "- {max_norm: 3} # x\n" * 50, "- unit_norm\n" * 25_000, "- {params: [" + "a, " * 25_000 + "]}", "\U0001f600", "- {max_norm: \u0663}",
    "- {max_norm: {radius: 3, params: '\u2028'}}", "[]\n[]", "- max_norm: 3\n  - 4", "- {max_norm: {radius: ${HOME}}}", "{{ 3 }}",
]  # fmt: skip


def mangle(rnd: random.Random, text: str) -> str:
    """The text cut, doubled, with odd characters or lines in it."""
    at, kind = rnd.randrange(len(text) + 1), rnd.randrange(8)
    odd = rnd.choice(["\x00", "\t", "\n", ":", ": ", "- ", "[", "}", "'", '"', "&a ", "*a", "!!python/object:os.system ", "!", "|",
    ">", "%",
                      "#", "\\", "\ud800", "é", "\ufeff", "<<: ", "? ", ",", "---\n", "...\n", "\r", "\x85", "~"])  # fmt: skip
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text + text[at:]
    if kind == 2:
        return text.replace(rnd.choice("-:{}[],' "), odd, rnd.randrange(1, 4))
    if kind == 3:
        lines = text.split("\n")
        rnd.shuffle(lines)
        return "\n".join(lines)
    return text[:at] + odd + text[at + rnd.randrange(2) :]


def yaml_policy(seed: int) -> str:
    """The text of a policy: one in eight from the list of odd texts, the others valid ones broken in up to three places."""
    rnd = random.Random(seed)
    if seed % 8 == 0:
        return TEXTS[seed // 8 % len(TEXTS)]
    policy: Data = [rule_data(rnd) for _ in range(rnd.randrange(1, 4))]
    for _ in range(rnd.choice([0, 0, 1, 1, 1, 2])):
        policy = spoil(rnd, policy)
    root = {"rules": policy, "roles": rnd.choice([{"fc.weight": "head"}, odd_value(rnd), {"fc*": odd_value(rnd)}])}
    whole: Any = root if rnd.random() < 0.15 else policy
    text = yaml.safe_dump(whole, default_flow_style=rnd.choice([None, True, False]), sort_keys=False, allow_unicode=True, width=10**6)
    for _ in range(rnd.choice([0, 0, 0, 0, 0, 0, 1, 2])):
        text = mangle(rnd, text)
    return text


def yaml_bytes(seed: int) -> bytes:
    """The same as a file: now and then in another encoding, or with bytes that no encoding has."""
    rnd = random.Random(seed + 10**6)
    encoding = rnd.choice(["utf-8"] * 6 + ["utf-16", "utf-32", "latin-1"])
    content = yaml_policy(seed).encode(encoding, "replace")
    if rnd.random() < 0.2:
        at = rnd.randrange(len(content) + 1)
        content = content[:at] + rnd.randbytes(rnd.randrange(1, 20)) + content[at:]
    return content


# ---------------------------------------------------------------------------------------------------- objects of Python


def _raises(*_: Any) -> Any:
    raise ZeroDivisionError("of the user's own")


class Mute:
    """An object of which nothing is known."""


def odd_object(rnd: random.Random) -> Any:
    makers: list[Callable[[], Any]] = [
        lambda: odd_value(rnd), Mute, lambda: Mute, lambda: object(), lambda: torch.ones(2), lambda: torch.tensor(2.0),
        lambda: torch.tensor(math.nan), lambda: torch.empty(0), lambda: np.ones(3), lambda: np.float32(2), lambda: np.int64(3),
        lambda: np.nan, lambda: 1j, lambda: b"max_norm", lambda: decimal.Decimal("1.5"), lambda: fractions.Fraction(1, 3), lambda: range(3),
        lambda: {1, 2}, lambda: iter([1]), lambda: (lambda: 0), lambda: (lambda a: a), lambda: (lambda step: 1.0),
        lambda: (lambda step: math.nan),
        lambda: (lambda step: -1.0), lambda: (lambda step: "x"), lambda: _raises, lambda: int, lambda: nn.Linear, lambda: nn.Linear(2, 2),
        lambda: nn.Parameter(torch.ones(2)), lambda: torch.float32, lambda: ..., lambda: NotImplemented, lambda: math, lambda: "x" * 10_000,
        lambda: re.compile("fc"), lambda: re.compile(b"fc"), lambda: nw.Layout("oi", (5, 36)), lambda: {"fc.weight": torch.ones(3, 3)},
        lambda: {"fc.weight": "x"}, dict, lambda: nw.schedules.linear(1, 0.5, 4),
        lambda: nw.schedules.warmup(1, 4), lambda: nw.radii.Relative(0.1),
        lambda: rnd.choice(list(NORMS.values())), lambda: nw.norms.Box(0, 1), lambda: radii.Quantile(10, 5), lambda: radii.Brake(0.5),
        lambda: radii.StepLength(), lambda: radii.WarmStart(2), lambda: nw.max_norm(1), lambda: Policy([]), lambda: [nw.max_norm] * 3,
        lambda: "l2", lambda: "unit", lambda: "clip_norm", lambda: 2, lambda: 1.5, lambda: 1, lambda: "init", lambda: "*.weight",
    ]  # fmt: skip
    return rnd.choice(makers)()


def _a_rule(rnd: random.Random) -> Any:
    given = {name: odd_object(rnd) for name in rnd.sample(
        ["params", "norm", "per", "on", "radius", "strength", "power", "heads", "center", "floor", "min_radius", "tolerance", "rate",
         "every", "start", "stop", "exclude", "layout", "optional", "radus"], rnd.randrange(3))}  # fmt: skip
    action = rnd.choice(list(TARGETS)) if rnd.random() < 0.9 else odd_object(rnd)
    if NEEDS.get(action if isinstance(action, str) else "") and rnd.random() < 0.9:
        given.setdefault(NEEDS[action] or "", rnd.choice([1.0, 0.1, 3]))
    return Rule(action=action, **given)


def _a_named_rule(rnd: random.Random) -> Any:
    make = NAMED[rnd.choice(sorted(NAMED))]
    parameters = list(inspect.signature(make).parameters.values())
    given = {p.name: rnd.choice([1.0, 0.1, 0.5]) for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD] + ["every", "start", "stop", "exclude", "layout", "optional"]
    for name in rnd.sample(names, rnd.randrange(3)):
        given[name] = odd_object(rnd)
    return make(**given)


def _endless() -> Iterator[Any]:
    rule = nw.max_norm(1)
    while True:
        yield rule


def _nested(levels: int) -> Any:
    value: Any = nw.max_norm(1)
    for _ in range(levels):
        value = [value]
    return value


def _looped() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def python_policy(seed: int) -> Any:
    """What is given to ``nw.attach`` as its policy; making it may itself be the error."""
    rnd = random.Random(seed)
    kind = rnd.randrange(12)
    if kind < 5:
        return [_a_rule(rnd) for _ in range(rnd.randrange(1, 3))]
    if kind < 9:
        return [_a_named_rule(rnd) for _ in range(rnd.randrange(1, 3))]
    if kind == 9:
        return Policy([_a_named_rule(rnd)], roles=rnd.choice([odd_object(rnd), {"fc.weight": odd_object(rnd)}, {"re:((": "head"}]))
    if kind == 10:
        return [nw.max_norm(1), odd_object(rnd)]
    return rnd.choice([odd_object, lambda _: _endless(), lambda _: _nested(200), lambda _: _looped(), lambda _: [nw.max_norm(1)] * 3])(rnd)
