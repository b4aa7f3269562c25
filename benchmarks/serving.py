"""Bundles of all four runtimes: under concurrent clients, and their decoding against the bare runtime, in one run.

    python benchmarks/serving.py [--vllm VENV/bin/python] [--only RUNTIME …] [--seconds 120] [--update]
    python benchmarks/serving.py --from serving-out/serving.json --update

Builds a bundle of each runtime for this machine as `edgepack probe` sees it (kept in FOLDER for the next run), starts
it by its own start file and loads it (serve_load.py) with clients that stay, then with clients of which some leave; and
starts a bundle of a larger model beside the bare runtime (server_speed.py). vLLM is in the Python that --vllm names
(`make test-vllm` makes one); without it the table says that it was not measured. The results are in
FOLDER/serving.json after each step; --update writes them to benchmarks/SERVING.md. About 25 minutes on 2 idle cores.
Exit status 1 where a client met anything else than answers and refusals, or something failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import comparison
import psutil
import run as bench
import serve_load
import server_speed
import subjects

from edgepack import __version__, toolchain, workspace
from edgepack.runtimes import llama_cpp, vllm

SCHEMES: Mapping[str, str] = {
    llama_cpp.NAME: "Q8_0", "onnx-genai": "onnx-int8", "transformers": "bf16", vllm.NAME: "bf16",
}  # fmt: skip
SLOTS, SLOT = 4, 512
"""Of the loaded bundles: all tokens that the built-in model has positions for, in each of four slots."""
RESULTS = Path(__file__).parent / "SERVING.md"
START_SECONDS = 600
"""vLLM takes 30 to 100 on two idle cores."""


@dataclass(slots=True, kw_only=True)
class Measured:
    """One runtime; a part that was not measured yet, or not at all, is None."""

    planned: int | None = None
    """Bytes that the plan of the loaded bundle counts on."""
    loads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What serve_load.report tells, for "staying" and "leaving"."""
    ratios: list[float] | None = None
    """Of each round, the bundle's tokens a second over the bare runtime's."""
    processor: list[float] | None = None
    failed: str = ""
    """Why it is not whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    date: str
    machine: str
    software: str
    load: float
    """Average of the minute before the run, per core."""
    seconds: float
    runtimes: Mapping[str, Measured]


def main() -> int:
    asked = arguments()
    if asked.earlier:
        found = json.loads(asked.earlier.read_text(encoding="utf-8"))
        results = Results(
            **{**found, "runtimes": {n: Measured(**one) for n, one in found["runtimes"].items()}}
        )
    else:
        asked.folder.mkdir(parents=True, exist_ok=True)
        for results in measured(asked):
            text = json.dumps(asdict(results), indent=1, sort_keys=True) + "\n"
            workspace.write_text(asked.folder / "serving.json", text)
    print(markdown(results))
    if asked.update:
        workspace.write_text(RESULTS, TITLE + markdown(results))
    return 1 if any(broken(one) for one in results.runtimes.values()) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("serving-out"), help="bundles and results (default %(default)s)")
    add("--vllm", metavar="PYTHON", help="the Python that has vLLM")
    add("--only", nargs="+", choices=tuple(SCHEMES), default=tuple(SCHEMES), metavar="RUNTIME")
    add("--clients", type=int, default=32)
    add("--seconds", type=float, default=120, help="of each load")
    add(
        "--leaving",
        type=float,
        default=0.25,
        help="share of requests whose client leaves, in the second load",
    )
    add("--rounds", type=int, default=20, help="of decoding, against the bare runtime")
    add("--tokens", type=int, default=24, help="of an answer in these rounds")
    add("--update", action="store_true", help=f"write {RESULTS.name}")
    add("--from", type=Path, dest="earlier", metavar="FILE", help="show an earlier run's results")
    return parser.parse_args()


def broken(one: Measured) -> bool:
    return bool(one.failed) or any(serve_load.failed(load) for load in one.loads.values())


# ── measuring ──


def measured(asked: argparse.Namespace) -> Iterator[Results]:
    """What there is after each step."""
    load, began = os.getloadavg()[0] / comparison.CORES, time.monotonic()
    found = {name: Measured() for name in asked.only}
    profile = asked.folder / "here.yaml"
    edgepack(sys.executable, "probe", "-o", profile)
    for name, one in found.items():
        print(f"\n{name}", flush=True)
        if name == vllm.NAME and asked.vllm is None:
            one.failed = "not measured: no --vllm PYTHON"
            continue
        try:
            for _ in steps(name, asked, profile, one):
                yield results(load, time.monotonic() - began, found)
        # server_speed, a program too, ends with what a server that does not start has said.
        except (subprocess.CalledProcessError, serve_load.NotServed, SystemExit) as error:
            said = (error.stderr or "").strip() if isinstance(error, subprocess.CalledProcessError) else ""
            one.failed = ((said or str(error).strip()).splitlines() or [type(error).__name__])[-1]
            print(f"{name} ended early: {one.failed}", flush=True)
    yield results(load, time.monotonic() - began, found)


def results(load: float, seconds: float, found: Mapping[str, Measured]) -> Results:
    return Results(
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        machine=bench.machine(),
        software=f"edgepack {__version__}, llama.cpp {toolchain.COMMIT[:9]}, Python {platform.python_version()}",
        load=load,
        seconds=seconds,
        runtimes=found,
    )


def steps(name: str, asked: argparse.Namespace, profile: Path, one: Measured) -> Iterator[None]:
    """Fills in what is measured of one runtime, step by step."""
    python = asked.vllm if name == vllm.NAME else sys.executable
    demo = release(name, "demo", python, asked.folder, profile, context=SLOTS * SLOT, slots=SLOTS)
    plan = json.loads((demo / "plan.json").read_text(encoding="utf-8"))
    one.planned = sum(part["bytes"] for part in plan["memory"]["parts"])
    with started(demo, python, asked.folder / f"{name}.log") as (port, key, process):
        for what, leaving in (("staying", 0.0), ("leaving", asked.leaving)):
            load = serve_load.Load(
                model="demo", clients=asked.clients, seconds=asked.seconds, leaving=leaving
            )
            one.loads[what] = serve_load.measure(load, port, key, process)
            print(f"{what}: {json.dumps(one.loads[what])}", flush=True)
            yield
    larger = str(subjects.source(subjects.SMALL, asked.folder).resolve())
    place = release(name, larger, python, asked.folder, profile, context=SLOT, slots=1)
    plan = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    bare = argparse.Namespace(
        runtime=name, artifact=place / ("model.gguf" if name == llama_cpp.NAME else "model"), python=python,
        threads=plan["settings"]["threads"], context=SLOT, bench=None,
        server=toolchain.find_server() if name == llama_cpp.NAME else None,
    )  # fmt: skip
    with (
        started(place, python, asked.folder / f"{name}.log") as (port, key, process),
        server_speed.running(bare) as other,
    ):
        server = server_speed.streaming(f"http://127.0.0.1:{port}", key, plan["model"]["id"], process)
        one.ratios, one.processor = server_speed.compare(
            server, other, rounds=asked.rounds, tokens=asked.tokens
        )
    yield


def release(
    name: str, model: str, python: str, folder: Path, profile: Path, *, context: int, slots: int
) -> Path:
    """The unpacked bundle of a model; built once, for the profile that there was then."""
    place = folder / name / Path(model).name
    unpacked = place / "release"
    if not unpacked.exists():
        force = ("--force",) if name == vllm.NAME else ()
        edgepack(
            python, "build", "--profile", profile, "--model", model, "--runtime", name, "--scheme", SCHEMES[name],
            "--context", str(context), "--slots", str(slots), "--min-tokens-per-second", "0", "--no-quality", *force,
            "-o", place,
        )  # fmt: skip
        (bundle,) = place.glob("*.tar")
        edgepack(python, "unpack", bundle, unpacked)
    return unpacked


def edgepack(python: str, *words: str | Path) -> None:
    print(f"$ edgepack {' '.join(map(str, words))}", flush=True)
    command = [python, "-m", "edgepack", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@contextmanager
def started(place: Path, python: str, log: Path) -> Iterator[tuple[int, str, psutil.Process]]:
    """A bundle's server by its own start file."""
    environment = {
        "EDGEPACK_PYTHON": python,
        "EDGEPACK_FORCE": "1",
        "EDGEPACK_STATE": str(place.parent / "state"),
    }
    if (place / "model.gguf").exists():
        environment["EDGEPACK_LLAMA_SERVER"] = str(toolchain.find_server())
    command = ["env", "EDGEPACK_PORT={port}", "EDGEPACK_KEY_FILE={key}", "sh", str(place / "start.sh")]
    with serve_load.serving(command, START_SECONDS, environment, log) as server:
        yield server


# ── as a document ──

TITLE = (
    "# Servers under load and against their bare runtimes\n\nWritten by `benchmarks/serving.py --update`.\n\n"
)
HEADS = (
    "runtime", "clients", "answered", "left", "refused", "errors", "tokens/s", "first token, ms", "between, ms",
    "whole answer, ms", "memory before, after, most, MiB",
)  # fmt: skip


def markdown(found: Results) -> str:
    busy = f"; the machine was busy (load {found.load:.1f} a core before)" if found.load > bench.QUIET else ""
    lines = [
        f"{found.date}, {found.machine}; {found.software}; {found.seconds / 60:.0f} minutes{busy}.",
        "",
        "## Under load",
        "",
        f"The built-in model, {SLOTS} slots of {SLOT} tokens, bundles by their own start files. Each client asks for "
        "one streamed answer of up to 32 tokens after another, to prompts of up to 40 words; of the clients that leave "
        "each gives up a quarter of its requests, some before the first token. Times are p50 / p95 as a client sees "
        "them. Memory is the RSS of all processes, which counts pages that several share more than once.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
        *(_row(name, what, load) for name, one in found.runtimes.items() for what, load in one.loads.items()),
        "",
        *(f"{name}: {error} ({count})" for name, one in found.runtimes.items()
          for load in one.loads.values() for error, count in load["errors"].items()),
        "## Against the bare runtime",
        "",
        f"Decoding of the bundle's server, streamed by HTTP, over that of the bare runtime in the same run, by turns: "
        f"random weights in the shape of {subjects.SMALL}, one slot. Median of the rounds' ratios and the interval "
        "that holds it nine times of ten; of the processor's time for a token less is better. server_speed.py says "
        "what is bare.",
        "",
        "| runtime | rounds | tokens/s, bundle : bare | processor time, bundle : bare |",
        "| --- | --- | --- | --- |",
        *(_speed(name, one) for name, one in found.runtimes.items() if one.ratios and one.processor),
    ]  # fmt: skip
    failed = [f"- {name}: {one.failed}" for name, one in found.runtimes.items() if one.failed]
    if failed:
        lines += ["", "Not whole:", "", *failed]
    return "\n".join(lines) + "\n"


def _row(name: str, what: str, load: Mapping[str, Any]) -> str:
    memory = load["rss_mib"]
    cells = [
        name, f"{load['clients']} {what}, {load['seconds']:.0f} s", load["answered"], load["left"],
        ", ".join(f"{count} ({status})" for status, count in load["refused"].items()) or 0,
        sum(load["errors"].values()), load["tokens_per_second"],
        *(_times(load[kind]) for kind in ("first_token_ms", "between_tokens_ms", "whole_ms")),
        ", ".join(f"{memory[when]:.0f}" for when in ("start", "end", "peak")),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _times(milliseconds: Mapping[str, float]) -> str:
    """p50 / p95, below 100 to a tenth."""
    told = [milliseconds[name] for name in ("p50", "p95")] if milliseconds else []
    return " / ".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in told) or "-"


def _speed(name: str, one: Measured) -> str:
    ratios = [comparison.middle(values) for values in (one.ratios or [], one.processor or [])]
    cells = (f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" for ratio in ratios)
    return f"| {name} | {len(one.ratios or [])} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
