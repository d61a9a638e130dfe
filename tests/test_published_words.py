"""The published methods as data: YAML, labels, what is refused and in which words, and the page about them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import normwise as nw
from normwise.policy import NAMED, Policy

PUBLISHED = {name: make for name, make in NAMED.items() if make.__module__ == "normwise.policy.published"}

EXAMPLES = {
    "hyperball": [nw.hyperball(), nw.hyperball("2*init", "fc*", per="unit", floor=0.1),
        nw.hyperball(nw.schedules.cosine(3, 1, 10), start=5)],
    "relative_update": [nw.relative_update(),
        nw.relative_update(nw.schedules.warmup(1.0, 10, 0.1), norm="spectral", per="matrix", floor=1e-3)],
    "radial_brake": [nw.radial_brake(), nw.radial_brake(0, "*.weight", per="unit", every=3)],
    "cpr": [nw.cpr(), nw.cpr(nw.radii.WarmStart(100), mu=0.5), nw.cpr("4*init", exclude="fc1*"), nw.cpr(0.02, per="tensor")],
    "autoclip": [nw.autoclip(), nw.autoclip(90, "fc*", window=100, per="tensor", norm="l1")],
    "zclip": [nw.zclip(), nw.zclip(3, alpha=0.9, warmup=5, start=10)],
    "qk_clip": [
        nw.qk_clip(), nw.qk_clip(nw.schedules.linear(100, 50, 10)), nw.qk_clip(params="*c_attn.*", heads=(3, 8)),
        nw.qk_clip(50, query="*q_proj.*", key=["*k_proj.*"], heads=4), nw.qk_clip(query="*q.*", heads=8, key_heads=2),
    ],
    "orthogonal": [nw.orthogonal(), nw.orthogonal(2.0, "fc*", per="head", every=10)],
    "orthogonal_penalty": [nw.orthogonal_penalty(0.1), nw.orthogonal_penalty(nw.schedules.linear(1, 0, 5), "conv*", per="tensor")],
}  # fmt: skip


def test_the_published_methods_are_named_rules_with_a_source():
    assert set(EXAMPLES) == set(PUBLISHED) and set(PUBLISHED) <= set(NAMED)
    assert all(getattr(nw, name) is make and len(make.__doc__) > 300 for name, make in PUBLISHED.items())


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip_through_yaml_and_a_label(name):
    for rules in EXAMPLES[name]:
        policy = Policy(rules)
        assert Policy.from_yaml(policy.to_yaml()) == policy
        assert all(rule.label().startswith(rule.action) for rule in policy)
        assert hash(policy) == hash(Policy.from_yaml(policy.to_yaml()))


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("- hyperball", nw.hyperball()),
        ("- {hyperball: 2*init}", nw.hyperball("2*init")),
        ("- {relative_update: {scale: {linear: [1, 0.1, 5]}}}", nw.relative_update(nw.schedules.linear(1, 0.1, 5))),
        ("- {radial_brake: 0.2}", nw.radial_brake(0.2)),
        ("- cpr: {kappa: {warm_start: 100}, mu: 0.5}", nw.cpr(nw.radii.WarmStart(100), mu=0.5)),
        ("- {cpr: {inflection: 10}}", nw.cpr(nw.radii.Inflection(10))),
        ("- {zclip: {warmup: 10}}", nw.zclip(warmup=10)),
        ("- {autoclip: 20}", nw.autoclip(20)),
        ("- {qk_clip: {tau: 50, query: '*q.*', key: '*k.*', heads: 4}}", nw.qk_clip(50, query="*q.*", key="*k.*", heads=4)),
        ("- {qk_clip: {params: '*qkv.*', heads: [3, 4]}}", nw.qk_clip(params="*qkv.*", heads=(3, 4))),
        ("- {action: clip_norm, radius: {brake: {keep: 0.2}}}", nw.Rule(action="clip_norm", radius=nw.radii.Brake(0.2))),
    ],
)  # fmt: skip
def test_short_forms(text, rules):
    assert Policy.from_yaml(text) == Policy(rules)


WRONG = [
    (lambda: nw.hyperball("weight"), "radius is 'weight'"),
    (lambda: nw.hyperball(0), "finite number > 0"),
    (lambda: nw.hyperball(2.0, floor=0.1), "floor belongs to radius='init'"),
    (lambda: nw.hyperball(per="global"), r"radius 'lr\*init' has no meaning per='global'. Allowed per: tensor, matrix"),
    (lambda: nw.radii.StepLength("weigth"), "Did you mean 'weight'"),
    (lambda: nw.Rule(action="normalize", radius=nw.radii.StepLength()),
     "no meaning for normalize on='weight'. Allowed: clip_norm on='update'"),
    (lambda: nw.radial_brake(1.5), r"keep of a brake is 1.5, but it must be in \[0, 1\]"),
    (lambda: nw.Rule(action="clip_norm", radius=nw.radii.Brake(), center="init"), "a brake takes no center"),
    (lambda: nw.cpr(nw.radii.Brake()), r"radius 'brake\(0.5\)' has no meaning for cpr"),
    (lambda: nw.cpr(nw.radii.Relative(0.1)), "a relative radius is for"),
    (lambda: nw.cpr(per="element"), "action 'cpr' has no meaning per='element'|has no meaning per='element'"),
    (lambda: nw.cpr(mu=-1), "strength is -1"),
    (lambda: nw.radii.WarmStart(-1), "steps of a warm start is -1"),
    (lambda: nw.radii.Inflection(0), "must be a whole number of steps >= 1"),
    (lambda: nw.autoclip(101), r"percentile is 101, but percentile must be in \[0, 100\]"),
    (lambda: nw.autoclip(per="unit"), "Allowed per: global, tensor"),
    (lambda: nw.zclip(alpha=1.0), r"alpha is 1, but it must be in \[0, 1\)"),
    (lambda: nw.zclip(warmup=1), "warmup is 1"),
    (lambda: nw.qk_clip("init"), "a bound on attention logits"),
    (lambda: nw.qk_clip(query="*q*", heads=4), "needs key= too"),
    (lambda: nw.qk_clip(query="*q*", key="*k*"), "needs heads="),
    (lambda: nw.qk_clip(key="*k*"), "needs query= too"),
    (lambda: nw.qk_clip(query="*q*", heads=6, key_heads=4), "key_heads is 4, but it must divide heads=6"),
    (lambda: nw.qk_clip(params="x", heads=(1, 2, 3)), "heads must be a whole number"),
    (lambda: nw.Rule(action="clip_norm", radius=1, heads=4), "heads has a meaning for per='head' only"),
    (lambda: nw.Rule(action="penalty", norm="orthogonal", per="matrix"), "needs strength"),
    (lambda: nw.Rule(action="prox", norm="orthogonal", strength=1.0, per="matrix"), "is a set, not a norm"),
]


@pytest.mark.parametrize(("make", "says"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_mean_anything_is_refused_in_words(make, says):
    with pytest.raises(nw.PolicyError, match=says):
        make()


def test_the_page_of_these_rules_runs_and_names_them_all():
    text = (Path(__file__).parents[1] / "docs" / "published-methods.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    exec("\n".join(code for kind, code in blocks if kind == "python"), {})
    assert all(len(Policy.from_yaml(code)) == 5 for kind, code in blocks if kind == "yaml")
    assert all(f"`{name}(" in text for name in PUBLISHED)
