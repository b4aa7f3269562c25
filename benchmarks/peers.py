"""Where the peers come from: the pinned llama.cpp, Debian's programs, and packages in an environment of their own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison import Peer

from edgepack import toolchain, workspace
from edgepack.errors import EdgepackError
from edgepack.progress import Terminal

LLAMA_VERSION = f"{toolchain.LLAMA_VERSION} ({toolchain.COMMIT[:9]})"

CONVERTER = """
import runpy, sys
from pathlib import Path
script, known_as = sys.argv[1:3]
sys.path.insert(0, str(Path(script).parent))
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: known_as
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""
"""convert_hf_to_gguf.py knows tokenizers by a hash of what they do, and refuses one that is not in its table; the name
that its message asks for is given here, and nothing else is changed."""


def llama_cpp(program: str, command: str) -> Peer:
    """A program of the llama.cpp that edgepack itself uses, compiled when it is not there (minutes, once)."""
    missing = ""
    try:
        toolchain.program(program, Terminal())
    except EdgepackError as error:
        missing = str(error).splitlines()[0]
    return Peer(name=program, version=LLAMA_VERSION, command=command, missing=missing)


def program(name: str) -> Path:
    """Of a peer that ``llama_cpp`` found."""
    return toolchain.program(name, Terminal())


def convert(model: Path, out: Path, known_as: str) -> list[str | Path]:
    """The command of llama.cpp's own converter."""
    script = toolchain.converter(Terminal())
    return [sys.executable, "-c", CONVERTER, script, known_as, model, "--outfile", out, "--outtype", "bf16"]


def installed(name: str, how: str, command: str) -> Peer:
    """A program on PATH, and its version as it says it; ``how`` it would be installed."""
    found = shutil.which(name)
    if found is None:
        return Peer(name=name, version="", command=command, missing=f"not installed: {how}")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    first = (said.stdout or said.stderr).strip().splitlines()[0]
    number = next((word for word in first.split() if word[:1].isdigit()), "")
    return Peer(name=name, version=number.rstrip(","), command=command)


def venv() -> Path:
    """The Python of the peers' own environment, which may not exist."""
    return workspace.cache_root() / "benchmarks" / "peers" / "bin" / "python"


def from_pypi(distribution: str, version: str, command: str, *, proof: Sequence[str]) -> Peer:
    """A package of the peers' environment; there once the words of ``proof`` run (a {bin} names its programs)."""
    python = venv()
    words = [word.replace("{bin}", str(python.parent)) for word in proof]

    def peer(missing: str = "") -> Peer:
        return Peer(name=distribution, version=version, command=command, missing=missing)

    def tried(command: Sequence[str | Path]) -> str:
        """The last line of what a failing command said; empty when it did not fail."""
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        lines = [line for line in (said.stderr or said.stdout).strip().splitlines() if "WARNING" not in line]
        return (lines or [f"status {said.returncode}"])[-1] if said.returncode else ""

    if not python.exists():
        failed = tried([sys.executable, "-m", "venv", python.parents[1]])
        if failed:
            return peer(f"no environment for it: {failed}")
    record = python.parents[1] / f"{distribution}-{version}.installed"
    if not record.exists():
        failed = tried(
            [python, "-m", "pip", "install", "--quiet", "--timeout", "15", f"{distribution}=={version}"]
        )
        if failed:
            return peer(f"pip could not install it: {failed}")
        record.touch()
    failed = tried(words)
    return peer(f"it does not start here: {failed}" if failed else "")


def importable(*modules: str) -> str:
    """Why this Python cannot run a peer that imports them; empty when it can."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else ""


def version(distribution: str) -> str:
    """As this Python has it; empty when it has not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
