"""The profile of the machine this runs on: what the kernel says, what the driver says, and one measurement.

Nothing is started and no CUDA context is made. Every value that is not inherited names where it was read.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack import profile as profiles
from edgepack import serde
from edgepack.errors import BadInput, Unsupported
from edgepack.profile import (
    Accelerator,
    Arch,
    DeviceClass,
    DeviceProfile,
    Match,
    PowerMode,
    Reserves,
    SpeedConstants,
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
_CPU_EFFICIENCY = 0.75
"""Decode speed over *measured* read bandwidth: 0.88 on a Raspberry Pi 5 (10.0 of 11.4 GB/s sustained), 0.65 on a
DDR5 laptop (54 of 80-86 GB/s STREAM)."""
_PREFILL_PER_CORE: Mapping[Arch, float] = {"x86_64": 0.09, "aarch64": 0.025}
"""TFLOPS a core while reading a prompt: i5-1135G7 0.41 and i7-7820HQ 0.36 with four, Raspberry Pi 5 0.1 with four."""


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

    Another ``root`` reads a captured /proc, /sys and /etc; then nothing is measured and no driver is asked, and
    bandwidths are the nearest built-in profile's. Raises Unsupported for a machine that is neither x86-64 nor
    64-bit Arm, BadInput for a root without /proc.
    """
    live = root == Path("/")
    system = _System.read(root, live=live)
    tree = _device_tree(root)
    card = _nvidia() if live else None
    jetson = any(word in tree for word in ("nvidia,tegra", "NVIDIA Jetson"))
    kind: DeviceClass = "jetson" if jetson else "nvidia-discrete" if card else "cpu"
    nearest = _nearest(kind, system, tree, card.name if card else "")
    found = replace(
        nearest,
        name=NAME,
        title=f"{system.cpu}, {show(system.memory)}",
        aliases=(),
        arch=system.arch,
        memory=system.memory,
        cpu_cores=system.cores,
        cpu_features=system.features,
        disk=Bytes(shutil.disk_usage(Path.home()).free) if live else nearest.disk,
        software=replace(nearest.software, os=system.os or nearest.software.os),
        match=_match(kind, system, nearest, card.name if card else ""),
    )
    findings = [
        Finding(field="memory", source=system.memory_source),
        Finding(field="cpu_cores", source=system.cores_source),
        Finding(field="cpu_features", source="/proc/cpuinfo"),
        Finding(field="reserves", source=system.used_source),
    ]
    match kind:
        case "cpu":
            found, more = _as_cpu(found, nearest, system, live=live)
        case "jetson":
            found, more = _as_jetson(found, nearest, system, root)
        case "nvidia-discrete":
            found, more = _as_card(found, nearest, system, card)
    if live:
        findings.append(Finding(field="disk", source="free space of the home folder"))
    return Probed(profile=found, nearest=nearest.name, findings=(*findings, *more))


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
    import threading
    import time

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


# ── what the kernel says ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    arch: Arch
    cpu: str
    cores: int
    cores_source: str
    features: tuple[str, ...]
    memory: Bytes
    memory_source: str
    used: Bytes
    used_source: str
    cache: int
    """Largest CPU cache in bytes; 0 when not said."""
    os: str | None
    windows: bool
    """Under WSL."""
    desktop: bool
    """A desktop session is open now."""

    @staticmethod
    def read(root: Path, *, live: bool) -> _System:
        cpuinfo = _text(root / "proc/cpuinfo")
        if not cpuinfo:
            raise _no_proc(root)
        arch: Arch = "x86_64" if re.search(r"^flags\s*:", cpuinfo, re.M) else "aarch64"
        if live and platform.machine() != arch:
            raise Unsupported(
                f"a {platform.machine()} machine is not known", hint="x86-64 and 64-bit Arm are"
            )
        flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)).split())
        cores, cores_source = _cores(cpuinfo, root, live=live)
        memory, used = _memory(root, live=live)
        memory_source, used_source = (
            "MemTotal in /proc/meminfo",
            "MemTotal - MemAvailable in /proc/meminfo, now",
        )
        limit = _text(root / "sys/fs/cgroup/memory.max").strip()
        if limit.isdigit() and int(limit) < memory:
            memory, memory_source = int(limit), "memory.max of this control group (a container's limit)"
            used, used_source = _cgroup_used(root), "memory.stat of this control group, now"
        model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.M)
        release = _text(root / "proc/sys/kernel/osrelease")
        name = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release"), re.M)
        return _System(
            arch=arch,
            cpu=" ".join(model.group(1).split()) if model else f"{arch} CPU",
            cores=cores,
            cores_source=cores_source,
            features=tuple(feature for feature in _FEATURES[arch] if feature in flags),
            memory=Bytes(memory),
            memory_source=memory_source,
            used=Bytes(used),
            used_source=used_source,
            cache=max((_size(_text(path)) for path in _caches(root)), default=0),
            os=name.group(1) if name else None,
            windows="microsoft" in release.lower(),
            desktop=live and any(os.environ.get(key) for key in ("DISPLAY", "WAYLAND_DISPLAY")),
        )


def _memory(root: Path, *, live: bool) -> tuple[int, int]:
    """Bytes of memory in all, and those of them that no new program can have."""
    if live:
        import psutil  # it also knows kernels that do not say MemAvailable

        now = psutil.virtual_memory()
        return now.total, now.total - now.available
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo"), re.M)
    said = {name: int(kib) * KIB for name, kib in found}
    if not {"MemTotal", "MemAvailable"} <= set(said):
        raise _no_proc(root)
    return said["MemTotal"], said["MemTotal"] - said["MemAvailable"]


def _no_proc(root: Path) -> BadInput:
    return BadInput(f"{root} has no /proc with cpuinfo and meminfo", hint="give the root of a Linux system")


def _cores(cpuinfo: str, root: Path, *, live: bool) -> tuple[int, str]:
    """Physical cores this process may use: hyperthreads share one, and a container may have fewer."""
    allowed = os.sched_getaffinity(0) if live else None
    cores: set[tuple[str, str]] = set()
    for block in cpuinfo.strip().split("\n\n"):
        said = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", block, re.M))
        number = said.get("processor", "")
        if not number.isdigit() or (allowed is not None and int(number) not in allowed):
            continue
        cores.add((said.get("physical id", ""), said.get("core id", f"cpu{number}")))
    quota = re.match(r"(\d+) (\d+)", _text(root / "sys/fs/cgroup/cpu.max"))
    if quota is not None and int(quota.group(1)) < len(cores) * int(quota.group(2)):
        return max(1, int(quota.group(1)) // int(quota.group(2))), "cpu.max of this control group"
    return max(1, len(cores)), "physical cores in /proc/cpuinfo that this process may use"


def _cgroup_used(root: Path) -> int:
    """What a control group holds and cannot give back: all but the file cache."""
    said = dict(re.findall(r"^(\w+) (\d+)$", _text(root / "sys/fs/cgroup/memory.stat"), re.M))
    return sum(int(said.get(name, 0)) for name in ("anon", "kernel", "shmem"))


def _caches(root: Path) -> list[Path]:
    return list((root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"))


def _size(text: str) -> int:
    match = re.match(r"(\d+)([KM]?)", text)
    return int(match.group(1)) * {"": 1, "K": 1024, "M": MIB}[match.group(2)] if match else 0


def _text(path: Path) -> str:
    """A file of the kernel's; "" where this kernel has none."""
    if not path.is_file():
        return ""
    return path.read_bytes().replace(b"\0", b"\n").decode("utf-8", errors="replace")


def _device_tree(root: Path) -> str:
    return "\n".join(_text(root / "proc/device-tree" / name) for name in ("model", "compatible"))


# ── what the driver says ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    name: str
    memory: int
    used: int
    compute_capability: str
    bandwidth_gbs: float


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
            return _Card(
                name=str(nvml.nvmlDeviceGetName(handle)),
                memory=int(memory.total),
                used=int(memory.used),
                compute_capability=f"{major}.{minor}",
                bandwidth_gbs=clock * 2 * width / 8 / 1000,
            )
    except nvml.NVMLError:  # an integrated GPU: NVML has no memory of its own to tell of
        return None
    finally:
        nvml.nvmlShutdown()
    return None


# ── the profile ──────────────────────────────────────────────────────────────────────────────────────


def _nearest(kind: DeviceClass, system: _System, tree: str, card: str) -> DeviceProfile:
    """The built-in profile whose match holds, else the one of this class that is nearest in memory."""

    def distance(known: DeviceProfile) -> tuple[bool, bool, float]:
        same_tree = any(word in tree for word in known.match.device_tree)
        same_card = known.match.gpu_name is not None and known.match.gpu_name in card
        exact = known.accelerator is not None and known.accelerator.name == card
        return not exact, not (same_tree or same_card), abs(math.log(known.memory / system.memory))

    every = [profiles.load(name) for name in profiles.names()]
    same = [p for p in every if p.device_class == kind and p.arch == system.arch]
    return min(same or [p for p in every if p.arch == system.arch], key=distance)


def _match(kind: DeviceClass, system: _System, nearest: DeviceProfile, card: str) -> Match:
    """A device counts as this one when it has at least about this machine's memory, and its GPU."""
    least = Bytes(int(system.memory * 0.95) // MIB * MIB)
    tree = nearest.match.device_tree if kind == "jetson" else ()
    return Match(device_tree=tree, gpu_name=card or None, memory_min=least)


def _system_reserves(nearest: DeviceProfile, system: _System) -> Reserves:
    """What is in use now, and a share kept free: a twelfth of the memory, 256 MiB to 2 GiB."""
    used = Bytes(-(-system.used // (64 * MIB)) * 64 * MIB)
    desktop = used if system.desktop else Bytes(used + _DESKTOP)
    safety = Bytes(min(2048 * MIB, max(256 * MIB, system.memory // 12 // MIB * MIB)))
    return replace(nearest.reserves, os_headless=used, os_desktop=desktop, safety=safety)


def _as_cpu(
    found: DeviceProfile, nearest: DeviceProfile, system: _System, *, live: bool
) -> tuple[DeviceProfile, Sequence[Finding]]:
    reserves = replace(
        _system_reserves(nearest, system),
        accelerator_context=Bytes(0),
        display_headless=Bytes(0),
        display_desktop=Bytes(0),
    )
    found = replace(
        found, device_class="cpu", unified=True, accelerator=None, reserves=reserves, uncertain=("speed",)
    )
    if not live:
        return found, (Finding(field="power_modes", source=f"as {nearest.name}; nothing was measured"),)
    rate = read_bandwidth(threads=system.cores)
    cached = system.cache > _BUFFER // 2
    source = f"measured: {system.cores} cores reading {show(_BUFFER)} with memchr, the best pass"
    if cached:
        source += f"; a cache of {show(system.cache)} may have helped"
    return (
        replace(
            found,
            power_modes=(PowerMode(name="default", bandwidth_gbs=round(rate / 1e9, 1)),),
            default_mode="default",
            speed=SpeedConstants(
                decode_efficiency=_CPU_EFFICIENCY,
                layer_overhead_us=50,
                prefill_tflops=round(_PREFILL_PER_CORE[system.arch] * system.cores, 3),
                relative_interval=0.4,
            ),
            uncertain=("speed", "power_modes") if cached else ("speed",),
        ),
        (
            Finding(field="power_modes", source=source),
            Finding(
                field="speed", source="published CPUs against their measured bandwidth; not measured here"
            ),
        ),
    )


def _as_jetson(
    found: DeviceProfile, nearest: DeviceProfile, system: _System, root: Path
) -> tuple[DeviceProfile, Sequence[Finding]]:
    """Bandwidth is the mode's, which the CPU cannot measure: one core complex reads a third of it."""
    reserves = replace(_system_reserves(nearest, system), safety=nearest.reserves.safety)
    found = replace(found, reserves=reserves)
    mode, source = _power_mode(root), "/etc/nvpmodel.conf and /var/lib/nvpmodel/status"
    if mode is None or mode not in {known.name for known in nearest.power_modes}:
        return found, (
            Finding(field="default_mode", source=f"as {nearest.name}; the live mode is not known"),
        )
    return replace(found, default_mode=mode), (Finding(field="default_mode", source=source),)


def _power_mode(root: Path) -> str | None:
    """Name of the live power mode; ids differ per board, so the board's own table translates."""
    live = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    rows = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", _text(root / "etc/nvpmodel.conf"))
    return {int(number): name for number, name in rows}.get(int(live.group(1))) if live else None


def _as_card(
    found: DeviceProfile, nearest: DeviceProfile, system: _System, card: _Card | None
) -> tuple[DeviceProfile, Sequence[Finding]]:
    if card is None:
        raise TypeError("a discrete GPU was found")
    known = nearest.accelerator is not None and nearest.accelerator.name == card.name
    display = Bytes(max(card.used, _WINDOWS_DISPLAY) if system.windows else card.used)
    reserves = replace(
        _system_reserves(nearest, system),
        accelerator_context=_CUDA_CONTEXT,
        safety=nearest.reserves.safety,
        display_headless=display,
        display_desktop=Bytes(max(display, nearest.reserves.display_desktop)),
    )
    mode = PowerMode(
        name="default",
        bandwidth_gbs=round(card.bandwidth_gbs, 1),
        fp16_tflops=nearest.mode().fp16_tflops if known else None,
    )
    return (
        replace(
            found,
            title=f"{card.name}, {show(card.memory)}",
            device_class="nvidia-discrete",
            unified=False,
            accelerator=Accelerator(
                name=card.name,
                backend="cuda",
                compute_capability=card.compute_capability,
                memory=Bytes(card.memory),
            ),
            reserves=reserves,
            power_modes=(mode,),
            default_mode="default",
            uncertain=() if known else ("speed",),
        ),
        (
            Finding(field="accelerator", source="NVML"),
            Finding(field="power_modes", source="NVML: highest memory clock x 2 x bus width"),
        ),
    )


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
