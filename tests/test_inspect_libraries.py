"""``normwise inspect`` on what the libraries themselves write: their checkpoints give the figures of the model that was in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import normwise as nw
from normwise import cli
from trainer_cases import gpt2, trainer

pytestmark = pytest.mark.filterwarnings("ignore")    # of the libraries
transformers = pytest.importorskip("transformers", reason="needs transformers")


def same(found: nw.inspection.Inspection, model: nn.Module) -> None:
    """Every parameter is there, with its norm and its largest singular value."""
    records = {record["name"]: record for record in found.tensors}
    for name, p in model.named_parameters():
        w = p.detach().double()
        assert records[name]["l2"] == pytest.approx(float(w.norm()), rel=1e-6), name
        if w.ndim == 2:
            assert records[name]["sigma"] == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-6), name


@pytest.mark.long
def test_a_run_of_transformers_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    run = trainer(tmp_path / "run", max_steps=4, save_steps=2)
    run.train()
    gpt2().save_pretrained(tmp_path / "start")
    asked = ["inspect", str(tmp_path / "run"), "--against", str(tmp_path / "start"), "--config", str(tmp_path / "start")]
    assert cli.main([*asked, "--json", str(tmp_path / "o.json")]) == 0
    found = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert "checkpoint-4 is the last of 2 checkpoints in the folder" in found["notes"] and not found["guessed"]
    same(nw.inspect(tmp_path / "run"), run.model)
    start = dict(gpt2().named_parameters())
    moved = math.sqrt(sum(float((p - start[name]).double().square().sum()) for name, p in run.model.named_parameters()))
    assert found["total"]["change"]["l2"] == pytest.approx(moved, rel=1e-5) and moved > 0


@pytest.mark.long
def test_a_run_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs Lightning")

    class Module(lightning.LightningModule):    # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

        def training_step(self, batch: Any) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run, model = lightning.Trainer(max_steps=3, default_root_dir=tmp_path / "run", **quiet), Module()
    run.fit(model, torch.utils.data.DataLoader(torch.randn(12, 6), batch_size=4))
    found = nw.inspect(tmp_path / "run")
    same(found, model)
    assert "left out" in str(found) and "optimizer_states" in str(found)


@pytest.mark.parametrize("merged", [{}, {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"mlp.c_fc": 2}}], ids=["plain", "patterns"])
def test_an_adapter_of_peft_is_what_merging_adds(tmp_path: Path, merged: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    usual = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": False}
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(**(usual | merged)))
    model.save_pretrained(tmp_path / "adapter")
    found = {record["name"]: record for record in nw.inspect(tmp_path / "adapter", tmp_path / "base").tensors}
    start = dict(base.named_parameters())
    changed = {name: p - start[name] for name, p in model.merge_and_unload().named_parameters() if not torch.equal(p, start[name])}
    assert len(changed) == len(found) == 4
    for name, difference in changed.items():
        d, w0, record = difference.detach().double(), start[name].detach().double(), found[name]
        assert record["l2"] == pytest.approx(float(d.norm()), rel=1e-5)
        assert record["sigma"] == pytest.approx(float(torch.linalg.matrix_norm(d, 2)), rel=1e-5)
        assert record["change"]["relative"] == pytest.approx(float(d.norm() / w0.norm()), rel=1e-5)
        assert record["rank"] == (2 if merged and "c_fc" in name else 4)


def test_a_distributed_checkpoint_of_a_training_state(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=tmp_path / "step-1", no_dist=True)
    found = nw.inspect(tmp_path / "step-1")
    same(found, model)
    assert "optimizer" in " ".join(found.results["notes"])
