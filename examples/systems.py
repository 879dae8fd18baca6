"""Which of undertow's systems a run switches on, and what they ask of its loop.

A loop needs to know four things of them: which rows of the batch are this rank's, how to compute its share of the loss,
how gradients become those of the whole batch, and what their norm is. Everything else stays inside the systems. The
degrees multiply: data × context × tensor = world size, and the data axis takes what the others leave.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..comms.gradients import GradientAverage
from ..dist.errors import UserError
from ..dist.mesh import Mesh, MeshShape
from ..parallel.context_parallel import ContextParallel
from ..parallel.overlap_arms import ARMS, CUDA_ARMS
from ..parallel.overlap_team import MODES, Team
from ..parallel.stream import enable
from ..parallel.stream.protocol import Attend, causal_attention
from ..parallel.token_ring import executors
from .parallel_lm import ParallelLM

if TYPE_CHECKING:
    from ..dist.launch import Launch
    from .lm import ByteLM


@dataclass(frozen=True)
class Systems:
    """The switches of a run; none of them changes what is computed, beyond rounding.

    `stream`: streamed backpropagation, planned within `stream_budget_bytes` (None: what is free), in chunks of
    `stream_chunk` rows (None: planned). `context_parallel`: ranks that share each row's tokens, by TokenRing attention.
    `tensor_parallel`: ranks that share each matrix product, with `overlap` 'auto', 'on' or 'off'. All of them go
    together; where ranks share products, streaming keeps layer inputs only and cuts the loss, not the layers.
    """

    stream: bool = False
    stream_budget_bytes: int | None = None
    stream_chunk: int | None = None
    context_parallel: int = 1
    tensor_parallel: int = 1
    overlap: str = "auto"

    def __post_init__(self) -> None:
        if not self.stream and (self.stream_budget_bytes, self.stream_chunk) != (None, None):
            raise UserError("a stream budget or chunk without streaming", remedy="pass --stream too")
        if self.overlap not in (*MODES, *(arm.name for arm in (*ARMS, *CUDA_ARMS))):
            raise UserError(f"overlap {self.overlap!r}", expected=f"one of {', '.join(MODES)}")
        if self.overlap not in ("auto", "off") and self.tensor_parallel == 1:
            raise UserError(
                f"overlap {self.overlap!r} where no ranks share products",
                remedy="pass --tensor-parallel N too, or leave --overlap out",
            )
        if self.stream_chunk is not None and self.stream_chunk < 1:
            raise UserError(f"chunks of {self.stream_chunk} rows", expected="at least 1")
        if self.stream_chunk is not None and self.tensor_parallel > 1:
            raise UserError(
                f"chunks of {self.stream_chunk} rows where ranks share products",
                expected="--stream alone: a layer is one chunk there, because its messages repeat for each chunk",
                remedy="leave --stream-chunk out",
            )

    def mesh(self, world_size: int) -> Mesh:
        return MeshShape.of(data=-1, context=self.context_parallel, tensor=self.tensor_parallel).fit(world_size)


PLAIN = Systems()


class Parallel:
    """`systems` applied to `model` on this rank. Create it before the optimizer, on every rank; `close` at the end."""

    def __init__(self, systems: Systems, model: ByteLM, here: Launch, device: torch.device) -> None:
        self.systems = systems
        self._built = systems.mesh(here.world_size).build(here, device.type)
        self.mesh = self._built.mesh
        self.data, self.place = self.mesh.size("data"), self.mesh.coordinates(here.rank)["data"]
        self._engine = self._context = self._team = None
        if systems.context_parallel > 1:
            self._context = ContextParallel(self._built.group("context"), 0)
        if systems.tensor_parallel > 1:
            self._team = Team(self._built.group("tensor"), overlap=systems.overlap, device=device)
            model = ParallelLM(model, self._team, self._built.device_mesh()["tensor"])
        self.model = model
        if systems.stream:
            shared = self._context is not None or self._team is not None
            self._engine = enable(
                model,
                budget_bytes=systems.stream_budget_bytes,
                chunk=systems.stream_chunk if self._team is None else sys.maxsize,  # its rows are those of the team
                attend=self._attend if shared else None,
                ranks=self._context if self._team is None else None,
            )
        parameters = list(model.parameters())
        self._shards = [p for p in parameters if isinstance(p, DTensor)]
        self._whole = [p for p in parameters if not isinstance(p, DTensor)]
        self._averages = [GradientAverage(self._whole, self._built.group("data", "context", "tensor"))]
        if self._shards:
            self._averages.append(GradientAverage(self._shards, self._built.group("data", "context")))

    def rows(self, batch: int, accumulate: int = 1) -> slice:
        """This rank's rows of a batch of `batch`, which it takes in `accumulate` equal parts."""
        parts = self.data * accumulate
        if batch % parts:
            times = f", {accumulate} backward passes each" if accumulate > 1 else ""
            raise UserError(
                f"batch {batch} rows over {self.data} ranks{times}",
                expected="rows per rank × data-parallel ranks = batch",
                remedy=f"pass --batch {-(-batch // parts) * parts}",
            )
        each = batch // self.data
        return slice(self.place * each, (self.place + 1) * each)

    def loss(self, window_BT: torch.Tensor) -> torch.Tensor:
        """This rank's loss for its rows, int64[B, T + 1]; the mean over the ranks is the loss of the whole batch."""
        tokens, labels = window_BT[:, :-1], window_BT[:, 1:]
        if self._context is None and self._team is None:
            return self.model(tokens, labels)
        attend: dict[str, Attend] = {} if self._engine is not None else {"attend": self._attend}
        items = labels.numel() // self.systems.tensor_parallel  # each of these ranks sums its part of the tokens
        if self._context is None:
            return self.model(tokens, labels, num_items=items, **attend)
        self._context = context = self._context.with_length(tokens.shape[1])
        share = self.model(
            context.shard(tokens),
            context.shard(labels),
            positions=context.positions(tokens.device),
            num_items=items,
            **attend,
        )
        return context.loss(share)

    def _attend(
        self,
        q_BHTD: torch.Tensor,
        k_BGTD: torch.Tensor,
        v_BGTD: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Attention of the rows of the latest `loss`, which a streamed backward runs again."""
        if self._context is None:
            return causal_attention(q_BHTD, k_BGTD, v_BGTD, scale=scale, window=window)
        return self._context.attend(q_BHTD, k_BGTD, v_BGTD, scale=scale, window=window)

    def reduce(self) -> None:
        """Make every gradient that of the whole batch."""
        for average in self._averages:
            average()
        for parameter in self._shards:  # each saw the tokens of all tensor ranks, and the loss is their mean
            parameter.grad.to_local().div_(self.systems.tensor_parallel)  # type: ignore[union-attr]

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients down to a global norm of `limit`; their norm before, the same on all ranks.

        After `reduce`, whole gradients are alike on all ranks and counted once; shards differ along the tensor axis and
        are added over it. In float32 whatever the gradients are."""
        whole, shards = ([_local_grad(p) for p in kind] for kind in (self._whole, self._shards))
        norm = _norm(whole)
        if shards:
            square = _norm(shards).square()
            dist.all_reduce(square, group=self._built.group("tensor"))
            norm = (norm.square() + square).sqrt()
        torch._foreach_mul_([*whole, *shards], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def mean(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` as the whole batch's, on every rank."""
        loss = loss.detach().float()
        if self.mesh.world_size > 1:
            dist.all_reduce(loss)
            loss /= self.mesh.world_size
        return loss

    def explain(self) -> str:
        """What was chosen, after the first step."""
        lines = [f"ranks: {self.mesh}"]
        if self._engine is not None:
            lines += ["streamed backpropagation:", str(self._engine.last_plan)]
        if self._team is not None:
            lines += ["overlapped products:", self._team.explain()]
        return "\n".join(lines)

    def close(self) -> None:
        """Collective."""
        if self._team is not None:
            self._team.close()
        if self._context is not None:
            executors.forget()


def _norm(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, torch.float32)))


def _local_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad
