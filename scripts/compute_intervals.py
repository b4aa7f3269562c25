"""Refits the intervals of compute buffers whose graph is not modelled (runtimes/llama_cpp.py, OTHER_GRAPHS).

For every shape of tests/shapes.py that is planned for only: contexts that llama.cpp reserves without allocating them,
their compute buffer over that of a plain decoder of the same sizes, and the extremes per architecture. Needs the
toolchain, and runs in a checkout: ``python -m scripts.compute_intervals [DRAWS]``.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
from pathlib import Path

from edgepack.errors import Unsupported
from edgepack.runtimes import llama_cpp
from edgepack.units import MIB
from tests.integration.test_memory_oracle import CHOICES, Oracle, drawn_from
from tests.shapes import PLANNED, spec, write_gguf

MARGIN = 0.08
"""Beyond the extremes that were drawn, then outward to the next twentieth."""


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    wanted_names = sys.argv[2:]
    found: dict[str, list[float]] = {}
    with Oracle() as oracle, tempfile.TemporaryDirectory() as folder:
        for name in PLANNED:
            if wanted_names and name not in wanted_names:
                continue
            model = spec(name)
            if model.architecture in llama_cpp.EXACT_GRAPHS:
                continue
            path = write_gguf(Path(folder) / "f16.gguf", model, "F16")
            params = oracle.llama.llama_model_default_params()
            params.no_alloc, params.load_mode = True, 0
            loaded = oracle.llama.llama_model_load_from_file(os.fsencode(path), params)
            ratios = []
            for wanted in drawn_from(CHOICES, random.Random(f"{name} again"), draws):
                try:
                    llama_cpp.kv_bytes(model, wanted)
                except Unsupported:
                    continue
                theirs = oracle.buffers(loaded, wanted)
                if theirs is None:
                    raise SystemExit(f"llama.cpp refuses {name} with {wanted}")
                plain = llama_cpp.compute(model, wanted, "cpu").device
                moved = llama_cpp.moved_bytes(model, wanted)
                ratios += [theirs[1] * MIB / plain, max(0.0, theirs[1] * MIB - moved) / plain]
            oracle.llama.llama_model_free(loaded)
            low, high = min(ratios[::2]), max(ratios[1::2])
            print(f"{name:40} {model.architecture:16} {low:6.3f} {high:6.3f}", flush=True)
            found.setdefault(model.architecture, []).extend((low, high))
    for architecture, extremes in sorted(found.items()):
        low = math.floor(20 * (1 - MARGIN) * min(extremes)) / 20
        high = math.ceil(20 * (1 + MARGIN) * max(extremes)) / 20
        print(f'    "{architecture}": ({low:g}, {high:g}),')


if __name__ == "__main__":
    main()
