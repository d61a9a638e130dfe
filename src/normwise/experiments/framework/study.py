"""What every study of the command line has in common: options, its place for finished runs, and how its results are delivered.

``opened`` gives a study its driver; ``deliver`` is a command from its options to its files: outputs are tried before any work, results are
saved before they are printed. Exit statuses are in docs/command-line.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from normwise import files
from normwise.errors import DataError, OutputError, StudyError, nearest
from normwise.experiments.framework import interrupts
from normwise.experiments.framework.driver import Driver
from normwise.experiments.framework.elsewhere import check_address
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.printing import printed, tell
from normwise.experiments.framework.progress import Progress, on_stderr
from normwise.experiments.framework.store import Store
from normwise.files import check_apart, check_file, check_folder, check_unread

# Every choice is made with this seed, or with those right after it; reported seeds count from 0, so no choice was made on their luck.
TUNING_SEED = 1000
MOST_SEEDS = 1000
MOST_TIMES = 16
"""What a race's horizon is multiplied or divided by at most."""
_MOST_OUTPUT = 1 << 30
"""Bytes of a file that a command wrote."""
Results = Mapping[str, Any]
Complaints = Callable[[Results], Sequence[str]]


@dataclass(frozen=True)
class Options:
    """What a study is asked to do; ``None`` stands for what the study or its budget has by default.

    Args:
        task: what is trained.
        data: a folder, a file or ``hf:NAME``; by default data that come with the packages.
        budget: a name among the study's budgets.
        only: what is studied, beside the baselines, which always are.
        seeds: how many are reported.
        workers: processes on this machine.
        state: the file of finished runs; they are kept in memory only for None.
        executor: a cluster in place of ``workers``: ``dask://HOST:PORT``, or any executor.
        size: ``"tiny"`` for models that train in seconds.
        hold: of ``prune``: whether weights under the lasso keep their layer's norm.
        horizon: of ``race``: the task's first horizon is multiplied by it.
    """

    task: str = "cnn"
    data: Path | str | None = None
    budget: str = "standard"
    only: Sequence[str] | None = None
    seeds: int | None = None
    workers: int = 1
    state: Path | None = None
    executor: Executor | str | None = None
    size: str = "standard"
    hold: bool = False
    horizon: float = 1.0

    def check(self, budgets: Mapping[str, Any]) -> None:
        """Before anything is loaded: StudyError for what no study can do."""
        if self.budget not in budgets:
            raise StudyError(f"There is no budget {self.budget!r}.{nearest(self.budget, budgets)}")
        for name, number in (("seeds", self.seeds), ("workers", self.workers)):
            if number is not None and not 1 <= number <= MOST_SEEDS:
                raise StudyError(f"{name} is {number}, but must be a whole number from 1 to {MOST_SEEDS}.")
        if not 1 / MOST_TIMES <= self.horizon <= MOST_TIMES:
            raise StudyError(f"the horizon's factor is {self.horizon:g}, but must be a number from 1/{MOST_TIMES} to {MOST_TIMES}.")
        if str(self.data) == "hf:":
            raise StudyError("data is 'hf:', but must be hf:NAME, a data set of the Hugging Face hub, or a file or folder.")
        if isinstance(self.executor, str):
            check_address(self.executor)

    def read(self) -> list[Path]:
        """The file or the folder of the user's data; nothing for bundled ones."""
        return [] if self.data is None else [Path(str(self.data).removeprefix("hf:"))]


def chosen(names: Sequence[str] | None, usual: Sequence[str] | None, table: Mapping[str, Any], what: str) -> list[str]:
    """The names in the table's order; where None are given the usual ones, where those are None all. StudyError for an unknown one."""
    names = usual if names is None else names
    for name in names or ():
        if name not in table:
            raise StudyError(f"There is no {what} {name!r}.{nearest(name, table)}")
    return [name for name in table if names is None or name in names]


@contextmanager
def opened(options: Options, progress: Progress | None = None) -> Iterator[Driver]:
    """A driver over the study's finished runs, on which no other study works within.

    Raises:
        StudyError: where another study works on ``options.state``.
        DataError: where that file is another kind of file, or cannot be locked.
    """
    told = progress or Progress()
    with locked(options.state, told.note):
        driver = Driver(Store(options.state), told, options.workers, options.executor)
        if driver.store.note:
            told.note(driver.store.note)
        try:
            yield driver
        finally:
            driver.close()
            told.stop()


# ---------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Outputs:
    """Where the results go beside the table: a JSON file, a folder for the page."""

    json: Path | None = None
    report: Path | None = None

    def default_state(self, name: str) -> Path:
        """Finished runs stand beside the results; in the current folder, as ``NAME.runs.jsonl``, where no output was asked for."""
        if self.json is not None:
            return self.json.with_suffix(".runs.jsonl")
        return (self.report or Path()) / f"{name}.runs.jsonl"


def command(study: Callable[..., Results], show: Callable[[Results], None], options: Options, outputs: Outputs, name: str,
            complaints: Complaints = lambda results: ()) -> bool:  # fmt: skip
    """A study as a command: ``study(options, progress)``, with its finished runs kept under ``name`` unless the options say where."""
    state = options.state or outputs.default_state(name)
    work = lambda: study(replace(options, state=state), on_stderr())    # noqa: E731
    return deliver(work, show, outputs, state, complaints=complaints, read=options.read())


def deliver(
    work: Callable[[], Results], show: Callable[[Results], None], outputs: Outputs, state: Path | None = None, *,
    complaints: Complaints = lambda results: (), units: str = "runs", more: Mapping[str, Path | None] | None = None,
    read: Iterable[Path] = (),
) -> bool:  # fmt: skip
    """``work()`` with its outputs checked before it; after it they are written, and only then ``show`` prints the results, so that
    nothing that happens to a terminal or a pipe costs them. state: where finished runs stand, if any are kept. complaints: what is wrong
    with the results, for standard error; False where there is something. units: what is kept one by one.
    more: files that ``work`` itself writes, by what they hold. read: files and folders that ``work`` reads, over which nothing is written.

    Raises OutputError, at the end of all this, for what could not be written or printed.
    """
    with _no_empty_folders() as made:
        made += check_outputs(outputs, state, more, read)
        if outputs.report is not None:
            import_module("normwise.experiments.report")  # an extra that is missing is told now, not after the work
        interrupts.say(partial(_how_to_go_on, state, units))
        results = work()
    with interrupts.held():
        written, failed = _save(results, outputs)
        interrupts.say(lambda: f"Interrupted: {_whereabouts(written, state, units)}.")
    try:
        printed(partial(_print, show, results, written), _whereabouts(written, state, units))
    except OutputError as error:
        failed.append(str(error).rstrip("."))
    wrong = complaints(results)
    for message in wrong:
        tell(message)
    if failed:
        raise OutputError(f"{'; '.join(failed)}.")
    return not wrong


def _save(results: Results, outputs: Outputs) -> tuple[dict[str, Path], list[str]]:
    """Where everything is now, and what is wrong with the rest."""
    written: dict[str, Path] = {}
    failed = []
    if outputs.json is not None:
        try:
            write_json(outputs.json, results)
            written["Results"] = outputs.json
        except (OSError, DataError) as error:
            failed.append(f"the results could not be written ({str(error).rstrip('.')})")
    if outputs.report is not None:
        try:
            written["Report"] = import_module("normwise.experiments.report").write(results, outputs.report)
        except (OSError, DataError) as error:
            failed.append(f"the report could not be written ({str(error).rstrip('.')})")
    return written, failed


def _print(show: Callable[[Results], None], results: Results, written: Mapping[str, Path]) -> None:
    show(results)
    for name, path in written.items():
        print(f"{name}: {path}")


def _whereabouts(written: Mapping[str, Path], state: Path | None, units: str) -> str:
    if written:
        return f"the results are in {' and '.join(map(str, written.values()))}"
    return f"finished {units} are in {state}" if state else "with --json FILE they are kept"


def _how_to_go_on(state: Path | None, units: str) -> str:
    if state is None:
        return "Interrupted: nothing is kept of it; start the same command again."
    if not state.exists() or not state.stat().st_size:
        return f"Interrupted before the first run was finished; the same command starts anew, and keeps its {units} in {state}."
    return f"Interrupted: finished {units} are in {state}; the same command resumes there."


def check_outputs(
    outputs: Outputs, state: Path | None, more: Mapping[str, Path | None] | None = None, read: Iterable[Path] = ()
) -> list[Path]:
    """DataError, before the work, where something cannot be written, or would take the place of something else. more, read: see `deliver`.

    Gives the folders that were made, the innermost first.
    """
    page = outputs.report
    pages = [] if page is None else [("the page", page / "index.html"), ("the results", page / "results.json")]
    places = [*(more or {}).items(), ("the finished runs", state), ("the results", outputs.json), *pages]
    sources = list(read)
    check_apart(places)
    check_unread(places, sources)
    # Whoever opens kept runs looks at them more closely.
    rewritten = [place for place in places if place[1] is not state]
    _check_folders_read(rewritten, [source for source in sources if files.what_is(source) == files.FOLDER])
    with _no_empty_folders() as made:
        made += [] if page is None else check_folder(page)
        for _, path in places:
            made += check_file(path)
    return made


@contextmanager
def _no_empty_folders() -> Iterator[list[Path]]:
    """What is refused within leaves none of the folders behind that were made for its results, and put into this list."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for folder in sorted(made, key=lambda one: len(one.parts), reverse=True):
            _remove_empty(folder)
        raise


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):    # there is something in it by now
        folder.rmdir()


def _check_folders_read(places: Iterable[tuple[str, Path | None]], folders: Sequence[Path]) -> None:
    """A file in a folder of data, or of a checkpoint, may be a part of that, unless an earlier command of ours wrote it."""
    for what, path in places:
        within = [] if path is None or files.what_is(path) != files.FILE else [one for one in folders if files.inside(path, one)]
        if path is not None and within and not _ours(path):
            raise DataError(
                f"{path}: {what} would be written over a file in {within[0]}, which this command reads, and it is none of normwise's; "
                "give another name."
            )


def _ours(path: Path) -> bool:
    """Whether a file is empty, or looks like what a command writes."""
    if path.suffix not in (".html", ".json", ".yaml") or not path.stat().st_size:
        return not path.stat().st_size
    found = files.content(path, _MOST_OUTPUT, "results, a file")
    if path.suffix == ".html":
        return b"<title>normwise " in found[:4096]
    if path.suffix == ".json":
        return found.lstrip().startswith(b"{") and b'"machine"' in found
    return found.startswith(b"# ") and (b"\n# Trained for " in found or found.endswith(b"\n[]\n"))


def write_json(path: Path, results: Results) -> None:
    """Writes the whole file or none of it. OutputError where it cannot be written."""
    files.replace(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
