"""Text in three parts, and the two character models: nothing of the future is seen, every character is scored once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normwise.errors import DataError, StudyError
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.models.gpt import GPT, attend
from normwise.experiments.tasks.models.lstm import CharLSTM
from normwise.experiments.tasks.task import Score
from normwise.experiments.tasks.text import TextData, TextTask, load_text
from normwise.parameters.inventory import find_roles

LETTERS = "abcdefgh\nÄ€𝛼"
GENERATOR = torch.Generator().manual_seed(3)


def random_text(length: int) -> str:
    return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=GENERATOR).tolist())


TEXT = random_text(12_345)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    (path / "input.txt").write_text(TEXT, encoding="utf-8", newline="")
    return path


def spelled(data: TextData, numbers: Tensor) -> str:
    return "".join(data.vocabulary[i] for i in numbers.tolist())


# ------------------------------------------------------------------------------------------------------------- the data


def test_the_three_parts_spell_the_text_in_order(folder: Path) -> None:
    data = load_text(folder)
    parts = [spelled(data, part) for part in (data.train, data.validation, data.test)]
    assert "".join(parts) == TEXT
    assert [len(part) for part in parts] == [11110, 618, 617]  # 12,345 times 0.9 is 11,110.5, times 0.95 is 11,727.75
    assert data.vocabulary == "".join(sorted(set(TEXT)))


def test_a_file_a_folder_and_a_byte_order_mark_give_the_same_text(folder: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    keys = {load_text(source).key for source in (folder, folder / "input.txt", str(folder), marked)}
    assert len(keys) == 1
    assert TextData.of("other", TEXT[:-1] + "?").key not in keys


def test_the_default_text_is_the_reference_that_python_carries() -> None:
    from pydoc_data.topics import topics

    data = load_text()
    assert spelled(data, torch.cat([data.train, data.validation, data.test])) == "\n".join(topics[name] for name in sorted(topics))
    assert len(data.train) > 300_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "10000 characters or more, found 0"),
        (b"a" * 9_999, "10000 characters or more, found 9999"),
        (b"a" * 20_000 + b"\xff", "expected UTF-8 text, found the byte 0xff at 20000"),
    ],
)
def test_bad_files_are_told_in_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_text(tmp_path / "bad.txt")
    assert "bad.txt" in str(caught.value)


def test_missing_and_ambiguous_sources_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        load_text(tmp_path / "none")
    with pytest.raises(DataError, match=r"one \*.txt, found none"):
        load_text(tmp_path)
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(TEXT)
    with pytest.raises(DataError, match=r"found one.txt, two.txt; name the file itself"):
        load_text(tmp_path)
    assert load_text(tmp_path / "one.txt").key == load_text(tmp_path / "two.txt").key


# ----------------------------------------------------------------------------------------------------------- the models


BLOCKS = 4 * (12 * 128**2 + 4 * 128)
COUNTED = {  # what does not depend on the vocabulary, and how much each character adds
    "gpt": (BLOCKS + 128 * 128 + 2 * 128, 2 * 128),
    "lstm": (4 * 256 * (128 + 256 + 2) + 4 * 256 * (256 + 256 + 2), 128 + 256 + 1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_standard_models_have_the_parameters_counted_by_hand(name: str) -> None:
    task = load_task(name)
    assert isinstance(task, TextTask)
    fixed, each = COUNTED[name]
    assert sum(p.numel() for p in task.build().parameters()) == fixed + each * len(task.data.vocabulary)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "lstm"])
def test_a_later_character_changes_no_earlier_logit_and_does_change_its_own(kind: str, qk_norm: bool) -> None:
    torch.manual_seed(0)
    model = GPT(11, 16, 2, 2, 12, qk_norm) if kind == "gpt" else CharLSTM(11, 8, 16)
    x = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(1))
    before = model(x)
    for place in (0, 5, 11):
        changed = x.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        moved = (after[:, place:] - before[:, place:]).abs().amax((0, 2))
        assert moved.min() > 1e-6, "the models look back over all of the text that they are given"


def test_attention_is_torchs_own() -> None:
    q, k, v = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64, generator=GENERATOR)
    torch.testing.assert_close(attend(q, k, v), nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_qk_norm_bounds_the_attention_logits_whatever_the_weights() -> None:
    torch.manual_seed(0)
    plain, normed = (GPT(11, 16, 1, 2, 12, qk_norm) for qk_norm in (False, True))
    x = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(1))
    for model, changes in ((plain, True), (normed, False)):
        before = model(x).detach()
        attention = model.blocks[0].attention
        with torch.no_grad():
            attention.q.weight.mul_(100)
        assert ((model(x) - before).abs().max() > 1e-5).item() is changes


def test_the_gpt_starts_with_the_documented_deviations_and_near_uniform() -> None:
    torch.manual_seed(0)
    model = GPT(65)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            wanted = 0.02 if name in ("tokens.weight", "places.weight") else 1 / math.sqrt(3 * weight.shape[1])
            wanted /= math.sqrt(8) if name.endswith(("attention.out.weight", "down.weight")) else 1
            assert float(weight.detach().std()) == pytest.approx(wanted, rel=0.05), name
    x = torch.randint(65, (4, 129), generator=torch.Generator().manual_seed(1))
    loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(65), abs=0.3)


def test_a_text_longer_than_the_context_is_refused() -> None:
    with pytest.raises(StudyError, match="at most 12 characters at once, got 13"):
        GPT(11, 16, 1, 2, 12)(torch.zeros(1, 13, dtype=torch.int64))


def test_the_library_knows_the_role_of_every_parameter() -> None:
    for name, roles in (("gpt", {"embedding", "hidden", "gain", "bias", "head"}), ("lstm", {"embedding", "recurrent", "bias", "head"})):
        found = find_roles(load_task(name, size="tiny").build())
        assert set(found.values()) == roles
        assert found["head.weight"] == "head"


# ------------------------------------------------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_batches_are_decided_by_their_seed_and_are_windows_of_the_training_part(name: str, folder: Path) -> None:
    task = load_task(name, folder, size="tiny")
    assert isinstance(task, TextTask)
    first, again, other = (task.batches(5, seed) for seed in (7, 7, 8))
    for _ in range(20):
        (x, y), (x2, y2), (x3, _) = next(first), next(again), next(other)
        assert torch.equal(x, x2) and torch.equal(y, y2) and not torch.equal(x, x3)
        assert x.shape == y.shape == (5, 32)
        for row, answer in zip(x, y, strict=True):
            assert spelled(task.data, row) + spelled(task.data, answer[-1:]) in TEXT[:11110]
            assert torch.equal(row[1:], answer[:-1])


def test_global_seeds_leave_batches_alone_and_batches_leave_global_seeds_alone(folder: Path) -> None:
    task = load_task("gpt", folder, size="tiny")
    torch.manual_seed(1)
    x, _ = next(task.batches(4, 0))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(next(task.batches(4, 0))[0], x)


@pytest.mark.parametrize("name", ["gpt", "lstm"])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_score_is_the_plain_mean_over_all_characters_but_the_first(name: str, part: str, folder: Path) -> None:
    task = load_task(name, folder, size="tiny")
    assert isinstance(task, TextTask)
    torch.manual_seed(0)
    model = task.build().double()
    numbers = task.data.part(part)  # type: ignore[arg-type]
    losses, right = [], 0
    for place in range(1, len(numbers)):
        start = (place - 1) // 32 * 32
        with torch.no_grad():
            logits = model(numbers[None, start:place])[0, -1].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[numbers[place]]))
        right += int(logits.argmax() == numbers[place])
    score = task.evaluate(model, part)  # type: ignore[arg-type]
    assert score.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert score.accuracy == pytest.approx(right / len(losses), abs=2 / len(losses))


def test_the_training_score_has_the_size_of_the_validation_part_and_spreads_over_the_whole_part(folder: Path) -> None:
    task = load_task("lstm", folder, size="tiny")
    assert isinstance(task, TextTask)
    windows = torch.cat([x for x, _ in task.scored("train")])
    assert windows.shape == (20, 32)  # 618 characters in windows of 32
    assert torch.equal(windows[0], task.data.train[:32])
    assert spelled(task.data, windows[-1]) in TEXT[11110 - 2 * 32 : 11110]


def test_a_score_leaves_the_model_as_it_was(folder: Path) -> None:
    task = load_task("lstm", folder, size="tiny")
    model = nn.Sequential(task.build(), nn.Dropout(0.5))
    model[1].eval()
    first = task.evaluate(model, "validation")
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    model[1].train()
    assert task.evaluate(model, "validation") == first, "dropout is off while a model is scored"
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_blew_up_scores_infinity(folder: Path) -> None:
    task = load_task("gpt", folder, size="tiny")
    model = task.build()
    nn.init.constant_(model.head.weight, math.nan)  # type: ignore[union-attr,arg-type]
    assert task.evaluate(model, "test").loss == math.inf


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_a_tiny_model_learns_in_a_few_dozen_steps(name: str) -> None:
    task = load_task(name, size="tiny")
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batches = task.batches(task.batch, 0)
    before = quick(task, model)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = quick(task, model)
    assert after.loss < before.loss - 1.2
    answers = torch.cat([wanted.flatten() for _, wanted in short(task).scored("validation")])
    most = float(torch.bincount(answers).max()) / len(answers)    # of the commonest character; Python's own text differs by version
    assert after.accuracy > 0.75 * most > before.accuracy


def quick(task: object, model: nn.Module) -> Score:
    """A score on a twentieth of the default text."""
    return short(task).evaluate(model, "validation")


def short(task: object) -> TextTask:
    assert isinstance(task, TextTask)
    return TextTask(task.recipe, replace(task.data, validation=task.data.validation[:2000]), task.context)


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_bf16_gives_the_loss_of_fp32_to_three_digits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.experiments.tasks.task.fast_bf16", lambda: True)
    task = load_task(name)
    assert isinstance(task, TextTask) and task.recipe.bf16
    plain = TextTask(replace(task.recipe, bf16=False), task.data, task.context)
    assert plain.key != task.key
    torch.manual_seed(0)
    model, batch = task.build(), next(task.batches(2, 0))
    loss, wanted = task.loss(model, batch), plain.loss(model, batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
    assert loss.item() != wanted.item(), "autocast did nothing"
