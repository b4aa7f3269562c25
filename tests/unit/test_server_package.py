"""The package as a device gets it: a copy under another name, without edgepack."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgepack
from edgepack import server
from edgepack.server import planned
from edgepack.server.__main__ import main

PACKAGE = Path(server.__file__).parent


def test_the_version_is_edgepacks() -> None:
    assert edgepack.__version__ == server.VERSION


def test_a_copy_runs_under_another_name_and_without_edgepack(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "edgepack_server", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, runpy; sys.modules['edgepack'] = None; sys.argv[1:] = ['--help'];"
        "runpy.run_module('edgepack_server', run_name='__main__')"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "--upstream" in done.stdout


ENGINE = ["--engine", "onnx-genai", "--ctx-size", "64"]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--engine", "onnx-genai", "--model", "."], "--ctx-size"),
        ([*ENGINE], "--model None is not a folder"),
        ([*ENGINE, "--model", "no-such-folder"], "no-such-folder is not a folder"),
        ([*ENGINE, "--model", ".", "--parallel", "65"], "less than a token for each of 65 slots"),
        ([*ENGINE, "--model", ".", "--parallel", "0"], "0 is too few"),
        ([*ENGINE, "--model", ".", "--queue-size", "-1"], "-1 is negative"),
        ([*ENGINE, "--model", ".", "--timeout", "nan"], "nan is not a time"),
        ([*ENGINE, "--model", ".", "--host", "0.0.0.0"], "can be reached by others: give --api-key-file"),
        ([*ENGINE, "--model", ".", "--api-key-file", "no-such-key"], "no-such-key"),
        ([*ENGINE, "--model", ".", "--port", "65536"], "65536 is more than 65535"),
        ([*ENGINE, "--model", ".", "--upstream", "http://127.0.0.1:1"], "--upstream is for --engine front"),
        ([*ENGINE, "--model", ".", "--ctx", "64"], "unrecognized arguments"),
        (["--engine", "front", "--ctx-size", "64"], "--engine front needs --upstream"),
        (
            ["--engine", "front", "--ctx-size", "64", "--upstream", "https://a"],
            "is not like http://127.0.0.1:8080",
        ),
    ],
)
def test_wrong_flags_are_named(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)

    assert stopped.value.code == 2
    assert why in capsys.readouterr().err


def test_a_plans_parts_and_budget_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(
        '{"memory": {"parts": [{"name": "weights", "place": "device", "bytes": 3},'
        ' {"name": "compute", "place": "device", "bytes": 4}, {"name": "compute", "place": "host", "bytes": 5}]},'
        ' "budget": {"device": 10, "host": 20, "unified": false}}',
        encoding="utf-8",
    )

    plan = planned.read(path)

    assert plan.parts == {("weights", "device"): 3, ("compute", "device"): 4, ("compute", "host"): 5}
    assert plan.budget == {"device": 10, "host": 20}


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"memory": []}', encoding="utf-8")

    with pytest.raises(ValueError, match="not a plan of edgepack"):
        planned.read(path)
