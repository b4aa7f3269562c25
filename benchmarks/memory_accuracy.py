"""Predicted against measured memory of a running llama-server, and the file size byte for byte.

    python benchmarks/memory_accuracy.py DIR [--shapes qwen2.5-0.5b qwen2.5-1.5b] [--contexts 512 4096 16384]

Random weights in the shapes of Qwen2.5 0.5B and 1.5B; each row builds the artifact, asks `fit` and llama.cpp
itself (`--exact`), starts the server with the flags a bundle ships, fills the context and reads VmHWM.
Prints one line per row and the median and worst error; rows already in DIR/rows.jsonl are not run again. RSS stays
below the plan until the context is full, so rows that --fill cut short are told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgepack import fit, modelspec, pipeline, toolchain
from edgepack.artifact import Artifact
from edgepack.builders import exact, gguf
from edgepack.device import agent
from edgepack.hub import resolve
from edgepack.progress import Silent
from edgepack.runtimes import llama_cpp
from edgepack.units import MIB

SCHEMES = ("Q8_0", "Q4_K_M", "Q4_0")
KV_TYPES = ("f16", "q8_0")
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-1.5b"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096, 16384])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument(
        "--fill", type=int, help="fill at most this many tokens (then the reading is a lower bound)"
    )
    parser.add_argument("--threads", type=int, default=THREADS, help="1 on a machine with other work")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows_file = options.folder / "rows.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    done = {row["case"] for row in rows}
    for shape in options.shapes:
        source = random_model(shape, options.folder)
        for scheme in options.schemes:
            cases = [
                (c, k) for c in options.contexts for k in KV_TYPES if f"{shape} {scheme} {c} {k}" not in done
            ]
            if not cases:
                continue
            spec = pipeline.read_model(source)
            artifact = build(source, spec, scheme, options.folder)
            for context, kv_type in cases:
                row = measure(
                    shape,
                    spec,
                    artifact,
                    scheme,
                    context,
                    kv_type,
                    fill=options.fill,
                    threads=options.threads,
                )
                rows.append(row)
                with rows_file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(line(row), flush=True)
    report(rows)


def random_model(shape: str, folder: Path) -> Path:
    """The Hugging Face folder of a shape with random weights, made once."""
    out = folder / shape
    if not out.exists():
        script = Path(__file__).parents[1] / "scripts" / "random_model.py"
        subprocess.run([sys.executable, str(script), shape, str(out)], check=True)
    return out


def build(source: Path, spec: modelspec.ModelSpec, scheme: str, folder: Path) -> Artifact:
    checkpoint = resolve(str(source), progress=Silent())
    return gguf.build(
        checkpoint, spec, scheme, folder / "artifacts", toolchain=toolchain.find(), progress=Silent()
    )


def measure(
    shape: str,
    spec: modelspec.ModelSpec,
    artifact: Artifact,
    scheme: str,
    context: int,
    kv_type: str,
    *,
    fill: int | None,
    threads: int,
) -> dict[str, Any]:
    """One case: what is predicted, what llama.cpp says, what the process took."""
    settings = llama_cpp.cpu_settings(context=context, kv_type=kv_type, threads=threads)
    predicted = fit.fit(spec, profile=None, scheme=scheme, settings=settings)
    environment = llama_cpp.environment(settings, backend="cpu", arch="x86_64")
    asked = exact.exact(spec, scheme, settings, toolchain=toolchain.find())
    with (
        tempfile.TemporaryDirectory() as folder,
        agent.memory_limit(None) as limit,
        agent.running_server(
            str(toolchain.find().server), list(llama_cpp.launch(settings, alias="m")), model=str(artifact.path),
            folder=folder, environment=dict(environment), limit=limit,
        ) as server,
    ):  # fmt: skip
        server.wait_healthy(600)
        filled = agent.fill_context(
            server, agent.slot_facts(server), min(context, fill or context), full=False
        )
        taken = agent.memory_facts(server, None)
    estimate = predicted.estimate
    return {
        "case": f"{shape} {scheme} {context} {kv_type}",
        "file_predicted": int(estimate.file_bytes),
        "file_real": int(artifact.bytes),
        "predicted": estimate.total,
        "low": estimate.low,
        "high": estimate.high,
        "measured": taken["peak_rss"],
        "kv": estimate.part("kv_cache"),
        "kv_exact": int(asked.kv_cache),
        "compute": estimate.part("compute"),
        "compute_exact": int(asked.compute),
        "weights": estimate.part("weights"),
        "weights_exact": int(asked.tensor_bytes),
        "context": context,
        "held_tokens": filled["held_tokens"][0],
    }


def error(row: dict[str, Any]) -> float:
    return float(row["predicted"]) / float(row["measured"]) - 1.0


def line(row: dict[str, Any]) -> str:
    inside = "inside" if row["low"] <= row["measured"] <= row["high"] else "OUTSIDE"
    return (
        f"{row['case']:<34} held {row['held_tokens']:>5}  file {row['file_predicted'] - row['file_real']:+d} B  "
        f"predicted {row['predicted'] / MIB:8.1f} MiB  measured {row['measured'] / MIB:8.1f} MiB  "
        f"{error(row):+6.2%} {inside}  kv {row['kv'] - row['kv_exact']:+d}  "
        f"compute {row['compute'] - row['compute_exact']:+d}  weights {row['weights'] - row['weights_exact']:+d}"
    )


def report(rows: list[dict[str, Any]]) -> None:
    filled = [row for row in rows if row["held_tokens"] >= row["context"] - 16]
    errors = [abs(error(row)) for row in filled]
    wrong = sum(row["file_predicted"] != row["file_real"] for row in rows)
    inside = sum(row["low"] <= row["measured"] <= row["high"] for row in filled)
    partly = sum(row["measured"] > row["high"] for row in rows if row not in filled)
    print(f"{len(filled)} rows filled to the context: median {statistics.median(errors):.2%}, worst {max(errors):.2%}, "
          f"{inside} inside the interval; {len(rows) - len(filled)} rows filled in part, {partly} of them above it; "
          f"{wrong} of {len(rows)} file sizes off")  # fmt: skip


if __name__ == "__main__":
    main()
