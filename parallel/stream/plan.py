"""The plan of one streamed forward and backward, as data: chunk length, rows of the loss, where each layer's input and
attention output waits. Frozen; prints as a table that a person can read; made by `planner`, carried out by `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...dist.errors import UserError

INPUTS = ("device", "host", "derived", "graph")
ATTENTION = ("none", "device", "host")


@dataclass(frozen=True)
class StreamPlan:
    """`inputs[l]`: where layer l's input waits ('derived': computed again from layer l - 1's; 'graph': with all else
    that autograd saves, so that nothing runs again; the last layers only, and with one chunk). `attention[l]`: where
    its attention output and log-sum-exp wait ('none': attention runs again in backward). `chunk` and `loss_rows` in
    rows (0: the loss chooses). The predicted numbers are bytes above weights and their gradients; 0 when not known.
    """

    batch: int
    tokens: int
    chunk: int
    inputs: tuple[str, ...]
    attention: tuple[str, ...]
    loss_rows: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(f"a chunk of {self.chunk} rows", expected="at least 1")
        if len(self.inputs) != len(self.attention):
            raise UserError(f"{len(self.inputs)} layer inputs but {len(self.attention)} attention outputs")
        unknown = (set(self.inputs) - set(INPUTS)) | (set(self.attention) - set(ATTENTION))
        if unknown:
            raise UserError(f"no such place: {', '.join(sorted(unknown))}", expected=f"{INPUTS} and {ATTENTION}")
        if self.inputs and self.inputs[0] == "derived":
            raise UserError("the first layer's input cannot be derived from a layer before it")
        graphs = self.inputs.count("graph")
        if graphs and (self.inputs[-graphs:] != ("graph",) * graphs or set(self.attention[-graphs:]) != {"none"}):
            raise UserError(
                "a kept graph before another layer, or with its attention kept", expected="graphs of the last layers"
            )
        if graphs and self.tokens > self.chunk:
            raise UserError(f"kept graphs with chunks of {self.chunk} rows", expected=f"one chunk of {self.tokens}")

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Chunks [start, stop) in order; the last may be shorter."""
        return tuple((a, min(a + self.chunk, self.tokens)) for a in range(0, self.tokens, self.chunk))

    @property
    def every(self) -> int:
        """n where every n-th layer input is kept: one more than the most neighbours with derived inputs."""
        runs = "".join("d" if place == "derived" else " " for place in self.inputs).split(" ")
        return 1 + max(map(len, runs))

    @property
    def derived_rows(self) -> int:
        """Derived inputs that are on the device at once, less the kept ones above them that are gone by then."""
        here, run, most = 0, 0, 0
        for place in self.inputs:
            here, run = here + (place == "device"), run + 1 if place == "derived" else 0
            most = max(most, here + run)
        return most - here

    @property
    def settled(self) -> int:
        """Layers whose attention runs once only: output or graph kept."""
        return sum(place != "none" for place in self.attention) + self.inputs.count("graph")

    @property
    def fractions(self) -> dict[str, float]:
        """What `memory_model.step_flops` asks of a plan, as fractions of the layers."""
        layers = max(1, len(self.inputs))
        return {
            "attention_kept": sum(place != "none" for place in self.attention) / layers,
            "derived": self.inputs.count("derived") / layers,
            "graphs": self.inputs.count("graph") / layers,
        }

    @classmethod
    def simple(cls, batch: int, tokens: int, layers: int, chunk: int) -> StreamPlan:
        """Everything on the device, nothing stashed."""
        return cls(batch, tokens, min(chunk, tokens), ("device",) * layers, ("none",) * layers)

    def __str__(self) -> str:
        from ...dist.units import format_bytes

        rows = [
            ("tokens", f"{self.batch} x {self.tokens}"),
            ("chunks", f"{len(self.bounds)} of {self.chunk} rows"),
            ("loss rows", str(self.loss_rows) if self.loss_rows else "by vocabulary"),
            ("layer inputs", _counted(self.inputs)),
            ("attention kept", _counted(self.attention[: len(self.inputs) - self.inputs.count("graph")])),
        ]
        if self.device_bytes:
            rows.append(("predicted", f"{format_bytes(self.device_bytes)} on the device above weights and gradients"))
        if self.host_bytes:
            rows.append(("host memory", format_bytes(self.host_bytes)))
        if self.reason:
            rows.append(("because", self.reason))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _counted(places: tuple[str, ...]) -> str:
    return ", ".join(f"{places.count(place)} {place}" for place in dict.fromkeys(places)) or "with the graphs"
