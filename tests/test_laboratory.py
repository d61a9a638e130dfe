"""The laboratory: plans on any executor, a Dask cluster that loses a worker, replays of the committed runs, and what may be claimed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest

from forks import forks
from normwise.errors import DataError, MissingExtraError, StudyError
from normwise.experiments import cells
from normwise.experiments.catalog.gan import GAN_STRATEGIES
from normwise.experiments.framework import elsewhere
from normwise.experiments.framework.figures import differ, share_interval
from normwise.experiments.framework.printing import NARROW, show_table
from normwise.experiments.framework.progress import Progress
from normwise.experiments.framework.store import Store
from normwise.experiments.framework.study import Options, Outputs, check_outputs, opened
from normwise.experiments.gan import run as gan_run
from normwise.experiments.gan import tables as gan_tables
from normwise.experiments.gan.study import BUDGETS as GAN_BUDGETS
from normwise.experiments.gan.study import cells_of
from normwise.experiments.prune import study as prune
from normwise.experiments.prune import tables as prune_tables
from normwise.experiments.prune.run import PruneRun
from normwise.experiments.race import protocol
from normwise.experiments.race.study import race, replay

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Doubled:
    """A run that takes a moment, to be kept by its number."""

    number: int
    form: ClassVar[dict[str, Any]] = {"twice": int, "process": int}
    amount: ClassVar[int] = 1
    unit: ClassVar[str] = "samples"

    def settings(self) -> dict[str, Any]:
        return {"kind": "doubled", "number": self.number}

    def told(self, result: dict[str, Any]) -> str:
        return str(self.number)

    def train(self, context: dict[str, int]) -> dict[str, Any]:
        time.sleep(0.05)
        return {"twice": context["factor"] * self.number, "process": os.getpid()}


def context() -> dict[str, int]:
    return {"factor": 2}


def doubling(start: int) -> Any:
    """Each next run depends on the result before it."""
    number = start
    for _ in range(4):
        found = yield [Doubled(number), Doubled(number + 1)]
        number = found[0]["twice"]
    return number


def doubled(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    with opened(options, progress) as driver:
        driver.on(context(), context)
        return driver.run({str(start): doubling(start) for start in (1, 3, 5)})


ALONE = {"1": 16, "3": 48, "5": 80}


# ------------------------------------------------------------------------------------------------- wherever runs run


def test_any_executor_gives_what_this_process_gives(tmp_path: Path) -> None:
    assert doubled(Options()) == ALONE
    with ProcessPoolExecutor(2, mp_context=forks) as executor:
        state = tmp_path / "runs.jsonl"
        assert doubled(Options(executor=executor, state=state)) == ALONE
        assert executor.submit(os.getpid).result() != os.getpid(), "it is left open"
    processes = {entry["result"]["process"] for entry in Store(state).entries}
    assert os.getpid() not in processes and len(processes) >= 1


@pytest.mark.parametrize("address", ["localhost:8786", "dask://", "dask://localhost", "dask://localhost:x", "ray://localhost:1"])
def test_an_address_that_is_none_is_one_sentence(address: str) -> None:
    with pytest.raises(StudyError, match="is no address of a cluster"):
        race(Options("gpt", executor=address))


def test_without_distributed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"distributed.*normwise\[dask\]"):
        race(Options("gpt", executor="dask://localhost:8786"))


def test_a_worker_of_another_version_is_refused() -> None:
    with pytest.raises(StudyError, match="install the same everywhere"):
        elsewhere.train_there(b"", b"", ("0.0", "0.0"))


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two worker processes without a nanny that would bring them back."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path])), "OMP_NUM_THREADS": "1"}

    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", *words], env=env, cwd=folder, stdout=log, stderr=log)

    file = folder / "scheduler.json"
    with (folder / "log.txt").open("wb") as log:
        scheduler = start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                          "--scheduler-file", str(file))  # fmt: skip
        workers = []
        try:
            wait_for(lambda: file.exists() and file.stat().st_size > 0)
            address = json.loads(file.read_text())["address"]
            for _ in range(2):
                workers.append(start("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"))
            yield address.replace("tcp://", "dask://"), workers
        finally:
            for process in [*workers, scheduler]:
                process.kill()
                process.wait()


def wait_for(ready: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


class Killing(Progress):
    """Kills a worker after so many runs."""

    def __init__(self, workers: list[subprocess.Popen[bytes]], after: int) -> None:
        self.workers, self.left = workers, after

    def advance(self, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(self.workers[0].pid, signal.SIGKILL)


def lasting(value: Any) -> Any:
    """Results without what a clock says."""
    timed = {"machine", "data", "step_ms", "ms_a_sample", "seconds_share", "tuning_cost", "within_cost", "seconds"}
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in timed}
    return [lasting(item) for item in value] if isinstance(value, list) else value


@pytest.mark.long
def test_a_cluster_that_loses_a_worker_in_the_middle_ends_with_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A race on two worker processes, of which one is killed: the runs that it had are done by the other."""
    pytest.importorskip("distributed", reason="the extra 'dask'")
    monkeypatch.setitem(protocol.BUDGETS_2, "quick", protocol.Budget(3, 2, 0, 0.02, ("muon",), 1))
    monkeypatch.setattr(protocol, "RATIO", 0.5)
    options = {"task": "lstm", "budget": "quick", "size": "tiny", "only": []}
    alone = lasting(json.loads(json.dumps(race(Options(**options)))))
    state = tmp_path / "runs.jsonl"
    with cluster(tmp_path) as (address, workers):
        assert doubled(Options(executor=address, state=tmp_path / "doubled.jsonl")) == ALONE
        found = race(Options(**options, executor=address, state=state), Killing(workers, 4))
        assert workers[0].wait(10) == -signal.SIGKILL and workers[1].poll() is None
    assert lasting(json.loads(json.dumps(found))) == alone == lasting(json.loads(json.dumps(replay(state))))
    keys = [entry["key"] for entry in Store(state).entries if entry["settings"]["kind"] == "race"]
    assert len(keys) == len(set(keys)) > 8, "no run was kept twice"


def test_a_scheduler_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="the extra 'dask'")
    monkeypatch.setattr(elsewhere, "_CONNECTING", 0.5)
    with pytest.raises(StudyError, match="no Dask scheduler answers there"):
        doubled(Options(executor="dask://127.0.0.1:9"))


# ------------------------------------------------------------------------------- the committed runs, by the plans of today


def followed(plan: Any, store: Store) -> Any:
    """What a plan returns on kept runs alone; KeyError for a run that was not kept."""
    results = None
    while True:
        try:
            runs = plan.send(results)
        except StopIteration as stop:
            return stop.value
        results = [store.get(run.settings(), run.form) or pytest.fail(f"not kept: {run}") for run in runs]


def test_the_plan_of_the_gan_asks_for_the_runs_that_were_kept_and_says_what_was_said() -> None:
    """Every cell of the published study, from its raw runs: the same choices, figures and policies, to the last digit."""
    store, published = Store(RESULTS / "gan.runs.jsonl"), json.loads((RESULTS / "gan.json").read_text())
    first = next(e["settings"] for e in store.entries if e["settings"]["kind"] == "gan")
    plan = GAN_BUDGETS["standard"]

    def make(strategy: str, loss: str, numbers: Any, seed: int, full: bool) -> gan_run.GanRun:
        strengths = {name: value for name, value in numbers.items() if name != "lr"}
        own = {"strategy": strategy, "loss": loss, "lr": numbers["lr"], "strengths": strengths, "seed": seed, "full": full}
        return gan_run.GanRun(**{**{k: v for k, v in first.items() if k != "kind"}, **own})

    times = {(cell["strategy"], cell["loss"]): cell["step_ms"] for cell in published["cells"]}
    lines = []
    for strategy, loss in cells_of([], plan):
        own = {"trials": plan.trials, "again": plan.again, "seeds": plan.seeds}
        axes = GAN_STRATEGIES[strategy].tuned
        cell = followed(cells.tuned(strategy, loss, axes, partial(make, strategy, loss), gan_run.score, **own), store)
        lines.append(gan_tables.cell_results(cell, times[strategy, loss], times["nothing", loss]))
    assert json.loads(json.dumps(lines)) == published["cells"] and len(lines) == 27
    assert gan_tables.rows(lines) == published["rows"] and gan_tables.setting(published) == published["setting"]


@pytest.mark.parametrize("name", ["cnn-digits", "cnn-mnist", "resnet-digits", "resnet-cifar10", "resnet-cifar10-held"])
def test_the_plan_of_pruning_asks_for_the_runs_that_were_kept(name: str) -> None:
    store, published = Store(RESULTS / f"prune-{name}.runs.jsonl"), json.loads((RESULTS / f"prune-{name}.json").read_text())
    first = next(e["settings"] for e in store.entries if e["settings"]["kind"] == "prune")
    hold = published["protocol"].get("hold", False)

    def make(lr: float, strength: float, seed: int, full: bool = True, units: Any = None) -> PruneRun:
        own = {"lr": lr, "strength": strength, "seed": seed, "full": full, "units": dict(units or {}), "hold": hold and strength > 0}
        return PruneRun(**{**{k: v for k, v in first.items() if k != "kind"}, **own})

    lr, strength, rates, strengths = followed(prune.tuned(make, published["task"]), store)
    assert (lr, strength, len(rates), len(strengths)) == (
        published["lr"], published["strength"], len(published["rates"]), len(published["strengths"])
    )  # fmt: skip
    seeds = [followed(prune.one_seed(make, seed, lr, strength), store) for seed in range(published["protocol"]["seeds"])]
    assert seeds == published["seeds"] and prune.summary(seeds) == published["summary"]


# ------------------------------------------------------------------------------------------------- what may be claimed


def test_two_images_of_359_are_no_difference() -> None:
    """Three seeds whose means lie two images apart; thirty images are a difference, of the same part or of a larger one."""
    one, two, far = ([images / 359 for images in counts] for counts in ((348, 350, 349), (350, 352, 351), (318, 320, 319)))
    assert not differ(share_interval(one, 359), share_interval(two, 359))
    assert differ(share_interval(far, 359), share_interval(two, 359))
    assert differ(share_interval([0.972] * 3, 100_000), share_interval([0.978] * 3, 100_000)), "of 100000 images 0.6% is one"
    low, high = share_interval([1.0, 1.0, 1.0], 359)
    assert low < 0.99 < high <= 1.0, "no interval is a point, not even at the end"


def test_the_interval_of_one_seed_is_wilsons() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 50), (45, 50), (349, 359)):
        found = share_interval([right / count], count)
        told = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert found == pytest.approx((told.low, told.high), abs=1e-4)


def test_the_verdict_on_a_smaller_network_claims_no_more_than_that() -> None:
    published = json.loads((RESULTS / "prune-cnn-digits.json").read_text())
    said = prune_tables.verdict(published | {"test_images": 359})
    assert "no difference" in said and "% of the parameters" in said
    assert "right on" not in prune_tables.verdict(published), "of how many images is not known"


def test_the_verdict_of_a_gan_names_no_winner_where_the_intervals_overlap() -> None:
    def cell(strategy: str, *distances: float) -> dict[str, Any]:
        middle = sorted(distances)[len(distances) // 2]
        return {"strategy": strategy, "label": strategy, "loss": "hinge",
                "distance_at_equal_time": {"median": middle, "values": list(distances)}}  # fmt: skip

    base = cell("nothing", 0.10, 0.11, 0.12)
    [close] = gan_tables.verdict([base, cell("r1", 0.09, 0.10, 0.11)])
    [clear] = gan_tables.verdict([base, cell("r1", 0.05, 0.06, 0.07)])
    assert "no difference" in close and "no difference" not in clear


# ------------------------------------------------------------------------------------------------- tables, state files


def test_a_table_is_readable_at_80_columns_and_loses_nothing() -> None:
    rows = [{f"a column named {k}": f"value {k} of {name}" for k in range(9)} for name in ("one", "another", "a third one")]
    out = StringIO()
    show_table([{"name": name, **row} for name, row in zip(("x", "y", "z"), rows, strict=True)], out)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= NARROW
    assert all(value in out.getvalue() for row in rows for value in row.values())
    assert sum(line.startswith("x ") for line in lines) == sum(line.startswith("z ") for line in lines) > 1, "the first column is repeated"


def test_every_study_has_a_file_of_finished_runs() -> None:
    assert Outputs().default_state("race-gpt") == Path("race-gpt.runs.jsonl")
    assert Outputs(Path("a/b.json")).default_state("gan") == Path("a/b.runs.jsonl")
    assert Outputs(None, Path("page")).default_state("gan") == Path("page/gan.runs.jsonl")


def test_a_study_without_outputs_resumes_from_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from normwise import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(protocol.BUDGETS_2, "quick", protocol.Budget(1, 1, 0, 0.005, (), 1))
    command = ["race", "lstm", "--tiny", "--budget", "quick", "--workers", "1"]
    assert cli.main(command) == 0 and cli.main(command) == 0
    kept = Store(tmp_path / "race-lstm.runs.jsonl")
    keys = [entry["key"] for entry in kept.entries if entry["settings"]["kind"] == "race"]
    assert len(keys) == len(set(keys)) > 3
    tables = [line for line in capsys.readouterr().out.splitlines() if "   " in line or line.startswith("---")]
    assert len(tables) > 12 and max(map(len, tables)) <= NARROW


def test_outputs_that_would_take_each_others_place_are_refused_and_one_thing_may_be_asked_for_twice(tmp_path: Path) -> None:
    """``--json PAGE/results.json --report PAGE``, as `make run` has it, writes the same results to the same place."""
    page, state = tmp_path / "page", tmp_path / "runs.jsonl"
    check_outputs(Outputs(page / "results.json", page), state, {"the policy": tmp_path / "p.yaml", "the code": None})
    for outputs, more in (
        (Outputs(state), {}), (Outputs(tmp_path / "." / "runs.jsonl"), {}), (Outputs(page / "index.html", page), {}),
        (Outputs(tmp_path / "p.yaml"), {"the policy": tmp_path / "p.yaml"}), (Outputs(), {"the policy": state}),
        (Outputs(None, page), {"the policy": page / "results.json"}),
        (Outputs(), {"the policy": tmp_path / "p", "the code": tmp_path / "p"}),
    ):  # fmt: skip
        with pytest.raises(DataError, match="cannot be written to one place; give two files"):
            check_outputs(outputs, state, more)
