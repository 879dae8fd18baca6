"""What carries the pieces of overlapped products between GPUs, and what the environment says of it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from ..comms.cuda_messengers import CudaMessenger, NcclMessenger
from ..comms.overlap_cuda import END
from ..comms.symmetric_messenger import SymmetricMessenger, why_not
from ..dist.errors import UserError
from ..dist.log import get_logger

log = get_logger(__name__)
TRANSPORTS = ("auto", "symmetric", "nccl")


def gpu_messenger(
    group: dist.ProcessGroup | None, device: torch.device, timeout_s: float, transport: str
) -> CudaMessenger:
    """What carries pieces between the GPUs of `group`; collective. `UserError` where `transport` cannot."""
    if transport == "auto":
        transport = os.environ.get("UNDERTOW_OVERLAP_TRANSPORT", "auto")
    if transport not in TRANSPORTS:
        raise UserError(f"overlap transport {transport!r}", expected=f"one of {', '.join(TRANSPORTS)}")
    if transport != "nccl" and dist.get_world_size(group) > 1:
        if not (reason := why_not(group, device)):
            return SymmetricMessenger(group, device)
        if transport == "symmetric":
            raise UserError(f"overlap transport 'symmetric': {reason}", remedy="'auto' or 'nccl'")
        log.info("pieces of products are sent by NCCL: %s", reason)
    return NcclMessenger(group, device, END * timeout_s)


def may_replay() -> bool:
    """Whether the environment lets calls be recorded as CUDA graphs: UNDERTOW_OVERLAP_REPLAY=0 forbids it."""
    return os.environ.get("UNDERTOW_OVERLAP_REPLAY") != "0"
