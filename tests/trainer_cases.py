"""A small GPT-2 under Hugging Face's Trainer, in this process or on several (``torchrun tests/trainer_cases.py``): what tests train."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw

STEPS, CUT = 8, 4


def gpt2(seed: int = 0) -> Any:
    """16 thousand numbers; no dropout, embedding and head not tied."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))


def rows() -> list[dict[str, Tensor]]:
    listed = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in listed]


def rules() -> list[Any]:
    """Of each phase one, those with a memory among them."""
    return [
        nw.l2_penalty(1e-3), nw.clip_grad_norm(0.5, name="clip"), nw.autoclip(percentile=50), nw.max_norm(0.3),
        nw.unit_norm("init", params="*mlp.c_fc.weight"), nw.weight_decay(nw.schedules.linear(0.1, 0.0, STEPS)),
    ]  # fmt: skip


def trainer(folder: Path, seed: int = 0, optimizer: Any = None, kind: Any = None, callbacks: Any = None, **options: Any) -> Any:
    """A Trainer of ``kind`` that takes eight steps and saves after four."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    usual = {"max_steps": STEPS, "save_steps": CUT, "logging_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "seed": 3}
    arguments = transformers.TrainingArguments(str(folder), **(usual | {"use_cpu": True, "disable_tqdm": True} | options))
    model = {"model_init": lambda: gpt2(seed)} if kind == "model_init" else {"model": gpt2(seed)}
    kind = kind if isinstance(kind, type) else transformers.Trainer
    data = {"train_dataset": rows(), "eval_dataset": rows()[:4]}
    made = kind(**model, **data, args=arguments, optimizer_cls_and_kwargs=optimizer, callbacks=callbacks)
    made.remove_callback(transformers.PrinterCallback)
    return made


def trained(folder: Path, seed: int = 0, resume: bool = False, given: Any = None, **options: Any) -> tuple[Any, Any]:
    """A whole run, or its second half from the checkpoint of another; the Trainer and its rules."""
    made = trainer(folder, seed, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached = nw.integrations.transformers.attach(made, rules() if given is None else given)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}") if resume else None)
    return made, attached


def weights(model: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(weights(one), weights(other), strict=True))


# --------------------------------------------------------------------------------------------------- on several processes


def sharded_kind() -> type:
    """A Trainer whose Accelerate shards the model by FSDP2, which by itself it does on accelerators only."""
    import transformers
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharded(transformers.Trainer):    # type: ignore[misc]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
                state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
            )
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    return Sharded


def on_ranks(how: str, preset: str, folder: Path) -> dict[str, Any]:
    """What the first rank tells of a run and of one that is resumed from its middle."""
    kind = sharded_kind() if how == "fsdp2" else None

    def run(seed: int, resume: bool) -> tuple[Any, Any]:
        optimizer = nw.integrations.transformers.optimizer(preset) if preset else None
        return trained(folder, seed, resume, kind=kind, optimizer=optimizer, ddp_backend="gloo")

    whole, attached = run(0, False)
    resumed, again = run(5, True)
    logged = [h["norm/weight/total"] for h in whole.state.log_history if "norm/weight/total" in h]
    total = float(torch.cat([w.double().flatten() for w in weights(whole.model)]).norm())
    receipt = str(whole.optimizer.optimizer.receipt()) if preset else ""
    return {
        "difference": difference(whole.model, resumed.model), "held": bool(attached.control.verify()) and bool(again.control.verify()),
        "steps": [attached.control.steps, again.control.steps], "logged": logged, "total": total, "receipt": receipt,
        "sharded": hasattr(next(whole.model.parameters()), "full_tensor"), "wrapped": type(whole.model_wrapped).__name__,
    }  # fmt: skip


if __name__ == "__main__":
    how, preset, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    found = on_ranks(how, preset, Path(folder))
    if torch.distributed.get_rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)    # gloo's threads may hold a tensor still, and abort in an interpreter that ends (pytorch/pytorch#179291)
