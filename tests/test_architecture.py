"""What must stay true of the whole: import order, exit codes, a light start, a README that does not lie."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgepack import errors
from edgepack.cli import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "edgepack"
README = (ROOT / "README.md").read_text(encoding="utf-8")

LEVELS = (
    {"errors", "server"},
    {"units"},
    {
        "faults",
        "settings",
        "ggufheader",
        "architectures",
        "parts",
        "shell",
        "workspace",
        "progress",
        "serde",
        "drawing",
        "screen",
    },
    {"profile", "modelspec", "l4t", "cache"},
    {"layouts", "students"},
    {"schemes"},
    {"runtimes"},
    {"memory", "speed", "degradation", "catalog"},
    {"allocation"},
    {"plan", "fit"},
    {"choice"},
    {"artifact", "evaluation"},
    {"toolchain", "hub", "probe", "calibration", "heldout", "record", "enrolled", "remote"},
    {"bundle", "check", "builders", "selftest", "quality", "scoring", "modelcard", "devices", "hostlogs"},
    {"pipeline", "tables", "run", "calibrate", "quantization", "distillation", "doctor", "flash"},
    {"report"},
    {"fleet", "swu", "registry"},
    {"documents"},
    {"cli"},
)
"""A module imports from its own row or an earlier one."""


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if module in names)


def imports(path: Path) -> set[str]:
    """Names of edgepack's own modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] != "edgepack":
                continue
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("edgepack.")}
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",)), ids=str
)
def test_modules_import_only_from_their_left(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if module in ("__init__", "device", "server"):
        beside = {"device"} if module == "device" else set()  # the zipapp holds both of its modules
        assert imports(path) <= beside, f"{path} must import nothing of edgepack"
        return
    late = {name for name in imports(path) if name != "device" and level(name) > level(module)}

    assert not late, f"{module} imports {late}"


def test_starting_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgepack.cli, edgepack.pipeline; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub', 'llama_cpp', 'rich', 'onnx', 'matplotlib'}))"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"


def test_every_error_has_its_own_exit_code_and_the_readme_lists_them() -> None:
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.EdgepackError)
    ]
    codes = {c.exit_code: c.__name__ for c in classes}

    listed = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", README, re.M)}

    assert len(codes) == len(classes)
    assert listed == codes


def test_every_command_has_help_with_an_example() -> None:
    for name, command in cli.commands.items():
        if isinstance(command, click.Group):
            continue
        assert command.help, name
        assert "edgepack " in command.help, name


def test_no_swallowed_errors_or_stubs() -> None:
    banned = re.compile(r"\|\| true|except:\s*$|NotImplementedError|trust_remote_code=True|shell=True", re.M)
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "templates").rglob("*.j2"), *(ROOT / "docker").rglob("*")]:
        if path.is_file():
            assert not banned.search(path.read_text(encoding="utf-8")), path
