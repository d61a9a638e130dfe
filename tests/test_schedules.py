"""Schedules and radii: their values against the formulas written out, what they refuse, and their plain form."""

import copy
import math
import pickle

import pytest

from normwise.errors import PolicyError
from normwise.policy import schedules
from normwise.policy.radii import Init, Relative, from_data, radius
from normwise.policy.schedules import Constant, Cosine, Linear, Warmup, at, label, to_data

STEPS = (0, 1, 3, 7, 10, 11, 1000)
ALL = [Constant(2.5), Linear(1, 0.1, 10), Cosine(3, 1, 10), Warmup(0.5, 10), Warmup(0.5, 10, start=0.1)]


def test_every_schedule_is_tried():
    assert {type(s) for s in ALL} == set(schedules.SCHEDULES.values())


@pytest.mark.parametrize("step", STEPS)
def test_values_equal_the_formulas(step):
    share = min(step, 10) / 10
    assert Constant(2.5)(step) == 2.5
    assert Linear(1, 0.1, 10)(step) == pytest.approx(1 + share * (0.1 - 1), rel=1e-15)
    assert Cosine(3, 1, 10)(step) == pytest.approx(1 + (3 - 1) * (1 + math.cos(math.pi * share)) / 2, rel=1e-15)
    assert Warmup(0.5, 10, 0.1)(step) == pytest.approx(0.1 + share * 0.4, rel=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_ends_are_exact_and_bound_every_value(schedule):
    first, last = schedule.ends()
    assert schedule(0) == first and schedule(10) == last and schedule(10**9) == last and schedule(-5) == first
    assert all(min(first, last) <= schedule(step) <= max(first, last) for step in range(20))


def test_constructors_are_the_classes():
    assert schedules.linear(1, 2, 3) == Linear(1.0, 2.0, 3)
    assert schedules.cosine(1, 2, 3) == Cosine(1.0, 2.0, 3)
    assert schedules.warmup(1, 3) == Warmup(1.0, 3, 0.0)
    assert Linear(1, 2, 3) != Cosine(1, 2, 3)


RADII = [Init(), Init(1.5), Init(Linear(1, 2, 3)), Relative(0.01), Relative(Cosine(1, 2, 5), 0.5)]


@pytest.mark.parametrize("value", [*ALL, *RADII], ids=repr)
def test_plain_form_round_trips(value):
    data = to_data(value)
    back = radius(data) if isinstance(data, str) else from_data(data)
    assert back == value
    assert copy.deepcopy(value) == value == pickle.loads(pickle.dumps(value))


def test_plain_form_is_what_a_person_would_write():
    assert to_data(Linear(1, 0.1, 10)) == {"linear": {"start": 1.0, "end": 0.1, "steps": 10}}
    assert from_data({"linear": [1, 0.1, 10]}) == Linear(1, 0.1, 10)
    assert to_data(Init()) == "init" and to_data(Init(1.5)) == "1.5*init"
    assert from_data({"relative": 0.01}) == Relative(0.01, 1e-3)


@pytest.mark.parametrize(("text", "scale"), [("init", 1), ("1.5*init", 1.5), (" 2 * init ", 2), ("1e-2*init", 0.01), (".5*init", 0.5)])
def test_multiples_of_init_are_read(text, scale):
    assert radius(text) == Init(scale)


@pytest.mark.parametrize(
    "bad",
    [0, -1, math.nan, math.inf, -math.inf, 10**400, True, None, "abc", "", "-1*init", "0*init", "1e999*init", "1.2.3*init", "init*2",
     [1], {}, float, b"bytes", 1j, Linear(1, 0, 10), Warmup(1, 10)],
    ids=repr,
)  # fmt: skip
def test_no_radius(bad):
    with pytest.raises(PolicyError, match=r"radius|'init'"):
        radius(bad)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, True, "1", None, [1.0]], ids=repr)
def test_no_strength(bad):
    with pytest.raises(PolicyError, match="strength is"):
        schedules.varying(bad, "strength", zero=True)


def test_a_strength_may_be_zero_and_warm_up_from_it():
    assert schedules.varying(0, "strength", zero=True) == 0.0
    assert schedules.varying(Warmup(1, 10), "strength", zero=True) == Warmup(1, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(math.nan, 1, 10), "linear's start is nan"),
        (lambda: Linear(1, -1, 10), "linear's end is -1.0"),
        (lambda: Cosine(1, 2, 0), "cosine's steps is 0, but cosine's steps must be a whole number of steps >= 1"),
        (lambda: Warmup(1, 2.5), "warmup's steps is 2.5"),
        (lambda: Warmup(1, True), "warmup's steps is True"),
        (lambda: Constant("x"), "constant's value is 'x'"),
        (lambda: Init(0), "multiple of 'init' is 0.0"),
        (lambda: Init(Linear(1, 0, 5)), "end point of linear"),
        (lambda: Relative(-0.1), "scale of a relative radius is -0.1"),
        (lambda: Relative(0.1, math.inf), "floor of a relative radius is inf"),
        (lambda: from_data({"linaer": [1, 2, 3]}), "Did you mean 'linear'"),
        (lambda: from_data({"linear": {"start": 1, "end": 2, "stps": 3}}), "Did you mean 'steps'"),
        (lambda: from_data({"linear": [1, 2, 3, 4]}), "takes at most 3"),
        (lambda: from_data({"linear": [1, 2]}), "takes start, end, steps"),
        (lambda: from_data({"linear": None}), "takes start, end, steps"),
        (lambda: from_data({}), "mapping of 0 keys"),
        (lambda: from_data({"linear": [1, 2, 3], "cosine": [1, 2, 3]}), "mapping of 2 keys"),
        (lambda: to_data(lambda step: 1.0), "cannot be written to YAML"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(PolicyError, match=message):
        make()


def test_any_callable_is_a_schedule_and_is_watched():
    assert at(lambda step: 2.0 * step, 3) == 6.0
    assert at(1.5, 3) == 1.5
    for bad in (math.nan, math.inf, -1.0, None, "x"):
        with pytest.raises(PolicyError, match=r"strength gave .* at step 7"):
            at(lambda step, bad=bad: bad, 7, "strength")


def test_labels_are_short():
    assert label(Linear(1, 0.1, 100)) == "linear(1 -> 0.1 in 100 steps)"
    assert [label(v) for v in (3.0, None, Init(), Init(1.5), Relative(0.01), Constant(2))] == [
        "3", "-", "init", "1.5*init", "0.01*weight", "2",
    ]  # fmt: skip
