"""Attach rules to a training loop of your own: with SGD, with AdamW and a scheduler, and with a closure.

Run it with ``python examples/attach.py``. It needs torch and normwise, and takes a few seconds on a CPU. Each of the three
runs keeps the norms it promised, which ``control.verify()`` measures again in float64 at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import normwise as nw

RULES = [
    nw.l2_penalty(1e-3),  # adds 1e-3 * w to the gradient of every weight matrix, before the step
    nw.clip_grad_norm(1.0),  # all gradients as one vector: at most this long, before the step
    nw.max_norm(2.0),  # the incoming weights of each unit: at most this long, after the step
]


def data() -> tuple[Tensor, Tensor]:
    """A thousand points on two spirals, which no linear model can tell apart."""
    gen = torch.Generator().manual_seed(0)
    t = torch.rand(1000, generator=gen) * 3 + 0.3
    label = torch.randint(0, 2, (1000,), generator=gen)
    angle = 2.5 * t + torch.pi * label
    points = torch.stack([t * angle.cos(), t * angle.sin()], dim=1)
    return points + 0.05 * torch.randn(1000, 2, generator=gen), label


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def batches(epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    points, label = data()
    for epoch in range(epochs):
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(100):
            yield points[chosen], label[chosen]


def with_sgd() -> tuple[nn.Module, nw.Control]:
    """The loop is the one that was there before; one line attaches the rules."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    control = nw.attach(model, optimizer, RULES)
    for x, y in batches(epochs=40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, control


def with_adamw_and_a_scheduler() -> tuple[nn.Module, nw.Control]:
    """Decay and prox take the rate that the scheduler has set; a radius may be a schedule itself."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400)
    rules = [nw.weight_decay(0.01), nw.l1_prox(1e-3), nw.max_norm(nw.schedules.linear(4.0, 2.0, steps=300))]
    control = nw.attach(model, optimizer, rules, on_nonfinite="raise")
    for x, y in batches(epochs=40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return model, control


def with_a_closure() -> tuple[nn.Module, nw.Control]:
    """LBFGS evaluates its closure many times a step: penalties act at each evaluation, bounds hold after the step.

    Its line search compares losses, so the closure tells it the penalty's value too; the gradient gets it from the rule.
    """
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    control = nw.attach(model, optimizer, [nw.l2_penalty(1e-3), nw.clip_weight_value(1.5), nw.max_norm(2.0)])
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach() + control.penalty()

    for _ in range(25):
        optimizer.step(closure)
    return model, control


def report(name: str, run: Callable[[], tuple[nn.Module, nw.Control]]) -> bool:
    """One run: its accuracy, what the rules did at the last step, and whether every bound holds."""
    model, control = run()
    x, y = data()
    accuracy = float((model(x).argmax(1) == y).float().mean())
    verification = control.verify()
    print(f"\n{name}: accuracy {accuracy:.1%}, penalty {control.penalty():.4f}, weight norm {control.norms().total['weight']:.2f}")
    for rule, count in control.violations().items():
        print(f"  {rule}: changed {count} blocks at the last step")
    print(f"  {verification}")
    return bool(verification)


def main() -> int:
    torch.set_num_threads(1)  # a network this small is slower on several
    print(nw.Policy(RULES).explain(network()))
    runs = {"SGD": with_sgd, "AdamW and a scheduler": with_adamw_and_a_scheduler, "LBFGS and its closure": with_a_closure}
    held = [report(name, run) for name, run in runs.items()]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
