"""Text for people: untouched in a pipe, within the width on a terminal, and never in color alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack import bundle, calibrate, check, doctor, pipeline, profile, serde, tables
from edgepack.errors import NothingFits
from edgepack.plan import Request
from edgepack.progress import Silent
from edgepack.screen import PLAIN, Screen
from tests import releases
from tests.plans import example_plan

ROOT = Path(__file__).parents[2]
WIDTHS = (60, 80, 100, 120)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
words = st.lists(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12), max_size=30
)
FIT = {
    "model": "qwen2.5-7b-instruct", "profile": "laptop-gpu", "scheme": "Q8_0", "slots": 1, "ubatch": 512,
    "imatrix": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What each command has to say, before it is laid out."""
    facts = ROOT / "tests" / "cases" / "check" / "qwen2.5-0.5b-q8_0.facts.json"
    report = check.evaluate(
        example_plan(releases.PROFILE), check.facts_from(serde.read_json(facts), source=facts.name)
    )
    path = releases.bundle(tmp_path_factory.mktemp("bundle") / "b.tar", None)
    return {
        "plan": example_plan(releases.PROFILE),
        "chosen": pipeline.make_plan(
            Request(profile=profile.load("jetson-orin")), pipeline.candidates(None, None)
        ),
        "fit": pipeline.fit_document(FIT, Silent()),
        "check": report,
        "inspect": bundle.inspect(path),
        "profiles": [profile.load(name) for name in profile.names()],
        "profile": profile.load("jetson-orin"),
        "doctor": doctor.examine(ROOT / "tests" / "data" / "logs" / "rolled-back.txt"),
        "calibrate": calibrate.Calibration(
            profile=profile.load("jetson-orin"),
            power_mode="25W",
            constants=profile.SpeedConstants(decode_efficiency=0.7, layer_overhead_us=100.0),
            residuals=tuple(
                calibrate.Residual(
                    where=f"{name}.json", model=name, scheme="Q4_K_M", decode=20.0, predicted=19.0
                )
                for name in ("qwen2.5-0.5b-instruct", "DeepSeek-R1-Distill-Qwen-1.5B-abliterated")
            ),
            refused=(
                calibrate.Refused(where="third.json", reason="the machine was busy (load 4.2 on 4 cores)"),
            ),
            warnings=("one model alone does not tell what the memory gives from what a layer costs",),
        ),
    }


def laid_out(name: str, pages: dict[str, object], screen: Screen) -> str:
    page = pages[name]
    made = {
        "plan": lambda: tables.plan(page, None, screen),  # type: ignore[arg-type]  # by its name
        "chosen": lambda: tables.plan(page, None, screen) + tables.pareto(page, screen),  # type: ignore[arg-type]
        "fit": lambda: tables.fit(page, screen),  # type: ignore[arg-type]
        "check": lambda: check.table(page, screen),  # type: ignore[arg-type]
        "inspect": lambda: tables.inspect(page, screen),  # type: ignore[arg-type]
        "profiles": lambda: tables.profiles(page, screen),  # type: ignore[arg-type]
        "profile": lambda: tables.profile(page, screen),  # type: ignore[arg-type]
        "doctor": lambda: doctor.table(page, screen),  # type: ignore[arg-type]
        "calibrate": lambda: calibrate.table(page, screen),  # type: ignore[arg-type]
    }
    return made[name]()


NAMES = ("plan", "chosen", "fit", "check", "inspect", "profiles", "profile", "doctor", "calibrate")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_wider_than_the_terminal(name: str, width: int, pages: dict[str, object]) -> None:
    lines = laid_out(name, pages, Screen(width=width)).splitlines()

    assert [line for line in lines if len(line) > width] == []


@pytest.mark.parametrize("name", NAMES)
def test_color_changes_nothing_but_the_color(name: str, pages: dict[str, object]) -> None:
    colored = laid_out(name, pages, Screen(width=80, color=True))

    assert ANSI.search(colored)
    assert ANSI.sub("", colored) == laid_out(name, pages, Screen(width=80))


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_gets_lines_as_they_are(name: str, pages: dict[str, object]) -> None:
    piped = laid_out(name, pages, PLAIN)

    assert not ANSI.search(piped)
    assert all(line == line.rstrip() for line in piped.splitlines())


@pytest.mark.parametrize("name", ["check", "profiles", "profile", "fit", "doctor", "calibrate"])
def test_narrow_and_wide_say_the_same_words(name: str, pages: dict[str, object]) -> None:
    def said(screen: Screen) -> set[str]:
        text = laid_out(name, pages, screen)
        return {word for word in re.findall(r"[A-Za-z][\w.-]*", text) if len(word) > 2}

    missing = said(PLAIN) - said(Screen(width=80))

    assert missing == set()


def test_a_bar_is_as_wide_as_there_is_room_and_says_its_signs(pages: dict[str, object]) -> None:
    found = {
        width: max(laid_out("fit", pages, Screen(width=width)).splitlines(), key=lambda line: line.count("█"))
        for width in WIDTHS
    }

    assert found[60].count("█") < found[80].count("█")
    assert "!" in found[80], "over the budget"
    assert "█ weights, ▒ kv_cache" in laid_out("fit", pages, Screen(width=80))


@given(words, st.integers(20, 120))
def test_a_line_keeps_its_words_in_order(given: list[str], width: int) -> None:
    text = " ".join(["name", "  ", *given])

    parts = Screen(width=width).line(text)

    assert all(len(part) <= width for part in parts)
    assert " ".join(parts).split() == text.split()


@given(st.lists(st.tuples(*[words.map(" ".join)] * 3), min_size=1, max_size=6), st.integers(40, 100))
def test_a_table_keeps_its_words_and_its_width(rows: list[tuple[str, str, str]], width: int) -> None:
    lines = Screen(width=width).columns([("a", "b", "c"), *rows])

    assert all(len(line) <= width for line in lines)
    assert sorted("".join(lines).replace(" ", "")) == sorted(
        "abc" + "".join("".join(r) for r in rows).replace(" ", "")
    )


@pytest.mark.parametrize(
    ("more", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_has_its_width_and_NO_COLOR_counts(more: dict[str, str], colored: bool) -> None:
    environment = {**os.environ, "COLUMNS": "70", "TERM": "xterm", "PYTHONPATH": str(ROOT), **more}
    if "NO_COLOR" not in more:
        environment.pop("NO_COLOR", None)
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "edgepack", "profiles", "show", "jetson-orin"]
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # so Linux says that a terminal has no writer left
            while piece := os.read(ours, 4096):
                said += piece
        process.wait()
    os.close(ours)

    text = said.decode()
    assert bool(ANSI.search(text)) is colored
    assert max(len(ANSI.sub("", line)) for line in text.splitlines()) <= 70
    assert "budget     headless" in text


def test_a_terminal_that_has_not_the_signs_gets_others() -> None:
    words = ("fit", "--model", "qwen2.5-7b-instruct", "--profile", "laptop-gpu", "--scheme", "Q8_0")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}

    done = subprocess.run(
        [sys.executable, "-m", "edgepack", *words], env=environment, capture_output=True, check=False
    )

    assert done.returncode == NothingFits.exit_code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"[??????" in done.stdout


def test_a_check_that_passed_has_a_bar_within_its_edge(pages: dict[str, object]) -> None:
    shown = laid_out("check", pages, Screen(width=80))

    assert " measured, of up to " in shown
    assert "█ weights" in shown


def test_what_a_bundle_says_of_itself_cannot_repaint_the_terminal() -> None:
    notes = {
        "org.edgepack.note": "\x1b[2J\x1b[Hsignature  verified",
        "org.edgepack.weights-bytes": "9" * 5000,
    }
    told = bundle.Inspected(
        path="b.tar", name="b\x07", manifest_digest="sha256:00", bytes=1, annotations=notes, quality=None,
        signature=bundle.Signature(state="unsigned", principal=None, key=None, message="not signed"),
        files=(bundle.InspectedFile(path="plan.json", bytes=1, digest="sha256:" + "0" * 64),),
    )  # fmt: skip
    for screen in (Screen(), Screen(width=80)):
        text = tables.inspect(told, screen)

        assert "\x1b" not in text and "\x07" not in text
        assert "signature  verified" in text  # there, and harmless
