"""Rounds a checkpoint to nearest and writes it as GPTQ stores it, so that other quantizers have something to beat.

    python -m scripts.rtn SOURCE OUT --bits 3 [--group 128] [--asymmetric]

The same layout and the same matrices as edgepack's gptq schemes; transformers, gptqmodel and vLLM read it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from edgepack.workspace import whole_dir
from tests import quantizers_reference as reference

_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def write(source: Path, out: Path, *, bits: int, group: int | None, symmetric: bool) -> None:
    """``source``: a Hugging Face folder of 16-bit weights, of which norms, embeddings and head are kept."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in reference.tensors(source).items():
        module, _, part = name.rpartition(".")
        if part == "weight" and module.endswith("_proj"):
            matrix = reference.rtn(tensor.float(), bits, group, symmetric=symmetric)
            packed = reference.pack_gptq(matrix, bits)
            tensors |= {f"{module}.{inside}": words for inside, words in packed.items()}
        else:
            tensors[name] = tensor
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group or -1,
        "desc_act": False, "sym": symmetric, "lm_head": False,
    }  # fmt: skip
    with whole_dir(out) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), required=True)
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale; 0: the whole row")
    parser.add_argument("--asymmetric", action="store_true")
    asked = parser.parse_args(words)
    write(asked.source, asked.out, bits=asked.bits, group=asked.group or None, symmetric=not asked.asymmetric)


if __name__ == "__main__":
    main(sys.argv[1:])
