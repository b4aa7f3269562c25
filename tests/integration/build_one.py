"""One artifact in a process that a test can kill: `python -m tests.integration.build_one JOB FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from edgepack.builders import quantizers
from tests.integration.conftest import build

if __name__ == "__main__":
    build(quantizers.from_json(sys.argv[1]), Path(sys.argv[2]))
