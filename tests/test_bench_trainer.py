"""``normwise bench trainer``: shares, pairs and memory are what they are called, and the rows have the columns that its bars name."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from normwise.experiments.bench import runner, trainer
from normwise.experiments.bench.cells import networks
from normwise.experiments.bench.cells.states import ALL, NOTHING
from normwise.experiments.tasks.models.gpt import GPT

TINY = partial(GPT, networks.VOCABULARY, 16, 1, 2)


def named(rows: list[dict[str, Any]]) -> set[str]:
    """Columns whose bars some row has."""
    return {bar.value for bar in trainer.BARS for row in rows if bar.value in row and bar.bar in row}


def test_shares_and_pairs_are_computed_as_written() -> None:
    """Steps of 10, 20 and 40 s without control, and 1%, 2% and 3% longer with it; half of that in its hooks."""
    plain = [10.0, 20.0, 40.0]
    taken = [(t * (1 + k / 100), t * k / 200) for k, t in enumerate(plain, 1)]
    row = trainer._trainer_row("rules", plain, taken, 5)
    assert row["paired"] == pytest.approx(0.02) and row["share"] == pytest.approx(0.2 / 20.4)
    assert row["step_ms"] == pytest.approx(4000) and row["control_ms"] == pytest.approx(40)
    assert row["paired_low"] == pytest.approx(0.01) and row["paired_high"] == pytest.approx(0.03)
    assert runner.missed(trainer, {"rows": [row]}) == []
    assert len(runner.missed(trainer, {"rows": [row | {"share": float("nan"), "paired_low": 0.016}]})) == 2


def test_peak_memory_is_counted_in_bytes() -> None:
    x = torch.ones(1 << 18)
    assert trainer.peak_bytes(lambda: x.clone()) == 1 << 20
    assert trainer.peak_bytes(lambda: [x.clone() for _ in range(3)]) == 3 << 20
    assert trainer.peak_bytes(lambda: [len(x.clone()) for _ in range(3)]) == 1 << 20, "what is freed is not added up"
    assert trainer.peak_bytes(lambda: x.mul_(1.0)) < 1 << 10


@pytest.mark.parametrize("state", [NOTHING, ALL])
def test_the_memory_of_a_step_has_its_bar(state: str) -> None:
    row = trainer.peak_memory(partial(networks.mlp, 2, 64), state)
    assert row["peak_bar"] == pytest.approx(8 + 64 * 64 * 4 / 2**20) and 0 <= row["peak_mib"] <= row["peak_bar"]


def test_own_adamw_stands_beside_torchs_and_its_rules_act() -> None:
    row = trainer.own_adamw(TINY, 2)
    assert row["ratio"] == pytest.approx(row["own_ms"] / row["torch_ms"]) and row["low"] <= row["ratio"] <= row["high"]
    assert named([row]) == {"ratio"}


def test_a_slow_preset_is_stopped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "PATIENCE", 0.0)

    def slow() -> nn.Module:
        model = TINY()
        model.register_forward_hook(lambda *_: time.sleep(0.05))
        return model

    rows = trainer.matrix_steps(slow, 100)
    assert [row["optimizer"] for row in rows] == ["Muon", "auto"] and named(rows) == {"step_ms"}
    assert all(row["passes_ms"] >= 50 and row["step_ms"] > 0 for row in rows)
    assert "step_bar" not in rows[0] and rows[1]["step_bar"] == 45.0


@pytest.mark.long    # transformers alone takes five seconds to import
def test_the_trainer_trains_with_control_and_without(capfd: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    config = transformers.GPT2Config(
        vocab_size=networks.VOCABULARY, n_positions=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    rows = trainer.in_trainer(partial(transformers.GPT2LMHeadModel, config), 2, 2)
    assert [row["rules"] for row in rows] == list(trainer.POLICIES)
    assert all(0 < row["share"] < 1 and row["control_ms"] > 0 and row["paired_low"] <= row["paired_high"] for row in rows)
    assert named(rows) == {"share", "paired_low"}
    assert capfd.readouterr().out == "", "the table alone is printed"
    json.dumps(rows, allow_nan=False)


def test_rows_of_absent_packages_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "NEEDS", ("no_such_package",))
    monkeypatch.setattr(trainer, "GPT", lambda *_: TINY())
    monkeypatch.setattr(trainer, "mlp", lambda *_: networks.mlp(2, 8))
    found = trainer.run(rounds=1, steps=1)
    assert found["left_out"] == ["the rows of GPT-2: no_such_package is not installed"]
    assert [row["case"] for row in found["rows"]] == ["GPT, forward, backward and step", *["2 layers, peak memory"] * 2]
