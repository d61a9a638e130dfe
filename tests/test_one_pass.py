"""What the kernel of an optimizer's step does beside the step: the same as the step, the rules and the log one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise.engine import program
from normwise.engine.step import OnePass
from normwise.norms import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or kernels are switched off")


@pytest.fixture(autouse=True)
def worth_it_on_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "WORTH", 0)


def tensors(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    w, d, m, v = (torch.randn(shape, generator=g) for _ in range(4))
    return [w, d * 0.1, m * 0.1, v.square() * 0.01]


# ------------------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.95)])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_step_is_that_of_adamw_in_float64_and_torchs_to_the_last_digits(betas: tuple[float, float], maximize: bool) -> None:
    shapes, lr, decay, eps = [(7,), (1,), (33, 65), (3, 40_000)], 1e-2, 0.1, 1e-8
    ours, theirs = [tensors(s) for s in shapes], [tensors(s) for s in shapes]
    counts, counted = ([torch.tensor(4.0) for _ in shapes] for _ in range(2))
    w, g, m, v = map(list, zip(*ours, strict=True))
    native.AdamW(w, [None] * len(w)).step_((w, g, m, v, counts), False, lr, betas, decay, eps, maximize)
    for (p, d, a, s), found in zip(theirs, ours, strict=True):
        p, d, a, s = p.double(), d.double() * (-1 if maximize else 1), a.double(), s.double()
        a, s = betas[0] * a + (1 - betas[0]) * d, betas[1] * s + (1 - betas[1]) * d**2
        p = p * (1 - lr * decay) - lr * (a / (1 - betas[0] ** 5)) / ((s / (1 - betas[1] ** 5)).sqrt() + eps)
        for now, exact in zip((found[0], found[2], found[3]), (p, a, s), strict=True):
            torch.testing.assert_close(now.double(), exact, rtol=3e-6, atol=1e-7)
    torch._foreach_add_(counted, 1)
    p, d, a, s = map(list, zip(*theirs, strict=True))
    torch._fused_adamw_(p, d, a, s, [], counted, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False,
                        maximize=maximize)  # fmt: skip
    torch.testing.assert_close([*w, *m, *v], [*p, *a, *s], rtol=5e-7, atol=1e-7)
    assert counts == counted


@pytest.mark.parametrize("sphere", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (130, 129), (3, 60_000), (1, 1)])
def test_rows_are_brought_to_their_radius_and_measured(shape: tuple[int, int], sphere: bool) -> None:
    (w, g, m, v), (p, d, a, s) = tensors(shape), tensors(shape)
    before, radius = w.clone(), 0.9 * math.sqrt(shape[1])
    workspace = native.Workspace([w], (1, *shape)).aim(radius, sphere)
    workspace.place([w])
    kernel = native.AdamW([w], [(workspace, 0)])
    [(square, moved)] = kernel.step_(([w], [g], [m], [v], [torch.tensor(0.0)]), True, 0.1, (0.9, 0.99), 0.0, 1e-8, False)
    native.AdamW([p], [None]).step_(([p], [d], [a], [s], [torch.tensor(0.0)]), False, 0.1, (0.9, 0.99), 0.0, 1e-8, False)
    beside = native.Workspace([p], (1, *shape)).aim(radius, sphere)
    beside.place([p])
    native.bound_([p], beside)
    assert torch.equal(w, p) and torch.equal(workspace.norms, beside.norms) and torch.equal(workspace.factors, beside.factors)
    assert square == pytest.approx(float(w.double().square().sum()), rel=1e-6)
    assert moved == pytest.approx(float((w.double() - before.double()).square().sum()), rel=1e-6)


def test_threads_change_nothing() -> None:
    shape, found = (700, 1000), []
    for threads in (1, 2):
        w, g, m, v = tensors(shape)
        workspace = native.Workspace([w], (1, *shape)).aim(30.0)
        workspace.place([w])
        kernel, had = native.AdamW([w], [(workspace, 0)]), torch.get_num_threads()
        torch.set_num_threads(threads)
        squares = kernel.step_(([w], [g], [m], [v], [torch.tensor(0.0)]), True, 0.1, (0.9, 0.99), 0.0, 1e-8, False)
        torch.set_num_threads(had)
        found.append((w, squares))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


# ------------------------------------------------------------------------------------------------------------- in training


class Run:
    """A small network in training, with the work done in the kernel or after it."""

    def __init__(self, along: bool, rules: list, log: bool = True, **options: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
        self.optimizer = nw.optim.AdamW(self.model, **{"lr": 3e-2, "weight_decay": 0.01, **options})
        self.control = nw.attach(self.model, self.optimizer, rules, log=log)
        self.data, self.taken = torch.Generator().manual_seed(1), 0
        if not along:
            self.control._one_pass = lambda turn: None
        step = native.AdamW.step_

        def counted(*args: object) -> object:
            self.taken += 1
            return step(*args)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(native.AdamW, "step_", counted)

    def train(self, steps: int, between=lambda model: None) -> list[dict[str, float]]:
        found = []
        for _ in range(steps):
            between(self.model)
            x, y = torch.randn(16, 12, generator=self.data), torch.randint(4, (16,), generator=self.data)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            found.append(self.control.norms().flat() | self.control.violations())
        self._patch.undo()
        return found

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]


RULES = {
    "rows": lambda: [nw.max_norm(0.5)],
    "rows of some and the rest": lambda: [nw.max_norm(0.5, params="0.*"), nw.clip_weight_value(0.1, params="2.*"), nw.clip_grad_norm(1.0)],
    "spheres": lambda: [nw.unit_norm(params="role:hidden")],
    "twice the same weights": lambda: [nw.max_norm(0.5), nw.max_norm(0.8, per="tensor")],
    "a decay before": lambda: [nw.weight_decay(0.1), nw.max_norm(0.5)],
    "columns": lambda: [nw.max_norm(0.5, per="input")],
    "a clip of updates before": lambda: [nw.Rule(action="clip_norm", on="update", norm="l2", per="tensor", radius=0.02), nw.max_norm(0.5)],
}


def trained(along: bool, rules: str, steps: int = 6, between=lambda model: None, **options: object) -> tuple[Run, list[dict[str, float]]]:
    run = Run(along, RULES[rules](), **options)
    return run, run.train(steps, between)


CLOSE = {"rel": 2e-5, "abs": 1e-7}
"""Where an odd number of entries is left, torch's kernel rounds in another order."""


def agree(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, **CLOSE)


def same(one: Run, other: Run) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one.weights, other.weights, strict=True))


@pytest.mark.parametrize("rules", RULES)
def test_weights_norms_and_counts_are_those_of_one_after_the_other(rules: str) -> None:
    (mine, found), (theirs, expected) = trained(True, rules), trained(False, rules)
    assert same(mine, theirs)
    agree(found, expected)
    assert mine.control.verify().ok == theirs.control.verify().ok
    assert theirs.taken == 0
    assert (mine.taken == 6) == (rules not in ("columns", "a clip of updates before"))
    assert (mine.control._log._passes[0]._copies == []) == (rules in ("rows", "spheres"))


def write(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def test_a_weight_that_is_changed_between_steps_is_measured_again() -> None:
    (mine, found), (theirs, expected) = trained(True, "rows", between=write), trained(False, "rows", between=write)
    assert same(mine, theirs) and mine.taken == 6
    agree(found, expected)


@pytest.mark.parametrize("by_data", [True, False])
def test_a_hook_that_writes_after_the_step_is_not_overlooked(by_data: bool) -> None:
    """The kernel leaves the step to the rules, which run after the hook: nobody can tell that ``.data`` was written to."""
    runs = [Run(along, RULES["rows"]()) for along in (True, False)]
    for run in runs:
        seen = iter(range(100))

        def spoil(optimizer, args, kwargs, run=run, seen=seen) -> None:
            if next(seen) >= 2:
                run.model[0].weight.data.mul_(1.5) if by_data else write(run.model)

        hooks = run.optimizer._optimizer_step_post_hooks
        handle = run.optimizer.register_step_post_hook(spoil)
        hooks.move_to_end(handle.id, last=False)    # before the control's
    found, expected = (run.train(5) for run in runs)
    assert same(*runs) and all(bool(run.control.verify()) for run in runs) and runs[0].taken == 0
    agree(found, expected)


def test_a_parameter_without_a_gradient_stays_and_is_bounded() -> None:
    runs = [Run(along, RULES["rows"]()) for along in (True, False)]
    for run in runs:
        with torch.no_grad():
            run.model[2].weight.mul_(10)
        run.model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    found, expected = (run.train(4) for run in runs)
    assert same(*runs) and bool(runs[0].control.verify())
    agree(found, expected)


@pytest.mark.parametrize("options", [{"override": {"0.weight": {"lr": 1e-2, "direction": "heavy_ball"}}}, {"betas": (0.0, 0.9)}])
def test_an_optimizer_whose_kernel_does_not_take_the_step_declines(options: dict[str, object]) -> None:
    (mine, found), (theirs, expected) = trained(True, "rows", **options), trained(False, "rows", **options)
    assert mine.taken == (0 if "override" in options else 6)
    assert same(mine, theirs)
    agree(found, expected)


def test_a_parameter_with_gaps_is_stepped_as_a_copy() -> None:
    runs = [Run(along, RULES["rows"](), log=False) for along in (True, False)]
    for run in runs:
        gapped = nn.Parameter(torch.linspace(-0.2, 0.2, 40).repeat(2)[::2][:20])
        assert not gapped.is_contiguous()
        run.model[0].bias = gapped
        run.optimizer = nw.optim.AdamW(run.model, lr=3e-2)
        run.control = nw.attach(run.model, run.optimizer, RULES["rows"]())
        if run is runs[1]:
            run.control._one_pass = lambda turn: None
    found, expected = (run.train(3) for run in runs)
    assert same(*runs) and bool(runs[0].control.verify())
    agree(found, expected)


@pytest.mark.parametrize("removed", [True, False])
def test_an_offer_to_a_step_that_was_refused_does_not_stand(removed: bool) -> None:
    """Otherwise rows would be bounded by rules that are gone, or twice."""
    run, _ = trained(True, "rows", steps=2)
    refuse = run.optimizer.register_step_pre_hook(lambda *_: 1 / 0)    # after the control's
    with pytest.raises(ZeroDivisionError):
        run.optimizer.step()
    refuse.remove()
    if removed:
        run.control.remove()
    with torch.no_grad():
        run.model[0].weight.mul_(10)
    run.optimizer.step()
    assert run.optimizer._offered is None and (float(run.model[0].weight.norm(dim=1).max()) > 0.5) == removed


def test_two_controls_act_one_after_the_other() -> None:
    run = Run(True, [nw.max_norm(0.5, params="0.*")], log=False)
    with pytest.warns(UserWarning, match="has a control already"):
        nw.attach(run.model, run.optimizer, [nw.max_norm(0.4, params="2.*")])
    run.train(3)
    assert run.taken == 0 and bool(run.control.verify())


def test_a_second_control_in_the_midst_of_training_takes_nothing_from_the_first() -> None:
    """Its rules had found their work done, by the kernel's word on an earlier step."""
    runs = [Run(along, [nw.max_norm(0.5)], log=False) for along in (True, False)]
    for run in runs:
        run.optimizer.param_groups[0]["lr"] = 0.3
        for k in range(8):
            if k == 3:
                with pytest.warns(UserWarning, match="has a control already"):
                    second = nw.attach(run.model, run.optimizer, [nw.clip_grad_norm(1.0)])
            if k == 6:
                second.remove()
            x, y = torch.randn(16, 12, generator=run.data), torch.randint(4, (16,), generator=run.data)
            run.optimizer.zero_grad()
            nn.functional.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            assert run.control.verify(), k
        run._patch.undo()
    assert same(*runs) and runs[0].taken == 5


def test_without_a_log_the_fast_path_takes_it_too() -> None:
    (mine, found), (theirs, expected) = trained(True, "rows", log=False), trained(False, "rows", log=False)
    assert mine.taken == 6 and same(mine, theirs)
    agree(found, expected)


def test_an_offer_ends_with_its_step() -> None:
    run, _ = trained(True, "rows")
    assert run.optimizer._offered is None
    assert isinstance(run.control.engine.program(0).one_pass, OnePass)
