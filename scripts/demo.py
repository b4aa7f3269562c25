"""`make demo`: the main job on the built-in model, offline; every command is printed before it runs.

python scripts/demo.py OUT
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "Prince Andrew looked up at the sky and"

SCHEME = "Q6_K"
"""The planner would leave a model of 13 MB unquantized, and what a demo is to show is the whole way."""


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    out.mkdir(parents=True, exist_ok=True)
    key = out / "signing-key"
    started = time.monotonic()
    edgepack("toolchain", "install")
    if not key.exists():
        edgepack("key", "new", str(key))
    signers = str(out / "signing-key.allowed_signers")
    model = ("--model", "demo", "--scheme", SCHEME)
    edgepack("plan", "--profile", "jetson-orin", *model)
    orin = edgepack("build", "--profile", "jetson-orin", *model, "--key", str(key), "-o", str(out))
    edgepack("inspect", orin, "--allowed-signers", signers)
    machine = str(out / "this-machine.yaml")
    edgepack("probe", "-o", machine)
    here = edgepack(
        "build", "--profile", machine, *model, "--with-runtime", "--key", str(key), "-o", str(out)
    )
    edgepack("check", here, "--allowed-signers", signers, "-o", str(out / "check.json"))
    edgepack("run", here, "--allowed-signers", signers, "--prompt", PROMPT, "--tokens", "180", "--ignore-eos")
    print(f"\nmake demo: done in {time.monotonic() - started:.0f} s. Bundles and reports are in {out}/")


def edgepack(*words: str) -> str:
    """Runs one command with its output shown, and returns the last line of it; stops the demo if it fails."""
    print(f"\n$ edgepack {shlex.join(words)}", flush=True)
    last = ""
    command = [sys.executable, "-m", "edgepack", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode != 0:
        sys.exit(process.returncode)
    return last


if __name__ == "__main__":
    main()
