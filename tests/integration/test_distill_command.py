"""`edgepack distill` and `build --distill` as their users run them: made, stopped, gone on with, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgepack import modelcard, workspace
from tests import checkpoints
from tests.documents import obeys

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PROSE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
SHORT = ("--jobs", 1, "--steps", 6, "--length", 64, "--batch", 4)


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "EDGEPACK_CACHE": str(cache)}


def edgepack(*words: object, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgepack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(cache))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of its own that shares only the compiled toolchain."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "toolchain").symlink_to(workspace.cache_root() / "toolchain")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.first_layers(tmp_path_factory.mktemp("models") / "teacher", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of prose, and conversations."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows: list[Mapping[str, object]] = [
        {"text": text} for text in PROSE[:24_000].split("\n\n") if len(text) > 80
    ]
    rows += [
        {"messages": [{"role": "user", "content": f"What is {n} and {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}, as everybody knows."}]}
        for n in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def student(
    teacher: Path, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    out = tmp_path_factory.mktemp("out") / "half"
    return edgepack(
        "distill",
        "--teacher",
        teacher,
        "--prune",
        "layers=0.5",
        "--data",
        data,
        *SHORT,
        "-o",
        out,
        cache=cache,
    )


def folder_of(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[0])


def test_a_student_is_a_whole_folder_with_its_card_and_is_better_than_it_began(
    student: subprocess.CompletedProcess[str],
) -> None:
    folder = folder_of(student)

    report = modelcard.of(folder)
    assert report is not None
    (held,) = report.held_out
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", modelcard.CURVES,
        modelcard.STEPS,
    }  # fmt: skip
    assert (report.prune, report.steps) == ("layers=1", 6), "shares are told as what they came to"
    assert report.targets < report.tokens, "prompts are not learned"
    assert held.after.nll.value < held.before.nll.value
    assert held.recovered is not None
    assert held.recovered.value > 0
    assert held.before.kl is not None
    assert held.after.kl is not None
    assert held.after.kl.value < held.before.kl.value
    assert modelcard.recovery(held) in student.stdout


def test_it_is_built_into_a_bundle_that_passes_its_check(
    student: subprocess.CompletedProcess[str], cache: Path, tmp_path: Path
) -> None:
    built = edgepack(
        "build", "--profile", "x86-laptop", "--model", folder_of(student), "--scheme", "Q8_0", "-o", tmp_path,
        cache=cache,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr

    checked = edgepack("check", built.stdout.strip(), cache=cache)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "passed" in checked.stdout.splitlines()[-1]


def test_an_earlier_student_goes_on_with_new_data_and_what_it_forgot_is_measured(
    student: subprocess.CompletedProcess[str], teacher: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new.jsonl"
    paragraphs = [text for text in PROSE[24_000:40_000].split("\n\n") if len(text) > 80]
    new.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs), encoding="utf-8")

    done = edgepack(
        "distill", "--teacher", teacher, "--student", folder_of(student), "--data", new, "--replay", data,
        "--replay-share", "0.4", *SHORT, "-o", tmp_path / "more", "--json", cache=cache,
    )  # fmt: skip

    report = modelcard.of(tmp_path / "more")
    assert done.returncode == 0, done.stderr
    assert obeys("distill", done.stdout)["report"]["replayed"] > 0
    obeys("student", (tmp_path / "more" / modelcard.NAME).read_bytes())
    assert report is not None
    assert [held.name for held in report.held_out] == ["data", "replay"]
    assert report.start is not None
    assert report.held_out[1].before.nll.value == pytest.approx(
        _of(folder_of(student)).held_out[0].after.nll.value, abs=1e-6
    )
    assert "What it was made with before:" in (tmp_path / "more" / "README.md").read_text(encoding="utf-8")


def _of(folder: Path) -> modelcard.Report:
    report = modelcard.of(folder)
    assert report is not None
    return report


def test_killed_while_it_trains_the_same_command_ends_with_the_same_bytes(
    student: subprocess.CompletedProcess[str], teacher: Path, data: Path, tmp_path: Path
) -> None:
    own, out = tmp_path / "cache", tmp_path / "half"
    words = ["distill", "--teacher", teacher, "--prune", "layers=0.5", "--data", data, *SHORT, "-o", out]
    command = [sys.executable, "-m", "edgepack", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(own)) as process:
        assert process.stderr is not None
        while not any('"step": 3' in log.read_text() for log in own.glob("distilled/runs/*/log.jsonl")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()

    done = edgepack(*words, cache=own)

    assert done.returncode == 0, done.stderr
    first = folder_of(student)
    assert "pruning" not in done.stderr
    for path in sorted(first.iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(
    teacher: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    done = edgepack(
        "distill", "--teacher", teacher, "--prune", "layers=1", "--data", data, *SHORT, "-o", tmp_path / "x",
        "--dry-run", "--json", cache=cache,
    )  # fmt: skip

    expected = obeys("distill", done.stdout)["expected"]
    assert done.returncode == 0, done.stderr
    assert expected["parameters"] < expected["teacher_parameters"]
    assert expected["kept_bytes"] > 64 * expected["targets"]
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_distilled_is_one_message_and_leaves_nothing(
    teacher: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n' * 3, encoding="utf-8")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    words = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda word: int(vocabulary[word]))[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    usual = ("--data", data, *SHORT)
    cut = tmp_path / "cut"
    shutil.copytree(ROOT / "edgepack" / "models" / "demo-half", cut)
    os.truncate(cut / "model.safetensors", 3_000_000)
    cases = [
        (("--student", cut, *usual), 2, "model.safetensors is truncated"),
        (("--prune", "layers=0.5", "--data", silent), 2, "no response tokens"),
        (("--student", other, *usual), 2, "the tokenizers of"),
        (("--student", "demo", *usual), 2, "nothing would become smaller"),
        (("--student", teacher, *usual), 2, "nothing would become smaller"),
        (("--prune", "depth=2", *usual), 2, "'depth' is not a dimension"),
        (("--prune", "layers=2", *usual), 2, "keeps everything"),
        (("--prune", "layers=1", "--data", tmp_path / "nothing.txt"), 3, "nothing.txt"),
        (("--prune", "layers=1", "--preset", "artikel", *usual), 3, "article"),
        (("--prune", "layers=1", "--lora", 4, "--full", *usual), 2, "exclude each other"),
        ((*usual,), 2, "nothing says what the student begins as"),
        (("--student", "demo-half", "--prune", "layers=1", *usual), 2, "exclude each other"),
    ]
    for given, code, said in cases:
        refused = edgepack("distill", "--teacher", teacher, *given, "-o", tmp_path / "none", cache=cache)

        assert refused.returncode == code, (given, refused.stderr)
        assert said in refused.stderr, (given, refused.stderr)
        assert "Traceback" not in refused.stderr
        assert refused.stdout == ""
        assert not (tmp_path / "none").exists()


def test_a_loss_that_is_no_number_names_the_step_and_the_rate(
    student: subprocess.CompletedProcess[str], teacher: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    refused = edgepack(
        "distill", "--teacher", teacher, "--prune", "layers=0.5", "--data", data, *SHORT, "--rate", 1e30,
        "--preset", "hard-labels", "-o", tmp_path / "none", cache=cache,
    )  # fmt: skip

    assert folder_of(student).is_dir()
    assert refused.returncode == 9, refused.stderr
    assert "step" in refused.stderr
    assert "--rate" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()


def test_a_build_makes_its_student_and_the_bundle_passes(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    built = edgepack(
        "build", "--profile", "x86-laptop", "--teacher", teacher, "--distill", "--data", data, "--jobs", 1,
        "--steps", 4, "--scheme", "Q8_0", "-o", tmp_path, cache=cache,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr

    checked = edgepack("check", built.stdout.strip(), cache=cache)

    plan = json.loads(next(tmp_path.glob("*.plan.json")).read_text(encoding="utf-8"))
    assert "student  " in built.stderr
    assert plan["model"]["lesson"] is None
    (card,) = tmp_path.glob("*/README.md")
    inspected = edgepack("inspect", built.stdout.strip(), "--json", cache=cache)
    assert modelcard.NAME in inspected.stdout
    assert _of(card.parent).prune == "layers=1"
    assert plan["model"]["teacher"] == "teacher"
    assert checked.returncode == 0, checked.stdout + checked.stderr
