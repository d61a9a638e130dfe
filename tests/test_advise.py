"""Advice attaches to the model that it is for and acts there; its figures are those of the committed results; its guesses are measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw
from advise_cases import CASES, batches, loss, made
from normwise import cli
from normwise.advice import GOALS, Advice, costs, goals
from normwise.advice.facts import Facts
from normwise.advice.sentences import SAID
from normwise.errors import PolicyError
from normwise.experiments.tasks.load import load_task
from normwise.parameters.attention_logits import find_attentions
from normwise.parameters.inventory import Inventory
from normwise.parameters.scale_free import scale_free

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=list(CASES))
def advised(request: pytest.FixtureRequest) -> tuple[str, dict[str, Advice]]:
    """A case and the answer to every goal."""
    model = made(request.param)
    return request.param, {goal: nw.advise(model, goal) for goal in GOALS}


def test_the_policy_attaches_steps_and_holds(advised: tuple[str, dict[str, Advice]]) -> None:
    """Every goal on every kind of model: no rule is refused, every bound holds after steps, every rule acts on something."""
    case, answers = advised
    for goal, advice in answers.items():
        assert not [one for one in advice.lines if one.source == "tried on your model"], (goal, [str(one) for one in advice.lines])
        model = made(case)
        optimizer = advice.optimizer.build(model)
        control = nw.attach(model, optimizer, advice.policy)
        for batch in batches(case, 2):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        found = control.verify()
        assert found.breaches == [] and found.never_ran == [], (goal, str(found))
        assert all(rule.tensors for rule in control.receipt().rules), (goal, str(control.receipt()))
        control.remove()


def test_what_is_written_is_the_same_policy(advised: tuple[str, dict[str, Advice]]) -> None:
    case, answers = advised
    for advice in answers.values():
        assert nw.Policy.from_yaml(advice.yaml()) == advice.policy
        space: dict[str, Any] = {"model": made(case)}
        exec(advice.python(), space)
        assert space["policy"] == advice.policy
        assert type(space["optimizer"]) is type(advice.optimizer.build(made(case)))
        data = json.loads(advice.to_json())
        assert [line["what"] for line in data["lines"]] == [line.what for line in advice.lines]


def test_it_is_legible_at_a_hundred_columns(advised: tuple[str, dict[str, Advice]]) -> None:
    for advice in advised[1].values():
        assert max(map(len, str(advice).splitlines())) <= 100
        for line in advice.lines:
            assert line.why and line.source and line.on


def test_every_goal_says_something_to_do(advised: tuple[str, dict[str, Advice]]) -> None:
    assert [goal for goal, advice in advised[1].items() if advice.lines[0].verdict != "do" or not advice.lines[0].tensors] == []


# ------------------------------------------------------------------------------------------------------------- figures

COUNTED = {"cap", "cap, lora"}
"""Sentences whose figures are bounds that follow from the rule, and were not measured."""


def section(page: str, anchor: str) -> str:
    parts = re.split(r"^#+ (.*)", (ROOT / page).read_text(), flags=re.MULTILINE)
    named = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-"): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    return named[anchor] if anchor else " ".join(parts)


@pytest.mark.parametrize("key", SAID)
def test_a_sentence_s_source_is_there_and_has_its_figures(key: str) -> None:
    """Decimals as the page has them; percentages as a share or as a percentage, rounded."""
    said = SAID[key]
    pages = re.findall(r"(docs/[\w-]+\.md)(?:#([\w-]+))?", said.source)
    numbers = {number for page in pages for number in re.findall(r"\d+(?:\.\d+)?", section(*page))}
    if not pages or key in COUNTED:
        return
    shares = {f"{float(n) * times:.0f}%" for n in numbers for times in (1, 100)}
    figures = re.findall(r"\d+(?:\.\d+)?%|\d+\.\d+|\d{2,}", said.why)
    assert [figure for figure in figures if figure not in numbers | shares] == []


def test_shares_are_those_of_the_benchmarks() -> None:
    control = json.loads((ROOT / "docs" / "results" / "bench-control.json").read_text())["rows"]
    large = [row for row in control if re.search(r"0\.70M|4\.8M", row["case"]) and "share" in row and "zero" not in row["state"]]
    for kind, rules in (("clip", "clip_grad_norm"), ("bound", "max_norm")):
        shares = [100 * row["share"] for row in large if row["rules"] == rules]
        assert len(shares) >= 5, sorted({row["rules"] for row in large})
        assert costs.SHARES[kind] == (round(min(shares), 1), round(max(shares), 1)), kind
    caps = json.loads((ROOT / "docs" / "results" / "bench-cap.json").read_text())["rows"]
    for kind, column in (("cap", "share"), ("exact cap", "exact_share")):
        shares = [100 * row[column] for row in caps]
        assert costs.SHARES[kind] == (round(min(shares), 1), round(max(shares), 1)), kind


def test_the_races_figures_are_those_that_were_measured() -> None:
    """The README's of protocol 2, where a task was raced under it; else those of the earlier races."""
    pages = [(ROOT / page).read_text().splitlines() for page in ("docs/results.md", "README.md")]
    earlier = next(line for line in pages[0] if line.startswith("| auto |"))
    said = dict(zip(("cnn", "resnet", "lstm", "gpt"), re.findall(r"(\d\.\d+) / (\d\.\d+)", earlier), strict=False))
    head = next(line for line in pages[1] if line.startswith("| task | auto |"))
    said |= {found[1]: found.groups()[1:] for line in pages[1] if (found := re.match(r"\| `(\w+)`[^|]*\| (\d\.\d+) / (\d\.\d+) \|", line))}
    assert head and said == {task: (f"{samples:.2f}", f"{seconds:.2f}") for task, (samples, seconds) in goals.SHARES.items()}
    assert sorted(task for tasks in goals.NEAREST.values() for task in tasks) == sorted(said), "none is left out"


def test_attention_over_patches_is_likened_to_the_vision_transformer() -> None:
    """A convolution that cuts patches tells it from a text model."""
    vision, text = made("decoder"), made("decoder")
    vision.patches = nn.Conv2d(3, 8, 4, 4)
    assert "our nearest tasks: vit " in str(nw.advise(vision)) and "our nearest tasks: gpt " in str(nw.advise(text))


def test_where_auto_saves_no_training_it_is_said() -> None:
    """By the shares: none of the gates' is far below 1."""
    assert all(min(goals.SHARES[task]) > 0.75 for task in goals.NEAREST["gates"])
    assert "saves the tuning and no training" in str(nw.advise(made("gates"))).replace("\n            ", " ")
    assert "saves the tuning and no training" not in str(nw.advise(made("decoder"))).replace("\n            ", " ")


@pytest.mark.parametrize("task", goals.SHARES)
def test_every_task_of_the_race_is_likened_to_itself(task: str) -> None:
    """Nobody's figure is another kind's: the one convolution of a Mixer cuts patches, as that of a vision transformer."""
    said = next(line.why for line in nw.advise(load_task(task).build()).lines if "our nearest task" in line.why)
    assert f" {task} " in said


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_that_cuts_no_patches_before_wide_layers_is_no_mixer(size: int) -> None:
    """It overlaps, or sees single points, as those of a PointNet."""
    wide = (nn.Flatten(), nn.Linear(8 * (29 - size) ** 2, 64), nn.ReLU(), nn.Linear(64, 10))
    assert "our nearest task" not in str(nw.advise(nn.Sequential(nn.Conv2d(1, 8, size), nn.ReLU(), *wide)))


def test_a_matrix_steps_cost_is_counted_from_shapes() -> None:
    """Two linear layers by hand: 4m²n + m³ each, against 6 operations a weight and position."""
    entries = [e for e in Inventory(made("mlp")).trainable if e.role == "hidden"]
    operations = sum(4 * m * m * n + m**3 for m, n in ((6, 12), (12, 12)))
    said = costs.ridge(entries)
    assert said.startswith(f"{operations / 1e3:.3g} kFLOP") and f"on {operations / (6 * (72 + 144)):,.0f} more" in said


# -------------------------------------------------------------------------------------------------------------- guesses


def doubled(case: str) -> set[str]:
    """The matrices that can be doubled without a change of the loss: tried, one by one."""
    model, batch, found = made(case), batches(case, 1)[0], set()
    with torch.no_grad():
        before = loss(model, batch)
        for e in Inventory(model).trainable:
            if e.param.ndim >= 2 and e.role in ("hidden", "conv", "head"):
                e.param.mul_(2)
                if abs(loss(model, batch) - before) < 1e-4:
                    found.add(e.name)
                e.param.div_(2)
    return found


@pytest.mark.parametrize("case", ["residual", "decoder", "mlp"])
def test_the_guess_of_scale_free_weights_is_what_doubling_shows(case: str) -> None:
    model = made(case)
    assert set(scale_free(model, Inventory(model).trainable)) == doubled(case)
    assert (case == "residual") == bool(doubled(case))


class PostNorms(nn.Module):
    """Norms behind a sum, behind a bent line, behind a layer with a bias, behind a reshaped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.summed, self.bent, self.shifted = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.moved, self.named = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.norm1, self.norm2, self.norm3, self.norm4, self.norm5 = (nn.LayerNorm(8 if i != 3 else 4) for i in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.summed(x))
        x = self.norm2(torch.tanh(self.bent(x)))
        x = self.norm3(self.shifted(x))
        x = self.norm4(self.moved(x).view(-1, 2, 4)).flatten(1)
        y = self.named(x)
        return self.norm5(y)


def test_only_a_norm_right_behind_counts() -> None:
    model = PostNorms()
    assert set(scale_free(model, Inventory(model).trainable)) == {"moved.weight", "named.weight"}


@pytest.mark.parametrize(("case", "branches"), [("decoder", 1), ("residual", 1), ("mlp", 0), ("gates", 0), ("convolutions", 0)])
def test_residual_branches_are_counted(case: str, branches: int) -> None:
    """A decoder of one module adds twice; tokens and positions that are added are no branch."""
    assert Facts.of(made(case)).branches == branches


def test_what_bounds_logits_is_seen() -> None:
    found = {case: find_attentions(model := made(case), Inventory(model)) for case in ("decoder", "qk-norm", "multihead", "mlp")}
    assert [(a.path, a.heads, a.bounded) for a in found["decoder"]] == [("attention", 4, "")]
    assert [a.bounded for a in found["qk-norm"]] == ["QK-norm"]
    assert [(a.path, a.heads, a.fused) for a in found["multihead"]] == [("attention", 4, ("attention.in_proj_weight",))]
    assert found["mlp"] == []


def test_qk_norm_is_told_apart_in_what_is_said() -> None:
    assert any("watch" in line.what for line in nw.advise(made("decoder"), "stability").lines)
    assert not any("watch" in line.what for line in nw.advise(made("qk-norm"), "stability").lines)


def test_a_rate_that_is_large_for_small_weights_is_told() -> None:
    """Each entry of AdamW's first step is the rate: measured on a step, against what is said."""
    model = made("mlp")
    with torch.no_grad():
        model[2].weight.mul_(0.01)
        model[0].weight.mul_(0.01)
    advice = nw.advise(model)
    [line] = [line for line in advice.lines if "rate is large" in line.what]
    assert line.on == "role:hidden"
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    optimizer = advice.optimizer.build(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = sum((model[i].weight - w).square().sum() for i, w in zip((0, 2), before, strict=True)) / sum(w.square().sum() for w in before)
    assert f"hidden {moved.sqrt():.0%}" in line.why
    assert not any("rate is large" in line.what for line in nw.advise(made("mlp")).lines)


def test_caps_are_left_for_the_reason_that_holds() -> None:
    """Where a normalisation divides the length out, it is named; a table alone has nothing to cap."""
    normed = nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6))
    said = [nw.advise(model, "lipschitz").lines[1] for model in (normed, nn.Embedding(4, 4))]
    assert ["a normalisation" in line.what for line in said] == [True, False]
    assert [(line.verdict, line.tensors) for line in said] == [("leave", 1), ("leave", 0)]


def test_a_new_head_and_empty_weights_are_not_held() -> None:
    """A ball of a thirtieth around fresh or empty weights would keep them from learning."""
    advice = nw.advise(made("zeros"), "finetuning")
    [rule] = advice.policy
    assert rule.exclude == ("2.weight",)    # the head has its own role, which is not selected
    assert rule.params == ("role:hidden",)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("model", "goal", "more", "says"), [
    ([1], "speed", {}, "given a list"),
    (torch.optim.Adam([torch.zeros(1)]), "speed", {}, "given an Adam"),
    ("mlp", "fast", {}, "Allowed: finetuning, generalisation, lipschitz, plasticity, quantisation, sparsity, speed, stability"),
    ("mlp", 3, {}, "is unknown"),
    ("mlp", "speed", {"batches": []}, "without loss="),
    ("mlp", "speed", {"loss": loss}, "without batches="),
])  # fmt: skip
def test_bad_input_is_one_sentence(model: Any, goal: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(says)) as error:
        nw.advise(made(model) if isinstance(model, str) else model, goal, **more)
    assert "\n" not in str(error.value)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(PolicyError, match="no trainable parameters"):
        nw.advise(made("mlp").requires_grad_(False))


def test_a_model_without_values_gets_advice_too() -> None:
    """From shapes and code alone, and the same as with values."""
    with torch.device("meta"):
        model = made("decoder")
    for goal in GOALS:
        advice, real = nw.advise(model, goal), nw.advise(made("decoder"), goal)
        said = [one for one in advice.lines if one.what != "ask again when the weights are there"]
        assert advice.policy == real.policy and said == list(real.lines) and len(said) == len(advice.lines) - 1


def test_a_rule_that_the_model_refuses_becomes_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from normwise.advice.answer import Call

    real = goals.GOALS["stability"]

    def with_a_bad_rule(facts: Any) -> Any:
        recipe, lines = real(facts)
        return recipe, [*lines, goals.do("decay", Call("max_norm", {"radius": 1.0, "params": "role:conv"}), [])]

    monkeypatch.setitem(goals.GOALS, "stability", with_a_bad_rule)
    advice = nw.advise(made("mlp"), "stability")
    [line] = [line for line in advice.lines if line.source == "tried on your model"]
    assert line.verdict == "leave" and "matches no parameter" in line.why
    assert len(advice.policy) == 2


# ----------------------------------------------------------------------------------------------------------- the command

MINE = """
import torch
from torch import nn
from torch.nn import functional as F

def plain(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
def loss(model, batch): return F.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))
def probed(): return plain(), [torch.randn(8, 6) for _ in range(30)], loss
def few(): return plain(), [torch.randn(8, 6)] * 3, loss
def asks(width): return plain()
def three(): return 3
def pair(): return plain(), []
def raises(): raise ValueError("no\\nway")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine_to_advise.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_to_advise", raising=False)
    return tmp_path


def test_the_command_writes_what_it_says(mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["--json", "a.json", "--yaml", "a.yaml", "--python", "a.py"]
    status = cli.main(["advise", "mine_to_advise:probed", "--goal", "stability", *files])
    said = capsys.readouterr()
    assert status == 0 and "nw.zclip(2.5)" in said.out and "gradient noise" in said.out
    monkeypatch.syspath_prepend(str(mine))
    space: dict[str, Any] = {}
    exec((mine / "a.py").read_text(), space)    # as pasted: it makes the model, too
    assert space["policy"] == nw.Policy.load(mine / "a.yaml") == space["control"].policy
    assert json.loads((mine / "a.json").read_text())["probe"]["batches"] == 25


@pytest.mark.parametrize(("arguments", "says"), [
    ("mine_to_advise:plain --goal fast", "Allowed: finetuning"), ("mine_to_advise:few", "ended after 3"),
    ("mine_to_advise:asks", "missing 1 required positional argument"), ("mine_to_advise:three", "returned an int"),
    ("mine_to_advise:pair", "returned a tuple of 2"), ("mine_to_advise:raises", "ValueError: no way"),
    ("mine_to_advise:none", "no attribute"),
    ("nowhere_at_all:plain", "No module named"), ("mine_to_advise", "is no function"), ("mine_to_advise:plain --yaml .", "to a folder"),
    ("mine_to_advise:plain --steps 0", "whole number"), ("", "required"),
])  # fmt: skip
def test_a_wrong_argument_is_one_sentence_and_status_2(arguments: str, says: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and says in said.err
    assert [path.name for path in mine.iterdir() if path.suffix not in (".py", "")] == []
