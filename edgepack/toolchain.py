"""One llama.cpp everywhere: its programs and library, compiled once from the sdist of llama-cpp-python."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Literal

from edgepack import runtimes
from edgepack.errors import BuildFailed, MissingTool, Offline, Unsupported, Untrusted
from edgepack.progress import Progress
from edgepack.shell import run
from edgepack.units import MIB, Bytes
from edgepack.workspace import cache_root, require_space, sha256_file, whole_dir, whole_file, write_text

Machine = Literal["x86_64", "aarch64"]

SDIST_VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""The llama.cpp commit that this sdist vendors."""
LLAMA_VERSION = "0.5.0-dev"

KNOWN_COMMITS = (COMMIT,)
"""Builds of llama-server whose flags, log lines and formulas this version of edgepack was held against."""

TARGETS = ("llama-server", "llama-bench", "llama-imatrix")
_BINDINGS = ("llama_cpp.py", "_ctypes_extensions.py", "_ggml.py")
_INIT = '"""The low-level bindings of llama-cpp-python alone; placed here by edgepack."""\n'

_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=OFF",
    "CMAKE_POSITION_INDEPENDENT_CODE=ON",
    "GGML_NATIVE=OFF",
    "GGML_OPENMP=OFF",
    "GGML_CCACHE=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_BUILD_NUMBER=1",
    f"LLAMA_BUILD_COMMIT={COMMIT[:9]}",
)
_ARM_DOTPROD = "GGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16"
"""Every Jetson since Xavier and the Raspberry Pi 5 have these; the Pi 4 does not."""

_X86_NEEDS = frozenset({"avx2", "fma", "f16c", "bmi2"})
_NINJA_LINE = re.compile(r"^\[(\d+)/(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """An installed llama.cpp."""

    root: Path
    version: str
    """Version of the sdist, e.g. 0.3.36; `COMMIT` names the llama.cpp inside."""
    server: Path
    bench: Path
    imatrix: Path
    package: Path
    """Folder whose `llama_cpp` package and `llama_cpp/lib/libllama.so` are the bindings."""

    def bindings(self) -> ModuleType:
        """The module llama_cpp.llama_cpp of this toolchain; raises BuildFailed when another is loaded."""
        return load_bindings(self.package)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What `edgepack toolchain status` shows."""

    installed: bool
    version: str
    llama_version: str
    commit: str
    arch: str
    root: Path
    server: Path | None
    """The server that would be used: the installed one, else a known one on PATH."""
    bytes: Bytes
    """Size of the installed files; 0 when not installed."""
    build_tree_bytes: Bytes
    """Size of source and objects, kept so that relinking and resuming are quick; may be deleted."""


def find() -> Toolchain:
    """The installed toolchain. Raises MissingTool with the command that installs it."""
    toolchain = _toolchain(_home(_machine()))
    if not toolchain.root.is_dir():
        raise MissingTool(
            f"llama.cpp {LLAMA_VERSION} ({COMMIT[:9]}) is not installed in {toolchain.root.parent}",
            hint="run: edgepack toolchain install (about 8 minutes on 2 cores, once)",
        )
    return toolchain


def find_server() -> Path:
    """The llama-server to run: the installed one, else one on PATH whose version is known to work."""
    toolchain = _toolchain(_home(_machine()))
    if toolchain.server.is_file():
        return toolchain.server
    on_path = shutil.which("llama-server")
    if on_path is not None:
        said = run([on_path, "--version"], check=False)
        if is_known(said.stderr + said.stdout):
            return Path(on_path)
    return find().server


def find_emulator(arch: Machine) -> Path | None:
    """QEMU's user-mode emulator of ``arch`` on PATH; None when there is none."""
    for name in (f"qemu-{arch}-static", f"qemu-{arch}"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    return None


def python_for(runtime: str) -> Path:
    """The Python that can run a runtime's server: EDGEPACK_PYTHON, this one, or one that a bundle would find here.

    Whether one can is asked of itself, without importing anything heavy. Raises MissingTool with what to install.
    """
    from edgepack.device import agent

    needed = agent.RUNTIMES[runtime]
    try:
        if not os.environ.get(agent.PYTHON_VARIABLE) and not agent.lacks(sys.executable, needed.modules):
            return Path(sys.executable)
        program, _ = agent.find_python(needed, None)
    except agent.MissingProgram as error:
        raise MissingTool(str(error), hint=runtimes.named(runtime).INSTALL) from error
    return Path(program)


APP = Path(__file__).parent / "server"
"""The package that serves runtimes without a server of their own; a bundle carries a copy as edgepack_server."""


def app_in(folder: Path) -> Path:
    """A new ``folder`` in which our own server package has the name that bundles give it, as the agent starts it."""
    from edgepack.device import agent

    folder.mkdir(parents=True)
    (folder / agent.APP.rstrip("/")).symlink_to(APP, target_is_directory=True)
    return folder


def find_static(arch: Machine) -> Path:
    """The static llama-server that was built here for bundles of ``arch``. Raises MissingTool when none was."""
    binary = _static_home(arch) / "llama-server"
    if not binary.is_file():
        raise MissingTool(
            f"no llama-server for {arch} was built here, and none in the bundle may be run",
            hint="check a signed bundle made --with-runtime with --allowed-signers, or give --server PATH",
        )
    return binary


def is_known(version_text: str) -> bool:
    """Whether the text of ``llama-server --version`` names a build that edgepack was held against."""
    match = re.search(r"commit ([0-9a-f]{7,40})", version_text)
    return match is not None and any(known.startswith(match.group(1)) for known in KNOWN_COMMITS)


def status() -> Status:
    """What is installed, where, and how big it is."""
    machine = _machine()
    home = _home(machine)
    installed = home.is_dir()
    server: Path | None = None
    try:
        server = find_server()
    except MissingTool:
        server = None
    return Status(
        installed=installed,
        version=SDIST_VERSION,
        llama_version=LLAMA_VERSION,
        commit=COMMIT,
        arch=machine,
        root=home,
        server=server,
        bytes=_size(home),
        build_tree_bytes=Bytes(_size(_build_tree(home)) + _size(_source_home())),
    )


def install(progress: Progress) -> Toolchain:
    """Fetches, compiles and installs llama.cpp unless it is there; an interrupted install resumes.

    Raises Offline when the sdist cannot be fetched, Untrusted when it is not the pinned one, MissingTool
    without cmake, ninja or a C++ compiler, BuildFailed when the compiler fails.
    """
    machine = _machine()
    home = _home(machine)
    toolchain = _toolchain(home)
    if home.is_dir():
        return toolchain
    _require_cpu(machine)
    with _lock(progress):
        if home.is_dir():
            return toolchain
        require_space(home.parent, 700 * MIB)
        _require_compiler()
        source = _source(progress)
        tree = _compile(source, home, _options(machine), TARGETS, progress)
        progress.step("linking libllama.so")
        with whole_dir(home) as folder:
            _place(source, tree, folder)
            _prove(folder)
        progress.step(f"installed llama.cpp {LLAMA_VERSION} ({COMMIT[:9]}) in {home}")
    return toolchain


def static_runtime(arch: Machine, progress: Progress) -> Path:
    """A stripped llama-server for ``arch`` that needs no library of the device, built from the same source.

    x86_64 relinks the installed objects; aarch64 is cross-compiled (MissingTool without the compiler).
    Raises Unsupported for a pair of machines that has no recipe.
    """
    host = _machine()
    cross = arch != host
    if cross and (host, arch) != ("x86_64", "aarch64"):
        raise Unsupported(
            f"a static llama-server for {arch} cannot be built on {host}", hint=f"build on a {arch} machine"
        )
    options = _static_options(arch)
    home = _static_home(arch)
    binary = home / "llama-server"
    if binary.is_file():
        return binary
    prefix = "aarch64-linux-gnu-" if cross else ""
    if cross and shutil.which(f"{prefix}g++") is None:
        raise MissingTool(
            "the aarch64 cross compiler is not installed",
            hint="apt install g++-aarch64-linux-gnu, or build on an aarch64 machine",
        )
    with _lock(progress):
        source = _source(progress)
        objects = home if cross else _home(arch)
        tree = _compile(source, objects, options, ("llama-server",), progress)
        progress.step(f"linking a static llama-server for {arch}")
        with whole_dir(home) as folder:
            out = folder / "llama-server"
            run(_static_link(tree, out), cwd=tree)
            run([f"{prefix}strip", out])
            require_static(out)
    return binary


def program(name: str, progress: Progress) -> Path:
    """Another program of the same llama.cpp, e.g. llama-quantize: linked from the installed one's objects, and kept.

    For holding edgepack against it; nothing that edgepack ships needs it. Raises as ``install`` does.
    """
    home = _home(_machine())
    binary = home.parent / f"programs-{home.name}" / name
    if binary.is_file():
        return binary
    with _lock(progress):
        tree = _compile(_source(progress), home, _options(_machine()), (name,), progress)
        with whole_file(binary) as temporary:
            shutil.copy2(tree / "bin" / name, temporary)
    return binary


def converter(progress: Progress) -> Path:
    """llama.cpp's convert_hf_to_gguf.py of the same source, beside the gguf-py that it imports."""
    with _lock(progress):
        return _source(progress) / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"


def load_bindings(package: Path) -> ModuleType:
    """The module llama_cpp.llama_cpp of the toolchain folder ``package``; nothing else of it is imported."""
    name, variable = "llama_cpp.llama_cpp", "LLAMA_CPP_LIB_PATH"
    loaded = sys.modules.get(name)
    if loaded is not None:
        if Path(loaded.__file__ or "").resolve().parent == (package / "llama_cpp").resolve():
            return loaded
        raise BuildFailed(f"another llama_cpp is already loaded from {loaded.__file__}")
    before = os.environ.get(variable)
    os.environ[variable] = str(package / "llama_cpp" / "lib")
    sys.path.insert(0, str(package))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(package))
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


# ── where things are ──


def _machine() -> Machine:
    name = platform.machine().lower()
    if name in ("x86_64", "amd64"):
        return "x86_64"
    if name in ("aarch64", "arm64"):
        return "aarch64"
    raise Unsupported(f"machine {name!r} is neither x86_64 nor aarch64")


def _root() -> Path:
    return cache_root() / "toolchain"


def _static_home(arch: Machine) -> Path:
    return _root() / f"static-{_key(arch, _static_options(arch))}"


def _home(machine: Machine) -> Path:
    return _root() / _key(machine, _options(machine))


def _key(machine: Machine, options: Sequence[str]) -> str:
    recipe = "\n".join((SDIST_SHA256, machine, *options, *_BINDINGS))
    return f"{SDIST_VERSION}-{machine}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"


def _build_tree(home: Path) -> Path:
    return home.parent / f"build-{home.name}"


def _source_home() -> Path:
    return _root() / f"src-{SDIST_VERSION}"


def _toolchain(home: Path) -> Toolchain:
    return Toolchain(
        root=home,
        version=SDIST_VERSION,
        server=home / "bin" / "llama-server",
        bench=home / "bin" / "llama-bench",
        imatrix=home / "bin" / "llama-imatrix",
        package=home,
    )


def _size(folder: Path) -> Bytes:
    if not folder.is_dir():
        return Bytes(0)
    return Bytes(sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()))


@contextmanager
def _lock(progress: Progress) -> Iterator[None]:
    """One install at a time; the lock ends with the process that holds it."""
    _root().mkdir(parents=True, exist_ok=True)
    with (_root() / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step("waiting for another edgepack that is building llama.cpp")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# ── source ──


def _source(progress: Progress) -> Path:
    """Folder of the unpacked sdist (only what the build needs)."""
    home = _source_home()
    if not home.is_dir():
        archive = _sdist(progress)
        progress.step("unpacking the source")
        with whole_dir(home) as folder:
            unpack(archive, folder, wanted=_wanted)
    return home / f"llama_cpp_python-{SDIST_VERSION}"


def _sdist(progress: Progress) -> Path:
    """The pinned sdist, fetched by pip from whatever index the user has configured."""
    name = f"llama_cpp_python-{SDIST_VERSION}.tar.gz"
    archive = _root() / name
    if archive.is_file() and sha256_file(archive) == SDIST_SHA256:
        return archive
    progress.step(f"fetching {name} (77 MB)")
    with tempfile.TemporaryDirectory(dir=_root(), prefix=".fetch-") as temporary:
        # pip asks the build backend for metadata, so it must check the hash before that, not we after it.
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(
            f"llama-cpp-python=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8"
        )
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
        what = ("--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes", "--requirement", wanted)
        path = os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)))
        done = run([*pip, *what, "--dest", temporary], env={"PATH": path}, check=False)
        said = (done.stderr or done.stdout).strip()
        if "DO NOT MATCH THE HASHES" in said:
            raise Untrusted(f"the package index gave a {name} that is not the pinned one:\n{said[-600:]}")
        if "No module named pip" in said:
            raise MissingTool("this Python environment has no pip", hint="python -m ensurepip, and try again")
        fetched = Path(temporary) / name
        if done.returncode != 0 or not fetched.is_file():
            raise Offline(
                f"pip could not fetch llama-cpp-python {SDIST_VERSION}:\n{said[-600:]}",
                hint=f"check the network or pip's index settings, or put {name} into {_root()}",
            )
        fetched.replace(archive)
    return archive


_UNUSED = ("docs/", "media/", "models/", "tests/", "examples/", "benches/", ".git/", ".github/", ".devops/")


def _wanted(name: str) -> bool:
    """Keeps the bindings, the licences and the C++ source; leaves out what the build never reads."""
    inside, _, rest = name.partition("vendor/llama.cpp/")
    if not rest:
        return name in ("LICENSE.md", *(f"llama_cpp/{file}" for file in _BINDINGS))
    return inside == "" and not rest.startswith(_UNUSED)


def unpack(archive: Path, folder: Path, *, wanted: Callable[[str], bool]) -> None:
    """Unpacks plain files inside ``folder`` and nothing else; ``wanted`` sees names below the top folder.

    Raises Untrusted for links, devices, absolute names and names that leave the folder.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or "\\" in member.name or not name.parts:
                raise Untrusted(f"{archive.name} holds a member that leaves its folder: {member.name!r}")
            if member.isdir():
                continue
            if not member.isreg():
                raise Untrusted(f"{archive.name} holds {member.name!r}, which is not a plain file")
            inner = "/".join(name.parts[1:])
            if not wanted(inner):
                continue
            content = tar.extractfile(member)
            if content is None:
                raise Untrusted(f"{archive.name}: {member.name!r} cannot be read")
            target = folder / name
            if target.exists():
                raise Untrusted(f"{archive.name} holds {member.name!r} twice")
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("xb") as out:
                shutil.copyfileobj(content, out, 1 << 20)
            if member.mode & 0o100:
                target.chmod(0o755)


# ── compile ──


def _options(machine: Machine) -> tuple[str, ...]:
    if machine == "aarch64" and (platform.machine() != "aarch64" or "asimddp" in _cpu_features()):
        return (*_OPTIONS, _ARM_DOTPROD)
    return _OPTIONS


def _static_options(arch: Machine) -> tuple[str, ...]:
    return _options(arch) if arch == _machine() else (*_options(arch), *_cross_options())


def _cross_options() -> tuple[str, ...]:
    return (
        "CMAKE_SYSTEM_NAME=Linux",
        "CMAKE_SYSTEM_PROCESSOR=aarch64",
        "CMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
        "CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM=NEVER",
        "CMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY",
        "CMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY",
    )


def _compile(
    source: Path, home: Path, options: Sequence[str], targets: Sequence[str], progress: Progress
) -> Path:
    """Brings the persistent build tree of ``home`` up to date and returns it."""
    tree = _build_tree(home)
    cmake, ninja = _program("cmake", "cmake"), _program("ninja", "ninja-build")
    if not any(option.startswith("CMAKE_CXX_COMPILER=") for option in options):
        _require_compiler()
    llama = source / "vendor" / "llama.cpp"
    # Paths of this machine must not be in a binary that travels: the same source gives the same bytes.
    flags = f"-ffile-prefix-map={llama}=llama.cpp"
    defines = [f"-D{option}" for option in options]
    defines += [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if (tree / "CMakeCache.txt").is_file() and Path(_cache_entry(tree, "CMAKE_CACHEFILE_DIR")) != tree:
        # The cache was moved or copied, and CMake takes no tree from elsewhere.
        shutil.rmtree(tree)
    progress.step("configuring llama.cpp")
    run([cmake, "-G", "Ninja", "-S", llama, "-B", tree, "-Wno-dev", *defines])
    done = 0
    with progress.bar(f"compiling llama.cpp ({', '.join(targets)})", 100) as advance:

        def on_line(line: str) -> None:
            nonlocal done
            match = _NINJA_LINE.match(line)
            if match is not None:
                percent = 100 * int(match.group(1)) // int(match.group(2))
                advance(percent - done)
                done = percent

        run(
            [cmake, "--build", tree, "--target", *targets, "--parallel", str(_jobs())],
            env={"NINJA_STATUS": "[%f/%t] "},
            on_line=on_line,
        )
    return tree


def _place(source: Path, tree: Path, folder: Path) -> None:
    """Fills the toolchain folder from a finished build tree."""
    for target in TARGETS:
        (folder / "bin").mkdir(exist_ok=True)
        shutil.copy2(tree / "bin" / target, folder / "bin" / target)
    package = folder / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(_INIT, encoding="utf-8")
    for name in _BINDINGS:
        shutil.copyfile(source / "llama_cpp" / name, package / name)
    library = package / "lib" / "libllama.so"
    archives = ("src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")
    compiler = _cache_entry(tree, "CMAKE_CXX_COMPILER")
    whole = ("-Wl,--whole-archive", *(str(tree / name) for name in archives), "-Wl,--no-whole-archive")
    system = ("-Wl,-soname,libllama.so", "-Wl,--no-undefined", "-lpthread", "-ldl", "-lm")
    run([compiler, "-shared", "-o", library, *whole, *system])
    # The bindings look for a libggml.so as well; the same file under a second name is the same library.
    os.link(library, package / "lib" / "libggml.so")
    shutil.copyfile(source / "LICENSE.md", folder / "LICENSE.llama-cpp-python")
    shutil.copyfile(source / "vendor" / "llama.cpp" / "LICENSE", folder / "LICENSE.llama.cpp")
    record = {
        "sdist": SDIST_VERSION,
        "sdist_sha256": SDIST_SHA256,
        "llama_version": LLAMA_VERSION,
        "commit": COMMIT,
        "options": list(_options(_machine())),
    }
    write_text(folder / "toolchain.json", json.dumps(record, indent=2, sort_keys=True) + "\n")


def _prove(folder: Path) -> None:
    """Runs what was built, so that a folder that exists is one that works."""
    said = run([folder / "bin" / "llama-server", "--version"])
    if not is_known(said.stderr + said.stdout):
        raise BuildFailed(f"the llama-server that was built names another commit: {said.stderr.strip()}")
    program = "import llama_cpp.llama_cpp as l; l.llama_backend_init(); assert l.llama_supports_mmap()"
    library = str(folder / "llama_cpp" / "lib")
    run([sys.executable, "-c", program], env={"PYTHONPATH": str(folder), "LLAMA_CPP_LIB_PATH": library})


def _static_link(tree: Path, out: Path) -> list[str]:
    """The link command of llama-server in this build tree, with -static and another output."""
    said = run([_program("ninja", "ninja-build"), "-C", tree, "-t", "commands", "bin/llama-server"])
    words = shlex.split(said.stdout.strip().splitlines()[-1])
    command = [word for word in words if word not in (":", "&&")]
    position = command.index("-o")
    launcher = next(i for i, word in enumerate(command) if Path(word).name not in ("ccache", "sccache"))
    return [*command[launcher:position], "-static", "-o", str(out), *command[position + 2 :]]


def require_static(binary: Path) -> None:
    """Raises BuildFailed when the ELF file asks for a dynamic loader (has a PT_INTERP header)."""
    data = binary.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise BuildFailed(f"{binary} is not a 64-bit little-endian ELF file")
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    if any(struct.unpack_from("<I", data, offset + i * size)[0] == 3 for i in range(count)):
        raise BuildFailed(f"{binary} is not static", hint="install the static C library (libc6-dev)")


# ── what this machine has ──


def _program(name: str, package: str) -> Path:
    """cmake or ninja from this Python environment (the PyPI packages), else from PATH."""
    for place in (str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)):
        found = shutil.which(name, path=place)
        if found is not None:
            return Path(found)
    raise MissingTool(f"{name} is not installed", hint=f"pip install {name}, or apt install {package}")


def _require_compiler() -> None:
    if "CXX" not in os.environ and all(shutil.which(name) is None for name in ("c++", "g++", "clang++")):
        raise MissingTool("no C++ compiler is installed", hint="apt install g++")


def _cpu_features() -> frozenset[str]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def _require_cpu(machine: Machine) -> None:
    missing = _X86_NEEDS - _cpu_features() if machine == "x86_64" else frozenset()
    if missing:
        raise Unsupported(
            f"this processor lacks {', '.join(sorted(missing))}, which the portable build uses",
            hint="use an x86-64 machine of 2013 or later, or an aarch64 one",
        )


def _jobs() -> int:
    """Compilers at once: a core each, and 1.5 GiB of free memory each."""
    asked = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), free // (1536 * MIB)))


def _cache_entry(tree: Path, name: str) -> str:
    text = (tree / "CMakeCache.txt").read_text(encoding="utf-8")
    match = re.search(rf"^{name}:[A-Z]+=(.+)$", text, re.MULTILINE)
    if match is None:
        raise BuildFailed(f"{tree} has no {name}", hint=f"remove {tree} and try again")
    return match.group(1)
