"""Selectors' regular expressions: what ``re`` finds is found, and none of them runs without end."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import PolicyError
from normwise.parameters.regex import LONGEST, finder
from normwise.policy import yaml_form

NAMES = [
    "", "a", "aaab", "layers.0.self_attn.q_proj.weight", "blocks.11.mlp.fc1.bias", "Head.Weight", "a\nb", "\n", "ab\n", "é.ß", "x_1.y-2",
    "module.encoder.layer.10.attention.self.query.weight",
]  # fmt: skip
PATTERNS = [
    "", "a", "^a", "a$", r"a\Z", r"\Aa", "^$", "a*", "a+b", "a+?b", "a{2}b", "a{3,}", "a{0,2}b", "(a|ab)(c|bcd)*", r"layers\.\d+\.",
    "q|k|v",
    r"(q|k|v)_proj\.weight$", r"\bhead\b", r"(?i)head\.weight", "(?i:H)ead", "[^a-z]", "[a-c]{3}", r"[\w.]+bias", r"\.\d{2}\.", "(?s).b$",
    "a.b", "(?s)a.b", "(?m)^b", "(?m)a$", r"(?=.*mlp)(?=.*bias)", "(?!a)", "^(?!.*bias).*weight", r"(?<=fc)1", r"(?<!fc)\d", "(?!)", "(?:)",
    "(a*)*b", "(a|a)*b", "(a+)+$", "x*y*z*", r"\d+|\W", r"(?x) a  b # comment", r"[]a]", r"[^]]", r"\x61", r"é", r"\S\s?\S",
    "(a{2}){1,2}b", "(?i)[A-C]+",
    r"\Bayers", "(?a:\\w)", r"(?P<n>a)b", ".{5,7}$", "(|a)+b", "(?=(a|b)*)a", "(?<=^a)a", r"(?<=\n)b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_finds_what_re_finds(pattern: str) -> None:
    for name in NAMES:
        assert finder(pattern)(name) == (re.search(pattern, name) is not None), (pattern, name)


def a_pattern(rnd: random.Random, depth: int) -> str:
    if depth == 0 or rnd.random() < 0.3:
        return rnd.choice(
            ["a", "b", "A", ".", "[ab]", "[^a]", r"\w", r"\b", "^", "$", r"\.", "", "[a-b.]", r"\d", "(?i:a)", r"\Z", "(?s:.)", r"\B"]
        )
    kind, inner = rnd.randrange(7), a_pattern(rnd, depth - 1)
    if kind == 0:
        return inner + a_pattern(rnd, depth - 1)
    if kind == 1:
        return f"(?:{inner}|{a_pattern(rnd, depth - 1)})"
    if kind == 2:
        return f"(?:{inner}){rnd.choice(['*', '+', '?', '*?', '{2}', '{0,3}', '{1,}', '{2,3}?'])}"
    if kind == 3:
        return f"({rnd.choice(['?=', '?!'])}{inner})"
    if kind == 4:
        return f"({rnd.choice(['?<=', '?<!'])}{rnd.choice(['a', 'b', '.', 'ab', '[ab].', '^', ''])}){inner}"
    return f"({inner})" + a_pattern(rnd, depth - 1)


@pytest.mark.parametrize("count", [400, pytest.param(40_000, marks=pytest.mark.long)])
def test_random_patterns_find_what_re_finds(count: int, coverage: Callable[..., None]) -> None:
    rnd, found = random.Random(count), {True: 0, False: 0}
    for _ in range(count):
        pattern = a_pattern(rnd, 4)
        flags = rnd.choice([0, 0, re.IGNORECASE, re.MULTILINE, re.DOTALL])
        try:
            ours = finder(pattern, flags)
        except PolicyError as error:
            with pytest.raises(re.error):
                re.compile(pattern, flags)
            assert "no regular expression" in str(error)
            continue
        for _ in range(4):
            # not empty: there versions of Python disagree about \B
            name = "".join(rnd.choice("aabbA.\n1") for _ in range(rnd.randint(1, 8)))
            wanted = re.search(pattern, name, flags) is not None
            assert ours(name) == wanted, (pattern, name, flags)
            found[wanted] += 1
    assert min(found.values()) > count / 4
    for held, times in found.items():
        for _ in range(times):
            coverage("regular expressions against re", "random", "found" if held else "not found")


ENDLESS = [
    r"(a+)+$", r"(a*)*$", r"(a|a)*$", r"(a|aa)+$", r"(.*a){20}$", r"(a?){60}a{60}$", r"((a*)*)*$", r"(\w+\.?)+!", "a*" * 60 + "!",
    r"(?=(a+)+$)!",
    ".*" * 200 + "!", r"(([a-z])+.)+[A-Z]([a-z])+$", "(" * 60 + "a*" + ")*" * 60 + "!", r"(a{1,500}){1,500}!", r"((a{0,99}){0,99}){0,99}!",
    "(?i)" + r"[\x00-\uffff]" * 60 + "!", r"(?=.*a)" * 100 + "!", r"(?=(?=(?=(a*)*b)*c)*d)*!", r"(?:(?=a*)a*)*!",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_none_runs_without_end(pattern: str) -> None:
    """Most of these take longer than a life in ``re``; here each is answered, or refused in one sentence, within a second or two."""
    begun = time.monotonic()
    for name in ("a" * 60, "a" * 200 + ".weight", "module." * 30 + "weight"):
        try:
            assert not finder(pattern)(name) or pattern.endswith("$")
        except PolicyError as error:
            assert "steps on the name" in str(error) and len(str(error)) < 400, error
    assert time.monotonic() - begun < 5


def test_attach_and_a_policy_file_are_not_hung_by_a_pattern(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("a" * 60, nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (tmp_path / "policy.yaml").write_text("- {max_norm: {radius: 3, params: 're:^(a+)+!'}}\n")
    policy = nw.Policy.load(tmp_path / "policy.yaml")
    begun = time.monotonic()
    with pytest.raises(PolicyError, match="matches no parameter"):
        nw.attach(model, optimizer, policy)
    with pytest.raises(PolicyError, match="matches no parameter"):
        nw.attach(model, optimizer, [nw.max_norm(3.0, params=re.compile("(a|a)*!"))])
    assert time.monotonic() - begun < 5
    assert nw.attach(model, optimizer, [nw.max_norm(3.0, params="re:^(a+)+.weight$")]).verify() is not None


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(?P<x>a)(?P=x)", r"(a)?(?(1)b|c)", "(?>a+)b", "a++b"])
def test_what_refers_back_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(PolicyError, match="refers back") as caught:
        finder(pattern)
    assert "lambda entry" in str(caught.value)


def test_too_long_selectors_are_refused() -> None:
    for selector in ("re:" + "a" * (LONGEST + 1), "a" * (LONGEST + 1), "*" * (LONGEST + 1)):
        with pytest.raises(PolicyError, match=f"{LONGEST} at most are read") as caught:
            nw.max_norm(3.0, params=selector)
        assert len(str(caught.value)) < 400
    for selector in ("re:" + "a" * (LONGEST - 3), "a" * LONGEST):
        nw.max_norm(3.0, params=selector)


# ------------------------------------------------------------------------------------------------------- large policies


HEAVY = {
    "four megabytes of rules": "- {max_norm: 3}\n" * 260_000, "a comment": "#" + "x" * (4 << 20), "spaces": " " * (4 << 20),
    "deep lists": "[" * 200_000, "deep maps": "{a: " * 50_000, "wide lists in deep ones": "[" * 20 + "a, " * 80_000,
    "many rules": "- {max_norm: 3}\n" * 16_000, "one long word": "- " + "x" * 250_000, "many lines": "\n" * 250_000,
    "many keys": "- {" + ", ".join(f"a{k}: 1" for k in range(25_000)) + "}", "many documents": "---\n" * 60_000,
    "aliases": "a: &a [x, x]\n" + "".join(f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 9)}]\n" for k in range(20)),
    "one number": "- {max_norm: " + "9" * 240_000 + "}", "a long pattern": "- {max_norm: {radius: 3, params: 're:" + "a*" * 120_000 + "'}}",
    "many patterns": "- {max_norm: {radius: 3, params: [" + ", ".join(["'re:(?i)" + r"[\x00-\uffff]" * 60 + "'"] * 250) + "]}}",
    "deep blocks": "".join(" " * k + "-\n" for k in range(700)), "quoted": "- '" + "''" * 120_000 + "'",
}  # fmt: skip


@pytest.mark.parametrize("kind", HEAVY)
def test_a_large_policy_is_read_or_refused_soon(kind: str) -> None:
    begun = time.monotonic()
    try:
        nw.Policy.from_yaml(HEAVY[kind])
    except PolicyError as error:
        assert len(str(error)) < 4100
    assert time.monotonic() - begun < 6, f"{time.monotonic() - begun:.1f} s"


def test_the_size_of_a_policy_is_checked_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*given: object, **named: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(yaml_form, "_compose_nodes", parse)
    large = "- {max_norm: 3}\n" * (yaml_form.MOST_BYTES // 16 + 1)
    with pytest.raises(PolicyError, match=f"{yaml_form.MOST_BYTES} bytes at most"):
        nw.Policy.from_yaml(large)
    (tmp_path / "policy.yaml").write_text(large)
    with pytest.raises(PolicyError, match=f"{yaml_form.MOST_BYTES} bytes at most"):
        nw.Policy.load(tmp_path / "policy.yaml")
    with (tmp_path / "hole.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PolicyError, match=f"{yaml_form.MOST_BYTES} bytes at most"):
        nw.Policy.load(tmp_path / "hole.yaml")


def test_a_policy_as_large_as_one_may_be_is_attached_soon() -> None:
    """Rules that a file may hold cost their share at attach too."""
    count = yaml_form.MOST_RULES
    with pytest.raises(PolicyError, match=f"{count} rules at most"):
        nw.Policy.from_yaml("- {max_norm: 3}\n" * (count + 1))
    policy = nw.Policy.from_yaml("".join("- {unit_norm: {radius: 3, params: '*.weight'}}\n" for _ in range(count)))
    assert len(policy.rules) == count
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    begun = time.monotonic()
    nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), policy)
    assert time.monotonic() - begun < 15
