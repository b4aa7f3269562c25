"""Profiles from captured roots: what the kernel says is taken, the rest comes from the nearest built-in."""

from __future__ import annotations

import shutil
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgepack import probe as probes
from edgepack import profile
from edgepack.errors import BadInput
from edgepack.probe import Finding
from edgepack.units import KIB, MIB

CAPTURES = Path(__file__).parents[1] / "captures"
MEMINFO = "MemTotal:       {total} kB\nMemFree:        100 kB\nMemAvailable:   {available} kB\n"


def x86(processors: int, cores: int) -> str:
    """A CPU with hyperthreads: processors share the core ids."""
    return "\n".join(
        f"processor\t: {n}\nmodel name\t: Intel(R)  Core(TM) i5-1135G7\nflags\t\t: fpu avx avx2 fma f16c\n"
        f"physical id\t: 0\ncore id\t\t: {n % cores}\n"
        for n in range(processors)
    )


def arm(processors: int, model: str = "") -> str:
    blocks = "\n".join(f"processor\t: {n}\nFeatures\t: fp asimd asimdhp asimddp\n" for n in range(processors))
    return f"{blocks}\nModel\t\t: {model}\n" if model else blocks


def root(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def saved(probed: probes.Probed, folder: Path) -> Path:
    path = folder / "this.yaml"
    path.write_text(probes.to_yaml(probed), encoding="utf-8")
    return path


def test_a_laptop_counts_cores_not_threads_and_reserves_what_is_in_use(tmp_path: Path) -> None:
    captured = root(
        tmp_path,
        {
            "proc/cpuinfo": x86(8, 4),
            "proc/meminfo": MEMINFO.format(total=16_000_000, available=13_000_000),
            "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n',
        },
    )

    probed = probes.probe(captured)

    found = probed.profile
    assert probed.nearest == "x86-laptop-ddr5"
    assert (found.arch, found.cpu_cores, found.cpu_features) == ("x86_64", 4, ("avx", "avx2", "fma", "f16c"))
    assert found.memory == 16_000_000 * KIB
    assert found.reserves.os_headless == 2944 * MIB  # 3,000,000 KiB in use, up to the next 64 MiB
    assert found.reserves.os_desktop == (2944 + 1200) * MIB
    assert found.reserves.safety == 1302 * MIB  # a twelfth
    assert found.software.os == "Debian GNU/Linux 12"
    assert found.mode().bandwidth_gbs == 89.6  # nothing is measured from a capture


def test_a_machine_too_small_for_a_desktop_has_a_profile_that_loads(tmp_path: Path) -> None:
    captured = root(
        tmp_path,
        {"proc/cpuinfo": x86(2, 2), "proc/meminfo": MEMINFO.format(total=1_000_000, available=800_000)},
    )

    path = saved(probes.probe(captured), tmp_path)

    assert profile.budget(profile.load(str(path)), "desktop").host == MIB


def test_a_container_has_the_memory_and_cores_of_its_control_group(tmp_path: Path) -> None:
    captured = root(
        tmp_path,
        {
            "proc/cpuinfo": x86(16, 8),
            "proc/meminfo": MEMINFO.format(total=32_000_000, available=30_000_000),
            "sys/fs/cgroup/memory.max": f"{4096 * MIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {100 * MIB}\nfile {900 * MIB}\nkernel {28 * MIB}\nshmem 0\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
        },
    )

    found = probes.probe(captured).profile

    assert (found.memory, found.cpu_cores) == (4096 * MIB, 2)
    assert found.reserves.os_headless == 128 * MIB


def test_a_control_group_without_limits_changes_nothing(tmp_path: Path) -> None:
    captured = root(
        tmp_path,
        {
            "proc/cpuinfo": x86(4, 4),
            "proc/meminfo": MEMINFO.format(total=8_000_000, available=7_000_000),
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
    )

    found = probes.probe(captured).profile

    assert (found.memory, found.cpu_cores) == (8_000_000 * KIB, 4)


@pytest.mark.parametrize(
    ("total", "nearest"), [(8_243_200, "raspberry-pi-5-8gb"), (4_100_000, "raspberry-pi-5-4gb")]
)
def test_a_raspberry_pi_is_the_built_in_one_of_its_memory(tmp_path: Path, total: int, nearest: str) -> None:
    captured = root(
        tmp_path,
        {
            "proc/cpuinfo": arm(4, "Raspberry Pi 5 Model B Rev 1.0"),
            "proc/meminfo": MEMINFO.format(total=total, available=total - 400_000),
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        },
    )

    probed = probes.probe(captured)

    assert probed.nearest == nearest
    assert probed.profile.device_class == "cpu"
    assert probed.profile.cpu_features == ("asimd", "asimdhp", "asimddp")
    assert probed.profile.title.startswith("Raspberry Pi 5 Model B Rev 1.0")


def orin(folder: Path, status: str = "pmode:0002 fmode:fanNull") -> Path:
    return root(
        folder,
        {
            "proc/cpuinfo": arm(6),
            "proc/meminfo": MEMINFO.format(total=7_790_000, available=7_200_000),
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n"
            "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
            "var/lib/nvpmodel/status": status,
        },
    )


def test_a_jetson_keeps_its_modes_and_says_by_name_which_one_is_on(tmp_path: Path) -> None:
    probed = probes.probe(orin(tmp_path))

    found = probed.profile
    assert probed.nearest == "jetson-orin-nano-8gb"
    assert (found.device_class, found.unified, found.default_mode) == ("jetson", True, "MAXN_SUPER")
    assert [mode.name for mode in found.power_modes] == ["15W", "25W", "MAXN_SUPER", "7W"]
    assert found.reserves.accelerator_context == 500 * MIB
    assert found.match.device_tree == ("p3767-0003", "p3767-0005", "Orin Nano")


def test_a_jetson_in_an_unknown_mode_keeps_the_default(tmp_path: Path) -> None:
    probed = probes.probe(orin(tmp_path, status=""))

    assert probed.profile.default_mode == "25W"
    assert any("live mode is not known" in finding.source for finding in probed.findings)


@pytest.mark.parametrize("make", [orin, lambda folder: root(folder, {
    "proc/cpuinfo": x86(2, 2), "proc/meminfo": MEMINFO.format(total=8_000_001, available=5_000_000)})])  # fmt: skip
def test_the_written_file_loads_to_the_same_profile_and_says_its_sources(
    tmp_path: Path, make: object
) -> None:
    assert callable(make)
    probed = probes.probe(make(tmp_path / "root"))

    path = saved(probed, tmp_path)

    assert profile.load(str(path)) == probed.profile
    text = path.read_text(encoding="utf-8")
    assert f"extends: {probed.nearest}" in text
    assert "# MemTotal in /proc/meminfo\nmemory: " in text


def test_a_folder_that_is_no_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no /proc"):
        probes.probe(tmp_path)


# ── captured devices ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    nearest: str
    """Name of the built-in profile and of the folder in tests/captures."""
    memory: int
    """MiB that the system reports."""
    cores: int
    mode: str
    headless: int
    """MiB that stay for a model."""
    os: str
    cuda: str | None


CAPTURED = (
    Captured(
        nearest="jetson-orin-nano-8gb",
        memory=7607,
        cores=6,
        mode="25W",
        headless=7607 - 704 - 500 - 768,
        os="Ubuntu 22.04, L4T r36.5.0 (JetPack 6.2.2)",
        cuda="12.6",
    ),
    Captured(
        nearest="jetson-agx-orin-64gb",
        memory=62841,
        cores=12,
        mode="MAXN",
        headless=62841 - 5120 - 500 - 3072,
        os="Ubuntu 22.04, L4T r36.4.3 (JetPack 6.2)",
        cuda="12.6",
    ),
    Captured(
        nearest="raspberry-pi-5-8gb",
        memory=8050,
        cores=4,
        mode="default",
        headless=8050 - 576 - 670,
        os="Debian GNU/Linux 12 (bookworm)",
        cuda=None,
    ),
    Captured(
        nearest="rtx-4060-laptop-8gb",
        memory=15872,
        cores=8,
        mode="default",
        headless=8188 - 11 - 300 - 512,
        os="Ubuntu 24.04.2 LTS",
        cuda="12.8",
    ),
    Captured(
        nearest="rtx-4060-laptop-8gb-wsl",
        memory=7936,
        cores=8,
        mode="default",
        headless=8188 - 1100 - 300 - 512,
        os="Ubuntu 22.04.5 LTS",
        cuda="12.8",
    ),
)


@pytest.mark.parametrize("device", CAPTURED, ids=lambda device: device.nearest)
def test_a_captured_device_is_its_built_in_profile(device: Captured, tmp_path: Path) -> None:
    probed = probes.probe(CAPTURES / device.nearest)

    found = probed.profile
    assert probed.nearest == device.nearest
    assert (found.memory, found.cpu_cores) == (device.memory * MIB, device.cores)
    assert found.default_mode == device.mode
    assert profile.budget(found).device == device.headless * MIB
    assert (found.software.os, found.software.cuda) == (device.os, device.cuda)
    assert not [finding for finding in probed.findings if finding.source.startswith("unknown")]
    assert profile.load(str(saved(probed, tmp_path))) == found


def test_every_capture_is_tested() -> None:
    assert {path.name for path in CAPTURES.iterdir() if path.is_dir()} == {d.nearest for d in CAPTURED}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


EVERY_FILE = [(d.nearest, file) for d in CAPTURED for file in files(CAPTURES / d.nearest)]


NAMING = (
    "proc/device-tree/compatible",
    "proc/device-tree/model",
    "proc/meminfo",
    "proc/sys/kernel/osrelease",
    "nvidia-smi.csv",
)
"""Files that tell some of these devices from each other: without one, another profile may be nearest."""


@pytest.mark.parametrize(
    "broken", ["", "\0\xff garbage , [N/A]\n", "-1 kB\n" * 40], ids=["empty", "garbage", "numbers"]
)
@pytest.mark.parametrize(("device", "file"), EVERY_FILE, ids=str)
def test_a_broken_field_is_unknown_and_the_rest_is_read(
    device: str, file: str, broken: str, tmp_path: Path
) -> None:
    captured = tmp_path / "root"
    shutil.copytree(CAPTURES / device, captured)
    (captured / file).write_text(broken, encoding="latin-1")

    probed = probes.probe(captured)

    found = probed.profile
    assert profile.budget(found).device > 0
    assert profile.load(str(saved(probed, tmp_path))) == found
    if file not in NAMING:
        assert probed.nearest == device


@pytest.mark.parametrize(
    ("file", "text", "unknown"),
    [
        ("proc/meminfo", None, "memory"),
        ("proc/meminfo", "MemTotal:       100 kB\n", "memory"),
        ("proc/meminfo", "MemTotal:        7789568 kB\n", "reserves"),
        ("proc/cpuinfo", None, "cpu_cores"),
        ("proc/cpuinfo", "processor\t: 0\n", "cpu_features"),
        ("etc/nv_tegra_release", None, "software"),
        ("etc/nvpmodel.conf", None, "default_mode"),
    ],
)
def test_a_missing_field_is_named_and_the_nearest_profiles(
    file: str, text: str | None, unknown: str, tmp_path: Path
) -> None:
    captured = tmp_path / "root"
    shutil.copytree(CAPTURES / "jetson-orin-nano-8gb", captured)
    (captured / file).unlink()
    if text is not None:
        (captured / file).write_text(text, encoding="utf-8")

    probed = probes.probe(captured)

    orin = profile.load("jetson-orin-nano-8gb")
    said = {finding.field: finding.source for finding in probed.findings}
    assert "as jetson-orin-nano-8gb" in said[unknown]
    assert profile.budget(probed.profile).device > 4 * 1024 * MIB
    if unknown in ("memory", "reserves", "cpu_cores", "cpu_features"):
        assert unknown in probed.profile.uncertain
    assert probed.profile.memory == orin.memory
    assert probed.profile.default_mode == orin.default_mode


def test_a_field_that_cannot_be_read_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = tmp_path / "root"
    shutil.copytree(CAPTURES / "raspberry-pi-5-8gb", captured)
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "meminfo":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)

    probed = probes.probe(captured)

    assert probed.nearest == "raspberry-pi-5-4gb"  # nothing says how much memory it has: the least
    assert "memory" in probed.profile.uncertain


def test_a_card_whose_driver_says_only_its_name_has_the_built_in_memory(tmp_path: Path) -> None:
    captured = tmp_path / "root"
    shutil.copytree(CAPTURES / "rtx-4060-laptop-8gb", captured)
    (captured / "nvidia-smi.csv").unlink()

    probed = probes.probe(captured)

    assert probed.nearest == "rtx-4060-laptop-8gb"
    assert probed.profile.accelerator == profile.load("rtx-4060-laptop-8gb").accelerator
    assert "accelerator.memory" in probed.profile.uncertain


@pytest.mark.parametrize(
    ("card", "nearest"),
    [
        ("NVIDIA GeForce RTX 3060, 12288 MiB, 15 MiB, 8.6", "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU, 6144 MiB, 15 MiB, 8.6", "rtx-3060-laptop-6gb"),
        ("NVIDIA GeForce RTX 4060 Ti, 16380 MiB, 15 MiB, 8.9", "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 5070 Laptop GPU, 8151 MiB, 15 MiB, 12.0", "rtx-5070-laptop-8gb"),
    ],
)
def test_a_card_is_known_by_its_whole_name(card: str, nearest: str, tmp_path: Path) -> None:
    captured = tmp_path / "root"
    shutil.copytree(CAPTURES / "rtx-4060-laptop-8gb", captured)
    header = "name, memory.total [MiB], memory.used [MiB], compute_cap"
    (captured / "nvidia-smi.csv").write_text(f"{header}\n{card}\n", encoding="utf-8")

    probed = probes.probe(captured)

    assert probed.nearest == nearest
    assert "speed" not in probed.profile.uncertain


@pytest.mark.parametrize(
    ("product", "model", "total", "nearest"),
    [
        ("Jupiter\n", "", 14_900_000, "steam-deck"),
        ("", "Radxa ROCK 5B\0", 8_090_000, "rk3588"),
        ("", "NVIDIA Jetson AGX Orin Developer Kit\0", 31_268_864, "jetson-agx-orin-32gb"),
        ("", "NVIDIA Jetson AGX Thor Developer Kit\0", 128_790_528, "jetson-agx-thor"),
    ],
)
def test_firmware_names_the_device(
    product: str, model: str, total: int, nearest: str, tmp_path: Path
) -> None:
    compatible = "radxa,rock-5b\0rockchip,rk3588\0" if "Radxa" in model else "nvidia,tegra\0"
    captured = root(
        tmp_path,
        {
            "proc/cpuinfo": arm(8) if model else x86(8, 4),
            "proc/meminfo": MEMINFO.format(total=total, available=total - 1_000_000),
            **({"proc/device-tree/model": model, "proc/device-tree/compatible": compatible} if model else {}),
            **({"sys/class/dmi/id/product_name": product} if product else {}),
        },
    )

    probed = probes.probe(captured)

    assert probed.nearest == nearest
    assert probed.profile.device_class == profile.load(nearest).device_class


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    nvml = types.ModuleType("pynvml")

    def hangs() -> None:
        forever.wait()
        raise RuntimeError

    vars(nvml).update({"NVMLError": RuntimeError, "nvmlInit": hangs})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(probes, "read_bandwidth", lambda threads: 2e10)
    monkeypatch.setattr(probes, "_PATIENCE", 0.5)

    found = probes.probe()
    forever.set()

    assert (
        Finding(field="accelerator", source="unknown: NVML did not answer within 0.5 seconds")
        in found.findings
    )
    assert found.profile.device_class != "nvidia-discrete"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("meminfo", "memory"),
        ("cpuinfo", "cpu_cores"),
        ("os-release", "/etc/os-release"),
        ("status", "default_mode"),
    ],
)
def test_a_file_that_hangs_is_unknown_and_the_rest_is_read(
    name: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    read = Path.read_bytes

    def hangs(path: Path) -> bytes:
        if path.name == name:
            forever.wait()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", hangs)
    monkeypatch.setattr(probes, "_PATIENCE", 0.5)

    found = probes.probe(CAPTURES / "jetson-orin-nano-8gb")
    forever.set()

    said = {finding.field: finding.source for finding in found.findings}
    assert "unknown" in said[field] or "not known" in said[field]
    assert [file for file in said if file.endswith(name)]
    assert found.nearest.startswith("jetson-orin-nano")


def test_memory_a_disk_and_a_driver_that_all_hang_are_waited_for_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(probes, "_memory_now", forever.wait)
    monkeypatch.setattr(probes, "_free_disk", forever.wait)
    monkeypatch.setattr(probes, "_driver", lambda until: forever.wait())
    monkeypatch.setattr(probes, "read_bandwidth", lambda threads: 2e10)
    monkeypatch.setattr(probes, "_PATIENCE", 0.5)
    asked: list[float] = []
    answer = probes._Question.answer

    def counted(question: probes._Question[object], until: float) -> object:
        asked.append(until)
        return answer(question, until)

    monkeypatch.setattr(probes._Question, "answer", counted)

    found = probes.probe()
    forever.set()

    assert len(set(asked)) == 1, "one deadline for all"
    said = {finding.field: finding.source for finding in found.findings}
    assert "disk" not in said
    assert said["accelerator"].startswith("unknown")
    assert said["memory"] == "MemTotal in /proc/meminfo"


def test_processors_that_a_process_may_not_use_are_no_cores(tmp_path: Path) -> None:
    captured = root(
        tmp_path,
        {
            "proc/cpuinfo": arm(8),
            "proc/meminfo": MEMINFO.format(total=8_000_000, available=7_000_000),
            "proc/self/status": "Name:\tgrep\nCpus_allowed_list:\t0-2,7\n",
        },
    )

    assert probes.probe(captured).profile.cpu_cores == 4
