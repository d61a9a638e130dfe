"""The GPT example as a reader would run it: its routing, and a resumed run that ends on the same weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "gpt.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=300, env=environment)


def test_a_resumed_gpt_ends_on_the_weights_of_the_uninterrupted_one(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the norm of every weight is where its user wants it; " * 60, encoding="utf-8")
    done = run("--text", str(text), "--steps", "4", "--save", str(tmp_path / "final.pt"))
    assert done.returncode == 0, done.stderr
    routed = dict(re.findall(r"^(\S+) .* (muon|adamw|adamw_undecayed) ", done.stdout, re.MULTILINE))
    assert len(routed) == 34    # every parameter; the tied head is the embedding
    assert routed["blocks.2.qkv.weight"] == routed["blocks.0.mlp.2.weight"] == "muon"
    assert routed["tokens.weight"] == "adamw" and routed["blocks.1.before_mlp.weight"] == "adamw_undecayed"
    assert "the resumed run ends on the same weights, bit for bit: yes" in done.stdout
    before, after = map(float, re.findall(r"held-out loss ([\d.]+) -> ([\d.]+)", done.stdout)[0])
    assert after < 0.9 * before
    state = torch.load(tmp_path / "final.pt", weights_only=True)
    assert state["step"] == 4 and state["optimizer"]["state"]


def test_a_text_that_is_too_short_is_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short", encoding="utf-8")
    done = run("--text", str(text))
    assert done.returncode != 0 and done.stderr.strip() == "the text has 5 characters; 660 or more are needed."
