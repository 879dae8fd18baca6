"""Plain PyTorch with streamed backpropagation: a long sequence in chunks.   python -m undertow.examples.plain_stream"""

import torch

from undertow.examples.lm import ByteLM, LMConfig
from undertow.parallel.stream import stream_backprop

torch.manual_seed(0)
model = ByteLM(LMConfig(layers=4, width=64, heads=4, kv_heads=2, hidden=176))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.arange(2049)[None] * 7 % 251  # 2048 tokens to learn
with stream_backprop(model, budget_bytes=12 << 20) as stream:  # plain autograd would keep far more
    for step in range(3):
        loss = model(text[:, :-1], text[:, 1:])
        loss.backward()  # exact gradients, one layer and one chunk at a time
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.6f}")
    print(stream.last_plan)
