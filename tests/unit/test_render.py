"""The start files: what they say for four devices, whole, and that no value can break out of its place."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgepack import profile, runtimes
from edgepack.bundle import requirements, server_document
from edgepack.bundle.render import RELEASE, for_comment, for_sh, for_unit_text, for_yaml, render
from edgepack.device import agent
from edgepack.errors import BadInput
from edgepack.profile import RuntimeImage, Software
from edgepack.runtimes import llama_cpp
from tests.plans import PROFILES, SERVED, example_plan, served_plan

GOLDEN = Path(__file__).parents[1] / "golden"
DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(("runtime", "name"), [*(("llama.cpp", name) for name in PROFILES), *SERVED])
def test_the_rendered_files_are_the_golden_ones(runtime: str, name: str, update_golden: bool) -> None:
    plan = example_plan(name) if runtime == "llama.cpp" else served_plan(runtime, name)
    folder = GOLDEN / plan.runtime / name

    rendered = render(plan)

    if update_golden:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for file, text in rendered.items():
            (folder / file).write_text(text, encoding="utf-8")
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == rendered


@pytest.mark.parametrize("name", [name for name in profile.names() if profile.load(name).deployable])
def test_every_profile_renders_and_every_start_file_bounds_memory(name: str) -> None:
    plan = example_plan(name)

    rendered = render(plan)

    flags = llama_cpp.launch(plan.settings, alias=plan.model.id)
    carried = render(plan, with_runtime=True)
    service = carried["edgepack.service"].replace("\\\n", " ").split()
    start = rendered["start.sh"].replace("\\\n", " ").split()
    quadlet = rendered["edgepack.container"].replace("\\\n", " ").split()
    command = yaml.safe_load(rendered["compose.yaml"])["services"]["llama-server"]["command"]
    for words in (service, start, quadlet, command):
        starts = [at for at, word in enumerate(words) if word == flags[0]]
        assert flags in [tuple(words[at : at + len(flags)]) for at in starts]
    asked = llama_cpp.environment(plan.settings, backend=plan.profile.backend, arch=plan.profile.arch)
    assert bool(asked) == (plan.profile.backend == "cpu" and plan.profile.arch == "x86_64")
    environment = rendered["server.env"]
    for variable, value in asked.items():
        assert f"\n{variable}={value}\n" in environment
        assert f"\nexport {variable}={value}\n" in rendered["start.sh"]
        assert f"\nEnvironment={variable}={value}\n" in carried["edgepack.service"]
        assert f"\nEnvironment={variable}={value}\n" in rendered["edgepack.container"]
        described = yaml.safe_load(rendered["compose.yaml"])["services"]["llama-server"]["environment"]
        assert described[variable] == value
    assert f"LLAMA_ARG_CTX_SIZE={plan.settings.context}\n" in environment
    assert "LLAMA_ARG_CACHE_RAM=0\n" in environment


@pytest.mark.parametrize("name", [name for name in profile.names() if profile.load(name).deployable])
def test_the_agent_starts_what_every_plan_says(name: str) -> None:
    """Each flag and variable is on the list of what a bundle may say."""
    device = profile.load(name)
    for runtime in runtimes.NAMES:
        if runtime != "llama.cpp" and device.backend not in ("cpu", "cuda"):
            continue
        plan = example_plan(name) if runtime == "llama.cpp" else served_plan(runtime, name)

        agent.server_arguments(json.loads(server_document(plan)), None)


@pytest.mark.parametrize("name", PROFILES)
def test_the_server_listens_on_loopback_only(name: str) -> None:
    rendered = render(example_plan(name))

    service = yaml.safe_load(rendered["compose.yaml"])["services"]["llama-server"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
    bound = service["command"][service["command"].index("--host") + 1]
    assert bound == "127.0.0.1" or "network_mode" not in service
    assert "Environment=EDGEPACK_HOST=127.0.0.1" in rendered["edgepack.service"]
    assert "LLAMA_ARG_HOST=127.0.0.1" in rendered["server.env"]
    assert "PublishPort=127.0.0.1:" in rendered["edgepack.container"] or (
        "Network=host" in rendered["edgepack.container"]
        and "--host 127.0.0.1" in rendered["edgepack.container"]
    )


@pytest.mark.parametrize("name", PROFILES)
def test_the_container_has_no_more_rights_than_it_needs(name: str) -> None:
    services = yaml.safe_load(render(example_plan(name))["compose.yaml"])["services"]

    assert list(services) == ["llama-server", "front"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "${EDGEPACK_UID:-10001}:${EDGEPACK_GID:-10001}"
        assert service["oom_score_adj"] == 500
        assert service["mem_limit"] == service["memswap_limit"] > 0
        assert service["logging"]["options"]["max-size"] == "10m"
        assert "healthcheck" in service


HARDENING = re.compile(
    r"^(?:UMask|NoNew|Capability|Ambient|Protect|Private|Restrict|Lock|SystemCall|MemoryDeny|LimitCORE|Dynamic|User)\w*=.*",
    re.MULTILINE,
)


def test_the_front_s_unit_is_confined_as_a_server_s_on_a_cpu_is() -> None:
    rendered = render(example_plan("raspberry-pi-5-8gb"))

    server, front = (sorted(HARDENING.findall(rendered[f"edgepack{part}.service"])) for part in ("", "-chat"))

    assert len(server) > 20
    assert front == server


def test_a_jetson_gets_its_runtime_its_power_mode_and_keeps_its_devices() -> None:
    rendered = render(example_plan("jetson-orin-nano-8gb"))

    service = yaml.safe_load(rendered["compose.yaml"])["services"]["llama-server"]
    assert service["runtime"] == "nvidia"
    assert service["network_mode"] == "host"
    assert f"{RELEASE}/power.sh 25W" in rendered["edgepack-power.service"]
    assert "\nPartOf=edgepack.service\n" in rendered["edgepack-power.service"]  # or it runs once in a boot
    assert "\nWants=edgepack-power.service\n" in rendered["edgepack.service"]
    assert "PrivateDevices=no" in rendered["edgepack.service"]
    assert "SupplementaryGroups=video render" in rendered["edgepack.service"]


def test_only_a_jetson_gets_a_power_unit() -> None:
    assert "edgepack-power.service" not in render(example_plan("rtx-4060-8gb"))


def test_caches_are_dropped_when_file_and_server_together_are_tight() -> None:
    roomy = example_plan("jetson-orin-nano-8gb")
    tight = replace(roomy, memory=replace(roomy.memory, file_bytes=roomy.budget.device))

    assert "drop_caches" not in render(roomy)["edgepack.service"]
    for file in ("edgepack.service", "edgepack.container", "start.sh"):
        assert "drop_caches" in render(tight)[file]
    elsewhere = example_plan("raspberry-pi-5-8gb")
    elsewhere = replace(elsewhere, memory=replace(elsewhere.memory, file_bytes=elsewhere.budget.device))
    assert "drop_caches" not in "".join(render(elsewhere).values())


def test_an_image_is_pinned_by_digest_or_marked_as_unverified() -> None:
    plan = example_plan("raspberry-pi-5-8gb")

    unknown = render(plan)
    pinned = render(plan, image_digest=DIGEST)

    for file in ("compose.yaml", "edgepack.container"):
        assert "digest unknown: not verified" in unknown[file].partition("  front:")[0]
        assert f"ghcr.io/ggml-org/llama.cpp@{DIGEST}" in pinned[file]
        assert "not verified" not in pinned[file].partition("  front:")[0]
    for file in ("compose.yaml", "edgepack-chat.container"):  # the digest is the server's, not the front's
        assert "digest unknown: not verified; it is edgepack-server-front" in pinned[file]


def test_before_vllm_the_front_runs_in_vllm_s_own_image() -> None:
    rendered = render(served_plan("vllm", "rtx-4060-8gb"), image_digest=DIGEST)

    services = yaml.safe_load(rendered["compose.yaml"])["services"]
    assert services["front"]["image"] == services["server"]["image"] == f"docker.io/vllm/vllm-openai@{DIGEST}"
    assert f"Image=docker.io/vllm/vllm-openai@{DIGEST}\n" in rendered["edgepack-chat.container"]


def test_a_server_with_a_chat_of_its_own_has_no_front() -> None:
    rendered = render(served_plan("transformers", "x86-laptop-ddr5"))

    assert not [name for name in rendered if "chat" in name]
    assert list(yaml.safe_load(rendered["compose.yaml"])["services"]) == ["server"]


@pytest.mark.parametrize("name", PROFILES)
def test_the_front_listens_on_loopback_only_and_asks_for_the_server_s_key(name: str) -> None:
    rendered = render(example_plan(name))

    services = yaml.safe_load(rendered["compose.yaml"])["services"]
    front, environment = services["front"], services["front"]["environment"]
    if front.get("network_mode") == "host":
        assert environment["EDGEPACK_HOST"] == environment["EDGEPACK_CHAT_HOST"] == "127.0.0.1"
    else:
        assert environment["EDGEPACK_HOST"] in services
        assert front["ports"] == ["127.0.0.1:${EDGEPACK_CHAT_PORT:-8081}:8081"]
    assert front["secrets"] == services["llama-server"]["secrets"]
    assert "EDGEPACK_CHAT_HOST=127.0.0.1 " in rendered["edgepack-chat.service"]
    assert "\nStateDirectory=edgepack-server\n" in rendered["edgepack-chat.service"]
    quadlet = rendered["edgepack-chat.container"]
    assert "Network=host" in quadlet and "EDGEPACK_CHAT_HOST=127.0.0.1 " in quadlet
    assert "/var/lib/edgepack-server/api-key:/run/secrets/edgepack-api-key:ro" in quadlet


@pytest.mark.parametrize("name", PROFILES)
def test_the_front_starts_and_ends_with_the_server_where_somebody_enabled_it(name: str) -> None:
    rendered = render(example_plan(name))

    assert "edgepack-chat" not in rendered["edgepack.service"]
    assert yaml.safe_load(rendered["compose.yaml"])["services"]["front"]["profiles"] == ["chat"]
    for unit in ("edgepack-chat.service", "edgepack-chat.container"):
        lines = rendered[unit].splitlines()
        assert {"After=edgepack.service", "PartOf=edgepack.service", "WantedBy=edgepack.service"} <= {*lines}


@pytest.mark.parametrize("digest", ["latest", "sha256:12", "sha256:" + "g" * 64, f"{DIGEST}\n"])
def test_a_digest_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(BadInput, match="image digest"):
        render(example_plan("raspberry-pi-5-8gb"), image_digest=digest)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("x86-laptop-ddr5", "transformers-5.17.0"),
        ("raspberry-pi-5-8gb", "transformers-5.17.0"),
        ("rtx-4060-8gb", "transformers-5.17.0-cuda13"),
        ("jetson-orin-nano-8gb", "transformers-5.17.0-r36.4"),
        ("jetson-agx-thor", "transformers-5.17.0-cuda13"),
    ],
)
def test_the_image_of_transformers_is_the_one_for_the_device_s_cuda(name: str, tag: str) -> None:
    rendered = render(served_plan("transformers", name))

    (service,) = yaml.safe_load(rendered["compose.yaml"])["services"].values()
    assert service["image"] == f"localhost/edgepack/edgepack-server:{tag}"


def test_a_jetson_of_another_l4t_gets_no_image_that_is_not_for_it() -> None:
    plan = served_plan("transformers", "jetson-orin-nano-8gb")
    plan = replace(plan, profile=replace(plan.profile, software=Software(l4t=("35",))))

    assert "compose.yaml" not in render(plan)


def test_a_profile_without_image_gets_no_container_files() -> None:
    plan = example_plan("raspberry-pi-5-8gb")
    bare = replace(plan, profile=replace(plan.profile, software=Software()))

    rendered = render(bare)

    assert "compose.yaml" not in rendered
    assert "edgepack.container" not in rendered
    assert "container" not in rendered["start.sh"].split("case")[1]


def test_a_bundled_server_is_the_one_that_is_started() -> None:
    rendered = render(example_plan("raspberry-pi-5-8gb"), with_runtime=True)

    assert f"ExecStart={RELEASE}/bin/llama-server " in rendered["edgepack.service"]
    service = yaml.safe_load(rendered["compose.yaml"])["services"]["llama-server"]
    assert service["entrypoint"] == ["/bundle/bin/llama-server"]


def test_without_one_the_unit_leaves_it_to_the_start_file_which_knows_the_enrolled_server() -> None:
    rendered = render(example_plan("raspberry-pi-5-8gb"))

    assert f"ExecStart=/bin/sh {RELEASE}/start.sh run\n" in rendered["edgepack.service"]
    assert "llama-server \\" not in rendered["edgepack.service"]


HOSTILE = ["a b", "$(reboot)", "`reboot`", "'; reboot; '", '"; reboot; "', "%n", "${HOME}", "$HOME",
           "a\nb: c", "\\", "#x", "{{ 1 }}", "é😀", "\x85\x7f\u2028", "*", "-x", "x\\"]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_model_name_stays_one_word_everywhere(value: str) -> None:
    plan = example_plan("jetson-orin-nano-8gb", model=value)
    plan = replace(plan, profile=replace(plan.profile, title=value))

    rendered = render(plan, with_runtime=True)  # the unit that has the flags

    service = yaml.safe_load(rendered["compose.yaml"])["services"]["llama-server"]
    assert service["command"][service["command"].index("--alias") + 1] == value.replace("$", "$$")
    script = rendered["start.sh"]
    begin = script.index("    --model")
    words = shlex.split(script[begin:].replace("\\\n", " "))
    assert words[words.index("--alias") + 1] == value
    checked = subprocess.run(["sh", "-n"], input=script.encode(), check=False, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    for unit in [file for file in rendered if file.endswith((".service", ".container"))]:
        for line in rendered[unit].splitlines():
            assert not line or line[0] in "#[ " or line.split("=")[0].isalpha()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_yaml_scalar_reads_back_as_it_was(text: str) -> None:
    assert yaml.safe_load(for_yaml(text)) == text


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_shell_word_reads_back_as_it_was(text: str) -> None:
    assert shlex.split(for_sh(text)) == [text]


@given(st.text())
def test_a_comment_is_one_line(text: str) -> None:
    assert len(for_comment(text).splitlines()) <= 1
    assert for_comment(text).isprintable()


@given(st.text())
def test_unit_text_holds_no_specifier_and_no_continuation(text: str) -> None:
    shown = for_unit_text(text)

    assert "%" not in shown.replace("%%", "")
    assert not shown.endswith("\\")


def test_rendering_does_not_depend_on_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render(example_plan("rtx-4060-8gb"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert json.dumps(before) == json.dumps(render(example_plan("rtx-4060-8gb")))


def test_an_image_of_another_runtime_is_not_used() -> None:
    plan = example_plan("rtx-4060-8gb")
    other = RuntimeImage(runtime="vllm", reference="example/vllm:1")
    plan = replace(plan, profile=replace(plan.profile, software=Software(images=(other,))))

    assert "compose.yaml" not in render(plan)


def test_ready_does_not_wait_for_a_server_that_has_ended(tmp_path: Path) -> None:
    """systemd 252 stays in start-post, with the release before it stopped, until this command ends."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "MAINPID": str(gone.pid),
            "EDGEPACK_PORT": str(unheard.getsockname()[1]),
        }  # fmt: skip
        start = GOLDEN / "llama.cpp" / "raspberry-pi-5-8gb" / "start.sh"
        done = subprocess.run(
            ["sh", start, "ready"], env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    assert (done.returncode, done.stderr) == (1, "start.sh: the server ended before it answered\n")


@pytest.mark.parametrize(
    ("name", "taken_off"),
    [("x86-laptop-ddr5", ["-m pip uninstall --yes torchvision torchaudio torchcodec"]), ("rtx-4060-8gb", [])],
)
def test_what_fails_beside_the_torch_of_vllm_on_a_cpu_is_taken_off_after_the_install(
    name: str, taken_off: list[str], tmp_path: Path
) -> None:
    (tmp_path / "start.sh").write_text(render(served_plan("vllm", name))["start.sh"], encoding="utf-8")
    python = tmp_path / "python3"
    python.write_text(
        f"""#!/bin/sh
echo "$*" >>"{tmp_path}/calls"
[ "$2" != venv ] || install -D "$0" "$3/bin/python3"
""",
        encoding="utf-8",
    )
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EDGEPACK_VENV": str(tmp_path / "venv")}

    subprocess.run(["sh", tmp_path / "start.sh", "install"], env=environment, check=True, timeout=60)

    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == [
        f"-m venv {tmp_path}/venv",
        f"-m pip install --requirement {tmp_path}/requirements.txt",
        *taken_off,
    ]


@pytest.mark.parametrize(
    ("compiler", "headers", "said"),
    [
        (
            "g++-of-nobody",
            "here",
            "start.sh: no C++ compiler: g++-of-nobody cannot be run, and vLLM compiles the model",
        ),
        (
            "true",
            "nowhere",
            "start.sh: no Python.h of {python}, which vLLM compiles the model with (apt install",
        ),
        ("true", "here", "started"),
    ],
)
def test_vllm_on_a_cpu_starts_only_where_it_can_compile(
    compiler: str, headers: str, said: str, tmp_path: Path
) -> None:
    """It would say so itself, after a minute and in a traceback of 479 lines."""
    (tmp_path / "start.sh").write_text(
        render(served_plan("vllm", "x86-laptop-ddr5"))["start.sh"], encoding="utf-8"
    )
    for name in ("model/config.json", "here/Python.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    python = tmp_path / "python3"
    python.write_text(
        f"""#!/bin/sh
case "$2" in
vllm.*) echo started >&2 ;;
*sysconfig*) exec {sys.executable} -c "import sysconfig
sysconfig.get_path = lambda name: '{tmp_path}/{headers}'
$2" ;;
esac
""",
        encoding="utf-8",
    )
    python.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "EDGEPACK_PYTHON": str(python), "EDGEPACK_FORCE": "1",
        "CXX": compiler,
    }  # fmt: skip

    done = subprocess.run(
        ["sh", tmp_path / "start.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stderr.startswith(said.format(python=python))
    assert done.returncode == (0 if said == "started" else 1)


def test_where_a_server_compiles_its_container_lets_it_load_what_it_made() -> None:
    image = RuntimeImage(runtime="vllm", reference="example/vllm:1")
    plan = served_plan("vllm", "x86-laptop-ddr5")
    plan = replace(
        plan, profile=replace(plan.profile, software=replace(plan.profile.software, images=(image,)))
    )

    rendered = render(plan)

    assert yaml.safe_load(rendered["compose.yaml"])["services"]["server"]["tmpfs"] == [
        "/tmp:mode=1777,exec,size=1g"
    ]


@pytest.mark.parametrize("there", [False, True])
def test_pypis_torch_is_not_installed_where_the_driver_is_too_old_for_it(there: bool, tmp_path: Path) -> None:
    """accelerate would bring it: NVIDIA's must be in the environment first."""
    plan = served_plan("transformers", "jetson-orin-nx-16gb")
    (tmp_path / "start.sh").write_text(render(plan)["start.sh"], encoding="utf-8")
    python = tmp_path / "python3"
    python.write_text(
        f"""#!/bin/sh
case "$2" in
venv) install -D "$0" "$3/bin/python3" ;;
pip) echo "$*" >>"{tmp_path}/calls" ;;
*) exit {0 if there else 1} ;;
esac
""",
        encoding="utf-8",
    )
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EDGEPACK_VENV": str(tmp_path / "venv")}

    done = subprocess.run(
        ["sh", tmp_path / "start.sh", "install"], env=environment, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip

    assert done.returncode == (0 if there else 1)
    assert (tmp_path / "calls").exists() == there
    if not there:
        assert done.stderr == (
            "start.sh: PyPI's PyTorch for aarch64 is built for CUDA 13 or none, and this device's driver runs CUDA "
            "12.6: take NVIDIA's, for JetPack 6 at https://pypi.jetson-ai-lab.io/jp6/cu126. Put it into $venv with its "
            "pip first.\n".replace("$venv", str(tmp_path / "venv"))
        )


@pytest.mark.parametrize(
    ("runtime", "device", "said"),
    [
        ("vllm", "jetson-orin-nx-16gb", "sh start.sh container, or EDGEPACK_PYTHON=PROGRAM; PyPI's PyTorch"),
        ("transformers", "jetson-orin-nx-16gb", "EDGEPACK_PYTHON=PROGRAM; PyPI's PyTorch for aarch64"),
        ("onnx-genai", "jetson-orin-nx-16gb", "hold no code for compute capability 8.7: build onnxruntime"),
        ("vllm", "rtx-4060-8gb", "(sh start.sh install, or EDGEPACK_PYTHON=PROGRAM)"),
    ],
)
def test_a_start_without_its_python_says_how_to_get_one_for_this_device(
    runtime: str, device: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "start.sh").write_text(render(served_plan(runtime, device))["start.sh"], encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "EDGEPACK_PYTHON": "/bin/false"}

    done = subprocess.run(
        ["sh", tmp_path / "start.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 1
    assert done.stderr.startswith("start.sh: no Python with ")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("runtime", "device", "pinned", "left_out"),
    [
        ("vllm", "jetson-orin-nx-16gb", "fastapi==", "vllm=="),
        ("vllm", "jetson-agx-thor", "vllm==0.30.0", "fastapi=="),
        ("transformers", "jetson-orin-nx-16gb", "transformers==", "torch=="),
        ("transformers", "jetson-agx-thor", "torch==", "# torch"),
        ("onnx-genai", "jetson-orin-nx-16gb", "uvicorn==", "onnxruntime"),
        ("onnx-genai", "rtx-4060-8gb", "onnxruntime-genai-cuda==", "# onnx"),
    ],
)
def test_requirements_leave_out_what_pypi_has_no_wheel_of_for_the_device(
    runtime: str, device: str, pinned: str, left_out: str
) -> None:
    lines = requirements(served_plan(runtime, device)).splitlines()

    assert any(line.startswith(pinned) for line in lines)
    assert not any(line.startswith(left_out) for line in lines)


def test_our_image_is_not_named_where_its_wheels_hold_no_code() -> None:
    assert "compose.yaml" not in render(served_plan("onnx-genai", "jetson-orin-nx-16gb"))
    assert "compose.yaml" in render(served_plan("onnx-genai", "rtx-4060-8gb"))
