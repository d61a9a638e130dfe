"""Parameters under the names that you know, whatever wrapped the model; only walking the modules tells wrappers from your own submodules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

# What wrappers call the module that they wrap, and nobody a submodule: torch.compile, FSDP and fairscale's, activation checkpointing,
# Lightning Fabric (twice: the module as it is run, and as the user made it).
_MARKS = (
    "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module", "_original_module",
)  # fmt: skip
# The classes that call theirs so, by name, since they are of many packages: torch's and its averages, DeepSpeed, Megatron, SageMaker,
# timm, Opacus. PEFT's `base_model.model.` is no such trace: its names are the model's own.
_WRAPPERS = {
    "module": (
        "DistributedDataParallel", "DistributedDataParallelCPU", "DataParallel", "AveragedModel", "DeepSpeedEngine", "Float16Module",
        "BFloat16Module", "DistributedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3",
    ),
    "_module": ("AbstractGradSampleModule", "GradSampleModule"),
}  # fmt: skip


def clean_name(name: str) -> str:
    """``name`` without the traces of wrappers: for keys of a checkpoint, where there is no model to ask.

    Drops the components that ``torch.compile``, FSDP, activation checkpointing and Fabric add anywhere, and ``module.`` at the front.
    Your own outermost submodule called ``module`` looks like a wrapper here; `sites` tells them apart.

    >>> clean_name("module._orig_mod.blocks.0._checkpoint_wrapped_module.fc.weight")
    'blocks.0.fc.weight'
    """
    parts = [part for part in name.split(".") if part not in _MARKS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def module_names(model: nn.Module) -> dict[int, str]:
    """The clean name of every module by its id; of the model itself, however it is wrapped, the empty name."""
    paths = dict(model.named_modules(remove_duplicate=False))
    clean = {"": ""}
    for path in filter(None, paths):    # an owner comes before what it holds
        owner, _, step = path.rpartition(".")
        own = [] if is_wrapper(paths[owner], step) else [step]
        clean[path] = ".".join(filter(None, [clean[owner], *own]))
    return {id(module): clean[path] for path, module in paths.items()}


def is_wrapper(owner: nn.Module, child: str) -> bool:
    """Whether ``owner`` only wraps its submodule ``child``, which then adds nothing to a clean name."""
    return child in _MARKS or any(cls.__name__ in _WRAPPERS.get(child, ()) for cls in type(owner).__mro__)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within what only wraps it, within wrappers within wrappers."""
    for _ in range(16):    # a module that holds itself would never end
        inner = next((child for name, child in module.named_children() if is_wrapper(module, name)), None)
        if inner is None or inner is module:
            break
        module = inner
    return module


# Names under which PEFT keeps the layer that an adapter, or a trained copy, takes the place of.
ADAPTED = ("base_layer", "original_module")
# The names under which PEFT, kohya and diffusers keep the two matrices of a low-rank product B·A, B zero at the start.
_ADAPTERS = {"A": ("lora_A", "lora_down", "lora_embedding_A"), "B": ("lora_B", "lora_up", "lora_embedding_B")}


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it: ``fully_shard`` puts one of torch's over it, which has no source of its own."""
    classes = type(module).__mro__
    wrapped = [i for i, cls in enumerate(classes) if cls.__name__ == "FSDPModule"]
    found: type[nn.Module] = classes[wrapped[0] + 1] if wrapped else type(module)
    return found


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a parameter is registered; a tied parameter has several."""

    name: str
    param: nn.Parameter
    module: nn.Module
    local_name: str
    parents: tuple[nn.Module, ...]
    steps: tuple[str, ...] = ()
    """For each of ``parents`` the name under which it holds the next one, "" where it only wraps it."""

    @property
    def parent(self) -> nn.Module | None:
        """The module that holds the owner; for a parametrized tensor the module whose tensor it is."""
        depth = 2 if isinstance(self.module, ParametrizationList) else 1
        return self.parents[-depth] if len(self.parents) >= depth else None

    def above(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules that hold the owner, innermost first, each with the owner's path in it, without what adapters and parametrizations
        put in between (``c_attn.base_layer``).
        """
        path: list[str] = []
        inner = len(self.parents) - (2 if isinstance(self.module, ParametrizationList) else 0)
        for parent, step in zip(reversed(self.parents[:inner]), reversed(self.steps[:inner]), strict=True):
            if step and step not in ADAPTED:
                path.insert(0, step)
            yield parent, ".".join(path)

    @property
    def home(self) -> tuple[nn.Module, str]:
        """The module and the tensor's name in it, as they were before a parametrization."""
        if isinstance(self.module, ParametrizationList) and self.parent is not None:
            return self.parent, self.name.split(".")[-2]
        return self.module, self.local_name


def sites(model: nn.Module) -> list[Site]:
    """Every place of every parameter, in the order of ``named_parameters``, under clean names; once where a wrapper has it twice."""
    found: dict[tuple[str, int], Site] = {}

    def walk(module: nn.Module, prefix: str, parents: tuple[nn.Module, ...], steps: tuple[str, ...]) -> None:
        for local, param in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault((prefix + local, id(module)), Site(prefix + local, param, module, local, parents, steps))
        # ``named_children`` leaves out a submodule's second name, and with it that its parameters are tied.
        for child, inner in module._modules.items():
            if inner is not None:
                step = "" if is_wrapper(module, child) else child
                walk(inner, f"{prefix}{step}." if step else prefix, (*parents, module), (*steps, step))

    walk(model, "", (), ())
    return list(found.values())


def carries_adapter(module: nn.Module) -> bool:
    """Whether it is a layer with an adapter beside it: what it adds is that layer's own weight."""
    held = {name for named in (module.named_children(), module.named_parameters(recurse=False)) for name, _ in named}
    known = {*ADAPTED, "lora_layer", *(name for names in _ADAPTERS.values() for name in names)}
    return bool(held & known) or ({"down", "up"} <= held and "lora" in class_of(module).__name__.lower())


def adapter_of(place: Site) -> str:
    """"A" or "B" where the parameter is one matrix of a low-rank product: told by the names on its path."""
    steps = place.name.split(".")
    found = [part for part, names in _ADAPTERS.items() if any(step in names for step in steps)]
    if found or len(steps) < 3:
        return found[0] if found else ""
    holder = type(place.parent).__name__ if place.parent is not None else ""
    return {"down": "A", "up": "B"}.get(steps[-2], "") if "lora" in holder.lower() else ""    # diffusers' LoRALinearLayer
