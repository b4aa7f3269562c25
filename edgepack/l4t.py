"""Which CUDA and Ubuntu a Jetson's L4T has; JetPack is only its label, since published tables disagree on it.

Source: jtop/core/jetson_variables.py in github:rbonghi/jetson_stats@f41d5ca (JetPack names) and
jetson_containers/l4t_version.py in github:dusty-nv/jetson-containers@dd206bf (CUDA).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

JETPACK: Mapping[str, str] = {
    "39.2.0": "7.2",
    "39.0.0": "7.2 EA",
    "38.4.0": "7.1",
    "38.2": "7.0",
    "36.5.0": "6.2.2",
    "36.4.7": "6.2.1",
    "36.4.4": "6.2.1",
    "36.4.3": "6.2",
    "36.4.0": "6.1",
    "36.3.0": "6.0",
    "35.6.4": "5.1.6",
    "35.4.1": "5.1.2",
    "32.7.6": "4.6.6",
}
"""Releases whose JetPack was read in a table. jetson-containers calls 36.5.0 6.2.1, and some forks 38.4.0 7.2."""

CUDA: Mapping[str, str] = {
    "39": "13.2",
    "38": "13.0",
    "36.5": "12.6",
    "36.4": "12.6",
    "36.3": "12.4",
    "36.2": "12.2",
    "35": "11.4",
}
"""By major, or by major and minor where a major had several."""

UBUNTU: Mapping[str, str] = {"39": "24.04", "38": "24.04", "36": "22.04", "35": "20.04"}
"""By major; r38's is that of JetPack 7 as a whole."""


def release(text: str) -> str | None:
    """The release in /etc/nv_tegra_release, as "36.4.7"; None when the text does not say one."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return ".".join(found.groups()) if found else None


def jetpack(version: str) -> str | None:
    """JetPack's name of a release; None for one that no table lists, rather than its neighbor's."""
    return JETPACK.get(version) or JETPACK.get(version.removesuffix(".0"))


def cuda(version: str) -> str | None:
    """The CUDA toolkit that a release ships; None for one that the table does not know."""
    return _by_prefix(CUDA, version)


def ubuntu(version: str) -> str | None:
    """The Ubuntu that a release is made of; None for one that the table does not know."""
    return _by_prefix(UBUNTU, version)


def name(version: str) -> str:
    """One line for people: "L4T r36.4.7 (JetPack 6.2.1)"."""
    label = jetpack(version)
    return f"L4T r{version}" + (f" (JetPack {label})" if label else "")


def _by_prefix(table: Mapping[str, str], version: str) -> str | None:
    parts = version.split(".")
    keys = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((table[key] for key in keys if key in table), None)
