"""Compressed-tensors checkpoints (integers and FP8) by llmcompressor, as vLLM reads them."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stderr
from typing import Any

from edgepack import layouts
from edgepack.builders.quantizers import Job, copy_tokenizer, float_type, read_windows
from edgepack.builders.quantizers.listen import Listener

FAMILIES: tuple[layouts.Family, ...] = ("ct", "fp8")
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
EXTRA = "quant"
ENVIRONMENT: dict[str, str] = {}

_RECIPE = "recipe.yaml"
"""Written beside the weights; no runtime reads it, and what it says is in config.json."""
_LAYER = re.compile(r"\((\d+)/(\d+)\): Propagating")


def calibrates(scheme: layouts.Scheme) -> bool:
    """GPTQ's rounding at 4 bits. At 8 it brings nothing to be measured: on the built-in model KL 4.7e-5 to 4.6e-5 of
    plain rounding, 4.9e-4 to 4.7e-4 with 8-bit activations."""
    return scheme.bits == 4


def quantize(job: Job) -> None:
    """Writes the checkpoint into ``job.out``: matrices of the blocks quantized, all else in the source's 16 bits.

    Integers are symmetric; activations of 8 bits get their scale token by token while the model runs. With GPTQ
    the model is calibrated layer by layer; columns go in the order of their activations, which costs nothing when
    the model runs ("weight"). A GPU rounds otherwise than a CPU in the last bits; on one machine bytes are the same.

    At its peak the process takes 2.7 times the bytes of the 16-bit checkpoint with GPTQ (the model, and the Hessians of
    one layer) and 0.8 without, beside the pages of its file (from models of 27 and 123 million parameters): 38 and
    12 GiB for 7 billion parameters.
    """
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    scheme = layouts.parse(job.scheme)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.source, dtype=float_type(job.source), local_files_only=True
    )
    with redirect_stderr(Listener(sys.stderr, {_LAYER: lambda layer, layers: 100 * layer // layers})):
        oneshot(model=model, recipe=_modifier(scheme), **_calibration(job, scheme))
    model.save_pretrained(job.out, save_compressed=True)
    (job.out / _RECIPE).unlink()
    copy_tokenizer(job)


def _modifier(scheme: layouts.Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    kind = "float" if scheme.family == "fp8" else "int"
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type=kind,
        symmetric=True,
        strategy="group" if scheme.group else "channel",
        group_size=scheme.group,
        actorder="weight" if calibrates(scheme) else None,
    )
    activations = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    group = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=activations if scheme.activations == 8 else None,
    )
    modifier = GPTQModifier if calibrates(scheme) else QuantizationModifier
    return modifier(config_groups={"group_0": group}, ignore=["lm_head"])


def _calibration(job: Job, scheme: layouts.Scheme) -> dict[str, Any]:
    """The windows in their order: the library would shuffle them without a seed."""
    if not calibrates(scheme):
        return {}
    from datasets import Dataset

    windows = read_windows(job)
    rows = {"input_ids": windows.tolist(), "attention_mask": [[1] * len(row) for row in windows]}
    return {
        "dataset": Dataset.from_dict(rows),
        "num_calibration_samples": len(windows),
        "max_seq_length": windows.shape[1],
        "shuffle_calibration_samples": False,
    }
