"""The largest attention logits of a forward pass, taken where torch computes them: before a softmax, or within its fused attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from normwise.parameters.attention_logits import Attention

SAMPLES = 4
"""Of a batch so many are looked at in fused attention, whose logits must be computed once more."""


class LogitWatch(TorchFunctionMode):
    """``largest``: path of the attention -> the largest logit of each head; of one number where the heads cannot be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, Tensor] = {}
        self.inside: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.inside and name in _LOGITS:
            with torch.no_grad():
                scores = _LOGITS[name](*args, **(kwargs or {}))
                if isinstance(scores, Tensor) and scores.ndim >= 3:
                    self._take(scores)
        return func(*args, **(kwargs or {}))

    def _take(self, scores: Tensor) -> None:
        heads = scores.shape[-3] if scores.ndim >= 4 else 1
        found = scores.detach().float().movedim(-3, 0).reshape(heads, -1).amax(1)
        path = self.inside[-1]
        before = self.largest.get(path)
        self.largest[path] = found if before is None or before.shape != found.shape else torch.maximum(before, found)


def _scores(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
            scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """The logits of ``F.scaled_dot_product_attention`` for the first samples."""
    first = [x.detach()[:SAMPLES] if x.ndim >= 4 else x.detach() for x in (query, key)]
    q, k = first
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(), -torch.inf)
    if attn_mask is not None:
        mask = attn_mask[:SAMPLES] if attn_mask.ndim == scores.ndim and attn_mask.shape[0] == query.shape[0] else attn_mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def _scores_of_torchs(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, in_proj: Tensor | None, bias: Tensor | None, *rest: Any,
    attn_mask: Tensor | None = None, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    """Those of ``F.multi_head_attention_forward``, within which no call can be seen; padding is not left out."""
    weights = in_proj.chunk(3)[:2] if in_proj is not None else (q_proj_weight, k_proj_weight)
    biases = bias.chunk(3)[:2] if bias is not None else (None, None)
    inputs = (x[:, :SAMPLES] if x.ndim == 3 else x[:, None] for x in (query, key))    # (length, samples, width)
    parts = (torch.nn.functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True) if w is not None)
    q, k = (part.reshape(*part.shape[:2], heads, -1).permute(1, 2, 0, 3) for part in parts)
    return _scores(q, k, k, None if attn_mask is None or attn_mask.ndim == 3 else attn_mask)


def _before_softmax(input: Any, *rest: Any, **more: Any) -> Any:
    return input    # torch's name, by which it may be given


_LOGITS: dict[str, Callable[..., Any]] = {
    "softmax": _before_softmax, "scaled_dot_product_attention": _scores, "multi_head_attention_forward": _scores_of_torchs,
}  # fmt: skip
"""torch's functions that see logits, by name -> what gives them."""


@contextmanager
def watched(attentions: Sequence[Attention]) -> Iterator[LogitWatch]:
    """A watch over these attentions; hooks tell which one computes, and are taken off at the end."""
    watch = LogitWatch()
    handles: list[Any] = []
    try:
        for attention in attentions:
            enter, leave = _hooks(watch, attention.path)
            handles.append(attention.module.register_forward_pre_hook(enter))
            handles.append(attention.module.register_forward_hook(leave, always_call=True))
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _hooks(watch: LogitWatch, path: str) -> tuple[Any, Any]:
    def enter(module: Any, inputs: Any) -> None:
        watch.inside.append(path)

    def leave(module: Any, inputs: Any, outputs: Any) -> None:
        watch.inside.pop()

    return enter, leave
