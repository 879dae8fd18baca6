"""Which of undertow's systems a run switches on, and what they ask of its loop.

A loop needs to know four things of them: which rows of the batch are this rank's, how to compute its share of the loss,
how gradients become those of the whole batch, and what their norm is. Everything else stays inside the systems. The
degrees multiply: data × context × tensor = world size, and the data axis takes what the others leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..comms.gradients import GradientAverage
from ..dist.errors import UserError
from ..dist.mesh import Mesh, MeshShape
from ..parallel.stream import enable

if TYPE_CHECKING:
    from ..dist.launch import Launch
    from .lm import ByteLM


@dataclass(frozen=True)
class Systems:
    """The switches of a run; none of them changes what is computed, beyond rounding.

    `stream`: streamed backpropagation, planned within `stream_budget_bytes` (None: what is free), in chunks of
    `stream_chunk` rows (None: planned).
    """

    stream: bool = False
    stream_budget_bytes: int | None = None
    stream_chunk: int | None = None

    def __post_init__(self) -> None:
        if not self.stream and (self.stream_budget_bytes, self.stream_chunk) != (None, None):
            raise UserError("a stream budget or chunk without streaming", remedy="pass --stream too")
        if self.stream_chunk is not None and self.stream_chunk < 1:
            raise UserError(f"chunks of {self.stream_chunk} rows", expected="at least 1")

    def mesh(self, world_size: int) -> Mesh:
        return MeshShape.of(data=-1).fit(world_size)


PLAIN = Systems()


class Parallel:
    """`systems` applied to `model` on this rank. Create it before the optimizer, on every rank."""

    def __init__(self, systems: Systems, model: ByteLM, here: Launch) -> None:
        self.systems, self.model = systems, model
        self.mesh = systems.mesh(here.world_size).build(here)
        self.data = self.mesh.mesh.size("data")
        self.place = self.mesh.mesh.coordinates(here.rank)["data"]
        self._average = GradientAverage(model.parameters(), self.mesh.group("data"))
        self._engine = None
        if systems.stream:
            self._engine = enable(model, budget_bytes=systems.stream_budget_bytes, chunk=systems.stream_chunk)

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch of `batch`."""
        if batch % self.data:
            raise UserError(
                f"batch {batch} rows over {self.data} ranks",
                expected="rows per rank × data-parallel ranks = batch",
                remedy=f"pass --batch {-(-batch // self.data) * self.data}",
            )
        each = batch // self.data
        return slice(self.place * each, (self.place + 1) * each)

    def loss(self, window_BT: torch.Tensor) -> torch.Tensor:
        """This rank's loss for its rows, int64[B, T + 1]; the mean over the ranks is the loss of the whole batch."""
        return self.model(window_BT[:, :-1], window_BT[:, 1:])

    def reduce(self) -> None:
        """Make every gradient that of the whole batch."""
        self._average()

    def clip(self, norm: float) -> torch.Tensor:
        """Scale the gradients down to a global norm of `norm`; their norm before."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)

    def mean(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` as the whole batch's, on every rank."""
        loss = loss.detach().float()
        if self.mesh.mesh.world_size > 1:
            dist.all_reduce(loss)
            loss /= self.mesh.mesh.world_size
        return loss

    def explain(self) -> str:
        """What was chosen, after the first step."""
        lines = [f"ranks: {self.mesh.mesh}"]
        if self._engine is not None:
            lines += ["streamed backpropagation:", str(self._engine.last_plan)]
        return "\n".join(lines)
