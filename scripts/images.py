"""Builds the images of docker/ and starts them where there is neither a container engine nor an image registry.

    python scripts/images.py build TARGET...          targets of docker/bake.json; as root, on Debian
    python scripts/images.py start TARGET BUNDLE      what the bundle's compose.yaml would start, until it answers
    python scripts/images.py test [TARGET...]         both, with bundles of the built-in model made for it

The base is Debian's own root file system made by debootstrap, the builder is buildah without namespaces. A server is
started as compose would: read-only root, /tmp in memory, the bundle read-only at /bundle, user 10001 without
capabilities, a network of its own; asked for its health by the compose file's own check, then for a completion. Only
the number of threads is another where the plan's device has more cores than this machine. The front stands before
llama-server, and is asked for a chat. The build host is asked for a bundle of the built-in model, as its own user.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml

from edgepack import toolchain
from edgepack.progress import Silent

ROOT = Path(__file__).parents[1]
BASE = "localhost/edgepack/debian:bookworm"
SUITE = "bookworm"
ARCHITECTURES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
TESTED = {
    "llama-server-cpu": "llama.cpp",
    "edgepack-server-onnx-genai": "onnx-genai",
    "edgepack-server-transformers": "transformers",
    "edgepack-server-front": "llama.cpp",
}
"""Targets that run on a CPU, and the runtime whose bundles they serve."""
BEHIND = {"edgepack-server-front": "llama-server-cpu"}
"""Targets that stand before a server, and the target of that server."""
BUILDER = "build-host"
"""The target that makes bundles."""
DEMO = ("build", "--profile", "x86-laptop", "--model", "demo", "--scheme", "Q8_0")
"""What the build host is asked for."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PORT = 8080
FRONT_PORT = 8081
START_SECONDS = 180
UID = 10001

_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38


class Target(TypedDict, total=False):
    """A target of docker/bake.json."""

    dockerfile: str
    tags: list[str]
    platforms: list[str]
    args: dict[str, str]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("/var/tmp/edgepack-images"), help="where images lie"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build targets of docker/bake.json for this machine")
    build.add_argument("targets", nargs="+")
    build.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    build.add_argument(
        "--static",
        action="store_true",
        help="llama.cpp as edgepack's toolchain built it on this machine, not compiled again",
    )
    start = commands.add_parser("start", help="start an image with a bundle, and ask it")
    start.add_argument("target")
    start.add_argument("bundle", type=Path, help="a bundle file, or the folder of an unpacked one")
    test = commands.add_parser("test", help="build images and bundles, and start each")
    test.add_argument(
        "targets",
        nargs="*",
        default=[*TESTED, BUILDER],
        help=f"of {', '.join([*TESTED, BUILDER])} (default: all)",
    )
    test.add_argument(
        "--compile", action="store_true", help="llama.cpp inside the image, not the toolchain's"
    )
    inside = commands.add_parser("inside")
    inside.add_argument("request", type=Path)
    asked = parser.parse_args(words)
    if asked.command == "inside":
        request = json.loads(asked.request.read_text(encoding="utf-8"))
        if "toolchain" in request:
            make_bundle(request)
        else:
            serve(request)
        return
    missing = [name for name in ("buildah", "debootstrap", "unshare") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        sys.exit("this needs root, and on Debian: apt install buildah debootstrap util-linux")
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.command == "test":
        test_targets(asked.targets, asked.work, static=not asked.compile)
    elif asked.command == "build":
        ensure_base(asked.work)
        for name in asked.targets:
            build_target(name, asked.work, jobs=asked.jobs, static=asked.static)
    else:
        start_target(asked.target, asked.bundle, asked.work)


def targets() -> dict[str, Target]:
    """The targets of docker/bake.json by name."""
    document = json.loads((ROOT / "docker" / "bake.json").read_text(encoding="utf-8"))
    found: dict[str, Target] = document["target"]
    return found


def ensure_base(work: Path) -> None:
    """Makes the base image out of Debian's packages unless it is there; what this machine trusts, it trusts."""
    if buildah(work, "images", "--quiet", "--filter", f"reference={BASE}", capture=True):
        return
    with tempfile.TemporaryDirectory(dir=work) as folder:
        root = Path(folder) / "root"
        run("debootstrap", "--variant=minbase", SUITE, str(root))
        run("chroot", str(root), "apt-get", "clean")
        own = Path("/usr/local/share/ca-certificates")
        if own.is_dir():
            shutil.copytree(own, root / own.relative_to("/"), dirs_exist_ok=True)
        container = buildah(work, "from", "scratch", capture=True)
        buildah(work, "add", "--quiet", container, str(root), "/")
        buildah(work, "config", "--cmd", "bash", "--env", f"PATH={PATH}", container)
        buildah(work, "commit", "--quiet", "--rm", container, BASE)
    say(f"base {BASE} made of {SUITE}")


def build_target(name: str, work: Path, *, jobs: int, static: bool = False) -> None:
    """Builds one target for this machine's architecture, on the base made here and from today's packages.

    ``static``: with the llama-server that edgepack's toolchain built; the build host then has none, and is lent this
    machine's. Wheels in a folder that pip is told of
    (PIP_FIND_LINKS) take the place of further indexes.
    """
    target = targets()[name]
    platform = ARCHITECTURES[os.uname().machine]
    if platform not in target["platforms"]:
        sys.exit(f"{name} is for {', '.join(target['platforms'])}; this machine is {platform}")
    args = target.get("args", {})
    if "BUILD" in args:
        sys.exit(f"{name} stands on {args['BUILD'].partition('@')[0]}, which only a registry has")
    args = {**args, "DEBIAN": BASE, "SNAPSHOT": "", "JOBS": str(jobs)}
    more: list[str] = []
    if static and name == BUILDER:
        more += ["--target", "tools"]
    elif static:
        more += ["--build-context", f"build={place_static(work / 'static')}"]
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_absolute():
        args |= {"PIP_FIND_LINKS": "/mnt/wheels", "PIP_EXTRA_INDEX_URL": ""}
        more += ["--volume", f"{wheels}:/mnt/wheels:ro"]
    known = declared(ROOT / target["dockerfile"])
    words = [f"--build-arg={key}={value}" for key, value in sorted(args.items()) if key in known]
    started = time.monotonic()
    buildah(
        work, "build", "--format", "docker", "--isolation", "chroot", "--layers", "--pull-never", *words,
        *more, "--file", target["dockerfile"], "--tag", target["tags"][0], ".",
    )  # fmt: skip
    size = buildah(work, "images", "--format", "{{.ID}} {{.Size}}", target["tags"][0], capture=True)
    say(f"{target['tags'][0]}: {size}, built in {time.monotonic() - started:.0f} s")


def place_static(folder: Path) -> Path:
    """``folder`` with the static llama-server that bundles carry where the Dockerfile's build stage has its own."""
    machine: toolchain.Machine = "aarch64" if os.uname().machine == "aarch64" else "x86_64"
    program = folder / "build" / "bin" / "llama-server"
    program.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(toolchain.static_runtime(machine, Silent()), program)
    return folder


def test_targets(names: Sequence[str], work: Path, *, static: bool) -> None:
    """Builds each target, a bundle for it, and starts the one with the other; the build host makes one itself."""
    ensure_base(work)
    profile = work / "profile.yaml"
    served = [name for name in names if name != BUILDER]
    images = {TESTED[name]: targets()[BEHIND.get(name, name)]["tags"][0] for name in served}
    rows = [{"runtime": runtime, "reference": image} for runtime, image in sorted(images.items())]
    device = {"name": "images-test", "extends": "x86-laptop-ddr5", "software": {"images": rows}}
    profile.write_text(json.dumps(device), encoding="utf-8")
    for name in served:
        for each in (BEHIND[name], name) if name in BEHIND else (name,):
            build_target(each, work, jobs=os.cpu_count() or 1, static=static)
        words = ("--profile", str(profile), "--model", "demo", "--runtime", TESTED[name])
        bundle = edgepack("build", *words, "--output", str(work / "bundles"))
        start_target(name, Path(bundle), work)
    if BUILDER in names:
        build_target(BUILDER, work, jobs=os.cpu_count() or 1, static=static)
        start_builder(work, toolchain.find().root.parent if static else None)
    say(f"{len(names)} images built and started")


def declared(dockerfile: Path) -> frozenset[str]:
    """Names of the build arguments that a Dockerfile has."""
    text = dockerfile.read_text(encoding="utf-8")
    return frozenset(re.findall(r"^ARG (\w+)", text, re.MULTILINE))


def start_target(name: str, bundle: Path, work: Path) -> None:
    """Starts the image as the bundle's compose.yaml says, and ends when it has answered; exits 1 if it does not.

    What stands before a server is started before it, as `sh start.sh chat` does, in a network that both have.
    """
    server = BEHIND.get(name, name)
    containers: list[str] = []
    try:
        mounted = {each: mount_target(each, work, containers) for each in dict.fromkeys((server, name))}
        with tempfile.TemporaryDirectory(dir=work) as folder:
            unpacked = unpack(bundle, Path(folder) / "bundle")
            key = Path(folder) / "api-key"
            key.write_text("images-py-key\n", encoding="utf-8")
            for place in (Path(folder), unpacked, key):
                os.chown(place, UID, UID)
            before = {"front": mounted[name]} if name != server else {}
            request = Path(folder) / "request.json"
            request.write_text(
                json.dumps({"bundle": str(unpacked), "key": str(key), **mounted[server], **before}),
                encoding="utf-8",
            )
            run("unshare", "--mount", "--net", "--ipc", sys.executable, __file__, "inside", str(request))
    finally:
        for container in containers:
            buildah(work, "rm", container, capture=True)


def start_builder(work: Path, lent: Path | None) -> None:
    """Has the build host make a bundle of the built-in model, without a network; exits 1 when it does not.

    ``lent``: the folder of this machine's toolchain, for an image that was built without one. With the same programs it
    must make the bundle that this machine makes.
    """
    containers: list[str] = []
    here = Path(edgepack(*DEMO, "--output", str(work / "bundles")))
    try:
        mounted = mount_target(BUILDER, work, containers)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            request = Path(folder) / "request.json"
            lending = None if lent is None else str(lent)
            request.write_text(json.dumps({"toolchain": lending, **mounted}), encoding="utf-8")
            run("unshare", "--mount", "--net", "--ipc", sys.executable, __file__, "inside", str(request))
        there = next(Path(str(mounted["root"])).glob(f"home/*/out/{here.name}"))
        same = there.read_bytes() == here.read_bytes()
        say(f"{there.name}: {'the same' if same else 'other'} bytes as made on this machine")
        if lent is not None and not same:
            sys.exit("that is not how a build host is to run")
    finally:
        for container in containers:
            buildah(work, "rm", container, capture=True)


def mount_target(name: str, work: Path, containers: list[str]) -> dict[str, object]:
    """Where the image's root is, in a container that is added to ``containers``, and its configuration."""
    image = targets()[name]["tags"][0]
    container = buildah(work, "from", "--pull-never", image, capture=True)
    containers.append(container)
    inspected = json.loads(buildah(work, "inspect", "--type", "image", image, capture=True))
    root = buildah(work, "mount", container, capture=True)
    return {"root": root, "config": inspected["Docker"]["config"]}


def unpack(bundle: Path, folder: Path) -> Path:
    """The folder with the bundle's files under their own names (an unpacked bundle is copied)."""
    if bundle.is_dir():
        shutil.copytree(bundle, folder)
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as layout:
        with tarfile.open(bundle) as tar:
            tar.extractall(layout, filter="data")
        blobs = Path(layout) / "blobs" / "sha256"
        index = json.loads((Path(layout) / "index.json").read_text(encoding="utf-8"))
        manifest = json.loads((blobs / index["manifests"][0]["digest"].partition(":")[2]).read_bytes())
        for layer in manifest["layers"]:
            place = folder / layer["annotations"]["org.cncf.model.filepath"]
            place.parent.mkdir(parents=True, exist_ok=True)
            (blobs / layer["digest"].partition(":")[2]).rename(place)
            place.chmod(0o644)
    return folder


# ── inside the namespaces ──


def serve(request: Mapping[str, object]) -> None:
    """Lays the root out as compose does, starts the server in it and asks it."""
    root, bundle, key = (Path(str(request[name])) for name in ("root", "bundle", "key"))
    if not (bundle / "compose.yaml").is_file():
        sys.exit("the bundle has no compose.yaml: its profile names no image for its runtime")
    compose = yaml.safe_load((bundle / "compose.yaml").read_text(encoding="utf-8"))
    service = next(iter(compose["services"].values()))
    config = request["config"]
    if not isinstance(config, dict) or not service.get("read_only"):
        sys.exit("compose.yaml does not ask for a read-only root")
    loopback_up()
    lay_out(root, bundle, key)
    environment = dict(str(pair).split("=", 1) for pair in config["Env"])
    environment |= {name: plain(value) for name, value in service.get("environment", {}).items()}
    command = [*service.get("entrypoint", config["Entrypoint"]), *service["command"]]
    command = with_threads([plain(word) for word in command], os.cpu_count() or 1)
    say(f"$ {' '.join(command)}")
    server = start(root, command, environment)
    try:
        check = [plain(word) for word in service["healthcheck"]["test"][1:]]
        seconds = wait_healthy(server, lambda: succeeds(root, check, environment))
        say(f"healthy after {seconds:.1f} s")
        say(f"GET /health: {fetch('/health', None)}")
        body = {"prompt": "Prince Andrew looked up at", "max_tokens": 24, "temperature": 0}
        answer = json.loads(fetch("/v1/completions", body, key.read_text(encoding="utf-8").strip()))
        say(f"completion: {answer['choices'][0]['text']!r}")
        say(f"usage: {answer['usage']}")
        if isinstance(before := request.get("front"), dict):
            stand_before(server, before, compose["services"]["front"], bundle, key)
        facts = say_status(server)
        places = ("/usr/x", "/bundle/x", "/tmp/x")
        written = [place for place in places if succeeds(root, ["touch", place], environment)]
        say(f"of {', '.join(places)} can be written: {', '.join(written)}")
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=30)
    say(f"ended by SIGTERM with status {code}")
    if code != 0 or written != ["/tmp/x"] or int(facts["CapBnd"], 16) != 0:
        sys.exit("that is not how a server is to run")


def make_bundle(request: Mapping[str, object]) -> None:
    """Runs edgepack in the build host: its version, a plan, a bundle."""
    root, lent, config = Path(str(request["root"])), request["toolchain"], request["config"]
    if not isinstance(config, dict):
        sys.exit("the build host's image has no configuration")
    loopback_up()
    home = next(
        Path(fields[5])
        for line in (root / "etc/passwd").read_text(encoding="utf-8").splitlines()
        if (fields := line.split(":"))[2] == str(UID)
    )
    lay_out_root(root)
    if lent is not None:
        place = root / home.relative_to("/") / ".cache/edgepack/toolchain"
        place.mkdir(parents=True)
        for folder in (place, *list(place.parents)[:2]):
            os.chown(folder, UID, UID)
        bind(Path(str(lent)), place)
    environment = dict(str(pair).split("=", 1) for pair in config["Env"]) | {"HOME": str(home)}
    for words in (("--version",), ("plan", *DEMO[1:]), (*DEMO, "--output", "out")):
        command = [*config["Entrypoint"], *words]
        say(f"$ {' '.join(command)}")
        began = time.monotonic()
        status = start(root, command, environment, folder=str(config["WorkingDir"])).wait()
        say(f"status {status} after {time.monotonic() - began:.1f} s")
        if status != 0:
            sys.exit("that is not how a build host is to run")


def stand_before(
    server: subprocess.Popen[bytes],
    front: Mapping[str, object],
    service: Mapping[str, Any],
    bundle: Path,
    key: Path,
) -> None:
    """Starts the front before the server that runs, as the compose file has it, asks its /chat and ends it."""
    root, config = Path(str(front["root"])), front["config"]
    if not isinstance(config, dict):
        sys.exit("the front's image has no configuration")
    lay_out(root, bundle, key)
    environment = dict(str(pair).split("=", 1) for pair in config["Env"])
    environment |= {name: plain(value) for name, value in service["environment"].items()}
    environment["EDGEPACK_HOST"] = "127.0.0.1"  # both are in one network here
    started = start(root, [*service["entrypoint"], *service["command"]], environment)
    try:
        check = ["/bin/sh", "-c", plain(service["healthcheck"]["test"][1])]
        seconds = wait_healthy(started, lambda: succeeds(root, check, environment))
        say(f"front healthy after {seconds:.1f} s")
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "temperature": 0}
        say(f"chat: {fetch('/chat', body, key.read_text(encoding='utf-8').strip(), FRONT_PORT)}")
        facts = say_status(started)
        if server.poll() is not None:
            sys.exit("the server behind has ended")
    finally:
        started.send_signal(signal.SIGTERM)
        code = started.wait(timeout=30)
    say(f"front ended by SIGTERM with status {code}")
    if code != 0 or int(facts["CapBnd"], 16) != 0:
        sys.exit("that is not how a front is to run")


def say_status(process: subprocess.Popen[bytes]) -> dict[str, str]:
    """As whom the process runs, and its peak memory, out of /proc; all that is there is given back."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "VmHWM"):
        say(f"{name}: {facts[name].strip()}")
    return facts


def lay_out_root(root: Path) -> None:
    """What every container has in its root; all mounts end with this process."""
    mount("none", "/", _MS_REC | _MS_PRIVATE)
    mount(root, root, _MS_BIND | _MS_REC)
    mount("proc", root / "proc", 0, kind="proc")
    for name in ("null", "zero", "random", "urandom"):
        place = root / "dev" / name
        place.touch()
        mount(Path("/dev") / name, place, _MS_BIND)
    mount("tmpfs", root / "tmp", 0, kind="tmpfs", data="mode=1777,size=64m")


def lay_out(root: Path, bundle: Path, key: Path) -> None:
    """The mounts of the compose file."""
    lay_out_root(root)
    secret = root / "run/secrets/edgepack-api-key"
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.touch()
    (root / "bundle").mkdir(exist_ok=True)
    bind(bundle, root / "bundle")
    bind(key, secret)
    mount("none", root, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)


def bind(source: Path, place: Path) -> None:
    mount(source, place, _MS_BIND)
    mount("none", place, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)


def mount(source: Path | str, place: Path | str, flags: int, *, kind: str = "none", data: str = "") -> None:
    """mount(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (str(source).encode(), str(place).encode(), kind.encode())
    if libc.mount(*names, ctypes.c_ulong(flags), data.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {source} on {place}: {os.strerror(code)}")


def loopback_up() -> None:
    """A new network namespace has its loopback down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def start(
    root: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    output: int | None = None,
    *,
    folder: str = "/bundle",
) -> subprocess.Popen[bytes]:
    """The command as user 10001 in this root: no groups, no capabilities, no way to get any."""
    libc = ctypes.CDLL(None, use_errno=True)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))

    def confine() -> None:
        os.chroot(root)
        os.chdir(folder)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        for capability in range(last + 1):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)

    return subprocess.Popen(command, env=environment, preexec_fn=confine, stdout=output, stderr=output)


def succeeds(root: Path, command: Sequence[str], environment: Mapping[str, str]) -> bool:
    return start(root, command, environment, subprocess.DEVNULL).wait() == 0


def wait_healthy(server: subprocess.Popen[bytes], check: Callable[[], bool]) -> float:
    """Seconds until the health check passes; exits when the server ends or takes too long."""
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}")
        if check():
            return time.monotonic() - started
        time.sleep(0.5)
    sys.exit(f"not healthy within {START_SECONDS} s")


def fetch(path: str, body: Mapping[str, object] | None, key: str | None = None, port: int = PORT) -> str:
    """The answer's text. Raises URLError when it is not 200."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def with_threads(command: Sequence[str], cores: int) -> list[str]:
    """The command with no more threads than this machine has cores: more of them wait for one another by spinning."""
    return [
        str(min(int(word), cores)) if before in ("--threads", "--threads-batch") else word
        for before, word in zip(("", *command), command, strict=False)
    ]


def plain(word: object) -> str:
    """A value of a compose file with its variables at their defaults and $$ as $."""
    text = re.sub(r"(?<!\$)\$\{\w+:-([^}]*)\}", r"\1", str(word))
    return text.replace("$$", "$")


# ── programs ──


def edgepack(*words: str) -> str:
    """Runs this checkout's edgepack; the last line of its output."""
    argv = [sys.executable, "-m", "edgepack", *words]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def buildah(work: Path, *words: str, capture: bool = False) -> str:
    """Runs buildah with its storage under ``work``; its output when captured."""
    settings = work / "storage.conf"
    if not settings.exists():
        driver = "overlay" if overlays(work) else "vfs"
        text = f'[storage]\ndriver = "{driver}"\ngraphroot = "{work}/graph"\nrunroot = "{work}/run"\n'
        settings.write_text(text, encoding="utf-8")
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(settings), "BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(
        ["buildah", *words], cwd=ROOT, env=environment, check=True, text=True,
        stdout=subprocess.PIPE if capture else None,
    )  # fmt: skip
    return done.stdout.strip() if capture else ""


def overlays(work: Path) -> bool:
    """Whether layers can be laid over one another here; otherwise each is a whole copy of those below it."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        lower, upper, inner, place = (Path(folder) / name for name in ("lower", "upper", "work", "merged"))
        for each in (lower, upper, inner, place):
            each.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={inner}"
        try:
            mount("overlay", place, 0, kind="overlay", data=options)
        except OSError:
            return False
        subprocess.run(["umount", str(place)], check=True)
    return True


def run(*words: str) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode != 0:
        sys.exit(f"{words[0]} ended with status {done.returncode}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
