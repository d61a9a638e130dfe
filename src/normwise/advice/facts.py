"""What the model alone tells."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from normwise.advice.costs import size_of
from normwise.advice.probe import Probe
from normwise.errors import PolicyError, a_kind_of
from normwise.optim.presets import MATRICES
from normwise.parameters import forward_source
from normwise.parameters.attention_logits import Attention, find_attentions
from normwise.parameters.forward_source.passage import LEAST_THRESHOLD
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.names import ADAPTED, carries_adapter, class_of
from normwise.parameters.roles import is_normalisation, normalises
from normwise.parameters.scale_free import scale_free

WEIGHTS = ("hidden", "conv", "recurrent", "head")
"""The roles that rules on weights are advised for: an embedding's rows are looked up, not multiplied by."""


@dataclass(frozen=True, eq=False)
class Facts:
    """Of a model with trainable parameters."""

    model: nn.Module
    inventory: Inventory
    seen: Probe | None = None
    """What a probe has measured."""

    @classmethod
    def of(cls, model: object) -> Facts:
        """PolicyError for what is no module and for a model without trainable parameters."""
        if not isinstance(model, nn.Module):
            raise PolicyError(f"advise was given {a_kind_of(model)}: give the model, a torch.nn.Module.")
        facts = cls(model, Inventory(model))
        if not facts.trainable:
            raise PolicyError("the model has no trainable parameters: unfreeze what you want to train before you ask for advice.")
        return facts

    @property
    def trainable(self) -> tuple[Entry, ...]:
        return self.inventory.trainable

    @property
    def name(self) -> str:
        trained = sum(e.param.numel() for e in self.trainable)
        whole = sum(e.param.numel() for e in self.inventory)
        part = f", {size_of(trained)} of them trainable" if trained < whole else ""
        return f"{class_of(self.model).__name__}, {size_of(whole)} parameters in {len(self.inventory)} tensors{part}"

    @cached_property
    def roles(self) -> set[str]:
        """Of what is trained."""
        return {e.role for e in self.trainable}

    @cached_property
    def factors(self) -> list[Entry]:
        """LoRA's A and B that are trained, alone or beside whole matrices."""
        return [e for e in self.trainable if e.adapter in ("A", "B")]

    @cached_property
    def products(self) -> list[Entry]:
        """s·B·A of the factors that are PEFT's."""
        return [e for e in self.inventory.weights if e.adapter == "product" and e.trained]

    @cached_property
    def magnitudes(self) -> list[Entry]:
        """DoRA's lengths of units."""
        return [e for e in self.trainable if e.adapter == "magnitude"]

    @cached_property
    def computed(self) -> list[Entry]:
        """Raw tensors of weights that are computed from them, matrices alone."""
        return [e for e in self.trainable if e.aliases and e.role not in ("gain", "bias")]

    @cached_property
    def complex(self) -> list[Entry]:
        return [e for e in self.trainable if e.param.is_complex()]

    @cached_property
    def complex_weights(self) -> list[Entry]:
        """What no rule on weights takes, whatever its role."""
        return [e for e in self.inventory.weights if e.trained and _is_complex(e)]

    @cached_property
    def normalised(self) -> bool:
        return normalises(self.model)

    @cached_property
    def guessed(self) -> dict[str, str]:
        """What the code says is scale-free: name -> the class of the normalisation."""
        return scale_free(self.model, [e for e in self.inventory.weights if e.trained])

    @cached_property
    def scale_free(self) -> dict[str, str]:
        """The same, and what was measured wins over what was guessed."""
        guessed = {name: norm for name, norm in self.guessed.items() if self.judged.get(name, True)}
        measured = {name: "a normalisation" for name, free in self.judged.items() if free}
        return measured | guessed

    @property
    def judged(self) -> Mapping[str, bool]:
        """Matrix -> whether its length reaches no loss, where a probe has measured that."""
        return self.seen.scale_free if self.seen is not None else {}

    @cached_property
    def attentions(self) -> list[Attention]:
        return find_attentions(self.model, self.inventory)

    @cached_property
    def _unadapted(self) -> list[nn.Module]:
        """The modules but those that add an adapter to a layer, W·x + s·B·A·x, which is one matrix."""
        own = (module for module in self.model.modules() if not (class_of(module).__module__ or "").startswith("peft."))
        return [module for module in own if not carries_adapter(module)]

    @cached_property
    def branches(self) -> int:
        """How many modules add to a stream that goes by them; guessed."""
        # Where a module has tokens and positions, these are what it adds.
        inner = (m for m in self._unadapted if sum(isinstance(child, nn.Embedding) for child in m.children()) < 2)
        return sum(forward_source.adds_to_stream(class_of(module)) for module in inner)

    @cached_property
    def recurrences(self) -> int:
        """How many of torch's recurrent layers there are, which multiply by one matrix at each step."""
        return sum(issubclass(class_of(module), nn.RNNBase | nn.RNNCellBase) for module in self.model.modules())

    @cached_property
    def multiplied(self) -> int:
        """How many modules multiply activations by each other, attentions and normalisations aside; guessed."""
        attending = {id(a.module) for a in self.attentions}
        others = (module for module in self._unadapted if id(module) not in attending and not is_normalisation(module))
        asked = frozenset().union(*(forward_source.asked_of_others(class_of(module)) for module in self.model.modules()))
        return sum(forward_source.multiplies(class_of(module), asked) for module in others)

    @cached_property
    def chained(self) -> bool:
        """Whether the model is a chain of linear layers, all trained, real, and nothing between takes two inputs further apart; proven."""
        return not self.computed and not self.frozen and not self.complex and _is_chain(self.model)

    @cached_property
    def frozen(self) -> list[Entry]:
        """Matrices that do not train, so that no rule bounds them, but LoRA's base."""
        still = (e for e in self.inventory.weights if e.role in WEIGHTS and not e.trained and not e.adapter and len(e.shape) >= 2)
        return [e for e in still if not set(ADAPTED) & set(e.name.split("."))]

    @cached_property
    def packed(self) -> list[str]:
        """Paths of layers whose quantised weights are no parameters, as torch's dynamic quantisation makes them."""
        found: list[str] = []
        for path, module in self.model.named_modules():
            if _is_packed(module) and not any(path.startswith(f"{outer}.") for outer in found if outer):
                found.append(path)
        return found

    @cached_property
    def sparse(self) -> list[str]:
        """Paths of the modules whose trained tables get sparse gradients."""
        found = [(name, module) for name, module in self.model.named_modules() if getattr(module, "sparse", False) is True]
        return [name for name, module in found if any(p.requires_grad for p in module.parameters(recurse=False))]

    @cached_property
    def stacked(self) -> list[Entry]:
        """Stacked experts."""
        return [e for e in self.trainable if "e" in e.layout.axes and e.role == "hidden"]

    @cached_property
    def tied_head(self) -> Entry | None:
        """A trained table that is embedding and head."""
        owners = ((e, {type(module) for module in e.owners}) for e in self.trainable if e.role == "embedding")
        return next((e for e, kinds in owners if any(issubclass(k, nn.Linear) for k in kinds)), None)

    @cached_property
    def new_heads(self) -> list[Entry]:
        """Heads that are no language model's: a new task brings them, with fresh weights."""
        tables = {e.shape[0] for e in self.inventory if e.role == "embedding" and len(e.shape) == 2}
        return [e for e in self.weights(("head",)) if e.shape[0] not in tables and len(e.shape) >= 2]

    @cached_property
    def empty(self) -> list[Entry]:
        """Weights that are zero as a whole."""
        return [e for e in self.weights(WEIGHTS) if not e.param.is_meta and not bool(e.param.any())]

    def weights(self, roles: Collection[str]) -> list[Entry]:
        """What rules on weights act on, of these roles: computed weights in the place of their raw tensors, without LoRA's factors and
        without complex ones."""
        whole = ("", "modules_to_save")
        return [e for e in self.inventory.weights if e.role in roles and e.adapter in whole and e.trained and not _is_complex(e)]

    @cached_property
    def shares(self) -> dict[str, float]:
        """Why `auto` steps weights of two or more dimensions as no matrices, "" for those that it does -> their share of the trainable
        ones; the largest first."""
        sized: dict[str, int] = defaultdict(int)
        for e in self.trainable:
            if e.param.ndim >= 2:
                sized[_unstepped(e)] += e.param.numel()
        whole = max(sum(sized.values()), 1)
        return {why: n / whole for why, n in sorted(sized.items(), key=lambda one: -one[1]) if n}

    @property
    def matrix_share(self) -> float:
        return self.shares.get("", 0.0)

    def pace(self, rate: float) -> dict[str, float]:
        """Role -> by what share of their length AdamW's first steps at this rate move its weights: each entry moves by about the rate."""
        found: dict[str, float] = {}
        for role in (*WEIGHTS, "embedding"):
            stepped = [*self.weights((role,)), *(e for e in self.complex_weights if e.role == role)]
            known = [e.param.detach() for e in stepped if not e.param.is_meta and e.computed is None]
            # Float8 has no norm of its own.
            length = math.hypot(*(float(torch.linalg.vector_norm(p.float() if p.itemsize == 1 else p)) for p in known))
            if length:
                found[role] = rate * math.sqrt(sum(p.numel() for p in known)) / length
        return found

    @property
    def kind(self) -> str:
        """The network of our races that it resembles most."""
        if self.attentions:
            return "patches" if "conv" in self.roles else "attention"
        if "recurrent" in self.roles:
            return "gates"
        sizes = {role: sum(e.param.numel() for e in self.trainable if e.role == role) for role in ("conv", "hidden")}
        if sizes["conv"] > sizes["hidden"]:
            return "normalised convolutions" if self.normalised else "convolutions"
        if "conv" in self.roles and all(_cuts_patches(e.module) for e in self.trainable if e.role == "conv"):    # an MLP-Mixer
            return "patches"
        return "linear layers" if not self.roles & {"conv", "embedding"} else "mixed"


def _unstepped(e: Entry) -> str:
    """Why no matrix step takes a weight, "" where one does."""
    if e.role in MATRICES and e.layout.certain and not e.aliases:
        return ""
    if e.aliases or "parametrizations" in e.name.split("."):    # also what a parametrization adds: a LoRA by hand
        return "tensors that the layers' weights are computed from"
    if e.role in ("gain", "bias"):
        return "gains and biases"
    return f"{e.role}s" if e.role in ("embedding", "head") else "tensors whose axes nobody states"


def _is_packed(module: nn.Module) -> bool:
    """Of torch's quantised layers one with weights: a Linear, a convolution, a recurrent layer, a cell, a table."""
    where = class_of(module).__module__ or ""
    held = ("_packed_params", "_weight_bias", "_all_weight_values", "_packed_weight_ih")
    return where.startswith(("torch.ao.nn.", "torch.nn.quantized")) and any(hasattr(module, name) for name in held)


def _is_complex(e: Entry) -> bool:
    return e.param.is_complex() or (e.computed is not None and e.computed.site.param.is_complex())


def _cuts_patches(module: nn.Module) -> bool:
    """Whether it is a convolution whose places touch and do not overlap; one of size 1 sees single points."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.stride == module.kernel_size and max(module.kernel_size) > 1


_BETWEEN = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.LogSigmoid, nn.Flatten, nn.Unflatten,
    nn.modules.dropout._DropoutNd,
)  # fmt: skip
"""What brings no two inputs further apart as it comes; torch's own, and what inherits their forward pass."""


def _is_chain(module: nn.Module) -> bool:
    """Of linear layers and what may stand between them, one after the other, with no hook that may change what they hand on."""
    cls, children = class_of(module), dict(module._modules)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or cls.__call__ is not nn.Module.__call__:
        return False
    if type(module) is nn.Linear:
        return True
    if (cls.forward.__module__ or "").startswith("torch.nn.") and isinstance(module, (*_BETWEEN, nn.LeakyReLU, nn.ELU, nn.Softplus)):
        return _is_gentle(module)
    if not all(child is not None and _is_chain(child) for child in children.values()):
        return False
    if issubclass(cls, nn.Sequential | nn.ModuleList) and cls.forward in (nn.Sequential.forward, nn.ModuleList.forward):
        return True
    through = forward_source.passed_through(cls)
    return through is not None and through <= children.keys() and not module._parameters and not module._buffers


def _is_gentle(module: nn.Module) -> bool:
    if isinstance(module, nn.Softplus):
        return module.beta > 0 and module.threshold >= LEAST_THRESHOLD
    if isinstance(module, nn.LeakyReLU | nn.ELU):
        return abs(module.negative_slope if isinstance(module, nn.LeakyReLU) else module.alpha) <= 1
    return True
