"""Storages that several machines share: a trial whose process is gone is done again, PostgreSQL, workers of a Dask cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normwise.errors import StudyError
from normwise.experiments.tune import storage
from test_laboratory import cluster, wait_for
from test_tune import SMALL, alone, ask, lasting, stops, tuned

__all__ = ["alone"]    # the fixture
HERE = Path(__file__).parent
FEW = ["--steps", "8", "--trials", "12", "--seeds", "6", "--only", "max_norm,weight_decay,adam", "--workers", "2"]


@pytest.mark.long
def test_a_trial_whose_machine_is_gone_is_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also on an URL, where others may be at work: it is noticed by its missing signs of life, and once only."""
    monkeypatch.setattr(storage, "BEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 1)
    options = ask("planted", storage=f"sqlite:///{tmp_path}/shared.db")
    stops.append(2)
    with pytest.raises(KeyboardInterrupt):
        tuned(options, replace(SMALL, trials=5))
    time.sleep(2.1)
    results = tuned(options, replace(SMALL, trials=5))
    rates = {t["number"]: t["numbers"]["lr"] for t in results["trials"]}
    assert sorted(rates) == [0, 1, 3, 4, 5] and sorted(rates.values()) == pytest.approx([1 / 27, 1 / 9, 1 / 3, 1, 3])
    assert rates[5] == pytest.approx(1 / 9)


def test_a_waiting_trial_that_another_machine_takes_leaves_no_other_in_its_place(tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path}/shared.db"
    study = storage.study_of(storage.opened(url), "s", {}, ["minimize"])
    study.enqueue_trial({"seed": 1})
    trials = storage.Trials(study, {}, alone=False)
    ask = study.ask

    def slowly(**given: Any) -> Any:
        other = optuna.load_study(study_name="s", storage=storage.opened(url)).ask()
        assert other.suggest_int("seed", 0, 9) == 1
        return ask(**given)

    study.ask = slowly    # type: ignore[method-assign]
    assert list(trials.lane(0, lambda trial: pytest.fail("a trial that nobody wants"), lambda result: (None, None), lambda: None)) == []
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "FAIL"] and trials.elsewhere()


def test_a_trial_whose_worker_is_killed_three_times_has_failed(tmp_path: Path) -> None:
    """It is taken up again twice, and the next one is another."""
    study = storage.study_of(storage.opened(f"sqlite:///{tmp_path}/s.db"), "s", {}, ["minimize"])
    lost = {"state": "failed", "reason": "killed"}
    study.enqueue_trial({"x": 1})
    for _ in range(3):
        trials = storage.Trials(study, lost, alone=True)
        taken = next(trials.lane(1, lambda trial: trial.number, lambda result: (None, None), lambda: None))    # type: ignore[arg-type]
        assert taken == [0]
        trials.killed()
    trials = storage.Trials(study, lost, alone=True)
    study.enqueue_trial({"x": 2})
    assert next(trials.lane(2, lambda trial: trial.number, lambda result: (None, None), lambda: None)) == [1]    # type: ignore[arg-type]
    assert [trial.user_attrs["result"] for trial in trials.finished()] == [lost]


def test_a_worker_that_does_not_reach_the_study_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"a worker finds no study 's' in .*give a --storage that all workers reach"):
        storage.trial_of(f"sqlite:///{tmp_path}/elsewhere.db", "s", 0, 8)


def command(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "tune_machine.py"), "tune", "tune_machine:slow", *arguments]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A server of its own, on a port of its own; its programs refuse to be run by root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(p) for p in [shutil.which("initdb")] if p]
    if not found:
        pytest.skip("PostgreSQL's server is not installed")
    pytest.importorskip("psycopg")
    place, port = folder / "pg", 20_000 + os.getpid() % 20_000
    as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_other:
        place = Path("/tmp") / f"normwise-pg-{os.getpid()}"    # pytest's own folders are root's alone
    try:
        subprocess.run([*as_other, found[-1], "-D", place, "-A", "trust", "-U", "me"], check=True, capture_output=True, cwd="/")
        options = ["-D", place, "-p", str(port), "-c", "unix_socket_directories=", "-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen([*as_other, found[-1].with_name("postgres"), *options], stderr=subprocess.DEVNULL, cwd="/")
        try:
            import psycopg

            def answers() -> bool:
                try:
                    psycopg.connect(f"postgresql://me@127.0.0.1:{port}/postgres").close()
                except psycopg.OperationalError:
                    return False
                return True

            wait_for(answers)
            yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait()
    finally:
        subprocess.run([*as_other, "rm", "-rf", place], check=True, cwd="/")


def finished(url: str) -> int:
    import psycopg

    try:
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            row = connection.execute("select count(*) from trials where state in ('COMPLETE', 'PRUNED')").fetchone()
            return int(row[0]) if row else 0
    except psycopg.Error:
        return 0


@pytest.mark.long
def test_machines_share_a_study_on_postgresql_and_one_of_them_may_die(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        first = command([*FEW, "--storage", url, "--json", "first.json"])
        wait_for(lambda: finished(url) >= 3)
        others = [command([*FEW, "--storage", url, "--json", f"{name}.json"]) for name in ("second", "third")]
        wait_for(lambda: finished(url) >= 8)
        first.kill()
        told = [other.communicate(timeout=200) for other in others]
        assert [other.returncode for other in others] == [0, 0], told
        one, other = (json.loads(Path(f"{name}.json").read_text()) for name in ("second", "third"))
        assert lasting({**one, "policy_file": "", "next": ""}) == lasting({**other, "policy_file": "", "next": ""})
        assert 12 <= len(one["trials"]) <= 20
        assert "max_norm" in one["answer"]["label"] and one["answer"]["verdict"]["significant"]
        refused = command([*FEW, "--storage", url, "--seed", "3"])
        _, err = refused.communicate(timeout=100)
        assert refused.returncode == 2 and "was begun with another seed" in err


@pytest.mark.long
def test_a_server_that_goes_away_is_one_sentence(tmp_path: Path) -> None:
    with postgres(tmp_path) as url:
        going = command([*FEW, "--storage", url])
        wait_for(lambda: finished(url) >= 3)
    _, err = going.communicate(timeout=100)
    assert going.returncode == 2 and "does not answer any more" in err and "Traceback" not in err


@pytest.mark.long
def test_workers_of_a_cluster_give_what_one_process_gives(tmp_path: Path) -> None:
    """One trial at a time, so that the order in which they end is that of one process; the storage is shared by its path."""
    here = tuned(ask("planted", storage="here.db"))
    with cluster(tmp_path) as (address, _):
        there = tuned(ask("planted", storage=str(tmp_path / "there.db"), executor=address))
        more: Any = tuned(ask("planted", storage=f"sqlite:///{tmp_path}/more.db", executor=address, workers=2), replace(SMALL, trials=12))
    assert lasting({**there, "tune": ""}) == lasting({**here, "tune": ""})
    assert len(more["trials"]) >= 12


def test_a_study_that_somebody_made_for_another_direction_is_refused(tmp_path: Path) -> None:
    """An empty one has nothing that says what it was begun with, and would be searched the wrong way."""
    optuna = pytest.importorskip("optuna")
    optuna.create_study(storage=f"sqlite:///{tmp_path}/one.db", study_name="E", direction="maximize")
    opened = storage.opened(f"sqlite:///{tmp_path}/one.db")
    with pytest.raises(StudyError, match="is there with the directions maximize, and minimize is asked for"):
        storage.study_of(opened, "E", {}, ["minimize"])
    assert storage.study_of(opened, "E", {}, ["maximize"]).user_attrs["asked"] == {}
