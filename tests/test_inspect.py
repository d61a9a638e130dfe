"""``normwise.inspect`` against formulas written out in float64, on files that every trainer's format is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

import normwise as nw
from normwise.errors import DataError, PolicyError
from normwise.experiments.framework.store import Store
from normwise.inspection import inspector, spectra
from normwise.inspection.measure import angle
from normwise.inspection.stored import InFile
from normwise.inspection.tally import BLOCK_BYTES
from normwise.norms import native
from planted import Payload

pytestmark = pytest.mark.filterwarnings("ignore:.*no-dist:UserWarning", "ignore:.*assuming:UserWarning")
Weights = dict[str, Tensor]


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """A small GPT-2, whose matrices in the blocks are (inputs, outputs), with a convolution, a vector and a number."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    found = {"wte.weight": r(300, 24), "conv.weight": r(8, 4, 3, 3), "up.weight": r(10, 6, 2, 2), "ln.weight": r(24), "scale": r(1)[0]}
    for i in (0, 1, 10):
        found |= {f"h.{i}.attn.c_attn.weight": r(24, 72), f"h.{i}.attn.c_attn.bias": r(72), f"h.{i}.mlp.weight": r(96, 24)}
    found["h.0.mlp.weight"][3] = 0    # a dead unit
    found["wte.weight"][7, 5] = 30    # an outlier
    found["conv.weight"][0, 0] = 0
    return {name: t.to(dtype) for name, t in found.items()}


def by_name(found: nw.inspection.Inspection) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in found.tensors}


def check(record: dict[str, Any], w: Tensor) -> None:
    """Every figure of a matrix or a vector by its definition."""
    x = w.double()
    rms = float(x.square().mean().sqrt())
    assert record["l2"] == pytest.approx(float(x.norm()), rel=1e-6) and record["rms"] == pytest.approx(rms, rel=1e-6)
    assert (record["zeros"], record["nonfinite"]) == (int((x == 0).sum()), 0)
    assert record["outliers"] == int((x.abs() > 6 * rms).sum())
    if w.ndim < 2:
        assert "sigma" not in record and "units" not in record
        return
    rows = x.mT if "c_attn" in record["name"] else x.flatten(1)
    units = rows.norm(dim=1)
    assert record["units"] == len(units) and record["dead_units"] == int((units == 0).sum())
    assert record["largest_unit"] == pytest.approx(float(units.max()), rel=1e-6) and record["largest_unit_at"] == int(units.argmax())
    assert record["smallest_unit"] == pytest.approx(float(units.min()), rel=1e-6)
    s = torch.linalg.svdvals(rows)
    share = s / s.sum()
    assert record["sigma"] == pytest.approx(float(s[0]), rel=1e-9) and record["of"] == len(s)
    assert record["stable_rank"] == pytest.approx(float(x.norm() ** 2 / s[0] ** 2), rel=1e-9)
    assert record["effective_rank"] == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-6)
    assert record["rank"] == int((s > torch.finfo(w.dtype).eps / 2 * x.norm()).sum())


def test_a_bias_has_no_units_also_where_it_is_of_a_fused_layer_or_of_experts(tmp_path: Path) -> None:
    """A unit's weights are those that go into one output; zeros at the start are no dead units."""
    model = nn.Module()
    model.attention, model.gates, model.plain = nn.MultiheadAttention(8, 2), nn.LSTM(4, 4), nn.Linear(8, 8)
    for name, p in model.named_parameters():
        if "bias" in name:
            p.data.zero_()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = by_name(nw.inspect(tmp_path / "model.safetensors", model=model))
    biases = {name for name in found if "bias" in name}
    assert len(biases) == 5 and not any("units" in found[name] for name in biases)
    assert all(found[name]["dead_units"] == 0 and found[name]["units"] for name in found.keys() - biases)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_figures_are_those_of_the_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernels: bool) -> None:
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    given = weights(dtype=dtype)
    save_file(given, tmp_path / "model.safetensors")
    found = nw.inspect(tmp_path / "model.safetensors")
    assert {record["name"] for record in found.tensors} == set(given)
    for name, w in given.items():
        check(by_name(found)[name], w)
    total = torch.cat([w.double().flatten() for w in given.values()])
    assert found.results["total"]["l2"] == pytest.approx(float(total.norm()), rel=1e-6)
    assert found.results["total"]["largest_unit_in"] == "wte.weight[7]"


def test_long_rows_many_blocks_and_two_threads(tmp_path: Path) -> None:
    """Rows longer than a block, columns, and a tensor that several blocks and both threads share."""
    given = {"a.weight": torch.randn(7, 200_001), "h.c.weight": torch.randn(9, 300_000), "h.c.bias": torch.randn(300_000)}
    given["a.weight"][4, 70_000] = 50
    save_file(given, tmp_path / "m.safetensors")
    found = by_name(nw.inspect(tmp_path / "m.safetensors", spectra=False))
    for name, rows in (("a.weight", given["a.weight"]), ("h.c.weight", given["h.c.weight"].mT)):
        units = rows.double().norm(dim=1)
        assert found[name]["largest_unit"] == pytest.approx(float(units.max()), rel=1e-6)
        assert found[name]["largest_unit_at"] == int(units.argmax())
        assert found[name]["l2"] == pytest.approx(float(rows.double().norm()), rel=1e-6)
    assert found["a.weight"]["outliers"] == 1 and "sigma" not in found["a.weight"]


def test_what_is_not_finite_is_counted_and_left_out_of_norms(tmp_path: Path) -> None:
    w = torch.randn(6, 5)
    w[1, 2], w[3, 3], w[3, 4] = math.inf, math.nan, -math.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        save_file({"a.weight": w.to(dtype)}, tmp_path / "m.safetensors")
        [record] = nw.inspect(tmp_path / "m.safetensors").tensors
        finite = torch.where(w.isfinite(), w.to(dtype).double(), 0)
        assert record["nonfinite"] == 3 and record["l2"] == pytest.approx(float(finite.norm()), rel=1e-6)
        assert record["rms"] == pytest.approx(float(finite.norm()) / 27**0.5, rel=1e-6) and "sigma" not in record


def test_eight_bits_are_computed_and_integers_are_named(tmp_path: Path) -> None:
    w = torch.randn(16, 8).to(torch.float8_e4m3fn)
    save_file({"a.weight": w, "n.weight": torch.arange(4), "packed": torch.zeros(3, 3, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    found = nw.inspect(tmp_path / "m.safetensors")
    [record] = found.tensors
    assert record["l2"] == pytest.approx(float(w.double().norm()), rel=1e-6) and record["dtype"] == "float8_e4m3fn"
    assert sorted(one.split(":")[0] for one in found.results["skipped"]) == ["n.weight", "packed"]
    assert "skipped: 2 tensors" in str(found)


# ------------------------------------------------------------------------------------------------------------- formats


def sharded(folder: Path, given: Weights, save: Callable[[Weights, Path], Any], name: str, index: str) -> None:
    folder.mkdir(exist_ok=True)
    names = sorted(given)
    parts = {name.replace(".", f"-0000{i}-of-00002.", 1): names[i - 1 :: 2] for i in (1, 2)}
    for file, held in parts.items():
        save({n: given[n] for n in held}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": {n: file for file, held in parts.items() for n in held}}))


def lightning(given: Weights, path: Path) -> None:
    states = [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}]
    torch.save({"state_dict": given, "optimizer_states": states, "epoch": 3, "hyper_parameters": {"width": 4}}, path)


def run_folder(given: Weights, folder: Path) -> None:
    for step in (5, 40, 100):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        save_file({n: t * (step == 100) for n, t in given.items()}, folder / f"checkpoint-{step}" / "model.safetensors")


FORMATS: dict[str, tuple[str, Callable[[Weights, Path], Any]]] = {
    "safetensors, sharded": ("f", lambda w, p: sharded(p, w, save_file, "model.safetensors", "model.safetensors.index.json")),
    "torch": ("m.pt", torch.save),
    "torch, wrapped": ("m.pt", lambda w, p: torch.save({f"module._orig_mod.{n}": t for n, t in w.items()}, p)),
    "torch, before archives": ("m.bin", lambda w, p: torch.save(w, p, _use_new_zipfile_serialization=False)),
    "torch, sharded": ("f", lambda w, p: sharded(p, w, torch.save, "pytorch_model.bin", "pytorch_model.bin.index.json")),
    "torch, transposed": ("m.pth", lambda w, p: torch.save({n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in w.items()}, p)),
    "lightning": ("last.ckpt", lightning),
    "distributed": ("f", lambda w, p: dcp.save({"model": w, "optim": {"step": 3, "m": torch.ones(2)}}, checkpoint_id=p, no_dist=True)),
    "run": ("f", run_folder),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_figures(tmp_path: Path, name: str) -> None:
    given = weights()
    save_file(given, tmp_path / "plain.safetensors")
    place, save = FORMATS[name]
    save(given, tmp_path / place)
    found = nw.inspect(tmp_path / place)
    assert found.tensors == nw.inspect(tmp_path / "plain.safetensors").tensors
    notes = " ".join(found.results["notes"])
    assert name != "run" or "checkpoint-100 is the last of 3" in notes
    assert name not in ("lightning", "distributed") or "left out: 1 tensors of 'optim" in notes


def test_a_tied_tensor_is_measured_once(tmp_path: Path) -> None:
    table = torch.randn(9, 4)
    torch.save({"wte.weight": table, "lm_head.weight": table}, tmp_path / "m.pt")
    found = nw.inspect(tmp_path / "m.pt")
    assert [record["name"] for record in found.tensors] == ["wte.weight"]
    assert "lm_head.weight is the same tensor as wte.weight" in str(found)


def test_a_tensor_tied_within_a_shard_is_measured_once_and_found_under_both_names(tmp_path: Path) -> None:
    given = {"a.weight": torch.randn(3, 4), "lm_head.weight": (table := torch.randn(9, 4)), "n.weight": torch.randn(3), "wte.weight": table}
    sharded(tmp_path, given, torch.save, "pytorch_model.bin", "pytorch_model.bin.index.json")    # tables in the second shard
    save_file({"lm_head.weight": table * 0, "wte.weight": table * 0.5}, tmp_path / "base.safetensors")
    index = tmp_path / "pytorch_model.bin.index.json"
    found = nw.inspect(index)
    assert [record["name"] for record in found.tensors] == ["a.weight", "lm_head.weight", "n.weight"]
    assert "wte.weight is the same tensor as lm_head.weight" in str(found)
    save_file({"wte.weight": table * 1.5}, tmp_path / "tuned.safetensors")
    [record] = nw.inspect(tmp_path / "tuned.safetensors", against=index).tensors
    assert record["change"]["relative"] == pytest.approx(0.5, rel=1e-6)


# -------------------------------------------------------------------------------------------------------- what is wrong


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def bad_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """A file or folder for each mistake, and what the sentence must say."""
    given, found = weights(), {}
    for name, ending, save in (("safe", "safetensors", save_file), ("torch", "pt", torch.save)):
        for share in (0.001, 0.6, 0.999):
            path = tmp_path / f"{name}{share}.{ending}"
            save(given, path)
            cut(path, share)
            found[f"{name}, {share} of it"] = (path, "cut off|damaged")
    for name, ending in (("text", "safetensors"), ("text", "pt"), ("text", "txt"), ("empty", "safetensors"), ("empty", "ckpt")):
        (path := tmp_path / f"{name}.{ending}").write_bytes(b"no checkpoint at all" * (name == "text"))
        found[f"{name} as {ending}"] = (path, "damaged|another kind|no file of torch.save|nothing in it was run")
    sharded(folder := tmp_path / "shards", given, save_file, "model.safetensors", "model.safetensors.index.json")
    (folder / "model-00002-of-00002.safetensors").unlink()
    found["a missing shard"] = (folder, "model-00002-of-00002.safetensors should stand beside it")
    sharded(folder := tmp_path / "no-index", given, save_file, "model.safetensors", "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    found["no index"] = (folder, "no index.json")
    (empty := tmp_path / "empty").mkdir()
    found["an empty folder"] = (empty, "found a folder with nothing")
    save_file({"n": torch.arange(3)}, tmp_path / "integers.safetensors")
    found["integers alone"] = (tmp_path / "integers.safetensors", "no tensor of floating-point numbers")
    return found | {"nothing": (tmp_path / "nowhere", "found nothing")}


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for name, (path, says) in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=says) as raised:
            nw.inspect(path)
        assert "\n" not in str(raised.value) and str(path.name) in str(raised.value), name


def test_planted_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a.weight": torch.ones(2, 2), "more": Payload(mark)}, tmp_path / "m.pt")
    with pytest.raises(DataError, match="nothing in it was run"):
        nw.inspect(tmp_path / "m.pt")
    torch.save({"a.weight": torch.ones(2, 2), "more": Payload(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match="nothing in it was run"):
        nw.inspect(tmp_path / "old.pt")
    dcp.save({"a": torch.ones(2, 2), "b": Payload(mark)}, checkpoint_id=tmp_path / "d", no_dist=True)
    assert [record["name"] for record in nw.inspect(tmp_path / "d").tensors] == ["a"]
    assert not mark.exists()


# -------------------------------------------------------------------------------------------------------- what changed


def test_a_change_is_measured_with_its_rank_and_angle(tmp_path: Path) -> None:
    """A product of rank 3 that is merged and rounded has rank 3 in every dtype, where the usual limit finds all or nothing."""
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        w0 = torch.randn(80, 48, generator=g).to(dtype)
        w1 = (w0.float() + 2 * torch.randn(80, 3, generator=g) @ torch.randn(3, 48, generator=g)).to(dtype)
        save_file({"model.h.0.a.weight": w1, "model.b.bias": torch.ones(4)}, tmp_path / "new.safetensors")
        save_file({"h.0.a.weight": w0, "b.bias": torch.ones(4)}, tmp_path / "base.safetensors")
        found = by_name(nw.inspect(tmp_path / "new.safetensors", tmp_path / "base.safetensors"))
        change = found["model.h.0.a.weight"]["change"]
        x0, x1 = w0.double(), w1.double()
        d = x1 - x0
        assert change["relative"] == pytest.approx(float(d.norm() / x0.norm()), rel=1e-6)
        assert change["sigma"] == pytest.approx(float(torch.linalg.matrix_norm(d, 2)), rel=1e-6)
        cosine = float((x0 * x1).sum() / x0.norm() / x1.norm())
        assert change["angle"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)
        assert change["rank"] == 3
        assert found["model.b.bias"]["change"]["relative"] == 0 and found["model.b.bias"]["change"]["angle"] == 0


@pytest.mark.parametrize("theta", [1e-5, 0.3, 1.0, math.pi - 1e-4])
def test_angles_keep_their_digits_when_they_are_small(theta: float) -> None:
    a, b = 3.0, 2.9999
    c = math.sqrt((a - b) ** 2 + 4 * a * b * math.sin(theta / 2) ** 2)
    assert angle(a, b, c) == pytest.approx(math.degrees(theta), rel=1e-6)


@pytest.mark.parametrize(("rank", "zero"), [(1, False), (5, False), (30, True), (40, False)])
def test_ranks_are_exact_where_gram_matrices_leave_them_open(
    tmp_path: Path, rank: int, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    exactly = spectra._exactly
    monkeypatch.setattr(spectra, "_exactly", lambda slabs: calls.append(1) or exactly(slabs))
    g = torch.Generator().manual_seed(rank)
    product = (torch.randn(90, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, 40, generator=g, dtype=torch.float64)).float()
    if zero:
        product[:, 30:] = 0
    save_file({"tall.weight": product, "wide.weight": product.mT.contiguous()}, tmp_path / "m.safetensors")
    for record in nw.inspect(tmp_path / "m.safetensors").tensors:
        assert record["rank"] == rank
    assert len(calls) == (2 if rank in (1, 5) else 0)


def test_bases_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    save_file({"other.weight": torch.ones(3, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="give two checkpoints of one model"):
        nw.inspect(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    save_file({**weights(), "wte.weight": torch.ones(301, 24)}, tmp_path / "c.safetensors")
    found = nw.inspect(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert "change" not in by_name(found)["wte.weight"] and "not compared, since the base has no tensor" in str(found)


# ------------------------------------------------------------------------------------------------------------ adapters


def adapter(folder: Path, config: dict[str, Any], factors: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return folder


def test_adapters_are_measured_as_products(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    lead, a, b = "base_model.model.", torch.randn(4, 30, generator=g), torch.randn(50, 4, generator=g)
    c, d = torch.randn(2, 50, generator=g), torch.randn(30, 2, generator=g)
    ea, eb = torch.randn(4, 90, generator=g), torch.randn(30, 4, generator=g)
    folder = adapter(tmp_path / "adapter", {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": 6}}, {
        f"{lead}h.0.up.lora_A.weight": a, f"{lead}h.0.up.lora_B.weight": b, f"{lead}h.0.down.lora_A.weight": c,
        f"{lead}h.0.down.lora_B.weight": d, f"{lead}wte.lora_embedding_A": ea, f"{lead}wte.lora_embedding_B": eb,
        f"{lead}head.modules_to_save.weight": torch.ones(3, 30),
    })  # fmt: skip
    w0 = {"h.0.up.weight": torch.randn(50, 30, generator=g), "h.0.down.weight": torch.randn(30, 50, generator=g),
          "wte.weight": torch.randn(90, 30, generator=g), "head.weight": torch.zeros(3, 30)}  # fmt: skip
    save_file(w0, tmp_path / "base.safetensors")
    found = by_name(nw.inspect(folder, tmp_path / "base.safetensors"))
    dense = {"h.0.up.weight": 2 * b.double() @ a.double(), "h.0.down.weight": 3 * d.double() @ c.double(),
             "wte.weight": 2 * (eb.double() @ ea.double()).mT}  # fmt: skip
    for name, x in dense.items():
        record, start = found[name], w0[name].double()
        assert record["l2"] == pytest.approx(float(x.norm()), rel=1e-9)
        assert record["sigma"] == pytest.approx(float(torch.linalg.matrix_norm(x, 2)), rel=1e-9)
        assert record["rank"] == (2 if "down" in name else 4)
        assert record["change"]["relative"] == pytest.approx(float(x.norm() / start.norm()), rel=1e-6)
        cosine = float((start * (start + x)).sum() / start.norm() / (start + x).norm())
        assert record["change"]["angle"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)
    assert found["h.0.up.weight"]["largest_unit"] == pytest.approx(float(dense["h.0.up.weight"].norm(dim=1).max()), rel=1e-9)
    assert found["head.weight"]["l2"] == pytest.approx(90**0.5)


@pytest.mark.parametrize(("change", "says"), [
    ({"r": 5}, "says rank 5"), ({"base": (49, 30)}, "does not fit the adapter"), ({"base": None}, "has no such tensor"),
    ({"without": "lora_B"}, "the other is not there"),
])  # fmt: skip
def test_adapters_that_fit_nothing_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    factors = {"base_model.model.l.lora_A.weight": torch.ones(4, 30), "base_model.model.l.lora_B.weight": torch.ones(50, 4)}
    factors = {name: t for name, t in factors.items() if change.get("without", "?") not in name}
    folder = adapter(tmp_path / "adapter", {"r": change.get("r", 4)}, factors)
    shape = change.get("base", (50, 30))
    save_file({"l.weight" if shape else "m.weight": torch.ones(shape or (3, 3))}, tmp_path / "base.safetensors")
    with pytest.raises(DataError, match=says):
        nw.inspect(folder, tmp_path / "base.safetensors")


# -------------------------------------------------------------------------------------------------------------- policy


def test_bounds_are_those_of_verify(tmp_path: Path) -> None:
    """A model that a control holds, then pushed out of its bounds: the file and the model say the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    rules = [nw.max_norm(0.5, params="*.weight"), nw.spectral_cap(0.7, params="2.weight"), nw.clip_grad_norm(1.0)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    control = nw.attach(model, optimizer, rules)
    model(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    held = nw.inspect(tmp_path / "m.pt", policy=rules)
    assert held and held.verification is not None and held.verification.blocks == control.verify().blocks
    assert any("acts on gradients" in reason for reason in held.verification.unchecked)
    with torch.no_grad():
        model[2].weight[1] *= 3
    torch.save(model.state_dict(), tmp_path / "m.pt")
    broken, truth = nw.inspect(tmp_path / "m.pt", policy=rules), control.verify()
    assert not broken and broken.verification is not None and truth.breaches
    assert [str(one) for one in broken.verification.breaches] == [str(one) for one in truth.breaches]
    assert broken.results["policy"]["broken"][0].startswith("2.weight[block 1]")


def test_initial_weights_come_from_the_base(tmp_path: Path) -> None:
    w0 = torch.randn(6, 9)
    save_file({"a.weight": w0}, tmp_path / "base.safetensors")
    save_file({"a.weight": w0 * 1.05}, tmp_path / "new.safetensors")
    for limit, ok in (("0.1*init", True), ("0.04*init", False)):
        rule = nw.max_norm(limit, params="*.weight", center="init")
        assert bool(nw.inspect(tmp_path / "new.safetensors", tmp_path / "base.safetensors", policy=rule)) is ok
    alone = nw.inspect(tmp_path / "new.safetensors", policy=rule)
    assert not alone and "--against" in str(alone), "a gate that measures nothing is no gate that is passed"


@pytest.mark.parametrize(("limit", "ok"), [(200.0, True), (100.0, False)])
def test_a_bound_on_all_tensors_together(tmp_path: Path, limit: float, ok: bool) -> None:
    save_file(weights(), tmp_path / "m.safetensors")
    rule = nw.Rule(params="*", action="project", norm="l2", per="global", radius=limit, on="weight")
    found = nw.inspect(tmp_path / "m.safetensors", policy=rule)
    assert bool(found) is ok and found.verification is not None
    assert found.verification.largest[0].value == pytest.approx(found.results["total"]["l2"], rel=1e-6)


def test_a_rule_that_matches_nothing_or_needs_a_model_is_told(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "m.safetensors")
    with pytest.raises(PolicyError, match="matches no parameter"):
        nw.inspect(tmp_path / "m.safetensors", policy=nw.max_norm(1.0, params="nowhere.*"))
    found = nw.inspect(tmp_path / "m.safetensors", policy=nw.max_norm(1.0, params="class:Linear"))
    assert not found and "give --config or --model" in str(found)


# --------------------------------------------------------------------------------------------------------------- roles


def test_guesses_are_told_and_a_model_corrects_them(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lookup, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lookup(x))

    torch.save(Odd().state_dict(), tmp_path / "m.pt")
    guess = nw.inspect(tmp_path / "m.pt")
    assert guess.results["guessed"] and "are guessed from names and shapes" in str(guess)
    with torch.device("meta"):
        model = Odd()
    told = nw.inspect(tmp_path / "m.pt", model=model)
    roles = {"lookup.weight": "embedding", "out.weight": "head", "out.bias": "bias"}
    assert {name: r["role"] for name, r in by_name(told).items()} == roles
    assert not told.results["guessed"]
    with pytest.raises(DataError, match="none of its tensors"):
        nw.inspect(tmp_path / "m.pt", model=nn.Linear(5, 7))


def test_guesses_of_usual_names() -> None:
    from normwise.inspection.places import _guess, _transposed

    shapes = {"h.0.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "h.0.mlp.c_proj": (32, 8), "fc": (24, 8), "out": (24, 24)}
    outputs = {"h.0.c_attn": 24, "h.0.attn.c_proj": 8, "h.0.mlp.c_proj": 8, "fc": 24, "out": 24}
    both = {f"{k}.weight": s for k, s in shapes.items()} | {f"{k}.bias": (n,) for k, n in outputs.items()}
    columns = {"h.0.c_attn.weight", "h.0.mlp.c_proj.weight", "h.0.attn.c_proj.weight"}
    assert _transposed(both) - {"out.weight"} == columns
    usual = {
        "model.embed_tokens.weight": ((100, 8), "embedding"), "lm_head.weight": ((100, 8), "head"),
        "pooler.dense.weight": ((8, 8), "hidden"),
        "rnn.weight_hh_l0": ((32, 8), "recurrent"), "conv1.weight": ((8, 3, 7, 7), "conv"), "bn.weight": ((8,), "gain"),
        "bn.running_mean": ((8,), "buffer"), "mlp.experts.w1": ((4, 64, 8), "hidden"), "x.bias": ((8,), "bias"),
        "h.0.attn.bias": ((1, 1, 8, 8), "buffer"), "layers.3.output.weight": ((8, 8), "hidden"),
    }  # fmt: skip
    assert {name: _guess(name, shape, set())[0] for name, (shape, _) in usual.items()} == {name: role for name, (_, role) in usual.items()}


# ---------------------------------------------------------------------------------------------- memory and interruption


def test_norms_are_read_a_block_at_a_time_and_spectra_of_tall_matrices_a_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a.weight": torch.randn(4000, 256), "b": torch.randn(1 << 20)}, tmp_path / "m.safetensors")
    asked: list[int] = []
    fetch = InFile.fetch
    monkeypatch.setattr(InFile, "fetch", lambda self, first, count, into=None: asked.append(count * 4) or fetch(self, first, count, into))
    nw.inspect(tmp_path / "m.safetensors", spectra=False)
    assert max(asked) <= BLOCK_BYTES and sum(asked) == 4 * (4000 * 256 + (1 << 20)), "and every byte is read once"
    nw.inspect(tmp_path / "m.safetensors")
    assert max(asked) <= spectra.SLAB_BYTES


def test_it_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "KEPT_EVERY", -1.0)
    save_file(weights(), tmp_path / "m.safetensors")
    whole, state, seen = nw.inspect(tmp_path / "m.safetensors"), tmp_path / "state.jsonl", list[str]()

    def stop(name: str, size: int, total: int) -> None:
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nw.inspect(tmp_path / "m.safetensors", kept=Store(state), progress=stop)
    measured: list[str] = []
    norms_of = inspector.norms_of
    monkeypatch.setattr(inspector, "norms_of", lambda one, *rest: measured.append(one.name) or norms_of(one, *rest))
    resumed = nw.inspect(tmp_path / "m.safetensors", kept=Store(state))
    assert json.dumps(resumed.results) == json.dumps(whole.results) and len(measured) == len(weights()) - 5
    measured.clear()
    nw.inspect(tmp_path / "m.safetensors", kept=Store(state), spectra=False)
    assert len(measured) == len(weights()), "other options are measured anew"
