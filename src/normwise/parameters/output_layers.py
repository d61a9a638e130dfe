"""Which layers give a model's outputs: asked of the model, then read from its forward pass, then told by usual names.

A bare backbone has none: its last projection is a hidden matrix like the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from normwise.parameters import forward_source
from normwise.parameters.layout_registry import adapter_of
from normwise.parameters.names import ADAPTED, Site, class_of, is_wrapper

# What layers that give outputs are called. A name alone does not make one: it must stand outside of the blocks that the model repeats.
USUAL = (
    "head", "lm_head", "classifier", "fc", "actor", "critic", "score", "qa_outputs", "seq_relationship", "output_projection", "fc_out",
    "cls_head", "value_head", "policy_head", "action_head", "v_head", "head_dist", "logits", "ctc_head", "to_logits", "classification_head",
    "regression_head", "prediction_head", "predictions", "decoder_pred", "bbox_predictor", "class_predictor", "bbox_embed", "class_embed",
    "span_classifier", "unembed", "unembedding", "embed_out", "out_head", "linear_head", "final_layer", "codebook_head", "proj_out",
)  # fmt: skip
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Heads:
    """The layers that give the model's outputs. ``of(place)`` says whether a parameter is the matrix of one.

    They are found in this order, first what the model itself says:

    1. what a Hugging Face model calls its output embeddings;
    2. nothing inside the ``base_model`` of a Hugging Face model: a bare model has no head;
    3. the layers whose results the forward pass returns and hands to no other layer (`forward_source.outputs`), through containers and the
       modules that they are made of;
    4. if that cannot be read: the only Linear there is, or the last in order of registration, unless it is in a class of block that the
       model has several of; and what has a usual name outside of such blocks. No further Linear if one shares its weight with an embedding.
    """

    def __init__(self, model: nn.Module, places: list[Site]) -> None:
        self._many = Counter(class_of(module) for module in model.modules())
        core = _core(model)
        matrices = [place for place in places if _may_be_head(place)]
        self.ids = {id(head) for module in model.modules() if (head := _layer(_output_embeddings(module))) is not None}
        # It is a head that computes the loss too, so nothing returns its layers' results.
        for loss in (m for m in model.modules() if isinstance(m, nn.AdaptiveLogSoftmaxWithLoss)):
            self.ids |= {id(loss.head), *(id(cast(nn.Sequential, tail)[-1]) for tail in loss.tail)}
        bare = {id(base) for module in core.modules() if (base := _base(module)) is not None}
        if id(core) in bare:
            own = [p for p in matrices if len(_steps(p)) >= 1]
            self.ids |= {id(p.home[0]) for p in own if _steps(p)[0] == "lm_head" or _steps(p)[0].startswith("predict_")}
            return
        followed = _followed(core, {id(place.home[0]) for place in matrices}, bare)
        if followed:
            self.ids |= followed
        else:
            tied = bool(self.ids) or _shares_embedding(places)
            self.ids |= self._placed([p for p in matrices if not _within(p, bare)], followed is None and not tied and not bare)

    def of(self, place: Site) -> bool:
        """Whether the parameter is the matrix of a head, of an adapter of one, or of a copy that is trained in its place."""
        if id(place.home[0]) in self.ids:
            return True
        for k, parent in enumerate(place.parents):
            inner = _layer(parent)
            if inner is None or inner is parent:
                continue
            copied = place.steps[k + 2 :] if place.steps[k] == "modules_to_save" else ()    # its second step is the adapter's name
            if id(_at(inner, copied)) in self.ids:
                return True
        return False

    def _placed(self, matrices: list[Site], registered_last: bool) -> set[int]:
        """By order of registration and by usual names."""
        linears = [place for place in matrices if _is_linear(place.home[0])]
        # "fc" alone names hidden layers as well: it is a head where it comes last.
        usual = [p for p in linears if _usual(p) and not self._repeated(p) and (_steps(p)[-1] != "fc" or p.home[0] is linears[-1].home[0])]
        found = {_named_at(p): id(p.home[0]) for p in usual}    # of several under one name the last
        if registered_last and linears:
            only = len({id(p.home[0]) for p in linears}) == 1
            if only or not self._repeated(linears[-1]):
                found[""] = id(linears[-1].home[0])
        return set(found.values())

    def _repeated(self, place: Site) -> bool:
        """Whether the place lies inside a class of block that the model has several of; plain containers and adapters are no blocks."""
        blocks = [module for module in place.parents[1:] if class_of(module) not in _CONTAINERS and module is not place.home[0]]
        return any(self._many[class_of(block)] > 1 for block in blocks if _layer(block) is block)


def _within(place: Site, modules: set[int]) -> bool:
    return any(id(module) in modules for module in place.parents)


def _core(model: nn.Module) -> nn.Module:
    """The model within what only wraps it: data parallelism, a compiler, PEFT."""
    # Wrappers within wrappers; a model that holds itself would never end.
    for _ in range(16):
        inner = next((child for name, child in model.named_children() if is_wrapper(model, name)), None)
        of_peft = any((cls.__module__ or "").startswith("peft.") for cls in class_of(model).__mro__)
        if inner is None and of_peft and hasattr(model, "base_model"):
            base: Any = model.base_model
            inner = getattr(base, "model", base)
        if inner is None or inner is model:
            return model
        model = inner
    return model


def _output_embeddings(module: Any) -> nn.Module | None:
    try:
        found = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _layer(module: nn.Module | None) -> nn.Module | None:
    """The layer that an adapter or a trained copy stands in the place of; the module itself where it is neither."""
    for name in ADAPTED:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return inner
    return module


def _base(module: Any) -> nn.Module | None:
    """The bare model of a Hugging Face model; itself where it is one, which a model *for* something or *with* a head is not."""
    if not isinstance(getattr(module, "base_model_prefix", None), str) or not hasattr(module, "config"):
        return None
    inner = getattr(module, module.base_model_prefix, module) if module.base_model_prefix else module
    task = inner is module and re.search(r".(For|With|LMHead)[A-Z]", class_of(module).__name__)
    return inner if isinstance(inner, nn.Module) and not task else None


def _shares_embedding(places: list[Site]) -> bool:
    kinds: dict[int, set[str]] = {}
    for place in places:
        kind = "embedding" if isinstance(place.home[0], nn.Embedding) else "linear" if isinstance(place.home[0], nn.Linear) else ""
        kinds.setdefault(_storage(place), set()).add(kind)
    return any({"embedding", "linear"} <= found for found in kinds.values())


def _storage(place: Site) -> int:
    param = place.param
    return param.data_ptr() if type(param) is nn.Parameter and not param.is_meta and param.numel() and param.data_ptr() else id(param)


def _is_linear(module: nn.Module) -> bool:
    named = any(cls.__name__ == "Conv1D" for cls in class_of(module).__mro__) and hasattr(module, "nf")
    return (isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)) or named


def _may_be_head(place: Site) -> bool:
    """A Linear's matrix, but not that of an attention's output projection; a convolution of kernel 1, which is a Linear at each point."""
    module, name = place.home
    if not (name == "weight" or name.startswith("weight_")) or adapter_of(place):
        return False
    point = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and set(module.kernel_size) == {1} and module.groups == 1
    return _is_linear(module) or point


def _steps(place: Site) -> list[str]:
    """The path of the layer, without what adapters put there."""
    steps = [step for step in place.name.split(".")[:-1] if step not in (*ADAPTED, "parametrizations", "weight")]
    return [s for i, s in enumerate(steps) if s != "modules_to_save" and (i == 0 or steps[i - 1] != "modules_to_save")]


def _usual(place: Site) -> bool:
    return any(step in USUAL for step in _steps(place))


def _named_at(place: Site) -> str:
    """The path down to the outermost usual name, then the next step where it is a container of several heads."""
    steps = _steps(place)
    at = next(i for i, step in enumerate(steps) if step in USUAL)
    return ".".join(steps[: at + 1])


def _followed(module: nn.Module, kinds: set[int], bare: set[int], depth: int = 0) -> set[int] | None:
    """The layers of ``kinds`` whose results ``module`` returns; none of a bare model; None where its forward pass cannot be read."""
    inner = _layer(module)
    if inner is not None and inner is not module:
        return _followed(inner, kinds, bare, depth)
    if id(module) in kinds:
        return {id(module)}
    if id(module) in bare or not _has_weights(module):
        return set()
    if depth > 12 or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    if isinstance(module, nn.Sequential) and class_of(module).forward is nn.Sequential.forward:
        layers = [layer for layer in module if _has_weights(layer)]
        return _followed(layers[-1], kinds, bare, depth + 1) if layers else set()
    if (class_of(module).__module__ or "").partition(".")[0] == "torch":
        return None if class_of(module) is nn.Module else set()
    returned = forward_source.outputs(class_of(module), frozenset(n for n, child in module.named_children() if _has_weights(child)))
    if returned is None:
        return None if any(True for _ in module.children()) else set()
    inside = [_followed(layer, kinds, bare, depth + 1) for path in returned for layer in _children_at(module, path)]
    found = set().union(*(one for one in inside if one))
    return found if found or None not in inside else None


def _has_weights(module: nn.Module) -> bool:
    """A result that went through a layer without any is still that result: dropout, a softmax, pooling."""
    return next(module.parameters(), None) is not None


def _at(module: nn.Module, steps: Sequence[str]) -> nn.Module | None:
    try:
        return module.get_submodule(".".join(steps)) if all(steps) else module
    except AttributeError:
        return None


def _children_at(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The child of that path; of a list of children each, or the last where one gets what the other gave."""
    name = path.removesuffix("[-1]")
    try:
        child = module.get_submodule(name)
    except AttributeError:
        return
    listed = list(child.children()) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    yield from listed[-1:] if path.endswith("[-1]") else listed
