"""What each tensor of a checkpoint is in its model: asked of the model where there is one, guessed from names and shapes where not.

A guess goes by what the names of layers and the shapes of their biases show in any code: it is right for the usual ones, and is told as a
guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from normwise.errors import DataError
from normwise.inspection.checkpoint import Checkpoint
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.layouts import Layout
from normwise.parameters.names import clean_name

BUFFER = "buffer"
"""The role of what is stored beside the parameters: running means, masks, frequencies. It counts in no total."""
_BUFFERS = re.compile(r"(running_mean|running_var|inv_freq|masked_bias|position_ids|num_batches_tracked|original_inv_freq|attn_mask)$")
_EMBEDDING = re.compile(r"(^|[._])(wte|wpe|embed\w*|\w*embeddings?|tok_emb|pos_emb|emb)([._]|$)", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|head|heads|classifier|score|output|fc_out|logits|embed_out|qa_outputs|predictions)(\.\w+)*\.weight$")
_RECURRENT = re.compile(r"weight_[ih]h_l\d+|weight_hr_l\d+|weight_[ih]h$")
_WEIGHT = re.compile(
    rf"(^|\.)(weight|weight_v|\w+_proj_weight|{_RECURRENT.pattern}|parametrizations\.\w+\.original1?|lora_(embedding_)?[AB](\.\w+)*)$"
)
_BLOCK = re.compile(r"(^|\.)\d+\.")
_MOST_KERNEL = 32
"""Entries along an axis of a convolution's kernel: more are the inputs of stacked experts."""


@dataclass(frozen=True)
class Places:
    """Entries by the tensors' names."""

    entries: dict[str, Entry]
    guessed: bool
    notes: tuple[str, ...] = ()
    strange: dict[str, tuple[Entry, str]] = field(default_factory=dict)
    """Tensors that no rule is measured on, though it may name them, each with the reason."""

    def role(self, name: str) -> str:
        return self.entries[name].role if name in self.entries else BUFFER


def guessed(checkpoint: Checkpoint) -> Places:
    """Places by names and shapes alone."""
    shapes = checkpoint.shapes
    transposed = _transposed(shapes)
    entries, strange = {}, {}
    for name, one in checkpoint.tensors.items():
        role, axes = _guess(name, one.shape, transposed)
        entry = _entry(name, one.shape, one.dtype, role, axes)
        if role != BUFFER:
            entries[name] = entry
        elif not _BUFFERS.search(name):
            strange[name] = entry, "it looks like a buffer, no parameter; give --config or --model if it is one"
    return Places(entries, True, strange=strange)


def unplaced(checkpoint: Checkpoint) -> dict[str, tuple[Entry, str]]:
    """What has no norm, each with the reason, as entries that a selector can match; what is usually a buffer is left out."""
    found = {}
    for name, why in checkpoint.skipped.items():
        shape = checkpoint.shapes.get(name, (1,))
        if not _BUFFERS.search(name):
            role, axes = _guess(name, shape, set())
            # Weights are packed into small integers; wide ones are indices, which only a rule that names them means.
            found[name] = _entry(name, shape, torch.float32, "other" if why.startswith(("int64", "bool")) else role, axes), why
    return found


def of_model(checkpoint: Checkpoint, model: nn.Module) -> Places:
    """Places that the library finds in the model, which may be on the meta device.

    Raises:
        DataError: where no tensor has the name and the shape of a parameter.
    """
    inventory = Inventory(model)
    known = {name: entry for entry in inventory for name in entry.names}
    buffers = {clean_name(name) for name, _ in model.named_buffers()}
    lead, unknown = fitting_prefix(checkpoint.tensors, known), list[str]()
    entries, strange = {}, dict[str, tuple[Entry, str]]()
    for name, one in checkpoint.tensors.items():
        entry = known.get(counterpart(name, lead))
        if entry is not None and tuple(entry.shape) == one.shape:
            entries[name] = _renamed(entry, name)
        elif entry is not None or counterpart(name, lead) not in buffers:
            said = f"{name} {list(one.shape)}" + (f", where the model has {list(entry.shape)}" if entry is not None else "")
            unknown.append(said)
            other = _entry(name, one.shape, one.dtype, entry.role if entry is not None else "other", "o" * max(len(one.shape), 1))
            strange[name] = other, "no parameter of the model has its name and shape"
    if not entries:
        raise DataError(
            f"{checkpoint.place}: none of its tensors ({', '.join(list(checkpoint.tensors)[:3])}, ...) is a parameter of the model "
            f"({', '.join(list(known)[:3])}, ...); give the config or the function of the model that was saved."
        )
    notes = [f"not in the model: {', '.join(unknown[:5])}{f' and {len(unknown) - 5} more' * (len(unknown) > 5)}"] if unknown else []
    held = {id(entry) for name in entries for entry in (known[counterpart(name, lead)],)}
    absent = [entry.name for entry in inventory if id(entry) not in held]
    notes += [f"not in the checkpoint: {', '.join(absent[:5])}{f' and {len(absent) - 5} more' * (len(absent) > 5)}"] if absent else []
    return Places(entries, False, tuple(notes), strange)


def fitting_prefix(names: Iterable[str], others: Mapping[str, object]) -> tuple[str, str]:
    """(what to take from the front of ``names``, what to put there), so that most of them are among ``others``: bare models and those with
    a head differ by a ``model.`` or ``transformer.``."""
    listed = list(names)
    leads = {"", *(f"{name.split('.')[0]}." for name in listed)}
    fronts = {"", *(f"{name.split('.')[0]}." for name in others)}
    ways = [(lead, front) for lead in leads for front in fronts if not (lead and front)]
    return max(ways, key=lambda way: (sum(counterpart(name, way) in others for name in listed), -len("".join(way))))


def counterpart(name: str, lead: tuple[str, str]) -> str:
    """The name that :func:`fitting_prefix` gives a tensor in the other checkpoint."""
    return lead[1] + name.removeprefix(lead[0]) if name.startswith(lead[0]) else name


# ------------------------------------------------------------------------------------------------------------- guesses


def _guess(name: str, shape: tuple[int, ...], transposed: set[str]) -> tuple[str, str]:
    """Role and axes."""
    steps, dims = name.split("."), len(shape)
    if _BUFFERS.search(name) or (steps[-1] == "bias" and dims > 2):
        return BUFFER, "o" * max(dims, 1)
    biased = steps[-1].endswith("bias") or "bias" in steps[-1].split("_")
    # What a layer calls its weight is a matrix or a kernel, of one output or one input, too; gains of several dimensions have other names.
    slim = sum(n != 1 for n in shape) <= 1 and not _WEIGHT.search(name)
    if dims <= 1 or slim:
        return ("bias" if biased else "gain"), "o" * max(dims, 1)
    if dims == 2:
        return _matrix(name), "io" if name in transposed else "oi"
    if all(n <= _MOST_KERNEL for n in shape[2:]) and "expert" not in name:
        return "conv", "oi" + "k" * (dims - 2)
    return ("hidden", "eoi") if dims == 3 else ("other", "oi" + "k" * (dims - 2))


def _matrix(name: str) -> str:
    if _RECURRENT.search(name):
        return "recurrent"
    if _EMBEDDING.search(name) and not _HEAD.search(name):
        return "embedding"
    return "head" if _HEAD.search(name) and not _BLOCK.search(name) else "hidden"


def _transposed(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The matrices whose columns are the output units, as Hugging Face's Conv1D keeps them: their biases are as long as the columns are
    many. A square matrix goes with the others of its layer's name, then with all that tell."""
    said: dict[str, bool] = {}
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('weight')}bias", ()) if name.endswith("weight") else ()
        if len(shape) == 2 and len(bias) == 1 and shape[0] != shape[1] and bias[0] in shape:
            said[name] = bias[0] == shape[1]
    votes = Counter((_layer(name), columns) for name, columns in said.items())
    every = Counter(said.values())
    for name, shape in shapes.items():
        biased = f"{name.removesuffix('weight')}bias" in shapes and name.endswith("weight")
        if len(shape) == 2 and shape[0] == shape[1] and biased:
            layer = _layer(name)
            told = votes[layer, True] + votes[layer, False] > 0
            said[name] = votes[layer, True] > votes[layer, False] if told else every[True] > every[False]
    return {name for name, columns in said.items() if columns}


def _layer(name: str) -> str:
    return name.split(".")[-2] if "." in name else ""


def _entry(name: str, shape: tuple[int, ...], dtype: torch.dtype, role: str, axes: str) -> Entry:
    param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    return Entry(name, param, nn.Module(), name.split(".")[-1], role, Layout(axes, shape or (1,)))


def _renamed(entry: Entry, name: str) -> Entry:
    return entry if entry.name == name else replace(entry, name=name, tied=tuple({*entry.names} - {name}))
