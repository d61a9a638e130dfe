"""Networks as people write them: heads defined first, several heads, convolutional heads, adapters, wrappers, q, k and v in one Linear."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from census.decoders import GPT2
from census.family import Family, Table, Unavailable, hf
from census.words import LLAMA, SEPARATE, fused


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.actor = nn.Linear(16, 4)
        self.critic = nn.Linear(16, 1)
        self.log_std = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.trunk(x)
        return self.actor(h), self.log_std.exp(), self.critic(h)


class HeadFirst(nn.Module):
    """The order of registration says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 3)
        self.fc1 = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc2(self.norm(F.relu(self.fc1(x))))))


class Segmentation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.outc = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outc(F.relu(self.up(self.down(x))))


class FullyConvolutional(nn.Module):
    """As SqueezeNet: the classifier is a convolution, then averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.heads = nn.ModuleDict({"age": nn.Linear(16, 1), "class": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {name: head(h) for name, head in self.heads.items()}


class Contrast(nn.Module):
    """Two towers and a temperature, without normalisation layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(6, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.logit_scale.exp() * F.normalize(self.left(x), dim=-1) @ F.normalize(self.right(y), dim=-1).T


class Causal(nn.Module):
    """nanoGPT's attention."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Patches(nn.Module):
    """timm's attention of a ViT."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(width), attention, nn.LayerNorm(width), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Feed(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Experts(nn.Module):
    """Stacked, ``torch.bmm``: inputs before outputs."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, width, inner) * 0.1)
        self.w2 = nn.Parameter(torch.randn(experts, inner, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        every = torch.bmm(F.gelu(torch.bmm(flat.expand(len(self.w1), *flat.shape), self.w1)), self.w2)
        return torch.einsum("te,etd->td", self.router(flat).softmax(-1), every).view_as(x)


class Language(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], tied: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(24, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 24, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[-1]))
        for block in self.blocks:
            h = block(h)
        return self.lm_head(self.norm(h))


class Pictures(nn.Module):
    """A ViT in plain torch: tokens and positions are bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 16))
        self.blocks = nn.ModuleList(Block(Patches(), Feed()) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(len(x), -1, -1), h], 1) + self.pos_embed
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class Letters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.decoder = nn.Embedding(24, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.lstm(self.embed(x))[0])


class Backbone(nn.Module):
    """Gives features: its last Linear is none of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.blocks = nn.ModuleList(Block(Causal(), Feed()) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


def _peft(build: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def adapted() -> nn.Module:
        try:
            peft = importlib.import_module("peft")
        except ImportError as error:
            raise Unavailable(f"peft is not installed: {error}") from error
        return peft.get_peft_model(build(), peft.LoraConfig(r=4, **options))

    return adapted


def _lightning() -> nn.Module:
    try:
        lightning = importlib.import_module("lightning")
    except ImportError as error:
        raise Unavailable(f"lightning is not installed: {error}") from error

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = HeadFirst()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    return Lit()


def _ddp() -> nn.Module:
    """The group is there to wrap the model, and goes at once: nothing is sent."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if dist.is_initialized():
        return DistributedDataParallel(HeadFirst())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return DistributedDataParallel(HeadFirst())
    finally:
        dist.destroy_process_group()


def _frozen() -> nn.Module:
    net = Pictures()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    return net


def _of(name: str, build: Callable[[], nn.Module], table: Table | None = None, attention: Any = None, **more: Any) -> Family:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return Family(name, "plain torch", seeded, table=table or {}, attention=attention or {}, **more)


NANO: dict[str, Any] = {
    "table": {"*.c_attn.weight": ("hidden", "(m o) i")},
    "attention": fused("*.c_attn.weight", "*.attn.c_proj.weight"),
    "inputs": lambda _: {"x": torch.tensor([[5, 7, 11]])},
}
VIT: dict[str, Any] = {
    "table": {"*.qkv.weight": ("hidden", "(m o) i"), "*cls_token": ("other|embedding", ""), "*pos_embed": ("other|embedding", "")},
    "attention": fused("*.qkv.weight", "*.attn.proj.weight"),
}
OF_GPT2 = fused("*.c_attn.base_layer.weight", "*.attn.c_proj.weight")
PEFT_GPT2: Table = {
    "*.c_attn.base_layer.weight": ("hidden", "i (m o)"),
    "*.lora_A.*": ("hidden", "o i"),
    "*.lora_B.*": ("hidden", "o i|(m o) i"),
}
PEFT_LLAMA: dict[str, Any] = {**SEPARATE, "q": ("*.q_proj.base_layer.weight",), "v": ("*.v_proj.base_layer.weight",), "free": ("*.lora_*",)}
A_STAYS = {"adamw": ("*.lora_A.*",), "note": "of a product B·A only B is stepped as a matrix"}

FAMILIES = [
    _of("actor and critic", ActorCritic, heads=("actor.weight", "critic.weight"), normalised=False, default=True),
    _of("head defined first", HeadFirst, heads=("out.weight",), default=True),
    _of("segmentation", Segmentation, heads=("outc.weight",)),
    _of("classifier of convolutions", FullyConvolutional, heads=("classifier.weight",), normalised=False),
    _of("several tasks", Tasks, heads=("heads.age.weight", "heads.class.2.weight")),
    _of(
        "two towers and a temperature",
        Contrast,
        {"left.weight": ("hidden|head", "o i"), "right.weight": ("hidden|head", "o i")},
        normalised=False,
    ),
    _of(
        "MLP",
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)),
        heads=("4.weight",),
        normalised=False,
    ),
    _of(
        "LSTM of letters",
        Letters,
        {"lstm.weight_?h*": ("recurrent", "(s o) i")},
        sizes={"s": 4},
        heads=("decoder.weight",),
        normalised=False,
    ),
    _of("nanoGPT", lambda: Language(lambda: Block(Causal(), Feed())), heads=("lm_head.weight",), default=True, **NANO),
    _of("nanoGPT, tied", lambda: Language(lambda: Block(Causal(), Feed()), tied=True), tied="wte.weight", **NANO),
    _of("nanoGPT, backbone", Backbone, **NANO),
    _of(
        "stacked experts",
        lambda: Language(lambda: Block(Causal(), Experts())),
        {**NANO["table"], "*.mlp.w?": ("hidden", "e i o")},
        NANO["attention"],
        heads=("lm_head.weight",),
    ),
    _of("timm's ViT", Pictures, heads=("head.weight",), **VIT),
    _of("timm's ViT, all but the head frozen", _frozen, heads=("head.weight",), **VIT),
    _of("DistributedDataParallel", _ddp, heads=("*out.weight",)),
    _of("compiled", lambda: torch.compile(HeadFirst()), heads=("*out.weight",)),  # type: ignore[return-value, arg-type]
    _of("LightningModule", _lightning, heads=("net.out.weight",)),
    _of(
        "LoRA on GPT-2",
        _peft(hf("GPT2LMHeadModel", GPT2), target_modules=["c_attn"], fan_in_fan_out=True),
        PEFT_GPT2,
        {**OF_GPT2, "free": ("*.lora_*",)},
        tied="*.wte.weight",
        **A_STAYS,
    ),
    _of(
        "LoRA on Llama, the head trained too",
        _peft(hf("LlamaForCausalLM", LLAMA), target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
        {"*.lora_?.*": ("hidden", "o i")},
        PEFT_LLAMA,
        heads=("*lm_head.original_module.weight", "*lm_head.modules_to_save.default.weight"),
        default=True,
        **A_STAYS,
    ),
]
