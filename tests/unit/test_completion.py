"""Help with examples that are true, exit codes where people look for them, and shells that know the values."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgepack import errors, profile
from edgepack.cli import SHELLS, cli

ROOT = Path(__file__).parents[2]


def commands(command: click.Command = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, (*path, name))


def examples(command: click.Command) -> list[str]:
    """The lines below "Examples:" in its help."""
    text = str(command.help)
    return [line.strip() for line in text.partition("Examples:\n")[2].splitlines() if line.strip()]


def parsed(words: list[str]) -> None:
    """Reads a command line to its end, and does nothing."""
    command: click.Command = cli
    context = click.Context(cli, info_name="edgepack")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_every_command_has_examples_that_parse(
    name: str, command: click.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "captured" / "jetson").mkdir(parents=True)  # the one that must be there for its line to parse
    monkeypatch.chdir(tmp_path)
    shown = examples(command)

    assert shown
    assert any(f"edgepack {name}" in re.sub(r" {2,}", " ", line) for line in shown)
    for line in shown:
        of_ours = [part for part in line.split(" | ") if part.startswith("edgepack ")]
        assert of_ours, line
        for part in of_ours:
            parsed(shlex.split(part.partition(" > ")[0])[1:])


def test_a_wrong_example_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        parsed(["plan", "--no-such-option"])


def test_the_help_ends_with_every_exit_code() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output

    listed = {int(code) for code in re.findall(r"^ +(\d+)  \S", text.partition("Exit codes:")[2], re.M)}
    kinds = errors.EdgepackError.__subclasses__()
    assert listed == {0, 1, *(kind.exit_code for kind in kinds)}
    assert all(str(kind.__doc__).splitlines()[0] in text for kind in kinds)


def offered(*words: str) -> list[str]:
    """What bash is told for a line whose last word is being written."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'edgepack'; from edgepack.cli import main; main()"],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "_EDGEPACK_COMPLETE": "bash_complete",
            "COMP_WORDS": shlex.join(["edgepack", *words]), "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (("pl",), {"plan"}),
        (("plan", "--profile", "jet"), {"jetson-orin", "jetson-orin-nano-8gb", "jetson-agx-thor"}),
        (("fit", "--scheme", "q4"), {"Q4_K_M"}),
        (("fit", "--scheme", "gptq-int4"), {"gptq-int4-g128"}),
        (("plan", "--runtime", ""), {"llama.cpp", "vllm", "onnx-genai", "transformers"}),
        (("plan", "--goal", ""), {"quality", "latency", "throughput", "context"}),
        (("build", "--model", "qwen2.5-1"), {"qwen2.5-1.5b-instruct"}),
        (("schema", "flash"), {"flash", "flash-status"}),
        (("doctor", "--symptom", "kil"), {"killed"}),
        (("completion", ""), {"bash", "zsh", "fish"}),
    ],
)
def test_values_are_offered(words: tuple[str, ...], some: set[str]) -> None:
    found = set(offered(*words))

    assert some <= found
    assert all(name.lower().startswith(words[-1].lower()) for name in found)


@pytest.mark.parametrize("shell", SHELLS)
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    script = CliRunner().invoke(cli, ["completion", shell]).output

    assert f"_EDGEPACK_COMPLETE={shell}_complete" in script


def test_bash_completes_a_profile(tmp_path: Path) -> None:
    """In a real bash, with the script it would load, and as it calls the function behind the TAB."""
    program = tmp_path / "edgepack"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "{tmp_path}/start.py" "$@"\n', encoding="utf-8")
    (tmp_path / "start.py").write_text(
        "import sys\nsys.argv[0] = 'edgepack'\nfrom edgepack.cli import main\nmain()\n", encoding="utf-8"
    )
    program.chmod(0o755)
    script = (
        'eval "$(edgepack completion bash)"; complete -p edgepack; '
        "COMP_WORDS=(edgepack plan --profile jet); COMP_CWORD=3; "
        "_edgepack_completion edgepack jet --profile; printf '%s\\n' \"${COMPREPLY[@]}\""
    )

    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    registered, *names = done.stdout.splitlines()
    assert "_edgepack_completion edgepack" in registered
    known = {name for found in map(profile.load, profile.names()) for name in (found.name, *found.aliases)}
    assert set(names) == {name for name in known if name.startswith("jet")}
