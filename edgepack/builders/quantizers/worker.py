"""The process of its own in which a quantizer runs: `python -m edgepack.builders.quantizers.worker MODULE JOB`."""

from __future__ import annotations

import importlib
import json
import sys
from typing import cast

from edgepack.builders.quantize import end_with_parent
from edgepack.builders.quantizers import REFUSED, Quantizer, from_json
from edgepack.errors import EdgepackError


def main(module: str, job: str) -> None:
    end_with_parent()
    try:
        cast(Quantizer, importlib.import_module(module)).quantize(from_json(job))
    except EdgepackError as error:
        sys.stdout.write(f"\n{REFUSED}{json.dumps([type(error).__name__, error.message, error.hint])}\n")
        sys.stdout.flush()
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main(*sys.argv[1:])
