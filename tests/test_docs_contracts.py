"""What the pages promise is what the code does: tables of fields and statuses, options, blocks of code, policies that are printed."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import normwise as nw
import trainer_cases
from normwise import cli, files
from normwise.errors import DataError, NormwiseError, OutputError, PolicyError
from normwise.experiments.catalog.contenders import CONTENDERS
from normwise.experiments.catalog.gan import GAN_STRATEGIES as STRATEGIES
from normwise.experiments.catalog.optimizers import PRESETS, TORCH
from normwise.experiments.catalog.strategies import STRATEGIES as STRATEGIES_OF_COMPARE
from normwise.experiments.gan import tables as results
from normwise.experiments.tasks.data import readers
from normwise.low_precision import ROUNDINGS
from normwise.norms import FORMS, NORMS, SETS
from normwise.parameters.regex import LONGEST
from normwise.policy import listing, yaml_form
from normwise.policy.actions import ACTIONS
from normwise.policy.named import NAMED
from normwise.policy.rule import ON, Rule

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, its head left out."""
    below = f"\n{PAGES[page]}".split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert lines, (page, heading)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[0].splitlines()[2:]]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("page", [page for page in PAGES if re.search(r"\bnw\.", PAGES[page])])
def test_what_a_page_calls_nw_something_is_there_after_import_normwise(page: str) -> None:
    missing = []
    for name in sorted(set(re.findall(r"\bnw((?:\.[A-Za-z_]\w*)+)", PAGES[page]))):
        at: Any = nw
        for step in name[1:].split("."):
            try:
                at = getattr(at, step)
            except nw.MissingExtraError:
                break
            except AttributeError:
                missing.append(f"nw{name}")
                break
    assert missing == []


# ------------------------------------------------------------------------------------------------------- policies

FIELDS = {name: row for row in table("policies.md", "## Fields") for name in re.findall(r"`(\w+)`", row[0])}


def test_every_field_of_a_rule_is_in_the_table_and_no_other() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(Rule)}


def test_the_table_names_every_action_target_norm_block_and_rounding() -> None:
    assert quoted(FIELDS["action"][1]) == set(ACTIONS)
    assert quoted(FIELDS["on"][1]) == set(ON)
    assert quoted(FIELDS["norm"][1]) - {"project"} == {*NORMS, *FORMS, *SETS}
    assert set(nw.policy.rule.PER) <= quoted(FIELDS["per"][1])
    assert quoted(FIELDS["rounding"][1]) == set(ROUNDINGS)


def test_the_defaults_in_the_table_are_the_rules() -> None:
    rule = Rule(action="clip_norm", radius=1.0)
    assert quoted(FIELDS["params"][2]) == {f'"{nw.policy.rule.DEFAULT_PARAMS}"'}
    for name, default in (("norm", "l2"), ("per", "tensor"), ("rounding", "nearest")):
        assert FIELDS[name][2] == f"`{default}`" and Rule(action="clip_norm", radius=1.0) == Rule(
            **{"action": "clip_norm", "radius": 1.0, **({name: default} if name != "rounding" else {})}
        )
    assert (FIELDS["power"][2], FIELDS["rate"][2][0], FIELDS["tolerance"][2][0]) == ("1", "1", "0")
    assert nw.l1_penalty(0.1).power == 1 and rule.rate == 1 and not nw.spectral_cap(1.0).tolerance
    for action, targets in ((name, action.targets) for name, action in ACTIONS.items()):
        needed = {"cpr": {"radius": 1.0}, "qk_clip": {"radius": 100.0, "heads": 2}, "lmo": {}}.get(action)
        given = needed if needed is not None else {"radius": 1.0} if action in FIELDS["radius"][2] else {"strength": 1.0}
        made = Rule(action=action, **given)
        assert made.on == targets[0] == ("grad" if action == "lmo" else "weight")


@pytest.mark.parametrize("field", ["radius", "strength"])
def test_the_table_says_which_actions_need_a_number(field: str) -> None:
    needing = {name for name, action in ACTIONS.items() if action.needs == field}
    assert {action for action in ACTIONS if re.search(rf"\b{action}\b", FIELDS[field][2].split(";")[0])} == needing


def test_every_named_rule_is_in_the_table_with_its_arguments() -> None:
    """As the command prints them; docs/make.py writes the table, and this says that it was run."""
    rows = {row[0].strip("`") for row in table("policies.md", "## Named rules")}
    assert {head.split("(")[0] for head in rows} == set(NAMED)
    printed = {line.split(")  ", 1)[0] + ")" for line in listing.named_rules().splitlines()}
    assert rows == printed
    for head in rows:
        name, arguments = head.rstrip(")").split("(")
        taken = inspect.signature(NAMED[name]).parameters
        assert all(argument in taken for argument in arguments.split(", ") if argument)


def test_the_limits_of_a_file_are_the_readers() -> None:
    text = PAGES["policies.md"]
    size, rules, entries, levels = yaml_form.MOST_BYTES >> 10, yaml_form.MOST_RULES, yaml_form.MOST_NODES, yaml_form.MOST_DEPTH
    assert f"{size} KiB, {rules} rules, {entries:,} entries and {levels} levels" in text
    assert f"A selector has {LONGEST} characters at most" in text


# ------------------------------------------------------------------------------------------------------- two networks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_policy_of_a_gan_does_not_load_as_that_of_one_network(strategy: str) -> None:
    """Today's fault: the rules of both, one list after the other, loaded as one policy of four rules."""
    chosen = STRATEGIES[strategy]
    strengths = {axis.name: axis.value(0) for axis in chosen.axes}
    text = results.policy_yaml(strategy, strengths)
    rules, others = nw.Policy(chosen.rules(strengths)), nw.Policy(chosen.generator_rules(strengths))
    if not rules.rules:
        assert text == "" and not others.rules
    elif not others.rules:
        assert nw.Policy.from_yaml(text) == rules and text.startswith("# of the discriminator\n")
    else:
        with pytest.raises(PolicyError, match="one policy each of discriminator, generator: take the list"):
            nw.Policy.from_yaml(text)
        parts = yaml.safe_load(text)
        assert list(parts) == ["discriminator", "generator"]
        assert [nw.Policy.from_yaml(json.dumps(part)) for part in parts.values()] == [rules, others]


def test_committed_policies_are_those_of_the_code() -> None:
    found = json.loads((ROOT / "docs" / "results" / "gan.json").read_text())
    assert len(found["cells"]) == 27
    for cell in found["cells"]:
        assert cell["policy_yaml"] == results.policy_yaml(cell["strategy"], cell["strengths"])


# ------------------------------------------------------------------------------------------------------- the command line


def parsers() -> dict[str, argparse.ArgumentParser]:
    [commands] = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def test_the_page_names_every_command() -> None:
    heads = [row[0] for row in table("command-line.md", "# The command line")]
    assert {head.strip("`").split()[1] for head in heads} == set(parsers())


def test_every_command_and_option_that_a_page_speaks_of_exists() -> None:
    known = {name: {option for action in parser._actions for option in action.option_strings} for name, parser in parsers().items()}
    seen = set()
    for page, text in PAGES.items():
        for line in re.findall(r"`(normwise [^`]+)`", text) + re.findall(r"^(normwise .+)$", text, re.MULTILINE):
            parts = line.split()
            if parts[1] == "COMMAND":
                continue
            if parts[1].startswith("--"):
                assert parts[1] in {option for action in cli._parser()._actions for option in action.option_strings}, (page, line)
                continue
            assert parts[1] in known, (page, line)
            for option in re.findall(r"--[a-z]+", line):
                assert option in known[parts[1]], (page, line)
            seen.add(parts[1])
        for option in re.findall(r"`(--[a-z]+)", text):
            own = {"--no", "--variants", "--share"}    # pip's, and those of docs/tried.py
            assert option in own or any(option in options for options in known.values()), (page, option)
    assert seen == set(known)


STATUSES = {int(row[0]): row[1] for row in table("command-line.md", "## Exit status")}


def test_the_statuses_on_the_page_are_those_of_the_code() -> None:
    assert {0, 1, 2, 3, 130} <= set(STATUSES)
    named = {int(number) for number in re.findall(r"\b(\d+)\b", (cli.__doc__ or "").split("Exit status")[1])}
    assert {0, 1, 2, 3, 130} <= named <= {*STATUSES, 129, 143}


@pytest.mark.parametrize(("ending", "status"), [
    (None, 0), (DataError("bad"), 2), (PolicyError("bad"), 2), (OutputError("full"), 3), (KeyboardInterrupt(), 130),
    (NormwiseError("x"), 2),
])  # fmt: skip
def test_a_command_ends_with_the_status_of_the_page(
    ending: BaseException | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rules() -> str:
        if ending is not None:
            raise ending
        return "max_norm"

    monkeypatch.setattr(listing, "named_rules", rules)
    assert cli.main(["policies"]) == status
    said = capsys.readouterr()
    assert "Traceback" not in said.err and len(said.err.splitlines()) == (status != 0)
    assert (said.out != "") == (status == 0)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["policies", "a.yaml"], ["race"], ["compare", "cnn", "--seeds", "0"], ["bench", "x"]])
def test_bad_input_is_status_2(arguments: list[str]) -> None:
    assert cli.main(arguments) == 2


def test_the_limits_on_the_page_are_the_readers() -> None:
    text = " ".join(PAGES["command-line.md"].split())
    for kind in readers._STARTS:
        assert {"WEBP": "WebP"}.get(kind, kind) in text
    assert readers.MOST_BYTES == 1 << 30 and "1 GiB once they are decoded" in text and "`NORMWISE_MOST_BYTES`" in text
    assert readers.MOST_PIXELS == 1 << 24 and "2²⁴ pixels" in text and readers._MOST_ENCODED == 64 << 20 and "64 MiB at most" in text
    assert readers.MOST_ROWS == 10_000_000 and "ten million rows" in text and readers.MOST_TEXT == 128 << 20 and "a text 128 MiB" in text


# ------------------------------------------------------------------------------------------------------- code that runs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj((q @ k.mT).softmax(-1) @ v)


class Small(nn.Module):
    """A model that has what the pages speak of: an embedding, attentions of both kinds, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.both = nn.Embedding(11, 8), Attention(), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention(self.embed(x))
        return self.lm_head(self.fc1(self.both(h, h, h)[0]))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8))


def fixtures(page: str, folder: Path) -> dict[str, Any]:
    """What a page's first block takes as given."""
    torch.manual_seed(0)
    model: nn.Module = convolutional() if page == "pruning.md" else Small()
    if page == "precision.md":
        model = model.bfloat16()
    given = torch.randn(2, 1, 8, 8) if page == "pruning.md" else torch.zeros(2, 3, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model(given).float().square().mean().backward()
    copied = copy.deepcopy(model)
    control = nw.attach(copied, torch.optim.SGD(copied.parameters(), 0.1), nw.max_norm(1.0, params="*weight"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    (folder / "tune-gpt.yaml").write_text("- max_norm: 3.0\n")
    given_too = {"peft": pytest.importorskip("peft"), "base": tiny_gpt2()} if page == "peft.md" else {}
    return {
        **given_too,
        "nw": nw, "normwise": nw, "torch": torch, "nn": nn, "copy": copy, "model": model, "optimizer": optimizer, "control": control,
        "scheduler": scheduler, "step": 3,
        "example_input": given, "torch_optimizer": torch.optim.SGD(model.parameters(), 0.1, weight_decay=0),
        **{name: getattr(nw.optim, name) for name in ("Muon", "Ridge")}, "MyExperts": type("MyExperts", (nn.Module,), {}),
    }  # fmt: skip


class Dense(nn.Module):
    """With the name that Keras gives a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4))


def of_trainers(number: int, folder: Path) -> dict[str, Any]:
    """What a block of the page on trainers takes as given: other names, or others by the same name, than the block before."""
    if number <= 2:
        pytest.importorskip("transformers")
        trainer = trainer_cases.trainer(folder)
        given = {"model": trainer.model, "arguments": trainer.args, "data": trainer.train_dataset}
        return {"trainer": trainer, "Trainer": type(trainer), **given}
    if number == 3:
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):    # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 2)

            def training_step(self, batch: torch.Tensor) -> torch.Tensor:
                loss: torch.Tensor = self.linear(batch).square().mean()
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), 0.1)

        quiet = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        within = SimpleNamespace(Trainer=lambda **given: lightning.Trainer(**given, **quiet, enable_checkpointing=False))
        return {"lightning": within, "module": Module(), "data": torch.utils.data.DataLoader(torch.randn(4, 3))}
    model: nn.Module = Dense() if number == 5 else Small()
    same = SimpleNamespace(setup=lambda *given: given, prepare=lambda *given: given)    # the real ones are in test_resume_trainers.py
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "fabric": same, "accelerator": same}


SAID = {"gate.md": ("without.pt\nis refused", "with.pt\npasses"), "cookbook.md": ("199 of 200 steps", "\nTrue\n")}
RUN = [page for page, text in PAGES.items() if "```python" in text]


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block, in its order, in one namespace. A rule or a preset that was attached by one block is removed before the next."""
    if page == "pruning.md":
        pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    space = fixtures(page, tmp_path)
    for number, block in enumerate(blocks):
        space |= of_trainers(number + 1, tmp_path) if page == "integrations.md" else {}
        try:
            exec(compile(block, f"{page}, block {number + 1}", "exec"), space)
        except Exception as error:
            raise AssertionError(f"{page}, block {number + 1}: {type(error).__name__}: {error}\n{block}") from error
    printed = capsys.readouterr().out
    assert [said for said in SAID.get(page, ()) if said not in printed] == []


@pytest.mark.parametrize("page", ["coming-from.md", "zh/article.md", "article.md", "concepts.md"])
def test_the_calls_in_a_page_s_tables_can_be_made(page: str, tmp_path: Path) -> None:
    """``nw.max_norm(3.0)`` in a cell: with numbers for the letters that stand for some."""
    space = {**fixtures(page, tmp_path), "lam": 0.1, "m": 10, "v": 0.5, "r": 1.0}
    cells = "\n".join(line for line in PAGES[page].splitlines() if line.startswith("|"))
    calls = [call for call in re.findall(r"`(nw\.[\w.]+\([^`]*\))`", cells) if "..." not in call]
    assert len(calls) >= 4
    for call in calls:
        assert eval(call, space) is not None, call


def test_the_yaml_of_a_page_loads() -> None:
    blocks = [(page, block) for page, text in PAGES.items() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) >= 2
    for page, block in blocks:
        if page == "integrations.md":    # of LightningCLI, whose rules are a policy
            [callback] = yaml.safe_load(block)["trainer"]["callbacks"]
            policy = nw.Policy.from_yaml(yaml.safe_dump(callback["init_args"]["rules"]), page)
        else:
            policy = nw.Policy.from_yaml(block, page)
        assert policy.rules and nw.Policy.from_yaml(policy.to_yaml()) == policy


def test_the_modules_on_the_page_of_design_exist() -> None:
    """Files and tests that the pages name."""
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:tests|docs|examples|engine|src)/[\w./-]+\.(?:py|md))`", text):
            assert any((base / name).exists() for base in (ROOT, ROOT / "src" / "normwise")), (page, name)
        for name in re.findall(r"`(normwise(?:\.\w+)+)[`(]", text):
            thing: Any = nw
            for part in name.split(".")[1:]:
                import importlib

                with_module = f"normwise.{'.'.join(name.split('.')[1:name.split('.').index(part) + 1])}"
                thing = getattr(thing, part, None) or importlib.import_module(with_module)
            assert thing is not None, (page, name)
    assert files.__doc__


@pytest.mark.parametrize("study", ["race", "compare"])
def test_the_help_names_everything_that_only_may_name(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line has its own lists, since the catalogue takes seconds to import."""
    with pytest.raises(SystemExit):
        cli.main([study, "--help"])
    told = re.sub(r"-\n\s*", "-", capsys.readouterr().out)
    words = set(re.findall(r"[\w+]+", told))
    assert set(CONTENDERS if study == "race" else {**STRATEGIES_OF_COMPARE, **TORCH, **PRESETS}) - {"adamw", "sgd", "nothing"} <= words
