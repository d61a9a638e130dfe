"""``normwise advise`` as a command: the user's function is called, the probe shows its progress, the answer is printed and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normwise import files
from normwise.advice import Advice, advise
from normwise.advice.advisor import check_goal
from normwise.errors import DataError, a_kind_of, need
from normwise.experiments.framework.printing import for_stream
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.framework.study import Outputs, Results, deliver
from normwise.inspection import architecture

WANTED = "the function must return a torch.nn.Module, or (module, batches, loss)"


@dataclass(frozen=True)
class Files:
    """Where the answer is written; None for nowhere."""

    yaml: Path | None = None
    python: Path | None = None
    json: Path | None = None


class Told:
    """Batches that show how many were taken; everything else about them is the user's object."""

    def __init__(self, batches: Any, told: Progress, steps: int) -> None:
        self.batches, self.told, self.steps = batches, told, steps

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.batches)
        self.told.start(self.steps)
        for k, batch in enumerate(source, 1):
            yield batch
            self.told.advance(f"batch {k}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def command(where: str, goal: str, steps: int, copy: bool, out: Files) -> None:
    """Advises on the model that the function ``where`` makes."""
    check_goal(goal)    # before the model is built
    if out.yaml is not None:
        need("yaml", "yaml", what="--yaml")
    found: list[Advice] = []

    def work() -> Results:
        model, batches, loss = _parts(architecture.called(where), where)
        told = on_stderr("batches")
        try:
            shown = None if batches is None else Told(batches, told, steps) if hasattr(batches, "__iter__") else batches
            found.append(advise(model, goal, batches=shown, loss=loss, steps=steps, copy=copy, made_by=where))
        finally:
            told.stop()
        if out.yaml is not None:
            files.replace(out.yaml, found[0].yaml().encode())
        if out.python is not None:
            files.replace(out.python, found[0].python().encode())
        results: Results = json.loads(found[0].to_json())
        return results

    more = {"the policy": out.yaml, "the code": out.python}
    deliver(work, lambda results: _show(found[0]), Outputs(out.json), more=more, read=architecture.source_files(where))


def _parts(made: Any, where: str) -> tuple[nn.Module, Any, Any]:
    if isinstance(made, nn.Module):
        return made, None, None
    if isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module):
        return made
    what = f"a tuple of {len(made)}" if isinstance(made, tuple) else a_kind_of(made)
    raise DataError(f"{where!r} returned {what}: {WANTED}.")


def _show(advice: Advice) -> None:
    print(for_stream(str(advice), sys.stdout))
    if advice.probe is not None:
        print("", for_stream(str(advice.probe), sys.stdout), sep="\n")
    print("", for_stream(advice.python(), sys.stdout), sep="\n", end="")
