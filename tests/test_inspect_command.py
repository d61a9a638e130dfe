"""``normwise inspect`` from its arguments to its files, and its benchmark on tiny inputs."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from normwise import cli
from normwise.inspection.architecture import from_function


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


def test_a_strangers_pickle_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: torch warns once in each."""
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"a": 1, "b": print}, protocol=4))
    done = subprocess.run([sys.executable, "-m", "normwise", "inspect", str(tmp_path / "m.pt")], capture_output=True, text=True)
    assert done.returncode == 2 and "nothing in it was run" in done.stderr and done.stderr.count("\n") == 1


def test_a_broken_bound_is_status_1_and_bad_input_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "m.safetensors")
    for radius, status in ((3.0, 0), (1.0, 1)):
        (tmp_path / "p.yaml").write_text(f"- max_norm: {{radius: {radius}, params: '*.weight'}}\n")
        assert cli.main(["inspect", str(tmp_path / "m.safetensors"), "--policy", str(tmp_path / "p.yaml")]) == status
    assert "a.weight[block 0]" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing.safetensors")]) == 2
    assert cli.main(["inspect", str(tmp_path / "m.safetensors"), "--model", "nowhere.at_all:make"]) == 2
    errors = capsys.readouterr().err
    assert "found nothing" in errors and "cannot be imported" in errors and "Traceback" not in errors


def test_a_function_gives_the_roles(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(4, 3).state_dict(), tmp_path / "m.pt")
    arguments = ["inspect", str(tmp_path / "m.pt"), "--json", str(tmp_path / "o.json"), "--model", f"{__name__}:linear"]
    assert cli.main(arguments) == 0
    assert not json.loads((tmp_path / "o.json").read_text())["guessed"]


def linear() -> torch.nn.Module:
    return torch.nn.Linear(4, 3)


def test_only_the_model_is_on_the_meta_device_not_what_its_module_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text("import torch\nSCALE = torch.ones(3)\ndef make():\n    return torch.nn.Linear(4, 3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert from_function("made_here:make").weight.is_meta    # type: ignore[union-attr]
    assert not sys.modules["made_here"].SCALE.is_meta


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_file_may_be_larger_than_the_memory_that_is_allowed(tmp_path: Path) -> None:
    """Neither loaded nor mapped: 1.5 GB of zeros that take no place on the disk, and half a GB of addresses beyond those of the imports."""
    shape, tensors = (2048, 2048), 96
    size = 4 * shape[0] * shape[1]
    head = {f"l{i}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]} for i in range(tensors)}
    text = json.dumps(head).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + tensors * size)
    code = (
        "import re, resource, sys, torch, normwise as nw\n"
        "from pathlib import Path\n"
        "torch.ones(4096, 4096).sum(); nw.inspect(sys.argv[2], spectra=False)\n"
        "now = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (512 << 20),) * 2)\n"
        "found = nw.inspect(sys.argv[1], spectra=False)\n"
        "print(len(found.tensors), sum(t['zeros'] for t in found.tensors))\n"
        "try: bytearray(1 << 30); print('no limit')\n"
        "except MemoryError: print('limited')\n"
    )
    torch.save({"a": torch.ones(3, 3)}, tmp_path / "small.pt")
    done = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "small.pt")], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(tensors), str(tensors * shape[0] * shape[1]), "limited"], done.stderr
