"""The command line: exit statuses, one sentence for what is wrong, files that are checked before the work and written after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import normwise
from normwise import cli
from normwise.experiments.compare import study as compare_study
from normwise.experiments.compare.study import BUDGETS, Budget
from normwise.experiments.framework import driver
from normwise.experiments.framework import study as job
from normwise.experiments.race import study as race_study
from normwise.experiments.tasks.data.readers import read_digits
from normwise.policy import NAMED, Policy

TINY = Budget(trials=9, scale=0.003, marks=2, rounds=1)
FEW = ("--budget", "quick", "--only", "max_norm,adam", "--workers", "1")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "quick", TINY)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "open_pool", lambda *given: pytest.fail("runs were started"))


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a bad command says: exit status 2 and one line on standard error, nothing else."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("normwise: ") and "Traceback" not in err
    return err


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare", "the following arguments are required: TASK"),
        ("compair cnn", "invalid choice"),
        ("compare cn", "There is no task 'cn'. Did you mean 'cnn'?"),
        ("compare cnn --budget long-ish", "There is no budget 'long-ish'."),
        ("compare cnn --only max-norm", "strategy or optimizer 'max-norm' is not known. Did you mean 'max_norm'?"),
        ("compare cnn --only ,", "No strategy or optimizer was given"),
        ("compare cnn --seeds 0", "'0' is not a whole number >= 1"),
        ("compare cnn --seeds three", "'three' is not a whole number >= 1"),
        ("compare cnn --workers -2", "'-2' is not a whole number >= 1"),
        ("compare cnn --nonsense", "unrecognized arguments: --nonsense"),
        ("compare cnn --data hf:", "data is 'hf:', but must be hf:NAME"),
        ("prune cnn --only x", "unrecognized arguments: --only x. See normwise prune --help."),
        ("--nonsense", "unrecognized arguments: --nonsense. See normwise --help."),
        ("race cnn --horizon x", "'x' is no number: give one from 1/16 to 16, as 0.5 or 2. See normwise race --help."),
        ("race cnn --horizon nan", "must be a number from 1/16 to 16"),
        ("race cnn --tiny --half", "--tiny and --half are two sizes of one network: give one of them. See normwise race --help."),
        ("compare cnn --data /no/such/folder", "/no/such/folder: found nothing, expected a folder"),
        ("bench contrl", "Benchmark 'contrl' is not known. Did you mean 'control'?"),
        ("policies /no/such/file.yaml", "/no/such/file.yaml"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], no_work: None, arguments: str, message: str
) -> None:
    assert message in sentence(capsys, *arguments.split())


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "compare" in capsys.readouterr().err


def test_damaged_data_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, no_work: None) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "train.parquet: expected a parquet file" in sentence(capsys, "compare", "cnn", "--data", tmp_path)


@pytest.mark.parametrize("option", ["--json", "--report", "--state"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, no_work: None, option: str
) -> None:
    (tmp_path / "file").write_text("kept")
    assert "cannot be written" in sentence(capsys, "compare", "cnn", *FEW, option, tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_in_place_of_a_file_is_told_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path, no_work: None) -> None:
    assert "give the name of a file in it" in sentence(capsys, "compare", "cnn", *FEW, "--json", tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="only a user who is not root can be refused by permissions")
def test_a_folder_without_permission_is_told_before_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path, no_work: None) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in sentence(capsys, "compare", "cnn", *FEW, "--report", tmp_path)


def test_a_foreign_state_file_is_left_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path, no_work: None) -> None:
    (tmp_path / "state").write_text("shopping list\nmilk")
    assert "another kind of file" in sentence(capsys, "compare", "cnn", *FEW, "--state", tmp_path / "state")
    assert (tmp_path / "state").read_text() == "shopping list\nmilk"


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_work: None) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(compare_study, "load_task", lambda *given, **named: read_digits())
    assert "reading the bundled digits needs sklearn, which cannot be found here: pip install 'normwise[study]'" in sentence(
        capsys, "compare", "cnn", *FEW)


def test_the_installed_command_exits_2_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-m", "normwise", "compare", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "normwise: There is no task 'nothing'. Allowed: cnn, decoder, gpt, gru, lstm, mixer, plain, resnet, resnet_gn, tabular, unet, "
        "vit.\n"
    )


# -------------------------------------------------------------------------------------------------------------- results


def test_compare_writes_its_files_and_says_what_is_wrong_with_the_baseline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: None
) -> None:
    target = tmp_path / "new" / "results.json"
    status = cli.main(["compare", "cnn", *FEW, "--json", str(target), "--report", str(tmp_path / "page"), "--seeds", "2"])
    results = json.loads(target.read_text())
    assert {cell["strategy"] for cell in results["cells"]} == {"nothing", "max_norm"}
    assert (tmp_path / "page" / "index.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert target.with_suffix(".runs.jsonl").exists()
    out, err = capsys.readouterr()
    for word in ("nothing", "max-norm", "test %", str(target), "index.html"):
        assert word in out
    assert status == 1  # one epoch of 128 images teaches nobody
    assert "The baseline with adam reaches" in err


def fake(breaches: list[str], defects: list[str]) -> dict[str, Any]:
    return {"cells": [{"breaches": []}, {"breaches": breaches}], "baseline_defects": defects}


@pytest.mark.parametrize(("breaches", "defects", "status"), [([], [], 0), (["head.weight is 2"], [], 1), ([], ["the baseline"], 1)])
def test_a_broken_bound_or_an_untrained_baseline_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], breaches: list[str], defects: list[str], status: int
) -> None:
    monkeypatch.setattr(compare_study, "compare", lambda *given: fake(breaches, defects))
    monkeypatch.setattr(compare_study, "show", lambda *given: None)
    assert cli.main(["compare", "cnn"]) == status
    assert capsys.readouterr().err.splitlines() == defects + breaches


@pytest.mark.parametrize("arguments", ["race lstm", "race --state kept"])
def test_a_bound_that_a_race_breaks_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str
) -> None:
    ends = [{"breaches": ["head.weight is 2"]}, {"breaches": []}, {"breaches": ["head.weight is 2"]}]
    for name in ("race", "replay"):
        monkeypatch.setattr(race_study, name, lambda *given: {"contenders": [{"ends": ends}, {"ends": []}]})
    monkeypatch.setattr(race_study, "show", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 1
    assert capsys.readouterr().err == "head.weight is 2\n"


def test_the_json_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    target.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        job.write_json(target, {"nan": float("nan")})
    assert target.read_text() == "before"
    job.write_json(target, {"a": 1})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.long
def test_ctrl_c_keeps_the_finished_runs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    command = [sys.executable, "-m", "normwise", "compare", "cnn", "--budget", "quick", "--only", "l2,adam",
               "--workers", "2", "--state", str(state)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: state.exists() and state.stat().st_size > 0)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process of the group gets it
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"finished runs are in {state}" in err
    kept = set(filter(None, state.read_text().splitlines()))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = list(filter(None, state.read_text().splitlines()))
    assert len(lines) == len(set(lines)) == 2 * (9 + 3) + 1
    assert kept < set(lines)


def wait_for(true: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------- bench, policies


def test_policies_lists_every_named_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policies"]) == 0
    listed = [line.partition("(")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(NAMED)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_policies_explains_a_rule_with_an_example_that_is_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(["policies", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"nw.{name}(") and str(NAMED[name].__doc__).strip().splitlines()[0] in printed
    short, fields = (textwrap.dedent(part.split(":\n", 1)[1]) for part in printed.split("\n\n")[-2:])
    assert Policy.from_yaml(short) == Policy.from_yaml(fields) and len(Policy.from_yaml(short)) >= 1


def test_policies_of_an_unknown_name_lists_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown named rule 'max_nrm'. Did you mean 'max_norm'? Allowed: agc" in sentence(capsys, "policies", "max_nrm")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"normwise {normwise.__version__}\n"


def test_policies_explains_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import normwise as nw

    nw.Policy([nw.max_norm(3.0), nw.clip_grad_norm(1.0)]).save(tmp_path / "policy.yaml")
    assert cli.main(["policies", str(tmp_path / "policy.yaml")]) == 0
    out = capsys.readouterr().out
    assert "a valid policy of 2 rules" in out and "3" in out


def test_policies_names_the_line_of_a_broken_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("- action: clip_norm\n  radius: 3.0\n- action: clip_nrm\n  radius: 1.0\n")
    message = sentence(capsys, "policies", tmp_path / "policy.yaml")
    assert "line 3" in message and "clip_norm" in message


def test_bench_prints_and_writes_what_it_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normwise.experiments.bench import control

    measured = {"bench": "control", "rows": [{"case": "one", "own_ms": 1.23456}, {"case": "two", "own_ms": 2.0}]}
    monkeypatch.setattr(control, "run", lambda: measured)
    assert cli.main(["bench", "control", "--json", str(tmp_path / "bench.json")]) == 0
    assert json.loads((tmp_path / "bench.json").read_text()) == measured
    out = capsys.readouterr().out
    assert "own_ms" in out and "1.235" in out


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("control", {"case": "a", "ratio": 1.51, "bar": 1.5, "bar_is": "at most"}, "a: ratio is 1.51, the bar at most 1.5."),
        ("control", {"case": "a", "ratio": 2.9, "bar": 3.0, "bar_is": "at least"}, "a: ratio is 2.9, the bar at least 3."),
        ("control", {"case": "a", "ratio": float("nan"), "bar": 3.0, "bar_is": "at most"}, "a: ratio is nan, the bar at most 3."),
        ("control", {"case": "a", "ratio": 1.5, "bar": 1.5, "bar_is": "at most"}, ""),
        ("step", {"preset": "Muon", "state_bytes_per_parameter": 4.0}, ""),
        ("cap", {"network": "gpt", "share": 0.04, "bar": 0.03}, "gpt: share is 0.04, the bar at most 0.03."),
        ("cap", {"network": "gpt", "share": 0.01, "bar": 0.03, "largest_sigma_over_cap": 1.02, "sigma_bar": 1.01},
         "gpt: largest_sigma_over_cap is 1.02, the bar at most 1.01."),
        ("polar", {"input": "x", "faster": 1.0, "bar": 2.0, "ours_max": 0.1, "torch_max": 0.2}, "x: faster is 1, the bar at least 2."),
    ],
)  # fmt: skip
def test_a_missed_bar_is_named_and_exit_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, row: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(f"normwise.experiments.bench.{name}.run", lambda: {"rows": [{"case": "not measured"}, row]})
    assert cli.main(["bench", name]) == bool(said)
    assert capsys.readouterr().err == (f"{said}\n" if said else "")


def test_bench_lists_its_benchmarks_a_line_each_and_a_new_file_is_one_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normwise.experiments.bench import runner

    assert cli.main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cap", "control", "inspect", "peft", "polar", "probe", "step", "trainer"]
    assert all(20 < len(line) <= 80 for line in lines)
    (tmp_path / "newone.py").write_text('"""``normwise bench newone``: what a new one costs."""\n')
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "runner.py"))
    assert cli.main(["bench"]) == 0
    assert capsys.readouterr().out == "newone   what a new one costs\n"
