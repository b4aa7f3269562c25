"""The start files judged by what will read them: systemd, sh, shellcheck, the compose schema, quadlet's keys."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from edgepack import profile, toolchain
from edgepack.bundle.render import RELEASE, render
from tests.plans import PROFILES, example_plan

pytestmark = pytest.mark.integration

SCHEMAS = Path(__file__).parents[1] / "schemas"
NAMES = [name for name in profile.names() if profile.load(name).deployable]


def rendered_into(folder: Path, name: str, *, model: str = "tiny", with_runtime: bool = False) -> Path:
    for file, text in render(example_plan(name, model=model), with_runtime=with_runtime).items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("with_runtime", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path, name: str, with_runtime: bool) -> None:
    rendered_into(tmp_path, name, with_runtime=with_runtime)
    units = sorted(str(p) for p in tmp_path.iterdir() if p.suffix in (".service", ".timer"))

    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)

    # The server is on the device, not here: the one thing that may be missing.
    server = re.escape(f"{RELEASE}/bin/llama-server")
    absent = rf"edgepack\.service: Command {server} is not executable: No such file or directory"
    assert [line for line in done.stderr.splitlines() if not re.fullmatch(absent, line)] == []


@pytest.mark.parametrize("model", ['50% "off" $HOME \\', "%n %i ${X} ' ;", "-x é😀"])
def test_systemd_reads_units_with_any_model_name(tmp_path: Path, model: str) -> None:
    rendered_into(tmp_path, "jetson-orin-nano-8gb", model=model, with_runtime=True)

    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "edgepack.service")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert [line for line in done.stderr.splitlines() if "llama-server is not executable" not in line] == []


def test_systemd_does_find_a_wrong_key(tmp_path: Path) -> None:
    rendered_into(tmp_path, "raspberry-pi-5-8gb")
    unit = tmp_path / "edgepack.service"
    unit.write_text(unit.read_text().replace("MemoryMax=", "MemoryMaximum="))

    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)

    assert "MemoryMaximum" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_scripts_are_sound(tmp_path: Path, name: str) -> None:
    rendered_into(tmp_path, name)

    for script in sorted(tmp_path.glob("*.sh")):
        subprocess.run(["sh", "-n", str(script)], check=True)
        subprocess.run(["shellcheck", "--shell=sh", str(script)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_compose_file_follows_the_compose_schema(tmp_path: Path, name: str) -> None:
    rendered_into(tmp_path, name)
    schema = json.loads((SCHEMAS / "compose-spec.json").read_text())

    document = yaml.safe_load((tmp_path / "compose.yaml").read_text())

    jsonschema.Draft7Validator(schema).validate(document)


@pytest.mark.parametrize("file", ["edgepack.container", "edgepack-chat.container"])
@pytest.mark.parametrize("name", NAMES)
def test_the_quadlet_uses_documented_keys_only(tmp_path: Path, name: str, file: str) -> None:
    rendered_into(tmp_path, name)
    known = set((SCHEMAS / "quadlet-keys.txt").read_text().split())
    text = (tmp_path / file).read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]

    section = ""
    found: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("["):
            section = line.strip("[]")
        else:
            key, equals, value = line.partition("=")
            assert equals and value, line
            found.setdefault(section, set()).add(key)

    assert set(found) == {"Unit", "Container", "Service", "Install"}
    assert found["Container"] <= known
    assert {"Image", "Exec"} <= found["Container"]
    as_unit = tmp_path / "quadlet.service"
    as_unit.write_text(
        re.sub(r"\[Container\].*?(?=\n\[)", "", text, flags=re.DOTALL).replace(
            "[Service]", "[Service]\nExecStart=/bin/true"
        )
    )
    done = subprocess.run(["systemd-analyze", "verify", as_unit], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A release folder with a server that only says how it was started."""
    folder = tmp_path / "release"
    folder.mkdir()
    rendered_into(folder, "raspberry-pi-5-8gb", model="a 'strange' $(name)")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "bin").mkdir()
    (folder / "bin" / "llama-server").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable: 99999999 kB\n")
    return folder


def start(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": os.environ["PATH"],
        "EDGEPACK_STATE": str(folder / "state"),
        "EDGEPACK_MEMINFO": str(folder / "meminfo"),
        **environment,
    }
    return subprocess.run(
        ["sh", str(folder / "start.sh"), *words], env=env, capture_output=True, text=True, check=False
    )


def test_the_first_start_makes_a_private_key_and_later_ones_keep_it(installed: Path) -> None:
    first = start(installed)
    key = (installed / "state" / "api-key").read_text()
    second = start(installed)

    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert re.fullmatch(r"[0-9a-f]{64}\n", key)
    assert (installed / "state" / "api-key").read_text() == key
    assert stat.S_IMODE((installed / "state" / "api-key").stat().st_mode) == 0o600
    assert [p.name for p in (installed / "state").iterdir()] == ["api-key"]


def test_the_server_gets_the_flags_as_they_are(installed: Path) -> None:
    words = start(installed, EDGEPACK_PORT="9000").stdout.splitlines()

    assert words[words.index("--alias") + 1] == "a 'strange' $(name)"
    assert words[words.index("--ctx-size") + 1] == "4096"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "9000"
    assert words[words.index("--api-key-file") + 1] == str(installed / "state" / "api-key")


def test_a_device_s_own_server_is_started_where_it_is_named(installed: Path) -> None:
    mine = installed / "mine"
    mine.write_text('#!/bin/sh\nprintf "mine\\n"\n')
    mine.chmod(0o755)

    assert start(installed, "run", EDGEPACK_LLAMA_SERVER=str(mine)).stdout == "mine\n"


def test_too_little_free_memory_is_refused_before_the_start(installed: Path) -> None:
    (installed / "meminfo").write_text("MemAvailable: 1000 kB\n")

    refused = start(installed)
    forced = start(installed, EDGEPACK_FORCE="1")

    assert refused.returncode == 1
    assert "1024000 are available" in refused.stderr
    assert forced.returncode == 0


def test_a_missing_model_or_server_is_named(installed: Path) -> None:
    (installed / "bin" / "llama-server").unlink()
    no_server = start(installed, PATH="/usr/bin:/bin")
    (installed / "model.gguf").unlink()
    no_model = start(installed)

    assert "llama-server is neither in the bundle nor on PATH" in no_server.stderr
    assert "model.gguf is missing" in no_model.stderr
    assert (no_server.returncode, no_model.returncode) == (1, 1)


def test_a_server_that_does_not_answer_is_unhealthy(installed: Path) -> None:
    done = start(installed, "health", EDGEPACK_PORT="1")

    assert done.returncode == 1
    assert "http://127.0.0.1:1/health" in done.stderr


NVPMODEL = """#!/bin/sh
# As nvpmodel answers: -q prints the mode, -m sets it by number.
case "$1" in
-q) printf 'NV Power Mode: %s\\n%s\\n' "$(cat "$MODE")" 0 ;;
-m) sed -n "s/^< POWER_MODEL ID=$2 NAME=\\([^ ]*\\) >.*/\\1/p" "$EDGEPACK_NVPMODEL_CONF" >"$MODE.new"
    [ -e "$MODE.stuck" ] || mv "$MODE.new" "$MODE" ;;
esac
"""


@pytest.fixture
def jetson(tmp_path: Path) -> dict[str, str]:
    rendered_into(tmp_path, "jetson-orin-nano-8gb")
    (tmp_path / "nvpmodel").write_text(NVPMODEL)
    (tmp_path / "nvpmodel").chmod(0o755)
    (tmp_path / "mode").write_text("15W\n")
    (tmp_path / "nvpmodel.conf").write_text(
        "# comment < POWER_MODEL ID=9 NAME=25W >\n"
        "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
        "< PM_CONFIG DEFAULT=1 >\n"
    )
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MODE": str(tmp_path / "mode"),
        "EDGEPACK_NVPMODEL_CONF": str(tmp_path / "nvpmodel.conf"),
    }


def power(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    argv = ["sh", str(folder / "power.sh"), *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


def test_the_power_mode_is_selected_by_its_name(tmp_path: Path, jetson: dict[str, str]) -> None:
    done = power(tmp_path, jetson)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mode").read_text() == "25W\n"
    assert power(tmp_path, jetson, "MAXN_SUPER").returncode == 0
    assert (tmp_path / "mode").read_text() == "MAXN_SUPER\n"


def test_agx_orin_prefixes_its_mode_names(tmp_path: Path, jetson: dict[str, str]) -> None:
    conf = tmp_path / "nvpmodel.conf"
    conf.write_text("< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_25W >\n")

    done = power(tmp_path, jetson)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mode").read_text() == "MODE_25W\n"


def test_a_mode_the_board_does_not_have_is_refused_with_those_it_has(
    tmp_path: Path, jetson: dict[str, str]
) -> None:
    done = power(tmp_path, jetson, "MAXN")

    assert done.returncode == 1
    assert "has no mode MAXN; it has: 15W 25W MAXN_SUPER" in done.stderr


def test_a_mode_that_needs_a_reboot_is_not_taken_for_set(tmp_path: Path, jetson: dict[str, str]) -> None:
    (tmp_path / "mode.stuck").touch()

    done = power(tmp_path, jetson)

    assert done.returncode == 1
    assert "needs a reboot" in done.stderr


@pytest.mark.parametrize("name", PROFILES)
def test_every_flag_and_variable_is_one_of_the_pinned_server(tmp_path: Path, name: str) -> None:
    done = subprocess.run([toolchain.find().server, "--help"], capture_output=True, text=True, check=True)
    entries = [re.sub(r"\s+", " ", entry) for entry in re.split(r"\n(?=-)", done.stdout)]
    flags = {flag for entry in entries for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", entry)}
    variables = set(re.findall(r"env: (\w+)", done.stdout))
    rendered_into(tmp_path, name)

    script = (tmp_path / "start.sh").read_text()
    used = set(re.findall(r"(?<=\s)--[a-z-]+(?=\s)", script[script.index('exec "$server"') :]))
    names = re.findall(r"^(LLAMA_ARG_\w+)=", (tmp_path / "server.env").read_text(), flags=re.MULTILINE)

    assert used <= flags
    assert set(names) <= variables
