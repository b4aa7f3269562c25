"""Profiles from captured roots: what the kernel says is taken, the rest comes from the nearest built-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepack import probe as probes
from edgepack import profile
from edgepack.errors import BadInput
from edgepack.units import KIB, MIB

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
    root(tmp_path, {"proc/cpuinfo": x86(4, 4), "proc/meminfo": "MemTotal:       100 kB\n"})
    with pytest.raises(BadInput, match="has no /proc"):
        probes.probe(tmp_path)
