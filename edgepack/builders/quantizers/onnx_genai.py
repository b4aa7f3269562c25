"""ONNX models for onnxruntime-genai by its own builder: a graph for CPUs or for CUDA, built without a GPU."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from edgepack import layouts, modelspec, schemes
from edgepack.builders.quantizers import Job
from edgepack.builders.quantizers.listen import Listener
from edgepack.errors import BadInput, BuildFailed
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


_ALWAYS = ("windowed_kv_cache=false",)
"""With caches of a window only, 0.18.0 fails where a context is shorter than the window (Gemma 2), and at a longer
prompt where every layer slides (Mistral, Phi-3): tests/integration/test_upstream_bugs.py."""


def calibrates(scheme: layouts.Scheme) -> bool:
    return False


def quantize(job: Job) -> None:
    """Writes model.onnx, model.onnx.data, genai_config.json and the tokenizer.

    search.max_length becomes the plan's context: it is what the cache is allocated for when a generator is made.
    Raises BadInput for a context longer than the model's, and than the window where every layer slides.

    The builder reads the whole model, makes it a graph of floats, rounds that and copies it to be saved: from models of
    27 and 123 million parameters on a CPU, at its peak 3.5 times the bytes of the 16-bit checkpoint for onnx-int4 and
    2.9 for onnx-int8, beside the pages of the checkpoint's file: 50 and 42 GiB for 7 billion parameters.
    """
    scheme = layouts.parse(job.scheme)
    spec = modelspec.read(job.source)
    _require_context(spec, job)
    from onnxruntime_genai.models import builder

    precision, words = "fp16", list(_ALWAYS)
    if scheme.group is not None:
        precision = f"int{scheme.bits}"
        words += [f"block_size={scheme.group}", f"algo_config={_MIXED if scheme.mixed else _PLAIN}"]
    source, out = str(job.source), str(job.out)
    steps = {
        re.compile(r"Reading layer (\d+)"): lambda layer: 50 * (layer + 1) // spec.layers,
        re.compile(r"Progress: \[[# ]*\] (\d+)"): lambda percent: 50 + percent // 2,
    }
    with tempfile.TemporaryDirectory() as cache, redirect_stdout(Listener(sys.stdout, steps)):
        options = builder.parse_extra_options("", source, out, precision, job.backend, cache, words)
        builder.create_model("", source, out, precision, job.backend, cache, **options)
    _set_length(job.out / "genai_config.json", job.context)
    _verify(job, spec)


def _require_context(spec: ModelSpec, job: Job) -> None:
    if job.context > spec.context_train:
        raise BadInput(
            f"a context of {job.context} is more than the {spec.context_train} positions of the model",
            hint="onnxruntime-genai refuses to start with such a max_length",
        )
    config = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    window = config.get("sliding_window")
    everywhere = not any(kind.window for kind in spec.kv) and config.get("use_sliding_window", True)
    if isinstance(window, int) and everywhere and job.context > window:
        raise BadInput(
            f"a context of {job.context} is more than the window of {window} that every layer of {spec.name} has, and "
            "onnxruntime-genai 0.18's builder leaves that window out",
            hint=f"plan with --context {window}, or take a GGUF scheme",
        )


def _verify(job: Job, spec: ModelSpec) -> None:
    """Raises BuildFailed unless the graph's tensors have the bytes that the plan counts with."""
    import onnx

    graph = onnx.load(str(job.out / "model.onnx"), load_external_data=False).graph
    lengths = ({e.key: e.value for e in tensor.external_data}["length"] for tensor in graph.initializer)
    real = sum(int(length) for length in lengths)
    predicted = schemes.weights_bytes(spec, job.scheme, imatrix=False, backend=job.backend)
    predicted += layouts.rope_table_bytes(spec, half=job.backend != "cpu")
    if real != predicted:
        raise BuildFailed(
            f"the graph has tensors of {real} bytes, and {predicted} were predicted",
            hint="this is a bug in edgepack's arithmetic; report it with the model's config.json",
        )


def _set_length(path: Path, context: int) -> None:
    """The cache is as long as the plan says and grows in place; otherwise every step would allocate it anew."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"] |= {"max_length": context, "past_present_share_buffer": True}
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
