"""Rules and a preset under Hugging Face's Trainer: three lines more than without.

Run it with ``python examples/hf_trainer.py``. It needs transformers and accelerate, downloads nothing, and takes a few seconds
on a CPU: a small GPT-2 learns sequences that count up. The norms are in the Trainer's own log; at the end every bound is measured again.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import normwise as nw


def data() -> list[dict[str, torch.Tensor]]:
    """Sixteen numbers that go up by one, from any start, modulo 32."""
    starts = torch.randint(32, (512,), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (starts[:, None] + torch.arange(16)) % 32]


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=32, n_positions=16))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=100, per_device_train_batch_size=16, logging_steps=20, max_grad_norm=0.0, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )    # fmt: skip
        preset = nw.integrations.transformers.optimizer("auto")
        trainer = Trainer(model, arguments, train_dataset=data(), optimizer_cls_and_kwargs=preset)
        rules = nw.integrations.transformers.attach(trainer, [nw.max_norm(1.0), nw.clip_grad_norm(1.0, name="clip")])
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.3f}, norm of the update {entry['norm/update/total']:.3f}")
    assert rules.control is not None
    print(rules.control.verify())
    return 0 if rules.control.verify() else 1


if __name__ == "__main__":
    sys.exit(main())
