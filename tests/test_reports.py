"""Reports: each prints as a table and gives its numbers as one flat dict; norms, radii and zeros are what float64 says they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.prune import Report
from normwise.reports import Loggable, table, unique

DOUBLE = {"dtype": torch.float64}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4, **DOUBLE), nn.Tanh(), nn.Linear(4, 3, **DOUBLE))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for o in optimizers:
        o.zero_grad()
    model(torch.randn(8, 5, **DOUBLE)).square().sum().backward()
    for o in optimizers:
        o.step()


def reports() -> list[Loggable]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = nw.Policy([nw.max_norm(0.3, name="cap"), nw.autoclip(50), nw.max_norm(0.5, "0.*"), nw.l1_prox(0.5)])
    control = nw.attach(model, optimizer, policy, log=3)
    step(model, optimizer)
    muon = nw.optim.Muon(net())
    found = [control.norms(history=True, largest=True), control.verify(), control.receipt(), control.radii(), control.zeros()]
    shrunk = Report({"conv": (8, 6)}, {"conv": (1, 2)}, {}, (100, 80), 1e-9)
    return [*found, policy.explain(net()), muon.routing, muon.receipt(), shrunk]


def test_every_report_prints_and_gives_numbers_to_loggers():
    kinds = set()
    for report in reports():
        kinds.add(type(report))
        assert str(report).strip() and "object at" not in str(report) and max(map(len, str(report).splitlines())) <= 140
        flat = report.flat()
        assert flat and all(type(k) is str and type(v) is float for k, v in flat.items()), type(report)
        assert all(k.startswith(report.prefix) for k in flat) and report.prefix.endswith("/")
        assert list(report.flat("mine/")) == ["mine/" + k.removeprefix(report.prefix) for k in flat]
    assert len(kinds) == 9


def test_norms_print_as_a_table_with_the_largest_unit():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    control = nw.attach(model, optimizer, [nw.max_norm(3.0)])
    step(model, optimizer)
    report = control.norms(largest=True)
    units = model[0].weight.detach().norm(dim=1)
    assert report.largest["0.weight"] == (pytest.approx(float(units.max()), rel=1e-12), int(units.argmax()))
    assert set(report.largest) == {"0.weight", "2.weight"} and control.norms().largest == {}
    assert report.flat()["norm/largest/0.weight"] == pytest.approx(float(units.max()), rel=1e-12)
    lines = str(report).splitlines()
    assert lines[0].split() == ["L2", "norm", "weight", "grad", "largest", "unit"]
    assert [line.split()[0] for line in lines[1:]] == ["all", "role", "role", "role", "0.weight", "0.bias", "2.weight", "2.bias"]
    assert f"{float(units.max()):.4g} [{int(units.argmax())}]" in lines[5]


def test_the_history_has_the_totals_of_the_last_steps_of_all_optimizers():
    model = net()
    parts = [torch.optim.SGD(model[0].parameters(), 0.01), torch.optim.SGD(model[2].parameters(), 0.01)]
    control = nw.attach(model, parts, [nw.max_norm(3.0)], log=3)
    by_hand = []
    for seed in range(5):
        step(model, *parts, seed=seed)
        by_hand.append(float(torch.cat([p.detach().flatten() for p in model.parameters()]).norm()))
    report = control.norms(history=True)
    assert report.history["weight"] == pytest.approx(by_hand[-3:], rel=1e-12)
    assert set(report.history) == {"weight", "weight_before", "grad", "grad_before", "update"} and "weight, last 3 steps: " in str(report)
    assert control.norms().history == {}


@pytest.mark.parametrize("log", [False, True])
def test_a_history_that_nobody_recorded_is_an_error(log):
    model = net()
    with pytest.raises(nw.PolicyError, match="attach with log=1000 to keep those of the last 1000 steps"):
        nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), [nw.max_norm(3.0)], log=log).norms(history=True)


@pytest.mark.parametrize("log", [-1, 1.5, "yes"])
def test_log_is_a_flag_or_a_number_of_steps(log):
    model = net()
    with pytest.raises(nw.PolicyError, match="log must be True, False, or how many steps to keep the norms of"):
        nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), [nw.max_norm(3.0)], log=log)


def test_radii_are_those_that_hold_now():
    model = net()
    first = model[0].weight.detach().norm(dim=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rules = [
        nw.max_norm(nw.schedules.linear(2.0, 1.0, 4), "2.*", name="falling"), nw.unit_norm("0.5*init", "0.*", name="sphere"),
        nw.autoclip(50, name="clip"), nw.zclip(warmup=2, name="spikes"), nw.agc(name="agc"), nw.l1_prox(0.1),
    ]  # fmt: skip
    control = nw.attach(model, optimizer, rules, log=True)
    assert "no step has been seen yet" in control.radii().unknown["clip"]
    norms = []
    for seed in range(3):
        step(model, optimizer, seed=seed)
        norms.append(float(control.norms().total["grad_before"]))
    radii = control.radii()
    assert radii.of["falling"]["2.weight"] == (1.5, 1.5), "the radius of the step that was done last"
    assert radii.of["sphere"]["0.weight"] == pytest.approx((float(first.min()) / 2, float(first.max()) / 2), rel=1e-12)
    assert radii.of["clip"].keys() == {"all together"} and radii.of["clip"]["all together"][1] == pytest.approx(
        sorted(norms)[1], rel=1e-12)
    assert radii.unknown.keys() == {"agc"} and "0.01*weight" in str(radii)
    assert radii.flat()["radius/falling/2.weight"] == 1.5
    assert "l1" not in str(radii), "a prox has no radius"


def test_zeros_are_counted_in_entries_and_units():
    model = net()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2, 0] = 0
    report = nw.attach(model, torch.optim.SGD(model.parameters(), 0.1), [nw.group_lasso(0.1)]).zeros()
    assert report.entries["0.weight"] == 6 / 20 and report.units["0.weight"] == (1, 4) and report.units["2.weight"] == (0, 3)
    assert report.flat()["zeros/0.weight"] == 0.3 and report.flat()["zeros/units/0.weight"] == 0.25
    assert ["0.weight", "30.0%", "1", "of", "4"] in [line.split() for line in str(report).splitlines()]


def test_explain_marks_what_is_frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    table = nw.Policy([nw.max_norm(3.0, optional=True)]).explain(model)
    assert [row.frozen for row in table.rows] == [True, False, False, False]
    assert next(line for line in str(table).splitlines() if "(frozen)" in line).startswith("0.weight (frozen)")
    assert table.flat()["policy/frozen"] == 1.0


def test_a_table_is_aligned_and_equal_labels_are_told_apart():
    assert table(("name", "n"), [("a", "1"), ("long name", "10")], right=(1,)) == "name        n\na           1\nlong name  10"
    assert unique(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
