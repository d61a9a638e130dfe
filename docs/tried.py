"""What was tried for the GPT task and others, Ridge among them, on development seeds: ``python docs/tried.py gpt --data DIR``.

Every variant trains to a share of the task's horizon with every seed; finished runs are kept in ``docs/results/tried.runs.jsonl`` and not
done again. ``docs/make.py`` writes the table of docs/results.md from it. Seeds 2000 and up are for development: no race reports them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.catalog.contenders import AS_IT_IS, FIRST, Built, Contender
from normwise.experiments.framework.progress import on_stderr
from normwise.experiments.framework.store import MAYBE, NUMBER, Form, Run
from normwise.experiments.framework.study import Options, opened
from normwise.experiments.race.run import RaceRun, train
from normwise.experiments.tasks.load import load_task
from normwise.experiments.tasks.task import HELD_OUT, STEPS, Task
from normwise.norms.linalg import polar

RESULTS = Path(__file__).parent / "results" / "tried.runs.jsonl"
Build = Callable[[nn.Module], Built]
REST = {"lr": 0.008, "betas": (0.9, 0.99), "weight_decay": 0.1}


def preset(name: str, **columns: Any) -> Build:
    """A preset at Ridge's rates; columns of its main row."""
    return lambda model: (getattr(nw.optim, name)(model, 0.02, adamw=dict(REST), **columns), None)


class Metric(torch.optim.Optimizer):
    """Ridge with another map in the place of its own; for maps that keep a memory of past gradients, which no row of the library does.

    act: the map's name, see ``mapped``. beta: of the running mean of g·gᵀ and gᵀ·g. columns: of the Ridge that takes everything else.
    The gates of an LSTM are one matrix here.
    """

    def __init__(self, model: nn.Module, act: str, beta: float = 0.8, momentum: float = 0.8, decay: float = 0.3, **columns: Any) -> None:
        self.inner = nw.optim.Ridge(model, **{"adamw": dict(REST), **columns})
        self.act, self.beta, self.momentum, self.decay, self.count = act, beta, momentum, decay, 0
        super().__init__(self.inner.param_groups, {})
        self.inner.param_groups = self.param_groups
        assert self.inner.routing is not None
        of = self.inner.routing.of
        named = [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
        self.matrices = {p for name, p in named if of[name].startswith("ridge")}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        lr = self.param_groups[0]["lr"]
        for p in self.matrices:
            state, g = self.state[p], p.grad.flatten(1)
            m = state.setdefault("momentum", torch.zeros_like(g)).lerp_(g, 1 - self.momentum)
            u = self.mapped(p, g, g.lerp(m, self.momentum))
            p.mul_(1 - lr * self.decay).add_((u / u.norm()).view_as(p), alpha=-lr * 0.2 * p.numel() ** 0.5)
            p.grad = None
        self.inner.step()

    def mapped(self, p: Tensor, g: Tensor, d: Tensor) -> Tensor:
        """d, the momentum of p, after the map; U, Σ, V are its singular value decomposition, L and R the running means."""
        state = self.state[p]
        if self.act in ("kernel", "frequencies"):
            return by_kernel(d.view_as(p), self.param_groups[0]["damping"], self.act == "frequencies").flatten(1)
        if self.act == "mixed":
            slow: Tensor = state.setdefault("slow", torch.zeros_like(g)).lerp_(g, 1 - 0.97)
            x = d + 0.5 * slow
            gram = x @ x.mT
            return torch.linalg.solve(gram + 0.03 * gram.diagonal().mean() * torch.eye(len(gram)), x)
        if self.act.startswith("stale"):
            return self.stale(p, d, int(self.act.removeprefix("stale")))
        if self.act == "power":
            u, s, vh = torch.linalg.svd(d, full_matrices=False)
            return u * (s / s[0] + 0.01).pow(-0.25) @ vh
        left, right = (state.setdefault(k, torch.zeros(n, n)) for k, n in (("L", g.shape[0]), ("R", g.shape[1])))
        left.lerp_(g @ g.mT, 1 - self.beta)
        right.lerp_(g.mT @ g, 1 - self.beta)
        if self.act == "history":
            return torch.linalg.solve(left + 0.03 * left.diagonal().mean() * torch.eye(len(left)), d)
        if self.act == "metric":
            root = power(right, -0.25)
            return polar(d @ root) @ root
        if self.act == "shampoo":
            return power(left, -0.25) @ d @ power(right, -0.25)
        ql, qr = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
        turned = ql.mT @ g @ qr
        square = state.setdefault("square", torch.zeros_like(g)).lerp_(turned.square(), 1 - self.beta) / (1 - self.beta**self.count)
        return ql @ (ql.mT @ d @ qr / square.sqrt().add(1e-12)) @ qr.mT

    def stale(self, p: Tensor, d: Tensor, every: int) -> Tensor:
        """Ridge's map by the inverse that the momentum had up to ``every`` - 1 steps ago, on the smaller side."""
        state, x = self.state[p], d if d.shape[0] <= d.shape[1] else d.mT
        if (self.count - 1) % every == 0:
            gram = x @ x.mT
            state["inverse"] = torch.linalg.inv(gram + self.param_groups[0]["damping"] * gram.diagonal().mean() * torch.eye(len(gram)))
        u: Tensor = state["inverse"] @ x
        return u if x is d else u.mT


class Averaged(torch.optim.Optimizer):
    """Another optimizer whose weights are averaged; ``eval`` puts the average in their place, where the race scores them.

    way: ``"ema"``, a running mean of what the optimizer steps; ``"free"``, the schedule-free average of Defazio et al. (2024): gradients
    are taken at (1 − β)·z + β·x of the iterates z and their mean x.
    """

    def __init__(self, inner: torch.optim.Optimizer, way: str, beta: float) -> None:
        self.inner, self.way, self.beta, self.count = inner, way, beta, 0
        super().__init__(inner.param_groups, {})
        inner.param_groups = self.param_groups
        self.weights = [p for group in self.param_groups for p in group["params"]]
        self.iterates, self.means = ([p.detach().clone() for p in self.weights] for _ in range(2))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        if self.way == "free":
            torch._foreach_copy_(self.weights, self.iterates)
        self.inner.step()
        torch._foreach_lerp_(self.means, self.weights, 1 / self.count if self.way == "free" else max(1 - self.beta, 1 / self.count))
        if self.way == "free":
            torch._foreach_copy_(self.iterates, self.weights)
            torch._foreach_lerp_(self.weights, self.means, self.beta)

    @torch.no_grad()
    def eval(self) -> None:
        torch._foreach_copy_(self.weights, self.means)


def averaged(way: str, beta: float, name: str = "Ridge", **columns: Any) -> Build:
    return lambda model: (Averaged(preset(name, **columns)(model)[0], way, beta), None)    # type: ignore[arg-type]


def by_kernel(d: Tensor, damping: float, frequencies: bool) -> Tensor:
    """Ridge's map of a convolution's momentum for each entry of its kernel apart, or for each of the kernel's frequencies."""
    x = torch.fft.fft2(d.double()) if frequencies else d.double()
    x = x.permute(2, 3, 0, 1)
    gram = x @ x.mH
    size = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1) / min(x.shape[-2:])
    u = torch.linalg.solve(gram + (damping * size + 1e-30)[..., None, None] * torch.eye(len(d)), x).permute(2, 3, 0, 1)
    return (torch.fft.ifft2(u).real if frequencies else u).float().contiguous()


def power(x: Tensor, exponent: float) -> Tensor:
    """Of a symmetric matrix, with a ten-thousandth of its largest eigenvalue added."""
    values, vectors = torch.linalg.eigh(x.double())
    return ((vectors * (values.clamp(min=0) + 1e-4 * values[-1] + 1e-30).pow(exponent)) @ vectors.mT).float()


MUON = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3, "polar": "fast"}


def muon_on_adam(model: nn.Module) -> Built:
    """Muon with another direction, which makes it another method: a row of our own."""
    routing = preset("Muon", **MUON)(model)[0].routing
    matrices = {column: value for column, value in routing.rows["muon"].items() if column != "momentum"}    # Adam has betas
    rows = {**routing.rows, "muon": {**matrices, "direction": "adam", "betas": (0.8, 0.95), "eps": 1e-8}}
    roles = {entry.role: routing.of[entry.name] for entry in routing.entries}
    return nw.optim.NormOptimizer(model, rows, roles, "muon"), None


VARIANTS: dict[str, tuple[str, Build, dict[str, Any]]] = {
    "ridge": ("Ridge as it stands", preset("Ridge"), {}),
    "ridge-linear": ("Ridge, the rate to zero from the start", preset("Ridge"), {"schedule": "linear"}),
    "ridge-orthogonal": ("Ridge from semi-orthogonal weights", preset("Ridge"), {"init": "orthogonal"}),
    "ridge-half-batch": ("Ridge, half the batch, rate / √2", lambda m: (nw.optim.Ridge(m, 0.0141, adamw=dict(REST)), None), {"batch": 0.5}),
    "ridge-clip": ("Ridge, gradients clipped to a global norm of 1", preset("Ridge"), {"clip": 1.0}),
    "ridge-slow": ("Ridge with momentum 0.95", preset("Ridge", momentum=0.95), {}),
    "ridge-rows": ("Ridge, units divided by their running RMS (NorMuon)", preset("Ridge", row_beta=0.95), {}),
    "ridge-cautious": ("Ridge, cautious decay", preset("Ridge", decay="cautious"), {}),
    "ridge-undecayed": ("Ridge without decay", preset("Ridge", weight_decay=0.0), {}),
    "ridge-sphere": ("Ridge on spheres of the initial norms, no decay", preset("Ridge", hold="sphere", weight_decay=0.0), {}),
    "ridge-brake": ("Ridge, half of the growth of each norm taken back", preset("Ridge", hold="radial_brake", limit=0.5), {}),
    "ridge-floor": ("Ridge, no unit below half of its initial share", preset("Ridge", hold="row_floor", limit=0.5), {}),
    "muon": ("Muon, momentum 0.8", preset("Muon", momentum=0.8, **MUON), {}),
    "muon-slow": ("Muon, momentum 0.95", preset("Muon", momentum=0.95, **MUON), {}),
    "muon-adam": ("Muon on Adam's direction", muon_on_adam, {}),
    "power": ("U Σ^(−1/4) Vᵀ of the momentum", lambda m: (Metric(m, "power"), None), {}),
    "metric": ("polar factor in the metric of past gradients, R^(1/4)", lambda m: (Metric(m, "metric"), None), {}),
    **{
        f"stale-{k}": (f"Ridge, its inverse taken anew every {k} steps" if k > 1 else "Ridge, by this table's own code",
                       partial(lambda act, m: (Metric(m, act, damping=0.03), None), f"stale{k}"), {}) for k in (1, 2, 4, 8)
    },
    "ema": ("Ridge, scored at the mean of about the last 50 weights", averaged("ema", 0.98), {}),
    "ema-flat": ("the same with a rate that is held", averaged("ema", 0.98), {"schedule": "flat"}),
    "free": ("Ridge, schedule-free, its rate held", averaged("free", 0.9), {"schedule": "flat"}),
    "mixed": ("Ridge of a fast momentum and half a slow one, 0.97", lambda m: (Metric(m, "mixed"), None), {}),
    "concave": ("Ridge, the rate by 1 − t²", preset("Ridge"), {"schedule": "concave"}),
    "cooldown": ("Ridge, the rate held for four fifths, then 1 − √t", preset("Ridge"), {"schedule": "cooldown"}),
    "history": ("Ridge by the second moment of past gradients", lambda m: (Metric(m, "history"), None), {}),
    "shampoo": ("Shampoo, L^(−1/4) d R^(−1/4)", lambda m: (Metric(m, "shampoo"), None), {}),
    "soap": ("SOAP, Adam in the eigenbasis, β 0.95", lambda m: (Metric(m, "soap", 0.95), None), {}),
}  # fmt: skip
"""By name: what it is, how it is built, what it chooses of everybody's choices."""

TUNED: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "cnn": ({"lr": 0.02, "rest": 0.016, "damping": 0.03}, {"schedule": "linear"}),
    "resnet": ({"lr": 0.04, "rest": 0.008, "damping": 0.1}, {"schedule": "linear", "clip": 1.0}),
    "lstm": ({"lr": 0.04, "rest": 0.016, "damping": 0.1}, {"schedule": "linear", "init": "orthogonal"}),
    "gpt": ({"lr": 0.02, "rest": 0.008, "damping": 0.03}, {"init": "orthogonal"}),
}
"""What the race's search came to for Ridge, by task."""
SHORT = {"betas": (0.8, 0.95)}
FASTER = {"momentum": 0.8}
ATTENTION = {"*.q.weight": 3.0, "*.k.weight": 3.0, "*.v.weight": 0.5, "*.out.weight": 0.5}
OWN = {"init": "own"}
ON_TUNED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tuned": ("Ridge as the race tuned it", {}, {}),
    "tuned-half": ("half the batch", {}, {"batch": 0.5}),
    "tuned-half-low": ("half the batch, rates × 0.7", {"factor": 0.7}, {"batch": 0.5}),
    "tuned-quarter-low": ("a quarter of the batch, rates × 0.7", {"factor": 0.7}, {"batch": 0.25}),
    "tuned-short": ("β (0.8, 0.95) for the rest", {"adamw": SHORT}, {}),
    "tuned-half-short": ("half the batch, β (0.8, 0.95) for the rest", {"adamw": SHORT}, {"batch": 0.5}),
    "tuned-half-low-short": ("half the batch, rates × 0.7, β (0.8, 0.95) for the rest", {"factor": 0.7, "adamw": SHORT}, {"batch": 0.5}),
    "tuned-gates": ("gates with momentum 0.8", {"by_role": {"recurrent": FASTER}}, {}),
    "tuned-gates-short": ("gates with momentum 0.8, β (0.8, 0.95) for the rest", {"by_role": {"recurrent": FASTER}, "adamw": SHORT}, {}),
    "tuned-gates-slow": ("gates with momentum 0.95", {"by_role": {"recurrent": {"momentum": 0.95}}}, {}),
    "tuned-gates-damped": ("gates with damping 0.3", {"by_role": {"recurrent": {"damping": 0.3}}}, {}),
    "tuned-rows": ("units divided by their running RMS (NorMuon)", {"row_beta": 0.95}, {}),
    "tuned-decay-1": ("decay 1 instead of 0.3", {"weight_decay": 1.0}, {}),
    "tuned-decay-0.1": ("decay 0.1 instead of 0.3", {"weight_decay": 0.1}, {}),
    "tuned-head": ("the head by Ridge too", {"override": {"role:head": "ridge"}}, {}),
    "tuned-both-ends": ("head and embeddings by Ridge too", {"override": {"role:head": "ridge", "role:embedding": "ridge"}}, {}),
    "tuned-gates-as-one": ("the gates of a layer as one matrix", {"by_role": {"recurrent": {"per": "tensor"}}}, {}),
    "tuned-scores": ("queries and keys at 2.5 times the rate", {"rates": {"*.q.weight": 2.5, "*.k.weight": 2.5}}, {}),
    "tuned-own": ("own initial weights", {}, OWN),
    "tuned-attention": ("queries and keys at 3 times the rate, values and output at half, own initial weights", {"rates": ATTENTION}, OWN),
    "tuned-gates-0.85": ("gates with momentum 0.85", {"by_role": {"recurrent": {"momentum": 0.85}}}, {}),
    "tuned-gates-loose": (
        "gates with momentum 0.85 and decay 0.1", {"by_role": {"recurrent": {"momentum": 0.85, "weight_decay": 0.1}}}, {}
    ),
    "tuned-head-decayed": ("the head with decay 1 instead of 0.1", {"by_role": {"head": {"weight_decay": 1.0}}}, {}),
    "tuned-head-slow": ("the head at 0.3 times the rate", {"override": {"role:head": 0.3}}, {}),
    "tuned-role": ("by role, as `ridge_roles` races", {"role": True}, {}),
    "tuned-role-own": ("by role, own initial weights", {"role": True}, OWN),
    "tuned-kernel": ("convolutions entry by entry of their kernels", {"act": "kernel"}, {}),
    "tuned-frequencies": ("convolutions frequency by frequency of their kernels", {"act": "frequencies"}, {}),
    "tuned-rest-undecayed": ("no decay of the rest", {"adamw": {"weight_decay": 0.0}}, {}),
}
"""By name, of variants of what was tuned: what it is, columns of Ridge (``factor``: times both rates; ``rates``: selectors of matrices with
factors of their rate alone, at the same decay λ; ``role``: as the contender by role; ``act``: of ``Metric``), choices."""


def on_tuned(task: str, name: str) -> tuple[str, Build, dict[str, Any]]:
    """A variant of the tuned form, as ``VARIANTS`` has the others."""
    (numbers, base), (label, varied, chosen) = TUNED[task], ON_TUNED[name]
    columns = dict(varied)
    factor = columns.pop("factor", 1.0)
    rest = {"lr": numbers["rest"] * factor, "betas": (0.9, 0.99), **columns.pop("adamw", {})}
    lr, damping, rates = numbers["lr"] * factor, numbers["damping"], columns.pop("rates", {})
    role, act = columns.pop("role", False), columns.pop("act", None)

    def build(model: nn.Module) -> Built:
        if role:
            return FIRST["ridge_roles"].build(model, numbers)
        if act:
            return Metric(model, act, lr=lr, damping=damping, adamw=dict(rest)), None
        made = nw.optim.Ridge(model, lr, damping=damping, adamw=dict(rest), **columns)
        if not rates:
            return made, None
        assert made.routing is not None
        rows = {selector: {**made.routing.rows["ridge"], "lr": lr * times} for selector, times in rates.items()}
        return nw.optim.Ridge(model, lr, damping=damping, adamw=dict(rest), override=rows, **columns), None

    return label, build, base | chosen


@dataclass(frozen=True)
class TriedRun(Run):
    """A variant with a seed. task: its name. key: its fingerprint. share: of the task's horizon."""

    task: str
    key: str
    variant: str
    share: float
    seed: int
    kind: ClassVar[str] = "tried"
    unit: ClassVar[str] = "steps"
    form: ClassVar[Form] = {"result": MAYBE, "seconds": NUMBER}    # type: ignore[assignment]

    @property
    def amount(self) -> int:
        return round(STEPS[self.task] * self.share)

    def told(self, result: dict[str, Any]) -> str:
        return f"{self.task} {self.variant} {self.seed}: {result}"

    def train(self, task: Task) -> dict[str, Any]:
        return one(task, self.variant, self.amount * task.batch, self.seed)


def one(task: Task, name: str, samples: int, seed: int) -> dict[str, Any]:
    """One variant's run; its result and seconds."""
    _, build, chosen = VARIANTS[name] if name in VARIANTS else on_tuned(task.name, name)
    contender = f"tried {name}"    # for the time of this run; some variants are contenders by their plain name
    FIRST[contender] = Contender(name, "", (), lambda model, numbers: build(model))
    numbers = {axis.name: axis.value(0) for axis in AS_IT_IS} | chosen
    try:
        result = train(RaceRun(task.key, contender, tuple(numbers.items()), samples, seed, False, 1, torch.__version__), task)
    finally:
        del FIRST[contender]
    return {"result": result["result"], "seconds": result["seconds"]}


def main() -> None:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=[name for name in STEPS if name not in HELD_OUT])
    parser.add_argument("--data", required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=[*VARIANTS, *ON_TUNED], metavar="NAME")
    parser.add_argument("--share", type=float, default=0.36)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--executor", help="dask://HOST:PORT; its workers need this folder on their PYTHONPATH")
    args = parser.parse_args()
    options = Options(args.task, args.data, workers=args.workers, executor=args.executor, state=RESULTS)
    with opened(options, on_stderr()) as driver:
        setup = partial(load_task, args.task, args.data)
        task = setup()
        driver.on(task, setup)
        runs = [TriedRun(args.task, task.key, name, args.share, 2000 + k) for k in range(args.seeds) for name in args.variants]
        driver.start(len(runs))
        driver.run({"tried": (found for found in [runs])})    # all at once: nothing depends on what comes out


if __name__ == "__main__":
    import tried  # by its own name, so that workers find the runs

    tried.main()
