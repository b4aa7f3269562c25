"""`make bench`: edgepack and its peers on the same work, in one run, as one table.

    python benchmarks/run.py [--only pack build …] [--json FILE] [--markdown FILE] [--update-readme]
    python benchmarks/run.py --from bench-out/results.json --update-readme

All peers, their versions and commands are listed before the first result. A peer that is not there stays in the table
with the reason, and where edgepack is not ahead, the table says why. The results are kept in FOLDER/results.json;
--update-readme writes them, with machine, date and load, into benchmarks/RESULTS.md and, of each quantity the peer that
is hardest to beat, into README.md between its two markers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comparison
from comparison import CORES, Figure, Peer, Row

from edgepack import __version__, toolchain, workspace
from edgepack.units import GIB

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

COMPARISONS = ("plan_latency", "pack", "build", "memory", "decode", "rebuild", "quality")
LONGER: Mapping[str, str] = {
    "build_time.py MODEL": "a build against its own convert and quantize, as long as the model is big",
    "memory_accuracy.py DIR": "the estimate over more shapes, schemes and contexts; half an hour",
    "server_speed.py RUNTIME ARTIFACT": "every runtime's server against its bare loop; minutes each",
    "serve_load.py": "a server under load; minutes",
    "serving.py": "bundles of all runtimes under load and against their bare runtimes; 25 minutes",
    "flash.py": "weights over ssh against scp; minutes",
    "budget.py DIR MODEL…": "budgets against more mixtures and models; an hour",
    "quantizers.py MODEL…": "every scheme's size and divergence; hours",
    "distillation.py DIR": "students; hours",
    "distillation_cache.py": "the teacher's cached answers; minutes",
}
"""Not run here, because they take longer."""
QUIET = 0.5
"""Load average per core above which a machine was busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One run."""

    date: str
    machine: str
    software: str
    load: float
    """Average of the minute before the run, per core."""
    seconds: float
    peers: Mapping[str, tuple[Peer, ...]]
    """By comparison."""
    rows: Mapping[str, tuple[Row, ...]]
    failed: Mapping[str, str]
    """Why a comparison has not all its rows: the last line that it said, or that the run was ended before it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("bench-out"), help="for models (default %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=COMPARISONS, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the whole table here")
    parser.add_argument(
        "--update-readme", action="store_true", help=f"{RESULTS.name}, and README.md between its markers"
    )
    parser.add_argument(
        "--from", type=Path, dest="earlier", metavar="FILE", help="show an earlier run's results"
    )
    asked = parser.parse_args()
    if asked.earlier:
        results = read(json.loads(asked.earlier.read_text(encoding="utf-8")))
        names = {*results.rows, *results.failed}
    else:
        names = set(asked.only)
    absent = [name for name in COMPARISONS if name not in names]
    if asked.update_readme and absent:
        parser.error(f"--update-readme replaces the whole table, and this is without {', '.join(absent)}")
    if not asked.earlier:
        asked.folder.mkdir(parents=True, exist_ok=True)
        for results in run(asked.only, asked.folder):
            workspace.write_text(asked.folder / "results.json", document(results))
    print(text(results))
    if asked.json:
        workspace.write_text(asked.json, document(results))
    if asked.markdown:
        workspace.write_text(asked.markdown, markdown(results))
    if asked.update_readme:
        page = README.read_text(encoding="utf-8")
        workspace.write_text(README, with_block(page, short(results)))
        workspace.write_text(RESULTS, TITLE + markdown(results))
    return 1 if results.failed else 0


def run(names: Sequence[str], folder: Path) -> Iterator[Results]:
    """The peers of all, then each comparison in a process of its own; yields what there is after each."""
    load = os.getloadavg()[0] / CORES
    peers = {name: tuple(Peer(**one) for one in _asked(name, folder, "--peers")[0]) for name in names}
    print("Peers\n")
    for name in names:
        print(f"{name}\n{comparison.listing(peers[name])}\n", flush=True)
    print("Not in this run\n")
    for command, what in LONGER.items():
        print(f"python benchmarks/{command}: {what}")
    rows: dict[str, tuple[Row, ...]] = {}
    failed = dict.fromkeys(names, "the run was ended before it")
    began = time.monotonic()
    for name in names:
        started = time.monotonic()
        print(f"\n$ python benchmarks/{name}.py --folder {folder}", flush=True)
        found, said = _asked(name, folder, "--json")
        rows[name] = tuple(_row(one) for one in found)
        del failed[name]
        if said:
            failed[name] = said
            print(f"{name} ended early: {said}")
        print(f"{time.monotonic() - started:.0f} s", flush=True)
        yield Results(
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            machine=machine(),
            software=f"edgepack {__version__}, llama.cpp {toolchain.COMMIT[:9]}, Python {platform.python_version()}",
            load=load,
            seconds=time.monotonic() - began,
            peers=peers,
            rows=dict(rows),
            failed=dict(failed),
        )


def _asked(name: str, folder: Path, option: str) -> tuple[list[dict[str, Any]], str]:
    """What a comparison writes as JSON, all of it or until it failed, and the last line that it said then."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--folder", str(folder), option, str(out)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        said = ""
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return json.loads(out.read_text(encoding="utf-8")) if out.exists() else [], said


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{names[0] if names else platform.machine()}, {CORES} cores, {memory / GIB:.0f} GiB"


# ── as documents ──


def document(results: Results) -> str:
    return json.dumps(asdict(results), indent=1, sort_keys=True) + "\n"


def read(found: Mapping[str, Any]) -> Results:
    """What ``document`` wrote."""
    peers = {name: tuple(Peer(**one) for one in each) for name, each in found["peers"].items()}
    rows = {name: tuple(_row(one) for one in each) for name, each in found["rows"].items()}
    return Results(**{**found, "peers": peers, "rows": rows})


def _row(found: Mapping[str, Any]) -> Row:
    figures = {name: Figure(**found[name]) if found[name] else None for name in ("ours", "theirs", "ratio")}
    return Row(**{**found, **figures})


def heading(results: Results) -> str:
    """Machine, date, software, and whether the machine was busy."""
    busy = f"; the machine was busy (load {results.load:.1f} a core before)" if results.load > QUIET else ""
    return f"{results.date}, {results.machine}; {results.software}; {results.seconds / 60:.0f} minutes{busy}"


LEGEND = (
    "ratio: edgepack's figure over the peer's, of one round; the median over rounds and the interval that holds it "
    f"nine times of ten; ahead: by the whole interval, of {comparison.FEWEST} rounds at least where there are rounds "
    "(bytes have no spread)"
)


def text(results: Results) -> str:
    rows = [row for _, row in _listed(results)]
    return "\n".join(["", heading(results), "", comparison.table(rows), "", LEGEND])


def _listed(results: Results) -> Iterator[tuple[str, Row]]:
    """Each row with its comparison's name; one that has not all its rows ends with the reason."""
    for name in COMPARISONS:
        for row in results.rows.get(name, ()):
            yield name, row
        if name in results.failed:
            rest = Peer(name="the rest", version="", command="")
            yield (
                name,
                comparison.absent(name, "s", "less", rest, f"{name} ended early: {results.failed[name]}"),
            )


TITLE = "# Results of `make bench`\n\nWritten by `benchmarks/run.py --update-readme`.\n\n"


def markdown(results: Results) -> str:
    """The whole table with the command of each row, and below it why edgepack is not ahead where it is not."""
    return f"{heading(results)}.\n\n{_table(list(_listed(results)))}"


def short(results: Results) -> str:
    """The table of the peers that are hardest to beat, one a quantity."""
    listed = list(_listed(results))
    chosen = comparison.hardest([row for _, row in listed])
    whole = f"[all {len(listed)} rows]({RESULTS.relative_to(README.parent)})"
    rest = f"Of several peers the one that is hardest to beat; {whole}"
    return f"{heading(results)}. {rest}.\n\n{_table([pair for pair in listed if pair[1] in chosen])}"


def _table(rows: Sequence[tuple[str, Row]]) -> str:
    lines = [f"| {' | '.join((*comparison.HEADS, 'command'))} |", f"|{' --- |' * 7}"]
    notes: dict[str, int] = {}
    for name, row in rows:
        cells = [cell.replace("|", "\\|") for cell in comparison.cells(row)]
        if row.note:
            cells[-1] += f" ({notes.setdefault(row.note, len(notes) + 1)})"
        lines.append(f"| {' | '.join(cells)} | `python benchmarks/{name}.py` |")
    lines += ["", f"{LEGEND[0].upper()}{LEGEND[1:]}."]
    lines += ["", *(f"{number}. {note[0].upper()}{note[1:]}." for note, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def with_block(page: str, block: str) -> str:
    """The page with what is between its markers replaced; ends the run when it has not both, once, in order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise SystemExit(f"README.md wants one {BEGIN} and after it one {END}")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return f"{before}{BEGIN}\n{block}{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
