"""ONNX models for onnxruntime-genai by its own builder: a graph for CPUs or for CUDA, built without a GPU."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from edgepack import layouts, modelspec
from edgepack.builders.quantizers import Job
from edgepack.builders.quantizers.listen import Listener
from edgepack.errors import BadInput
from edgepack.modelspec import ModelSpec

FAMILIES: tuple[layouts.Family, ...] = ("onnx",)
PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers")
EXTRA = "onnx"
ENVIRONMENT: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": ""}
"""A GPU would quantize to other bytes than a CPU."""

_MIXED = "k_quant_mixed"
_PLAIN = "default"
"""Symmetric rounding to nearest by onnxruntime's own kernels; the builder's "rtn" came out worse on the model that
both were tried on (perplexity 28.91 to 28.82)."""


def calibrates(scheme: layouts.Scheme) -> bool:
    return False


def quantize(job: Job) -> None:
    """Writes model.onnx, model.onnx.data, genai_config.json and the tokenizer.

    search.max_length becomes the plan's context: it is what the cache is allocated for when a generator is made.
    Raises BadInput for a longer context than the model's.
    """
    scheme = layouts.parse(job.scheme)
    spec = modelspec.read(job.source)
    _require_context(spec, job.context)
    from onnxruntime_genai.models import builder

    precision, words = "fp16", []
    if scheme.group is not None:
        precision = f"int{scheme.bits}"
        words = [f"block_size={scheme.group}", f"algo_config={_MIXED if scheme.mixed else _PLAIN}"]
    source, out = str(job.source), str(job.out)
    steps = {
        re.compile(r"Reading layer (\d+)"): lambda layer: 50 * (layer + 1) // spec.layers,
        re.compile(r"Progress: \[[# ]*\] (\d+)"): lambda percent: 50 + percent // 2,
    }
    with tempfile.TemporaryDirectory() as cache, redirect_stdout(Listener(sys.stdout, steps)):
        options = builder.parse_extra_options("", source, out, precision, job.backend, cache, words)
        builder.create_model("", source, out, precision, job.backend, cache, **options)
    _set_length(job.out / "genai_config.json", job.context)


def _require_context(spec: ModelSpec, context: int) -> None:
    if context > spec.context_train:
        raise BadInput(
            f"a context of {context} is more than the {spec.context_train} positions of the model",
            hint="onnxruntime-genai refuses to start with such a max_length",
        )


def _set_length(path: Path, context: int) -> None:
    """The cache is as long as the plan says and grows in place; otherwise every step would allocate it anew."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"] |= {"max_length": context, "past_present_share_buffer": True}
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
