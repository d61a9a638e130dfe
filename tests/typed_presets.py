"""What a type checker sees of the presets, for mypy alone, which ``make check`` runs: nothing here is executed.

mypy is strict, so that an ``ignore`` that nothing needs is an error: each misspelt option and wrong type below must be found.
"""

import torch
from torch import nn

import normwise as nw

net = nn.Linear(2, 2)
good: torch.optim.Optimizer = nw.optim.Muon(net, lr=0.1, ns_steps=3, adjust_lr_fn="match_rms_adamw", per="head", adamw={"lr": 1e-3})
nw.optim.auto(net, override={"weight": 2.0}, policy=[nw.max_norm(1.0)])
nw.optim.AdamW(net.parameters(), 1e-3, (0.9, 0.99), hold="ball", limit=2.0, layouts={})
nw.optim.Muon(net, momemtum=0.9)  # type: ignore[call-arg]
nw.optim.AdamW(net, beta=(0.9, 0.99))  # type: ignore[call-arg]
nw.optim.Ridge(net, weight_decay="much")  # type: ignore[arg-type]
nw.optim.auto(net, lr=0.1)  # type: ignore[call-arg]
nw.optim.Scion(net, radius=None)  # type: ignore[arg-type]
