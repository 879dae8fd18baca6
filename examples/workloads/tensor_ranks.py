"""The ranks that share each matrix product of a workload, and the count of what they sent."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...dist.launch import Launch
from ...dist.mesh import MeshShape
from ...dist.trace import Span, Trace
from ...parallel.overlap_team import Team
from ...parallel.tensor_parallel import token_share


class Tally(Trace):
    """Counts actions by lane and kind where a trace would write them down."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: Counter[tuple[str | None, str]] = Counter()

    @property
    def enabled(self) -> bool:
        return True

    def span(self, name: str, *, lane: str | None = None, **args: object) -> Span:
        self.seen[lane, name.partition(" ")[0]] += 1  # a lane is one thread at a time
        return super().span(name, lane=lane)

    def count(self, kind: str) -> int:
        return sum(number for (_, seen), number in self.seen.items() if seen == kind)


class TensorRanks:
    """All ranks of the job as one tensor-parallel team. Created and closed by all of them."""

    def __init__(self, here: Launch, overlap: str, device: torch.device) -> None:
        self.tally = Tally()
        built = MeshShape.of(tensor=here.world_size).fit(here.world_size).build(here, device.type)
        self.group = built.group("tensor")
        self.team = Team(self.group, overlap=overlap, device=device, trace=self.tally)
        self.mesh: DeviceMesh = built.device_mesh()["tensor"]
        self.products = self.bytes = 0

    def share(self, tokens: int) -> slice:
        """This rank's tokens."""
        return token_share(tokens, self.team)

    def whole(self, x_tBX: Tensor) -> Tensor:
        """The tokens of all ranks, [T, B, …]; no gradient flows back."""
        parts = [torch.empty_like(x_tBX) for _ in range(self.team.world)]
        dist.all_gather(parts, x_tBX.detach().contiguous(), group=self.group)
        return torch.cat(parts)

    def multiplied(self, out_tBC: Tensor) -> None:
        """Note one block: two gathers of what `out_tBC` is as large as, two sums scattered; backward as many again."""
        passes = 2 if out_tBC.requires_grad else 1
        self.products += 4 * passes
        self.bytes += 4 * passes * (self.team.world - 1) * out_tBC.numel() * out_tBC.element_size()

    def close(self) -> dict[str, float]:
        """What was done: products of tensor-parallel layers, messages that the executor sent, and their bytes."""
        self.team.close()
        return {"products": self.products, "messages": self.tally.count("send"), "bytes": self.bytes}
