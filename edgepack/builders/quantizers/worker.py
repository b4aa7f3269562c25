"""The process of its own in which a quantizer runs: `python -m edgepack.builders.quantizers.worker MODULE JOB`."""

from __future__ import annotations

import importlib
import sys
from typing import cast

from edgepack.builders import child
from edgepack.builders.quantizers import Quantizer, from_json


def quantize(module: str, job: str) -> None:
    cast(Quantizer, importlib.import_module(module)).quantize(from_json(job))


if __name__ == "__main__":
    child.main(quantize, sys.argv[1:])
