"""The memory of one rank while a schedule runs: its inputs, its outputs, and one buffer per slot.

Shared slots are raw bytes that several values view in turn, so an executor's peak memory is what the schedule says,
and a slot that is reused early really corrupts (the tests rely on it). A token value is one byte per row, because a
transport cannot send nothing. Values that are adopted (see `adoption`) have no memory here until an operation gives it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..dist.errors import UserError
from .actions import ITEM_BYTES, Slice, Value
from .schedule import Schedule

_DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES if name != "token"}
_DTYPES["token"] = torch.uint8
NOBODY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Layout:
    """What a run must know of the values of a rank: worked out once, used by every run.

    `nbytes`: of each slot that several values share. A slot of one value needs no bytes of its own.
    """

    schedule: Schedule
    rank: int
    values: dict[str, Value]
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    nbytes: dict[str, int]


def layout_of(schedule: Schedule, rank: int) -> Layout:
    values = schedule.by_rank[rank]
    shapes = {name: _shape(value) for name, value in values.items()}
    sizes: dict[str, list[int]] = {}
    for name, value in values.items():
        if value.slot:
            sizes.setdefault(value.slot, []).append(math.prod(shapes[name]) * _DTYPES[value.dtype].itemsize)
    return Layout(
        schedule,
        rank,
        values,
        frozenset(name for name, value in values.items() if value.role == "input"),
        tuple(name for name, value in values.items() if value.role == "output"),
        shapes,
        {slot: max(found) for slot, found in sizes.items() if len(found) > 1},
    )


class _Views(dict[str, torch.Tensor]):
    """Tensors by name; views of shared slots are made when they are first asked for, not before the first message."""

    def __init__(self, layout: Layout, buffers: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layout, self.buffers = layout, buffers

    def __missing__(self, name: str) -> torch.Tensor:
        value, shape = self.layout.values[name], self.layout.shapes[name]
        dtype = _DTYPES[value.dtype]
        view = self.buffers[value.slot][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        self[name] = view
        return view


class Storage:
    """Tensors of all values of a rank. Inputs are used in place (copied only when they are not contiguous).

    `outputs` may give the tensors to fill; all others are allocated on `device`, but for those in `former`, which are
    adopted: for each the value before it in its slot; `sent` of them are kept dense. `UserError` names an input that is
    missing, unknown, or of another shape or dtype than the schedule declares.
    """

    def __init__(
        self,
        layout: Layout,
        inputs: Mapping[str, torch.Tensor],
        *,
        outputs: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
        former: Mapping[str, str] = NOBODY,
        sent: frozenset[str] = frozenset(),
    ) -> None:
        values, rank = layout.values, layout.rank
        self.layout, self.device, self.former, self.sent = layout, device, former, sent
        given = {**inputs, **outputs} if outputs else inputs
        if layout.inputs != inputs.keys():
            raise UserError(
                f"rank {rank} was given the inputs {', '.join(sorted(inputs)) or 'none'}",
                expected=f"{', '.join(sorted(layout.inputs)) or 'none'}, as schedule {layout.schedule.name} declares "
                "them",
            )
        kind = torch.device(device).type
        buffers: dict[str, torch.Tensor] = {}
        self.tensors = _Views(layout, buffers)
        for name, tensor in given.items():
            if name not in values or (name not in inputs and values[name].role != "output"):
                raise UserError(f"rank {rank} was given a tensor for {name}", expected="the name of an output")
            if tensor.device.type != kind:
                raise UserError(f"{name} of rank {rank} is on {tensor.device}", expected=f"a tensor on {device}")
            value = values[name]
            self.tensors[name] = _fitting(tensor, value, layout.shapes[name], rank, name in inputs)
            if value.slot in layout.nbytes:
                buffers[value.slot] = _as_buffer(self.tensors[name], value, layout.nbytes[value.slot])
        for name, value in values.items():
            if name in self.tensors or name in former:
                continue
            if value.slot not in layout.nbytes:
                self.tensors[name] = torch.empty(layout.shapes[name], dtype=_DTYPES[value.dtype], device=device)
            elif value.slot not in buffers:
                buffers[value.slot] = torch.empty(layout.nbytes[value.slot], dtype=torch.uint8, device=device)
        self.outputs = {name: self.tensors[name] for name in layout.outputs}
        self.inputs = frozenset(inputs)

    def rows(self, part: Slice) -> torch.Tensor:
        """The slice's rows: the tensor itself where they are all of it, else a view."""
        tensor = self.tensors[part.value]
        if part.start == 0 and part.stop == tensor.shape[0]:
            return tensor
        return tensor[part.start : part.stop]

    def views(self, parts: tuple[Slice, ...]) -> list[torch.Tensor]:
        return [self.rows(part) for part in parts]

    def form(self, part: Slice) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a slice, also of one that has no memory yet."""
        return (part.rows, *self.layout.shapes[part.value][1:]), _DTYPES[self.layout.values[part.value].dtype]

    def blank(self, part: Slice) -> torch.Tensor:
        """A tensor like a slice, of nobody."""
        shape, dtype = self.form(part)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def let_go(self, name: str) -> None:
        """Forget the tensor of an adopted value, if it has one: nobody reads it any more."""
        self.tensors.pop(name, None)

    def adopt(self, name: str, tensor: torch.Tensor, *, loose: bool = False) -> None:
        """`tensor` is the value from now on. It is copied only if it has another dtype, is not dense (unless that is
        `loose`, and it is not to be sent), or is a part of a larger tensor, which would live as long."""
        value = self.layout.values[name]
        assert tensor.shape == self.layout.shapes[name], (name, tensor.shape)
        fits = tensor.dtype == _DTYPES[value.dtype] and tensor.untyped_storage().nbytes() == tensor.nbytes
        dense = tensor.is_contiguous() or (loose and name not in self.sent)
        self.tensors[name] = tensor if fits and dense else self.allocate(name).copy_(tensor)

    def allocate(self, name: str) -> torch.Tensor:
        """Memory for an adopted value that nothing has been given for."""
        self.tensors[name] = self.blank(self.layout.values[name].all())
        return self.tensors[name]

    def poison(self, names: tuple[Slice, ...]) -> None:
        """Fill slices with values that no right result contains (NaN, or a pattern for integers)."""
        for part in names:
            rows = self.rows(part)
            rows.fill_(math.nan if rows.is_floating_point() else (True if rows.dtype == torch.bool else 85))


def _shape(value: Value) -> tuple[int, ...]:
    value.row_bytes  # noqa: B018  raises the error that names the symbols
    return tuple(int(dim) for dim in value.shape) if value.dtype != "token" else (value.rows,)


def _fitting(tensor: torch.Tensor, value: Value, shape: tuple[int, ...], rank: int, is_input: bool) -> torch.Tensor:
    if tensor.shape != shape or tensor.dtype != _DTYPES[value.dtype]:
        raise UserError(
            f"{value.role} {value.name} of rank {rank} is {tensor.dtype}{list(tensor.shape)}",
            expected=f"torch.{value.dtype}{list(shape)}, as the schedule declares it",
        )
    if tensor.is_contiguous():
        return tensor
    if not is_input:
        raise UserError(f"output {value.name} of rank {rank} is not contiguous", expected="a contiguous tensor to fill")
    return tensor.contiguous()


def _as_buffer(output: torch.Tensor, value: Value, nbytes: int) -> torch.Tensor:
    buffer = output.view(-1).view(torch.uint8)
    if buffer.numel() < nbytes:
        raise UserError(
            f"the given output {value.name} has {buffer.numel()} bytes, but its slot {value.slot} needs {nbytes}",
            remedy="let the executor allocate it",
        )
    return buffer
