"""The team that a process group keeps: made when the group is first used, and closed with all others.

All of the layers and functions of this folder take a group, its name, or a `Team`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dist.errors import UserError
from .overlap_team import Team

_teams: dict[tuple[str, str], Team] = {}
_last: list[tuple[Any, bool, Any, Team]] = []  # what `team_for` was asked for last: group, on a GPU, all ranks' group


def team_of(group: Team | dist.ProcessGroup | str | None, device: torch.device | str = "cpu") -> Team:
    """The team of a process group, of its name, or of all ranks (None); collective when it is first asked for.

    It is kept until `close_teams`. A Team is returned as it is.
    """
    if isinstance(group, Team):
        return group
    if not dist.is_initialized():
        raise UserError(
            "there is no process group",
            expected="torchrun --nproc-per-node N program.py, and dist.init_process_group() in the program",
            remedy="on one process a plain matrix product does all of it",
        )
    real = dist.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group or dist.group.WORLD  # type: ignore[arg-type]
    kind = (torch.device(device) if isinstance(device, str) else device).type
    for team in _teams.values():  # few, and found sooner than by the group's name
        if team.group is real and team.device.type == kind:
            return team
    assert real is not None
    found = _teams[real.group_name, kind] = Team(real, device=device)
    return found


def team_for(group: Team | dist.ProcessGroup | str | None, a: Tensor) -> Team:
    """`team_of` the device of `a`; in a tenth of its time where the last call asked for the same, because a GPU waits
    for a short product's host."""
    if type(group) is Team:
        return group
    for asked, on_gpu, everyone, team in _last:
        if asked is group and on_gpu is a.is_cuda and everyone is dist.distributed_c10d.GroupMember.WORLD:
            return team
    team = team_of(group, a.device)
    _last[:] = [(group, a.is_cuda, dist.distributed_c10d.GroupMember.WORLD, team)]
    return team


def close_teams() -> None:
    """Close what `team_of` keeps; collective. Call it before the process groups are destroyed."""
    _last.clear()
    while _teams:
        _teams.pop(next(iter(_teams))).close()
