"""``normwise inspect`` from its arguments to its files, and its benchmark on tiny inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from normwise import cli


def test_the_command_writes_tables_json_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {f"h.{i}.mlp.weight": torch.randn(12, 8) for i in range(3)} | {"h.0.b.bias": torch.zeros(4)}
    save_file(given, tmp_path / "m.safetensors")
    save_file({name: t * 1.1 for name, t in given.items()}, tmp_path / "base.safetensors")
    out, page = tmp_path / "out.json", tmp_path / "page"
    asked = ["inspect", str(tmp_path / "m.safetensors"), "--against", str(tmp_path / "base.safetensors"), "--json", str(out)]
    assert cli.main([*asked, "--report", str(page)]) == 0
    found = json.loads(out.read_text())
    assert [one["name"] for one in found["tensors"]] == ["h.0.b.bias", "h.0.mlp.weight", "h.1.mlp.weight", "h.2.mlp.weight"]
    assert found["total"]["change"]["relative"] == pytest.approx(0.1 / 1.1, rel=1e-5) and out.with_suffix(".tensors.jsonl").exists()
    html = (page / "index.html").read_text()
    assert "What changed" in html and "h.2.mlp.weight" in html and "http://" not in html.replace("http://www.w3.org", "")
    assert "h.*.mlp.weight (3)" in capsys.readouterr().out


def test_a_broken_bound_is_status_1_and_bad_input_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    for radius, status in ((3.0, 0), (1.0, 1)):
        (tmp_path / "p.yaml").write_text(f"- max_norm: {{radius: {radius}, params: '*.weight'}}\n")
        assert cli.main(["inspect", str(tmp_path / "m.safetensors"), "--policy", str(tmp_path / "p.yaml")]) == status
    assert "a.weight[block 0]" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing.safetensors")]) == 2
    assert cli.main(["inspect", str(tmp_path / "m.safetensors"), "--model", "nowhere.at_all:make"]) == 2
    errors = capsys.readouterr().err
    assert "found nothing" in errors and "cannot be made" in errors and "Traceback" not in errors


def test_a_function_gives_the_roles(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "m.pt")
    arguments = ["inspect", str(tmp_path / "m.pt"), "--json", str(tmp_path / "o.json"), "--model", f"{__name__}:linear"]
    assert cli.main(arguments) == 0
    assert not json.loads((tmp_path / "o.json").read_text())["guessed"]


def linear() -> torch.nn.Module:
    return torch.nn.Linear(4, 3)
