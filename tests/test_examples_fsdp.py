"""The FSDP example as a reader would run it: on two processes, and from its checkpoint on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp.py"


def torchrun(processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(EXAMPLE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_on_two_processes_goes_on_from_its_checkpoint_on_one(tmp_path: Path) -> None:
    text, half = tmp_path / "text.txt", tmp_path / "half"
    text.write_text("the norm of every weight is where its user wants it; " * 60, encoding="utf-8")
    common = ["--text", str(text), "--steps", "8"]
    straight = torchrun(2, *common, "--save", str(half))
    resumed = torchrun(1, *common, "--resume", str(half))
    (start,), (end,), (again,) = (re.findall(p, out) for p, out in (
        (r"2 processes, held-out loss ([\d.]+)", straight), (r"step 8: held-out loss ([\d.]+)", straight),
        (r"step 8: held-out loss ([\d.]+)", resumed),
    ))  # fmt: skip
    assert float(end) < 0.9 * float(start)
    assert abs(float(again) - float(end)) < 2e-3, "the resumed run is another one"
    assert "every bound holds" in straight and "every bound holds" in resumed
    assert re.search(r"a step: [1-9]\d* collectives", straight) and "a step: 0 collectives" in resumed
