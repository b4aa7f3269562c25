"""The profile of the machine this runs on: what the kernel says, what the driver says, and one measurement.

No CUDA context is made, and nothing but nvidia-smi is started, where NVML's bindings are missing. Every value that
is not inherited names where it was read; one that cannot be read is the nearest profile's, and marked uncertain.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from edgepack import l4t, serde, shell
from edgepack import profile as profiles
from edgepack.errors import BadInput, Unsupported
from edgepack.profile import (
    Accelerator,
    Arch,
    DeviceClass,
    DeviceProfile,
    Match,
    PowerMode,
    Reserves,
    Software,
)
from edgepack.units import KIB, MIB, Bytes, show

NAME = "this-machine"
_FEATURES: Mapping[Arch, tuple[str, ...]] = {
    "x86_64": ("avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni",
               "avx512_bf16", "amx_int8", "amx_bf16"),
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}  # fmt: skip
"""CPU flags that llama.cpp has kernels for (ggml/src/ggml-cpu), as /proc/cpuinfo spells them."""
_BUFFER = 256 * MIB
_SECONDS = 0.5
_DESKTOP = Bytes(1200 * MIB)
"""What a desktop session adds: GNOME 865 MiB (jetson-containers docs/setup.md) and what one opens in it."""
_WINDOWS_DISPLAY = Bytes(1100 * MIB)
"""What Windows keeps of an 8 GB card under WSL2 (ollama#7996)."""
_CUDA_CONTEXT = Bytes(300 * MIB)
"""120-550 MB by SM count (llama.cpp PR#20595)."""
_CUDA_CONTEXT_PER_SM = Bytes(5 * MIB)
"""For larger cards: 607 MiB on an H200 with 132 multiprocessors (driver 580), 555 on an RTX PRO 6000 with 188, 107 on a
4060 Ti with 34 (llama.cpp PR#23604); the upper end of these."""
_LEAST_MEMORY = 64 * MIB
"""A MemTotal below this is a broken capture, not a machine that runs models."""
_PATIENCE = 1.2
"""Seconds that files and drivers have to answer, all of them at once; what hangs must not hold up the rest."""
FILES: tuple[str, ...] = (
    "etc/nv_tegra_release",
    "etc/nvpmodel.conf",
    "etc/os-release",
    "nvidia-smi.csv",
    "proc/cpuinfo",
    "proc/device-tree/compatible",
    "proc/device-tree/model",
    "proc/driver/nvidia/gpus/*/information",
    "proc/meminfo",
    "proc/self/status",
    "proc/sys/kernel/osrelease",
    "sys/class/dmi/id/product_name",
    "sys/devices/system/cpu/cpu0/cache/index*/size",
    "sys/fs/cgroup/cpu.max",
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/memory.stat",
    "var/lib/nvpmodel/status",
)
"""Every file of a root that is read; capture.sh, which each bundle carries, takes the same ones."""
_SMI = "name,memory.total,memory.used,compute_cap"
"""What nvidia-smi is asked for; a capture has its answer, with the header, in nvidia-smi.csv at its root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One field of the profile and where its value was read."""

    field: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    profile: DeviceProfile
    nearest: str
    """The built-in profile that gives what was not read here."""
    findings: tuple[Finding, ...]


def probe(root: Path = Path("/")) -> Probed:
    """What this machine is, within about two seconds.

    Another ``root`` reads a captured /proc, /sys and /etc, and nvidia-smi.csv where there was a card; then nothing
    is measured and no driver is asked, and bandwidths are the nearest built-in profile's. Raises Unsupported for a
    machine that is neither x86-64 nor 64-bit Arm, BadInput for a root without /proc.
    """
    live = root == Path("/")
    until = time.monotonic() + _PATIENCE
    driver = _Question(lambda: _driver(until)) if live else None
    psutil_says = _Question(_memory_now) if live else None
    disk_says = _Question(_free_disk) if live else None
    files = _Files.read(root, until)
    now = psutil_says.answer(until) if psutil_says else None
    disk = disk_says.answer(until) if disk_says else None
    card, silent = _card(files, driver, until)
    system = _System.read(files, root, now)
    tree = _names(files)
    every = [profiles.load(name) for name in profiles.names()]
    kind = _kind(every, tree, card)
    nearest = _nearest(every, kind, system, tree, card)
    found = replace(
        nearest,
        name=NAME,
        title=f"{system.cpu}, {show(system.memory or nearest.memory)}",
        aliases=(),
        arch=system.arch,
        memory=system.memory or nearest.memory,
        cpu_cores=system.cores or nearest.cpu_cores,
        cpu_features=system.features or nearest.cpu_features,
        disk=nearest.disk if disk is None else Bytes(disk),
        software=replace(nearest.software, os=system.os or nearest.software.os),
        reserves=_system_reserves(nearest, system),
        match=_match(kind, system, nearest, card),
    )
    findings, unknown = _said(system, nearest)
    if silent:
        findings.append(Finding(field="accelerator", source=f"unknown: {silent}"))
    match kind:
        case "jetson":
            found, more = _as_jetson(found, nearest, files)
        case "nvidia-discrete":
            found, more = _as_card(found, nearest, system, card)
        case "amd-apu" | "apple":
            more = (Finding(field="power_modes", source=f"as {nearest.name}; nothing was measured"),)
        case _:
            found, more = _as_cpu(found, nearest, system, live=live)
    if disk is not None:
        findings.append(Finding(field="disk", source="free space of the home folder"))
    findings += [Finding(field=f"/{name}", source="unknown: it did not answer") for name in files.silent]
    read = {"memory", "cpu_cores", "cpu_features", "match"}
    uncertain = (*(name for name in found.uncertain if name not in read), *unknown)
    return Probed(
        profile=replace(found, uncertain=tuple(dict.fromkeys(uncertain))),
        nearest=nearest.name,
        findings=(*findings, *more),
    )


def to_yaml(probed: Probed) -> str:
    """A profile file: it extends the nearest built-in one and gives what differs, with sources as comments."""
    base = serde.dump(profiles.load(probed.nearest), sizes_as_text=True)
    own = serde.dump(probed.profile, sizes_as_text=True)
    if not isinstance(base, dict) or not isinstance(own, dict):
        raise TypeError("a profile's document is a set of fields")
    document = {"extends": probed.nearest, **_differing({**base, "aliases": []}, own)}
    sources = {finding.field: finding.source for finding in probed.findings}
    lines = [
        "# Written by edgepack probe. What is not here is as in the profile that this one extends.",
        *(f"# {name}: {source}" for name, source in sources.items() if name not in document),
    ]
    for line in serde.to_yaml(document).splitlines():
        name = line.partition(":")[0]
        lines += [f"# {sources[name]}"] if name in sources else []
        lines.append(line)
    return "\n".join(lines) + "\n"


def read_bandwidth(*, threads: int, size: int = _BUFFER, seconds: float = _SECONDS) -> float:
    """Bytes per second at which ``threads`` cores together read memory that is not in their caches; the best pass.

    libc's memchr looks for a byte that is not there: it loads every cache line once, writes nothing, uses the
    widest loads the CPU has, and runs without Python's lock. Pages are written first, since untouched ones all
    map to a single page of zeros. Raises Unsupported where libc has no memchr.
    """
    import ctypes
    import mmap

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "memchr"):
        raise Unsupported("libc has no memchr to measure memory bandwidth with")
    libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memchr.restype = ctypes.c_void_p
    share = size // threads
    with mmap.mmap(-1, size) as buffer:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        view = (ctypes.c_char * size).from_buffer(buffer)
        start = ctypes.addressof(view)
        gate = threading.Barrier(threads + 1)
        passes: list[float] = []
        stop = threading.Event()

        def work(address: int) -> None:
            ctypes.memset(address, 1, share)
            while True:
                gate.wait()
                if stop.is_set():
                    return
                libc.memchr(address, 2, share)
                gate.wait()

        workers = [threading.Thread(target=work, args=(start + at * share,)) for at in range(threads)]
        for worker in workers:
            worker.start()
        spent = 0.0
        while len(passes) < 3 or spent < seconds:
            gate.wait()
            began = time.perf_counter()
            gate.wait()
            passes.append(time.perf_counter() - began)
            spent += passes[-1]
        stop.set()
        gate.wait()
        for worker in workers:
            worker.join()
        del view  # the buffer cannot close while it is looked at
    return share * threads / min(passes)


# ── asking without waiting for ever ──────────────────────────────────────────────────────────────────

_Answer = TypeVar("_Answer")


class _Question(Generic[_Answer]):
    """Asked at once, on a thread that ends with the program when it hangs."""

    def __init__(self, ask: Callable[[], _Answer]) -> None:
        self.answers: list[_Answer] = []
        self.worker = threading.Thread(target=lambda: self.answers.append(ask()), daemon=True)
        self.worker.start()

    def answer(self, until: float) -> _Answer | None:
        """None when there is none by then (time.monotonic)."""
        self.worker.join(max(0.0, until - time.monotonic()))
        return self.answers[0] if self.answers else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    texts: Mapping[str, tuple[str, ...]]
    """By their names in FILES; more than one behind a star."""
    silent: tuple[str, ...]
    """Those that did not answer."""

    @staticmethod
    def read(root: Path, until: float) -> _Files:
        asked = {name: _Question(partial(_texts, root, name)) for name in FILES}
        said = {name: question.answer(until) for name, question in asked.items()}
        return _Files(
            texts={name: texts or () for name, texts in said.items()},
            silent=tuple(name for name, texts in said.items() if texts is None),
        )

    def text(self, name: str) -> str:
        """A file of the kernel's; "" where this kernel has none or will not let it be read."""
        return next(iter(self.texts[name]), "")


def _texts(root: Path, name: str) -> tuple[str, ...]:
    return tuple(_text(path) for path in (sorted(root.glob(name)) if "*" in name else (root / name,)))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes() if path.is_file() else b""
    except OSError:
        return ""
    return data.replace(b"\0", b"\n").decode("utf-8", errors="replace")


# ── what the kernel says ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    arch: Arch
    cpu: str
    cores: int | None
    """None, like the two below, where the kernel does not say."""
    cores_source: str
    features: tuple[str, ...]
    memory: Bytes | None
    memory_source: str
    used: Bytes | None
    used_source: str
    cache: int
    """Largest CPU cache in bytes; 0 when not said."""
    os: str | None
    windows: bool
    """Under WSL."""
    desktop: bool
    """A desktop session is open now."""

    @staticmethod
    def read(files: _Files, root: Path, now: tuple[int, int] | None) -> _System:
        """``now``: memory in all and in use, as this machine has it; None for a captured one."""
        live = root == Path("/")
        cpuinfo = files.text("proc/cpuinfo")
        if not cpuinfo and not files.text("proc/meminfo"):
            raise BadInput(
                f"{root} has no /proc with cpuinfo and meminfo", hint="give the root of a Linux system"
            )
        arch = _arch(cpuinfo, files)
        if live and platform.machine() != arch:
            raise Unsupported(
                f"a {platform.machine()} machine is not known", hint="x86-64 and 64-bit Arm are"
            )
        flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)).split())
        cores, cores_source = _cores(cpuinfo, files)
        memory, used = now or _memory(files)
        memory_source, used_source = (
            "MemTotal in /proc/meminfo",
            "MemTotal - MemAvailable in /proc/meminfo, now",
        )
        limit = files.text("sys/fs/cgroup/memory.max").strip()
        if limit.isdigit() and (memory is None or int(limit) < memory):
            memory, memory_source = int(limit), "memory.max of this control group (a container's limit)"
            used, used_source = _cgroup_used(files), "memory.stat of this control group, now"
        model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.M)
        release = files.text("proc/sys/kernel/osrelease")
        name = re.search(r'^PRETTY_NAME="?([^"\n]+)', files.text("etc/os-release"), re.M)
        return _System(
            arch=arch,
            cpu=" ".join(model.group(1).split()) if model else _model(files) or f"{arch} CPU",
            cores=cores,
            cores_source=cores_source,
            features=tuple(feature for feature in _FEATURES[arch] if feature in flags),
            memory=None if memory is None else Bytes(memory),
            memory_source=memory_source,
            used=None if used is None else Bytes(used),
            used_source=used_source,
            cache=max(map(_size, files.texts["sys/devices/system/cpu/cpu0/cache/index*/size"]), default=0),
            os=name.group(1) if name else None,
            windows="microsoft" in release.lower(),
            desktop=live and any(os.environ.get(key) for key in ("DISPLAY", "WAYLAND_DISPLAY")),
        )


def _arch(cpuinfo: str, files: _Files) -> Arch:
    """x86 says flags and Arm Features; where neither is left, only Arm boards have a device tree."""
    if re.search(r"^flags\s*:", cpuinfo, re.M):
        return "x86_64"
    arm = re.search(r"^(?:Features|CPU implementer)\s*:", cpuinfo, re.M) or _model(files)
    return "aarch64" if arm else "x86_64"


def _free_disk() -> int | None:
    """Bytes that are free in the home folder; None where there is no home."""
    try:
        return shutil.disk_usage(Path.home()).free
    except (OSError, RuntimeError):
        return None


def _memory_now() -> tuple[int, int]:
    """Bytes of this machine's memory, and those of them that no new program can have."""
    import psutil  # it also knows kernels that do not say MemAvailable

    now = psutil.virtual_memory()
    return now.total, now.total - now.available


def _memory(files: _Files) -> tuple[int | None, int | None]:
    """The same of a captured machine; None for what is not said."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", files.text("proc/meminfo"), re.M)
    said = {name: int(kib) * KIB for name, kib in found}
    total, available = said.get("MemTotal"), said.get("MemAvailable")
    if total is None or total < _LEAST_MEMORY:
        return None, None
    return total, total - available if available and available <= total else None


def _cores(cpuinfo: str, files: _Files) -> tuple[int | None, str]:
    """Physical cores this process may use: hyperthreads share one, and a container may have fewer."""
    allowed = _allowed(files)
    cores: set[tuple[str, str]] = set()
    for block in cpuinfo.strip().split("\n\n"):
        said = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", block, re.M))
        number = said.get("processor", "")
        if not number.isdigit() or (allowed is not None and int(number) not in allowed):
            continue
        cores.add((said.get("physical id", ""), said.get("core id", f"cpu{number}")))
    if not cores:
        return None, "no processor in /proc/cpuinfo"
    quota = re.match(r"(\d+) (\d+)", files.text("sys/fs/cgroup/cpu.max"))
    if quota is not None and int(quota.group(1)) < len(cores) * int(quota.group(2)):
        return max(1, int(quota.group(1)) // int(quota.group(2))), "cpu.max of this control group"
    return len(cores), "physical cores in /proc/cpuinfo that this process may use"


def _allowed(files: _Files) -> frozenset[int] | None:
    """Processors that this process may use, as in "0-3,8"; None when it is not said."""
    said = re.search(r"^Cpus_allowed_list:\s*([\d,-]+)$", files.text("proc/self/status"), re.M)
    ranges = re.findall(r"(\d{1,5})(?:-(\d{1,5}))?", said.group(1)) if said else []
    return frozenset(n for low, high in ranges for n in range(int(low), int(high or low) + 1)) or None


def _cgroup_used(files: _Files) -> int:
    """What a control group holds and cannot give back: all but the file cache."""
    said = dict(re.findall(r"^(\w+) (\d+)$", files.text("sys/fs/cgroup/memory.stat"), re.M))
    return sum(int(said.get(name, 0)) for name in ("anon", "kernel", "shmem"))


def _size(text: str) -> int:
    match = re.match(r"(\d+)([KM]?)", text)
    return int(match.group(1)) * {"": 1, "K": 1024, "M": MIB}[match.group(2)] if match else 0


def _model(files: _Files) -> str:
    return files.text("proc/device-tree/model").strip()


def _names(files: _Files) -> str:
    """What the firmware calls this device: the device tree on Arm boards, DMI on PCs."""
    tree = ("proc/device-tree/model", "proc/device-tree/compatible", "sys/class/dmi/id/product_name")
    return "\n".join(files.text(name) for name in tree)


# ── what the driver says ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    name: str
    source: str
    memory: int | None = None
    """None, like the others, where the driver does not say."""
    used: int | None = None
    compute_capability: str | None = None
    bandwidth_gbs: float | None = None
    multiprocessors: int | None = None
    fp32_tflops: float | None = None


_Driver = tuple["_Card | None", str]
"""A GPU, and why nothing is known of one when its driver did not answer."""


def _card(files: _Files, driver: _Question[_Driver] | None, until: float) -> _Driver:
    """The NVIDIA GPU with memory of its own; the kernel module still has the name of one that is silent."""
    if driver is None:
        return _listed(files.text("nvidia-smi.csv")) or _in_proc(files), ""
    card, silent = driver.answer(until) or (None, f"NVML did not answer within {_PATIENCE} seconds")
    return card or _in_proc(files), silent


def _driver(until: float) -> _Driver:
    """What NVML says, or nvidia-smi where NVML's bindings are missing."""
    card = _nvidia()
    if card is not None or shutil.which("nvidia-smi") is None:
        return card, ""
    query = (f"--query-gpu={_SMI}", "--format=csv")
    left = max(0.1, until - time.monotonic() - 0.1)
    try:
        said = shell.run(("nvidia-smi", *query), check=False, timeout=left)
    except shell.TimedOut:
        return None, f"nvidia-smi did not answer within {left:.1f} seconds"
    return _listed(said.stdout if said.returncode == 0 else ""), ""


def _listed(text: str) -> _Card | None:
    """The first GPU in nvidia-smi's CSV; a field that says [N/A] is unknown, and without a name there is none."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if len(rows) < 2:
        return None
    header = [cell.partition(" [")[0] for cell in rows[0]]
    said = dict(zip(header, rows[1], strict=False))
    name = said.get("name", "")
    if not name or name.startswith("["):
        return None
    capability = re.fullmatch(r"\d+\.\d+", said.get("compute_cap", ""))
    return _Card(
        name=name,
        source="nvidia-smi",
        memory=_mib(said.get("memory.total", "")),
        used=_mib(said.get("memory.used", "")),
        compute_capability=capability.group() if capability else None,
    )


def _mib(text: str) -> int | None:
    found = re.fullmatch(r"(\d+) MiB", text)
    return int(found.group(1)) * MIB if found and int(found.group(1)) else None


def _in_proc(files: _Files) -> _Card | None:
    """The name alone, which NVIDIA's kernel module gives."""
    for text in files.texts["proc/driver/nvidia/gpus/*/information"]:
        found = re.search(r"^Model:\s*(\S.*?)\s*$", text, re.M)
        if found:
            return _Card(name=found.group(1), source="/proc/driver/nvidia/gpus")
    return None


def _nvidia() -> _Card | None:
    """The first NVIDIA GPU with memory of its own, as NVML sees it; None without the driver or its bindings."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            clock = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)  # MHz; two transfers a tick
            width = nvml.nvmlDeviceGetMemoryBusWidth(handle)  # bits
            cores = _cuda_cores(nvml, handle)
            ticks = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6
            return _Card(
                name=str(nvml.nvmlDeviceGetName(handle)),
                source="NVML",
                memory=int(memory.total),
                used=int(memory.used),
                compute_capability=f"{major}.{minor}",
                bandwidth_gbs=clock * 2 * width / 8 / 1000,
                multiprocessors=None if cores is None else cores // _lanes(major, minor),
                # An addition and a product a tick.
                fp32_tflops=None if cores is None else round(cores * 2 * ticks / 1e12, 1),
            )
    except nvml.NVMLError:  # an integrated GPU: NVML has no memory of its own to tell of
        return None
    finally:
        nvml.nvmlShutdown()
    return None


def _cuda_cores(nvml: Any, handle: Any) -> int | None:
    """None where the driver is older than this question (R510)."""
    try:
        return int(nvml.nvmlDeviceGetNumGpuCores(handle))
    except nvml.NVMLError:
        return None


def _lanes(major: int, minor: int) -> int:
    """FP32 cores of a multiprocessor (CUDA C++ Programming Guide, arithmetic instructions by compute capability)."""
    return 64 if major == 7 or (major, minor) in ((6, 0), (8, 0)) else 128


# ── the profile ──────────────────────────────────────────────────────────────────────────────────────


def _kind(every: Sequence[DeviceProfile], tree: str, card: _Card | None) -> DeviceClass:
    if any(word in tree for word in ("nvidia,tegra", "NVIDIA Jetson")):
        return "jetson"
    if card is not None:
        return "nvidia-discrete"
    named = (p.device_class for p in every if any(word in tree for word in p.match.device_tree))
    return next((kind for kind in named if kind != "jetson"), "cpu")


def _nearest(
    every: Sequence[DeviceProfile], kind: DeviceClass, system: _System, tree: str, card: _Card | None
) -> DeviceProfile:
    """The built-in profile whose match holds, else the one of this class that is nearest in memory.

    A part number decides before memory does; where nothing says how much memory there is, the least is taken.
    """
    name = card.name if card else ""

    def distance(known: DeviceProfile) -> tuple[bool, int, bool, float, float, int]:
        own = known.accelerator.memory if known.accelerator else None
        same_tree = sum(word in tree for word in known.match.device_tree)
        same_card = known.match.gpu_name is not None and known.match.gpu_name in name
        exact = known.accelerator is not None and known.accelerator.name == name
        under_windows = known.reserves.display_headless > 0
        return (
            not exact,
            -(same_tree + same_card),
            under_windows != system.windows,
            _apart(own, card.memory if card else None),
            _apart(known.memory, system.memory),
            known.memory,
        )

    same = [p for p in every if p.device_class == kind and p.arch == system.arch]
    return min(same or [p for p in every if p.arch == system.arch], key=distance)


def _apart(one: int | None, other: int | None) -> float:
    """How far two sizes are apart, as a ratio; 0 when one is not known."""
    return abs(math.log(one / other)) if one and other else 0.0


def _match(kind: DeviceClass, system: _System, nearest: DeviceProfile, card: _Card | None) -> Match:
    """A device counts as this one when it has at least about this machine's memory, and its GPU."""
    least = Bytes(int((system.memory or nearest.memory) * 0.95) // MIB * MIB)
    tree = nearest.match.device_tree if kind == "jetson" else ()
    gpu = card.name if card and kind == "nvidia-discrete" else None
    return Match(device_tree=tree, gpu_name=gpu, memory_min=least)


def _said(system: _System, nearest: DeviceProfile) -> tuple[list[Finding], list[str]]:
    """Where the kernel's values were read, and the fields that it did not say."""
    fields = (
        ("memory", system.memory is not None, system.memory_source),
        ("cpu_cores", system.cores is not None, system.cores_source),
        ("cpu_features", bool(system.features), "/proc/cpuinfo"),
        ("reserves", system.used is not None, system.used_source),
    )
    findings = [
        Finding(field=name, source=source if known else f"unknown: not in {source}; as {nearest.name}")
        for name, known, source in fields
    ]
    return findings, [name for name, known, _ in fields if not known]


def _system_reserves(nearest: DeviceProfile, system: _System) -> Reserves:
    """What is in use now, and a share kept free: a twelfth of the memory, 256 MiB to 2 GiB.

    Where the use is not known, the nearest profile's share of its memory. A desktop leaves a MiB where it
    would take all.
    """
    if system.memory is None:
        return nearest.reserves
    said = system.used
    if said is None:
        said = Bytes(nearest.reserves.os_headless * system.memory // nearest.memory)
    used = Bytes(-(-said // (64 * MIB)) * 64 * MIB)
    safety = Bytes(min(2048 * MIB, max(256 * MIB, system.memory // 12 // MIB * MIB)))
    most = Bytes(system.memory - safety - nearest.reserves.accelerator_context - MIB)
    desktop = used if system.desktop else max(used, min(Bytes(used + _DESKTOP), most))
    return replace(nearest.reserves, os_headless=used, os_desktop=desktop, safety=safety)


def _as_cpu(
    found: DeviceProfile, nearest: DeviceProfile, system: _System, *, live: bool
) -> tuple[DeviceProfile, Sequence[Finding]]:
    reserves = replace(
        found.reserves,
        accelerator_context=Bytes(0),
        display_headless=Bytes(0),
        display_desktop=Bytes(0),
    )
    kind: DeviceClass = nearest.device_class if nearest.accelerator is None else "cpu"
    found = replace(
        found, device_class=kind, unified=True, accelerator=None, reserves=reserves, uncertain=("speed",)
    )
    if not live:
        return found, (Finding(field="power_modes", source=f"as {nearest.name}; nothing was measured"),)
    rate = read_bandwidth(threads=found.cpu_cores)
    cached = system.cache > _BUFFER // 2
    source = f"measured: {found.cpu_cores} cores reading {show(_BUFFER)} with memchr, the best pass"
    if cached:
        source += f"; a cache of {show(system.cache)} may have helped"
    return (
        replace(
            found,
            power_modes=(PowerMode(name="default", bandwidth_gbs=round(rate / 1e9, 1)),),
            default_mode="default",
            speed=None,
            uncertain=("speed", "power_modes") if cached else ("speed",),
        ),
        (
            Finding(field="power_modes", source=source),
            Finding(
                field="speed",
                source="the class's law (edgepack/speed.py) over the bandwidth read here; not measured",
            ),
        ),
    )


def _as_jetson(
    found: DeviceProfile, nearest: DeviceProfile, files: _Files
) -> tuple[DeviceProfile, Sequence[Finding]]:
    """Bandwidth is the mode's, which the CPU cannot measure: one core complex reads a third of it."""
    software, findings = _software(found.software, nearest, files)
    found = replace(
        found, software=software, reserves=replace(found.reserves, safety=nearest.reserves.safety)
    )
    if not set(software.l4t) <= set(nearest.software.l4t):
        found = replace(found, uncertain=(*found.uncertain, "software.images"))
    mode, source = _power_mode(files), "/etc/nvpmodel.conf and /var/lib/nvpmodel/status"
    if mode is None or mode not in {known.name for known in nearest.power_modes}:
        unknown = Finding(field="default_mode", source=f"as {nearest.name}; the live mode is not known")
        return found, (*findings, unknown)
    return replace(found, default_mode=mode), (*findings, Finding(field="default_mode", source=source))


def _software(known: Software, nearest: DeviceProfile, files: _Files) -> tuple[Software, tuple[Finding, ...]]:
    """The software by its L4T; a release that the table lacks has no CUDA rather than a neighbor's."""
    version = l4t.release(files.text("etc/nv_tegra_release"))
    if version is None:
        said = f"unknown: no release in /etc/nv_tegra_release; as {nearest.name}"
        return replace(known, os=nearest.software.os), (Finding(field="software", source=said),)
    ubuntu = l4t.ubuntu(version)
    system = f"Ubuntu {ubuntu}" if ubuntu else known.os
    software = replace(
        known,
        os=", ".join(part for part in (system, l4t.name(version)) if part),
        l4t=(version.partition(".")[0],),
        cuda=l4t.cuda(version),
    )
    return software, (Finding(field="software", source="/etc/nv_tegra_release and edgepack/l4t.py"),)


def _power_mode(files: _Files) -> str | None:
    """Name of the live power mode; ids differ per board, so the board's own table translates.

    Some boards write MODE_30W where others write 30W; profiles have the short form.
    """
    live = re.search(r"pmode:(\d+)", files.text("var/lib/nvpmodel/status"))
    rows = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", files.text("etc/nvpmodel.conf"))
    name = {int(number): name for number, name in rows}.get(int(live.group(1))) if live else None
    return name.removeprefix("MODE_") if name else None


def _as_card(
    found: DeviceProfile, nearest: DeviceProfile, system: _System, card: _Card | None
) -> tuple[DeviceProfile, Sequence[Finding]]:
    near = nearest.accelerator
    if card is None or near is None:
        raise TypeError("a discrete GPU was found, and the profile of one is near it")
    known = near.name == card.name
    used = nearest.reserves.display_headless if card.used is None else Bytes(card.used)
    display = max(used, _WINDOWS_DISPLAY) if system.windows else used
    memory = near.memory if card.memory is None else Bytes(card.memory)
    findings = [Finding(field="accelerator", source=card.source)]
    uncertain = [] if known else ["speed"]
    if card.memory is None:
        uncertain.append("accelerator.memory")
        findings = [
            Finding(field="accelerator", source=f"{card.source}; its memory is unknown: as {nearest.name}")
        ]
    if card.bandwidth_gbs is None:
        modes = nearest.power_modes
        findings.append(Finding(field="power_modes", source=f"as {nearest.name}; the driver did not say"))
        uncertain += [] if known else ["power_modes"]
    else:
        like = (
            nearest.mode()
            if known
            else PowerMode(name="default", bandwidth_gbs=1.0, fp32_tflops=card.fp32_tflops)
        )
        modes = (replace(like, name="default", bandwidth_gbs=round(card.bandwidth_gbs, 1)),)
        findings.append(Finding(field="power_modes", source="NVML: highest memory clock x 2 x bus width"))
    reserves = replace(
        found.reserves,
        accelerator_context=Bytes(max(_CUDA_CONTEXT, (card.multiprocessors or 0) * _CUDA_CONTEXT_PER_SM)),
        safety=nearest.reserves.safety,
        display_headless=display,
        display_desktop=Bytes(max(display, nearest.reserves.display_desktop)),
    )
    accelerator = Accelerator(
        name=card.name,
        backend="cuda",
        compute_capability=card.compute_capability or (near.compute_capability if known else None),
        memory=memory,
    )
    found = replace(
        found,
        title=f"{card.name}, {show(memory)}" if memory is not None else card.name,
        device_class="nvidia-discrete",
        unified=False,
        accelerator=accelerator,
        reserves=reserves,
        power_modes=modes,
        default_mode=modes[0].name,
        uncertain=tuple(uncertain),
    )
    return found, findings


def _differing(base: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """Fields of ``own`` that are not as in ``base``; sets of fields are compared field by field."""
    result: dict[str, object] = {}
    for name, value in own.items():
        below = base.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            inner = _differing(below, value)
            if inner:
                result[name] = inner
        elif value != below:
            result[name] = value
    return result
