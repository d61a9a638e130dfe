"""The FSDP example as a reader would run it: on four processes, and from its checkpoint on two and on one."""

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


def test_a_run_on_four_processes_goes_on_from_its_checkpoint_on_two_and_on_one(tmp_path: Path) -> None:
    text, half = tmp_path / "text.txt", tmp_path / "half"
    text.write_text("the norm of every weight is where its user wants it; " * 60, encoding="utf-8")
    common = ["--text", str(text), "--steps", "8"]
    runs = {4: torchrun(4, *common, "--save", str(half)), **{n: torchrun(n, *common, "--resume", str(half)) for n in (2, 1)}}
    (start,) = re.findall(r"4 processes, held-out loss ([\d.]+)", runs[4])
    ends = {n: float(*re.findall(r"step 8: held-out loss ([\d.]+)", out)) for n, out in runs.items()}
    assert ends[4] < 0.9 * float(start)
    assert max(abs(ends[n] - ends[4]) for n in (2, 1)) < 2e-3, f"a resumed run is another one: {ends}"
    assert all("every bound holds" in out for out in runs.values())
    assert re.search(r"a step: [1-9]\d* collectives", runs[4]) and "a step: 0 collectives" in runs[1]
