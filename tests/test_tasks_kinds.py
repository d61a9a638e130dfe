"""The eight tasks that came with protocol 2: they learn, their seeds decide them, and the library finds what every parameter is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import DataError
from normwise.experiments.tasks import task as tasks
from normwise.experiments.tasks.data.table import load_table
from normwise.experiments.tasks.load import TASKS, load_task
from normwise.experiments.tasks.models.decoder import GroupedAttention, rotated
from normwise.experiments.tasks.task import HELD_OUT, STEPS, Task
from normwise.experiments.tasks.text import load_text
from normwise.optim.presets import MATRICES, UNDECAYED
from normwise.parameters.inventory import Inventory

NEW = ("plain", "resnet_gn", "vit", "mixer", "tabular", "unet", "gru", "decoder")
DEVELOPMENT = {"cnn", "resnet", "vit", "tabular", "lstm", "gpt"}
F64 = torch.float64


def built(name: str, size: str = "tiny") -> tuple[Task, nn.Module]:
    task = load_task(name, size=size)
    torch.manual_seed(0)
    return task, task.build()


def test_six_tasks_are_held_out_and_no_choice_was_made_on_them() -> None:
    """What was tried lies in one file: there is no held-out task in it, and no seed that a race reports or tunes with."""
    assert set(TASKS) >= DEVELOPMENT | HELD_OUT and {"plain", "resnet_gn", "mixer", "unet", "gru", "decoder"} == HELD_OUT
    lines = (Path(__file__).parents[1] / "docs" / "results" / "tried.runs.jsonl").read_text().splitlines()
    runs = [json.loads(line)["settings"] for line in lines if line]
    names = {run["task"].partition("-")[0] for run in runs if isinstance(run.get("task"), str)}
    assert names and names <= DEVELOPMENT, names - DEVELOPMENT
    assert {2000 <= run["seed"] < 10_000 for run in runs if "seed" in run} == {True}


@pytest.mark.parametrize("name", NEW)
def test_a_tiny_model_learns_and_a_seed_decides_its_batches(name: str) -> None:
    task, model = built(name)
    first, again, other = (task.batches(task.batch, seed) for seed in (0, 0, 1))
    one, same, another = next(first), next(again), next(other)
    assert all(map(torch.equal, one, same)) and not torch.equal(one[0], another[0])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.loss(model, next(first))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:3])
    assert STEPS[name] >= 100


ROLES = {
    "plain": {"conv": 4, "head": 1, "bias": 5}, "resnet_gn": {"conv": 6, "head": 1, "bias": 5, "gain": 4},
    "vit": {"conv": 1, "embedding": 1, "hidden": 12, "head": 1, "gain": 5, "bias": 7},
    "mixer": {"conv": 1, "hidden": 8, "head": 1, "gain": 5, "bias": 15}, "tabular": {"hidden": 3, "head": 1, "gain": 2, "bias": 6},
    "unet": {"conv": 12, "head": 1, "bias": 13}, "gru": {"embedding": 1, "recurrent": 4, "head": 1, "bias": 5},
    "decoder": {"embedding": 1, "hidden": 14, "gain": 5},
}  # fmt: skip
AXES = {
    ("unet", "up_outer.weight"): "i16 o8 k2 k2", ("gru", "gru.weight_hh_l1"): "s3 o32 i32",
    ("decoder", "layers.0.attention.k_proj.weight"): "o16 i32", ("vit", "patches.weight"): "o32 i1 k2 k2",
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_every_parameter_has_its_role_and_every_preset_takes_it_as_meant(name: str) -> None:
    _, model = built(name)
    entries = list(Inventory(model))
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.role] = counts.get(entry.role, 0) + 1
    assert counts == ROLES[name], "none is 'other'"
    assert {key: str(e.layout) for e in entries if (key := (name, e.name)) in AXES} == {k: v for k, v in AXES.items() if k[0] == name}
    role = {e.name: e.role for e in entries}
    for make in (nw.optim.auto, nw.optim.Muon, nw.optim.NorMuon, nw.optim.MuonH, nw.optim.Ridge, nw.optim.Scion):
        optimizer = make(model)
        rows = {n: group for group in optimizer.param_groups for n in group["param_names"]}
        assert set(rows) == set(role), make
        for n, row in rows.items():
            takes_matrices = row["act"] != "none" and row.get("norm") not in ("sign", "rms")
            assert takes_matrices == (role[n] in MATRICES), (make, n)
            assert role[n] not in UNDECAYED or row["weight_decay"] == 0, (make, n)


def test_places_turn_so_that_only_distances_count_and_two_queries_share_a_key() -> None:
    """Su et al. (2021): ⟨R_m q, R_n k⟩ depends on m - n alone. Attention is torch's own with grouped queries."""
    q, k = torch.randn(2, 8, dtype=F64)
    along = lambda x: rotated(x.expand(1, 1, 12, 8).contiguous())[0, 0]  # noqa: E731
    products = along(q) @ along(k).T
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(along(q).norm(dim=1), q.norm().expand(12), rtol=1e-6, atol=0)
    attention, x = GroupedAttention(16, 4, 2).double(), torch.randn(2, 9, 16, dtype=F64)
    split = lambda y: y.unflatten(2, (-1, 4)).transpose(1, 2)  # noqa: E731
    q, k, v = split(attention.q_proj(x)), split(attention.k_proj(x)), split(attention.v_proj(x))
    wanted = nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(x), attention.o_proj(wanted.transpose(1, 2).flatten(2)))


def test_the_decoder_reads_no_later_character_and_has_one_matrix_for_both_ends() -> None:
    _, model = built("decoder")
    assert model.head.weight is model.tokens.weight
    x = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, 9] += 1
    moved = (model(x) - model(changed)).abs().amax((0, 2))
    assert moved[:9].max() == 0 and moved[9:].min() > 0


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_noise_is_scored_as_the_plain_mean_and_is_the_same_in_every_run(part: str) -> None:
    task, model = built("unet")
    pairs = list(task.scored(part))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(pairs, task.scored(part), strict=True))  # type: ignore[arg-type]
    noisy, clean = (torch.cat(of).double() for of in zip(*pairs, strict=True))
    assert float((noisy - clean).std()) == pytest.approx(1.0, abs=0.02) and abs(float((noisy - clean).mean())) < 0.02
    with torch.no_grad():
        error = float((model(noisy.float()).double() - clean).square().mean())
    score = task.evaluate(model, part)  # type: ignore[arg-type]
    assert score.loss == pytest.approx(error, rel=1e-5)
    assert score.accuracy == pytest.approx(max(0.0, 1 - error / float(clean.var(correction=0))), abs=1e-5)
    assert model(torch.zeros(1, 1, 9, 13)).shape == (1, 1, 9, 13), "sides need not be multiples of four"


def test_a_csv_file_is_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns, labels = rng.normal(3, 5, (50, 4)), rng.integers(0, 3, 50) * 2 + 1
    lines = ["a,b,c,d,class", *(",".join(map(repr, map(float, (*row, label)))) for row, label in zip(columns, labels, strict=True))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    data = load_table(tmp_path)
    assert data.key == load_table(tmp_path / "table.csv").key and data.classes == 3
    assert {part: len(y) for part, (_, y) in data.parts.items()} == {"train": 30, "validation": 10, "test": 10}
    x, _ = data.parts["train"]
    assert np.abs(x.mean(0)).max() < 1e-6 and np.abs(x.std(0) - 1).max() < 1e-5
    every = np.concatenate([x for x, _ in data.parts.values()])
    assert len(np.unique(every, axis=0)) == 50, "parts share no row"
    assert load_task("tabular", tmp_path, size="tiny").build()(torch.zeros(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a line of names"), ("a,b\n", "found 0 rows"), ("a,b\n1,2,3\n", "line 2 has 3 columns, expected 2"),
    ("a,b\n1,x\n", "line 2: could not convert"), ("a,b\n1,nan\n", "line 2 has a number that is not finite"),
    ("a,b\n" + "1,0\n" * 9, "two or more classes"), ("a,b\n" + "1,0\n" * 9 + "1,1\n", "found 2 with 1 of the rarest"),
])  # fmt: skip
def test_a_table_that_cannot_be_used_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_table(tmp_path / "bad.csv")


@pytest.mark.parametrize("read", [load_table, load_text])
def test_a_source_that_is_not_one_readable_file_is_one_sentence(tmp_path: Path, read: Callable[[Path], object]) -> None:
    none = r"expected a folder with one \*\.\w+, found none"
    for name, message in (("x" * 5000, "File name too long"), ("none", "found nothing"), (".", none)):
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    (tmp_path / "bad").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(DataError, match="expected UTF-8 text, found the byte 0xff at 6"):
        read(tmp_path / "bad")


@pytest.mark.parametrize("name", ["gpt", "decoder", "lstm", "resnet", "vit"])
def test_half_of_a_task_is_its_network_at_half_of_its_width(name: str) -> None:
    (whole, model), (half, small) = built(name, "standard"), built(name, "half")
    sizes = [sum(p.numel() for p in of.parameters() if p.ndim > 1) for of in (model, small)]
    assert 2.0 < sizes[0] / sizes[1] < 4.3 and whole.key != half.key and whole.batch == half.batch


def test_bf16_is_for_cpus_that_have_it_and_the_key_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        tasks.fast_bf16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        task, model = built("plain", "standard")
        inner: list[torch.dtype] = []
        model.convs[-1].register_forward_hook(lambda *given, seen=inner: seen.append(given[-1].dtype))
        assert ("bf16" in task.key) is has and task.logits(model, next(task.batches(2, 0))[0]).dtype == torch.float32
        assert inner == [torch.bfloat16 if has else torch.float32]
    monkeypatch.undo()
    tasks.fast_bf16.cache_clear()
