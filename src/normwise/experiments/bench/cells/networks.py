"""What ``bench control`` measures on: networks, one batch for each, and their weights as somebody sees them who has no normwise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.models.cnn import CNN
from normwise.experiments.tasks.models.gpt import GPT
from normwise.experiments.tasks.models.resnet import ResNet

Loss = Callable[[nn.Module], Tensor]
VOCABULARY, WIDTH, LAYERS, HEADS, PLACES = 103, 256, 6, 4, 128
IMAGE_SIDE = 8    # of scikit-learn's digits, which `normwise compare cnn` trains on


@dataclass(frozen=True)
class Case:
    """A network and a batch. build: makes the network. batch: makes a batch, and gives the loss on it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Loss]
    needs: str = ""
    """A package that it needs, which may be absent."""
    on_cuda: bool = False
    """Whether it is too large for a CPU."""

    def lacks(self) -> str:
        """What keeps it from being measured here; nothing where it can be."""
        if self.on_cuda and not torch.cuda.is_available():
            return "there is no CUDA device"
        return f"{self.needs} is not installed" if self.needs and find_spec(self.needs) is None else ""

    def there(self) -> bool:
        return not self.lacks()


@dataclass(frozen=True)
class Weight:
    """One weight of a layer. axis: of the output units. matrices: how many matrices lie side by side along it, three in a fused QKV."""

    tensor: Tensor
    axis: int = 0
    matrices: int = 1

    @property
    def others(self) -> tuple[int, ...]:
        """The axes that one unit's norm goes over."""
        return tuple(d for d in range(self.tensor.ndim) if d != self.axis)

    def each_matrix(self) -> list[Tensor]:
        """Views of two axes."""
        return [self.tensor.flatten(1)] if self.axis == 0 else list(self.tensor.chunk(self.matrices, self.axis))


def weights_of(model: nn.Module) -> list[Weight]:
    """Every weight but biases and gains, a shared one once; ``Conv1D`` of transformers stores units as columns."""
    found: dict[int, Weight] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) or type(module).__name__ == "Conv1D":
            columns = type(module).__name__ == "Conv1D"
            weight: Any = module.weight
            found.setdefault(id(weight), Weight(weight, int(columns), 3 if columns and name.endswith("c_attn") else 1))
    return list(found.values())


def mlp(count: int, width: int, bias: bool = True) -> nn.Module:
    """``count`` square layers with a ReLU after each but the last."""
    layers = [layer for _ in range(count) for layer in (nn.Linear(width, width, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def gpt2(
    vocabulary: int = VOCABULARY, places: int = PLACES, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS
) -> nn.Module:
    """Hugging Face's GPT-2 with random weights, by default at the size of the tasks' GPT: 4.8M parameters."""
    transformers: Any = import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=places, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )
    network: nn.Module = transformers.GPT2LMHeadModel(config)
    return network


def images(count: int, channels: int, side: int) -> Loss:
    """Random images in ten classes."""
    x, y = torch.randn(count, channels, side, side), torch.randint(10, (count,))
    return lambda net: F.cross_entropy(net(x), y)


def tokens(rows: int = 8, length: int = 64, vocabulary: int = VOCABULARY) -> Loss:
    """Random characters; each predicts the next. On a CUDA device in bf16, as models of that size are trained."""
    x = torch.randint(vocabulary, (rows, length + 1))

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext():
            out: Any = net(x[:, :-1])
        return F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), x[:, 1:].flatten())

    return loss


def vectors(count: int, width: int) -> Loss:
    x = torch.randn(count, width)
    return lambda net: net(x).square().mean()


CNN_CASE, GPT2_CASE, LARGE = "the article's CNN", "GPT-2 of 4.8M, transformers", "GPT-2 of 124M, transformers"
SMALL, MANY, WIDE, WIDEST = "MLP 2 × 64²", "200 × 64², no bias", "MLP 8 × 1024²", "MLP 8 × 2048²"
CASES = (
    Case(SMALL, partial(mlp, 2, 64), partial(vectors, 64, 64)),
    Case(CNN_CASE, partial(CNN, (1, IMAGE_SIDE, IMAGE_SIDE), 10), partial(images, 64, 1, IMAGE_SIDE)),
    Case(MANY, partial(mlp, 200, 64, bias=False), partial(vectors, 64, 64)),
    Case("residual CNN of 0.70M", partial(ResNet, 3, 10), partial(images, 128, 3, 32)),
    Case("GPT of 4.8M, nn.Linear", partial(GPT, VOCABULARY, WIDTH, LAYERS), tokens),
    Case(GPT2_CASE, gpt2, tokens, needs="transformers"),
    Case(LARGE, partial(gpt2, 50257, 1024, 768, 12, 12), partial(tokens, 8, 1024, 50257), needs="transformers", on_cuda=True),
    Case(WIDE, partial(mlp, 8, 1024), partial(vectors, 128, 1024)),
    Case(WIDEST, partial(mlp, 8, 2048), partial(vectors, 128, 2048)),
)
AT_FLOOR = (GPT2_CASE, WIDE, WIDEST)
"""Where memory, not the number of calls, is what a norm costs."""
