"""Plans for tests of what comes after planning: small, by hand, for a real profile."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgepack import catalog, profile, runtimes
from edgepack.device import agent
from edgepack.memory import MemoryEstimate, Part, Place
from edgepack.plan import ModelRef, Plan, Quality
from edgepack.runtimes import llama_cpp
from edgepack.schemes import Provenance
from edgepack.speed import Speed
from edgepack.units import GIB, MIB, Bytes

SERVED = (("vllm", "rtx-4060-8gb"), ("onnx-genai", "x86-laptop-ddr5"), ("transformers", "x86-laptop-ddr5"))
"""Runtimes in Python, each on a device that it is made for."""
PROFILES = ("jetson-orin-nano-8gb", "rtx-4060-8gb", "raspberry-pi-5-8gb", "x86-laptop-ddr5")


def this_machine() -> profile.DeviceProfile:
    """A profile that this machine matches, whatever its CPU."""
    memory = agent.machine_facts()["memory_total"]
    arch: profile.Arch = "aarch64" if platform.machine() == "aarch64" else "x86_64"
    return replace(profile.load("x86-laptop"), arch=arch, memory=Bytes(memory), match=profile.Match())


def broken(report: Mapping[str, Any]) -> set[str]:
    """What a check failed on, speed aside: how fast a machine is beside its other work is no matter of a test."""
    return {item["name"] for item in report["items"] if item["status"] == "fail"} - {"decode"}


def example_plan(profile_name: str, *, model: str = "Qwen/Qwen2.5-1.5B-Instruct") -> Plan:
    """Qwen2.5-1.5B-Instruct as Q4_K_M with 4096 tokens of context; round figures near the real ones."""
    device = profile.load(profile_name)
    place: Place = "host" if device.backend == "cpu" else "device"
    return Plan(
        profile=device,
        session="headless",
        power_mode=device.default_mode,
        budget=profile.budget(device),
        model=ModelRef(
            id=model,
            source=model,
            revision="989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
            architecture="qwen2",
            parameters=1_543_714_304,
            license="Apache-2.0",
        ),
        scheme="Q4_K_M",
        imatrix=False,
        runtime=llama_cpp.NAME,
        runtime_version=llama_cpp.VERSION,
        settings=llama_cpp.settings_for(device, context=4096, slots=1, kv_type="f16", ubatch=512),
        memory=MemoryEstimate(
            parts=(
                _part("weights", 935 * MIB, place, "exact"),
                _part("kv_cache", 112 * MIB, place, "exact"),
                _part("compute", 300 * MIB, place, "fitted"),
                _part("process", 40 * MIB, "host", "fitted"),
            ),
            file_bytes=Bytes(941 * MIB),
            file_provenance="exact",
            bits_per_weight=5.08,
        ),
        speed=Speed(
            decode=30.0,
            decode_low=20.0,
            decode_high=40.0,
            decode_full=27.0,
            decode_full_low=18.0,
            decode_all=20.0,
            decode_all_low=18.0,
            prefill=400.0,
            prefill_low=220.0,
            prefill_high=730.0,
            prompt=512,
            first_token=1.3,
            first_token_high=2.4,
            provenance="fitted",
        ),
        quality=Quality(
            score=60.0, low=59.0, high=61.0, retention=0.98, kept_low=0.96, panel="qwen25_instruct_panel"
        ),
    )


def _part(name: str, size: int, place: Place, provenance: Provenance) -> Part:
    spread = 0 if provenance == "exact" else size // 10
    return Part(
        name=name,
        bytes=Bytes(size),
        low=Bytes(size - spread),
        high=Bytes(size + spread),
        provenance=provenance,
        place=place,
    )


def served_plan(runtime: str, profile_name: str) -> Plan:
    """The same model for a runtime in Python, in a scheme that it reads; two slots."""
    known = runtimes.named(runtime)
    device = profile.load(profile_name)
    base = example_plan(profile_name)
    found = catalog.find("qwen2.5-1.5b-instruct")
    assert found is not None
    kv_type = known.kv_types(runtimes.Machine.of(device))[0]
    settings = known.settings_for(device, context=8192, slots=2, kv_type=kv_type, ubatch=512)
    version = runtimes.version(known, device, device.backend)
    start_up = known.start_up(
        found.spec(), settings, backend=device.backend, needed=5 * GIB, total=8 * GIB, version=version
    )
    scheme = {"vllm": "gptq-int4-g128", "onnx-genai": "onnx-int4", "transformers": "bf16"}[runtime]
    return replace(
        base,
        runtime=known.NAME,
        runtime_version=version,
        scheme=scheme,
        settings=settings,
        start_up=dict(start_up),
    )
