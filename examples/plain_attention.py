"""Attention over one sequence that ranks share.   torchrun --nproc-per-node 2 -m undertow.examples.plain_attention"""

import os

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from undertow.parallel import shard_sequence, token_ring_attention
from undertow.parallel.token_ring.executors import forget

if "RANK" not in os.environ and not dist.is_initialized():
    raise SystemExit("start it by: torchrun --nproc-per-node 2 -m undertow.examples.plain_attention")
dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank makes the same whole sequence: [batch, length, heads, dim], grouped key heads
whole = [torch.randn(1, 1000, heads, 32, dtype=torch.float64, requires_grad=True) for heads in (8, 2, 2)]
q, k, v = (shard_sequence(x.detach()).requires_grad_() for x in whole)  # and keeps its part
out = token_ring_attention(q, k, v, causal=True)
found = out, *torch.autograd.grad(out.square().sum(), (q, k, v))

q_BHLD, k_BGLD, v_BGLD = (x.transpose(1, 2) for x in whole)  # the same on one rank
wanted = scaled_dot_product_attention(q_BHLD, k_BGLD, v_BGLD, is_causal=True, enable_gqa=True).transpose(1, 2)
answer = wanted, *torch.autograd.grad(wanted.square().sum(), whole)
errors = [float((x - shard_sequence(y)).detach().abs().max()) for x, y in zip(found, answer)]
print(f"rank {dist.get_rank()}: {q.shape[1]} of 1000 tokens, out, dq, dk, dv differ by at most {max(errors):.1e}")
forget()
dist.destroy_process_group()
