"""The images of docker/ build what the planner counts with, from pinned parts, and run as nobody in particular."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edgepack import runtimes, toolchain
from edgepack.bundle.render import CONTAINER_UID
from edgepack.profile import load, names
from edgepack.runtimes import transformers

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
REQUIREMENTS = ROOT / "edgepack" / "server" / "requirements"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
RUNTIMES = sorted(path.stem for path in REQUIREMENTS.glob("*.txt") if not path.stem.startswith("vllm"))
"""vLLM runs in its makers' images."""
TOLD = {
    **{name: name for name in RUNTIMES},
    "transformers-cuda": "transformers",
    "transformers-l4t": "transformers",
}
"""Lock files of images, and the requirements that their devices are told to install."""
OF_THE_BASE = {"transformers-l4t": {"torch", "numpy"}}
"""What an image has from the base that it stands on."""
LOCKS = sorted(DOCKER.glob("requirements-*.txt"))
BAKE = json.loads((DOCKER / "bake.json").read_text(encoding="utf-8"))
TARGETS = BAKE["target"]

sys.path.insert(0, str(ROOT / "scripts"))

import images  # noqa: E402

Instruction = tuple[str, str]


def instructions(text: str) -> Iterator[Instruction]:
    """(keyword, the rest) of a Dockerfile that hadolint can parse: comments dropped, continued lines joined."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for logical in "\n".join(lines).replace("\\\n", " ").splitlines():
        if logical.strip():
            keyword, _, rest = logical.strip().partition(" ")
            yield keyword.upper(), " ".join(rest.split())


def problems(text: str) -> list[str]:
    """What keeps an image from being pinned, non-root and free of leftovers."""
    return [*_bases(text), *_steps(text), *_start(text)]


def _bases(text: str) -> Iterator[str]:
    given: dict[str, str] = {}
    stages: set[str] = {"scratch"}
    for keyword, rest in instructions(text):
        if keyword == "FROM":
            base, _, stage = rest.partition(" AS ")
            for name, value in given.items():
                base = base.replace(f"${{{name}}}", value)
            if base not in stages and not re.search(r":[^:@/]+@sha256:[0-9a-f]{64}$", base):
                yield f"the base {base} is not pinned by tag and digest"
            stages.add(stage)
        elif keyword == "ARG" and "=" in rest:
            name, _, value = rest.partition("=")
            for known, meant in given.items():
                value = value.replace(f"${{{known}}}", meant)
            given[name] = value


def _steps(text: str) -> Iterator[str]:
    for keyword, rest in instructions(text):
        if keyword == "ADD":
            yield f"ADD {rest}: COPY takes files, and nothing is taken from an address"
        if keyword == "RUN" and re.search(r"(curl|wget)\b[^|;&]*\|\s*(ba|da)?sh\b", rest):
            yield f"RUN {rest[:40]}: runs what an address gives"
        if keyword == "RUN" and "|| true" in rest:
            yield f"RUN {rest[:40]}: swallows a failure"
        if keyword == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
            yield f"RUN {rest[:40]}: leaves the lists of packages in a layer"
        if (
            keyword == "RUN"
            and re.search(r"\bpip (--python \S+ )?(install|download)\b", rest)
            and not _locked(rest)
        ):
            yield f"RUN {rest[:40]}: pip takes what is not locked"


def _locked(command: str) -> bool:
    """Whether every pip of a RUN installs from hashes, or the checkout alone."""
    calls = re.findall(r"pip (?:--python \S+ )?(?:install|download)\b[^&]*", command)
    return all(
        "--no-deps" in call and ("--require-hashes" in call or call.split()[-1] == "/src") for call in calls
    )


def _start(text: str) -> Iterator[str]:
    last: dict[str, str] = {}
    for keyword, rest in instructions(text):
        if keyword == "FROM":
            last = {}
        last[keyword] = rest
        if keyword in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
            yield f"{keyword} {rest} goes through a shell"
        if keyword == "HEALTHCHECK" and " CMD [" not in rest:
            yield f"HEALTHCHECK {rest} goes through a shell"
    if last.get("USER") != f"{CONTAINER_UID}:{CONTAINER_UID}":
        yield f"the image runs as {last.get('USER', 'root')}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_pinned_and_not_root(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


GOOD = f"FROM example.org/debian:12@sha256:{'0' * 64}\nUSER 10001:10001\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FROM debian:12\nUSER 10001:10001\n", "not pinned"),
        (f"FROM debian@sha256:{'0' * 64}\nUSER 10001:10001\n", "not pinned"),
        ("ARG BASE=debian:latest\nFROM ${BASE}\nUSER 10001:10001\n", "debian:latest is not pinned"),
        (GOOD.replace("USER 10001:10001\n", ""), "runs as root"),
        (GOOD + "FROM scratch\n", "runs as root"),
        (GOOD + "USER root\n", "runs as root"),
        (GOOD + "ADD https://example.org/x /x\n", "ADD"),
        (GOOD + "RUN curl -fsS https://example.org/x | sh\n", "runs what an address gives"),
        (GOOD + "RUN true \\\n    || true\n", "swallows"),
        (GOOD + "RUN apt-get update && apt-get install --yes curl\n", "lists"),
        (GOOD + "RUN pip install --no-deps numpy\n", "not locked"),
        (GOOD + "RUN pip install --require-hashes -r requirements.txt\n", "not locked"),
        (GOOD + "ENTRYPOINT python3\n", "shell"),
        (GOOD + "HEALTHCHECK CMD curl localhost\n", "shell"),
    ],
)
def test_what_an_image_must_not_have_is_found(text: str, said: str) -> None:
    assert any(said in problem for problem in problems(text))


def test_llama_server_is_compiled_from_the_toolchain_s_source_with_its_options() -> None:
    text = (DOCKER / "llama-server.Dockerfile").read_text(encoding="utf-8")
    arguments = dict(
        rest.split("=", 1) for keyword, rest in instructions(text) if keyword == "ARG" and "=" in rest
    )
    (compile_,) = (rest for keyword, rest in instructions(text) if keyword == "RUN" and " -S /src" in rest)

    options = re.findall(r" -D(\w+=\S+)", compile_.replace('"$COMMIT"', arguments["COMMIT"]))

    assert arguments["SDIST_VERSION"] == toolchain.SDIST_VERSION
    assert arguments["SDIST_SHA256"] == toolchain.SDIST_SHA256
    assert toolchain.COMMIT.startswith(arguments["COMMIT"])
    only_arm = toolchain._ARM_DOTPROD
    assert f"aarch64 ]; then set -- -D{only_arm}; fi" in compile_
    assert [option for option in options if option.rstrip(";") != only_arm] == list(toolchain._OPTIONS)


def test_every_target_names_files_arguments_and_bases_that_exist() -> None:
    table = (DOCKER / "README.md").read_text(encoding="utf-8")

    for name, target in TARGETS.items():
        dockerfile = ROOT / target["dockerfile"]
        arguments = target.get("args", {})
        assert dockerfile in DOCKERFILES, name
        assert set(arguments) <= images.declared(dockerfile), name
        assert f"`{name}`" in table, f"docker/README.md has no line on {name}"
        for argument in ("BUILD", "RUNTIME"):
            base = arguments.get(argument, "")
            if dockerfile.name == "llama-server.Dockerfile" and base:
                assert re.search(r":[^:@/]+@sha256:[0-9a-f]{64}$", base), name
        if dockerfile.name == "edgepack-server.Dockerfile":
            assert arguments["RUNTIME"] in TOLD, name
            assert (DOCKER / f"requirements-{arguments['RUNTIME']}.txt").is_file(), name


def test_where_each_base_was_verified_is_said() -> None:
    table = (DOCKER / "README.md").read_text(encoding="utf-8")
    everything = "\n".join(path.read_text(encoding="utf-8") for path in (*DOCKERFILES, DOCKER / "bake.json"))

    digests = set(re.findall(r"@sha256:([0-9a-f]{64})", everything))

    assert digests
    assert {digest for digest in digests if digest[:12] not in table} == set()


def test_all_images_take_one_moment_of_debian_s_archive_and_one_debian() -> None:
    texts = [path.read_text(encoding="utf-8") for path in DOCKERFILES]

    for name in ("SNAPSHOT", "DEBIAN"):
        found = [re.findall(rf"^ARG {name}=(\S+)$", text, re.MULTILINE) for text in texts]
        assert len({given[0] for given in found if given}) == 1
        assert sum(bool(given) for given in found) == len(texts) - 1  # one stands on NVIDIA's Ubuntu


def test_an_image_of_a_profile_that_is_ours_is_one_that_we_build() -> None:
    tags = {tag for target in TARGETS.values() for tag in target["tags"]}

    ours = {
        image.reference
        for name in names()
        for image in load(name).software.images
        if image.reference.startswith("localhost/")
    }

    assert ours
    assert ours <= tags


# ── requirements ──


def pins(path: Path) -> dict[str, str]:
    """Package -> exact version of a requirements file; any other line fails here."""
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]
    matches = [re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?==([\w.+]+)", line) for line in lines]
    assert all(matches), path
    return {match[1]: match[2] for match in matches if match}


def locked(path: Path) -> dict[str, set[str]]:
    """Package -> versions of a lock file (more than one where they differ by Python), each with hashes."""
    found: dict[str, set[str]] = {}
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.match(r"([\w-]+)==([\w.+]+)( ; [^-]+?)?(\s+--hash=sha256:[0-9a-f]{64})+\s*$", line)
            assert match, f"{path.name}: {line[:60]}"
            found.setdefault(match[1], set()).add(match[2])
    return found


@pytest.mark.parametrize("name", TOLD)
def test_an_image_has_what_a_device_is_told_to_install(name: str) -> None:
    lock = locked(DOCKER / f"requirements-{name}.txt")
    of_the_base = OF_THE_BASE.get(name, set())

    for package, version in pins(REQUIREMENTS / f"{TOLD[name]}.txt").items():
        builds = {found.partition("+")[0] for found in lock.get(package, ())}
        assert builds == (set() if package in of_the_base else {version}), package


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_can_run_the_front_too(name: str) -> None:
    front = pins(REQUIREMENTS / "front.txt")

    assert front.items() <= pins(REQUIREMENTS / f"{name}.txt").items()


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_a_hash_for_everything(path: Path) -> None:
    assert locked(path)


def test_the_cpu_build_of_torch_is_the_one_that_is_locked() -> None:
    lock = locked(DOCKER / "requirements-transformers.txt")

    assert lock["torch"] == {"2.13.0+cpu"}
    assert not [package for package in lock if package.startswith(("nvidia-", "cuda-", "triton"))]


def test_the_cuda_build_of_torch_comes_with_the_libraries_of_cuda_13() -> None:
    lock = locked(DOCKER / "requirements-transformers-cuda.txt")
    text = (DOCKER / "requirements-transformers-cuda.txt").read_text(encoding="utf-8")

    assert lock["torch"] == {"2.13.0"}
    assert {"nvidia-cublas", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "triton"} <= set(lock)
    for package in transformers.READERS["bnb"]:
        assert f"\n{package} " in text


def test_on_jetpack_6_nothing_is_laid_over_the_torch_of_the_base() -> None:
    lock = locked(DOCKER / "requirements-transformers-l4t.txt")
    rest = locked(DOCKER / "requirements-transformers.txt")

    torch_s_own = {"torch", "numpy", "triton", "sympy", "mpmath", "networkx", "setuptools", "bitsandbytes"}
    assert set(lock) == set(rest) - torch_s_own
    assert all(versions <= rest[package] for package, versions in lock.items())


def test_the_build_host_has_what_edgepack_says_it_needs() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(
        r'^  "([\w-]+)[<>=]', project.partition("\ndependencies = [")[2].partition("\n]")[0], re.MULTILINE
    )
    extra = re.findall(r'"([\w-]+)[<>=]', re.findall(r"^build = \[(.*)\]$", project, re.MULTILINE)[0])

    assert len(needed) > 5
    assert {*needed, *extra} <= set(locked(DOCKER / "requirements-build-host.txt"))


def extra_lines(name: str) -> list[Requirement]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (lines,) = re.findall(rf"^{name} = \[(.*)\]$", project, re.MULTILINE)
    return [Requirement(line) for line in re.findall(r'"([^"]+)"', lines)]


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("onnx-genai", {"onnx", "serve"}),
        ("onnx-genai-cuda", {"onnx-gpu", "serve"}),
        ("transformers", {"torch", "quant", "serve"}),
    ],
)
def test_the_extras_allow_what_a_device_is_told_to_install(name: str, extras: set[str]) -> None:
    allowed = [line for extra in extras for line in extra_lines(extra)]
    pinned = pins(REQUIREMENTS / f"{name}.txt")

    common = [line for line in allowed if line.name in pinned]

    assert name.replace("onnx-", "onnxruntime-") in {line.name for line in common}
    assert len({line.name for line in common}) >= 4
    assert [line for line in common if pinned[line.name] not in line.specifier] == []


def test_the_two_extras_of_onnx_differ_in_what_writes_the_same_modules_only() -> None:
    onnx, gpu = set(extra_lines("onnx")), set(extra_lines("onnx-gpu"))

    assert {line.name for line in onnx - gpu} == {"onnxruntime-genai", "onnxruntime"}
    assert {line.name for line in gpu - onnx} == {"onnxruntime-genai-cuda", "onnxruntime-gpu"}


# ── scripts/images.py ──


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("${EDGEPACK_PORT:-8080}", "8080"),
        ("http://127.0.0.1:${EDGEPACK_PORT:-8080}/health", "http://127.0.0.1:8080/health"),
        ("a$$b", "a$b"),
        ("$${EDGEPACK_PORT:-8080}", "${EDGEPACK_PORT:-8080}"),
        (512, "512"),
    ],
)
def test_a_word_of_a_compose_file_is_read_as_compose_reads_it(word: object, meant: str) -> None:
    assert images.plain(word) == meant


def test_no_more_threads_than_cores_are_started_here() -> None:
    command = ["llama-server", "--threads", "8", "--threads-batch", "1", "--threads-http", "5"]

    here = images.with_threads(command, 2)

    assert here == ["llama-server", "--threads", "2", "--threads-batch", "1", "--threads-http", "5"]


def test_the_images_that_bundles_name_are_built_here() -> None:
    tags = {tag for target in TARGETS.values() for tag in target["tags"]}

    assert {image for runtime in runtimes.RUNTIMES for image in runtime.IMAGES.values()} <= tags


def test_every_image_that_bake_builds_by_default_is_started_here_with_what_it_needs() -> None:
    assert set(images.TESTED) == set(BAKE["group"]["default"]["targets"])
    assert images.BUILDER in TARGETS
    assert images.BEHIND.keys() <= images.TESTED.keys()
    for front, server in images.BEHIND.items():
        assert images.TESTED[front] == images.TESTED[server]


def test_the_image_of_transformers_serves_the_bitsandbytes_schemes_that_the_planner_chooses_for_a_cpu() -> (
    None
):
    lock = (DOCKER / "requirements-transformers.txt").read_text(encoding="utf-8")

    for package in transformers.READERS["bnb"]:
        assert f"\n{package} " in lock
