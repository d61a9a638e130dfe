"""What some tens of batches tell that the model alone does not. Afterwards everything is as it was (``kept``).

A step moves each tensor by `RATE` of its length against its gradient. It has no state, so that nothing beside the weights need be kept.
"""

from __future__ import annotations

import copy as copying
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import compress
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.advice.kept import Kept
from normwise.advice.logits import LogitWatch, watched
from normwise.errors import DataError, LayoutError, NormwiseError, a_kind_of
from normwise.generators import same_draws
from normwise.parameters.attention_logits import find_attentions
from normwise.parameters.inventory import Entry, Inventory
from normwise.parameters.scale_free import scale_free
from normwise.reports import Loggable, table

RATE = 0.01
SPIKE = 4.0
"""Times the median of the neighbours' gradient norms."""
STEPS = 25
"""Batches of a probe, at most 2% of a run of 1500 steps (`normwise bench probe`)."""
LEAST = 8
"""Batches below which medians and halves say nothing."""
BACKWARD = "Return the loss from loss(model, batch), and leave its backward pass to the probe."
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Probe(Loggable):
    """What was measured; ``print`` it, or log ``flat()``."""

    prefix: ClassVar[str] = "probe/"
    batches: int
    seconds: float
    copied: bool
    kept_bytes: int
    """Of weights and buffers that were kept aside, or of the copy."""
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    """Gradient norm of every batch that had a finite one."""
    spikes: tuple[int, ...]
    """Batches, from 0 on, whose gradient stood out."""
    noise: float | None
    """tr Σ / ‖G‖² in batches, inf where the mean gradient drowns in it; None where no batch could be halved."""
    nonfinite: Mapping[str, int]
    """Parameter -> in how many batches its gradient was not finite."""
    idle: tuple[str, ...]
    """Trainable parameters that never had a gradient."""
    scale_free: Mapping[str, bool]
    """Matrix -> whether its length never reached the loss; only those that could be judged."""
    growth: Mapping[str, float]
    """Role -> by how much the length of all its weights grew, relative."""
    walked: float
    """How far the steps have gone together, relative: what growth is to be read against."""
    ratios: Mapping[str, tuple[float, float, float]]
    """Role -> ‖gradient‖ / ‖weight‖ of its matrices that are not scale-free: lowest, median, highest."""
    logits: Mapping[str, tuple[float, float, int]]
    """Attention -> its largest logit in the first and the last batch, and how many heads were seen (0: not told apart)."""

    def numbers(self) -> dict[str, float]:
        """Scalars by name."""
        found: dict[str, float] = {
            "batches": self.batches, "seconds": self.seconds, "loss/first": self.losses[0], "loss/last": self.losses[-1],
            "norm/median": median(self.norms) if self.norms else math.nan, "spikes": len(self.spikes),
            "not_finite": sum(self.nonfinite.values()), "without_gradient": len(self.idle), "kept_mb": self.kept_bytes / 2**20,
        }  # fmt: skip
        found |= {} if self.noise is None else {"noise": self.noise}
        found |= {f"growth/{role}": value for role, value in self.growth.items()}
        found |= {f"ratio/{role}": value[1] for role, value in self.ratios.items()}
        return found | {f"logit/{path}": last for path, (_, last, _) in self.logits.items()}

    def __str__(self) -> str:
        free = [name for name, is_free in self.scale_free.items() if is_free]
        rows = [
            ("batches, seconds", f"{self.batches} in {self.seconds:.2f} s"),
            ("kept aside", f"{self.kept_bytes / 2**20:.1f} MB{', a copy of the model' if self.copied else ''}"),
            ("loss, first and last", f"{self.losses[0]:.4g}, {self.losses[-1]:.4g}"),
            ("gradient norm, median and highest", f"{median(self.norms):.3g}, {max(self.norms):.3g}" if self.norms else "never finite"),
            ("spikes", f"{len(self.spikes)} of {self.batches} batches"),
            ("gradient noise, in batches", "not measured: no batch could be halved" if self.noise is None else f"{self.noise:.3g}"),
            ("gradients that are not finite", ", ".join(f"{name} ({n})" for name, n in list(self.nonfinite.items())[:3]) or "none"),
            ("parameters without a gradient", f"{len(self.idle)}{': ' + ', '.join(self.idle[:3]) if self.idle else ''}"),
            ("scale-free weights", f"{len(free)} of {len(self.scale_free)} judged"),
            ("growth of norms", f"{', '.join(f'{r} {g:+.1%}' for r, g in self.growth.items())}; walked {self.walked:.0%}"),
            ("gradient / weight, median", ", ".join(f"{role} {mid:.2g}" for role, (_, mid, _) in self.ratios.items()) or "-"),
            ("attention logits, highest", f"{max(last for _, last, _ in self.logits.values()):.3g}" if self.logits else "none seen"),
        ]
        return table(("measured", "value"), rows)


def probe(model: nn.Module, batches: Iterable[Any], loss: Loss, steps: int = STEPS, copy: bool = False) -> Probe:
    """Trains for ``steps`` batches and puts everything back.

    Args:
        model: if it is in ``eval()`` as a whole, as pretrained ones come, it is probed in ``train()``; layers that you have put into
            ``eval()`` within a model in ``train()`` stay there.
        batches: at least ``steps`` of them.
        loss: ``loss(model, batch)``, a scalar; it must use the model that it gets.
        copy: trains a deep copy instead of ``model``.

    Raises:
        DataError: a sharded model, or one without values; inference mode; a loss that raises, is no scalar, depends on no parameter, calls
            ``backward()`` itself or is not finite at once; batches that end early.
    """
    if type(steps) is not int or steps < LEAST:
        raise DataError(f"the probe was given steps={steps!r}: it takes a whole number of at least {LEAST}, {STEPS} by default.")
    if not callable(loss):
        raise DataError(f"the loss is {a_kind_of(loss)}: give a function of (model, batch) that returns a scalar.")
    if not hasattr(batches, "__iter__") or isinstance(batches, type):
        what = f"the class {batches.__name__}" if isinstance(batches, type) else a_kind_of(batches)
        raise DataError(f"the batches are {what}: give a list, a DataLoader or another iterable.")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise DataError("under torch.inference_mode() nothing has gradients: make the model and run the probe outside of it.")
    if lazy := [name for name, buffer in model.named_buffers() if is_lazy(buffer)]:
        raise LayoutError(f"buffer {lazy[0]!r} has no shape yet: run the model once on a batch before you probe it.")
    if any(p.is_meta or hasattr(p, "device_mesh") for p in model.parameters()):
        raise DataError("the probe needs the weights here and whole: run it before you shard the model, and not on the meta device.")
    begun = time.perf_counter()
    with Kept(model, not copy, batches) as kept, torch.enable_grad():
        source = iter(batches)    # a DataLoader draws a seed here
        trained = _copied(model) if copy else model
        if not any(module.training for module in trained.modules()):    # in eval() a BatchNorm divides nothing out
            trained.train()
        seen = _Probing(trained, loss, steps)
        for k in range(steps):
            seen.look(k, _next(source, k, steps))
        size = sum(t.numel() * t.element_size() for t in (*trained.parameters(), *trained.buffers()))
        return seen.result(time.perf_counter() - begun, copy, size if copy else kept.bytes)


def _next(source: Iterator[Any], k: int, steps: int) -> Any:
    try:
        return next(source)
    except StopIteration:
        fewer = f", or steps={k}" if k >= LEAST else f"; it takes at least {LEAST}"
        raise DataError(f"the batches ended after {k}, and the probe asks for {steps}: give more{fewer}.") from None
    except NormwiseError:
        raise
    except Exception as error:    # the user's own code
        raise DataError(f"batch {k + 1} raised {_said(error)}") from error


def _said(error: Exception) -> str:
    """Its class and its words, on one line, cut at a word."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    short = said if len(said) <= 240 else said[:240].rpartition(" ")[0] + " …"
    return short if short.endswith((".", "!", "?", "…")) else f"{short}."


def _copied(model: nn.Module) -> nn.Module:
    try:
        made = copying.deepcopy(model)
    except Exception as error:    # whatever the user's modules hold
        raise DataError(f"the model cannot be copied ({_said(error).rstrip('.')}): probe it with copy=False.") from error
    if not all(p.is_leaf for p in made.parameters()):    # of a scripted model, whose copies get no gradients
        raise DataError("a copy of this model does not train, as of scripted ones: probe it with copy=False.")
    return made


@dataclass
class _Probing:
    """The measurements of a probe under way."""

    model: nn.Module
    loss: Loss
    steps: int
    losses: list[float] = field(default_factory=list)
    norms: dict[int, float] = field(default_factory=dict)
    likeness: list[float] = field(default_factory=list)
    nonfinite: dict[str, int] = field(default_factory=dict)
    judged: dict[str, list[bool]] = field(default_factory=dict)
    logits: list[dict[str, Tensor]] = field(default_factory=list)
    splits: bool = True

    def __post_init__(self) -> None:
        inventory = Inventory(self.model)
        self.entries = inventory.trainable
        compiled = any(hasattr(module, "_orig_mod") for module in self.model.modules())    # its graphs show no calls
        self.attentions = [] if compiled else find_attentions(self.model, inventory)
        self.reached: set[str] = set()
        self.start = self._lengths()
        self.ratios: dict[str, list[float]] = {}

    def look(self, k: int, batch: Any) -> None:
        """One batch: its gradient, what can be seen of it, and a step."""
        for e in self.entries:
            e.param.grad = None
        # Two batches tell whether logits grow; in fused attention each look computes them again.
        watching = self.attentions and k in (0, self.steps - 1)
        with watched(self.attentions) if watching else nullcontext() as watch:
            parts = self._backward(k, batch)
        if isinstance(watch, LogitWatch):
            self.logits.append(watch.largest)
        alive = [e for e in self.entries if e.param.grad is not None]
        if not alive:
            raise DataError("the loss depends on no trainable parameter: loss(model, batch) must use the model that it is given.")
        self.reached |= {e.name for e in alive}
        lengths = _norms([_dense(e) for e in alive])
        bad = [e.name for e, size in zip(alive, lengths, strict=True) if not math.isfinite(size)]
        self.nonfinite |= {name: self.nonfinite.get(name, 0) + 1 for name in bad}
        if bad:
            return
        total = math.hypot(*lengths)
        if parts is not None and (squares := parts[0] ** 2 + parts[1] ** 2):
            self.likeness.append((total**2 - squares) / squares)    # 2⟨g₁, g₂⟩ / (‖g₁‖² + ‖g₂‖²)
        share = 1.0 if parts is None else 0.5    # of two halves the gradients have been added
        self.norms[k] = share * total
        if k % 3 == 2 and k < 9:    # whether length matters, in three batches
            for e in alive:
                self._judge(e)
        if k == self.steps - 1:
            self._doubt(batch)
        self._step(alive, lengths, share if k == self.steps - 1 else 0.0)

    def _backward(self, k: int, batch: Any) -> list[float] | None:
        """The gradient of a batch; of every third one in two halves, whose norms are returned."""
        halves = self._halved(batch) if self.splits and k % 3 == 1 else None
        if halves is not None:
            try:
                values = [self.loss(self.model, half) for half in halves]
                self._refuse_gradients()
                sizes = [self._size_of_backward(value) for value in values]
            except Exception:    # a batch that is more than its tensors: it is taken whole from now on
                self.splits = False
                for e in self.entries:
                    e.param.grad = None
            else:
                self.losses.append(float(values[0].detach() + values[1].detach()) / 2)
                return sizes
        self._whole(k, batch)
        return None

    def _halved(self, batch: Any) -> tuple[Any, Any] | None:
        try:
            return _halves(batch)
        except Exception:    # a mapping or a tuple that is not made like its kind
            self.splits = False
            return None

    def _whole(self, k: int, batch: Any) -> None:
        value = self._value(k, batch)
        try:
            torch.autograd.backward(value)
        except Exception as error:    # through the user's own code
            raise DataError(f"the backward pass of batch {k + 1} raised {_said(error)} {BACKWARD}") from error

    def _size_of_backward(self, value: Tensor) -> float:
        """The norm of what this backward pass adds to the gradients, seen before it is added: no copy of the others is needed."""
        sizes: list[Tensor] = []
        handles: list[Any] = []
        for e in self.entries:
            handles.append(e.param.register_hook(lambda grad: sizes.append(_norm(grad))))    # type: ignore[no-untyped-call]
        try:
            torch.autograd.backward(value)
        finally:
            for handle in handles:
                handle.remove()
        return math.hypot(*_read(sizes))

    def _refuse_gradients(self) -> None:
        """Of a loss that has run the backward pass itself: the probe's would be added to them."""
        if any(e.param.grad is not None for e in self.entries):
            raise DataError(f"the loss has left gradients: it calls backward() itself. {BACKWARD}")

    def _value(self, k: int, batch: Any) -> Tensor:
        try:
            value = self.loss(self.model, _own(batch))
        except NormwiseError:
            raise
        except Exception as error:    # the user's own code
            raise DataError(f"the loss raised on batch {k + 1}: {_said(error)}") from error
        self._refuse_gradients()
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else a_kind_of(value)
            raise DataError(f"the loss is {what}: loss(model, batch) must return a tensor of one number.")
        if value.is_complex():
            raise DataError("the loss is complex: loss(model, batch) must return a real number.")
        if not value.requires_grad:
            raise DataError("the loss depends on no trainable parameter: loss(model, batch) must use the model that it is given.")
        number = float(value.detach())
        if not self.losses and not math.isfinite(number):
            raise DataError(f"the loss of the first batch is {number}: look at the data and the model before you ask for advice.")
        self.losses.append(number)
        return value.reshape(())

    @torch.no_grad()
    def _judge(self, e: Entry) -> None:
        """Whether ⟨w, ∇w⟩ is zero: for each row apart (a BatchNorm), or in their sum (a normalisation over all of them)."""
        if e.param.ndim < 2 or e.role not in ("hidden", "conv", "head", "recurrent") or e.param.is_complex() or e.param.numel() == 0:
            return
        w, g = e.param.flatten(1).float(), _dense(e).flatten(1).float()
        rows = (w * g).sum(1).double()
        most = (w.norm(dim=1) * g.norm(dim=1)).double().sum()
        if most > 0:
            apart, summed = rows.abs().sum() < 1e-3 * most, rows.sum().abs() < 1e-2 * rows.norm()
            free = bool(apart | (summed & (len(rows) > 1)))
            # A bias that reaches the loss is normalised with the weight: at zero, where it starts, it hides that their ratio matters.
            bias = getattr(e.module, "bias", None)
            if free and isinstance(bias, Tensor) and bias.grad is not None and float(_norm(bias.grad)) > 1e-4 * float(g.norm()):
                return
            self.judged.setdefault(e.name, []).append(free)

    @torch.no_grad()
    def _doubt(self, batch: Any) -> None:
        """What looks scale-free where the code shows no normalisation must bear any length: all of it together, or else each kind of layer.
        A part that goes by the normalisation may matter too little to be seen before."""
        found = [e for e in self.entries if all(self.judged.get(e.name, [False]))]
        known = scale_free(self.model, found)
        kinds: dict[str, list[Entry]] = {}
        for e in (e for e in found if e.name not in known):
            kinds.setdefault(re.sub(r"\d+", "", e.name), []).append(e)
        if not kinds or self._bears_any_length([e for entries in kinds.values() for e in entries], batch):
            return
        for entries in kinds.values():
            bears = self._bears_any_length(entries, batch)
            for e in entries if bears is None else ():    # neither has been measured
                del self.judged[e.name]
            for e in entries if bears is False else ():
                self.judged[e.name].append(False)

    def _bears_any_length(self, entries: Sequence[Entry], batch: Any) -> bool | None:
        """Whether the loss is the same when they are 16 times as long and 256 times: both are far above a normalisation's eps. None where
        the loss gives no answer."""
        one, other = (self._loss_of_longer(entries, factor, batch) for factor in (16, 256))
        return abs(other - one) <= 1e-5 * abs(one) if math.isfinite(one) and math.isfinite(other) else None

    def _loss_of_longer(self, entries: Sequence[Entry], factor: float, batch: Any) -> float:
        """NaN where the user's own code raises. It may ask for gradients, as of its inputs."""
        was = [e.param.clone() for e in entries]
        torch._foreach_mul_([e.param for e in entries], factor)
        try:
            with same_draws(), torch.enable_grad():
                return float(self.loss(self.model, _own(batch)).detach())
        except Exception:
            return math.nan
        finally:
            torch._foreach_copy_([e.param for e in entries], was)

    @torch.no_grad()
    def _step(self, alive: list[Entry], lengths: list[float], share: float) -> None:
        """share: above 0 in the last step, where ratios are kept: what the gradients are to be multiplied by."""
        moving = [size > 0 for size in lengths]
        params: Any = [e.param for e in compress(alive, moving)]
        grads: Any = [_dense(e) for e in compress(alive, moving)]
        weights = _norms(params)
        # Tensors that are zero move as if they had a thousandth of a usual length.
        rates = [RATE * max(w, 1e-3 * p.numel() ** 0.5) / g for w, p, g in zip(weights, params, compress(lengths, moving), strict=True)]
        if share:
            for e, w, g in zip(compress(alive, moving), weights, compress(lengths, moving), strict=True):
                # Scale-free weights find their own balance of length and step (Li, Lyu and Arora, 2020): their ratio asks for nothing.
                if w and not all(self.judged.get(e.name, [False])) and e.role in ("hidden", "conv", "recurrent", "embedding", "head"):
                    self.ratios.setdefault(e.role, []).append(share * g / w)
        if params:    # none moves where a loss is satisfied
            torch._foreach_mul_(grads, rates)
            torch._foreach_sub_(params, grads)

    def _lengths(self) -> dict[str, float]:
        """Role -> the length of all its weights as one vector."""
        roles: dict[str, list[float]] = {}
        for e, size in zip(self.entries, _norms([e.param.detach() for e in self.entries]), strict=True):
            roles.setdefault(e.role, []).append(size)
        return {role: math.hypot(*sizes) for role, sizes in roles.items()}

    def result(self, seconds: float, copied: bool, kept_bytes: int) -> Probe:
        end = self._lengths()
        logits = {}
        if len(self.logits) == 2:
            for path in (path for path in self.logits[0] if path in self.logits[1]):
                first, last = (found[path] for found in self.logits)
                logits[path] = (float(first.max()), float(last.max()), len(last) if len(last) > 1 else 0)
        return Probe(
            self.steps, seconds, copied, kept_bytes, tuple(self.losses), tuple(self.norms.values()), _spikes(self.norms),
            _noise(self.likeness), self.nonfinite, tuple(e.name for e in self.entries if e.name not in self.reached),
            {name: all(found) for name, found in self.judged.items()},
            {role: end[role] / size - 1 for role, size in self.start.items() if size and math.isfinite(size)},
            RATE * len(self.norms), {role: (min(r), median(r), max(r)) for role, r in self.ratios.items()}, logits,
        )  # fmt: skip


def _dense(e: Entry) -> Tensor:
    grad = e.param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        grad = e.param.grad = grad.to_dense()
    return grad


def _norm(t: Tensor) -> Tensor:
    numbers = t.detach() if t.layout == torch.strided else t.detach().coalesce().values()
    low = numbers.dtype in (torch.float16, torch.bfloat16)    # whose range the norm may leave
    return torch.linalg.vector_norm(numbers, dtype=torch.float32 if low else None)


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    return _read([_norm(t) for t in tensors])


def _read(sizes: Sequence[Tensor]) -> list[float]:
    """Numbers on any devices, with one synchronisation where they are on one."""
    found: list[float] = torch.stack([size.to(sizes[0].device) for size in sizes]).tolist() if sizes else []
    return found


def _spikes(norms: Mapping[int, float]) -> tuple[int, ...]:
    """Batches whose gradient is over `SPIKE` times the median of the four before and the four after."""
    order = list(norms)
    found = []
    for i, k in enumerate(order):
        near = [norms[j] for j in order[max(i - 4, 0) : i] + order[i + 1 : i + 5]]
        if near and norms[k] > SPIKE * median(near):
            found.append(k)
    return tuple(found)


def _noise(likeness: list[float]) -> float | None:
    """tr Σ / ‖G‖² in batches. Of the gradients g₁, g₂ of a batch's halves ⟨g₁, g₂⟩ is ‖G‖² on average, and (‖g₁‖² + ‖g₂‖²)/2 is
    ‖G‖² + 2 tr Σ of a whole batch (McCandlish et al., 2018). Each pair is divided by its own size: gradients shrink in training, and a
    few large ones would decide alone."""
    if not likeness:
        return None
    alike = sum(likeness) / len(likeness)
    return (1 - alike) / (2 * alike) if alike > 0 else math.inf


def _halves(batch: Any) -> tuple[Any, Any] | None:
    """Both halves of a batch along its first axis; None where it has none, or one sample."""
    sizes = [t.shape[0] for t in _tensors(batch) if t.ndim]
    if not sizes or sizes[0] < 2:
        return None
    middle = sizes[0] // 2
    return _cut(batch, sizes[0], 0, middle), _cut(batch, sizes[0], middle, 2 * middle)


def _own(batch: Any, depth: int = 2) -> Any:
    """A batch whose dicts and lists the loss may change (``batch.pop("labels")``): the batch is needed again, and may be the user's.
    Tensors and what is no container are the same."""
    if not depth or not isinstance(batch, MutableMapping | list | tuple):
        return batch
    try:
        if isinstance(batch, tuple):
            parts = [_own(part, depth - 1) for part in batch]
            same = all(part is before for part, before in zip(parts, batch, strict=True))
            return batch if same else type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        made = copying.copy(batch)
        for key, part in list(batch.items()) if isinstance(batch, MutableMapping) else enumerate(batch):
            made[key] = _own(part, depth - 1)
        return made
    except Exception:    # a container that is not made like its kind
        return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for part in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ():
        yield from _tensors(part)


def _cut(batch: Any, size: int, low: int, high: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[low:high] if batch.ndim and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: _cut(part, size, low, high) for key, part in batch.items()})    # type: ignore[call-arg]
    if isinstance(batch, tuple | list):
        parts = [_cut(part, size, low, high) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
