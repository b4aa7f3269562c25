"""Byte counts that know how to be read and shown; GiB and GB never mix."""

from __future__ import annotations

import math
import re
from typing import NewType

from edgepack.errors import BadInput

Bytes = NewType("Bytes", int)

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SCALE = {
    "": 1,
    "B": 1,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1024**4,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")


def parse_bytes(text: str | int) -> Bytes:
    """Bytes of ``"2GiB"``, ``"750 MB"`` or a plain count; raises BadInput on anything else."""
    if isinstance(text, int):
        return Bytes(text)
    match = _SIZE.match(text)
    if match is None or match.group(2).upper() not in _SCALE:
        raise BadInput(
            f"size {text!r} is not a number with a unit",
            hint="write it like 2GiB, 750MiB or 4GB (GiB is 1024^3 bytes, GB is 10^9)",
        )
    return Bytes(round(float(match.group(1)) * _SCALE[match.group(2).upper()]))


def parse_share(text: str) -> float:
    """0.02 of ``"2%"`` or ``"0.02"``; raises BadInput on anything else, and on what is negative."""
    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf or (value > 1 and not percent):
        raise BadInput(f"{text!r} is no share", hint="write it like 2% or 0.02")
    return value


def show(count: int) -> str:
    """A count for people, in binary units: ``"1.46 GiB"``, ``"512.0 MiB"``, ``"17 B"``."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size >= GIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.1f} KiB"
    return f"{sign}{size} B"


def pad(count: int, to: int) -> int:
    """The next multiple of ``to`` that is at least ``count``."""
    return -(-count // to) * to
