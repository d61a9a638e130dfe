"""Bounds how far LoRA may move each layer, relative to the pretrained weights, and prints what it did: ``python examples/lora.py``."""

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import normwise as nw


def main() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=100, n_positions=32))    # yours would be pretrained
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    control = nw.attach(model, optimizer, [nw.max_norm("0.1*base", "peft:product")])

    tokens = torch.randint(0, 100, (4, 32))
    for step in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    print(control.verify())
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    moved, start = (w.detach().norm(dim=0) for w in (layer.get_delta_weight("default"), layer.base_layer.weight))    # units are columns
    print(f"the unit of the first layer that moved furthest went {float((moved / start).max()):.1%} of its length")


if __name__ == "__main__":
    main()
