"""``normwise inspect`` as a command: finished tensors are kept, progress is shown, results become a table, a file and a page."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normwise.errors import DataError
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.printing import console, for_stream, show_table
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.framework.provenance import machine
from normwise.experiments.framework.store import Store
from normwise.experiments.framework.study import Outputs, Results, deliver
from normwise.inspection import Inspection, architecture, tables
from normwise.inspection.inspector import Work, prepared
from normwise.reports import finite

MEGABYTE = 1 << 20
NOTES = (
    "Norms are those of the finite entries, computed in fp32 (in float64 where the tensor is) and summed in float64.",
    "Outliers are entries above 6 times the RMS of their tensor. Dead units are units whose weights are all zero.",
    "Stable rank: ‖W‖² / σ₁² (Rudelson and Vershynin, 2007). Effective rank: exp of the entropy of σ / Σσ (Roy and Vetterli, 2007).",
    "Rank: how many singular values are above u·‖W‖, u the unit roundoff of the stored type, which is more than rounding can have made; of "
    "ΔW the sum of both tensors’.",
    "σ is from Gram matrices in float64; where their rounding leaves a rank open, from the triangular factor.",
)


@dataclass(frozen=True)
class Asked:
    """What the command was asked: a checkpoint, what it is compared with, a policy, and what tells its roles."""

    checkpoint: Path
    against: Path | None = None
    policy: Path | None = None
    config: Path | None = None
    model: str | None = None
    spectra: bool = True
    state: Path | None = None

    def architecture(self) -> nn.Module | None:
        if self.config is not None and self.model is not None:
            raise DataError("give --config or --model, not both: each says what the tensors are.")
        if self.config is not None:
            return architecture.from_config(self.config)
        return architecture.from_function(self.model) if self.model is not None else None

    def read(self, work: Work) -> list[Path]:
        """The files and folders that are read, those of the checkpoints among them."""
        config = [] if self.config is None else [self.config, self.config / "config.json"]
        policy = [] if self.policy is None else [self.policy]
        given = [one for one in (self.checkpoint, self.against) if one is not None]
        return [*work.read, *given, *config, *policy, *(architecture.source_files(self.model) if self.model is not None else ())]


def command(asked: Asked, outputs: Outputs) -> bool:
    """Inspects, and says whether the policy is kept; True without one."""
    # What is given is refused before anything is made for the results.
    given = prepared(asked.checkpoint, asked.against, asked.policy, asked.architecture(), asked.spectra)
    state = asked.state or (outputs.json.with_suffix(".tensors.jsonl") if outputs.json is not None else None)
    found: list[Inspection] = []

    def work() -> Results:
        found.append(_inspected(given, state, on_stderr("MB")))
        results: Results = finite({**found[0].results, "machine": machine(), "protocol": {"notes": list(NOTES)}})
        return results

    deliver(work, show, outputs, state, units="tensors", read=asked.read(given))
    return bool(found[0])


def _inspected(given: Work, state: Path | None, told: Progress) -> Inspection:
    with ExitStack() as stack:
        stack.enter_context(locked(state, told.note))
        store = Store(state)
        if store.note:
            told.note(store.note)
        stack.callback(told.stop)
        begun: list[int] = []

        def progress(name: str, size: int, total: int) -> None:
            if not begun:
                told.start(-(-total // MEGABYTE))
                begun.append(0)
            done = begun[0] + size
            told.advance(name, done // MEGABYTE - begun[0] // MEGABYTE)
            begun[0] = done

        return given.inspection(store, progress)


def show(results: Results) -> None:
    """Prints the tables: what is wider than the terminal goes on below."""
    import sys

    told = dict(results)
    out: Any = sys.stdout
    console(out)
    print(for_stream(tables.headline(told), out), *(for_stream(f"  {note}", out) for note in tables.notes(told)), "", sep="\n", file=out)
    show_table(tables.role_rows(told), out)
    show_table(tables.kind_rows(told), out)
    if told["policy"] is not None:
        print(for_stream(told["policy"]["says"], out), file=out)
