"""What the parser of an installed vLLM's server takes, as JSON: the record that the table of flags is held to.

    PYTHONPATH=. PYTHON scripts/vllm_options.py WHEEL tests/data/vllm_options/VERSION.json

PYTHON imports vllm as WHEEL has it. The parser is Python alone, so the wheel's *.py files on the path, beside PyTorch's
CPU build and those of vLLM's dependencies that it imports, will do; "+cpu" behind the version in its METADATA lets it
start where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from edgepack.runtimes import vllm_flags
from edgepack.workspace import sha256_file

HOMES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
"""Where make_arg_parser is: from 0.29 on, and before."""


def main(wheel: Path, out: Path) -> None:
    options = {name: action for action in _parser()._actions for name in action.option_strings}
    known = {
        flag.name: _described(flag.name, options)
        for flag in vllm_flags.FLAGS
        if "." not in flag.name and f"--{flag.name}" in options
    }
    record = {"wheel": wheel.name, "sha256": sha256_file(wheel), "options": known}
    out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    for home in HOMES:
        try:
            made = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if not home.startswith(str(error.name)):
                raise
        else:
            parser: argparse.ArgumentParser = made.make_arg_parser(made.FlexibleArgumentParser())
            return parser
    raise SystemExit(f"no make_arg_parser in {' or '.join(HOMES)}")


def _described(name: str, options: dict[str, argparse.Action]) -> dict[str, object]:
    action = options[f"--{name}"]
    return {
        "nargs": action.nargs,
        "choices": None if action.choices is None else sorted(map(str, action.choices)),
        "type": getattr(action.type, "__name__", None),
        "negated": f"--no-{name}" in options,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
