"""What each scheme costs: bytes predicted and real, perplexity, divergence from the parent, CPU seconds to build.

    python benchmarks/quantizers.py MODEL... [--schemes S,S] [--text FILE] [--outliers] [--json FILE]

Each MODEL is a Hugging Face folder; MODEL/heldout.txt is measured on when it is there. With --outliers the model gets
activation outliers first that leave its function alone, as large models have them and small ones do not: only there
does AWQ have something to gain over rounding to nearest. Every artifact is read by the runtime that would run it, in a
fresh process, twice: "equal" says that both gave the same logits.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgepack import heldout, hub, pipeline, quality, quantization, scoring
from edgepack.progress import Silent, Terminal

SCHEMES = (
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_M+imatrix", "IQ4_XS+imatrix", "Q3_K_M+imatrix", "IQ3_XXS+imatrix",
    "Q2_K+imatrix", "gptq-int8-g128", "ct-w8a16", "ct-w8a8", "bnb-int8", "onnx-int8", "fp8",
    "gptq-int4-g32", "gptq-int4-g128-actorder", "gptq-int4-g128", "autoround-int4-g128", "awq-int4-g128", "rtn-int4-g128",
    "ct-w4a16-g128", "bnb-nf4", "onnx-int4", "onnx-int4-rtn", "gptq-int3-g128", "autoround-int3-g128", "rtn-int3-g128",
    "gptq-int2-g128", "autoround-int2-g128", "rtn-int2-g128",
)  # fmt: skip
"""+imatrix: a GGUF rounded with an importance matrix of the same calibration data as the others."""
TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scheme of one model."""

    model: str
    scheme: str
    predicted: int
    """Bytes of the tensors."""
    real: int
    """Bytes of all files."""
    perplexity: quality.Estimate
    kl: quality.Estimate
    kl_p99: quality.Estimate
    same_top: quality.Estimate
    cpu_seconds: float
    """User and system time of all processes of the build, without measuring."""
    equal: bool
    """Whether two fresh processes gave the same logits."""


def rows(model: Path, schemes: Sequence[str], work: Path) -> Iterator[Row]:
    checkpoint = hub.resolve(str(model), revision=None, offline=True, progress=Silent())
    spec = pipeline.read_model(model)
    text = heldout.read(model / "heldout.txt" if (model / "heldout.txt").is_file() else None)
    for scheme in schemes:
        options = quantization.Options(
            calibration=_calibration(model, scheme), context=spec.context_train, measured=False, threads=1
        )
        before = _cpu()
        made = quantization.make(checkpoint, spec, scheme, options, work, Terminal())
        spent = _cpu() - before
        measured = quality.measure(
            made.artifact.path, against=model, text=text, tokens=TOKENS, threads=1, progress=Silent()
        )
        if measured.parent is None:
            raise SystemExit(f"{scheme}: no parent was measured")
        yield Row(
            model=model.name,
            scheme=scheme,
            predicted=made.record.tensor_bytes,
            real=made.record.bytes,
            perplexity=measured.perplexity,
            kl=measured.parent.kl,
            kl_p99=measured.parent.kl_p99,
            same_top=measured.parent.same_top,
            cpu_seconds=spent,
            equal=_logits(made.artifact.path, text) == _logits(made.artifact.path, text),
        )
