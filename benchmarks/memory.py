"""Predicted against measured peak memory of the server that a bundle ships: edgepack and every estimator to be had.

    python benchmarks/memory.py [--folder DIR]

The server is started with a plan's flags on a CPU, its context filled, and its VmHWM read (memory_accuracy.py has more
shapes and contexts). Each estimator is told the same model, context and KV type, as far as it can be. A figure
is the error's size, a round one case; the note has its direction: an estimate below what was measured is the
dangerous one. Most estimators mean a GPU and add what CUDA takes, so a CPU's figure is not what they were made for.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import comparison
import memory_accuracy
import peers
import subjects
from comparison import CORES, Asked, Peer, Row

from edgepack.modelspec import ModelSpec
from edgepack.units import MIB

CASES = (
    ("demo", "Q8_0", 512, "f16"),
    ("demo", "Q8_0", 512, "q8_0"),
    (subjects.SHAPE, "Q4_K_M", 512, "f16"),
    (subjects.SHAPE, "Q4_K_M", 2048, "f16"),
    (subjects.SHAPE, "Q4_K_M", 2048, "q8_0"),
)
LIBRARY = """
import json, sys
case = json.loads(sys.argv[1])
"""
HF_MEM = f"""{LIBRARY}
from hf_mem.gguf.metadata import parse_gguf_metadata
found = parse_gguf_metadata(
    open(case["file"], "rb").read(), experimental=True, max_model_len=case["context"],
    kv_cache_dtype=case["kv_type"].upper(),
)
print(found.bytes_count + found.kv_cache.cache_size)
"""
GGUFIT = f"""{LIBRARY}
from ggufit.calculator import evaluate_fit
model = dict(params_billion=case["parameters"] / 1e9, layers=case["layers"], hidden_size=case["hidden"],
             num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"], head_dim=case["head_dim"])
bits = 16 if case["kv_type"] == "f16" else 8
found = evaluate_fit(model, "q" + case["scheme"][1], case["context"], 64, 40, kv_bits=bits)
print(found.total_ram_needed_gb * 2**30)
"""
IAEXPLORE = f"""{LIBRARY}
from iaexplore_llm_profiler.core import profile_inference
model = dict(total_params_b=case["parameters"] / 1e9, num_hidden_layers=case["layers"],
             num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"], head_dim=case["head_dim"])
found = profile_inference(
    model, "rtx-4090-24gb", case["scheme"], case["context"], kv_bits=16 if case["kv_type"] == "f16" else 8
)
print(found.vram_total_required_gb * 2**30)
"""
ACCELERATE = f"""{LIBRARY}
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoConfig, AutoModelForCausalLM
with init_empty_weights():
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case["folder"], local_files_only=True))
print(calculate_maximum_sizes(model.float())[0] / (8 if case["scheme"].startswith("Q4") else 4))
"""
FORMULA = "https://oobabooga.github.io/blog/posts/gguf-vram-formula/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What an estimator may know."""

    folder: str
    file: str
    scheme: str
    context: int
    kv_type: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


class NoEstimate(Exception):
    """A program that failed, or said something else than was expected of it."""


Estimator = Callable[[Case], float]
"""Bytes; raises NoEstimate, or ValueError or LookupError for what it cannot read."""
SAME = "llama-fit-params"


def found() -> Sequence[Peer]:
    return tuple(peer for peer, _ in estimators())


def estimators() -> Sequence[tuple[Peer, Estimator]]:
    python = peers.venv()

    def library(name: str, version: str, module: str, calls: str, code: str) -> tuple[Peer, Estimator]:
        peer = peers.from_pypi(name, version, calls, proof=[str(python), "-c", f"import {module}"])
        return peer, lambda case: float(_said([python, "-c", code, json.dumps(asdict(case))]))

    accelerate = Peer(
        name="accelerate estimate-memory", version=peers.version("accelerate"),
        command="accelerate.utils.calculate_maximum_sizes(model of config.json), int4 or int8, as its command prints",
        missing=peers.importable("accelerate", "transformers", "torch"),
    )  # fmt: skip
    formula = Peer(
        name="text-generation-webui's formula",
        version="2025",
        command=f"the formula of {FORMULA}, all layers",
    )
    return (
        (
            peers.llama_cpp(SAME, "llama-fit-params -m MODEL.gguf -c N -ctk T -ctv T --fit-print on"),
            _fit_params,
        ),
        (
            peers.from_pypi("modelinfo-cli", "1.4.4", "modelinfo MODEL.gguf --context N",
                            proof=["{bin}/modelinfo", "--version"]),
            _modelinfo,
        ),
        library("hf-mem", "0.5.6", "hf_mem.gguf.metadata",
                "hf_mem.gguf.metadata.parse_gguf_metadata(MODEL.gguf) (its command reads the Hub alone)", HF_MEM),
        library("ggufit", "0.3.0", "ggufit.calculator", "ggufit.calculator.evaluate_fit(shape, q4 or q8, N)", GGUFIT),
        library("iaexplore-llm-profiler", "1.0.0", "iaexplore_llm_profiler.core",
                "iaexplore_llm_profiler.core.profile_inference(shape, scheme, N)", IAEXPLORE),
        (accelerate, lambda case: float(_said([sys.executable, "-c", ACCELERATE, json.dumps(asdict(case))]))),
        (formula, _formula),
        (peers.installed("gguf-parser", "go install github.com/gpustack/gguf-parser-go/cmd/gguf-parser",
                         "gguf-parser --path MODEL.gguf --ctx-size N --estimate --json"), _gguf_parser),
        (Peer(name="llmfit", version="1.1.17", command="llmfit plan MODEL",
              missing="it looks models up in its own table by name; ours are on the disk"), _unasked),
    )  # fmt: skip


def compare(asked: Asked, by_name: Mapping[str, Peer]) -> Iterator[Row]:
    measured, ours, cases = [], [], []
    for name, scheme, context, kv_type in CASES:
        spec, artifact = subjects.artifact(name, scheme, asked.folder)
        row = memory_accuracy.measure(
            name, spec, artifact, scheme, context, kv_type, fill=None, threads=CORES
        )
        print(memory_accuracy.line(row), flush=True)
        measured.append(float(row["measured"]))
        ours.append(float(row["predicted"]))
        cases.append(
            _case(subjects.source(name, asked.folder), spec, artifact.path, scheme, context, kv_type)
        )
    for peer, estimate in estimators():
        if by_name[peer.name].missing:
            yield comparison.absent("memory predicted", "%", "less", peer, by_name[peer.name].missing)
            continue
        try:
            theirs = [estimate(case) for case in cases]
        except (NoEstimate, LookupError, ValueError) as error:
            yield comparison.absent("memory predicted", "%", "less", peer, f"no estimate: {error}")
            continue
        yield comparison.of(
            "memory predicted", "%", "less", peer, _errors(ours, measured), _errors(theirs, measured),
            note=f"edgepack {_range(ours, measured)}; {peer.name} {_range(theirs, measured)}",
            why="both ask the same buffers of llama.cpp; what is left is the process itself" if peer.name == SAME
            else "in these cases it came as near",
        )  # fmt: skip


def _errors(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    return [abs(a / b - 1) for a, b in zip(predicted, measured, strict=True)]


def _range(predicted: Sequence[float], measured: Sequence[float]) -> str:
    off = [a / b - 1 for a, b in zip(predicted, measured, strict=True)]
    below = sum(error < 0 for error in off)
    return f"{min(off):+.1%} to {max(off):+.1%}, below the measured in {below} of {len(off)}"


def _case(folder: Path, spec: ModelSpec, file: Path, scheme: str, context: int, kv_type: str) -> Case:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = int(config["num_attention_heads"])
    return Case(
        folder=str(folder), file=str(file), scheme=scheme, context=context, kv_type=kv_type,
        parameters=spec.parameters, layers=int(config["num_hidden_layers"]), hidden=int(config["hidden_size"]),
        heads=heads, kv_heads=int(config["num_key_value_heads"]),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
    )  # fmt: skip


# ── the estimators that are not a library's call ──


def _fit_params(case: Case) -> float:
    """Its rows are: device, and MiB of model, context and compute."""
    said = _said([
        peers.program("llama-fit-params"), "-m", case.file, "-c", str(case.context), "-ctk", case.kv_type,
        "-ctv", case.kv_type, "-fa", "on", "-np", "1", "--fit-print", "on",
    ])  # fmt: skip
    rows = re.findall(r"^\S+ (\d+) (\d+) (\d+) *$", said, re.MULTILINE)
    if not rows:
        raise NoEstimate(f"no row of device and MiB in {said[-200:]!r}")
    return MIB * float(sum(int(number) for row in rows for number in row))


def _modelinfo(case: Case) -> float:
    said = _said([peers.venv().parent / "modelinfo", case.file, "--context", str(case.context)])
    parts = dict(re.findall(r"(Weights|KV Cache|Overhead):\s+([\d.]+ (?:KB|MB|GB))", said))
    scale = {"KB": 2**10, "MB": 2**20, "GB": 2**30}
    missing = {"Weights", "KV Cache", "Overhead"} - parts.keys()
    if missing:
        raise NoEstimate(f"no {', '.join(sorted(missing))} in {said[-200:]!r}")
    return sum(float(number) * scale[unit] for number, unit in (part.split() for part in parts.values()))


def _formula(case: Case) -> float:
    """Fitted on GPUs by its author, who gives a median error of 365 MiB."""
    bits = {"f16": 16, "q8_0": 8, "q4_0": 4}[case.kv_type]
    layer = Path(case.file).stat().st_size / MIB / case.layers
    keys = case.kv_heads * bits * case.context
    spread = math.floor(50.77817218646521 * case.hidden / case.context) + 9.987899908205632
    slope = layer - 17.99552795246051 + 3.148552680382576e-05 * keys
    return MIB * (slope * (case.layers + max(0.9690636483914102, bits - spread)) + 1516.522943869404)


def _gguf_parser(case: Case) -> float:
    said = _said(["gguf-parser", "--path", case.file, "--ctx-size", str(case.context), "--estimate", "--json",
                  "--cache-type-k", case.kv_type, "--cache-type-v", case.kv_type, "--gpu-layers", "0"])  # fmt: skip
    return float(json.loads(said)["estimate"]["items"][0]["ram"]["nonuma"])


def _unasked(case: Case) -> float:
    raise NoEstimate(f"nothing asks it for {case.file}")


def _said(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise NoEstimate(f"{Path(command[0]).name} ended with status {done.returncode}: {last}")
    return done.stdout


if __name__ == "__main__":
    comparison.main(__doc__, found, compare, rounds=len(CASES))
