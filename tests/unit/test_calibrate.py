"""Calibration: every kind of file, every refusal, and constants that give back the readings they came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from edgepack import calibrate, catalog, modelspec, profile, schemes, speed
from edgepack.builders import synthetic
from edgepack.calibrate import Reading
from edgepack.cli import cli
from edgepack.errors import BadInput, Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.profile import DeviceProfile, SpeedConstants
from tests import shapes

PI = profile.load("raspberry-pi-5-8gb")
CARD = profile.load("rtx-3060-12gb")
NANO = profile.load("jetson-orin")


def spec(name: str) -> ModelSpec:
    model = catalog.find(name)
    assert model is not None
    return model.spec()


def bare(device: DeviceProfile) -> DeviceProfile:
    return replace(device, power_modes=tuple(replace(mode, speed=None) for mode in device.power_modes))


def rate(device: DeviceProfile, constants: SpeedConstants, name: str, scheme: str = "Q4_K_M") -> float:
    work = speed.work(spec(name), scheme, imatrix=False)
    return 1.0 / speed.own_terms(device.mode(), work, constants).total


def reading(
    name: str, decode: float, *, scheme: str = "Q4_K_M", prefill: float | None = None, at: str = "x"
) -> Reading:
    return Reading(
        where=at, model=name, scheme=scheme, work=speed.work(spec(name), scheme, imatrix=False), decode=decode,
        prefill=prefill, kv_bytes=0,
    )  # fmt: skip


def row(model: str, decode: float, **more: object) -> dict[str, object]:
    return {"device": "Raspberry Pi 5", "model": model, "quant": "Q4_K_M", "decode_tps": decode, **more}


def bench(
    model: str, tokens: float, prompt: float, *, scheme: str = "Q4_K - Medium", **more: object
) -> list[dict[str, object]]:
    """llama-bench's two records of one model, with the fields that say what it was (build 0c1e57098)."""
    found = spec(model)
    common = {
        "build_commit": "0c1e57098", "cpu_info": "Cortex-A76", "gpu_info": "", "backends": "CPU",
        "model_filename": f"/gone/{model}.gguf", "model_type": f"{found.architecture} 1B {scheme}",
        "model_size": schemes.weights_bytes(found, "Q4_K_M", imatrix=False),
        "model_n_params": found.parameters, "n_gpu_layers": -1, "n_depth": 0, **more,
    }  # fmt: skip
    return [
        {**common, "n_prompt": 512, "n_gen": 0, "avg_ts": prompt},
        {**common, "n_prompt": 0, "n_gen": 128, "avg_ts": tokens},
    ]


def report(name: str, decode: float | None, **more: object) -> dict[str, object]:
    """The part of `edgepack check --json` that says how fast it was."""
    measured = None
    if decode is not None:
        measured = {
            "prompt_tokens": 256, "predicted_tokens": 64, "prefill_per_second": 40.0, "decode_per_second": decode,
        }  # fmt: skip
    facts = {"bundle": {"name": name}, "speed": measured, "machine": {"load": 0.1, "cores": 4}}
    return {"same_device": True, "schema_version": 1, "facts": facts, **more}


def write(path: Path, *documents: object, lines: bool = False) -> Path:
    one = documents[0] if len(documents) == 1 else list(documents)
    text = "".join(f"{json.dumps(d)}\n" for d in documents) if lines else json.dumps(one)
    path.write_text(text, encoding="utf-8")
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def reasons(path: Path, device: DeviceProfile = PI, mode: str | None = None) -> list[str]:
    readings, refused = calibrate.read(path, device, device.mode(mode))
    assert readings == []
    return [r.reason for r in refused]


# ── constants ──


@given(efficiency=st.floats(min_value=0.2, max_value=0.95), overhead=st.floats(min_value=10, max_value=80))
def test_two_readings_that_follow_the_law_give_its_constants_back(efficiency: float, overhead: float) -> None:
    truth = SpeedConstants(decode_efficiency=efficiency, layer_overhead_us=overhead)
    names = ("smollm2-135m-instruct", "llama-3.1-8b-instruct")

    found = calibrate.calibrate(CARD, CARD.mode(), [reading(n, rate(CARD, truth, n), at=n) for n in names])

    third = rate(CARD, truth, "llama-3.2-3b-instruct")
    assert rate(CARD, found.constants, "llama-3.2-3b-instruct") == pytest.approx(third, rel=0.05)
    assert found.constants.readings == 2
    assert all(abs(r.relative) < 0.05 for r in found.residuals)
    assert found.constants.relative_interval == pytest.approx(0.1653, abs=0.01)


def test_a_prompt_gives_its_rate() -> None:
    work = speed.work(spec("llama-3.2-3b-instruct"), "Q4_K_M", imatrix=False)

    found = calibrate.calibrate(PI, PI.mode(), [reading("llama-3.2-3b-instruct", 4.88, prefill=16.0)])

    assert found.constants.prefill_tflops == pytest.approx(2 * work.weights * 16.0 / 1e12, rel=1e-3)


def test_one_reading_takes_the_overhead_of_the_class_and_a_wider_interval() -> None:
    device = bare(CARD)
    one = reading("llama-3.1-8b-instruct", 55.0)

    found = calibrate.calibrate(device, device.mode(), [one])

    usual = speed.terms(speed.machine(device, device.mode()), one.work).overhead / 32
    assert found.constants.layer_overhead_us == pytest.approx(usual * 1e6, rel=1e-3)
    assert found.residuals[0].relative == pytest.approx(0.0, abs=1e-3)
    assert found.constants.relative_interval == pytest.approx(0.2586, abs=1e-3)
    assert "one size of model only" in found.warnings[0]


def test_readings_that_scatter_widen_the_interval() -> None:
    some = [
        reading("smollm2-135m-instruct", 100.0, at="a"),
        reading("llama-3.2-3b-instruct", 4.0, at="b"),
        reading("llama-3.2-3b-instruct", 4.95, at="c"),
        reading("llama-3.1-8b-instruct", 2.17, at="d"),
    ]

    found = calibrate.calibrate(PI, PI.mode(), some)

    worst = max(abs(r.relative) for r in found.residuals)
    assert found.constants.relative_interval >= worst


def test_a_faster_reading_than_the_memory_allows_is_refused() -> None:
    """llmfit's RTX 3060 with Qwen2.5-Coder-7B Q4_K_M at 119 tok/s is the case in point."""
    with pytest.raises(
        BadInput, match=r"no reading can be used.*\n.*reads 520.1 GB/s, more than the 360 GB/s"
    ):
        calibrate.calibrate(CARD, CARD.mode(), [reading("qwen2.5-7b-instruct", 119.0)])


def test_a_reading_that_did_not_run_here_is_refused_and_the_others_are_used() -> None:
    some = [
        reading("llama-3.1-8b-instruct", 2.5, at="slow"),
        reading("llama-3.2-3b-instruct", 125.0, at="good"),
    ]

    found = calibrate.calibrate(CARD, CARD.mode(), some)

    assert [r.where for r in found.residuals] == ["good"]
    assert found.refused[0].where == "slow"
    assert "it ran elsewhere, or did not fit" in found.refused[0].reason


@pytest.mark.parametrize(
    ("name", "decode"), [("qwen2.5-1.5b-instruct", 0.001), ("smollm2-135m-instruct", 1e-5)]
)
def test_a_speed_far_below_what_any_model_has_is_refused_however_small_the_model(
    name: str, decode: float
) -> None:
    with pytest.raises(BadInput, match=r"of the bandwidth: not even a small model is so slow"):
        calibrate.calibrate(NANO, NANO.mode(), [reading(name, decode)])


def test_repeats_that_contradict_each_other_are_both_refused() -> None:
    some = [
        reading("llama-3.2-3b-instruct", 4.9, at="a"),
        reading("llama-3.2-3b-instruct", 2.4, at="b"),
        reading("llama-3.1-8b-instruct", 2.17, at="c"),
    ]

    found = calibrate.calibrate(PI, PI.mode(), some)

    assert {r.where for r in found.refused} == {"a", "b"}
    assert "from 2.4 to 4.9 tok/s" in found.refused[0].reason


def test_two_readings_that_no_constants_give_are_refused_by_name() -> None:
    some = [reading("smollm2-135m-instruct", 6.0, at="a"), reading("llama-3.1-8b-instruct", 2.6, at="b")]

    with pytest.raises(BadInput, match=r"the readings contradict each other: a .* and b "):
        calibrate.calibrate(PI, PI.mode(), some)


def test_of_three_readings_the_one_that_measured_something_else_is_left_out() -> None:
    truth = SpeedConstants(decode_efficiency=0.6, layer_overhead_us=40.0)
    names = ("smollm2-135m-instruct", "llama-3.1-8b-instruct", "qwen2.5-1.5b-instruct")
    some = [reading(n, rate(PI, truth, n), at=n) for n in names]
    some.append(reading("llama-3.2-3b-instruct", rate(PI, truth, "llama-3.2-3b-instruct") / 2, at="odd"))

    found = calibrate.calibrate(PI, PI.mode(), some)

    assert [r.where for r in found.refused] == ["odd"]
    assert found.constants.readings == 3
    assert found.constants.decode_efficiency == pytest.approx(0.6, rel=0.03)


def test_the_context_of_a_reading_is_not_charged_to_the_weights() -> None:
    plain = reading("llama-3.1-8b-instruct", 2.17)
    cache = 131072 * 4096
    slower = 1 / (1 / 2.17 + cache / (speed.LAW.kv["llama.cpp"] * 17.1e9))

    deep = replace(plain, decode=slower, kv_bytes=cache)

    one, two = (calibrate.calibrate(PI, PI.mode(), [r]).constants for r in (plain, deep))
    assert two.decode_efficiency == pytest.approx(one.decode_efficiency, rel=1e-3)


# ── files ──


def test_llama_bench_as_json_and_as_lines_gives_the_same_readings(tmp_path: Path) -> None:
    records = [*bench("qwen2.5-0.5b-instruct", 21.0, 190.0), *bench("llama-3.2-3b-instruct", 4.9, 17.0)]

    whole, refused = calibrate.read(write(tmp_path / "a.json", *records), PI, PI.mode())
    lines, _ = calibrate.read(write(tmp_path / "a.jsonl", *records, lines=True), PI, PI.mode())

    assert refused == []
    assert [(r.model, r.scheme, r.decode, r.prefill) for r in whole] == [
        ("qwen2.5-0.5b-instruct", "Q4_K_M", 21.0, 190.0),
        ("llama-3.2-3b-instruct", "Q4_K_M", 4.9, 17.0),
    ]
    assert [replace(r, where="") for r in whole] == [replace(r, where="") for r in lines]
    assert whole[0].where.endswith("a.json[1]")
    assert lines[0].where.endswith("a.jsonl:2")


def test_llama_bench_of_a_file_that_is_here_needs_no_catalog(tmp_path: Path) -> None:
    model = shapes.spec("odd-heads")
    tiny = replace(shapes.spec("llama-3.2-1b"), name="mine")
    file = shapes.write_gguf(tmp_path / "mine.gguf", tiny, "Q4_K_M")
    records = [
        {**record, "model_filename": str(file)} for record in bench("qwen2.5-0.5b-instruct", 9.0, 90.0)
    ]

    readings, refused = calibrate.read(write(tmp_path / "a.json", *records), PI, PI.mode())

    assert refused == []
    assert readings[0].model == "mine"
    assert readings[0].work == speed.work(tiny, "Q4_K_M", imatrix=False)
    assert model.name != tiny.name


def test_a_depth_of_llama_bench_counts_as_context(tmp_path: Path) -> None:
    records = bench("llama-3.2-3b-instruct", 4.1, 17.0, n_depth=4096)

    readings, _ = calibrate.read(write(tmp_path / "a.json", *records), PI, PI.mode())

    assert readings[0].kv_bytes == 28 * 8 * 128 * 2 * 2 * (4096 + 64)


def test_rows_like_the_truth_files_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        row("Llama-3.2-3B", 4.88, prefill_tps=None, context=512, runtime="ollama"),
        row("qwen2.5-0.5b-instruct", 20.0, quant="q8_0"),
        lines=True,
    )

    readings, refused = calibrate.read(path, PI, PI.mode())

    assert refused == []
    assert [(r.model, r.scheme) for r in readings] == [
        ("llama-3.2-3b-instruct", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct", "Q8_0"),
    ]
    assert readings[0].kv_bytes == 28 * 8 * 128 * 2 * 2 * 256


def test_a_check_report_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", report("qwen2.5-0.5b-instruct-q8_0-raspberry-pi-5-8gb", 15.0))

    readings, refused = calibrate.read(path, PI, PI.mode())

    assert refused == []
    (found,) = readings
    assert (found.model, found.scheme, found.decode, found.prefill) == (
        "qwen2.5-0.5b-instruct",
        "Q8_0",
        15.0,
        40.0,
    )
    assert found.served
    assert found.kv_bytes == 24 * 2 * 64 * 2 * 2 * (256 + 32)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (report("qwen2.5-0.5b-instruct-q8_0-jetson-orin-nano-8gb", 15.0), "was planned for jetson-orin-nano-8gb"),
        (report("unheard-of-q8_0-raspberry-pi-5-8gb", 15.0), "the catalog has no model 'unheard-of'"),
        (report("nameless", 15.0), "does not say its scheme"),
        (report("qwen2.5-0.5b-instruct-q8_0-raspberry-pi-5-8gb", None), "did not get to measuring its speed"),
        (
            report("qwen2.5-0.5b-instruct-q8_0-raspberry-pi-5-8gb", 15.0, same_device=False),
            "on a device that its profile does not describe",
        ),
        (row("Llama-3.2-3B", 4.88, device="Raspberry Pi 4"), "read on Raspberry Pi 4, not on Raspberry Pi 5"),
        (row("Llama-3.2-3B", 4.88, device="RTX 3060 12GB"), "read on RTX 3060 12GB"),
        (row("Llama-3.2-3B", 0), "decode_tps is 0, not a speed"),
        (row("Llama-3.2-3B", 1e-320), "decode_tps is 1e-320, not a speed"),
        (row("Llama-3.2-3B", 10**400), ", not a speed"),
        (row("Llama-3.2-3B", 4.88, prefill_tps=1e-320), "prefill_tps is 1e-320, not a speed"),
        (row("Llama-3.2-3B", 4.88, prefill_tps="fast"), "prefill_tps is 'fast', not a speed"),
        (row("Llama-3.2-3B", 4.88, context=[512]), "context is [512], not a number of tokens"),
        (row("Llama-3.2-3B", 4.88, quant="gptq-int4-g128"), "gptq-int4-g128 is no scheme of GGUF files"),
        (row("Llama-3.2-3B", 4.88, quant="bf16"), "bf16 is no scheme of GGUF files"),
        (row("Llama-3.2-3B", 4.88, quant=None), "quant missing"),
        (row("Llama-3.2-3B", 4.88, quant="Q4_K_X"), "scheme 'Q4_K_X' is not known"),
        (row("Llama-3.2-3B", 4.88, runtime="MLC"), "with MLC, not with llama.cpp"),
        (row("Llama-3.2-3B", 4.88, power_mode="15W"), "it was read in 15W, not in default"),
        (row("Lama-3.2-3b-instruct", 4.88), "did you mean 'llama-3.2-3b-instruct'?"),
        (bench("qwen2.5-0.5b-instruct", 21.0, 190.0)[0], "no run that decodes"),
        (bench("qwen2.5-0.5b-instruct", 0.0, 190.0)[1], "avg_ts is 0.0, not a speed"),
        (bench("qwen2.5-0.5b-instruct", 21.0, 190.0, n_depth=[1])[1], "n_depth is [1], not a number of tokens"),
        (bench("qwen2.5-0.5b-instruct", 21.0, 190.0, n_depth=-1)[1], "n_depth is -1, not a number of tokens"),
        (bench("qwen2.5-0.5b-instruct", 21.0, 190.0, n_depth=10**400)[1], ", not a number of tokens"),
        (
            {**bench("qwen2.5-0.5b-instruct", 21.0, 190.0)[1], "n_gen": "many"},
            "n_gen is 'many', not a number of tokens",
        ),
        ({**bench("qwen2.5-0.5b-instruct", 21.0, 190.0)[1], "n_gen": True}, "n_gen is True, not a number of tokens"),
        (
            bench("qwen2.5-0.5b-instruct", 21.0, 190.0, gpu_info="NVIDIA GeForce RTX 3060")[1],
            "it ran on NVIDIA GeForce RTX 3060, and raspberry-pi-5-8gb has no accelerator",
        ),
        (bench("qwen2.5-0.5b-instruct", 21.0, 190.0, model_n_params=7)[1], "with 7 weights in"),
        (bench("qwen2.5-0.5b-instruct", 21.0, 190.0, model_type="?")[1], "model_type '?' names no scheme"),
    ],
)  # fmt: skip
def test_a_reading_that_cannot_be_used_is_refused_with_the_reason(
    document: object, reason: str, tmp_path: Path
) -> None:
    (found,) = reasons(write(tmp_path / "x.json", document))

    assert reason in found


def test_a_check_with_no_count_of_its_tokens_is_refused(tmp_path: Path) -> None:
    document: dict[str, Any] = report("qwen2.5-0.5b-instruct-q8_0-raspberry-pi-5-8gb", 15.0)
    document["facts"]["speed"]["prompt_tokens"] = -3

    assert reasons(write(tmp_path / "x.json", document)) == ["prompt_tokens is -3, not a number of tokens"]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("jetson-orin", "Jetson AGX Orin 64GB"),
        ("jetson-orin", "Jetson AGX Orin"),
        ("jetson-orin", "Jetson Orin NX 16GB"),
        ("jetson-orin", "Jetson Orin NX 8GB"),
        ("jetson-orin", "Jetson Orin Nano 4GB"),
        ("jetson-orin", "Jetson Nano"),
        ("jetson-orin", "Orin (nvgpu)"),
        ("jetson-orin", "Orin"),
        ("jetson-orin", "Jetson"),
        ("jetson-orin", "NVIDIA GPU"),
        ("jetson-orin", "cpu"),
        ("jetson-orin", "-"),
        ("jetson-orin", "Jetson Orin Nano 8GB (CPU)"),
        ("jetson-agx-orin-32gb", "Jetson AGX Orin 64G"),
        ("raspberry-pi-5-8gb", "Raspberry Pi"),
        ("raspberry-pi-5-8gb", "Orange Pi 5 8GB"),
        ("raspberry-pi-5-8gb", "Raspberry Pi 5 4GB"),
        ("rtx-3060-laptop-6gb", "RTX 3060 12GB"),
        ("rtx-3060-12gb", "RTX 3060 8GB"),
        ("rtx-3060-12gb", "RTX 3060 Mobile"),
        ("rtx-3060-12gb", "RTX 3060 Ti 12GB"),
        ("rtx-4060-8gb", "RTX 4060 Super"),
        ("rtx-4060-8gb", "RTX 4060 under WSL2"),
        ("rtx-4060-laptop-8gb", "Laptop"),
        ("rtx-4060-laptop-8gb", "RTX 4070 Laptop 8GB"),
        ("rtx-4060-laptop-8gb", "RTX 3050 Laptop GPU"),
        ("mac-mini-m4", "Apple M4 Max 64GB"),
        ("mac-mini-m4", "Apple M4 mini 32GB"),
        ("android-snapdragon-8-elite", "Snapdragon 8 Elite Gen 5"),
    ],
)
def test_a_row_of_another_device_is_refused(name: str, device: str, tmp_path: Path) -> None:
    ours = profile.load(name)

    (found,) = reasons(write(tmp_path / "x.json", row("qwen2.5-1.5b-instruct", 60.0, device=device)), ours)

    assert found == f"it was read on {device}, not on {ours.title}"


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("jetson-orin", "Jetson Orin Nano Super 8GB (MAXN, 102 GB/s)"),
        ("jetson-orin", "Jetson Orin Nano 8GB (original, 68GB/s)"),
        ("jetson-orin", "Jetson Orin Nano 8GB"),
        ("jetson-orin", "Orin Nano"),
        ("jetson-orin", "Jetson Orin Nano, 7.4 GiB"),
        ("jetson-orin-nx-16gb", "Jetson Orin NX 16GB (SUPER)"),
        ("jetson-agx-orin-64gb", "Jetson AGX Orin 64GB"),
        ("raspberry-pi-5-8gb", "Pi 5"),
        ("raspberry-pi-5-8gb", "Raspberry Pi 5 Model B 8 GB"),
        ("rtx-3060-12gb", "RTX 3060 12GB"),
        ("rtx-3060-12gb", "NVIDIA GeForce RTX 3060"),
        ("rtx-3060-laptop-6gb", "RTX 3060 Mobile 6GB"),
        ("rtx-4060-laptop-8gb", "RTX 4060 Laptop 8GB"),
        ("rtx-4060-laptop-8gb-wsl", "RTX 4060 Laptop (WSL2)"),
        ("rtx-4060-ti-16gb", "RTX 4060 Ti 16GB"),
        ("mac-mini-m4", "Apple M4"),
        ("steam-deck", "Steam Deck"),
    ],
)
def test_a_row_of_the_same_device_is_read_however_people_call_it(
    name: str, device: str, tmp_path: Path
) -> None:
    ours = profile.load(name)
    path = write(tmp_path / "x.json", row("qwen2.5-1.5b-instruct", 60.0, device=device))

    readings, refused = calibrate.read(path, ours, ours.mode())

    assert (len(readings), refused) == (1, [])


@pytest.mark.parametrize("name", profile.names())
def test_a_row_may_call_the_device_as_its_profile_does(name: str, tmp_path: Path) -> None:
    ours = profile.load(name)
    said = (ours.name, ours.title, *ours.aliases)
    path = write(
        tmp_path / "x.jsonl", *(row("qwen2.5-1.5b-instruct", 60.0, device=d) for d in said), lines=True
    )

    readings, refused = calibrate.read(path, ours, ours.mode())

    assert (len(readings), refused) == (len(said), [])


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("jetson-orin", "Orin"),
        ("steam-deck", "AMD Custom GPU 0405 (RADV VANGOGH)"),
        ("rtx-4060-laptop-8gb-wsl", "NVIDIA GeForce RTX 4060 Laptop GPU"),
    ],
)
def test_llama_bench_calls_a_card_as_its_driver_does(name: str, gpu: str, tmp_path: Path) -> None:
    ours = profile.load(name)
    path = write(tmp_path / "x.json", *bench("qwen2.5-0.5b-instruct", 60.0, 900.0, gpu_info=gpu))

    readings, refused = calibrate.read(path, ours, ours.mode())

    assert (len(readings), refused) == (1, [])


def test_a_check_of_a_busy_machine_is_refused(tmp_path: Path) -> None:
    document: dict[str, Any] = report("qwen2.5-0.5b-instruct-q8_0-raspberry-pi-5-8gb", 15.0)
    document["facts"]["machine"]["load"] = 7.5

    (found,) = reasons(write(tmp_path / "x.json", document))

    assert "the load was 7.5 on 4 cores" in found


def test_a_check_beside_another_program_is_refused(tmp_path: Path) -> None:
    document: dict[str, Any] = report("qwen2.5-0.5b-instruct-q8_0-raspberry-pi-5-8gb", 15.0)
    document["facts"]["speed"]["others_cores"] = 1.0

    (found,) = reasons(write(tmp_path / "x.json", document))

    assert "took 1.0 of 4 cores" in found


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ("", "it ran on the CPU"),
        ("NVIDIA GPU", "it ran on NVIDIA GPU, not on NVIDIA GeForce RTX 3060"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "it ran on NVIDIA GeForce RTX 3060 Laptop GPU"),
    ],
)
def test_llama_bench_of_another_card_is_refused(gpu: str, reason: str, tmp_path: Path) -> None:
    records = bench("qwen2.5-0.5b-instruct", 300.0, 9000.0, gpu_info=gpu)

    (found,) = reasons(write(tmp_path / "x.json", *records), CARD)

    assert reason in found


def test_llama_bench_of_the_same_card_is_read(tmp_path: Path) -> None:
    records = bench("qwen2.5-0.5b-instruct", 300.0, 9000.0, gpu_info="NVIDIA GeForce RTX 3060")

    readings, refused = calibrate.read(write(tmp_path / "x.json", *records), CARD, CARD.mode())

    assert (len(readings), refused) == (1, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "neither JSON nor JSON lines: line 1"),
        ("", "not a reading of speed"),
        ("[" * 100_000, "neither JSON nor JSON lines: line 1"),
        ("9" * 5000, "neither JSON nor JSON lines: line 1"),
        ('[{"tokens": 3}, 7]', r"not a reading of speed: .*\[0\], .*\[1\]"),
    ],
)
def test_a_file_that_is_none_of_these_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)

    with pytest.raises(BadInput, match=message):
        calibrate.read(path, PI, PI.mode())


@pytest.mark.parametrize("lines", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_file(lines: bool, tmp_path: Path) -> None:
    rows = [row("Llama-3.2-3B", 4.88), row("qwen2.5-0.5b-instruct", 20.0)]
    path = write(tmp_path / "x.json", *rows, lines=lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    readings, refused = calibrate.read(path, PI, PI.mode())

    assert (len(readings), refused) == (2, [])


def test_every_fitting_row_of_a_pi_in_the_truth_file_calibrates_it(tmp_path: Path) -> None:
    """All five published readings lie within 6 % of two constants; one model is in no catalog."""
    truth = Path(__file__).parents[1] / "truth" / "speed.jsonl"
    lines = [line for line in truth.read_text(encoding="utf-8").splitlines() if '"Raspberry Pi 5"' in line]
    path = tmp_path / "pi.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")

    readings, refused = calibrate.read(path, PI, PI.mode())
    found = calibrate.calibrate(PI, PI.mode(), readings, refused)

    assert len(found.residuals) == 4
    assert all(abs(r.relative) < 0.06 for r in found.residuals)
    assert "Llama-2-13B" in found.refused[0].reason


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("Llama-3.2-3B", "llama-3.2-3b-instruct"),
        ("llama3.2:3b", "llama-3.2-3b-instruct"),
        ("Llama-3-8B", "llama-3.1-8b-instruct"),
        ("Qwen2.5-Coder-14B-Instruct", "qwen2.5-14b-instruct"),
        ("DeepSeek-R1-Distill-Qwen-14B", "qwen2.5-14b-instruct"),
        ("DeepSeek-R1-Distill-Qwen-7B", "deepseek-r1-distill-qwen-7b"),
        ("DeepSeek-R1-Distill-Llama-8B", "llama-3.1-8b-instruct"),
        ("Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("qwen3:8b", "qwen3-8b"),
        ("Qwen_Qwen3.5-0.8B", "qwen3.5-0.8b"),
        ("google_gemma-3-1b-it", "gemma-3-1b-it"),
        ("microsoft_Phi-4-mini-reasoning", "phi-4-mini-instruct"),
        ("TinyLlama-1.1B-Chat-v1.0.i1", "tinyllama-1.1b-chat"),
        ("LFM2.5-1.2B-Thinking", "lfm2-1.2b"),
        ("Mistral-7B", "mistral-7b-instruct-v0.3"),
    ],
)
def test_published_names_find_the_model_of_their_shape(published: str, ours: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", row(published, 1.0))

    readings, refused = calibrate.read(path, PI, PI.mode())

    assert refused == []
    assert readings[0].model == ours


def test_the_scheme_may_stand_in_the_name(tmp_path: Path) -> None:
    named = row("qwen2.5-coder-7b-instruct-q4_k_m", 2.0, quant="as published")
    silent = row("qwen2.5-coder-7b-instruct", 2.0, quant="as published")

    half = row("qwen2.5-0.5b-instruct-bf16", 9.0, quant="as published")
    said = row("qwen2.5-0.5b-instruct", 9.0, quant="bf16", runtime="llama.cpp")

    readings, refused = calibrate.read(write(tmp_path / "x.json", named, silent, half, said), PI, PI.mode())

    assert [r.scheme for r in readings] == ["Q4_K_M", "BF16", "BF16"]
    assert refused[0].reason == "'as published' does not say the scheme"


# ── the command ──


def test_the_written_profile_loads_and_its_plans_say_calibrated(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", row("Llama-3.2-3B", 4.88), row("llama-3.1-8b", 2.17), lines=True)
    out = tmp_path / "mine.yaml"

    result = run("calibrate", "--profile", "raspberry-pi-5-8gb", "--from", rows, "-o", out)

    assert result.exit_code == 0, result.stderr
    assert "58.2% of the bandwidth" in result.stdout.splitlines()[0]
    mine = profile.load(str(out))
    assert mine.name == "raspberry-pi-5-8gb-calibrated"
    assert mine.memory == PI.memory
    constants = mine.constants()
    assert constants is not None and constants.readings == 2
    planned = json.loads(run("plan", "--profile", out, "--model", "llama-3.2-3b-instruct", "--scheme", "Q4_K_M",
                             "--min-tokens-per-second", 0, "--json").stdout)  # fmt: skip
    assert planned["speed"]["provenance"] == "calibrated"
    assert planned["speed"]["decode"] == pytest.approx(4.88, rel=0.03)
    text = out.read_text(encoding="utf-8")
    assert "# llama.cpp in default, 2 reading(s)" in text
    assert "llama-3.1-8b-instruct Q4_K_M: 2.17" in text


def test_the_same_readings_write_the_same_bytes_and_a_profile_can_be_calibrated_again(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", row("Llama-3.2-3B", 4.88), row("llama-3.1-8b", 2.17), lines=True)
    base = tmp_path / "base.yaml"
    base.write_text("extends: raspberry-pi-5-8gb\nname: kiosk\n")

    first = run("calibrate", "--profile", base, rows, "-o", tmp_path / "one.yaml")
    second = run("calibrate", "--profile", base, rows, "-o", tmp_path / "two.yaml")
    third = run("calibrate", "--profile", tmp_path / "one.yaml", rows, "-o", tmp_path / "three.yaml")

    assert (first.exit_code, second.exit_code, third.exit_code) == (0, 0, 0), third.stderr
    assert (tmp_path / "one.yaml").read_bytes() == (tmp_path / "two.yaml").read_bytes()
    assert profile.load(str(tmp_path / "one.yaml")).name == "kiosk-calibrated"
    assert (
        profile.load(str(tmp_path / "three.yaml")).constants()
        == profile.load(str(tmp_path / "one.yaml")).constants()
    )


def test_constants_belong_to_the_power_mode_that_was_measured(tmp_path: Path) -> None:
    device = "Jetson Orin Nano 8GB"
    rows = write(
        tmp_path / "rows.jsonl",
        row("Llama-3.2-3B", 18.0, device=device, power_mode="15W"),
        row("smollm2-135m", 120.0, device=device, power_mode="15W"),
        lines=True,
    )
    out = tmp_path / "mine.yaml"

    result = run("calibrate", "--profile", "jetson-orin", "--power-mode", "15W", "--from", rows, "-o", out)

    assert result.exit_code == 0, result.stderr
    mine = profile.load(str(out))
    assert mine.default_mode == "15W"
    slow, other = mine.constants("15W"), mine.constants("25W")
    assert slow is not None and slow.readings == 2
    assert other == NANO.constants("25W")


def test_without_a_file_the_profile_is_printed_and_json_has_the_residuals(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", row("Llama-3.2-3B", 4.88), row("Nope", 1.0), lines=True)

    plain = run("calibrate", "--profile", "raspberry-pi-5-8gb", rows)
    found = json.loads(run("calibrate", "--profile", "raspberry-pi-5-8gb", rows, "--json").stdout)

    assert "extends: raspberry-pi-5-8gb" in plain.stdout
    assert found["schema_version"] == 1
    assert found["constants"]["readings"] == 1
    assert [r["model"] for r in found["residuals"]] == ["llama-3.2-3b-instruct"]
    assert "no model 'Nope'" in found["refused"][0]["reason"]
    assert any("one size of model only" in w for w in found["warnings"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--profile", "raspberry-pi-5-8gb"), 2, "give readings with --from FILE, or --run"),
        (("--profile", "raspberry-pi-5-8gb", "x.json", "--run"), 2, "--from and --run exclude each other"),
        (("--profile", "raspberry-pi-5-8gb", "--power-mode", "9W", "x.json"), 2, "has no power mode '9W'"),
        (("--profile", "raspberry-pi-9", "x.json"), 3, "no profile is called 'raspberry-pi-9'"),
        (("--profile", "raspberry-pi-5-8gb", "x.json", "y.json"), 3, "x.json, y.json does not exist"),
        (("x.json",), 2, "--profile"),
    ],
)
def test_what_cannot_be_done_says_so(words: tuple[str, ...], code: int, message: str) -> None:
    result = run("calibrate", *words)

    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_when_nothing_can_be_used_every_reason_is_given(tmp_path: Path) -> None:
    rows = write(
        tmp_path / "rows.jsonl",
        row("Nope", 1.0),
        row("Llama-3.2-3B", 50.0),
        row("Llama-3.2-3B", 4.8, runtime="MLC"),
        lines=True,
    )

    result = run("calibrate", "--profile", "raspberry-pi-5-8gb", rows)

    assert result.exit_code == 2
    assert all(f"rows.jsonl:{line}" in result.stderr for line in (1, 2, 3))


def test_a_synthetic_model_is_a_whole_gguf_of_its_shape(tmp_path: Path) -> None:
    model = replace(shapes.spec("llama-3.2-1b"), name="small")
    config = shapes.config("llama", 2, 256, 512, 4, 2, 512, tie_word_embeddings=False)
    small = modelspec.from_config(config, name="small")

    path = synthetic.write(tmp_path / "small.gguf", small, "Q4_K_M")

    found = modelspec.read(path)
    assert found.gguf_scheme == "Q4_K_M"
    assert found.parameters == small.parameters
    assert path.stat().st_size == found.file_bytes
    assert speed.work(found, "Q4_K_M", imatrix=False) == speed.work(small, "Q4_K_M", imatrix=False)
    with pytest.raises(Unsupported, match="has tensors of type"):
        synthetic.write(tmp_path / "other.gguf", model, "Q8_0")
