"""What each scheme costs: bytes predicted and real, perplexity, divergence from the parent, CPU seconds to build.

    python benchmarks/quantizers.py MODEL... [--schemes S,S] [--json FILE]

Each MODEL is a Hugging Face folder; it is measured on MODEL/heldout.txt and calibrated on MODEL/calibration.txt where
these are there, else on the built-in texts. Every artifact is read by the runtime that would run it, in a
fresh process, twice: "equal" says that both gave the same logits.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import rtn

from edgepack import calibration, heldout, hub, layouts, pipeline, quality, quantization, scoring
from edgepack.builders import quantizers
from edgepack.evaluation import Estimate
from edgepack.modelspec import ModelSpec
from edgepack.progress import Silent, Terminal
from edgepack.schemes import GGUF, weights_bytes

SCHEMES = (
    "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_M+imatrix", "IQ4_XS+imatrix", "Q3_K_M+imatrix", "IQ3_XXS+imatrix",
    "Q2_K+imatrix", "gptq-int8-g128", "ct-w8a16", "ct-w8a8", "bnb-int8", "onnx-int8", "fp8",
    "gptq-int4-g32", "gptq-int4-g128-actorder", "gptq-int4-g128", "autoround-int4-g128", "awq-int4-g128",
    "rtn-int4-g128", "ct-w4a16-g128", "bnb-nf4", "onnx-int4", "onnx-int4-rtn",
    "gptq-int3-g128", "autoround-int3-g128", "rtn-int3-g128", "gptq-int2-g128", "autoround-int2-g128", "rtn-int2-g128",
)  # fmt: skip
"""+imatrix: a GGUF rounded with an importance matrix of the same calibration data as the others."""
TOKENS = 16384
"""Measured on."""
WINDOWS = 64
"""Calibrated on, each of 512 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scheme of one model."""

    model: str
    scheme: str
    predicted: int
    """Bytes of the tensors."""
    real: int
    """Bytes of all files."""
    perplexity: Estimate
    kl: Estimate
    kl_p99: Estimate
    same_top: Estimate
    cpu_seconds: float
    """User and system time of all processes of the build, without measuring."""
    equal: bool
    """Whether two fresh processes gave the same logits."""


def rows(model: Path, schemes: Sequence[str], work: Path) -> Iterator[Row]:
    """One for each scheme, as it is made."""
    spec = pipeline.read_model(model)
    text = heldout.read(_beside(model, "heldout.txt"))
    for label in schemes:
        scheme, _, weighted = label.partition("+")
        data = _beside(model, "calibration.txt") or calibration.BUILTIN
        before = _cpu()
        if scheme.startswith("rtn-"):
            made = _rounded(model, spec, scheme, work)
        else:
            wanted = weighted or (scheme not in GGUF and quantization.calibrates(scheme))
            made = _quantized(model, spec, scheme, (data,) if wanted else (), work)
        spent = _cpu() - before
        measured = quality.measure(
            made.path, against=model, text=text, tokens=TOKENS, threads=1, progress=Silent()
        )
        if measured.parent is None:
            raise SystemExit(f"{scheme}: no parent was measured")
        yield Row(
            model=model.name,
            scheme=label,
            predicted=made.tensors,
            real=made.files,
            perplexity=measured.perplexity,
            kl=measured.parent.kl,
            kl_p99=measured.parent.kl_p99,
            same_top=measured.parent.same_top,
            cpu_seconds=spent,
            equal=_logits(made.path, text) == _logits(made.path, text),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    path: Path
    tensors: int
    files: int


def _quantized(model: Path, spec: ModelSpec, scheme: str, data: tuple[Path, ...], work: Path) -> Made:
    checkpoint = hub.resolve(str(model), revision=None, offline=True, progress=Silent())
    options = quantization.Options(
        calibration=data,
        calibration_tokens=512 * WINDOWS,
        context=spec.context_train,
        measured=False,
        threads=1,
    )
    made = quantization.make(checkpoint, spec, scheme, options, work, Terminal())
    return Made(path=made.artifact.path, tensors=made.record.tensor_bytes, files=made.record.bytes)


def _rounded(model: Path, spec: ModelSpec, scheme: str, work: Path) -> Made:
    """Rounded to nearest, in GPTQ's layout: what calibration has to beat."""
    like = layouts.parse(scheme.replace("rtn", "gptq"))
    out = work / f"{model.name}-{scheme}"
    rtn.write(model, out, bits=like.bits, group=like.group, symmetric=True)
    files = sum(path.stat().st_size for path in quantizers.files(out))
    return Made(path=out, tensors=weights_bytes(spec, like.name, imatrix=False), files=files)


def _beside(model: Path, name: str) -> Path | None:
    return model / name if (model / name).is_file() else None


def _cpu() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def _logits(artifact: Path, text: heldout.Text) -> bytes:
    """Of 128 tokens, by a process that has just loaded the artifact."""
    with scoring.opened(artifact, threads=1) as scorer:
        return scorer.logits(scorer.tokenize(text.content[:2000])[:128]).tobytes()


def table(found: Sequence[Row]) -> str:
    lines = [
        "| model | scheme | tensors, bytes | files, bytes | perplexity | KL, nats | KL, 99 % | same first "
        "| CPU s | equal |",
        f"|{' --- |' * 10}",
    ]
    for row in found:
        lines.append(
            f"| {row.model} | {row.scheme} | {row.predicted:,} | {row.real:,} | {row.perplexity.value:.3f} "
            f"| {row.kl.value:.5f} [{row.kl.low:.5f}, {row.kl.high:.5f}] | {row.kl_p99.value:.4f} "
            f"| {row.same_top.value:.1%} | {row.cpu_seconds:.0f} | {'yes' if row.equal else 'NO'} |"
        )
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--schemes", help="comma-separated; all by default")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args(words)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="quantizers-") as work:
        for model in given.models:
            for row in rows(model, given.schemes.split(",") if given.schemes else SCHEMES, Path(work)):
                print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
                found.append(row)
                if given.json:
                    given.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
