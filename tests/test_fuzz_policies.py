"""A thousand broken and odd policies: each is attached and its bounds hold, or is one clear error that changes nothing."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw
from fuzz_policies import TEXTS, python_policy, yaml_bytes, yaml_policy
from normwise import cli
from normwise.errors import NormwiseError

CHUNK = 50
YAML, PYTHON = 600, 400
LONGEST = 4000
"""Characters of a message: a table of thirty parameters fits, the repetition of what was given in full does not."""
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def chunks(count: int, quick: int) -> list[Any]:
    """Seeds in chunks; what is not quick waits for ``make test-long``."""
    starts = range(0, count, CHUNK)
    return [pytest.param(s, id=f"{s}+", marks=() if s < quick else pytest.mark.long) for s in starts]


class Net(nn.Module):
    """A convolution, a gain, a hidden layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc, self.out = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(torch.tanh(self.norm(self.conv(x))).flatten(1))))


class Watched:
    """A model with gradients and an optimizer, and all that a refused policy must leave as it was, bits and objects."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.5)
        self.backward()
        self.before = self.seen()
        self.bits = [(p.detach().clone(), p.grad.clone()) for p in self.model.parameters() if p.grad is not None]

    def backward(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
        (self.model(x) - 1).square().mean().backward()

    def seen(self) -> list[Any]:
        """Identities, places and versions of tensors, hooks, names, groups."""
        tensors = [t for p in self.model.parameters() for t in (p, p.grad)]
        owners = [self.optimizer, *self.model.modules(), *self.model.parameters()]
        hooks = [(name, dict(value)) for o in owners for name, value in vars(o).items() if name.endswith("_hooks") and value]
        groups = [{k: v if k != "params" else [id(p) for p in v] for k, v in g.items()} for g in self.optimizer.param_groups]
        state = {id(p): list(s) for p, s in self.optimizer.state.items()}
        marks = [(id(t), t.data_ptr(), t._version, t.requires_grad) for t in tensors if t is not None]
        return [marks, hooks, list(self.model.state_dict()), [id(m) for m in self.model.modules()], groups, state]

    def assert_untouched(self) -> None:
        assert self.seen() == self.before
        for p, (weight, grad) in zip(self.model.parameters(), self.bits, strict=True):
            assert torch.equal(p, weight) and p.grad is not None and torch.equal(p.grad, grad)


def check_message(error: BaseException) -> None:
    """One sentence or two about what was given; nothing of the machinery."""
    text = str(error)
    assert 10 <= len(text) <= LONGEST, f"a message of {len(text)} characters: {text[:200]}"
    assert "Traceback" not in text and "\x00" not in text
    assert " object at 0x" not in text or "Mute" in text or "function" in text or "object object" in text or "iterator" in text


def outcome(make: Callable[[], Any]) -> str:
    """"attached" or "refused", with everything asserted that belongs to it."""
    watched = Watched()
    try:
        control = nw.attach(watched.model, watched.optimizer, make())
    except NormwiseError as error:
        check_message(error)
        watched.assert_untouched()
        return "refused"
    watched.model.zero_grad(set_to_none=False)
    return _step(watched, control)


def _step(watched: Watched, control: nw.Control) -> str:
    keys = list(watched.model.state_dict())
    watched.backward()
    weights = [p.detach().clone() for p in watched.model.parameters()]
    grads = [p.grad.clone() for p in watched.model.parameters() if p.grad is not None]
    try:
        watched.optimizer.step()
    except NormwiseError as error:
        check_message(error)
        assert all(map(torch.equal, watched.model.parameters(), weights)), f"a step that failed changed weights: {error}"
        assert all(torch.equal(p.grad, g) for p, g in zip(watched.model.parameters(), grads, strict=True)), f"... gradients: {error}"
        control.remove()
        return "refused at its first step"
    bounds = _broken_last_bounds(control)
    assert not bounds, f"{control!r}: {bounds}"
    assert list(watched.model.state_dict()) == keys
    control.remove()
    assert not watched.optimizer._optimizer_step_pre_hooks and not watched.optimizer._optimizer_step_post_hooks
    return "attached"


def _broken_last_bounds(control: nw.Control) -> list[str]:
    """The broken bounds that no later rule on the same weights has undone: of two that cannot both hold for these weights, though no
    proof shows it, the later one holds, and ``verify()`` names the other."""
    last = {m.name: b.rule.label() for b in control.engine.phase("weight") for m in b.members}
    return [str(b) for b in control.verify().breaches if b.rule == last[b.parameter]]


def tell(coverage: Callable[..., None], kind: str, outcomes: list[str]) -> None:
    for found in outcomes:
        coverage("fuzzed input: outcomes", kind, found)


def from_yaml(text: str) -> nw.Policy:
    """A mistake within a text names its source and what stands there."""
    try:
        return nw.Policy.from_yaml(text, "fuzz.yaml")
    except NormwiseError as error:
        assert str(error).startswith("fuzz.yaml"), str(error)
        raise


@pytest.mark.parametrize("start", chunks(YAML, 100))
def test_policies_from_yaml(start: int, coverage: Callable[..., None]) -> None:
    outcomes = []
    for seed in range(start, start + CHUNK):
        text = yaml_policy(seed)
        try:
            outcomes.append(outcome(lambda text=text: from_yaml(text)))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}\n{text[:1000]!r}") from error
    tell(coverage, "policies from YAML", outcomes)


@pytest.mark.parametrize("start", chunks(PYTHON, 50))
def test_policies_from_python(start: int, coverage: Callable[..., None]) -> None:
    outcomes = []
    for seed in range(start, start + CHUNK):
        try:
            outcomes.append(outcome(lambda seed=seed: python_policy(seed)))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}") from error
    tell(coverage, "policies from Python", outcomes)


# ------------------------------------------------------------------------------------------------------- command line


def check_refusal(status: int, out: str, err: str) -> None:
    """Exit status 0 with a table, or 2 with one sentence and no traceback."""
    assert status in (0, 2) and "Traceback" not in out + err
    if status == 2:
        assert out == "" and err.startswith("normwise: ") and err.endswith("\n") and len(err.splitlines()) == 1, err[:500]
    else:
        assert err == "" and "is a valid policy of" in out


def run_command(path: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["policies", str(path)])
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("start", chunks(300, 50))
def test_policy_files_at_the_command_line(start: int, tmp_path: Path, coverage: Callable[..., None]) -> None:
    statuses = []
    for seed in range(start, start + CHUNK):
        file = tmp_path / "fuzz.yaml"
        file.write_bytes(yaml_bytes(seed))
        try:
            status, out, err = run_command(file)
            check_refusal(status, out, err)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}\n{file.read_bytes()[:1000]!r}") from error
        statuses.append(f"exit {status}")
    tell(coverage, "policy files, normwise policies", statuses)


SEEN = ("- {max_norm: 3}", "- !!python/object/apply:os.system ['echo ran > ran']", "- &r {max_norm: *r}", "\x00")


@pytest.mark.parametrize(
    "text", [*SEEN[:2], *(pytest.param(t, marks=pytest.mark.long) for t in (*SEEN[2:], *TEXTS[::9]))], ids=lambda t: repr(t[:20])
)
def test_policy_files_in_a_process_of_their_own(text: str, tmp_path: Path) -> None:
    (tmp_path / "fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    command = [sys.executable, "-m", "normwise", "policies", "fuzz.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    check_refusal(done.returncode, done.stdout, done.stderr)
    assert os.listdir(tmp_path) == ["fuzz.yaml"], "a payload ran"


@pytest.mark.parametrize("name", ["missing.yaml", "folder", "loop", "line\nbreak.yaml", "\x1b[31m.yaml"])
def test_files_that_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    status, out, err = run_command(tmp_path / name)
    check_refusal(status, out, err)
    assert status == 2


# --------------------------------------------------------------------------------- what the fuzzing found, one by one


def net() -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model, SGD(model.parameters(), lr=1.0)


@pytest.mark.parametrize("schedule", [lambda step: -1.0, lambda step: float("nan"), lambda step: 1 / 0, lambda: 1.0, lambda step: "x"])
@pytest.mark.parametrize("make", [nw.max_norm, nw.l1_prox, lambda s: nw.Rule(action="clip_norm", radius=nw.radii.Init(s)), nw.agc])
def test_a_schedule_that_fails_fails_before_anything_moves(make: Callable[..., nw.Rule], schedule: Callable[..., Any]) -> None:
    """Asked only after the optimizer's step, it would leave weights that moved and are not bounded."""
    model, optimizer = net()
    control = nw.attach(model, optimizer, [nw.l2_penalty(0.1), make(schedule)])
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    with pytest.raises(nw.PolicyError, match="at step 0"):
        optimizer.step()
    for p, (weight, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, weight) and torch.equal(p.grad, grad)
    assert control.steps == 0


@pytest.mark.parametrize("action", ["clip_norm", "normalize", "project"])
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1), ("linf", float("inf"))])
def test_the_initial_norm_of_all_parameters_as_one_vector(action: str, norm: str, order: float) -> None:
    """It is the norm of the parameters' norms; with one radius for each of them the step ended in a shape error."""
    model, optimizer = net()
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def value() -> float:
        return float(torch.linalg.vector_norm(torch.cat([m.weight.detach().flatten() for m in model]), order))

    start = value()
    control = nw.attach(model, optimizer, nw.Rule(action=action, norm=norm, per="global", radius="0.5*init"))
    optimizer.step()
    assert value() == pytest.approx(start / 2, rel=1e-9) and control.verify()


def test_one_zero_parameter_is_no_zero_block_where_all_are_one_vector() -> None:
    model, optimizer = net()
    nn.init.zeros_(model[1].weight)
    nw.attach(model, optimizer, nw.Rule(action="clip_norm", per="global", radius="init")).remove()
    nn.init.zeros_(model[0].weight)
    with pytest.raises(nw.PolicyError, match="2 parameters together are zero"):
        nw.attach(model, optimizer, nw.Rule(action="clip_norm", per="global", radius="init"))
    nw.attach(model, optimizer, nw.Rule(action="clip_norm", per="global", radius="init", floor=0.25))
    optimizer.step()
    assert float(torch.cat([m.weight.detach().flatten() for m in model]).norm()) == pytest.approx(0.25, rel=1e-5)


def test_policies_that_never_end() -> None:
    def endless() -> Any:
        while True:
            yield nw.max_norm(1)

    with pytest.raises(nw.PolicyError, match="10000 rules at most"):
        nw.Policy(endless())


def test_a_number_as_a_tensor_is_no_list_of_rules() -> None:
    with pytest.raises(nw.PolicyError, match=r"given tensor\(2\.\)"):
        nw.Policy([torch.tensor(2.0)])


def test_a_selector_of_the_users_own_that_fails_names_the_parameter() -> None:
    model, optimizer = net()
    with pytest.raises(nw.PolicyError, match=r"failed on '0\.weight': TypeError"):
        nw.attach(model, optimizer, nw.max_norm(1, params=lambda: True))


def test_a_role_for_a_broken_expression_is_no_regular_expression() -> None:
    for pattern in ("(" * 3000, ".{99999999999}"):
        with pytest.raises(nw.PolicyError, match="no regular expression"):
            nw.Policy([], roles={f"re:{pattern}": "head"})


def test_a_message_repeats_no_book() -> None:
    with pytest.raises(nw.PolicyError) as caught:
        nw.max_norm("x" * 100_000)
    text = str(caught.value)
    assert len(text) <= LONGEST and text.startswith("radius is 'xxx") and "[...]" in text and "a schedule" in text


@pytest.mark.parametrize("window", [10**7, 10**12, 10**300])
def test_a_window_that_no_memory_holds_is_refused(window: int) -> None:
    with pytest.raises(nw.PolicyError, match="window"):
        nw.autoclip(window=window)


@pytest.mark.parametrize("steps", [2**53, 10**9])
def test_any_number_of_steps_that_floats_count_can_be_trained_with(steps: int) -> None:
    for rule in (nw.zclip(warmup=steps), nw.cpr(nw.radii.WarmStart(steps)), nw.cpr(nw.radii.Inflection(steps)),
                 nw.max_norm(nw.schedules.linear(2, 1, steps)), nw.max_norm(1, every=steps)):  # fmt: skip
        model, optimizer = net()
        control = nw.attach(model, optimizer, rule)
        optimizer.step()
        assert control.verify().ok is (rule.phase == "weight") and not control.verify().breaches
        with pytest.raises(nw.PolicyError, match="steps"):
            nw.max_norm(1, every=2**53 + 1)
