"""The probe on the machine that runs the tests, and its one measurement against another way to take it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edgepack import probe as probes
from edgepack import profile
from edgepack.bundle.render import render
from edgepack.units import MIB
from tests.plans import example_plan

pytestmark = pytest.mark.integration

CAPTURES = Path(__file__).parents[1] / "captures"


def numpy_bandwidth(threads: int, size: int) -> float:
    """Bytes per second of numpy.sum over 64-bit integers, the best of five."""
    import numpy as np

    data = np.ones(size // 8, dtype=np.int64)
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=part.sum) for part in np.array_split(data, threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, size / (time.perf_counter() - start))
    return best


def test_this_machine_has_a_profile_within_a_few_seconds_that_loads_again(tmp_path: Path) -> None:
    start = time.perf_counter()
    probed = probes.probe()
    spent = time.perf_counter() - start
    path = tmp_path / "this.yaml"
    path.write_text(probes.to_yaml(probed), encoding="utf-8")

    assert profile.load(str(path)) == probed.profile
    assert spent < 10  # two seconds on an idle machine
    assert profile.budget(probed.profile).device > 0
    assert 0.5 < probed.profile.mode().bandwidth_gbs < 20_000


def test_memory_in_use_now_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GiB is less than any control group's limit here, so that it is the machine's that counts."""
    now = types.SimpleNamespace(total=1024 * MIB, available=700 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: now)
    monkeypatch.setattr(probes, "read_bandwidth", lambda threads: 2e10)

    found = probes.probe().profile

    assert found.memory == 1024 * MIB
    assert found.reserves.os_headless == 384 * MIB  # 324 MiB in use, up to the next 64 MiB


def test_read_bandwidth_agrees_with_numpy() -> None:
    ours = max(probes.read_bandwidth(threads=1, seconds=0.2) for _ in range(3))

    theirs = max(numpy_bandwidth(1, 256 * MIB) for _ in range(2))

    assert 0.5 < ours / theirs < 4  # numpy adds up, so it may be the slower


def capture(folder: Path, root: Path | None = None) -> Path:
    """The folder with what a bundle's capture.sh says of ``root``, or of this machine."""
    script, out, device = folder / "capture.sh", folder / "it's a capture.tar", folder / "device"
    script.write_text(render(example_plan("raspberry-pi-5-8gb"))["capture.sh"], encoding="utf-8")
    environment = {**os.environ, **({"EDGEPACK_ROOT": str(root)} if root else {})}
    subprocess.run(["sh", str(script), str(out)], check=True, capture_output=True, env=environment)
    device.mkdir()
    subprocess.run(["tar", "-xf", str(out), "-C", str(device)], check=True)
    assert out.stat().st_size < 1_000_000
    return device


def test_what_a_bundles_script_captures_here_is_what_a_live_probe_reads(tmp_path: Path) -> None:
    captured = probes.probe(capture(tmp_path))

    live = probes.probe()
    assert captured.nearest == live.nearest
    one, other = captured.profile, live.profile
    for field in (
        "title",
        "arch",
        "memory",
        "cpu_cores",
        "cpu_features",
        "software",
        "match",
        "device_class",
    ):
        assert getattr(one, field) == getattr(other, field), field


@pytest.mark.parametrize("name", sorted(path.name for path in CAPTURES.iterdir() if path.is_dir()))
def test_a_capture_of_a_capture_is_the_same_device(name: str, tmp_path: Path) -> None:
    root = CAPTURES / name

    again = capture(tmp_path, root)

    kept = {str(path.relative_to(again)) for path in again.rglob("*") if path.is_file()}
    assert kept == {
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".csv"
    }
    if (root / "nvidia-smi.csv").is_file():  # a live driver is asked for it
        shutil.copy(root / "nvidia-smi.csv", again)
    assert probes.probe(again) == probes.probe(root)


def test_the_script_asks_the_driver_for_name_memory_and_compute_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (CAPTURES / "rtx-4060-laptop-8gb" / "nvidia-smi.csv").read_text()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >&2\ncat <<'END'\n{said}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")

    device = capture(tmp_path)

    assert (device / "nvidia-smi.csv").read_text() == said
    found = probes.probe(device).profile.accelerator
    assert found is not None and found.name == "NVIDIA GeForce RTX 4060 Laptop GPU"


def test_the_script_takes_exactly_what_the_probe_reads_and_nothing_that_names_the_device(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    secret = "Serial\t\t: 10000000deadbeef\nGPU UUID:\t GPU-deadbeef\nModel:\t\t RTX deadbee5\n"
    for name in (
        *probes.FILES,
        "etc/machine-id",
        "proc/device-tree/serial-number",
        "sys/class/net/eth0/address",
    ):
        path = root / name.replace("*", "0")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Cpus_allowed_list:\t0\n{secret}", encoding="utf-8")

    device = capture(tmp_path, root)

    taken = {str(path.relative_to(device)) for path in device.rglob("*") if path.is_file()}
    assert taken == {name.replace("*", "0") for name in probes.FILES if name != "nvidia-smi.csv"}
    assert "deadbeef" not in "".join(path.read_text() for path in device.rglob("*") if path.is_file())


def unknown(handle: int) -> int:
    raise RuntimeError("Function Not Found")


@pytest.mark.parametrize("cores", [lambda handle: 3072, unknown], ids=["R510", "an older driver"])
def test_a_gpu_is_described_by_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: Callable[[int], int]
) -> None:
    nvml = types.ModuleType("pynvml")
    facts = {
        "NVMLError": RuntimeError,
        "NVML_CLOCK_MEM": 2,
        "NVML_CLOCK_SM": 1,
        "nvmlDeviceGetNumGpuCores": cores,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=8188 * MIB, used=15 * MIB),
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 9),
        "nvmlDeviceGetMaxClockInfo": lambda handle, which: 8001,
        "nvmlDeviceGetMemoryBusWidth": lambda handle: 128,
        "nvmlDeviceGetName": lambda handle: "NVIDIA GeForce RTX 4060 Laptop GPU",
    }
    vars(nvml).update(facts)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    probed = probes.probe()

    found = probed.profile
    assert probed.nearest == "rtx-4060-laptop-8gb"
    assert found.mode().bandwidth_gbs == 256.0
    assert found.accelerator is not None and found.accelerator.memory == 8188 * MIB
    assert profile.budget(found).device == (8188 - 15 - 300 - 512) * MIB
    path = tmp_path / "this.yaml"
    path.write_text(probes.to_yaml(probed), encoding="utf-8")
    assert profile.load(str(path)) == found


def test_a_card_that_nobody_knows_has_the_rate_and_the_context_of_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As NVML says it of an H200."""
    nvml = types.ModuleType("pynvml")
    vars(nvml).update(
        {
            "NVMLError": RuntimeError, "NVML_CLOCK_MEM": 2, "NVML_CLOCK_SM": 1, "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=143771 * MIB, used=0),
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
            "nvmlDeviceGetMaxClockInfo": lambda handle, which: 3201 if which == 2 else 1980,
            "nvmlDeviceGetMemoryBusWidth": lambda handle: 6016,
            "nvmlDeviceGetNumGpuCores": lambda handle: 16896,
            "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        }
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    found = probes.probe().profile

    assert found.mode().fp32_tflops == 66.9
    assert found.reserves.accelerator_context == 660 * MIB
