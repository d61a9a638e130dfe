"""``normwise bench control``: the code by hand does what the rules do, states are what they are called, figures and bars are as written."""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.bench import control, runner
from normwise.experiments.bench.cells import by_hand, clock, networks, states, whole_step
from normwise.experiments.bench.cells.by_hand import BOTH, CAP, CAP_WITHIN, CLIP, MAX_NORM, RULE_SETS, VALUE
from normwise.experiments.bench.cells.networks import CASES, Case, weights_of
from normwise.experiments.bench.cells.states import ALL, HUGE, NOTHING, ONE, TINY, ZEROS, Memory
from normwise.experiments.framework import timing
from normwise.experiments.framework.figures import ratio_interval
from normwise.experiments.framework.provenance import installed
from normwise.experiments.tasks.models.cnn import CNN
from normwise.norms import native


class Conv1D(nn.Module):
    """As transformers has it: ``(inputs, outputs)``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(24, 8), Conv1D(8, 8)


MODELS = {"mlp": partial(networks.mlp, 3, 8), "cnn": lambda: CNN((1, 8, 8), 10, (4, 6))}


def stepped(model: nn.Module, rules: str, state: str) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Weights and gradients after one step of each way: with the control, and each way by hand."""
    one = RULE_SETS[rules]
    plain, controlled = (torch.optim.SGD(model.parameters(), lr=0.0, fused=True) for _ in range(2))
    found = {}
    with nw.attach(model, controlled, one.rules()) as attached:
        memory = Memory(model, by_hand.acted_on(attached, weights_of(model)), one, state)
        ways = {"control": controlled.step, **{n: partial(control.step_by_hand, memory, plain, *way) for n, way in one.by_hand().items()}}
        for name, step in ways.items():
            memory.put_back()
            step()
            grads = [p.grad.clone() for p in memory.params if p.grad is not None]
            found[name] = [p.detach().clone() for p in memory.params], grads
    return found


@pytest.mark.parametrize("state", [NOTHING, ONE, ALL, ZEROS])
@pytest.mark.parametrize("rules", [MAX_NORM, CLIP, BOTH, VALUE, CAP])
@pytest.mark.parametrize("network", MODELS)
def test_what_is_written_by_hand_does_what_the_rules_do(network: str, rules: str, state: str) -> None:
    torch.manual_seed(0)
    found = stepped(MODELS[network](), rules, state)
    ours = found.pop("control")
    assert found
    for theirs in found.values():
        for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
            assert torch.allclose(a, b, rtol=2e-6, atol=1e-6), (a - b).abs().max()


def test_a_cap_within_a_percent_is_within_a_percent_of_the_one_by_hand() -> None:
    found = stepped(networks.mlp(3, 8), CAP_WITHIN, ALL)
    [theirs] = [found[name] for name in found if name != "control"]
    for a, b in zip(found["control"][0], theirs[0], strict=True):
        assert torch.allclose(a, b, atol=0.02)


@pytest.mark.parametrize("rules", [MAX_NORM, CAP])
def test_units_of_transposed_and_fused_weights_are_the_ones_that_the_rules_bound(rules: str) -> None:
    """c_attn is three matrices side by side: their singular values differ from those of the whole."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    found = stepped(transformers.GPT2LMHeadModel(config), rules, ALL)
    ours = found.pop("control")[0]
    for theirs in found.values():
        assert all(torch.allclose(a, b, rtol=2e-6, atol=1e-6) for a, b in zip(ours, theirs[0], strict=True))
    [attention] = [w for w in weights_of(Fused()) if w.matrices == 3]
    assert [m.shape for m in attention.each_matrix()] == [(8, 8)] * 3 and attention.others == (0,)


# -------------------------------------------------------------------------------------------------------------- states


def start(rules: str, state: str) -> Memory:
    torch.manual_seed(0)
    model = networks.mlp(4, 16)
    one = RULE_SETS[rules]
    return Memory(model, weights_of(model) if one.after else [], one, state)


def violated(memory: Memory, rules: str) -> list[int]:
    """Blocks of each weight beyond the radius, by float64."""
    blocks = {
        MAX_NORM: lambda w: w.norm(dim=1), VALUE: lambda w: w.abs().flatten(), CAP: lambda w: torch.linalg.svdvals(w)[:1],
    }[rules]  # fmt: skip
    return [int((blocks(t.double()) > 1).sum()) for t in memory.start[:4]]


@pytest.mark.parametrize(("rules", "blocks"), [(MAX_NORM, 16), (VALUE, 256), (CAP, 1)])
def test_states_violate_nothing_one_block_and_all(rules: str, blocks: int) -> None:
    assert violated(start(rules, NOTHING), rules) == [0, 0, 0, 0]
    assert violated(start(rules, ONE), rules) == [0, 0, 1, 0]
    assert violated(start(rules, ALL), rules) == [blocks] * 4


def total(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def test_gradients_are_in_the_state_too() -> None:
    assert total(start(CLIP, NOTHING).start) == pytest.approx(0.5) and total(start(CLIP, ALL).start) == pytest.approx(2.0)
    assert total(start(BOTH, ONE).start[4:]) == pytest.approx(0.5), "one unit is violated, not the gradients"
    tiny, huge = start(CLIP, TINY).start, start(CLIP, HUGE).start
    assert all(float(g.square().max()) == 0 < float(g.abs().min()) for g in tiny)
    assert math.isinf(float(torch.cat([g.flatten() for g in huge]).square().sum())) and all(g.isfinite().all() for g in huge)
    zeros = start(BOTH, ZEROS)
    assert all((t.norm(dim=1) == 0).tolist() == [True, False] * 8 for t in zeros.start[:4])
    assert [bool((g == 0).all()) for g in zeros.start[4:]] == [True, False] * 4


def test_what_the_rules_changed_is_put_back_before_the_next_step() -> None:
    memory = start(BOTH, ALL)
    for t in memory.now:
        t.zero_()
    memory.put_back()
    assert all(torch.equal(a, b) for a, b in zip(memory.now, memory.start, strict=True))
    assert {id(p.grad) for p in memory.params} <= {id(t) for t in memory.now}


# ------------------------------------------------------------------------------------------------------ figures and bars


def test_figures_are_differences_of_the_same_round_and_the_faster_way_by_hand() -> None:
    timed = clock.Timed([1.0, 2.0, 3.0], [1.4, 2.2, 3.3], [0.1, 0.1, 0.4], {"slow": [3.0, 4.0, 5.0], "fast": [1.6, 2.5, 3.7]})
    row: Any = timed.row(10.0)
    assert (row["by_hand"], row["rounds"]) == ("fast", 3)
    assert row["added_us"] == pytest.approx(0.3e6) and row["hand_us"] == pytest.approx(0.6e6) and row["floor_us"] == pytest.approx(0.1e6)
    assert row["share"] == pytest.approx(0.03) and row["ratio"] == pytest.approx(0.5) and row["over_floor"] == pytest.approx(3.0)
    assert row["low"] <= row["ratio"] <= row["high"] and row["ways_us"] == pytest.approx({"slow": 2e6, "fast": 0.6e6})


def test_a_way_by_hand_that_cannot_be_told_from_nothing_misses_the_bar() -> None:
    timed = clock.Timed([1.0, 1.0], [1.5, 1.5], [0.1, 0.1], {"none": [1.0, 1.0]})
    row = {"case": "a", **timed.row(10.0), "bar": 1.0, "high_bar": 1.05}
    assert row["ratio"] is None and row["high"] is None
    assert [s.split(":")[1] for s in runner.missed(control, {"rows": [row]})] == [
        " ratio is None, the bar at most 1.", " high is None, the bar at most 1.05.",
    ]  # fmt: skip
    json.dumps(row, allow_nan=False)


def test_a_figure_that_is_no_number_keeps_to_no_bar() -> None:
    row = {"case": "a", "ratio": math.nan, "bar": 1.0, "high": 1.0, "high_bar": 1.05, "over_floor": math.nan, "floor_bar": 1.3}
    assert len(runner.missed(control, {"rows": [row]})) == 2


def test_the_interval_of_a_ratio_covers_it_and_narrows_with_the_rounds() -> None:
    """Known: pairs (2x, x) have the ratio 2 exactly, whatever x; of independent noise the interval gets narrower as 1 over the root."""
    x = torch.rand(40, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    assert ratio_interval([2 * v for v in x], x) == pytest.approx((2.0, 2.0))
    noise = torch.randn(2, 400, generator=torch.Generator().manual_seed(1)).mul(0.1).add(1.0).tolist()
    few, many = ratio_interval(noise[0][:25], noise[1][:25]), ratio_interval(*noise)
    assert few[0] < 1 < few[1] and many[0] < 1.01 and many[1] > 0.99
    assert (many[1] - many[0]) < 0.5 * (few[1] - few[0])
    assert ratio_interval([1.0, 1.0], [0.0, -1.0]) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("case", "rules", "state", "bars"),
    [
        (networks.SMALL, BOTH, ONE, {"bar": 0.8, "high_bar": 1.05}),
        (networks.CNN_CASE, BOTH, NOTHING, {"bar": 0.8, "high_bar": 1.05}),
        (networks.CNN_CASE, CAP, NOTHING, {"bar": 1.0, "high_bar": 1.05}),
        (networks.LARGE, BOTH, ALL, {"bar": 1.0, "high_bar": 1.05, "share_bar": 0.005}),
        (networks.MANY, MAX_NORM, NOTHING, {"bar": 1.0, "high_bar": 1.05, "loop_bar": 0.25}),
        (networks.MANY, BOTH, ALL, {"bar": 1.0, "high_bar": 1.05, "loop_bar": pytest.approx(1 / 3)}),
        (networks.MANY, CLIP, ALL, {"bar": 1.0, "high_bar": 1.05}),
        (networks.WIDE, CLIP, ALL, {"bar": 1.0, "high_bar": 1.05, "floor_bar": 1.3}),
        (networks.WIDE, MAX_NORM, ONE, {"bar": 1.0, "high_bar": 1.05}),
        (networks.GPT2_CASE, VALUE, NOTHING, {"bar": 1.0, "high_bar": 1.05, "floor_bar": 1.3}),
    ],
)
def test_bars_are_the_ones_of_the_docstring(case: str, rules: str, state: str, bars: dict[str, float]) -> None:
    assert control.bars(case, rules, state) == bars
    assert (rules, state) in states.cells_of(case)


def test_the_floor_reads_and_rewrites_as_much_memory_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    names = {clock.READS: "read", clock.REWRITES: "rewrite"}
    monkeypatch.setattr(clock, "fastest", lambda entries, among: lambda x: calls.append((names[among], x.numel())))
    clock.Floor([5, 3], control.passes(BOTH, ONE))()
    clock.Floor([7], control.passes(MAX_NORM, ALL))()
    clock.Floor([2], control.passes(VALUE, ALL))()
    assert calls == [("read", 5), ("read", 3), ("read", 7), ("rewrite", 7), ("rewrite", 2)]


@pytest.fixture
def given_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes as long as it says, whatever else the machine does."""
    monkeypatch.setattr(clock, "seconds", lambda call: call())


def test_the_fastest_call_is_the_fastest(given_seconds: None) -> None:
    clock.fastest.cache_clear()
    calls = tuple(lambda x, taken=taken: taken for taken in (2e-3, 1e-4, 1e-3))
    assert clock.fastest(4, calls) is calls[1]
    clock.fastest.cache_clear()


@pytest.mark.parametrize("call", [*clock.READS, *clock.REWRITES])
def test_the_floors_candidates_read_or_rewrite_everything(call: Any) -> None:
    x = torch.arange(1.0, 9.0)
    version, found = x._version, call(x)
    assert (x._version > version) == (call in clock.REWRITES)
    if call in clock.READS:
        other = x.clone()
        other[-1] = 20.0
        assert float(call(other)) != float(found), "the last entry was not read"


def test_a_burst_puts_back_before_each_step_and_outside_of_the_clock() -> None:
    done: list[str] = []
    taken = clock.burst(lambda: (done.append("back"), time.sleep(5e-3)), lambda: done.append("step"), 3)
    assert done == ["back", "step"] * 3 and taken < 2e-3


def test_on_a_cuda_device_events_around_the_call_tell_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that stands still until asked: the call's work lies between the events, and they count milliseconds."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait for it")

        def elapsed_time(self, other: Event) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.seconds(lambda: done.append("call")) == 0.25
    assert done == ["wait", "event", "call", "event", "wait for it"]


def test_rounds_fill_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "seconds", lambda call: call() and 2.0**-9)
    calls = [lambda: 1.0] * 2
    assert clock.rounds_for(calls, 1000, 0.25) == 128 and clock.rounds_for(calls, 2, 1.0) == 2
    assert clock.rounds_for(calls, 1000, 2.0**-6) == 11, "slow ones take up to three budgets for eleven rounds"
    assert clock.rounds_for(calls, 1000, 2.0**-8) == 6 and clock.rounds_for(calls, 1000, 1e-9) == 5


def test_bursts_are_longer_where_steps_are_short(given_seconds: None) -> None:
    steps = [lambda taken=taken: taken for taken in (1e-5, 2e-3, 0.011)]
    assert [clock.steps_for(steps[: k + 1]) for k in range(3)] == [8, 3, 1]


# -------------------------------------------------------------------------------------------------------- the whole thing


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Two rounds of the two small networks."""
    return control.run(rounds=2, only=[networks.SMALL, networks.CNN_CASE], cell_seconds=0.01)


def test_a_run_has_every_cell_with_its_figures(measured: dict[str, Any]) -> None:
    rows = [row for row in measured["rows"] if "rules" in row]
    assert [(r["case"], r["rules"], r["state"]) for r in rows] == [
        (case, *cell) for case in (networks.SMALL, networks.CNN_CASE) for cell in states.cells_of(case)
    ]
    for row in rows:
        assert {"added_us", "hand_us", "floor_us", "step_us", "share", "ratio", "low", "high", "over_floor", "bar", "high_bar"} <= set(row)
        assert row["rounds"] == 2 and row["step_us"] > 0 and row["floor_us"] > 0
    assert (measured["threads"], measured["rounds"], measured["left_out"]) == (1, 2, [])
    assert {"cpu", "torch", "python", "commit"} <= set(measured["machine"])
    assert measured["kernels"] == (native.library() is not None)
    assert installed("torch", "no-such-package") == {"torch": metadata.version("torch")}
    json.dumps(measured, allow_nan=False)


def test_tables_are_printed_in_80_columns_and_mark_what_misses_its_bar(measured: dict[str, Any]) -> None:
    runner.show(measured, stream := io.StringIO())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("training step takes" in line for line in lines) == 2 and sum("whole training steps" in line for line in lines) == 1
    row = next(dict(r) for r in measured["rows"] if "rules" in r) | {"ratio": 1.2, "high": 1.0, "low": 0.9}
    [[line]] = control.tables({"rows": [row]}).values()
    assert line["ratio"] == "1.20!" and line["95%"] == "0.90-1.00"


def test_the_picture_has_a_row_for_each_rule_and_a_panel_for_each_state(measured: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("altair")
    from normwise.experiments.report import picture

    svg = picture(measured, tmp_path / "bench.svg").read_text(encoding="utf-8")
    assert all(text in svg for text in ("nothing violated", "all violated", f"{networks.CNN_CASE}: clip", "by hand"))
    shown = [row for row in measured["rows"] if row.get("state") in (NOTHING, ALL) and row["rules"] in (MAX_NORM, CLIP, BOTH)]
    assert svg.count('aria-roledescription="circle"') == len(shown) == 12


def test_a_network_whose_package_is_absent_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Case("absent", partial(networks.mlp, 2, 4), partial(networks.vectors, 2, 4), needs="no_such_package")
    monkeypatch.setattr(control, "CASES", (absent,))
    found = control.run(rounds=2, cell_seconds=0.01)
    assert found["rows"] == [] and found["left_out"] == ["absent: no_such_package is not installed"]
    assert replace(absent, needs="", on_cuda=True).there() == torch.cuda.is_available()


def test_every_network_gives_a_loss_and_has_the_weights_that_the_rules_bound() -> None:
    for case in CASES:
        if case.there() and case.name not in networks.AT_FLOOR:
            torch.manual_seed(0)
            model = case.build()
            with nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.0), nw.max_norm(1.0)) as attached:
                weights = weights_of(model)
                assert len(by_hand.acted_on(attached, weights)) == len(weights) == len(attached.engine.rules[0].members)
            assert case.batch()(model).requires_grad


def test_penalties_in_whole_steps_give_equal_gradients() -> None:
    """By the loss and by the control: the same gradient, so that the times compare the same thing."""
    case = Case("small", partial(networks.mlp, 2, 8), partial(networks.vectors, 4, 8))
    steps, loss = whole_step.steps_of(case), case.batch()
    grads = {}
    for name in ("nothing", "penalty in the loss", "nw.l2_penalty"):
        model, optimizer, extra = steps[name]
        whole_step.training_step(model, loss, optimizer, extra)
        grads[name] = [p.grad for p in model.parameters() if p.grad is not None]
    pairs = list(zip(grads["penalty in the loss"], grads["nw.l2_penalty"], grads["nothing"], strict=True))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b, _ in pairs) and not all(torch.equal(b, c) for _, b, c in pairs)


def test_a_parametrized_step_is_the_method_it_is_called() -> None:
    """Largest singular values and, with GeoTorch, the lengths of units are 1 in what the layers use."""
    steps = whole_step.steps_of(Case("small", partial(networks.mlp, 1, 8), partial(networks.vectors, 4, 8)))
    layer: Any = steps["spectral_norm"][0][0]    # type: ignore[index]
    for _ in range(50):
        layer(torch.ones(1, 8))
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, abs=1e-3)
    if "geotorch.sphere" in steps:
        assert torch.allclose(steps["geotorch.sphere"][0][0].weight.norm(dim=1), torch.ones(8))    # type: ignore[index]


def test_rates_of_zero_leave_every_weight_where_it_is() -> None:
    model = networks.mlp(2, 8)
    before = [p.detach().clone() for p in model.parameters()]
    loss = networks.vectors(4, 8)
    assert whole_step.step_seconds(model, loss, 1e-3) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
