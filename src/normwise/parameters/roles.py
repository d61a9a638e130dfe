"""What a parameter does in its model, from module types and tied storage; never from its shape alone, rarely from its name.

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
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.errors import PolicyError
from normwise.parameters.forward_source import functions
from normwise.parameters.layout_registry import statement
from normwise.parameters.names import Site, class_of, sites
from normwise.parameters.output_layers import Heads

ROLES = ("hidden", "conv", "embedding", "head", "recurrent", "bias", "gain", "other")
GROUPS = {"matrix": ("hidden", "conv", "embedding", "head", "recurrent"), "all": ROLES}

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRICES: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("conv", (nn.modules.conv._ConvNd,)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
    ("hidden", (nn.Linear, nn.Bilinear, nn.MultiheadAttention)),
)


def find_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter, by clean name; a tied parameter is listed under its first name only.

    >>> find_roles(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 10)))
    {'0.weight': 'conv', '0.bias': 'bias', '2.weight': 'head', '2.bias': 'bias'}
    """
    places = sites(model)
    heads = Heads(model, places)
    return {tied[0].name: role_of(tied, heads, _stated(tied)) for tied in group_tied(places)}


def _stated(tied: list[Site]) -> str | None:
    return None if is_lazy(tied[0].param) else next((s.role for place in tied if (s := statement(place)).role is not None), None)


def group_tied(places: Iterable[Site]) -> list[list[Site]]:
    """Sites of one parameter together: the same object, or another view of the same storage with the same shape and strides."""
    groups: dict[object, list[Site]] = {}
    for place in places:
        groups.setdefault(_identity(place.param), []).append(place)
    return list(groups.values())


def _identity(param: Tensor) -> object:
    # Tensors without memory of their own all lie at address 0, and would seem tied to each other.
    if type(param) is not nn.Parameter or param.is_meta or param.numel() == 0 or param.layout != torch.strided:
        return id(param)
    return param.device, param.data_ptr(), param.dtype, tuple(param.shape), param.stride()


def role_of(tied: list[Site], heads: Heads, stated: str | None = None) -> str:
    """The role of the parameter registered at ``tied``.

    stated: what its registration, or the forward pass, says of it; a bias, and a table that serves as an embedding, stay what they are.
    """
    found = [_role(place) for place in tied]
    if "embedding" in found:
        return "embedding"
    role = stated if stated is not None and found[0] not in ("bias", "gain") else found[0]
    if role in ("hidden", "conv") and any(heads.of(place) for place in tied):
        return "head"
    return role


def _role(place: Site) -> str:
    module, name = place.home[0], place.home[1].removesuffix("_orig")
    if _is_bias(name):
        return "bias"
    vector = place.param.ndim <= 1 and not is_lazy(place.param)
    if isinstance(module, (*_NORMS, nn.PReLU)) or vector or _is_magnitude(place):
        return "gain"
    known = _is_weight(name)
    if _is_vector(place.param) and not isinstance(module, _KNOWN) and _SCALES.fullmatch(name):
        return "gain"    # one number a channel, shaped to broadcast: (1, 1, c), (c, 1, 1)
    return next((role for role, types in _MATRICES if known and isinstance(module, types)), _unlisted(module, name))


_KNOWN = tuple(cls for _, types in _MATRICES for cls in types)
_SCALES = re.compile(r"weight|gamma|scale|gain|(layer_scale|layerscale|gamma|scale)_?\w*")


def _is_bias(name: str) -> bool:
    """``bias``, ``in_proj_bias``, ``bias_ih_l0``, ``pos_bias_u``; a table of biases is looked up, not added."""
    words = name.split("_")
    return name.endswith("bias") or (words[0] == "bias" and len(words) > 1) or ("bias" in words and len(words[-1]) == 1)


def _is_weight(name: str) -> bool:
    """torch's own names for matrices; a subclass may add others, such as a low-rank factor, that are something else."""
    return name == "weight" or name.startswith("weight_") or name.endswith("_proj_weight")


def _is_magnitude(place: Site) -> bool:
    """Weight normalisation's magnitude: one gain per unit, whatever the number of its dimensions."""
    kinds = {type(part).__name__ for part in place.module.children()} if place.local_name == "original0" else set()
    return "_WeightNorm" in kinds or (place.local_name.endswith("_g") and hasattr(place.module, place.local_name[:-2] + "_v"))


def _unlisted(module: nn.Module, name: str) -> str:
    return "hidden" if name == "weight" and hasattr(module, "nf") and class_of(module).__name__ == "Conv1D" else "other"


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
    text = "\n".join(ast.unparse(function) for function in functions(class_of(module)))
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


def before_batch_norm(model: nn.Module) -> dict[nn.Module, str]:
    """Each layer whose output a BatchNorm rescales, with that one's name: there the length of a unit's weights means nothing, and shrinking
    it removes no unit. It is the next sibling with as many channels, or the one with the same number in its name (``conv2`` and ``bn2``).
    """
    return {layer: name for path, parent in model.named_modules() for layer, name in _before_batch_norm(path, parent)}


def _before_batch_norm(path: str, parent: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    children = [(name, child) for name, child in parent._modules.items() if child is not None]
    for i, (name, layer) in enumerate(children):
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            continue
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        number = "" if name.isdigit() else "".join(filter(str.isdigit, name))
        numbered = [c for c in children if number and "".join(filter(str.isdigit, c[0])) == number]
        near = (*children[i + 1 : i + 2], *numbered)
        fits = [other for other, norm in near if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_features == channels]
        if fits:
            yield layer, f"{path}.{fits[0]}".lstrip(".")
