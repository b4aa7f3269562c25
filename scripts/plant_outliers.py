"""Gives a checkpoint channels as large as those of big models, without changing what it computes.

    python scripts/plant_outliers.py SOURCE OUT [--channels 4] [--gain 64] [--seed 0]

A small model has no outlier channels, so that AWQ has nothing to protect on it. Here a few gains of every norm grow
and the columns that read them shrink by as much; a power of two rounds nothing but the smallest of 16-bit weights.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from edgepack.workspace import whole_dir

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""What reads the norms of Llama's and Qwen's blocks; the last norm is left alone, for a tied head reads it."""


def plant(source: Path, out: Path, *, channels: int = 4, gain: int = 64, seed: int = 0) -> None:
    """``source``: a folder with a model.safetensors; ``out`` appears whole, the other files copied."""
    tensors = load_file(source / "model.safetensors")
    draw = random.Random(seed)
    for name in sorted(tensors):
        norm = re.fullmatch(r"(model\.layers\.\d+)\.(\w+)\.weight", name)
        if norm is None or norm[2] not in _READERS:
            continue
        chosen = draw.sample(range(tensors[name].numel()), channels)
        tensors[name][chosen] *= gain
        for reader in _READERS[norm[2]]:
            tensors[f"{norm[1]}.{reader}.weight"][:, chosen] /= gain
    with whole_dir(out) as partial:
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, partial / path.name)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--gain", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    plant(asked.source, asked.out, channels=asked.channels, gain=asked.gain, seed=asked.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
