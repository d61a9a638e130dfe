"""A gate must not pass what it did not measure: stale results, tensors taken for something else, or that vanish between their names."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import normwise as nw
from normwise import cli
from normwise.errors import DataError
from normwise.experiments.framework.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
POLICY = "- max_norm: {radius: 3.0, params: '*weight'}\n"


def gate(tmp_path: Path, checkpoint: Path, policy: str = POLICY, **more: Any) -> tuple[int, dict[str, Any]]:
    """The exit status of docs/gate.md's command, and what it wrote, which must be JSON."""
    (tmp_path / "bounds.yaml").write_text(policy)
    out = tmp_path / "report.json"
    asked = ["inspect", str(checkpoint), "--policy", str(tmp_path / "bounds.yaml"), "--json", str(out)]
    status = cli.main(asked + [part for name, value in more.items() for part in (f"--{name}", str(value))])
    found: dict[str, Any] = json.loads(out.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return status, found


# ------------------------------------------------------------------------------------------------------- stale results


def test_another_file_of_one_name_size_and_time_is_measured_anew(tmp_path: Path) -> None:
    """As two reproducible archives unpack them."""
    for name, size in (("a", 1.0), ("b", 100.0)):
        (tmp_path / name).mkdir()
        save_file({"l.weight": torch.full((3, 4), size)}, tmp_path / name / "model.safetensors")
        os.utime(tmp_path / name / "model.safetensors", ns=(10**18, 10**18))
    assert gate(tmp_path, tmp_path / "a" / "model.safetensors")[0] == 0
    assert gate(tmp_path, tmp_path / "b" / "model.safetensors")[0] == 1
    assert gate(tmp_path, tmp_path / "a")[0] == 0


def test_another_content_in_the_same_file_is_measured_anew_whatever_its_time_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"l.weight": torch.full((3, 4), 1.0)}, path)
    os.utime(path, ns=(10**18, 10**18))
    assert gate(tmp_path, path)[0] == 0
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) - 48)
        file.write(torch.full((12,), 100.0).numpy().tobytes())
    os.utime(path, ns=(10**18, 10**18))
    assert gate(tmp_path, path)[0] == 1


def test_a_checkpoint_that_changes_while_it_is_measured_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)}, path)

    def rewrite(name: str, size: int, total: int) -> None:
        os.replace(path, tmp_path / "old")
        save_file({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)}, path)

    with pytest.raises(DataError, match="was changed while it was measured; start again"):
        nw.inspect(path, progress=rewrite)
    assert nw.inspect(path)


# ------------------------------------------------------------------------------------------------- slim layers

SLIM: dict[str, nn.Module] = {
    "one output": nn.Linear(64, 1), "one output, no bias": nn.Linear(64, 1, bias=False), "one input": nn.Linear(1, 64),
    "a number": nn.Linear(1, 1), "a map to one channel": nn.Conv2d(64, 1, 1), "a map from one channel": nn.Conv2d(1, 64, 1),
    "depthwise": nn.Conv2d(16, 16, 1, groups=16), "a line": nn.Conv2d(1, 1, (1, 9)), "in one dimension": nn.Conv1d(1, 1, 9),
    "a square": nn.Conv2d(1, 1, 3), "a table of one row": nn.Embedding(1, 64), "recurrent": nn.RNN(1, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIM)
def test_units_of_slim_layers_are_those_of_the_layer(tmp_path: Path, name: str) -> None:
    """Of each ``weight`` the units are the slices of its first axis; the gate passes at their largest norm and not below."""
    layer = SLIM[name]
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(1, 2, p.numel()).view_as(p))
    torch.save(layer.state_dict(), tmp_path / "m.pt")
    weights = {n: p.detach().double().flatten(1) for n, p in layer.named_parameters() if n.startswith("weight")}
    largest = max(float(w.norm(dim=1).max()) for w in weights.values())
    for share, status in ((1.01, 0), (0.99, 1)):
        policy = f"- max_norm: {{radius: {share * largest}, params: 'weight*'}}\n"
        assert gate(tmp_path, tmp_path / "m.pt", policy)[0] == status, "the bound is between the largest unit and the whole"
    for record in nw.inspect(tmp_path / "m.pt").tensors:
        if record["name"] in weights:
            assert record["units"] == len(weights[record["name"]]), record
            assert record["largest_unit"] == pytest.approx(float(weights[record["name"]].norm(dim=1).max()), rel=1e-6)


def test_gains_of_several_dimensions_stay_gains(tmp_path: Path) -> None:
    shapes = {"ls.gamma": (8, 1, 1), "cls_token": (1, 1, 8), "scale": (1, 1), "l.weight_g": (8, 1), "bn.weight": (8,),
              "l.parametrizations.weight.original0": (8, 1), "attn.out_bias": (1, 8)}  # fmt: skip
    given = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(given, tmp_path / "m.safetensors")
    roles = {record["name"]: record["role"] for record in nw.inspect(tmp_path / "m.safetensors").tensors}
    assert roles == {name: "bias" if "bias" in name else "gain" for name in given}


# -------------------------------------------------------------------------------------------------- names that collide


def check_both(found: nw.inspection.Inspection, norms: dict[str, float]) -> None:
    assert {record["name"]: pytest.approx(record["l2"]) for record in found.tensors} == norms
    assert not found, "the large one breaks the bound"


@pytest.mark.parametrize("names", [("weight", "module.weight"), ("module.weight", "weight"), ("l._orig_mod.weight", "l.weight")])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_two_tensors_that_differ_in_a_wrapper_are_both_measured(tmp_path: Path, names: tuple[str, str], ending: str) -> None:
    given = {names[0]: torch.full((2, 2), 50.0), names[1]: torch.ones(2, 2), "other.weight": torch.ones(2, 2)}
    (torch.save if ending == "pt" else save_file)(given, tmp_path / f"m.{ending}")    # type: ignore[operator]
    found = nw.inspect(tmp_path / f"m.{ending}", policy=nw.max_norm(3.0, params="*weight"))
    check_both(found, {names[0]: 100.0, names[1]: 2.0, "other.weight": 2.0})
    assert "keep their names" in str(found)


def test_names_that_are_one_in_print_are_both_measured(tmp_path: Path) -> None:
    large, small = torch.full((2, 2), 50.0), torch.ones(2, 2)
    torch.save({"a.weight": large, "a": {"weight": small}, 3: small.clone(), "3": large.clone()}, tmp_path / "m.pt")
    found = nw.inspect(tmp_path / "m.pt", policy=nw.max_norm(3.0, params="*weight*"))
    check_both(found, {"a.weight": 100.0, "a.weight (2)": 2.0, "3": 2.0, "3 (2)": 100.0})


def shards(folder: Path, held: dict[str, dict[str, Tensor]], where: dict[str, str]) -> Path:
    folder.mkdir()
    for name, given in held.items():
        save_file({n: t.clone() for n, t in given.items()}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_of_a_name_in_two_shards_the_index_says_which_is_meant(tmp_path: Path) -> None:
    large, small = torch.full((2, 2), 50.0), torch.ones(2, 2)
    held = {"1.safetensors": {"a.weight": large, "b.weight": small}, "2.safetensors": {"a.weight": small, "c.weight": small}}
    where = {"a.weight": "1.safetensors", "b.weight": "1.safetensors", "c.weight": "2.safetensors"}
    found = nw.inspect(shards(tmp_path / "f", held, where), policy=nw.max_norm(3.0, params="*weight"))
    check_both(found, {"a.weight": 100.0, "b.weight": 2.0, "c.weight": 2.0})
    assert "left out: a.weight of 2.safetensors" in str(found)
    wrapped = {"1.safetensors": {"module.a.weight": large}, "2.safetensors": {"a.weight": small}}
    where = {"module.a.weight": "1.safetensors", "a.weight": "2.safetensors"}
    found = nw.inspect(shards(tmp_path / "g", wrapped, where), policy=nw.max_norm(3.0, params="*weight"))
    check_both(found, {"module.a.weight": 100.0, "a.weight": 2.0})
    twice = {"1.safetensors": {"a.weight": large, "b": small}, "2.safetensors": {"a.weight": small, "c": small}}
    with pytest.raises(DataError, match=r"a\.weight is in two shards, and the index does not say"):
        nw.inspect(shards(tmp_path / "h", twice, {"b": "1.safetensors", "c": "2.safetensors"}))


def test_a_description_that_has_a_name_twice_is_refused(tmp_path: Path) -> None:
    entry = '"a.weight":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    text = ("{" + entry % (0, 8) + "," + entry % (8, 16) + "}").encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(DataError, match="a name stands in it twice"):
        nw.inspect(tmp_path / "m.safetensors")


# --------------------------------------------------------------------------------------------- what is not measured


def test_layers_may_be_called_as_optimizers_are(tmp_path: Path) -> None:
    given = {name: torch.full((2, 2), 50.0) for name in ("optim_head.weight", "optimal.weight", "lr_scheduler.weight", "optimizer.weight")}
    torch.save(given, tmp_path / "m.pt")
    status, found = gate(tmp_path, tmp_path / "m.pt")
    assert status == 1 and {one["name"] for one in found["tensors"]} == set(given)


def trained() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer.state_dict()


@pytest.mark.parametrize("keys", [("net_state", "opt"), ("state_of_net", "o2"), ("encoder", "optimizer_state_dict")])
def test_an_optimizer_beside_weights_is_left_out_whatever_it_is_called(tmp_path: Path, keys: tuple[str, str]) -> None:
    model, state = trained()
    torch.save({keys[0]: model.state_dict(), keys[1]: state}, tmp_path / "m.pt")
    found = nw.inspect(tmp_path / "m.pt")
    assert [record["name"] for record in found.tensors] == [f"{keys[0]}.bias", f"{keys[0]}.weight"]
    assert f"left out: 6 tensors of '{keys[1]}'" in str(found)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(DataError, match="no tensor of floating-point numbers in it; left out: 6 tensors of 'state'"):
        nw.inspect(tmp_path / "optimizer.pt")


def test_what_a_selector_names_and_nobody_measures_is_told(tmp_path: Path) -> None:
    given = {"a.weight": torch.ones(2, 2), "packed.weight": torch.ones(2, 2, dtype=torch.int8), "strange.bias": torch.ones(2, 2, 2),
             "bn.num_batches_tracked": torch.tensor(3), "bn.running_var": torch.ones(2)}  # fmt: skip
    save_file(given, tmp_path / "m.safetensors")
    status, found = gate(tmp_path, tmp_path / "m.safetensors", "- max_norm: {radius: 3.0, params: '*'}\n")
    told = " ".join(found["policy"]["unchecked"])
    assert status == 0 and "packed.weight is not measured: int8" in told and "strange.bias is not measured: it looks like a buffer" in told
    assert "bn." not in told
    status, found = gate(tmp_path, tmp_path / "m.safetensors", "- max_norm: {radius: 3.0, params: packed.weight}\n")
    assert status == 1 and "nothing was checked" in found["policy"]["says"]
    quantised = torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8)
    torch.save({"a.weight": torch.ones(2, 2), "q.weight": quantised}, tmp_path / "q.pt")
    status, found = gate(tmp_path, tmp_path / "q.pt")
    assert status == 0 and "q.weight is not measured: it is quantised (qint8)" in " ".join(found["policy"]["unchecked"])


def test_a_tensor_that_does_not_fit_the_model_is_told(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3, 4), "bias": torch.ones(7), "extra.weight": torch.ones(3, 3)}, tmp_path / "m.pt")
    found = nw.inspect(tmp_path / "m.pt", policy=nw.max_norm(9.0, params="*"), model=nn.Linear(4, 3))
    assert found.verification is not None
    told = " ".join(found.verification.unchecked)
    assert all(f"{name} is not measured: no parameter of the model has its name and shape" in told for name in ("bias", "extra.weight"))


# ------------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["max_norm: {radius: 3.0, ", "spectral_cap: {radius: 3.0, ", "unit_norm: {", "non_negative: {"])
def test_weights_that_are_not_finite_break_bounds_and_are_written_as_json(tmp_path: Path, value: float, rule: str) -> None:
    w = torch.full((4, 3), 0.5)
    w[1, 2] = value
    save_file({"a.weight": w, "b.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    policy = f"- {rule}params: '*weight'}}\n"
    if rule.startswith("non_negative") and value == math.inf:
        return    # which is not negative
    first, found = gate(tmp_path, tmp_path / "m.safetensors", policy)
    again, resumed = gate(tmp_path, tmp_path / "m.safetensors", policy, report=tmp_path / "page")
    assert first == again == 1 and any(one.startswith("a.weight") for one in found["policy"]["broken"])
    assert resumed["policy"] == found["policy"], "what was kept says the same"
    assert len(Store(tmp_path / "report.tensors.jsonl").entries) == 1


def test_a_base_that_is_not_finite_is_the_reason_that_is_told(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    save_file({"a.weight": torch.full((3, 4), math.nan)}, tmp_path / "base.safetensors")
    for limit in ("{radius: 0.1*init, center: init, ", "{radius: 2*init, "):
        policy = f"- max_norm: {limit}params: '*weight'}}\n"
        _, found = gate(tmp_path, tmp_path / "m.safetensors", policy, against=tmp_path / "base.safetensors")
        assert "a.weight has initial weights that are not finite" in " ".join(found["policy"]["unchecked"])


def test_a_policy_may_be_the_path_of_its_file(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    (tmp_path / "p.yaml").write_text("- max_norm: {radius: 1.0, params: '*weight'}\n")
    assert not nw.inspect(tmp_path / "m.safetensors", policy=str(tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").write_text("- max_norm: {radius: 9.0, params: '*weight'}\n")
    assert nw.inspect(tmp_path / "m.safetensors", policy=tmp_path / "p.yaml")
