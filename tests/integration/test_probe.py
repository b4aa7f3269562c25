"""The probe on the machine that runs the tests, and its one measurement against another way to take it."""

from __future__ import annotations

import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest

from edgepack import probe as probes
from edgepack import profile
from edgepack.units import MIB

pytestmark = pytest.mark.integration


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


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = types.ModuleType("pynvml")
    facts = {
        "NVMLError": RuntimeError,
        "NVML_CLOCK_MEM": 2,
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
