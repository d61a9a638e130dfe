"""Ctrl-C, SIGTERM, SIGKILL and dying workers at every stage of a study; terminals that take no output; two studies on one file."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import strike_command
from normwise import cli
from normwise.errors import DataError, StudyError
from normwise.experiments.bench import control
from normwise.experiments.compare import study as compare
from normwise.experiments.framework import interrupts
from normwise.experiments.framework import pool as pool_module
from normwise.experiments.framework import study as job
from normwise.experiments.framework.lock import locked
from normwise.experiments.framework.pool import open_pool
from normwise.experiments.gan import study as gan
from normwise.experiments.prune import study as prune
from normwise.experiments.race import study as race_module
from strike_command import COMMANDS

PATIENCE = 600.0    # with a loaded machine: what takes longer hangs
SCRIPT = Path(strike_command.__file__)
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked at through /proc")


def wait_for(true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def started(*command: str | Path, **env: str) -> subprocess.Popen[str]:
    """In a session of its own, whose processes are found by its number."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **env}, preexec_fn=_as_a_terminal_starts_it,
    )    # fmt: skip


def _as_a_terminal_starts_it() -> None:
    """Not as a shell starts what runs behind it, where Ctrl-C is ignored, and the command respects that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_so() -> None:
    """nohup, and what a shell runs behind it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "normwise", "bench", "unknown"], stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )    # fmt: skip
    wait_for(lambda: process.poll() is not None or watched(process))
    process.send_signal(signal.SIGHUP)
    assert "is not known" in process.communicate()[1] and process.returncode == 2


def processes(session: int) -> dict[int, str]:
    """What lives in a session: the command line by process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train, whatever started them: not Python's own helper."""
    return [pid for pid, line in processes(process.pid).items() if pid != process.pid and "resource_tracker" not in line]


def watched(process: subprocess.Popen[str]) -> bool:
    """Whether the process handles SIGTERM, which Python alone does not."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def lines_of(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in state.read_text().splitlines() if line] if state.exists() else []


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status and words of a process that ends by itself, and leaves nobody behind."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it hangs; so far it said {process.communicate()[1]!r}")
    wait_for(lambda: not processes(process.pid), 20)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------------------ interruption


@pytest.mark.parametrize(
    ("form", "number", "times"),
    [("-m normwise", signal.SIGINT, 3), ("the installed command", signal.SIGTERM, 1),
     *(pytest.param(*given, marks=pytest.mark.long) for given in (
         ("-m normwise", signal.SIGINT, 1), ("-m normwise", signal.SIGTERM, 3), ("-m normwise", signal.SIGHUP, 1),
         ("-mnormwise", signal.SIGINT, 1), ("the installed command", signal.SIGINT, 1)))],
)    # fmt: skip
def test_a_signal_while_torch_is_imported_is_one_sentence(form: str, number: signal.Signals, times: int, tmp_path: Path) -> None:
    script = tmp_path / "normwise"
    script.write_text("import sys\nfrom normwise.cli import main\nsys.exit(main())\n")
    process = started(*([script] if "installed" in form else form.split()), "compare", "cnn")
    wait_for(lambda: process.poll() is not None or watched(process))
    for _ in range(times):
        process.send_signal(number)
    assert ended(process) == (128 + number, "", "Interrupted before the work began.\n")


@pytest.mark.parametrize(
    ("argv", "orig", "is_ours"),
    [(["-m", "compare"], ["python", "-X", "dev", "-m", "normwise", "compare"], True), (["/usr/bin/normwise"], ["python", "x"], True),
     (["-m", "normwise"], ["python", "-m", "other", "normwise"], False), (["program.py"], ["python", "program.py"], False),
     (["/x/framework/worker.py"], ["python", "-P", "/x/framework/worker.py"], False),
     (["-c"], ["python", "-c", "x"], False)],
)    # fmt: skip
def test_a_program_that_imports_normwise_keeps_its_signals(
    argv: list[str], orig: list[str], is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig)
    monkeypatch.setattr(interrupts, "_start", lambda own: seen.append(own))
    interrupts.watch_command()
    assert seen == [True] * is_ours


@pytest.mark.long    # by default signals come while torch is imported and while workers are at work
@pytest.mark.parametrize("name", ["compare", "race", "gan"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_workers_start_is_one_sentence(name: str, number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal sends it, to all of them; three times in quick succession."""
    state = tmp_path / "state.jsonl"
    process = started(SCRIPT, *COMMANDS[name].split(), "--state", state)
    wait_for(lambda: process.poll() is not None or workers(process))
    for _ in range(3):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    status, out, err = ended(process)
    assert status == 128 + number and out == ""
    assert err.splitlines()[-1].startswith("Interrupted") and err.count("Interrupted") == 1


def test_ctrl_c_keeps_the_runs_under_way_and_ctrl_c_again_does_not(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    process = started(SCRIPT, *COMMANDS["compare"].split(), "--state", state, SLOWLY="1")
    wait_for(lambda: process.poll() is not None or lines_of(state))
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = ended(process)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == f"Interrupted: finished runs are in {state}; the same command resumes there."
    assert err.count("Interrupted") == 1 and len(lines_of(state)) == len({line["key"] for line in lines_of(state)}) >= 1
    assert "Stopping" not in err or len(lines_of(state)) >= 2, "what was under way is there"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_study_of_one_process_ends_in_the_middle_of_a_run(number: signal.Signals, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    process = started(SCRIPT, *COMMANDS["prune"].split(), "--workers", "1", "--state", state, SLOWLY="1")
    wait_for(lambda: process.poll() is not None or (tmp_path / ".state.jsonl.lock").exists())
    time.sleep(0.2)
    for _ in range(2):
        process.send_signal(number)
    status, out, err = ended(process)
    assert (status, out) == (128 + number, "") and err.count("Interrupted") == err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path != state], "no litter"


def test_a_guest_gives_the_program_around_it_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C pressed three times, also where Python would swallow the exception: in a finalizer."""

    class Finalized:
        def __del__(self) -> None:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)

    def measure() -> dict[str, Any]:
        Finalized()
        time.sleep(PATIENCE)
        return {}

    monkeypatch.setattr(control, "run", measure)
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    assert cli.main(["bench", "control"]) == 130
    assert stream.getvalue() == "Interrupted: nothing is kept of it; start the same command again.\n"
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_results_that_are_being_written_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write = job.write_json

    def struck(path: Path | None, found: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(path, found)

    target = tmp_path / "bench.json"
    monkeypatch.setattr(job, "write_json", struck)
    monkeypatch.setattr(control, "run", lambda: {"rows": [{"ms": 1.0}]})
    assert cli.main(["bench", "control", "--json", str(target)]) == 130
    assert json.loads(target.read_text()) == {"rows": [{"ms": 1.0}]}
    assert f"Interrupted: the results are in {target}." in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- workers


BIG = 1 << 22


def test_workers_do_what_is_asked_on_big_data_and_end_with_the_pool() -> None:
    with open_pool(2, partial(copy.copy, torch.zeros(BIG))) as executor:
        futures = [executor.submit(os.path.join, "a", str(n)) for n in range(20)]
        assert [future.result(PATIENCE) for future in futures] == [f"a/{n}" for n in range(20)]
        with pytest.raises(ZeroDivisionError) as caught:
            executor.submit(divmod, 1, 0).result(PATIENCE)
        assert "In a worker process" in caught.value.__notes__[0]
        assert executor.submit(len, executor.submit(os.getcwd).result(PATIENCE)).result(PATIENCE) == len(os.getcwd())
        pids = [process.pid for process in executor._processes]    # type: ignore[attr-defined]
        assert executor.submit(os.getpid).result(PATIENCE) in pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "none is left, not even as a zombie"
    assert not [thread for thread in threading.enumerate() if "_lead" in thread.name]


@pytest.mark.parametrize("delay", [0.0, 0.3, *(pytest.param(d, marks=pytest.mark.long) for d in (0.02, 2.0))])
def test_a_worker_that_dies_while_the_pool_starts_is_an_error_and_no_wait(delay: float) -> None:
    """The data are far larger than a pipe, in which the study would wait for ever for a reader."""
    with pytest.raises(StudyError, match="A worker process was killed"), open_pool(2, partial(copy.copy, torch.zeros(BIG))) as executor:
        time.sleep(delay)
        os.kill(executor._processes[0].pid, signal.SIGKILL)    # type: ignore[attr-defined]
        with pool_module.working(executor):
            pending = {executor.submit(time.sleep, 60) for _ in range(3)}
            for future in pool_module.finished(pending):
                future.result()
    for future in pending:
        assert future.done() and isinstance(future.exception(), BrokenProcessPool)


def test_what_the_set_up_raises_in_a_worker_is_raised_here(tmp_path: Path) -> None:
    executor = pool_module.Workers(1, partial(Path.read_bytes, tmp_path / "gone"))
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            executor.submit(os.getpid).result(PATIENCE)
    executor.kill()


def test_a_finished_run_is_kept_though_another_one_lost_its_worker() -> None:
    from concurrent.futures import Future

    good, bad = Future[int](), Future[int]()
    bad.set_exception(BrokenProcessPool())
    good.set_result(1)
    for _ in range(20):
        assert pool_module.finished({bad, good})[0] is good


@pytest.mark.long    # by default a pool shows it
@pytest.mark.parametrize("name", ["compare", "race", "gan"])
def test_a_study_whose_worker_dies_at_the_start_says_so(name: str, tmp_path: Path) -> None:
    process = started(SCRIPT, *COMMANDS[name].split(), "--state", tmp_path / "state.jsonl")
    wait_for(lambda: process.poll() is not None or workers(process))
    os.kill(workers(process)[0], signal.SIGKILL)
    status, out, err = ended(process)
    assert (status, out) == (2, "") and "A worker process was killed from outside" in err and err.splitlines()[-1].startswith("normwise: ")


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    code = "from normwise.experiments.framework import pool\nimport time\np = pool.Workers(1, dict)\np.submit(print, 1).result()\n" \
           "print('up', flush=True)\np.submit(time.sleep, 600)\ntime.sleep(600)"
    process = started("-c", code)
    assert process.stdout is not None and process.stdout.readline() == "up\n", "what a worker prints goes elsewhere"
    assert len(workers(process)) == 1
    process.kill()
    process.communicate()
    wait_for(lambda: not processes(process.pid), 30)


# ---------------------------------------------------------------------------------------------------------------- printing


class Pipe:
    """A standard output to be tried: of a few kinds, in an encoding; ``written`` is what arrived."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = Path("/dev/full")
        if kind == "closed":
            monkeypatch.setattr(sys, "stdout", None)
            return
        if kind == "full":
            raw: Any = self.path.open("wb")
        elif kind == "head":
            read, write = os.pipe()
            os.close(read)
            raw = os.fdopen(write, "wb")
        else:
            raw = io.BytesIO()
        self.raw, self.stream = raw, io.TextIOWrapper(raw, encoding="ascii" if kind == "head" else kind if kind != "full" else "utf-8")
        monkeypatch.setattr(sys, "stdout", self.stream)

    def written(self) -> str:
        return str(self.raw.getvalue().decode("ascii"))


KINDS = ["ascii", "closed", "full", "head"]


# Taken before a test puts anything in their place.
SHORT_RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "compare": partial(
        compare.compare, compare.Options(budget="quick", only=["l2", "adam"], seeds=2), budget=compare.Budget(9, 0.01, 2, 1)
    ),
    "race": partial(race_module.race, job.Options("lstm", budget="quick", only=[], seeds=1, size="tiny")),
    "gan": partial(gan.study, job.Options("gan", budget="quick", only=("clip_value",), seeds=1)),
    "prune": partial(prune.study, job.Options(budget="quick", seeds=1)),
    "bench": lambda: {"bench": "control", "rows": [{"case": "‖W‖ ≤ 3 µs ± ², é 字", "ms": 1.0}]},
}


@cache
def result_of(name: str) -> dict[str, Any]:
    """Results of a study, trained in seconds."""
    with pytest.MonkeyPatch.context() as patch, pool_module.one_thread():
        strike_command.shorten(patch.setattr, patch.setitem)
        return SHORT_RUNS[name]()


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every study has these results at once."""
    monkeypatch.setattr(compare, "compare", lambda *given: result_of("compare"))
    monkeypatch.setattr(race_module, "race", lambda *given: result_of("race"))
    monkeypatch.setattr(gan, "study", lambda *given: result_of("gan"))
    monkeypatch.setattr(prune, "study", lambda *given: result_of("prune"))
    monkeypatch.setattr(control, "run", lambda: result_of("bench"))


STUDIES = {"compare": "compare cnn", "race": "race lstm", "gan": "gan", "prune": "prune cnn", "bench": "bench control"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [pytest.param(s, marks=() if s in ("compare", "bench") else pytest.mark.long) for s in STUDIES])
def test_results_are_saved_whatever_becomes_of_the_terminal(
    name: str, kind: str, worked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    target = tmp_path / "out.json"
    pipe = Pipe(kind, monkeypatch)
    status = cli.main([*STUDIES[name].split(), "--json", str(target)])
    err = capfd.readouterr().err
    assert json.loads(target.read_text()) == json.loads(json.dumps(result_of(name)))
    if kind == "ascii":
        assert status == (1 if name == "compare" else 0), err    # two epochs teach nobody
        assert f"Results: {target}" in pipe.written() and len(pipe.written().splitlines()) > 3
    else:
        assert status == 3
        said = err.splitlines()[-1]
        assert said.startswith("normwise: ") and "printed" in said and said.endswith(f"the results are in {target}."), err
        assert "Traceback" not in err


def test_plain_characters_keep_the_columns_of_a_table(worked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe("ascii", monkeypatch)
    assert cli.main(["bench", "control"]) == 0
    lines = [line for line in pipe.written().splitlines() if line.strip()]
    [head], [row] = [line for line in lines if "case" in line], [line for line in lines if "W" in line]
    assert "||W|| <= 3 us +- 2, e ?" in row and len({len(line) for line in lines}) == 1
    assert row.index("1") == head.index("ms") + 1, "a figure stands to the right"


@pytest.mark.parametrize("kind", KINDS)
def test_policies_are_printed_or_it_is_said(kind: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pipe = Pipe(kind, monkeypatch)
    status = cli.main(["policies"])
    assert status == (0 if kind == "ascii" else 3)
    assert kind != "ascii" or "max_norm(" in pipe.written()
    assert (kind == "ascii") == (capfd.readouterr().err == "")


def test_help_that_cannot_be_printed_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    Pipe("full", monkeypatch)
    assert cli.main(["--help"]) == 3


@pytest.mark.parametrize(
    "redirection",
    [">&- 2>&- <&-", *(pytest.param(r, marks=pytest.mark.long) for r in ("| true", ">&-", ">/dev/full", "2>&-", "2>/dev/full"))],
)
def test_a_shell_redirects_to_nowhere(redirection: str, tmp_path: Path) -> None:
    """In a real process, whose end flushes what is left. `policies` says least, an unknown name is said on standard error."""
    if "2>" in redirection and ">&- 2" not in redirection:
        command, status = "bench unknown", 2
    else:
        command, status = "policies", 3
    line = f"set -o pipefail; '{sys.executable}' -m normwise {command} {redirection}"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, timeout=PATIENCE, check=False)
    assert done.returncode == status and done.stderr.count("\n") == ("2>" not in redirection) and "Traceback" not in done.stderr


def test_results_are_printed_where_they_cannot_be_saved(worked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "write_json", full)
    assert cli.main(["prune", "cnn", "--json", str(tmp_path / "out.json"), "--state", str(tmp_path / "state.jsonl")]) == 3
    out, err = capsys.readouterr()
    assert "smaller / full" in out and "Results:" not in out
    assert "the results could not be written" in err and "No space left on device" in err and err.count("\n") == 1


def test_progress_that_nobody_takes_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from normwise.experiments.framework.progress import Lines, on_stderr

    full = open("/dev/full", "w", encoding="ascii")    # noqa: SIM115 - its end is not to be seen
    Lines(full).note("a line ± ")
    monkeypatch.setattr(sys, "stderr", None)
    on_stderr().note("another")
    with suppress(OSError):
        full.close()


# ------------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_study_on_a_file_of_runs_is_refused_before_its_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for module in (job,):
        monkeypatch.setattr(module, "Store", lambda *given: pytest.fail("the study began"))
    target = tmp_path / "out.json"
    state = target.with_suffix(".runs.jsonl")
    state.touch()    # a link that leads nowhere is refused for that
    link = tmp_path / "link.jsonl"
    link.symlink_to(state.name)
    for given in (["--json", target], ["--state", state], ["--state", tmp_path / "." / state.name], ["--state", link]):
        with locked(state):
            assert cli.main([*COMMANDS[name].split(), *map(str, given)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert f"another study works on this file: process {os.getpid()} on " in err and "give another --state" in err
    assert {path.name for path in tmp_path.iterdir()} <= {state.name, link.name, target.name}, "no litter"


def test_the_lock_outlives_the_file_and_not_its_holder(tmp_path: Path) -> None:
    state, other = tmp_path / "state.jsonl", tmp_path / "other"
    state.write_text("")
    code = "import sys, time; from pathlib import Path; from normwise.experiments.framework.lock import locked\n" \
           f"with locked(Path({str(state)!r})):\n print('held', flush=True); time.sleep(600)"
    holder = started("-c", code)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    other.write_text("")
    os.replace(other, state)
    with pytest.raises(StudyError, match=rf"process {holder.pid} on .*, started 20\d\d-"), locked(state):
        pass
    holder.kill()
    holder.communicate()
    with locked(state), pytest.raises(StudyError), locked(state):
        pass
    with locked(state):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["state.jsonl"]


def test_many_at_once_are_never_two(tmp_path: Path) -> None:
    """Threads that take the lock and give it back as fast as they can, and so remove its file under one another's hands."""
    inside, most, taken = [0], [0], [0]
    guard = threading.Lock()

    def take() -> None:
        for _ in range(150):
            with suppress(StudyError), locked(tmp_path / "state.jsonl"):
                with guard:
                    inside[0] += 1
                    taken[0] += 1
                    most[0] = max(most[0], inside[0])
                with guard:
                    inside[0] -= 1

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and taken[0] > 20


def test_a_lock_that_cannot_be_made_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be made beside it"), locked(tmp_path / "no" / "folder" / "state.jsonl"):
        pass
    with locked(tmp_path / ("n" * 255)):
        pass
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(tmp_path / "state.jsonl", notes.append):
        pass
    assert len(notes) == 1 and "no locks on files" in notes[0]


def test_a_race_under_way_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    state = tmp_path / "runs.jsonl"
    with locked(state):
        assert cli.main(["race", "--state", str(state)]) == 2
    assert "expected the runs of a race" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- a hundred strikes


STRIKES = 25    # of each command


def timeless(value: Any) -> Any:
    """Results without what a clock says."""
    timed = {"machine", "timing", "cost", "setting", "rows", "seconds_to_baseline", "control_share", "distance_at_equal_time"}

    def counts(key: str) -> bool:
        return not (key in timed or "seconds" in key or "step_ms" in key or key in ("ms_a_sample",))

    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if counts(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def struck(name: str, state: Path, target: Path, rng: random.Random) -> str:
    """One start, one strike at a random moment of a random stage; what it was, or "finished"."""
    process = started(SCRIPT, *COMMANDS[name].split(), "--state", state, "--json", target)
    stage = rng.choice(["import", "start", "work", "work"])
    deaths = ["worker dies"] * 2 if stage != "import" else []
    kind = rng.choice(["kill", "Ctrl-C", "Ctrl-C three times", "SIGTERM", *deaths])
    before = len(lines_of_any(state))
    ready = {
        "import": lambda: watched(process), "start": lambda: workers(process), "work": lambda: len(lines_of_any(state)) > before + 1,
    }[stage]    # fmt: skip
    wait_for(lambda: process.poll() is not None or ready())
    time.sleep(rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 1.0)]))
    with suppress(ProcessLookupError, IndexError):
        if kind == "kill":
            process.kill()
        elif kind == "worker dies":
            os.kill(rng.choice(workers(process)), signal.SIGKILL)
        else:
            for _ in range(3 if "three" in kind else 1):
                send = os.killpg if rng.random() < 0.5 else os.kill
                send(process.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT)
                time.sleep(rng.choice([0.0, 0.0, 0.1]))
    status, _, err = ended(process)
    expected = {"kill": -9, "worker dies": 2, "SIGTERM": 143}.get(kind, 130)
    done = 1 if name == "compare" else 0    # two epochs teach nobody
    assert status in (expected, done), (kind, stage, status, err)
    if status == expected and kind != "kill":
        assert err.count("Interrupted") + err.count("normwise: A worker process was killed") == 1, err
    return "finished before it" if status == done else f"{kind}, at its {stage}"


def lines_of_any(state: Path) -> list[str]:
    return [line for line in state.read_text().splitlines() if line] if state.exists() else []


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hundred_strikes_and_the_results_are_those_of_a_quiet_run(name: str, tmp_path: Path, coverage: Callable[..., None]) -> None:
    """Kill, Ctrl-C, SIGTERM, a worker's death: no hang, no traceback, no process left, no run twice, no other result."""
    quiet = tmp_path / "quiet.json"
    done = started(SCRIPT, *COMMANDS[name].split(), "--json", quiet)
    ended(done)
    whole, rng, study = timeless(json.loads(quiet.read_text())), random.Random(name), 0
    for _ in range(STRIKES):
        state, target = tmp_path / f"{study}.jsonl", tmp_path / f"{study}.json"
        what = struck(name, state, target, rng)
        print(name, what, flush=True)
        coverage("strikes: 0 hangs, 0 tracebacks, 0 orphans, 0 differing resumes", what.rpartition(",")[0] or what, name)
        if what == "finished before it":
            assert timeless(json.loads(target.read_text())) == whole
            study += 1
    state, target = tmp_path / f"{study}.jsonl", tmp_path / f"{study}.json"
    ended(started(SCRIPT, *COMMANDS[name].split(), "--state", state, "--json", target))
    assert timeless(json.loads(target.read_text())) == whole
    for path in tmp_path.glob("*.jsonl"):
        keys = [json.loads(line)["key"] for line in lines_of_any(path) if line.endswith("}") and "race facts" not in line]
        assert len(keys) == len(set(keys)), "no run was kept twice"


def test_a_request_to_end_that_comes_with_the_end_changes_nothing() -> None:
    """Python hands the signals back while it takes itself down; a command that has delivered its results must not die of one there."""
    code = """
import os, signal, sys
from normwise import cli
class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
sys.argv, sys.modules["last"] = ["normwise", "policies"], Last()
cli.command()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("agc(")
