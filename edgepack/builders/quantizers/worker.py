"""The process of its own in which a quantizer runs: `python -m edgepack.builders.quantizers.worker MODULE JOB`."""

from __future__ import annotations

import importlib
import sys
from typing import cast

from edgepack.builders.quantize import end_with_parent
from edgepack.builders.quantizers import Quantizer, from_json


def main(module: str, job: str) -> None:
    end_with_parent()
    cast(Quantizer, importlib.import_module(module)).quantize(from_json(job))


if __name__ == "__main__":
    main(*sys.argv[1:])
