"""The agent that a device is enrolled with: one file that its Python runs, the same bytes wherever it is made."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

DEVICE = Path(__file__).parent / "device"
_MAIN = """\
import sys
from edgepack.device.installer import main
sys.exit(main())
"""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip can say."""


def zipapp() -> bytes:
    """agent.pyz: `python3 agent.pyz …` on any Python from 3.8 on (edgepack/device/installer.py)."""
    members = {
        "__main__.py": _MAIN,
        "edgepack/__init__.py": "",
        "edgepack/device/__init__.py": "",
        "edgepack/device/agent.py": (DEVICE / "agent.py").read_text(encoding="utf-8"),
        "edgepack/device/installer.py": (DEVICE / "installer.py").read_text(encoding="utf-8"),
    }
    out = io.BytesIO()
    out.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as archive:
        for name, text in members.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, text.encode("utf-8"))
    return out.getvalue()
