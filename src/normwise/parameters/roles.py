"""What a parameter does in its model, from module types and tied storage; never from its shape alone, rarely from its name. Which layers
give the outputs is asked of the model, then read from its forward pass, then told by usual names.

===========  ===================================================================================================
hidden       the matrix of a Linear, Bilinear, attention projection, Hugging Face ``Conv1D``; stacked experts, routers
conv         the filters of a convolution, transposed or not
embedding    the table of an Embedding; a table shared with the head stays an embedding
head         the layers that give the model's outputs, see `Heads`
recurrent    the matrices of an RNN, LSTM, GRU or one of their cells
bias         any bias
gain         the scale of a normalisation, PReLU, a bare vector or scalar
other        a bare parameter of two or more dimensions that nothing shows to be a matrix: positions, tokens, tables
===========  ===================================================================================================
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from normwise.errors import PolicyError
from normwise.parameters import forward_source
from normwise.parameters.names import ADAPTED, Site, adapter_of, class_of, unwrapped

ROLES = ("hidden", "conv", "embedding", "head", "recurrent", "bias", "gain", "other")
GROUPS = {"matrix": ("hidden", "conv", "embedding", "head", "recurrent"), "all": ROLES}

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRICES: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("conv", (nn.modules.conv._ConvNd,)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
    ("hidden", (nn.Linear, nn.Bilinear, nn.MultiheadAttention)),
)


def group_tied(places: Iterable[Site]) -> list[list[Site]]:
    """Sites of one parameter together: the same object, or another view of the same storage with the same shape and strides."""
    groups: dict[object, list[Site]] = {}
    for place in places:
        p = place.param
        # Tensors without memory of their own all lie at address 0, and would seem tied to each other.
        apart = type(p) is not nn.Parameter or p.is_meta or p.numel() == 0 or p.layout != torch.strided
        key: object = id(p) if apart else (p.device, p.data_ptr(), p.dtype, tuple(p.shape), p.stride())
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def role_of(tied: list[Site], heads: Heads, stated: str | None = None) -> str:
    """The role of the parameter registered at ``tied``.

    stated: what its registration, or the forward pass, says of it; a bias, and a table that serves as an embedding, stay what they are.
    """
    found = [_role(place) for place in tied]
    if "embedding" in found:
        return "embedding"
    # What a layer of a known type says goes before what a bare name says, as of a Linear's weight that its parent holds, too.
    known = [role for role, place in zip(found, tied, strict=True) if isinstance(place.home[0], (*_KNOWN, *_NORMS, nn.PReLU))]
    own = next((role for role in (*known, *found) if role != "other"), "other")
    role = stated if stated is not None and own not in ("bias", "gain") else own
    if role in ("hidden", "conv") and any(heads.of(place) for place in tied):
        return "head"
    return role


def _role(place: Site) -> str:
    module, name = place.home
    name = name.removesuffix("_orig")
    words = name.split("_")
    # ``bias``, ``in_proj_bias``, ``bias_ih_l0``, ``pos_bias_u``; a table of biases is looked up, not added.
    if name.endswith("bias") or (words[0] == "bias" and len(words) > 1) or ("bias" in words and len(words[-1]) == 1):
        return "bias"
    vector = place.param.ndim <= 1 and not is_lazy(place.param)
    if isinstance(module, (*_NORMS, nn.PReLU)) or vector or _is_magnitude(place):
        return "gain"
    if _is_vector(place.param) and not isinstance(module, _KNOWN) and _SCALES.fullmatch(name):
        return "gain"    # one number a channel, shaped to broadcast: (1, 1, c), (c, 1, 1)
    # torch's own names for matrices; a subclass may add others, such as a low-rank factor, that are something else.
    known = name == "weight" or name.startswith("weight_") or name.endswith("_proj_weight")
    conv1d = name == "weight" and hasattr(module, "nf") and class_of(module).__name__ == "Conv1D"
    return next((role for role, types in _MATRICES if known and isinstance(module, types)), "hidden" if conv1d else "other")


_KNOWN = tuple(cls for _, types in _MATRICES for cls in types)
_SCALES = re.compile(r"weight|gamma|scale|gain|(layer_scale|layerscale|gamma|scale)_?\w*")


def _is_magnitude(place: Site) -> bool:
    """Weight normalisation's magnitude: one gain per unit, whatever the number of its dimensions."""
    kinds = {type(part).__name__ for part in place.module.children()} if place.local_name == "original0" else set()
    return "_WeightNorm" in kinds or (place.local_name.endswith("_g") and hasattr(place.module, place.local_name[:-2] + "_v"))


# ------------------------------------------------------------------------------------------------------------- output layers

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
            outside = [place for place in matrices if not any(id(module) in bare for module in place.parents)]
            self.ids |= self._placed(outside, followed is None and not tied and not bare)

    def of(self, place: Site) -> bool:
        """Whether the parameter is the matrix of a head, of an adapter of one, or of a copy that is trained in its place."""
        if id(place.home[0]) in self.ids:
            return True
        for k, parent in enumerate(place.parents):
            inner = _layer(parent)
            if inner is None or inner is parent:
                continue
            copied = place.steps[k + 2 :] if place.steps[k] == "modules_to_save" else ()    # its second step is the adapter's name
            if id(_submodule(inner, ".".join(copied)) if all(copied) else inner) in self.ids:
                return True
        return False

    def _placed(self, matrices: list[Site], registered_last: bool) -> set[int]:
        """By order of registration and by usual names."""
        linears = [place for place in matrices if _is_linear(place.home[0])]
        found: dict[str, int] = {}
        for place in linears:
            steps = _steps(place)
            at = next((i for i, step in enumerate(steps) if step in USUAL), None)
            # "fc" alone names hidden layers as well: it is a head where it comes last.
            last = place.home[0] is linears[-1].home[0]
            if at is not None and not self._repeated(place) and (steps[-1] != "fc" or last):
                # Down to the outermost usual name, then the next step where it is a container of several heads; under one name the last.
                found[".".join(steps[: at + 1])] = id(place.home[0])
        if registered_last and linears:
            only = len({id(p.home[0]) for p in linears}) == 1
            if only or not self._repeated(linears[-1]):
                found[""] = id(linears[-1].home[0])
        return set(found.values())

    def _repeated(self, place: Site) -> bool:
        """Whether the place lies inside a class of block that the model has several of; plain containers and adapters are no blocks."""
        blocks = [module for module in place.parents[1:] if class_of(module) not in _CONTAINERS and module is not place.home[0]]
        return any(self._many[class_of(block)] > 1 for block in blocks if _layer(block) is block and unwrapped(block) is block)


def _core(model: nn.Module) -> nn.Module:
    """The model within what only wraps it: data parallelism, a compiler, PEFT."""
    # Wrappers within wrappers; a model that holds itself would never end.
    for _ in range(16):
        model = unwrapped(model)
        of_peft = any((cls.__module__ or "").startswith("peft.") for cls in class_of(model).__mro__)
        base: Any = getattr(model, "base_model", None) if of_peft else None
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
    inner = unwrapped(inner) if isinstance(inner, nn.Module) else inner
    task = inner is module and re.search(r".(For|With|LMHead)[A-Z]", class_of(module).__name__)
    return inner if isinstance(inner, nn.Module) and not task else None


def _shares_embedding(places: list[Site]) -> bool:
    kinds: dict[int, set[str]] = {}
    for place in places:
        kind = "embedding" if isinstance(place.home[0], nn.Embedding) else "linear" if isinstance(place.home[0], nn.Linear) else ""
        param = place.param
        address = param.data_ptr() if type(param) is nn.Parameter and not param.is_meta and param.numel() else 0
        kinds.setdefault(address or id(param), set()).add(kind)
    return any({"embedding", "linear"} <= found for found in kinds.values())


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


def _followed(module: nn.Module, kinds: set[int], bare: set[int], depth: int = 0) -> set[int] | None:
    """The layers of ``kinds`` whose results ``module`` returns; none of a bare model; None where its forward pass cannot be read."""
    inner = _layer(unwrapped(module))
    if inner is not None and inner is not module and id(module) not in bare:
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


def output_layers(module: nn.Module, path: str, kinds: set[int]) -> set[int] | None:
    """Those layers of ``kinds``, by their ids, that give the results of ``module``'s child at ``path``, or of each in a list. None where
    that cannot be read."""
    found = [_followed(child, kinds, set()) for child in _children_at(module, path)]
    known = [one for one in found if one is not None]
    return set().union(*known) if known and len(known) == len(found) else None


def _has_weights(module: nn.Module) -> bool:
    """A result that went through a layer without any is still that result: dropout, a softmax, pooling."""
    return next(module.parameters(), None) is not None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """By a path in the user's own words, whatever wraps the steps."""
    found: Any = module
    for step in path.split(".") if path else ():
        found = getattr(found, step, None) if hasattr(found, step) else getattr(unwrapped(found), step, None)
        if not isinstance(found, nn.Module):
            return None
    return cast(nn.Module, found)


def _children_at(module: nn.Module, path: str) -> list[nn.Module]:
    """The child of that path; of a list of children each, or the last where one gets what the other gave."""
    found = _submodule(module, path.removesuffix("[-1]"))
    child = None if found is None else unwrapped(found)
    listed = list(child.children()) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child] if child is not None else []
    return listed[-1:] if path.endswith("[-1]") else listed


# ------------------------------------------------------------------------------------------------------ normalisation


def normalises(model: nn.Module) -> bool:
    """Whether ``model`` has normalisation layers, with or without gains: torch's own, and those that model code brings along."""
    return any(is_normalisation(module) for module in model.modules())


def is_normalisation(module: nn.Module) -> bool:
    """One of torch's, or a module that holds nothing but vectors and whose forward pass divides by a root or calls a normalisation. If its
    source cannot be read, its name decides. A gain alone is not enough: PReLU and a temperature have one as well.
    """
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters())
    if (class_of(module).__module__ or "").startswith("torch.") or any(True for _ in module.children()):
        return False
    if not all(_is_vector(p) for p in own):
        return False
    named = "norm" in class_of(module).__name__.lower()
    text = "\n".join(ast.unparse(function) for function in forward_source.functions(class_of(module)))
    if not text:
        return named and bool(own)
    does = any(call in text for call in _NORMALISING) or (named and any(f".{call}(" in text for call in ("var", "std", "norm", "mean")))
    return does and (named or bool(own))


_NORMALISING = ("rsqrt(", "layer_norm(", "rms_norm(", "group_norm(", "batch_norm(", "instance_norm(")


def _is_vector(param: Tensor) -> bool:
    return is_lazy(param) or sum(n != 1 for n in param.shape) <= 1


# ------------------------------------------------------------------------------------------------- what cannot be told

# How the names of parameters end that are looked up or added, not multiplied by: positions, tokens, tables, decays of a state.
_TABLES = re.compile(
    r"(pos|position|positional|positions|cls|class|mask|query|queries|register|registers|token|tokens|latent|latents|prompt|prompts|prefix|"
    r"probe|codebook|codebooks|codevectors|prototypes|table|tables|embedding|embeddings|embed|embeds|emb|encoding|anchors|memory|A_log|"
    r"relative_height|relative_width|rel_pos_h|rel_pos_w|rel_h|rel_w|height_rel|width_rel|biases|scale|scales|gamma|gain|freqs|centroids|"
    r"reference_points|time_decay|time_first|state|states)(_?\d+)?$",
    re.IGNORECASE,
)


def may_be_matrix(name: str, param: Tensor) -> bool:
    """Whether an unknown parameter may be a matrix: two or more dimensions longer than 1, and no name of a table."""
    last = [step for step in name.split(".") if not step.isdigit()][-1:]
    words = last[0].removesuffix("_weight") if last else ""
    return sum(n > 1 for n in param.shape) >= 2 and not _TABLES.search(words)


def refuse_placeholders(places: Iterable[Site]) -> None:
    """PolicyError if a sharding engine holds the weights elsewhere, or flat: neither roles nor norms can be told from what is left."""
    gone = [place.name for place in places if _is_placeholder(place)]
    if gone:
        shown = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
        raise PolicyError(
            f"{shown}: the weights are not here. A sharding engine (DeepSpeed's ZeRO-3, FSDP1) keeps them in flat pieces, of which neither "
            "roles nor norms can be told. Use ZeRO-1 or -2, or FSDP2 (fully_shard), whose DTensors keep their shapes."
        )


def _is_placeholder(place: Site) -> bool:
    """Marked as one, or the flat or empty weight of a module whose weight is a matrix."""
    param: Tensor = place.param
    if is_lazy(param):
        return False
    if any(cls.__name__ == "FlatParameter" for cls in type(param).__mro__):
        return True
    if hasattr(param, "ds_id") or hasattr(param, "ds_shape"):
        return tuple(param.shape) != tuple(getattr(param, "ds_shape", param.shape))
    module, name = place.home
    matrix = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) and name == "weight" and module is place.module
    return matrix and param.ndim == 1 and param.requires_grad
