"""The memory of one rank while a schedule runs: its inputs, its outputs, and one buffer per slot.

Slots are raw bytes that several values view in turn, so an executor's peak memory is what the schedule says, and a slot
that is reused early really corrupts (the tests rely on it). A token value is one byte per row, because a transport
cannot send nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..dist.errors import UserError
from .actions import ITEM_BYTES, Slice, Value
from .schedule import Schedule

_DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES if name != "token"}
_DTYPES["token"] = torch.uint8


class Storage:
    """Tensors of all values of `rank`. Inputs are used in place (copied only when they are not contiguous).

    `outputs` may give the tensors to fill; all others are allocated on `device`. `UserError` names an input that is
    missing, unknown, or of another shape or dtype than the schedule declares.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        inputs: Mapping[str, torch.Tensor],
        *,
        outputs: Mapping[str, torch.Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        values = schedule.by_rank[rank]
        given = {**inputs, **(outputs or {})}
        wanted = {name for name, value in values.items() if value.role == "input"}
        if wanted != set(inputs):
            raise UserError(
                f"rank {rank} was given the inputs {', '.join(sorted(inputs)) or 'none'}",
                expected=f"{', '.join(sorted(wanted)) or 'none'}, as schedule {schedule.name} declares them",
            )
        for name, tensor in given.items():
            if name not in values or (name not in inputs and values[name].role != "output"):
                raise UserError(f"rank {rank} was given a tensor for {name}", expected="the name of an output")
            if tensor.device.type != torch.device(device).type:
                raise UserError(f"{name} of rank {rank} is on {tensor.device}", expected=f"a tensor on {device}")
        slots: dict[str, int] = {}
        for value in values.values():
            slots[value.slot] = max(slots.get(value.slot, 0), math.prod(_shape(value)) * _DTYPES[value.dtype].itemsize)
        buffers = {
            slot: torch.empty(nbytes, dtype=torch.uint8, device=device) for slot, nbytes in slots.items() if slot
        }
        self.tensors: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            if name in given:
                self.tensors[name] = _fitting(given[name], value, rank, name in inputs)
                if value.slot:
                    buffers[value.slot] = _as_buffer(self.tensors[name], value, slots[value.slot])
        for name, value in values.items():
            shape, dtype = _shape(value), _DTYPES[value.dtype]
            if name in given:
                continue
            if value.slot:
                nbytes = math.prod(shape) * dtype.itemsize
                self.tensors[name] = buffers[value.slot][:nbytes].view(dtype).view(shape)
            else:
                self.tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        self.outputs = {name: self.tensors[name] for name, value in values.items() if value.role == "output"}

    def rows(self, part: Slice) -> torch.Tensor:
        """A view of the slice's rows."""
        return self.tensors[part.value][part.start : part.stop]

    def views(self, parts: tuple[Slice, ...]) -> list[torch.Tensor]:
        return [self.rows(part) for part in parts]

    def poison(self, names: tuple[Slice, ...]) -> None:
        """Fill slices with values that no right result contains (NaN, or a pattern for integers)."""
        for part in names:
            rows = self.rows(part)
            rows.fill_(math.nan if rows.is_floating_point() else (True if rows.dtype == torch.bool else 85))


def _shape(value: Value) -> tuple[int, ...]:
    value.row_bytes  # noqa: B018  raises the error that names the symbols
    return tuple(int(dim) for dim in value.shape) if value.dtype != "token" else (value.rows,)


def _fitting(tensor: torch.Tensor, value: Value, rank: int, is_input: bool) -> torch.Tensor:
    if tuple(tensor.shape) != _shape(value) or tensor.dtype != _DTYPES[value.dtype]:
        raise UserError(
            f"{value.role} {value.name} of rank {rank} is {tensor.dtype}{list(tensor.shape)}",
            expected=f"torch.{value.dtype}{list(_shape(value))}, as the schedule declares it",
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
