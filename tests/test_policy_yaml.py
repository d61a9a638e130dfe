"""Policies as YAML: every named rule round-trips, every mistake is one PolicyError with its line, and nothing else ever gets out."""

import random
import re
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from normwise.errors import PolicyError
from normwise.norms import FORMS, L2, NORMS, Box, NonNegative, Orthogonal
from normwise.parameters.layouts import Layout
from normwise.policy import NAMED, Policy, Rule, named
from normwise.policy.radii import Init, Relative
from normwise.policy.schedules import Constant, Cosine, Linear, Warmup
from normwise.policy.yaml_form import MOST_NODES, plain_scalar

PUBLISHED = {name: make for name, make in NAMED.items() if make.__module__ == "normwise.policy.published"}

EXAMPLES = {
    "l1_penalty": named.l1_penalty(1e-5, samples=7),
    "l2_penalty": named.l2_penalty(Warmup(1e-4, 100), "fc*", center="init"),
    "elastic_net": named.elastic_net(1e-5, 1e-4, exclude=["*.bias", "role:gain"]),
    "l1_prox": named.l1_prox(1e-20, every=5, start=2, stop=100),
    "weight_decay": named.weight_decay(0.1, "re:^fc[12]"),
    "decay_to_init": named.decay_to_init(0.1, ["class:Linear", "conv*"]),
    "group_lasso": named.group_lasso(0.0, per="input"),
    "nuclear_prox": named.nuclear_prox(1 / 3),
    "max_norm": named.max_norm("1.5*init"),
    "unit_norm": named.unit_norm(),
    "min_max_norm": named.min_max_norm(0.5, 2, 0.25),
    "clip_weight_value": named.clip_weight_value(-1, 0.1),
    "clip_weight_norm": named.clip_weight_norm(Linear(3, 1, 1000), norm="l1"),
    "non_negative": named.non_negative(optional=True),
    "l1_ball": named.l1_ball(2),
    "spectral_cap": named.spectral_cap(Init(Cosine(1, 0.5, 10))),
    "spectral_normalize": named.spectral_normalize(),
    "clip_grad_norm": named.clip_grad_norm(Constant(1)),
    "clip_grad_value": named.clip_grad_value(1e300),
    "normalize_grad": named.normalize_grad(per="global"),
    "agc": named.agc(Linear(0.1, 0.01, 5), eps=0.5),
}
MORE = [
    Rule(action="lmo", norm="spectral", per="matrix", on="update"),
    Rule(action="clip_norm", per="head", radius=1, layout=Layout("hoi", (2, 4, 16)), params="odd.name: with, [signs]*"),
    Rule(action="clip_norm", radius="init", floor=1e-3, params=["1e5", "null", "on", "3", "- x", "#no", "'q\"", "Größe*"]),
    Rule(action="project", norm=Box(float("-inf"), 0.0)),
    Rule(action="project", norm=NonNegative(), on="grad"),
    Rule(action="project", norm=Orthogonal(), radius=2.0, per="matrix"),
    Rule(action="normalize", on="update", radius=Relative(1e-3)),
]


def test_every_named_rule_has_an_example():
    assert set(EXAMPLES) == set(NAMED) - set(PUBLISHED) and len(MORE) > 5


@pytest.mark.parametrize("rules", [*EXAMPLES.values(), *MORE], ids=[*EXAMPLES, *(rule.label() for rule in MORE)])
def test_round_trip(rules):
    policy = Policy(rules)
    text = policy.to_yaml()
    assert Policy.from_yaml(text) == policy
    assert isinstance(yaml.safe_load(text), list), "any YAML reader can read it"


@pytest.mark.parametrize("norm", [*NORMS, *FORMS])
def test_every_norm_round_trips_by_its_name(norm):
    policy = Policy(Rule(action="clip_norm", norm=norm, radius=1))
    assert Policy.from_yaml(policy.to_yaml()) == policy and (norm == "l2" or f"norm: {norm}\n" in policy.to_yaml())


def test_all_of_it_at_once_with_roles(tmp_path):
    policy = Policy([*EXAMPLES.values(), *MORE], roles={"*.decoder": "head", "class:Linear": "hidden"})
    assert Policy.from_yaml(policy.to_yaml()) == policy
    policy.save(tmp_path / "policy.yaml")
    assert Policy.load(str(tmp_path / "policy.yaml")) == policy
    assert Policy.from_yaml(Policy([]).to_yaml()) == Policy([])


def test_only_what_differs_from_the_defaults_is_written():
    assert Policy(named.max_norm(3)).to_yaml() == "- action: clip_norm\n  per: unit\n  radius: 3.0\n"
    assert EXAMPLES["agc"].to_data()["radius"] == {
        "relative": {"scale": {"linear": {"start": 0.1, "end": 0.01, "steps": 5}}, "floor": 0.5}
    }


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("- {max_norm: 3}", named.max_norm(3)),
        ("- max_norm: {radius: 3.0, params: 'fc*'}", named.max_norm(3, "fc*")),
        ("- {max_norm: {linear: [3, 1, 100]}}", named.max_norm(Linear(3, 1, 100))),
        ("- {max_norm: {radius: {linear: {start: 3, end: 1, steps: 100}}, every: 2}}", named.max_norm(Linear(3, 1, 100), every=2)),
        ("- {max_norm: 1.5*init}", named.max_norm(Init(1.5))),
        ("- {l1_prox: 1e-5}", named.l1_prox(1e-5)),
        ("- {l2_penalty: {strength: 0.5, samples: 10}}", named.l2_penalty(0.5, samples=10)),
        ("- {clip_weight_value: [-1, 1]}", named.clip_weight_value(-1, 1)),
        ("- {elastic_net: [1e-5, 1e-4]}", named.elastic_net(1e-5, 1e-4)),
        ("- {min_max_norm: {min: 0.5, max: 2}}", named.min_max_norm(0.5, 2)),
        ("- non_negative\n- unit_norm", [named.non_negative(), named.unit_norm()]),
        ("- {non_negative: }\n- {agc: {clipping: 0.02, exclude: null}}", [named.non_negative(), named.agc(0.02, exclude=None)]),
        ("- {spectral_cap: {radius: 1, layout: {axes: eoi, shape: [2, 3, 4]}}}", named.spectral_cap(1, layout=Layout("eoi", (2, 3, 4)))),
        ("- {action: project, norm: {box: [-.inf, 1]}}", Rule(action="project", norm=Box(float("-inf"), 1))),
        ("- {action: project, norm: {box: {low: 0, high: 1}}}", Rule(action="project", norm=Box(0, 1))),
        ("- {action: clip_norm, on: grad, radius: 1e-2}", Rule(action="clip_norm", on="grad", radius=0.01)),
        ('- {"action": "clip_norm", "radius": 3, "norm": "l1"}', Rule(action="clip_norm", radius=3, norm="l1")),
        ("rules:\n- &r {max_norm: 3}\n- *r", [named.max_norm(3)] * 2),
        ("[]", []),
    ],
)
def test_short_forms(text, rules):
    assert Policy.from_yaml(text) == Policy(rules)


WRONG = [
    ("- action: clip_norm\n  per: unit\n  radus: 3", 3, "rule 1: unknown field 'radus' of a rule. Did you mean 'radius'"),
    ("- {max_norm: 3}\n\n- action: clip_nrm\n  radius: 1", 3, "rule 2: action is 'clip_nrm', which is unknown. Did you mean 'clip_norm'"),
    ("- action: clip_norm\n  norm: spectrl\n  radius: 1", 2, "Did you mean 'spectral'"),
    ("- action: clip_norm\n  norm: l2\n  radius: abc", 3, "radius is 'abc', but radius must be a number > 0"),
    ("- action: clip_norm\n  radius: 2020-01-01", 2, "radius is '2020-01-01'"),
    ("- action: clip_norm\n  radius: [1, 2]", 2, r"radius is \[1, 2\]"),
    ("- action: clip_norm\n  radius: .nan", 2, "radius is nan"),
    ("- action: clip_norm\n  radius: .inf", 2, "radius is inf"),
    ("- action: clip_norm\n  radius: 1e999", 2, "radius is inf"),
    (f"- action: clip_norm\n  radius: {'9' * 5000}", 2, "radius is"),
    ("- action: clip_norm\n  radius: true", 2, "radius is True"),
    ("- action: clip_norm\n  radius: -3", 2, "radius is -3.0"),
    ("- action: clip_norm\n  radius: {linaer: [1, 2, 3]}", 2, "Did you mean 'linear'"),
    ("- action: clip_norm\n  radius: {linear: [1, 2]}", 2, "takes start, end, steps"),
    ("- action: clip_norm\n  radius:\n    linear: {start: 1, end: 0, steps: 5}", 2, "end point of linear"),
    ("- action: penalty\n  radius: 3\n  strength: 1", 2, "does not use radius"),
    ("- action: lmo\n  on: weight", 2, "no meaning on='weight'"),
    ("- action: clip_norm\n\n  on: garden\n  radius: 1", 3, "on is 'garden', which is unknown. Did you mean 'grad'"),
    ("- action: project\n  norm: {bax: [1, 2]}", 2, "Did you mean 'box'"),
    ("- action: project\n  norm: {box: [1]}", 2, "needs two numbers"),
    ("- action: project\n  norm: {box: [2, 1]}", 2, "holds nothing"),
    ("- action: clip_norm\n  radius: 1\n  params: role:hiden", 3, "Did you mean 'hidden'"),
    ("- action: clip_norm\n  radius: 1\n  params: {a: 1}", 3, "a selector is {'a': 1}"),
    ("- action: clip_norm\n  radius: 1\n  layout: {axes: xy, shape: [2, 3]}", 3, "letters of 'sehoHik'"),
    ("- action: clip_norm\n  radius: 1\n  layout: {axes: oi, shape: [2, a]}", 3, "needs its axes and its shape"),
    ("- action: clip_norm\n  radius: 1\n  center: {fc: [1, 2]}", 3, "center is"),
    ("- action: clip_norm\n  radius: 1\n  radius: 2", 3, "'radius' stands twice"),
    ("- max_norm:\n    per: unit\n    radus: 3", 3, "max_norm has no argument 'radus'. Did you mean 'radius'"),
    ("- max_norm:\n    per: unit\n    radius: -3", 3, "radius is -3.0"),
    ("- max_nrm: 3", 1, "unknown named rule 'max_nrm'. Did you mean 'max_norm'"),
    ("- max_norm", 1, "missing a required argument: 'radius'"),
    ("- {max_norm: 3, every: 2}", 1, "'max_norm' is a named rule, which holds its arguments"),
    ("- clip_weight_value: [1, 2, x, y, z, 1, 2, 3, 4, 5, 6, 7]", 1, "12 arguments"),
    ("- {l2_penalty: {strength: 1, samples: 1.5}}", 1, "samples is 1.5"),
    ("- 3", 1, "rule 1: a rule is 3, but it must be a mapping"),
    ("- [max_norm]", 1, "but it must be a mapping"),
    ("- {max_norm: {radius: 1, params: *.weight}}", 1, "must be quoted: '\\*.weight'"),
    ("\n- {max_norm: 3", 2, "this is no YAML"),
    ("- a: b: c", 1, "this is no YAML"),
    ("- {? [a] : 1}", 1, "a key is a word"),
    ("- !!python/object:os.system {}", 1, "no use for the tag"),
    ("- {action: clip_norm, radius: !!float 3}", 1, "no use for the tag"),
    ("&a [*a]", 1, "nested too deeply, or repeats itself"),
    ("rules: []\nrols: {}", 2, "unknown key 'rols' of a policy. Did you mean 'roles'"),
    ("rules: {max_norm: 3}", 1, "the rules of a policy are a list"),
    ("roles: {a: head}", 1, "the rules of a policy are a list"),
    ("rules: []\nroles: [head]", 2, "roles are a mapping"),
    ("rules: []\nroles: {a: 1}", 2, "roles are a mapping"),
    ("max_norm", 1, "a policy is a list of rules"),
    ("--- []\n--- []", 2, "this is no YAML"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG, ids=[repr(text)[:60] for text, _, _ in WRONG])
def test_a_mistake_is_told_with_its_line(text, line, message):
    with pytest.raises(PolicyError, match=rf"the policy, line {line}: (?s:.*){message}"):
        Policy.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the policy is empty: write"),
        ("# nothing\n", "the policy is empty"),
        ("rules: []\nroles: {a: heed}", "unknown role 'heed'. Did you mean 'head'"),
        ('- "\\Uffffffff"', "this is no YAML"),
        ("[" * 3000, "this is no YAML"),
        ("\x00", "this is no YAML"),
        (b"- max_norm", "read from YAML text"),
        (None, "read from YAML text"),
        ("a: &a [x, x]\n" + "".join(f"k{i}: &k{i} [*a, *a, *a, *a]\n" for i in range(9)), "unknown key"),
    ],
)
def test_a_mistake_without_a_line(text, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_yaml(text)


def test_aliases_that_explode_are_stopped():
    levels = "".join(f"  x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 10)}]\n" for i in range(8))
    assert MOST_NODES < 10**8
    with pytest.raises(PolicyError, match="repeats itself through an alias"):
        Policy.from_yaml(f"- x0: &x0 [a]\n{levels}")


def test_files_are_named_in_errors(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("- max_norm: 3\n- action: clip_nrm\n")
    with pytest.raises(PolicyError, match=rf"{re.escape(str(broken))}, line 2: rule 2: action"):
        Policy.load(broken)
    for path, message in ((tmp_path / "gone.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(PolicyError, match=f"cannot be read: {message}"):
            Policy.load(path)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="it is no UTF-8 text"):
        Policy.load(broken)
    with pytest.raises(PolicyError, match="cannot be written: No such file"):
        Policy([]).save(tmp_path / "gone" / "policy.yaml")


class Mine(L2):
    """A norm that no name stands for."""


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (named.max_norm(lambda step: 3.0), "function of your own, which cannot be written to YAML"),
        (named.l1_prox(lambda step: 3.0), "function of your own, which cannot be written to YAML"),
        (named.max_norm(1, lambda entry: True), "a predicate cannot be written to YAML"),
        (Rule(action="clip_norm", norm=Mine(), radius=1), r"Mine\(\) cannot be written to YAML"),
        (named.max_norm(1, center={"a": torch.ones(2)}), "a center given as tensors cannot be written"),
    ],
)
def test_what_has_no_yaml_form(rule, message):
    with pytest.raises(PolicyError, match=message):
        Policy(rule).to_yaml()


def test_roles_by_lists_have_no_yaml_form_but_by_class_do():
    with pytest.raises(PolicyError, match="cannot be a key in YAML"):
        Policy([], roles={("a", "b"): "head"}).to_yaml()
    assert "class:torch.nn.modules.linear.Linear: hidden" in Policy([], roles={nn.Linear: "hidden"}).to_yaml()
    assert named.max_norm(1, nn.Linear).to_data()["params"] == "class:torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("3", 3), ("-3.5", -3.5), (".5", 0.5), ("5.", 5.0), ("+1E3", 1000.0), ("-.inf", float("-inf")), ("true", True),
        ("null", None), ("~", None), ("on", "on"), ("yes", "yes"),
        ("1_000", "1_000"), ("0x10", "0x10"), ("1:30", "1:30"), ("1.5*init", "1.5*init"),
    ],
)  # fmt: skip
def test_words_mean_what_yaml_1_2_says(text, value):
    assert plain_scalar(text) == value and type(plain_scalar(text)) is type(value)


def test_without_pyyaml_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from normwise.policy import Policy\nfrom normwise.errors import MissingExtraError\n"
        "try: Policy.from_yaml('[]')\nexcept MissingExtraError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'normwise[yaml]'" in out.stdout


# --------------------------------------------------------------------------------------------------------------- fuzz

ODD = [
    "", "null", "true", "-1", "0", ".nan", "-.inf", "1e400", "9" * 400, "[]", "{}", "[[[]]]", "2020-01-01", "*x", "&x y", "!!set {}",
    "'", '"', "{", "init", "-1*init", "{linear: [1, 2, 3]}", "{linear: {a: 1}}", "{box: [1, 2]}", "role:", "re:(", "re:(?i)x",
    "class:", "\t", ": :", "- -", "? a", "| x", "<<", "\x07", "é", "{init: {scale: {init: 2}}}", "{relative: {scale: init}}",
    "{relative: [1, 2, 3]}", "{axes: oi, shape: [1e9, 1]}", "1:30", "0x1F",
]  # fmt: skip


def mutate(text, rng):
    lines = text.splitlines()
    where = rng.randrange(len(lines))
    key, colon, _ = lines[where].partition(": ")
    odd = rng.choice(ODD)
    kinds = [
        lambda: lines.__setitem__(where, f"{key}{colon or ': '}{odd}"),
        lambda: lines.__setitem__(where, lines[where].replace(rng.choice("abeilnorst:-'"), odd, 1)),
        lambda: lines.insert(where, rng.choice(lines)),
        lambda: lines.pop(where),
        lambda: lines.__setitem__(where, "  " * rng.randrange(3) + lines[where]),
        lambda: lines.__setitem__(where, lines[where][: rng.randrange(len(lines[where]) + 1)] + odd),
    ]
    rng.choice(kinds)()
    return "\n".join(lines)


def test_mutated_policies_are_policies_or_policy_errors():
    rng = random.Random(0)
    texts = [Policy(rules).to_yaml() for rules in [*EXAMPLES.values(), *MORE]]
    texts += ["- {max_norm: 3}\n- {elastic_net: [1e-5, 1e-4]}\n- clip_weight_value: {value: -1, high: 2}\n- agc:\n    eps: 1"]
    valid = refused = 0
    for round_ in range(600):
        text = texts[round_ % len(texts)]
        for _ in range(rng.randint(1, 3)):
            text = mutate(text, rng) or "-"
        try:
            policy = Policy.from_yaml(text)
        except PolicyError as error:
            assert str(error), text
            refused += 1
        else:
            assert Policy.from_yaml(policy.to_yaml()) == policy, text
            valid += 1
    assert valid > 50 and refused > 200, (valid, refused)
