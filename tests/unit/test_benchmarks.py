"""The arithmetic and the tables of the comparisons with peers; what they measure is measured elsewhere."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import comparison
import memory
import pack
import peers
import run as bench
import serve_load
import serving
from comparison import Figure, Peer, Row

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEER = Peer(name="other", version="1.2", command="other FILE")
CASE = memory.Case(
    folder="folder", file="model.gguf", scheme="Q8_0", context=512, kv_type="f16", parameters=1000, layers=2,
    hidden=64, heads=4, kv_heads=2, head_dim=16,
)  # fmt: skip
SCRIPTS = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if "\nif __name__ ==" in path.read_text(encoding="utf-8")
)


def test_the_ratio_is_of_each_round_not_of_the_medians() -> None:
    row = comparison.of("x", "s", "less", PEER, [1.0, 10.0, 3.0], [2.0, 2.0, 30.0], why="slow")

    assert row.ratio is not None
    assert row.ratio.value == 0.5
    assert (row.ratio.low, row.ratio.high) == (0.1, 5.0)
    assert row.rounds == 3


def test_the_interval_holds_the_median_and_is_the_same_each_time() -> None:
    values = [1.0 + 0.01 * number for number in range(41)]

    figure = comparison.middle(values)

    assert figure.value == pytest.approx(1.2)
    assert 1.1 < figure.low < 1.19
    assert 1.21 < figure.high < 1.3
    assert figure == comparison.middle(values)


def test_no_rounds_are_no_figure() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        comparison.middle([])


@pytest.mark.parametrize(
    ("better", "ours", "verdict"),
    [
        ("less", [1.0, 1.1], "edgepack"),
        ("more", [1.0, 1.1], "peer"),
        ("less", [3.0, 3.1], "peer"),
        ("more", [3.0, 3.1], "edgepack"),
        ("less", [1.0, 3.0], "level"),
        ("more", [1.0, 3.0], "level"),
    ],
)
def test_only_a_whole_interval_decides_who_is_ahead(better: str, ours: list[float], verdict: str) -> None:
    row = comparison.of(
        "x", "s", "less" if better == "less" else "more", PEER, 3 * ours, [2.0] * 6, why="because"
    )

    assert comparison.ahead(row) == verdict
    assert row.note == ("" if verdict == "edgepack" else "because")


@pytest.mark.parametrize(
    ("rounds", "verdict"), [(1, "edgepack"), (2, "too few rounds"), (4, "too few rounds")]
)
def test_no_verdict_is_of_a_few_rounds(rounds: int, verdict: str) -> None:
    row = comparison.of("x", "s", "less", PEER, [1.0] * rounds, [2.0] * rounds, why="because")

    assert comparison.ahead(row) == verdict


def test_two_intervals_that_overlap_are_level() -> None:
    ours, theirs = Figure(value=1.0, low=0.8, high=1.3), Figure(value=1.4, low=1.2, high=1.6)

    row = comparison.figures("x", "nats", "less", PEER, ours, theirs, note="n", why="because")

    assert row.ratio is not None
    assert row.ratio.low == 0.5
    assert row.ratio.high == pytest.approx(1.3 / 1.2)
    assert comparison.ahead(row) == "level"
    assert row.note == "n; because"


def test_of_several_peers_the_hardest_to_beat_is_told() -> None:
    def row(what: str, ours: float, theirs: float, better: Literal["less", "more"] = "less") -> Row:
        return comparison.exactly(what, "bytes", better, PEER, ours, theirs, why="")

    missing = comparison.absent("a", "bytes", "less", PEER, "not installed")
    lone = comparison.absent("c", "bytes", "less", PEER, "not installed")
    near, far = row("a", 9, 10), row("a", 1, 10)
    faster, slower = row("b", 20, 10, "more"), row("b", 20, 30, "more")

    assert comparison.hardest([missing, far, near, faster, slower, lone]) == [near, slower, lone]


def test_the_short_table_names_the_whole_one() -> None:
    weak, strong = replace(PEER, name="weak"), replace(PEER, name="strong")
    rows = [
        comparison.exactly("x", "bytes", "less", peer, 5, size, why="w")
        for peer, size in ((weak, 9), (strong, 6))
    ]
    results = replace(_results(rows[0]), rows={bench.COMPARISONS[0]: tuple(rows)})

    assert "weak" in bench.markdown(results)
    assert "weak" not in bench.short(results)
    assert "strong" in bench.short(results)
    assert "[all 2 rows](benchmarks/RESULTS.md)" in bench.short(results)


def test_rounds_take_turns_at_going_first() -> None:
    called: list[str] = []

    def one(name: str) -> float:
        called.append(name)
        return float(len(called))

    ours, theirs = comparison.paired(3, lambda: one("ours"), lambda: one("theirs"))

    assert called == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (ours, theirs) == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])


def test_a_missing_peer_stays_in_every_table_with_its_reason() -> None:
    results = _results(comparison.absent("plan", "ms", "less", PEER, "no such | package"))

    assert "no such | package" in bench.text(results)
    assert "| plan | - | other 1.2 | - | - | not compared (1) |" in bench.markdown(results)
    assert "1. No such | package." in bench.markdown(results)


def test_figures_are_shown_in_their_unit() -> None:
    row = comparison.of("pack", "MiB", "less", PEER, [2**20] * 5, [2**22] * 5, why="")

    assert comparison.cells(row) == (
        "pack",
        "1 MiB",
        "other 1.2",
        "4 MiB",
        "0.25 [0.25, 0.25], n = 5",
        "edgepack",
    )


def test_bytes_have_no_spread_to_show() -> None:
    row = comparison.exactly("wire", "bytes", "less", PEER, 5000, 4000, why="it does more")

    assert comparison.cells(row)[1:5] == ("5,000 B", "other 1.2", "4,000 B", "1.25")
    assert comparison.ahead(row) == "peer"


def test_results_are_read_as_they_were_written() -> None:
    results = _results(comparison.of("x", "s", "less", PEER, [1.0, 2.0], [2.0, 2.0], why="w"))

    assert bench.read(json.loads(bench.document(results))) == results


def test_the_readme_changes_between_its_markers_alone() -> None:
    page = f"a\n{bench.BEGIN}\nold\n{bench.END}\nb\n"

    assert bench.with_block(page, "new\n") == f"a\n{bench.BEGIN}\nnew\n{bench.END}\nb\n"


@pytest.mark.parametrize(
    "page", ["", bench.BEGIN, f"{bench.END}{bench.BEGIN}", 2 * (bench.BEGIN + bench.END)]
)
def test_a_readme_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(SystemExit, match="README"):
        bench.with_block(page, "new\n")


@pytest.mark.parametrize("load", [0.1, 4.0])
def test_a_busy_machine_is_named(load: float) -> None:
    results = _results(comparison.exactly("x", "bytes", "less", PEER, 1, 2, why=""), load=load)

    assert ("the machine was busy" in bench.heading(results)) == (load > bench.QUIET)


def test_what_packs_in_the_comparison_packs(tmp_path: Path) -> None:
    content = b"weights"
    (tmp_path / "weights").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()

    comparison.seconds([sys.executable, "-c", pack.PACK, tmp_path / "weights", tmp_path / "out.tar", digest])

    with tarfile.open(tmp_path / "out.tar") as out:
        assert f"blobs/sha256/{digest}" in out.getnames()


@pytest.mark.parametrize("estimate", [memory._fit_params, memory._modelinfo])
def test_a_program_that_says_something_else_has_no_estimate(
    estimate: memory.Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_said", lambda command: "Weights in another form: 3\n")
    monkeypatch.setattr(peers, "program", lambda name: Path(name))

    with pytest.raises(memory.NoEstimate, match="another form"):
        estimate(CASE)


def test_an_estimate_is_the_sum_of_what_a_program_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "program", lambda name: Path(name))
    monkeypatch.setattr(memory, "_said", lambda command: "Host 1 2 3\nCUDA0 10 20 30\n")
    assert memory._fit_params(CASE) == 66 * 2**20

    said = "Weights:    1.5 MB\nKV Cache:   2 KB (at 512)\nOverhead:   1 GB\n"
    monkeypatch.setattr(memory, "_said", lambda command: said)
    assert memory._modelinfo(CASE) == 1.5 * 2**20 + 2 * 2**10 + 2**30


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--only", "pack"], "without plan_latency, build"),
        (["--from", "earlier.json"], "without plan_latency, build"),
    ],
)
def test_part_of_the_comparisons_does_not_replace_the_table(
    words: list[str],
    without: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    results = _results(comparison.exactly("x", "bytes", "less", PEER, 1, 2, why=""))
    Path("earlier.json").write_text(bench.document(results), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--update-readme"])

    with pytest.raises(SystemExit) as ended:
        bench.main()

    assert ended.value.code == 2
    assert without in capsys.readouterr().err


def test_a_comparison_that_fails_keeps_its_rows_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three, the second ends with an error after its first row; what there is is told after each."""
    row = comparison.exactly("x", "bytes", "less", PEER, 1, 2, why="")
    code = f"""
import json, sys
from pathlib import Path
from typing import Literal
option, out = sys.argv[3:]
Path(out).write_text(json.dumps([] if option == "--peers" else [json.loads({json.dumps(asdict(row))!r})]))
if option == "--json" and Path(sys.argv[0]).stem == "pack":
    sys.exit("no disk")
"""
    for name in ("plan_latency", "pack", "build"):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(bench, "HERE", tmp_path)

    first, _, last = bench.run(["plan_latency", "pack", "build"], tmp_path)

    assert first.rows == {"plan_latency": (row,)}
    assert "pack ended early: the run was ended before it" in bench.text(first)
    assert last.rows == dict.fromkeys(("plan_latency", "pack", "build"), (row,))
    assert last.failed == {"pack": "no disk"}
    assert "| the rest | - | - | not compared (1) | `python benchmarks/pack.py` |" in bench.markdown(last)
    assert "1. Pack ended early: no disk." in bench.markdown(last)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_every_benchmark_is_run_or_named() -> None:
    named = {command.split(".py")[0] for command in bench.LONGER}

    assert {*bench.COMPARISONS, *named, "run"} == set(SCRIPTS)


def _results(row: Row, load: float = 0.1) -> bench.Results:
    return bench.Results(
        date="2030-01-02", machine="a machine", software="edgepack", load=load, seconds=60,
        peers={"pack": (PEER,)}, rows={"pack": (row,)}, failed={},
    )  # fmt: skip


# ── servers under load ──


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("edgepack_requests_running 2\nedgepack_queue_depth 5\n", 7),
        ("# HELP x y\nllamacpp:requests_processing 1\nllamacpp:requests_deferred 0\n", 1),
        (
            'vllm:num_requests_running{engine="0",model_name="demo"} 0.0\n'
            'vllm:num_requests_waiting{engine="0",model_name="demo"} 3.0\n',
            3,
        ),
        ("process_resident_memory_bytes 1e9\n", None),
    ],
)
def test_what_runs_and_waits_is_read_by_the_names_of_every_server(page: str, found: float | None) -> None:
    assert serve_load.requests_in(page) == found


@pytest.mark.parametrize(
    ("status", "message", "refusal"),
    [
        (429, "2 requests run and 2 wait: the queue is full", True),
        (503, "The engine is currently busy and cannot accept new requests. Please try again later.", True),
        (503, "the server is stopping", False),
        (500, "The engine is currently busy", False),
    ],
)
def test_a_full_queue_is_a_refusal_and_a_server_that_stops_is_none(
    status: int, message: str, refusal: bool
) -> None:
    assert serve_load.is_refusal(status, message) is refusal


LOADED = {
    "clients": 32, "seconds": 120, "answered": 900, "left": 0, "refused": {"429": 4}, "errors": {},
    "tokens_per_second": 123.4, "first_token_ms": {"p50": 1234.0, "p95": 2000.0, "p99": 3.0},
    "between_tokens_ms": {"p50": 1.234, "p95": 2.0, "p99": 3.0}, "whole_ms": {},
    "rss_mib": {"start": 100.4, "first_quarter": 1.0, "last_quarter": 1.0, "peak": 110.0, "end": 101.0},
    "idle_at_end": True,
}  # fmt: skip


def test_a_load_is_a_row_and_a_runtime_that_is_not_there_is_told() -> None:
    found = serving.Results(
        date="2026-01-02", machine="a CPU", software="edgepack", load=0.1, seconds=600,
        runtimes={
            "onnx-genai": serving.Measured(
                planned=100 * 2**20, loads={"staying": LOADED}, ratios=[0.9, 1.0, 1.1], processor=[1.0] * 3
            ),
            "vllm": serving.Measured(failed="not measured: no --vllm PYTHON"),
        },
    )  # fmt: skip

    page = serving.markdown(found)

    row = (
        "| onnx-genai | 32 staying, 120 s | 900 | 0 | 4 (429) | 0 | 123.4 | 1,234 / 2,000 | 1.2 / 2.0 | - | "
        "100, 101, 110 |"
    )
    assert row in page
    assert "| onnx-genai | 3 | 1.000 [0.900, 1.100] | 1.000 [1.000, 1.000] |" in page
    assert "- vllm: not measured: no --vllm PYTHON" in page
    assert [serving.broken(one) for one in found.runtimes.values()] == [False, True]


def test_what_a_client_met_beside_answers_and_refusals_fails_the_run() -> None:
    wrong = ({**LOADED, "errors": {"APIError: x": 1}}, {**LOADED, "idle_at_end": False})

    assert [serve_load.failed(load) for load in (LOADED, *wrong)] == [False, True, True]
