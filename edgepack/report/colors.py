"""The report's colors, for light and dark, on the page and in its drawings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Color = Literal["p1", "p2", "p3", "p4", "p5", "p6"]

COLORS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#57606a", "#a5adb8"),
    "line": ("#d3d8de", "#3a414a"),
    "paper": ("#ffffff", "#15181c"),
    "accent": ("#b3360b", "#ff9b73"),
    "p1": ("#0b5fa5", "#63b0f0"),
    "p2": ("#0b7a5c", "#4fc79f"),
    "p3": ("#a05a00", "#eab04a"),
    "p4": ("#8a3a86", "#d796d3"),
    "p5": ("#5b6470", "#98a2ae"),
    "p6": ("#3f8f9c", "#86d4de"),
}
"""Name -> light and dark; hues after Okabe and Ito 2008, told apart by color-blind people too, at 4.5:1 and more on
their paper."""
PARTS: Mapping[str, Color] = {
    "weights": "p1",
    "host_copy": "p6",
    "kv_cache": "p2",
    "recurrent_state": "p2",
    "compute": "p3",
    "output": "p4",
    "rope_cache": "p4",
    "graphs": "p4",
    "workspace": "p3",
    "process": "p5",
}
"""Part of memory -> its color."""


def variables() -> str:
    """CSS that gives the colors, for light and dark; print is always light."""
    light = ";".join(f"--{name}:{values[0]}" for name, values in COLORS.items())
    dark = ";".join(f"--{name}:{values[1]}" for name, values in COLORS.items())
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
