"""What an installed edgepack carries: profiles, templates, catalog and built-in models, and nothing of the tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgepack import catalog

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_the_wheel_carries_what_the_program_reads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("edgepack-*.whl")

    names = set(zipfile.ZipFile(wheel).namelist())

    profiles = {f"edgepack/_data/profiles/{p.name}" for p in (ROOT / "profiles").glob("*.yaml")}
    rendered = ROOT / "templates"
    templates = {f"edgepack/_data/templates/{p.relative_to(rendered)}" for p in rendered.rglob("*.j2")}
    assert profiles | templates <= names
    carried = {
        f"edgepack/models/{folder.name}/{file.name}"
        for folder in catalog.built_in().values()
        for file in folder.iterdir()
    }
    assert "edgepack/models/demo/model.safetensors" in carried
    assert {*carried, "edgepack/device/agent.py"} <= names
    assert "edgepack/calibration/builtin.jsonl" in names
    assert any(name.startswith("edgepack/catalog/") and name.endswith(".yaml") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_the_installed_wheel_plans(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("edgepack-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = ['profiles', 'list']; "
        "from edgepack.cli import main; main()"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "jetson-orin-nano-8gb" in done.stdout
