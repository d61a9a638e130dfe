"""``normwise bench control``: what rules add to a step, against code by hand and memory's speed.

A cell is a network, a set of rules and a state. In each round of a cell three kinds of optimizer steps take turns, in one process, on
one thread, in alternating order: without control, with it, and without it but with what you would write by hand around it. Before each of
them the weights and gradients that the rules act on are put back into the state, outside the clock. The step is fused SGD with
momentum at a rate of 0: it reads weights and gradients and writes the weights as any step does, and leaves every weight exactly where the
state has it.

- ``added_us``, ``hand_us``: the median over rounds of the step with control, or with code by hand, minus the step without, of the same
  round. Of two ways by hand (``bench.cells.by_hand`` has the code) the faster one counts.
- ``ratio``: added over by hand, with ``low`` and ``high``, the 95% interval of the ratio of medians by a bootstrap over rounds.
- ``floor_us``: what the same memory costs at least, in the same rounds. The memory is what the rules must look at: all gradients for a
  clip, all bounded weights for a bound. It is copied as one flat fp32 buffer of ones each; the floor is the fastest of four calls that read
  it (sum, dot, amax, vector_norm), and where all is violated that plus the fastest of three that rewrite it (``mul_(1.0)``, ``add_(0.0)``,
  ``neg_``), or of entries the rewrite alone. ``over_floor`` is added over floor; what rescales a unit while the cache has it may be below.
- ``step_us``: forward, backward and fused AdamW without control, on the batch in ``bench.cells.networks``, once for each network;
  ``share`` is added over that.

On a CUDA device, where there is one, events tell the time, and bounds, clips and clamps are measured once more with their steps replayed
as CUDA graphs. GPT-2 of 124M is measured there alone, in bf16 on 8 × 1024 tokens.

Bars: no cell is slower than by hand (``ratio`` <= 1, ``high`` <= 1.05); both rules on the two small networks take at most 0.8 of it; bounds
on 200 small matrices a quarter of the loop over tensors with nothing and a third with everything violated (``loop_ratio``); where memory is
what counts, at most 1.3 floors; both rules on GPT-2 of 124M take at most 0.5% of its step.

States: nothing violated, one block, all; for some networks every second unit and gradient zero, gradients of ±1e18 and of ±1e-25, whose
squares are out of fp32's range. A spectral cap within 1% starts from the copies that it keeps, and so looks at no matrix where nothing has
moved, and where all is violated every matrix has grown by a quarter at once, which no training does: ``normwise bench cap`` trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import normwise as nw
from normwise.experiments.bench.cells import whole_step
from normwise.experiments.bench.cells.by_hand import BOTH, CLIP, MAX_NORM, RULE_SETS, VALUE, After, Before, RuleSet, acted_on
from normwise.experiments.bench.cells.clock import CELL_SECONDS, READS, REWRITES, Floor, Timed, burst, captured, rounds_for, steps_for
from normwise.experiments.bench.cells.networks import AT_FLOOR, CASES, CNN_CASE, LARGE, MANY, SMALL, Case, weights_of
from normwise.experiments.bench.cells.states import ALL, NOTHING, Memory, cells_of
from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.pool import on_threads
from normwise.experiments.framework.printing import tell
from normwise.experiments.framework.provenance import installed, machine
from normwise.experiments.framework.timing import device, in_turn
from normwise.norms.native import library

BARS = (Bar("ratio"), Bar("high", "high_bar"), Bar("loop_ratio", "loop_bar"), Bar("over_floor", "floor_bar"), Bar("share", "share_bar"))
GRAPHED = (MAX_NORM, CLIP, BOTH, VALUE)
ROUNDS = 300
Row = dict[str, Any]


def run(rounds: int = ROUNDS, threads: int = 1, only: Sequence[str] | None = None, cell_seconds: float = CELL_SECONDS) -> dict[str, Any]:
    """Every cell; medians in µs.

    rounds: at most so many a cell; fewer where they do not fit into ``cell_seconds``. threads: torch's, while it runs. only: names of
    networks; None for all. A network whose package or device is absent is left out, and the result names it.
    """
    chosen = [case for case in CASES if only is None or case.name in only]
    rows: list[Row] = []
    with on_threads(threads):
        for case in (c for c in chosen if c.there()):
            rows += _of_network(case, rounds, cell_seconds)
        for case in (c for c in chosen if c.name in whole_step.NETWORKS):
            tell(f"{case.name}: whole steps")
            rows += whole_step.rows(case, rounds, 2 * cell_seconds)
    left_out = [f"{case.name}: {case.lacks()}" for case in chosen if not case.there()]
    for line in left_out:
        tell(f"Left out: {line}.")
    where = {"machine": machine() | installed("transformers", "geotorch"), "kernels": library() is not None, "threads": threads}
    return {"bench": "control", **where, "rounds": rounds, "left_out": left_out, "rows": rows}


def _of_network(case: Case, rounds: int, cell_seconds: float) -> list[Row]:
    torch.manual_seed(0)
    on_cuda = device() == "cuda"
    model = case.build().to(device())
    with torch.device(device()):
        batch = case.batch()
    step = whole_step.step_seconds(model, batch, cell_seconds / 2)
    rows = []
    for graphs in (False, True) if on_cuda else (False,):
        for name, state in [(n, s) for n, s in cells_of(case.name) if n in GRAPHED or not graphs]:
            title = f"{case.name}, as a graph" if graphs else case.name
            tell(f"{title}: {name}, {state}")
            timed = cell(model, RULE_SETS[name], state, rounds, cell_seconds, graphs)
            rows.append({"case": title, "rules": name, "state": state, **timed.row(step), **bars(case.name, name, state)})
            if "loop_bar" in rows[-1]:
                rows[-1]["loop_ratio"] = rows[-1]["added_us"] / rows[-1]["ways_us"]["loop"]
    return rows


def bars(case: str, rules: str, state: str) -> dict[str, float]:
    """What a cell must keep to."""
    limit = 0.8 if case in (SMALL, CNN_CASE) and rules == BOTH else 1.0
    many = case == MANY and rules in (MAX_NORM, BOTH) and state in (NOTHING, ALL)
    loop = {"loop_bar": 1 / 4 if state == NOTHING else 1 / 3} if many else {}
    floor = {"floor_bar": 1.3} if case in AT_FLOOR and rules in (MAX_NORM, CLIP, VALUE) and state in (NOTHING, ALL) else {}
    share = {"share_bar": 0.005} if case == LARGE and rules == BOTH else {}
    return {"bar": limit, "high_bar": 1.05, **loop, **floor, **share}


def cell(model: nn.Module, rules: RuleSet, state: str, rounds: int, cell_seconds: float, graphs: bool = False) -> Timed:
    """Times one set of rules in one state, against all ways by hand and the floor. graphs: the steps as CUDA graphs."""
    plain, controlled = (torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True) for _ in range(2))
    with warnings.catch_warnings(), nw.attach(model, controlled, rules.rules()) as control:
        # The norms of gradients that are put back are all the same, which the clip takes for another clip's work.
        warnings.filterwarnings("ignore", "the gradients that rule")
        memory = Memory(model, acted_on(control, weights_of(model)), rules, state)
        steps: list[Callable[[], object]] = [plain.step, controlled.step]
        ways = rules.by_hand()
        steps += [partial(step_by_hand, memory, plain, *way) for way in ways.values()]
        if graphs:
            memory.put_back()
            steps = [captured(step) for step in steps]
        each = steps_for(steps)
        bursts = [partial(burst, memory.put_back, step, each) for step in steps]
        floor = Floor(_entries(memory, rules), passes(rules.name, state))
        bursts.append(partial(burst, floor.put_back, floor, each))
        count = rounds_for(bursts, rounds, cell_seconds)
        without, with_control, *by_hand, least = in_turn(bursts, count, warm_up=0, threads=None, alternate=True)
    return Timed(without, with_control, least, dict(zip(ways, by_hand, strict=True)))


def step_by_hand(memory: Memory, optimizer: torch.optim.Optimizer, before: Before | None, after: After | None) -> None:
    """An optimizer's step with the code by hand around it."""
    if before is not None:
        before(memory.params)
    optimizer.step()
    if after is not None:
        after(memory.weights)


def passes(rules: str, state: str) -> list[tuple[Callable[[torch.Tensor], object], ...]]:
    """What the floor does to each buffer. A clamp needs no look before it changes an entry."""
    if state != ALL:
        return [READS]
    return [REWRITES] if rules == VALUE else [READS, REWRITES]


def _entries(memory: Memory, rules: RuleSet) -> list[int]:
    """Of the buffers that stand for the memory: gradients and weights apart, as the step lies between them."""
    grads = sum(p.numel() for p in memory.params) if rules.gradients else 0
    weights = sum(w.tensor.numel() for w in memory.weights)
    return [n for n in (grads, weights) if n]


# -------------------------------------------------------------------------------------------------------------- tables

_SHORT = {"clip_grad_norm": "clip", "clip_weight_value": "value", "spectral_cap": "cap", "spectral_cap 1%": "cap 1%"}


def tables(measured: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows as tables of 80 columns, by heading: one for each network. A figure that misses its bar has a ! behind it."""
    rows = measured["rows"]
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "rules" in row:
            found.setdefault(f"{row['case']}, in µs; a training step takes {row['step_us']:.0f}", []).append(_line(row))
        elif "way" in row:
            found.setdefault(f"{row['case']}, in µs: whole training steps", []).append(_way(row))
        else:
            found.setdefault("", []).append(row)
    return found


def _line(row: Row) -> Row:
    low, high = (_figure(row[key]) for key in ("low", "high"))
    return {
        "rules": _SHORT.get(row["rules"], row["rules"]), "state": row["state"].removesuffix(" violated").removesuffix(" block"),
        **{name: f"{row[f'{name}_us']:.0f}" for name in ("added", "hand", "floor")},
        "share": f"{100 * row['share']:.1f}%", "ratio": _marked(row, "ratio", "bar"),
        "95%": f"{low}-{high}{_miss(row, 'high', 'high_bar')}", "floors": _marked(row, "over_floor", "floor_bar"),
    }  # fmt: skip


def _way(row: Row) -> Row:
    return {"way": row["way"], "added": f"{row['added_us']:.0f}", "share": f"{100 * row['share']:.1f}%",
            "ratio": _marked(row, "ratio", "bar") if "ratio" in row else "-"}  # fmt: skip


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _marked(row: Row, key: str, bar: str) -> str:
    return _figure(row[key]) + _miss(row, key, bar)


def _miss(row: Row, key: str, bar: str) -> str:
    value = row[key]
    return "!" if bar in row and not (value is not None and value <= row[bar]) else ""
