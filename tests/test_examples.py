"""The examples run as a reader would run them, and end as they say they do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_attach_ends_with_every_bound_verified():
    done = subprocess.run([sys.executable, EXAMPLES / "attach.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    accuracies = [float(a) for a in re.findall(r"accuracy ([\d.]+)%", done.stdout)]
    verified = re.findall(r"(\d+) blocks under (\d+) rules? measured in float64: every bound holds", done.stdout)
    assert len(accuracies) == 3
    assert min(accuracies) > 95, done.stdout
    assert verified == [("130", "1"), ("130", "1"), ("133", "2")]
    assert "broken" not in done.stdout


@pytest.mark.long
def test_lora_ends_with_every_unit_within_a_tenth_of_its_base():
    done = subprocess.run([sys.executable, EXAMPLES / "lora.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "384 blocks under 1 rule measured in float64: every bound holds" in done.stdout
    assert float(re.findall(r"went ([\d.]+)% of its length", done.stdout)[0]) <= 10.0


@pytest.mark.long
def test_hugging_faces_trainer_learns_under_rules():
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    done = subprocess.run([sys.executable, EXAMPLES / "hf_trainer.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+), norm of the update", done.stdout)]
    assert len(losses) == 5 and losses[-1] < 0.1 and "every bound holds" in done.stdout


@pytest.mark.long
def test_lightning_fits_under_rules():
    pytest.importorskip("lightning", reason="needs lightning")
    done = subprocess.run([sys.executable, EXAMPLES / "lightning_fit.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [accuracy] = [float(a) for a in re.findall(r"accuracy ([\d.]+)%", done.stdout)]
    assert accuracy > 95 and "every bound holds" in done.stdout
