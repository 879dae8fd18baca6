"""Which systems a run of a workload switches on, and the one place where a combination is refused by name."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from ...dist.errors import UserError

SYSTEMS = {
    "checkpoint": "lazy asynchronous checkpoints (--checkpoint lazy)",
    "stream": "streamed backpropagation (--stream)",
    "ring": "TokenRing attention over ranks (--context-parallel N)",
    "overlap": "overlapped tensor parallelism (--overlap auto)",
    "halo": "boundary rows by MPI datatypes (--halo mpi, under `undertow mpi run`)",
    "gradients": "gradients of a shared vector that leave as they are complete (--gradients tracked)",
}
WHY_NOT = {  # what a reader could not guess
    ("graphgps", "overlap"): ": its products are too small for ranks to share",
    ("graphgps", "stream"): ": its attention is not causal",
    ("stable-rps", "overlap"): ": its matrices are views of one vector, which no rank may hold a part of",
    ("atlas", "overlap"): ": what it trains are coefficients, not matrices",
    ("trace", "overlap"): ": its products are too small for ranks to share",
    ("thoughts", "overlap"): ": a thought is one token, and ranks would share tokens",
    ("thoughts", "stream"): ": each thought needs the last hidden state before the next token is read",
}


@dataclass(frozen=True)
class Switches:
    """None of them changes what is computed, beyond rounding. `halo`: off, gloo (the plain way) or mpi.

    `overlap`: auto measures each product and keeps the fastest way, on always overlaps; all ranks share each product.
    `gradients`: whole, after backward, or tracked: each entry of a shared vector once its last sharer is done.
    """

    checkpoint: str = "lazy"
    stream: bool = False
    stream_chunk: int | None = None
    context: int = 1
    overlap: str = "off"
    halo: str = "off"
    gradients: str = "whole"

    def __post_init__(self) -> None:
        choices = {"checkpoint": ("lazy", "off"), "overlap": ("auto", "on", "off"), "halo": ("off", "gloo", "mpi")}
        choices["gradients"] = ("whole", "tracked")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)}", expected=f"one of {', '.join(known)}")
        if self.context < 1:
            raise UserError(f"--context-parallel {self.context}", expected="at least 1")
        if self.stream_chunk is not None and (not self.stream or self.stream_chunk < 1):
            raise UserError(f"--stream-chunk {self.stream_chunk}", expected="at least 1, together with --stream")

    @property
    def on(self) -> list[str]:
        """The systems switched on."""
        asked = {
            "checkpoint": self.checkpoint != "off",
            "stream": self.stream,
            "ring": self.context > 1,
            "overlap": self.overlap != "off",
            "halo": self.halo != "off",
            "gradients": self.gradients != "whole",
        }
        return [name for name, on in asked.items() if on]

    def check(self, workload: str, exercises: Set[str], world_size: int) -> None:
        """Refuse what this workload, or this version of the package, cannot do."""
        for system in self.on:
            if system not in exercises:
                raise UserError(
                    f"{workload} does not use {SYSTEMS[system]}{WHY_NOT.get((workload, system), '')}",
                    expected=f"one of {', '.join(sorted(exercises))}",
                )
        together = [name for name in self.on if name in ("stream", "ring", "overlap", "halo", "gradients")]
        if len(together) > 1 and together != ["ring", "halo"]:
            raise UserError(f"{' and '.join(SYSTEMS[name] for name in together)} in one run", expected="one of them")
        if "overlap" in self.on and world_size < 2:
            raise UserError(
                f"--overlap {self.overlap} on {world_size} rank",
                expected="at least 2, which share each matrix product",
                remedy="start with torchrun --standalone --nproc-per-node 2",
            )
        if self.context > 1 and self.context != world_size:
            raise UserError(
                f"--context-parallel {self.context} on {world_size} ranks",
                expected="as many ranks as shards",
                remedy=f"start with torchrun --standalone --nproc-per-node {self.context}",
            )


PLAIN = Switches(checkpoint="off")
