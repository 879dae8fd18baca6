"""Pages and plots from what the mpi_gpu_* programs write: `python -m undertow.benchmarks.mpi_gpu_pages FILE.json … `.

Each program writes its JSON after every cell, so that a run cut short leaves what it had; this room turns such a file
into the house's `Report` (a table of every arm in every case, a plot) and puts the goals of the device side above it:
what was wanted, what was measured, and whether that is enough. It needs no GPU, and no matplotlib where only the page
is wanted. What one copy per block takes stands for the ratios that the TEMPI paper's abstract gives (242,000 for
MPI_Pack, 59,000 for MPI_Send, 917 for a halo exchange): they say how slow the rival is more than how fast a pack is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from undertow.benchmarks import facts, plot
from undertow.benchmarks.intervals import Interval, median_interval, ratio_interval
from undertow.benchmarks.report import Report, Row, markdown_table
from undertow.dist.errors import MissingPackage

MIB = 1 << 20
ENOUGH = 0.85  # of a copy's rate
BEHIND = 0.95  # a cell is lost when the whole interval of rival / ours lies below
Goal = tuple[str, str, str]  # wanted, measured, whether that is enough


def begun(benchmark: str, start: str, rounds: int, remarks: Sequence[str] = ()) -> dict[str, Any]:
    """What `save` and `write` take, without rows yet; `start` are the words before `python -m …`."""
    command = f"{start}python -m undertow.benchmarks.{benchmark}"
    found = facts.facts(("mpi4py", "cupy-cuda13x", "cupy-cuda12x"))
    data: dict[str, Any] = {"benchmark": benchmark, "command": command, "rounds": rounds, "facts": found}
    return {**data, "remarks": list(remarks), "rows": []}


def save(data: dict[str, Any], path: Path) -> None:
    """The JSON of a run so far, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(data) + "\n")
    scratch.replace(path)


def rows_of(
    case: str, group: str, x: float | None, nbytes: int, samples: Mapping[str, Sequence[float]], roles: dict[str, str],
    wrong: dict[str, int], extras: dict[str, dict[str, float]] | None = None,
) -> list[Row]:  # fmt: skip
    """The arms of one case from their samples in seconds, taken round by round; `roles` names those to be shown.

    The ratio is that of the arm whose role is 'plain'; 'again' is compared with 'ours', whose second run it is.
    """
    ours = next((name for name, role in roles.items() if role == "ours"), "")
    plain = next((name for name, role in roles.items() if role == "plain" and name in samples), "")
    hardware = next((samples[name] for name, role in roles.items() if role == "hardware" and name in samples), None)
    rate = nbytes / median_interval(hardware).median if hardware else None
    made = []
    for name, role in roles.items():
        if name not in samples:
            continue
        base = samples.get(ours if role == "again" else plain)
        bad = wrong.get(name, 0)
        made.append(
            Row(
                case,
                "ours (A/A)" if role == "again" else name,
                role,
                nbytes,
                group,
                x,
                bad,
                None if bad else median_interval(samples[name]),
                ratio_interval(base, samples[name]) if base and not bad and role != "plain" else None,
                hardware_bytes_per_s=rate,
                extras=(extras or {}).get(name, {}),
                samples_s=tuple(samples[name]),
            )  # fmt: skip
        )
    return made


def pack_rows(row: dict[str, Any]) -> list[Row]:
    roles = {"torch": "plain", "ours": "ours", "again": "again", "copy": "hardware"}
    roles |= dict.fromkeys(("memcpy", "cupy", "paper"), "rival")
    line = row["name"].startswith("1-D")
    group = (
        f"{row['way']} of {size_text(row['size'])} in blocks" if line else f"{row['way']}: faces, transposes, tables"
    )
    case = f"{row['way']} {row['name']}, {size_text(row['size'])}"
    wrong = dict.fromkeys(row["wrong"], 1)
    made = rows_of(case, group, row["block"] if line else None, row["size"], row["samples"], roles, wrong)
    waits = {"torch": "plain", "ours": "ours", "one copy per block": "rival", "launch floor": "hardware"}
    blocks = {"blocks": float(row["blocks"]), "blocks timed": float(row["blocks timed"])}
    extras = {"one copy per block": blocks} if row["blocks timed"] else {}
    title = f"{case}, one call that waits"
    return made + rows_of(title, f"one {row['way']} that waits", None, row["size"], row["waits"], waits, wrong, extras)


def exchange_rows(row: dict[str, Any]) -> list[Row]:
    """A case of mpi_gpu_messages or mpi_gpu_collectives."""
    roles = {"by hand": "plain", "auto": "ours", "again": "again"}
    roles |= dict.fromkeys(("direct", "staged", "ipc", "kernels", "per block"), "rival")
    kind = row["name"].split()[0]
    group = f"{kind} B blocks" if kind.isdigit() else kind
    samples = {way: [us * 1e-6 for us in taken] for way, taken in row["samples"].items()}
    extras = {"per block": {"blocks": float(row["blocks"])}}
    return rows_of(row["name"], group, float(row["size"]), row["size"], samples, roles, row["wrong"], extras)


def path_rows(cell: dict[str, Any]) -> list[Row]:
    """A cell of mpi_gpu_paths: what the model chooses, by its samples that the fit did not see."""
    roles = {"staged": "plain", "auto": "ours", "direct": "rival", "whole": "rival", "copy": "hardware"}
    made = []
    for way, chosen in cell["chosen"].items():
        samples = {
            how: [us * 1e-6 for us in cell["samples"][f"{way} {how}"][1::2]]
            for how in ("direct", "staged", "whole", "copy")
        }
        samples["auto"] = samples[chosen]
        group, case = f"{way}, {cell['block']} B blocks", f"{way}, {cell['block']} B, {size_text(cell['size'])}"
        made += rows_of(case, group, float(cell["size"]), cell["size"], samples, roles, {"auto": cell["wrong"]})
    return made


def size_text(nbytes: int) -> str:
    return f"{nbytes / MIB:g} MiB" if nbytes >= MIB else f"{nbytes / 1024:g} KiB"


def name_of(row: dict[str, Any]) -> str:
    return f"{row['way']} {row['name']}, {size_text(row['size'])}"


def memory_rate(rows: Sequence[dict[str, Any]]) -> float:
    """Bytes per second, read and written, of the largest copy of the run; 0 when all of them fit in the cache."""
    large = [row for row in rows if "cache" in row and 2 * row["size"] > 2 * row["cache"]]
    return max((2 * row["size"] / _median(row, "copy") for row in large), default=0.0)


def most(row: dict[str, Any], rate: float, unbound: float = math.inf) -> float:
    """The share of the rate of a copy of its size that the memory allows a pack; `unbound` where the cache may hold it.

    A row holds the least bytes that the memory must move (mpi_gpu_bound) and what the layout takes of the cache.
    """
    if not rate or "moved" not in row or row["cache bytes"] <= row["cache"]:
        return unbound
    return min(unbound, _median(row, "copy") / (sum(row["moved"]) / rate))


def pack_goals(rows: list[dict[str, Any]]) -> list[Goal]:
    goals = []
    rate = memory_rate(rows)
    shares = [
        (_median(row, "copy") / _median(row, "ours"), most(row, rate), name_of(row))
        for row in rows
        if row["block"] >= 32 and row["size"] >= 16 * MIB and row["name"].startswith(("1-D", "3-D", "4-D"))
    ]
    if shares:
        met = sum(share >= ENOUGH for share, *_ in shares)
        least, _, name = min(shares)
        beyond = [f"{name}: {share:.0%} of at most {limit:.0%}" for share, limit, name in shares if limit < ENOUGH]
        said = f"; the memory allows no more in {len(beyond)} of the others ({'; '.join(beyond)})" if beyond else ""
        goals.append(
            ("85 % of the rate of a device copy, blocks of 32 B and more, 16 MiB and more",
             f"{met} of {len(shares)} cells; least {least:.0%} ({name}){said}", _met(met == len(shares)))
        )  # fmt: skip
    found = [(row, *_fastest(row)) for row in rows if _fastest(row)[0]]
    lost = [(ratio.median, f"{name_of(row)}: {name}") for row, name, ratio in found if ratio.high < BEHIND]
    worst = f"; the most {min(lost)[0]:.2f} ({min(lost)[1]})" if lost else ""
    goals.append(
        ("no cell in which a rival's whole interval is more than 5 % ahead",
         f"{len(lost)} of {len(found)} cells{worst}", _met(not lost))
    )  # fmt: skip
    small = [row for row in rows if row["block"] <= 64 and "paper" in row["samples"]]
    if small:
        paper = [_ratio(row, "paper").median for row in small]
        bound = [_median(row, "paper") / _median(row, "copy") * most(row, rate, 1.0) for row in small]
        reachable = sum(ratio >= 1.3 for ratio in bound)
        said = f"; at the bound of memory, or of a copy, {_mean(bound):.2f}, and 1.3 in {reachable}" if rate else ""
        goals.append(
            ("1.3 times the paper's scheme, blocks of 4 to 64 B",
             f"geometric mean {_mean(paper):.2f}, {min(paper):.2f} to {max(paper):.2f} in {len(paper)} cells{said}",
             _met(min(paper) >= 1.3))
        )  # fmt: skip
    floors = [
        row for row in rows if row["size"] <= 64 * 1024 and "launch floor" in row["waits"] and "waits apart" in row
    ]
    if floors:
        over = [1e6 * (_of(row["waits"]["ours"]) - _of(row["waits"]["launch floor"])) for row in floors]
        goals.append(
            ("(none) a call that waits, up to 64 KiB, beside an empty kernel that Python starts and waits for",
             f"{min(over):+.1f} to {max(over):+.1f} us", "")
        )  # fmt: skip
    goals.append(_per_block(
        "MPI_Pack: one copy per block / ours, each call waited for (paper: up to 242,000)",
        [(ratio_interval(row["waits"]["one copy per block"], row["waits"]["ours"]).median,
          f"{row['way']} {row['name']}, {size_text(row['size'])}, {row['blocks']:,} blocks")
         for row in rows if "one copy per block" in row["waits"]],
    ))  # fmt: skip
    return goals


def exchange_goals(rows: list[dict[str, Any]]) -> list[Goal]:
    halos = [row for row in rows if row["name"].startswith("halo")]
    others = [row for row in rows if not row["name"].startswith(("halo", "contiguous"))]
    goals = []
    for name, group, paper in (("halo exchange", halos, "917"), ("other exchanges", others, "59,000 for MPI_Send")):
        some = [(_median(row, "per block") / _median(row, "auto"), f"{row['name']}, {row['blocks']:,} blocks")
                for row in group if "per block" in row["samples"]]  # fmt: skip
        if some:
            goals.append(_per_block(f"{name}: one copy per block / ours (paper: up to {paper})", some))
    for way, words in (("by hand", "torch's copies"), ("kernels", "kernels of one's own")):
        hand = [(ratio_interval(row["samples"][way], row["samples"]["auto"]), row["name"]) for row in rows
                if way in row["samples"]]  # fmt: skip
        if not hand:
            continue
        lost = [name for ratio, name in hand if ratio.high < BEHIND]
        ratios = [ratio.median for ratio, _ in hand]
        goals.append(
            (f"not behind packing by {words} and staging by more than 5 %",
             f"by hand / ours {min(ratios):.2f} to {max(ratios):.2f}, geometric mean {_mean(ratios):.2f}; "
             f"lost: {', '.join(lost) or 'none'}", _met(not lost))
        )  # fmt: skip
    return goals


def _per_block(what: str, found: list[tuple[float, str]]) -> Goal:
    if not found:
        return (f"(none) {what}", "not measured", "")
    return (f"(none) {what}", f"{min(found)[0]:,.0f} to {max(found)[0]:,.0f} ({max(found)[1]})", "")


def _fastest(row: dict[str, Any]) -> tuple[str, Interval]:
    names = [name for name in ("memcpy", "torch", "cupy", "paper") if name in row["samples"]]
    best = min(names, key=lambda name: _median(row, name), default="")
    return best, _ratio(row, best) if best else Interval(math.nan, math.nan, math.nan)


def _ratio(row: dict[str, Any], rival: str) -> Interval:
    return ratio_interval(row["samples"][rival], row["samples"]["ours"])


def _median(row: dict[str, Any], arm: str) -> float:
    return _of(row["samples"][arm])


def _of(samples: Sequence[float]) -> float:
    return median_interval(samples).median


def _mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def _met(yes: bool) -> str:
    return "yes" if yes else "no"


# What each program's file is about: the claim, the rows of a cell, the groups to be drawn first, the goals.
KINDS: dict[str, tuple[str, Callable[[dict], list[Row]], tuple[str, ...], Callable[[list], list[Goal]]]] = {
    "mpi_gpu_pack": (
        "packing datatypes on a GPU", pack_rows,
        (
            "pack of 16 MiB in blocks", "unpack of 16 MiB in blocks", "pack of 256 MiB in blocks",
            "pack of 64 KiB in blocks",
        ),
        pack_goals,
    ),
    "mpi_gpu_messages": (
        "messages of device buffers between two ranks", exchange_rows,
        ("halo", "8 B blocks", "512 B blocks", "contiguous"), exchange_goals,
    ),
    "mpi_gpu_collectives": (
        "collectives on device buffers", exchange_rows, ("halo", "pencil", "transpose"), exchange_goals,
    ),
    "mpi_gpu_paths": (
        "device memory to a pinned slab and back", path_rows,
        ("to host, 4 B blocks", "to host, 256 B blocks", "from host, 4 B blocks", "from host, 256 B blocks"),
        lambda _: [],
    ),
}  # fmt: skip


def report(data: dict[str, Any]) -> Report:
    """`data` as a program wrote it: benchmark, command, facts, rounds, rows."""
    claim, rows_from, first, _ = KINDS[data["benchmark"]]
    rows = [row for cell in data["rows"] for row in rows_from(cell)]
    order = {group: place for place, group in enumerate(first)}
    rows.sort(key=lambda row: order.get(row.group, len(order)))
    label = "bytes of a block" if data["benchmark"] == "mpi_gpu_pack" else "bytes of a message"
    return Report(data["benchmark"], claim, data["command"], 0, data["rounds"], data["facts"], label, tuple(rows))


def page(data: dict[str, Any], picture: str = "") -> str:
    """The report's Markdown with the goals, and the program's own remarks, at its head."""
    goals = KINDS[data["benchmark"]][3](data["rows"]) if data["rows"] else []
    table = [*markdown_table(("goal", "measured", "met"), goals), ""] if goals else []
    remarks = [f"- {remark}" for remark in data.get("remarks", ())]
    head, rest = report(data).markdown(picture).split("\n\n", 1)
    return "\n".join([head, "", *table, *remarks, *([""] if remarks else []), rest])


def write(data: dict[str, Any], path: Path) -> list[Path]:
    """FILE.md, and FILE.png where matplotlib is at hand, beside the JSON at `path`."""
    picture, whole = path.with_suffix(".png"), report(data)
    try:
        drawn = [plot.draw(whole, picture)]
    except MissingPackage as error:
        sys.stderr.write(f"{path.stem}: no plot ({error})\n")
        drawn = []
    path.with_suffix(".md").write_text(page(data, picture.name if drawn else ""))
    return [path.with_suffix(".md"), *drawn]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of mpi_gpu_pack, _messages, _collectives, _paths")
    for path in parser.parse_args(argv).files:
        for made in write(json.loads(path.read_text()), path):
            sys.stdout.write(f"{made}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
