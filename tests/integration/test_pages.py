"""The commands of README.md and docs/ run, in their order, and print what the pages say that they print."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgepack.cli import cli
from tests import pages
from tests.pages import PAGES, ROOT, Command
from tests.unit.test_calibrate import bench

pytestmark = pytest.mark.integration

DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.md"

INSTEAD = {
    # a real model of gigabytes: the built-in one
    r"\./Qwen2\.5-1\.5B-Instruct": "demo",
    r"--model qwen2\.5-7b-instruct --key": "--model demo --key",
    r"--model acme/acme-1b --revision [0-9a-f]{40}": "--model demo",
    # the bundles of those, and of another architecture: this machine's
    r"out/qwen2\.5-[\w.-]+-jetson-orin-nano-8gb\.tar": "out/demo.tar",
    r"out/demo-q8_0-raspberry-pi-5-8gb\.tar": "out/demo.tar",
    r"demo-out/demo-q6_k-this-machine\.tar": "out/demo.tar",
    # a static server for another architecture: out/demo.tar has one for this machine
    r"(--profile raspberry-pi-5-8gb .*) --with-runtime": r"\1",
    # a device over ssh: a store on this disk (tests/integration/test_flash.py has a real sshd)
    r"\bme@kiosk": "./devices/kiosk",
    r"\bme@jetson": "./devices/jetson",
    r"\bpi@raspberrypi": "./devices/pi",
    r" /media/card/": " ./card/",
    r"--enroll": "--enroll --mode none",
    r" --sudo": "",
    # a key that is not there yet
    r"key new (~/\.ssh/edgepack|signing-key)": "key new fresh",
}
"""Patterns of what is said, and what is run in its place. Nothing else differs."""

NOT_RUN: dict[str, tuple[str, ...]] = {
    "makes an environment, from an index of packages (CI does, and `make demo` and `make test` are its jobs)": (
        "make demo",
        "make test",
        "python3 -m venv .venv",
        ". .venv/bin/activate",
        "pip install -e '.[build]'",
        "pip install 'edgepack[fleet]'",
        "pip wheel -w wheels/ '.[build]'",
        "pip install --no-index --find-links wheels/ 'edgepack[build]'",
    ),
    "wants a registry (tests/integration/test_fleet.py has one)": (
        "skopeo copy oci-archive:out/demo.tar docker://registry.example.org/edge/demo:7",
        "skopeo copy oci:signature docker://registry.example.org/edge/demo:7.sshsig",
        "skopeo copy docker://registry.example.org/edge/demo:7 dir:pulled",
        "skopeo copy docker://registry.example.org/edge/demo:7.sshsig dir:pulled-signature",
        "edgepack emit --tar pulled pulled-signature -o demo.tar",
        "edgepack flash demo.tar pi@raspberrypi",
    ),
    "wants devices that ssh reaches (tests/integration/test_fleet.py, test_flash.py)": (
        "edgepack flash out/demo-q8_0-raspberry-pi-5-8gb.tar --inventory hosts.ini",
        "edgepack flash out/demo-a.tar out/demo-b.tar --inventory hosts.ini --dry-run",
        "edgepack flash out/demo-a.tar out/demo-b.tar --inventory hosts.ini -o report.json",
        "edgepack flash out/demo-a.tar --inventory hosts.ini --limit raspberry_pi_5_8gb",
        "edgepack calibrate --profile kiosk.yaml --on me@kiosk out/small.tar out/large.tar -o kiosk-calibrated.yaml",
    ),
    "quantizes or calibrates for minutes (tests/integration/test_quantize.py, test_gptq.py, test_quality.py)": (
        "edgepack build --profile jetson-orin --model demo --calibration mine.jsonl --max-ppl-loss 2% -o out/",
        "edgepack quantize --model demo --scheme gptq-int4-g128 --calibration mine.jsonl -o out/",
        "edgepack quality out/demo-gptq-int4-g128 --against demo --tasks questions.jsonl",
        "edgepack quantize --model ./my-model --preset article --calibration chats.jsonl --max-ppl-loss 2% -o out/",
        "edgepack quantize --model ./my-model --scheme gptq-int4-g128 --calibration chats.jsonl -o out/",
        "edgepack quantize --model ./my-model --scheme onnx-int4 --profile consumer-8gb --context 8192 -o out/",
        "edgepack quantize --model ./my-model --scheme IQ3_XXS --calibration chats.jsonl -o out/",
        "edgepack quality out/my-model-gptq-int4-g128 --against ./my-model --text held-out.jsonl "
        "--tasks questions.jsonl",
        "edgepack build --profile raspberry-pi-5-8gb --model ./my-model --calibration chats.jsonl --quality-text "
        "held-out.jsonl --max-ppl-loss 2% -o out/",
    ),
    "teaches a student (tests/integration/test_distill_command.py, test_student_bundle.py)": (
        "edgepack distill --teacher demo --prune layers=0.5 --data mine.jsonl -o half/",
        "edgepack build --profile raspberry-pi-5-4gb --teacher demo --distill --data mine.jsonl -o out/",
        "edgepack distill --teacher ./my-7b --student ./my-0.5b --data chats.jsonl -o student/",
        "edgepack distill --teacher ./my-model --prune layers=0.5 --data domain.txt --steps 2000 -o half/",
        "edgepack distill --teacher ./my-model --profile jetson-orin --data chats.jsonl --steps 2000",
        "edgepack build --profile jetson-orin --teacher ./my-model --distill --data chats.jsonl -o out/",
    ),
    "serves with a runtime in Python (tests/integration/test_served_bundles.py)": (
        "edgepack build --profile x86-laptop --model demo --runtime onnx-genai -o out/",
        "edgepack check out/demo-onnx-int8-onnx-genai-x86-laptop-ddr5.tar",
        "edgepack build --profile x86-laptop --model demo --runtime transformers --scheme bf16 -o out/",
    ),
    "wants QEMU and a compiler for arm64 (tests/integration/test_arm.py)": (
        "edgepack check out/demo-q8_0-raspberry-pi-5-8gb.tar --emulate",
    ),
    "runs llama-bench on two models (tests/integration/test_calibrate.py)": (
        "edgepack calibrate --profile this-machine.yaml --run -o calibrated.yaml",
    ),
}
"""Commands that are only parsed (tests/unit/test_pages.py), and why."""

SKIPPED = {command for commands in NOT_RUN.values() for command in commands}
PURE = ("edgepack plan", "edgepack fit")
"""Arithmetic: what these print is the same on every machine."""
READ_ONLY = (*PURE, "edgepack check", "edgepack inspect")


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    printed: str
    """All that a terminal shows."""
    stdout: str


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a key, a signed bundle for this machine, enrolled devices."""
    place = tmp_path_factory.mktemp("world")
    edgepack(place, "key", "new", "key")
    ssh = place / "home" / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    (place / "demo-out").mkdir()
    for name in ("signing-key", "home/.ssh/edgepack", "demo-out/signing-key"):
        for suffix in ("", ".pub", ".allowed_signers"):
            shutil.copy(place / f"key{suffix}", place / f"{name}{suffix}")
    edgepack(place, "probe", "-o", "this-machine.yaml")
    edgepack(
        place, "build", "--profile", "this-machine.yaml", "--model", "demo", "--scheme", "Q6_K", "--with-runtime",
        "--key", "key", "-o", "out",
    )  # fmt: skip
    (place / "out" / "demo-q6_k-this-machine.tar").rename(place / "out" / "demo.tar")
    for name in ("demo-a.tar", "demo-b.tar"):
        shutil.copy(place / "out" / "demo.tar", place / "out" / name)
    for name in ("kiosk", "jetson", "pi"):
        signers = str(place / "key.allowed_signers")
        edgepack(place, "flash", "--enroll", "--mode", "none", "--signers", signers, f"./devices/{name}")
    shutil.copytree(ROOT / "edgepack" / "models" / "demo", place / "my-model")
    shutil.copytree(ROOT / "tests" / "captures" / "jetson-orin-nano-8gb", place / "captured" / "jetson")
    (place / "kiosk.yaml").write_text(pages.yaml_blocks(DOCS / "own-device.md")[0], encoding="utf-8")
    (place / "my-device.yaml").write_text(pages.yaml_blocks(ROOT / "README.md")[0], encoding="utf-8")
    (place / "my-models.yaml").write_text(pages.yaml_blocks(DOCS / "own-model.md")[0], encoding="utf-8")
    (place / "config.json").write_text('{"model_type": "rwkv7", "hidden_size": 64}', encoding="utf-8")
    board = {"backends": "CUDA", "gpu_info": "Orin"}
    readings = [
        *bench("qwen2.5-0.5b-instruct", 60.0, 900.0, **board),
        *bench("llama-3.2-3b-instruct", 17.0, 400.0, **board),
    ]
    (place / "bench.json").write_text(json.dumps(readings), encoding="utf-8")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-nodes", "-days", "2", "-subj", "/CN=fleet",
         "-addext", "extendedKeyUsage=emailProtection", "-keyout", "fleet.key", "-out", "fleet.crt"],
        cwd=place, check=True, capture_output=True,
    )  # fmt: skip
    return place


def edgepack(place: Path, *words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "edgepack", "-q", *words], cwd=place, check=True, env=environment(place)
    )


def environment(place: Path) -> dict[str, str]:
    """The user's, with a home and a Hub's cache of its own; edgepack's cache stays, for the toolchain is there."""
    programs = place / "bin"
    if not programs.exists():
        programs.mkdir()
        program = programs / "edgepack"
        program.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m edgepack "$@"\n', encoding="utf-8"
        )
        program.chmod(0o755)
    return {
        **os.environ,
        "EDGEPACK_CACHE": os.environ.get("EDGEPACK_CACHE", str(Path.home() / ".cache" / "edgepack")),
        "HOME": str(place / "home"),
        "HF_HOME": str(place / "hub"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_COLOR": "1",
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
    }


def substituted(text: str) -> str:
    for said, instead in INSTEAD.items():
        text = re.sub(said, instead, text)
    return text


def compare(command: Command, printed: str) -> None:
    where = f"{command.page}: $ {command.text}\n{printed}"
    # A check of another bundle of the same kind has the same rows.
    same = substituted(command.text) == command.text or command.text.startswith("edgepack check")
    if command.shown and same:
        line = pages.missing(command.shown, printed, figures=command.text.startswith(PURE))
        assert line is None, f"not printed: {line}\n{where}"


@pytest.fixture(scope="module")
def ran() -> dict[str, Outcome]:
    """What was asked before and changes nothing, so that two pages may say it for the price of one."""
    return {}


RUN = [
    page
    for page in PAGES
    if page != TUTORIAL and any(command.text not in SKIPPED for command in pages.commands(page))
]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, world: Path, ran: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = pages.commands(page)
    place = shutil.copytree(world, tmp_path / "place")
    monkeypatch.chdir(place)
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    status = 0
    for at, command in enumerate(commands):
        if command.text in SKIPPED:
            continue
        if command.text == "echo $?":
            assert command.shown == (str(status),), f"{page.name}: after {commands[at - 1].text}"
            continue

        outcome = run(substituted(command.text), ran)

        compare(command, outcome.printed)
        status = outcome.status
        if [follower.text for follower in commands[at + 1 : at + 2]] != ["echo $?"]:
            assert status == 0 or "does NOT fit" in outcome.printed, (
                f"{command.text}: {status}\n{outcome.printed}"
            )


def run(text: str, ran: dict[str, Outcome]) -> Outcome:
    said, _, into = text.partition(" > ")
    if into:
        outcome = run(said, ran)
        Path(into).write_text(outcome.stdout, encoding="utf-8")
        return outcome
    words = [str(Path(word).expanduser()) if word.startswith("~") else word for word in shlex.split(text)]
    if words[0] != "edgepack":
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout + done.stderr, done.stdout)
    if text not in ran or not text.startswith(READ_ONLY):
        result = CliRunner().invoke(cli, words[1:])
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            f"{text}: {result.exception!r}"
        )
        ran[text] = Outcome(result.exit_code, result.output, result.stdout)
    return ran[text]


def test_the_tutorial_runs_as_a_newcomers_shell_session(tmp_path: Path) -> None:
    commands = [command for command in pages.commands(TUTORIAL) if command.text not in SKIPPED]
    lines = ["status=0"]
    for command in commands:
        lines += ["echo '$ '", "(exit $status)", command.text, "status=$?"]

    session = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=tmp_path, env=environment(tmp_path), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    printed = session.stdout.split("$ \n")[1:]
    assert len(printed) == len(commands) >= 20
    for command, text in zip(commands, printed, strict=True):
        compare(command, text)
    digests = [line for text in printed for line in text.splitlines() if line.startswith("model.gguf")]
    assert digests[0].split() in [line.split() for command in commands for line in command.shown]


def test_what_is_not_run_and_what_is_run_instead_is_in_the_pages() -> None:
    texts = {command.text for page in PAGES for command in pages.commands(page)}

    assert sorted(SKIPPED - texts) == []
    assert [said for said in INSTEAD if not any(re.search(said, text) for text in texts)] == []
