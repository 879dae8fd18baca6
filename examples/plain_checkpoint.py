"""Plain PyTorch with lazy checkpoints: run it, kill it, run it again.   python -m undertow.examples.plain_checkpoint"""

import sys

import torch

from undertow.checkpointing import Checkpointer

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/plain"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with Checkpointer(folder, model=model, optimizer=optimizer, every=10) as ckpt:
    for step in range(ckpt.restore() or 0, 50):
        ckpt.step(step)  # returns at once; the bytes leave during forward and backward
        x = torch.randn(32, 64)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()  # waits only for what has not left yet
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step}: loss {loss.item():.6f}")
