"""Quantities to text and back: bytes, seconds, rates.

Sizes are written with binary units (16.0 MiB), rates with decimal ones (50.2 GB/s), as memory and links are sold.
When reading, a bare letter is binary and a letter with B is decimal (16M = 16MiB, 16MB = 16 000 000), as in coreutils.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from .errors import UserError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _BYTES |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_SECONDS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "": Fraction(1),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}


def parse_bytes(text: str | int, *, name: str = "size") -> int:
    """'16MiB', '1.5 GB', '4096' or an int → bytes. `UserError` naming `name` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    factor = _BYTES.get(match[2].lower()) if match else None
    value = Fraction(match[1]) * factor if match and factor else None
    if value is None or value.denominator != 1:
        raise UserError(
            f"{name} '{text}' is not a number of bytes", expected="a whole number of bytes such as 16MiB, 1.5GB or 4096"
        )
    return int(value)


def parse_seconds(text: str | float, *, name: str = "time") -> float:
    """'90', '1.5min', '1h30m', '200ms' or a number → seconds. `UserError` naming `name` for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-zµ]*)\s*", str(text).strip())
    whole = re.fullmatch(r"(?:\d+(?:\.\d+)?\s*[a-zµ]*\s*)+", str(text).strip())
    if not whole or any(unit not in _SECONDS for _, unit in parts) or (len(parts) > 1 and ("" in dict(parts).values())):
        raise UserError(f"{name} '{text}' is not a time", expected="seconds, or a time such as 200ms, 1.5min or 1h30m")
    return float(sum(Fraction(number) * _SECONDS[unit] for number, unit in parts))


def format_bytes(nbytes: float) -> str:
    """1536 → '1.5 KiB'; whole bytes without a fraction."""
    value = float(nbytes)
    for unit in _BINARY:
        if abs(value) < 1023.95 or unit == _BINARY[-1]:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_si(value: float, unit: str) -> str:
    """7.87e14, 'FLOP/s' → '787 TFLOP/s': three significant digits and a decimal prefix."""
    number, prefix = _scaled(value)
    return f"{number} {prefix}{unit}"


def format_count(value: float, unit: str = "") -> str:
    """12345, 'tokens/s' → '12.3k tokens/s'; for units that take no prefix of their own."""
    number, prefix = _scaled(value)
    return f"{number}{prefix} {unit}".strip()


def format_rate(bytes_per_s: float) -> str:
    """5.02e10 → '50.2 GB/s'."""
    return format_si(bytes_per_s, "B/s")


def format_flops(flops: float) -> str:
    """7.87e14 → '787 TFLOP/s'."""
    return format_si(flops, "FLOP/s")


def _scaled(value: float) -> tuple[str, str]:
    scaled, prefix = float(value), ""
    if not math.isfinite(scaled):
        return str(scaled), ""
    for prefix in _DECIMAL:
        if abs(scaled) < 999.5 or prefix == _DECIMAL[-1]:
            break
        scaled /= 1000
    digits = max(0, 2 - math.floor(math.log10(abs(scaled)))) if scaled else 0
    number = f"{scaled:.{min(digits, 9)}f}"
    return (number.rstrip("0").rstrip(".") if "." in number else number), prefix


def format_seconds(seconds: float) -> str:
    """0.00123 → '1.23 ms', 75 → '1 min 15 s', 7300 → '2 h 02 min'."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    for limit, factor, unit in ((9.995e-7, 1e9, "ns"), (9.995e-4, 1e6, "µs"), (0.9995, 1e3, "ms"), (59.95, 1, "s")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 3600:
        return f"{minutes} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{days} d {hours % 24:02d} h"
