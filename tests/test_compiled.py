"""``torch.compile`` of the model, of the optimizer's step and of the whole training step, with a control: the same results, no compilation
after the second step. Traced and run as graphs; ``make test-long`` compiles to machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw
from normwise import optim
from normwise.optim import Muon

STEPS = 7


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def rules() -> list[Any]:
    """Numbers that change from step to step, states that a trace would freeze, rules that act on some steps only."""
    return [
        nw.clip_grad_norm(nw.schedules.linear(0.5, 0.1, 20)), nw.zclip(params="0.*"), nw.cpr(0.02, params="2.weight"), nw.weight_decay(0.1),
        nw.l1_prox(nw.schedules.linear(0.0, 0.01, 10), params="4.weight"), nw.spectral_cap(0.8, params="2.weight", tolerance=0.01),
        nw.max_norm(0.5, params="0.weight", every=2), nw.unit_norm("init", params="4.weight"),
    ]    # fmt: skip


def inside() -> list[Any]:
    """Within a preset's step: updates clipped before they are applied."""
    small = nw.Rule(params="*.weight", on="update", action="clip_norm", norm="l2", radius=nw.schedules.linear(1e-3, 1e-1, 6))
    return [small, nw.spectral_cap(0.8, params="2.weight", tolerance=0.01)]


MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda m: AdamW(m.parameters(), lr=0.05),
    "Muon with a policy": lambda m: Muon(m, policy=inside()),
    "bf16, stochastic": lambda m: optim.SGD(m.bfloat16(), lr=0.02, rounding="stochastic"),
}


class Run:
    """Some steps, with what is compiled: "nothing", "model", "step" (the optimizer's) or "whole"."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], compiled: str, backend: str) -> None:
        self.model = net()
        self.optimizer = make(self.model)
        self.control = nw.attach(self.model, self.optimizer, rules())

        def compile_if(what: str, function: Any) -> Any:
            return torch.compile(function, backend=backend) if compiled == what else function

        self.forward = compile_if("model", self.model)
        self.update = compile_if("step", lambda: self.optimizer.step())
        self.train = compile_if("whole", self._train)

    def _train(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = (self.forward(x).float() - x[:, :3].float()).square().mean()
        loss.backward()
        self.update()
        return loss

    def run(self) -> list[int]:
        """The number of graphs after each step; a compilation after the second is an error."""
        graphs = []
        for seed in range(STEPS):
            x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed)).to(next(self.model.parameters()).dtype)
            with torch._dynamo.config.patch(error_on_recompile=seed > 1):
                self.train(x)
            graphs.append(counters["stats"]["unique_graphs"])
        return graphs


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "compiled"), [
    ("SGD", "model"), *(pytest.param("SGD", what, marks=pytest.mark.long) for what in ("step", "whole")),
    pytest.param("AdamW", "whole", marks=pytest.mark.long), ("Muon with a policy", "whole"), ("bf16, stochastic", "step"),
])    # fmt: skip
def test_compiled_it_is_the_same_run(name: str, compiled: str) -> None:
    plain, other = (Run(MAKE[name], what, "aot_eager") for what in ("nothing", compiled))
    assert plain.run() == [0] * STEPS
    graphs = other.run()
    assert graphs[0] >= 1 and graphs[1:] == [graphs[1]] * (STEPS - 1)
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        few = {"rtol": 2.0**-6, "atol": 4e-3} if p.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 5e-6}
        torch.testing.assert_close(p, q, **few)    # graphs may sum in another order
    assert plain.control.verify() and other.control.verify() and other.control.steps == STEPS
    assert plain.control.violations() == other.control.violations()


def test_a_closure_in_a_compiled_step() -> None:
    plain, compiled = net(), net()
    for model, wrap in ((plain, lambda f: f), (compiled, torch.compile(backend="eager"))):
        optimizer = SGD(model.parameters(), lr=0.1)
        control = nw.attach(model, optimizer, rules())

        def step(x: Tensor, model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)    # type: ignore[arg-type]

        for seed in range(3):
            wrap(step)(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
        assert control.steps == 3 and control.verify()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SGD", "Muon with a policy"])
@pytest.mark.parametrize("compiled", ["model", "step", "whole"])
def test_compiled_to_machine_code_it_is_the_same_run(name: str, compiled: str) -> None:
    plain, other = (Run(MAKE[name], what, "inductor") for what in ("nothing", compiled))
    plain.run()
    try:
        graphs = other.run()
    except Exception as error:
        if "InvalidCxxCompiler" in repr(error):
            pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")
        raise
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert other.control.verify() and other.control.steps == STEPS
