"""Rules: what is allowed, what is refused and in which words, and what each named rule is made of."""

import copy
import math
import pickle
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from normwise.errors import PolicyError
from normwise.norms import FORMS, L2, NORMS, SETS, Box, Spectral, get_norm
from normwise.parameters.inventory import Inventory
from normwise.parameters.layouts import Layout
from normwise.policy import NAMED, Rule, named
from normwise.policy.actions import ACTIONS
from normwise.policy.radii import Init, Relative
from normwise.policy.rule import ON, PHASES
from normwise.policy.schedules import Linear

PUBLISHED = {name: make for name, make in NAMED.items() if make.__module__ == "normwise.policy.published"}

MATRIX_NORMS = (
    "spectral", "nuclear", "sum_of_units", "max_of_units", "sum_of_inputs", "max_of_inputs", "rms_rms", "one_rms", "rms_inf", "sign",
)  # fmt: skip
# The table of the design page, written out again: action, target, phase.
MEANINGS = {
    ("penalty", "weight"): "penalty", ("weight_decay", "weight"): "decay", ("prox", "weight"): "prox",
    ("clip_norm", "weight"): "weight", ("clip_norm", "grad"): "gradient", ("clip_norm", "update"): "update",
    ("project", "weight"): "weight", ("project", "grad"): "gradient", ("project", "update"): "update",
    ("normalize", "weight"): "weight", ("normalize", "grad"): "gradient", ("normalize", "update"): "update",
    ("lmo", "grad"): "gradient", ("lmo", "update"): "update", ("cpr", "weight"): "cpr", ("qk_clip", "weight"): "qk_clip",
}  # fmt: skip
TARGETS = {name: action.targets for name, action in ACTIONS.items()}
NEEDS = {name: action.needs for name, action in ACTIONS.items()}
PAIRS = [(action, on) for action in TARGETS for on in ON]


def needed(action):
    return {NEEDS[action]: 1.0} if NEEDS[action] else {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc1 = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 3)


def test_the_table_of_meanings_is_complete():
    assert len(PAIRS) == 27 and {a for a, _ in MEANINGS} == set(ACTIONS)
    assert set(MEANINGS.values()) == set(PHASES)


@pytest.mark.parametrize(("action", "on"), PAIRS)
def test_an_action_is_allowed_exactly_where_it_has_a_meaning(action, on):
    if (action, on) in MEANINGS:
        assert Rule(action=action, on=on, **needed(action)).phase == MEANINGS[action, on]
        return
    with pytest.raises(PolicyError, match=f"action '{action}' has no meaning on='{on}'. Allowed for it: {TARGETS[action][0]}"):
        Rule(action=action, on=on, **needed(action))


@pytest.mark.parametrize("action", TARGETS)
def test_the_default_target(action):
    assert Rule(action=action, **needed(action)).on == ("grad" if action == "lmo" else "weight")


@pytest.mark.parametrize("per", ["tensor", "matrix", "unit", "input", "head", "expert", "element", "global"])
@pytest.mark.parametrize("norm", [*NORMS, *FORMS])
def test_norms_and_blocks_that_go_together(norm, per):
    vector_only = per in ("unit", "input", "element", "global") and norm in MATRIX_NORMS
    allowed = not vector_only and (per != "global" or norm in ("l1", "l2", "linf"))
    if allowed:
        assert Rule(action="clip_norm", norm=norm, per=per, radius=1).norm == get_norm(norm)
        return
    with pytest.raises(PolicyError, match=f"per='{per}'"):
        Rule(action="clip_norm", norm=norm, per=per, radius=1)


GOOD = {
    "radius": 2.0, "strength": 0.1, "norm": "l1", "per": "unit", "power": 2, "center": "init", "floor": 0.1,
    "min_radius": 0.5, "rate": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("field", GOOD)
@pytest.mark.parametrize("action", TARGETS)
def test_a_field_that_an_action_would_ignore_is_refused(action, field):
    given = {**needed(action), field: GOOD[field]}
    if field == "floor" and field in ACTIONS[action].uses:
        given["radius"] = "init"
    if (action, field) == ("prox", "power"):
        given["norm"] = "l2"
    if field in ACTIONS[action].uses:
        assert getattr(Rule(action=action, **given), field) is not None
        return
    with pytest.raises(PolicyError, match=f"action '{action}' does not use {field}: leave it out. It uses "):
        Rule(action=action, **given)


@pytest.mark.parametrize("action", [action for action in TARGETS if NEEDS[action]])
def test_a_needed_number_is_asked_for(action):
    with pytest.raises(PolicyError, match=f"action '{action}' needs {NEEDS[action]}="):
        Rule(action=action)


CLIP = {"action": "clip_norm", "radius": 1.0}
WRONG = [
    ({"action": "clip_nrm"}, r"action is 'clip_nrm', which is unknown. Did you mean 'clip_norm'\? Allowed: clip_norm, cpr, lmo"),
    ({"action": None}, "action is None"),
    ({}, "a rule needs an action. Allowed: clip_norm"),
    ({**CLIP, "radus": 1}, r"unknown field 'radus' of a rule. Did you mean 'radius'\?"),
    ({**CLIP, "norm": "spectrl"}, "Did you mean 'spectral'"),
    ({**CLIP, "norm": 2}, "norm is 2, but norm must be a name"),
    ({**CLIP, "norm": "box"}, r"needs its two ends: norm=nw.Box\(low, high\)"),
    ({**CLIP, "per": "units"}, "per is 'units', which is unknown. Did you mean 'unit'"),
    ({**CLIP, "on": "gradient"}, "on is 'gradient', which is unknown. Did you mean 'grad'"),
    ({**CLIP, "radius": 0}, "radius is 0.0, but radius must be a finite number > 0"),
    ({**CLIP, "radius": -1}, "radius is -1.0"),
    ({**CLIP, "radius": math.nan}, "radius is nan"),
    ({**CLIP, "radius": math.inf}, "radius is inf.* To set no bound, leave the rule out"),
    ({**CLIP, "radius": True}, "radius is True"),
    ({**CLIP, "radius": "2*initial"}, r"radius is '2\*initial', but radius must be a number > 0, a schedule, 'init'"),
    ({**CLIP, "radius": Linear(1, 0, 10)}, "end point of linear"),
    ({"action": "penalty", "strength": -0.1}, "strength is -0.1, but strength must be a finite number >= 0"),
    ({"action": "penalty", "strength": "x"}, "strength is 'x', but strength must be a number or a schedule"),
    ({"action": "penalty", "strength": 1, "power": 3}, r"power is 3, but power must be 1 \(the norm\) or 2"),
    ({"action": "penalty", "strength": 1, "power": True}, "power is True"),
    ({"action": "prox", "strength": 1, "power": 2, "norm": "l1"}, "prox with power=2 is defined for norm l2, given 'l1'"),
    ({"action": "penalty", "strength": 1, "norm": "box"}, "needs its two ends"),
    ({"action": "penalty", "strength": 1, "norm": Box(0, 1)}, "is a set, not a norm: use it with action 'project', given 'penalty'"),
    ({**CLIP, "norm": "orthogonal"}, "'orthogonal' is a set, not a norm"),
    ({**CLIP, "action": "project", "norm": Box(0, 1)}, r"norm 'box\(0, 1\)' takes no radius"),
    ({"action": "project", "norm": "non_negative", "per": "unit"}, "is the same for every block: leave per='unit' out"),
    ({"action": "project", "norm": "non_negative", "center": "init"}, "takes no center"),
    ({"action": "project", "norm": "orthogonal", "radius": "init"}, "takes a number or a schedule as its radius, given 'init'"),
    ({"action": "project", "norm": "orthogonal", "per": "unit"}, "is a norm of matrices, and per='unit' has none"),
    ({**CLIP, "every": 0}, "every is 0, but every must be a whole number of steps >= 1"),
    ({**CLIP, "every": 1.5}, "every is 1.5"),
    ({**CLIP, "every": True}, "every is True"),
    ({**CLIP, "start": -1}, "start is -1"),
    ({**CLIP, "start": 5, "stop": 5}, "stop 5 is not after start 5"),
    ({**CLIP, "rate": 0}, "rate is 0.0"),
    ({**CLIP, "rate": 1.5}, r"rate is 1.5, but rate must be in \(0, 1\]"),
    ({**CLIP, "min_radius": 2}, "min_radius 2 is above radius 1"),
    ({**CLIP, "min_radius": -2}, "min_radius is -2.0"),
    ({**CLIP, "min_radius": 0.5, "on": "grad"}, "min_radius has a meaning on='weight' only, but this rule is on='grad'"),
    ({**CLIP, "rate": 0.5, "on": "update"}, "rate has a meaning on='weight' only"),
    ({**CLIP, "center": "init", "on": "grad"}, "center has a meaning on='weight' only"),
    ({**CLIP, "center": "start"}, "center is 'start', but center must be None, 'init', or tensors by parameter name"),
    ({**CLIP, "center": {"a": 1.0}}, "center is"),
    ({**CLIP, "floor": 0.1}, "floor belongs to radius='init'"),
    ({**CLIP, "radius": "init", "floor": 0}, "floor is 0.0"),
    ({**CLIP, "radius": "init", "on": "grad"}, "radius 'init' has a meaning on='weight' only, given on='grad'"),
    ({**CLIP, "name": ""}, "name is '', but name must be a text of one line"),
    ({**CLIP, "name": "two\nlines"}, "name must be a text of one line"),
    ({**CLIP, "name": 3}, "name is 3"),
    ({**CLIP, "name": "x" * 101}, "100 characters at most"),
    ({**CLIP, "radius": Relative(0.1)}, "a relative radius is for on='grad' or on='update'"),
    ({**CLIP, "params": []}, "an empty list of selectors"),
    ({**CLIP, "params": 3}, "3 selects no"),
    ({**CLIP, "params": "role:hiden"}, "Did you mean 'hidden'"),
    ({**CLIP, "exclude": "re:("}, "no regular expression"),
    ({**CLIP, "params": "re:a{99999999999999999999}"}, "no regular expression"),
    ({**CLIP, "layout": "oi"}, "layout is 'oi', but layout must be nw.Layout"),
    ({**CLIP, "optional": "yes"}, "optional is 'yes', but optional must be true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[str(g) for g, _ in WRONG])
def test_what_cannot_mean_anything_is_refused_in_words(given, message):
    with pytest.raises(PolicyError, match=message):
        Rule(**given)


def test_a_rule_holds_one_form_of_each_value():
    assert Rule(action="clip_norm", norm="l2", radius=3) == Rule(action="clip_norm", norm=L2(), radius=3.0, on="weight")
    assert Rule(action="clip_norm", radius="1.5*init").radius == Init(1.5)
    assert Rule(action="project", norm="orthogonal").radius == 1.0
    assert Rule(action="clip_norm", radius=1, params=["a", "b"]).params == ("a", "b")
    assert Rule(action="clip_norm", radius=1) != Rule(action="clip_norm", radius=2)
    assert Rule(action="penalty", strength=0).strength == 0.0


def test_a_rule_is_a_value():
    rule = Rule(action="clip_norm", norm="spectral", per="matrix", radius=Linear(3, 1, 10), params=["a*", "b*"])
    assert hash(rule) == hash(copy.deepcopy(rule)) and copy.deepcopy(rule) == rule == pickle.loads(pickle.dumps(rule))
    assert replace(rule, radius=2).radius == 2.0 and replace(rule, radius=2).norm == Spectral()
    with pytest.raises(AttributeError):
        rule.radius = 3.0
    weights = {"a": torch.ones(3)}
    centred = named.max_norm(1.0, center=weights)
    assert centred == centred and centred.center["a"] is weights["a"] and hash(centred)
    assert repr(named.max_norm(3)) == "Rule(action='clip_norm', per='unit', radius=3.0)"


@pytest.mark.parametrize(
    ("rule", "label"),
    [
        (named.max_norm(3), "clip_norm l2/unit <= 3"),
        (named.clip_grad_norm(1), "clip_norm grad l2/global <= 1"),
        (named.unit_norm(), "normalize l2/unit = 1"),
        (named.min_max_norm(1, 2, 0.5), "clip_norm l2/unit in [1, 2] at rate 0.5"),
        (named.l2_penalty(0.1), "penalty half l2^2/tensor x 0.1"),
        (named.weight_decay(0.01), "weight_decay x 0.01"),
        (named.decay_to_init(0.01), "weight_decay x 0.01 around init"),
        (named.clip_weight_value(-1, 2), "project box(-1, 2)"),
        (named.agc(), "clip_norm grad l2/unit <= 0.01*weight"),
        (Rule(action="lmo", norm="spectral"), "lmo spectral/tensor"),
        (Rule(action="project", norm="orthogonal"), "project orthogonal/tensor = 1"),
        (named.spectral_cap("1.5*init"), "project spectral/matrix <= 1.5*init"),
        (named.max_norm(3, "fc*"), "clip_norm l2/unit <= 3, params=fc*"),
        (named.max_norm(3, ["fc*", nn.Conv2d]), "clip_norm l2/unit <= 3, params=[fc*, Conv2d]"),
        (named.max_norm(3, "fc*", name="trunk"), "trunk"),
        (NAMED["orthogonal"](), "project orthogonal/matrix = 1"),
    ],
)
def test_labels(rule, label):
    assert rule.label() == label


def test_a_rule_acts_within_its_window():
    rule = Rule(action="clip_norm", radius=1, start=3, stop=10, every=3)
    assert [step for step in range(20) if rule.active(step)] == [3, 6, 9]
    assert all(Rule(action="clip_norm", radius=1).active(step) for step in range(5))


# ------------------------------------------------------------------------------------------------------- named rules

PARTS = {
    "l1_penalty": (named.l1_penalty(0.1), Rule(action="penalty", norm="l1", strength=0.1)),
    "l2_penalty": (named.l2_penalty(0.1), Rule(action="penalty", power=2, strength=0.1)),
    "elastic_net": (
        named.elastic_net(0.1, 0.2, "fc*"),
        [Rule(params="fc*", action="penalty", norm="l1", strength=0.1), Rule(params="fc*", action="penalty", power=2, strength=0.2)],
    ),
    "l1_prox": (named.l1_prox(0.1), Rule(action="prox", norm="l1", strength=0.1)),
    "weight_decay": (named.weight_decay(0.1), Rule(action="weight_decay", strength=0.1)),
    "decay_to_init": (named.decay_to_init(0.1), Rule(action="weight_decay", strength=0.1, center="init")),
    "group_lasso": (named.group_lasso(0.1), Rule(action="prox", norm="l2", per="unit", strength=0.1)),
    "nuclear_prox": (named.nuclear_prox(0.1), Rule(action="prox", norm="nuclear", per="matrix", strength=0.1)),
    "max_norm": (named.max_norm(3), Rule(action="clip_norm", per="unit", radius=3)),
    "unit_norm": (named.unit_norm(), Rule(action="normalize", per="unit", radius=1)),
    "min_max_norm": (named.min_max_norm(1, 2, 0.5), Rule(action="clip_norm", per="unit", min_radius=1, radius=2, rate=0.5)),
    "clip_weight_value": (named.clip_weight_value(2), Rule(action="project", norm="linf", radius=2)),
    "clip_weight_norm": (named.clip_weight_norm(2), Rule(action="clip_norm", radius=2)),
    "non_negative": (named.non_negative(), Rule(action="project", norm="non_negative")),
    "l1_ball": (named.l1_ball(2), Rule(action="project", norm="l1", per="unit", radius=2)),
    "spectral_cap": (named.spectral_cap(2), Rule(action="project", norm="spectral", per="matrix", radius=2)),
    "spectral_normalize": (named.spectral_normalize(), Rule(action="normalize", norm="spectral", per="matrix", radius=1)),
    "clip_grad_norm": (named.clip_grad_norm(1), Rule(params="role:all", action="clip_norm", per="global", on="grad", radius=1)),
    "clip_grad_value": (named.clip_grad_value(1), Rule(params="role:all", action="project", norm="linf", on="grad", radius=1)),
    "normalize_grad": (named.normalize_grad(), Rule(action="normalize", on="grad", radius=1)),
    "agc": (
        named.agc(),
        Rule(action="clip_norm", per="unit", on="grad", radius=Relative(0.01, 1e-3), exclude="role:head", optional=True),
    ),
}


def test_every_named_rule_is_here_and_documented():
    assert set(PARTS) == set(NAMED) - set(PUBLISHED), "the published methods are in test_published_rules.py"
    assert all(len(make.__doc__.strip()) > 60 for make in NAMED.values())


@pytest.mark.parametrize("name", PARTS)
def test_a_named_rule_is_its_parts(name):
    given, parts = PARTS[name]
    assert given == parts


def test_a_box_and_no_lower_bound():
    assert named.clip_weight_value(-1, 2).norm == Box(-1.0, 2.0)
    assert named.min_max_norm(0, 2).min_radius is None
    for low, high, message in ((2, 1, "holds nothing"), (math.nan, 1, "holds nothing"), ("a", 1, "two numbers"), (True, 2, "two numbers")):
        with pytest.raises(PolicyError, match=message):
            named.clip_weight_value(low, high)


def test_named_rules_hand_on_the_common_fields():
    common = {"exclude": "fc2*", "every": 2, "start": 1, "stop": 9, "optional": True, "layout": Layout("oi", (8, 16))}
    for make in (named.max_norm, named.l1_prox, named.clip_grad_value, named.agc, named.l2_penalty):
        assert {name: getattr(make(1.0, "fc*", **common), name) for name in common} == common
    with pytest.raises(PolicyError, match="Did you mean 'every'"):
        named.max_norm(3, evry=2)


# The article's objectives: λ/(2m)Σθ² and λ/m Σ|θ| over all parameters; a rule is strength · (½ or 1) · norm^power per block.
@pytest.mark.parametrize(("lam", "m"), [(0.3, 7), (1e-2, 60_000), (5.0, 1)])
def test_the_articles_strengths(lam, m):
    torch.manual_seed(0)
    thetas = [p.detach().double() for p in Net().parameters()]
    for rule, written_out in (
        (named.l2_penalty(lam, samples=m), lam / (2 * m) * sum(float((t**2).sum()) for t in thetas)),
        (named.l1_penalty(lam, samples=m), lam / m * sum(float(t.abs().sum()) for t in thetas)),
    ):
        value = sum(rule.strength * float(rule.norm.value(t.reshape(1, -1))) ** rule.power / rule.power for t in thetas)
        assert value == pytest.approx(written_out, rel=1e-12)
        assert len(rule.targets(Inventory(Net()))) == len(thetas)


def test_samples():
    assert named.l2_penalty(1.0, "fc*", samples=4) == named.l2_penalty(0.25, "fc*")
    assert named.l2_penalty(1.0).params is None
    assert named.elastic_net(1.0, 2.0, samples=4) == [named.l1_penalty(1.0, samples=4), named.l2_penalty(2.0, samples=4)]
    for bad in (0, -1, 2.5, True, "10"):
        with pytest.raises(PolicyError, match="samples must be the number of training samples"):
            named.l1_penalty(1.0, samples=bad)
    with pytest.raises(PolicyError, match="samples needs strength to be a number"):
        named.l1_penalty(Linear(1, 2, 3), samples=5)


# ------------------------------------------------------------------------------------------------------------ targets


def names(rule, model=None):
    return [entry.name for entry in rule.targets(Inventory(model or Net()))]


def test_the_default_is_every_weight_and_no_bias_or_gain():
    assert names(named.max_norm(3)) == ["conv.weight", "fc1.weight", "fc2.weight"]
    assert len(names(named.clip_grad_norm(3))) == 8


def test_agc_leaves_the_head_and_does_not_mind_its_absence():
    assert names(named.agc()) == ["conv.weight", "fc1.weight"]
    assert names(named.agc(), nn.Sequential(nn.Conv2d(1, 2, 3))) == ["0.weight"]
    assert names(named.agc(exclude="conv*")) == ["fc1.weight", "fc2.weight"]
    with pytest.raises(PolicyError, match="all it selects is excluded"):
        names(named.agc(), nn.Sequential(nn.Linear(2, 2)))


def test_a_selector_that_matches_nothing_is_an_error_unless_optional():
    with pytest.raises(PolicyError, match="matches no parameter"):
        names(named.max_norm(3, ["fc1*", "gone*"]))
    assert names(named.max_norm(3, ["fc1.weight", "gone*"], optional=True)) == ["fc1.weight"]
    with pytest.raises(PolicyError, match="matches no parameter"):
        names(named.max_norm(3, ["gone*"], optional=True))


def test_every_field_of_a_rule_is_documented():
    assert all(f"{field.name}:" in Rule.__doc__ or f"{field.name}," in Rule.__doc__ for field in fields(Rule))
    assert set(SETS) == {"box", "non_negative", "orthogonal"}, "a new set needs its place in the tests above"
