"""The FSDP example as a reader would run it: on several processes, and from its checkpoint on fewer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp.py"


def torchrun(processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(EXAMPLE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(("many", "fewer"), [(2, (1,)), (4, (2, 1))])
def test_a_run_resumes_from_its_checkpoint_on_fewer_processes(many: int, fewer: tuple[int, ...], tmp_path: Path) -> None:
    text, half = tmp_path / "text.txt", tmp_path / "half"
    text.write_text("the norm of every weight is where its user wants it; " * 60, encoding="utf-8")
    common = ["--text", str(text), "--steps", "8"]
    runs = {many: torchrun(many, *common, "--save", str(half)), **{n: torchrun(n, *common, "--resume", str(half)) for n in fewer}}
    (start,) = re.findall(rf"{many} processes, held-out loss ([\d.]+)", runs[many])
    ends = {n: float(*re.findall(r"step 8: held-out loss ([\d.]+)", out)) for n, out in runs.items()}
    assert ends[many] < 0.9 * float(start)
    assert max(abs(ends[n] - ends[many]) for n in fewer) < 2e-3, f"a resumed run is another one: {ends}"
    assert all("every bound holds" in out for out in runs.values())
    assert re.search(r"a step: [1-9]\d* collectives", runs[many]) and "a step: 0 collectives" in runs[1]
