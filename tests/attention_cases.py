"""Models with an attention or gates, for tests of what is told by a parameter's part in the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

F64 = torch.float64
WIDTH = 4


class Parts(nn.Module):
    """Layers under given names: a Linear for each, or what is given."""

    def __init__(self, /, *names: str, **layers: nn.Module) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        for name, layer in layers.items():
            self.add_module(name, layer)


class Separate(nn.Module):
    """torch's attention with a weight for each of q, k and v."""

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=F64) for _ in range(4))
        with torch.no_grad():
            for layer, w in zip((self.q, self.k, self.v), like.in_proj_weight.chunk(3), strict=True):
                layer.weight.copy_(w)
            self.out.weight.copy_(like.out_proj.weight)

    def weights(self) -> Tensor:
        return torch.cat([self.q.weight, self.k.weight, self.v.weight]).detach()


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.up, self.head = attention, nn.Linear(WIDTH, WIDTH, dtype=F64), nn.Linear(WIDTH, 2, dtype=F64)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(5, WIDTH), nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(x))[0])


def grads(model: nn.Module, seed: int = 0) -> None:
    made = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=made, dtype=F64)
