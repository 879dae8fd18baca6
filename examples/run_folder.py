"""The folder of a run: made once, by one rank, and gone on with only by a run of the same recipe, options and text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..dist.errors import UserError
from .recipes import TrainConfig


def prepare_folder(
    out: Path, config: TrainConfig, manifest: str, data: Path | None, how: dict[str, Any], *, resume: bool
) -> None:
    """Make the run's folder, or refuse one that holds another run. `manifest` names the text; `how` it runs (ranks,
    systems, device) may change when it is resumed, and the newest is kept."""
    what = {"config": asdict(config), "data": str(data or "standard library"), "text": manifest}
    now = json.loads(json.dumps(what | how))
    path = out / "config.json"
    try:
        if path.exists():
            before = json.loads(path.read_text())
            if not resume:
                raise UserError(f"{out} holds a run already", remedy="pass --resume to go on with it, or another --out")
            free = {"steps", "keep", "checkpoint_every", "eval_every", "eval_bytes", "log_every"}
            changed = [
                f"{key} {before['config'].get(key)} → {value}"
                for key, value in now["config"].items()
                if key not in free and before["config"].get(key, value) != value
            ]
            changed += [f"text {before.get('text')} → {manifest}"] if before.get("text") != manifest else []
            if changed:
                raise UserError(
                    f"{out} holds a run of another configuration ({', '.join(changed)})",
                    expected="the same recipe, options and text",
                    remedy="resume with those, or pass another --out",
                )
        elif out.exists() and any(out.iterdir()):
            raise UserError(f"{out} holds other files", expected="a new or empty folder", remedy="pass another --out")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2) + "\n")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot use the run folder {out} ({error})", remedy="pass another --out") from error
