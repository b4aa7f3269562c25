"""A GGUF that fills a budget against llama-quantize's mixtures of as many bytes: divergence from the parent.

    python benchmarks/budget.py DIR MODEL... [--anchors IQ4_XS Q4_K_M Q5_K_M Q3_K_M] [--backend cpu|cuda]

Each MODEL is "demo" or a Hugging Face folder, calibrated on --calibration, else on MODEL/calibration.txt where it is
there, else on the built-in text, and measured by llama.cpp on MODEL/heldout.txt. All artifacts of a model share one
importance matrix. Methods:

    anchor   llama-quantize's own mixture
    fisher   what edgepack builds: costs by the Fisher information, solved exactly
    mse      the objective of llama.cpp's proposed --target-bpw (PR 15550), for comparison: the rounding error weighted
             with the importance matrix, summed over tensors; the same solver, types and bytes
    guess    the types that a plan assumes before anything is measured
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgepack import allocation, calibration, heldout, hub, pipeline, quality, schemes, toolchain
from edgepack.allocation import Limits, Option, Place
from edgepack.artifact import Checkpoint
from edgepack.builders import convert, gguf, imatrix, sensitivity
from edgepack.calibration import Calibration
from edgepack.calibration.encoder import encoder
from edgepack.evaluation import Quality
from edgepack.modelspec import ModelSpec, Tensor
from edgepack.profile import Backend
from edgepack.progress import Silent, Terminal
from edgepack.runtimes import llama_cpp

ANCHORS = ("IQ4_XS", "Q4_K_M", "Q5_K_M", "Q3_K_M")
TOKENS = 24576
"""Measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    model: str
    anchor: str
    method: str
    bytes: int
    kl: float
    kl_low: float
    kl_high: float
    predicted: float | None
    """Nats a token that the costs add up to."""
    perplexity: float
    ratio: float
    """Divergence over the anchor's."""
    seconds: float
    """Wall time of choosing and quantizing; of a model's first budget with measuring the costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, and what all its artifacts share."""

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec
    data: Calibration
    matrix: Path
    windows: Path
    text: heldout.Text
    folder: Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--anchors", nargs="+", default=list(ANCHORS))
    parser.add_argument("--methods", nargs="+", default=["fisher", "mse", "guess"])
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[Row] = []
    for model in asked.models:
        of = subject(model, asked.folder, asked.calibration)
        for anchor in asked.anchors:
            for row in compare(of, anchor, asked.methods, asked.backend):
                rows.append(row)
                show(row)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def subject(model: str, root: Path, given: Sequence[Path], *, calibrated_on: int | None = None) -> Subject:
    """``calibrated_on``: tokens; as many as a build takes when it is not given."""
    checkpoint = hub.resolve(model, revision=None, offline=True, progress=Silent())
    spec = pipeline.read_model(checkpoint.path)
    folder = root / checkpoint.path.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    beside = checkpoint.path / "calibration.txt"
    files = list(given) or ([beside] if beside.is_file() else [])
    data = calibration.of(checkpoint.path, spec, files, tokens=calibrated_on)
    whole = gguf.full_precision(checkpoint, spec, "Q8_0", folder, True, Silent())
    tools = toolchain.find()
    matrix = gguf.importances(data, whole, checkpoint, spec, folder, tools, Terminal())
    windows = folder / f"{data.sha256[:16]}.npy"
    calibration.save(calibration.windows(data, encoder(checkpoint.path)), windows)
    return Subject(
        name=checkpoint.path.resolve().name, checkpoint=checkpoint, spec=spec, data=data, matrix=matrix,
        windows=windows, text=heldout.read(checkpoint.path / "heldout.txt"), folder=folder,
    )  # fmt: skip


def compare(of: Subject, anchor: str, methods: Sequence[str], backend: Backend) -> list[Row]:
    made = build(of, anchor, of.spec)
    found = quality_of(of, made)
    size = made.stat().st_size
    rows = [row(of, anchor, "anchor", size, found, found, None, 0.0)]
    for method in methods:
        done = filled(of, size, method, backend)
        rows.append(
            row(
                of, anchor, method, done.path.stat().st_size, quality_of(of, done.path), found,
                done.predicted, done.seconds,
            )
        )  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """An artifact within a budget."""

    path: Path
    predicted: float | None
    seconds: float


def filled(of: Subject, size: int, method: str, backend: Backend) -> Filled:
    """Of ``size`` bytes at most, by one of the methods; ends the benchmark when it has more."""
    settings = llama_cpp.cpu_settings(context=512)
    place = Place(settings=settings, backend=backend, arch="x86_64", unified=True)
    name = schemes.budget_name(size)
    started = time.monotonic()
    if method == "guess":
        spec, _ = allocation.planned(of.spec, name, place, room=None)
        predicted = None
    else:
        losses = {"fisher": costs, "mse": errors}[method](of, backend)
        items = allocation.items(of.spec, place, losses)
        header = int(of.spec.header_bytes or 0)
        chosen: list[Option] = allocation.solve(items, Limits(file=size - header, memory=None))
        spec = allocation.recipe(of.spec, chosen, measured=True)
        predicted = allocation.lost(chosen) if method == "fisher" else None
    path = build(of, name, spec)
    seconds = time.monotonic() - started
    if path.stat().st_size > size:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, and {size} were the budget")
    return Filled(path=path, predicted=predicted, seconds=seconds)


def costs(of: Subject, backend: Backend) -> Callable[[Tensor, str], float]:
    """What edgepack measures."""
    kinds = {t.name: allocation.kinds(t, backend) for t in of.spec.tensors if schemes.quantizable(t)}
    found = sensitivity.measure(
        of.checkpoint, of.spec, kinds, of.folder, windows=of.windows, matrix=of.matrix,
        toolchain=toolchain.find(), progress=Terminal(),
    )  # fmt: skip
    return lambda tensor, kind: found[tensor.name][kind]


def errors(of: Subject, backend: Backend) -> Callable[[Tensor, str], float]:
    """Squared rounding error, columns weighted by their mean squared inputs; no gradients, so all outputs are alike."""
    rounding = sensitivity.Rounding(toolchain.find().package, 1)
    importances = imatrix.read(of.matrix)
    stored = convert.stored(of.checkpoint.path, of.spec)

    def error(tensor: Tensor, kind: str) -> float:
        weights = sensitivity.load(stored[tensor.name]).numpy()
        importance = importances.get(tensor.name)
        off = (rounding(weights, kind, importance) - weights).astype(np.float64) ** 2
        return float((off * (1.0 if importance is None else importance)).sum())

    return error


def build(of: Subject, scheme: str, spec: ModelSpec) -> Path:
    return gguf.build(
        of.checkpoint,
        spec,
        scheme,
        of.folder,
        imatrix=of.matrix,
        toolchain=toolchain.find(),
        progress=Silent(),
    ).path


def quality_of(of: Subject, artifact: Path, *, tokens: int = TOKENS) -> Quality:
    return quality.measure(
        artifact, against=of.checkpoint.path, text=of.text,
        fingerprints=calibration.record(of.data).fingerprints, tokens=tokens, threads=1, progress=Silent(),
    )  # fmt: skip


def row(
    of: Subject, anchor: str, method: str, size: int, found: Quality, base: Quality,
    predicted: float | None, seconds: float,
) -> Row:  # fmt: skip
    if found.parent is None or base.parent is None:
        raise SystemExit(f"{of.name} has no parent to be compared with")
    kl = found.parent.kl
    return Row(
        model=of.name, anchor=anchor, method=method, bytes=size, kl=kl.value, kl_low=kl.low, kl_high=kl.high,
        predicted=predicted, perplexity=found.perplexity.value, ratio=kl.value / base.parent.kl.value,
        seconds=seconds,
    )  # fmt: skip


def show(row: Row) -> None:
    predicted = "" if row.predicted is None else f"{row.predicted:.5f}"
    print(
        f"{row.model:<8}{row.anchor:<8}{row.method:<8}{row.bytes:>12,} B  KL {row.kl:.5f} "
        f"[{row.kl_low:.5f}, {row.kl_high:.5f}]  predicted {predicted:<8} ratio {row.ratio:.3f}  "
        f"ppl {row.perplexity:.3f}  {row.seconds:6.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
