"""``nw.inspect`` on files that somebody made badly, or on purpose: one sentence, or what can be measured with a note; no traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import normwise as nw
from normwise import cli
from normwise.errors import DataError, NormwiseError

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor", "ignore:TypedStorage", "ignore:Sparse CSR", "ignore:The PyTorch API of nested"
)
GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def described(path: Path, head: Any) -> Path:
    """A safetensors file with any description."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + torch.ones(64).numpy().tobytes())
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(one) for one in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("normwise: ") and "Traceback" not in err and len(err) < 700
    return err


# --------------------------------------------------------------------------------------------------------- safetensors

HEADS: dict[str, Any] = {
    "a type in a list": {"a": GOOD | {"dtype": ["F32"]}}, "a type in a dictionary": {"a": GOOD | {"dtype": {}}},
    "a type of none": {"a": GOOD | {"dtype": None}}, "one place": {"a": GOOD | {"data_offsets": [0]}},
    "three places": {"a": GOOD | {"data_offsets": [0, 8, 16]}}, "places in words": {"a": GOOD | {"data_offsets": "ab"}},
    "a shape in words": {"a": GOOD | {"shape": "22"}}, "a shape in a dictionary": {"a": GOOD | {"shape": {"2": 2}}},
    "a shape of true": {"a": GOOD | {"shape": [True, 4]}}, "a negative shape": {"a": GOOD | {"shape": [-2, -2]}},
    "a long number": {"a": GOOD | {"shape": [10**3999]}}, "a long place": {"a": GOOD | {"data_offsets": [0, 10**3999]}},
    "too long a number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "many axes": {"a": GOOD | {"shape": [1] * 5000}}, "a number": {"a": 3}, "a list": [1], "nested": b"[" * 100_000, "no JSON": b"{{{{",
    "no type": {"a": {"shape": [2], "data_offsets": [0, 8]}}, "another size": {"a": GOOD | {"shape": [2**62, 2**62]}},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_descriptions_that_are_none_are_one_short_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "no safetensors file, or a damaged one" in refused(capsys, "inspect", described(tmp_path / "m.safetensors", HEADS[name]))


@pytest.mark.parametrize("name", ["a\ud800.weight", f"h.{'7' * 5000}.weight", "x\x1b[2J\x07\r.weight", "\u202e.weight", "²․٣.٣.weight"])
def test_names_that_no_terminal_and_no_file_can_bear_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = described(tmp_path / "m.safetensors", {name: GOOD, "other.weight": GOOD | {"data_offsets": [16, 32]}})
    (tmp_path / "p.yaml").write_text("- max_norm: {radius: 1.0, params: '*weight'}\n")
    asked = ["inspect", str(path), "--policy", str(tmp_path / "p.yaml"), "--json", str(tmp_path / "o.json")]
    assert cli.main([*asked, "--report", str(tmp_path / "r")]) == 1
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err), "nothing gives orders to the terminal"
    assert len(json.loads((tmp_path / "o.json").read_text())["tensors"]) == 2
    assert "\x1b" not in (tmp_path / "r" / "index.html").read_text(encoding="utf-8")


def test_what_a_refusal_echoes_gives_no_orders_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = {"a\x1b[2J": GOOD | {"shape": [7]}}
    assert "a\\x1b[2J" in refused(capsys, "inspect", described(tmp_path / "m.safetensors", head))
    assert "\\x1b" in refused(capsys, "inspect", tmp_path / "no\x1b[2J.pt")


@pytest.mark.parametrize(("where", "says"), [
    ({}, "names no tensor"), ({"a": ""}, "should stand beside it"), ({"a": ".."}, "should stand beside it|no weight_map"),
    ({"a": 3}, "no weight_map"), ([], "no weight_map"), ({"a": "x\0.safetensors"}, "a name that no file can have"),
])  # fmt: skip
def test_an_index_that_names_nothing_is_told(tmp_path: Path, where: Any, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(DataError, match=says):
        nw.inspect(tmp_path)


# --------------------------------------------------------------------------------------------------------- torch files


def itself() -> dict[str, Any]:
    found: dict[str, Any] = {"a.weight": torch.ones(2, 2)}
    return found | {"again": [found, found.setdefault("self", found)]}


def doubled(times: int) -> Any:
    found: Any = [torch.ones(2)]
    for _ in range(times):
        found = [found, found]
    return found


def deep(times: int) -> Any:
    found: Any = {"a.weight": torch.ones(2)}
    for _ in range(times):
        found = {"x": found}
    return found


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a tensor alone": (lambda: torch.ones(3, 3), "found a tensor alone"), "in itself": (itself, "it holds itself"),
    "doubled": (lambda: doubled(40), "it holds itself, or parts"), "deep": (lambda: deep(150), "it holds itself, or parts"),
    "nothing": (dict, "no tensor"), "a number": (lambda: 3, "no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_torch_files_of_nothing_to_measure_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, archive: bool
) -> None:
    make, says = REFUSED[name]
    torch.save(make(), tmp_path / "m.pt", _use_new_zipfile_serialization=archive)
    assert says in refused(capsys, "inspect", tmp_path / "m.pt")


LEFT: dict[str, tuple[Callable[[], Tensor], str]] = {
    "quantised": (lambda: torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8), "quantised (qint8)"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse (sparse_coo)"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "without end": (lambda: torch.ones(1).expand(2**36), "it repeats 1 numbers until there are 68719476736"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
}  # fmt: skip


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", LEFT)
def test_tensors_that_are_none_are_skipped_with_the_reason(tmp_path: Path, name: str, archive: bool) -> None:
    if name == "nested" and not archive:
        pytest.skip("torch itself cannot read it back")
    make, why = LEFT[name]
    torch.save({"odd.weight": make(), "a.weight": torch.full((2, 2), 3.0)}, tmp_path / "m.pt", _use_new_zipfile_serialization=archive)
    found = nw.inspect(tmp_path / "m.pt")
    assert [(r["name"], r["l2"]) for r in found.tensors] == [("a.weight", 6.0)]
    [told] = found.results["skipped"]
    assert told.startswith("odd.weight: ") and why in told


@pytest.mark.parametrize("archive", [True, False])
def test_views_are_what_they_show(tmp_path: Path, archive: bool) -> None:
    """Negated ones, which torch stores with the other sign, repeated and transposed ones: from the same as plain numbers nothing moved."""
    g = torch.Generator().manual_seed(0)
    z = torch.view_as_complex(torch.randn(3, 4, 2, generator=g)).conj()
    given = {"im.weight": z.imag, "neg.weight": torch._neg_view(torch.randn(3, 4, generator=g)),
             "t.weight": torch.randn(4, 3, generator=g).mT, "row.weight": torch.randn(1, 4, generator=g).expand(3, 4)}  # fmt: skip
    assert given["im.weight"].is_neg()
    torch.save(given, tmp_path / "m.pt", _use_new_zipfile_serialization=archive)
    save_file({name: t.resolve_neg().contiguous().clone() for name, t in given.items()}, tmp_path / "plain.safetensors")
    for record in nw.inspect(tmp_path / "m.pt", tmp_path / "plain.safetensors").tensors:
        assert record["change"]["l2"] == 0 and record["l2"] == pytest.approx(float(given[record["name"]].resolve_neg().double().norm()))


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(("config", "says"), [
    ('"lora_alpha": null', "alpha None"), ('"lora_alpha": "x"', "alpha x"), ('"lora_alpha": [4]', "alpha"),
    ('"lora_alpha": NaN', "alpha nan"),
    ('"lora_alpha": Infinity', "alpha inf"), ('"lora_alpha": 1e308', "fp32"), ('"lora_alpha": true', "alpha True"),
    ('"rank_pattern": {"(": 3}', "rank_pattern in adapter_config.json cannot be read"), ('"rank_pattern": [1]', "must be an object"),
    ('"alpha_pattern": "lin"', "must be an object"), ('"alpha_pattern": {"lin": "a"}', "alpha a"), ('"r": null', "says rank None"),
    ('"rank_pattern": {"lin": {}}', "says rank"),
])  # fmt: skip
def test_adapters_of_odd_settings_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, says: str) -> None:
    lead = "base_model.model.lin.lora_"
    save_file({f"{lead}A.weight": torch.ones(4, 30), f"{lead}B.weight": torch.ones(50, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {config}}}')
    assert says in refused(capsys, "inspect", tmp_path)


def test_a_pattern_that_would_never_end_does(tmp_path: Path) -> None:
    lead = f"base_model.model.{'a' * 60}!.lora_"
    save_file({f"{lead}A.weight": torch.ones(4, 30), f"{lead}B.weight": torch.ones(50, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"(a+)+": 3}}')
    [record] = nw.inspect(tmp_path).tensors
    assert record["l2"] == pytest.approx(2 * 4 * 1500**0.5)


def test_factors_of_integers_and_factors_without_their_settings_are_told(tmp_path: Path) -> None:
    lead = "base_model.model.lin.lora_"
    given = {f"{lead}A.weight": torch.ones(4, 30, dtype=torch.int8), f"{lead}B.weight": torch.ones(50, 4)}
    save_file(given, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    with pytest.raises(DataError, match=r"and the other, .*lora_A\.weight, is int8"):
        nw.inspect(tmp_path)
    save_file({f"{lead}A.default.weight": torch.ones(4, 30), f"{lead}B.default.weight": torch.ones(50, 4)}, tmp_path / "alone.safetensors")
    assert "factors of LoRA without an adapter_config.json" in str(nw.inspect(tmp_path / "alone.safetensors"))


def test_an_adapter_that_is_not_finite_has_no_change(tmp_path: Path) -> None:
    lead = "base_model.model.lin.lora_"
    given = {f"{lead}A.weight": torch.full((4, 30), math.nan), f"{lead}B.weight": torch.ones(50, 4)}
    save_file(given, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    save_file({"lin.weight": torch.ones(50, 30)}, tmp_path / "base.safetensors")
    asked = ["inspect", str(tmp_path), "--against", str(tmp_path / "base.safetensors"), "--json", str(tmp_path / "o.json")]
    assert cli.main([*asked, "--report", str(tmp_path / "page")]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["tensors"][0]["change"]["relative"] is None and found["total"]["change"]["relative"] is None


# ------------------------------------------------------------------------------------------- not finite, and out of range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spectra", [True, False])
def test_units_that_are_not_finite_are_not_dead_and_did_not_stay_where_they_were(tmp_path: Path, dtype: torch.dtype, spectra: bool) -> None:
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    w[1], w[2], w[3, 0] = math.nan, 0, math.inf
    stack, turned = torch.stack([w, w]), w.mT.contiguous()
    given = {"a.weight": w, "h.c_attn.weight": turned, "h.c_attn.bias": torch.zeros(5), "experts.w": stack,
             "all.weight": torch.full((3, 3), math.nan)}  # fmt: skip
    before = {name: torch.zeros_like(t) for name, t in given.items()}
    save_file({name: t.to(dtype).clone() for name, t in given.items()}, tmp_path / "m.safetensors")
    save_file({name: t.to(dtype).clone() for name, t in before.items()}, tmp_path / "base.safetensors")
    found = {r["name"]: r for r in nw.inspect(tmp_path / "m.safetensors", tmp_path / "base.safetensors", spectra=spectra).tensors}
    assert {name: r["dead_units"] for name, r in found.items() if "units" in r} == {
        "a.weight": 1, "h.c_attn.weight": 1, "experts.w": 2, "all.weight": 0,
    }  # fmt: skip
    finite = torch.where(w.to(dtype).isfinite(), w.to(dtype).double(), 0).norm(dim=1)
    for name in ("a.weight", "h.c_attn.weight", "experts.w"):
        assert found[name]["largest_unit"] == pytest.approx(float(finite.max()), rel=1e-5)
    assert all(found[name]["change"][key] is None for name in found for key in ("l2", "relative", "angle") if "bias" not in name)
    assert found["all.weight"]["change"]["nonfinite"] == 9 and found["h.c_attn.bias"]["change"]["l2"] == 0


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-300, 3e300, 2.0**-1000])
def test_float64_figures_hold_where_squares_leave_its_range(tmp_path: Path, scale: float) -> None:
    """Every figure scales with the tensor, and those that are quotients stay."""
    g = torch.Generator().manual_seed(0)
    small = {"a.weight": torch.randn(6, 4, generator=g), "h.c_attn.weight": torch.randn(4, 9, generator=g), "h.c_attn.bias": torch.ones(9),
             "experts.w": torch.randn(2, 3, 5, generator=g), "full.weight": torch.ones(4, 4), "zero.weight": torch.zeros(4, 4)}  # fmt: skip
    small["a.weight"][2] = 0
    for name, factor in (("usual", 1.0), ("far", scale)):
        save_file({n: t.double() * factor for n, t in small.items()}, tmp_path / f"{name}.safetensors")
        save_file({n: t.double() * factor * 3 for n, t in small.items()}, tmp_path / f"{name}-base.safetensors")
    usual, far = (nw.inspect(tmp_path / f"{n}.safetensors", tmp_path / f"{n}-base.safetensors") for n in ("usual", "far"))
    for one, other in zip(usual.tensors, far.tensors, strict=True):
        for key in ("l2", "rms", "largest_unit", "smallest_unit", "sigma"):
            if key in one:
                assert other[key] == pytest.approx(one[key] * scale, rel=1e-9), (one["name"], key)
        same = ("stable_rank", "effective_rank", "dead_units", "zeros", "outliers", "units")
        assert [other.get(key) for key in same] == [pytest.approx(one[key]) if key in one else None for key in same]
        assert other["change"]["relative"] == pytest.approx(one["change"]["relative"])
        assert other["change"]["l2"] == pytest.approx(one["change"]["l2"] * scale)
    assert far.results["total"]["l2"] == pytest.approx(usual.results["total"]["l2"] * scale)


def test_far_numbers_beside_near_ones_keep_their_units(tmp_path: Path) -> None:
    w = torch.ones(3, 4, dtype=torch.float64)
    w[0], w[2] = w[0] * 1e-250, w[2] * 1e250
    save_file({"a.weight": w, "h.c.weight": w.mT.contiguous(), "h.c.bias": torch.ones(3)}, tmp_path / "m.safetensors")
    found = [record for record in nw.inspect(tmp_path / "m.safetensors", spectra=False).tensors if "units" in record]
    assert len(found) == 2
    for record in found:
        assert (record["dead_units"], record["smallest_unit"], record["largest_unit"]) == (0, pytest.approx(2e-250), pytest.approx(2e250))


# ------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("given", [
    {"checkpoint": 123}, {"checkpoint": None}, {"checkpoint": b"m.safetensors"}, {"checkpoint": ["m.safetensors"]}, {"against": 3},
    {"model": "x"}, {"model": torch.nn.Linear}, {"policy": 3}, {"policy": "nowhere.yaml"}, {"checkpoint": "a\0b"},
], ids=str)  # fmt: skip
def test_arguments_of_another_kind_are_one_sentence(tmp_path: Path, given: dict[str, Any]) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(NormwiseError) as raised:
        nw.inspect(**({"checkpoint": tmp_path / "m.safetensors"} | given))
    assert "\n" not in str(raised.value)


def test_a_link_that_leads_nowhere_beside_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "last.ckpt")
    (tmp_path / "first.ckpt").symlink_to("gone")
    assert [record["name"] for record in nw.inspect(tmp_path).tensors] == ["a.weight"]
