"""What each command prints: documents with the agreed names on stdout, everything else on stderr."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgepack import catalog, profile
from edgepack.cli import cli
from edgepack.errors import NothingFits

FIT_FIELDS = {
    "model", "runtime", "scheme", "context", "slots", "kv_type", "parts", "total", "weights_bytes", "file_bytes",
    "bits_per_weight", "kv_cache_bytes", "compute_bytes", "output_bytes", "recurrent_state_bytes", "host_bytes",
    "device_bytes", "budget_bytes", "fits", "max_context", "binding", "hint", "schema_version",
}  # fmt: skip


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def document(*words: object, code: int = 0) -> dict[str, Any]:
    result = run(*words)
    assert result.exit_code == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_fit_has_the_agreed_fields_and_its_parts_add_up() -> None:
    model = ("--model", "qwen2.5-1.5b-instruct", "--scheme", "Q4_K_M")

    found = document("fit", *model, "--profile", "jetson-orin", "--json")

    assert set(found) >= FIT_FIELDS
    assert found["total"]["bytes"] == sum(part["bytes"] for part in found["parts"])
    assert {part["provenance"] for part in found["parts"]} <= {"exact", "fitted", "measured"}
    assert found["host_bytes"] + found["device_bytes"] == found["total"]["bytes"]
    assert all(isinstance(part["bytes"], int) for part in found["parts"])


def test_fit_takes_a_bare_config_and_judges_nothing_without_a_device(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
              "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
              "max_position_embeddings": 32768}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = document(
        "fit", "--model", tmp_path / "config.json", "--scheme", "Q4_0", "--context", 4096, "--json"
    )

    assert found["fits"] is None
    assert found["budget_bytes"] is None
    assert found["kv_cache_bytes"] == 48 * 2**20


def test_a_hint_of_fit_applied_fits() -> None:
    words = (
        "fit",
        "--model",
        "qwen2.5-7b-instruct",
        "--profile",
        "raspberry-pi-5-8gb",
        "--scheme",
        "Q8_0",
        "--json",
    )
    found = document(*words, code=NothingFits.exit_code)
    assert found["fits"] is False

    hint = found["hint"].split()
    flags = [word for pair in itertools.pairwise(hint) if pair[0].startswith("--") for word in pair]
    again = document(*words, *flags)

    assert flags
    assert again["fits"] is True


@pytest.mark.parametrize("name", profile.names())
def test_plan_prints_a_document_that_build_takes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.plan.json"

    found = document("plan", "--profile", name, "--json", "-o", file)

    assert found == json.loads(file.read_text())
    assert found["schema_version"] == 1
    dry = run("build", "--plan", file, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.stderr
    assert json.loads(dry.stdout) == found


def test_plan_for_people_shows_bar_interval_and_reasons() -> None:
    shown = run("plan", "--profile", "jetson-orin", "--explain").stdout

    assert "budget 5.51 GiB = " in shown
    assert "█" in shown
    assert "not chosen (" in shown
    assert "tok/s [" in shown


def test_quiet_counts_wherever_it_stands() -> None:
    words = ("build", "--profile", "jetson-orin", "--model", "demo", "--dry-run")

    assert run(*words).stderr.count("\n") > 3
    assert run(*words, "-q").stderr.count("\n") <= 1


def test_a_plan_with_mistakes_names_them_all(tmp_path: Path) -> None:
    file = tmp_path / "x.plan.json"
    found = document("plan", "--profile", "jetson-orin", "--json", "-o", file)
    del found["scheme"]
    found["settings"]["context"] = "long"
    file.write_text(json.dumps(found))

    result = run("build", "--plan", file, "--dry-run")

    assert result.exit_code == 2
    assert "scheme" in result.stderr
    assert "settings.context" in result.stderr


def test_profiles_are_listed_shown_and_described() -> None:
    listed = document("profiles", "list", "--json")
    shown = document("profiles", "show", "jetson-orin", "--json")
    schema = document("profiles", "schema")

    assert {row["name"] for row in listed["profiles"]} == set(profile.names())
    assert shown["name"] == "jetson-orin-nano-8gb"
    assert "properties" in schema


def test_a_device_must_be_named() -> None:
    result = run("plan")

    assert result.exit_code == 2
    assert "--profile" in result.stderr


def test_an_unknown_runtime_lists_the_known() -> None:
    result = run("plan", "--profile", "jetson-orin", "--runtime", "vlm")

    assert result.exit_code == 11
    assert "did you mean 'vllm'" in result.stderr
    assert "llama.cpp, vllm, onnx-genai, transformers" in result.stderr


def test_a_plan_written_with_its_reasons_is_shown_by_a_report_and_built_from(tmp_path: Path) -> None:
    place = tmp_path / "plan.json"

    printed = document("plan", "--profile", "jetson-orin", "--explain", "--json", "-o", place)

    assert json.loads(place.read_text(encoding="utf-8")) == printed
    assert printed["explanation"]
    assert run("build", "--plan", place, "--dry-run").exit_code == 0
    assert "Why this one" in run("report", place, "--format", "md").stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--profile", "jetson-orin", "--power-mode", "30W"), "no power mode '30W'"),
        (("--power-mode", "30W"), "a device's"),
        (("--desktop",), "a device's"),
    ],
)
def test_fit_takes_no_power_mode_or_session_that_is_not_there(words: tuple[str, ...], told: str) -> None:
    result = run("fit", "--model", "qwen2.5-7b-instruct", *words)

    assert result.exit_code == 2
    assert told in result.stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("qwen2.5-7b", "qwen2.5-7b-instruct"),
        ("qwen2.5-1.5b", "qwen2.5-1.5b-instruct"),
        ("qwen3-4bb", "qwen3-4b"),
    ],
)
def test_a_model_is_found_by_how_its_name_begins(typed: str, meant: str) -> None:
    assert f"did you mean '{meant}'?" in run("fit", "--model", typed).stderr


def test_all_profiles_are_validated_before_the_first_problem_ends_it(tmp_path: Path) -> None:
    names = ("good", "bad", "worse")
    for name, memory in zip(names, ("4GiB", "4 apples", "0"), strict=True):
        text = f"extends: raspberry-pi-5-8gb\nname: {name}\nmemory: {memory}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    result = run("profiles", "validate", *(tmp_path / f"{name}.yaml" for name in reversed(names)))

    assert result.exit_code == 2
    assert "good.yaml: valid" in result.stdout
    assert "bad.yaml" in result.stderr and "worse.yaml" in result.stderr


def test_fit_of_another_runtime_asks_no_conversion_of_a_tokenizer(tmp_path: Path) -> None:
    """vLLM reads the folder as it is; only a GGUF needs a tokenizer that llama.cpp knows."""
    folder = tmp_path / "model"
    shutil.copytree(catalog.built_in()["demo"], folder)
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    asked = ("fit", "--model", str(folder), "--profile", "rtx-4060-8gb", "--json")

    assert document(*asked, "--runtime", "vllm")["fits"] is True
    assert "WordLevel" in run(*asked).stderr


def test_fit_of_another_runtime_has_the_same_names(tmp_path: Path) -> None:
    words = (
        "fit",
        "--model",
        "qwen2.5-1.5b-instruct",
        "--profile",
        "rtx-4060-8gb",
        "--context",
        "8192",
        "--json",
    )

    ours = document(*words)
    vllm = document(*words, "--runtime", "vllm", "--scheme", "gptq-int4-g128", "--slots", "4")

    assert set(ours) == set(vllm)
    assert (vllm["runtime"], vllm["scheme"], vllm["kv_type"]) == ("vllm", "gptq-int4-g128", "bf16")
    assert vllm["fits"] is True
    assert vllm["max_context"] >= 8192
    assert vllm["kv_cache_bytes"] == (4 * 2048 // 16 + 1) * 16 * 28672
    assert vllm["start_up"]["kv_cache_memory_bytes"] == vllm["kv_cache_bytes"]
    assert vllm["total"]["bytes"] == sum(part["bytes"] for part in vllm["parts"])


def test_a_scheme_names_its_runtime() -> None:
    found = document("fit", "--model", "qwen2.5-1.5b-instruct", "--scheme", "onnx-int4", "--json",
                     "--profile", "x86-laptop-ddr5")  # fmt: skip

    assert (found["runtime"], found["kv_type"]) == ("onnx-genai", "f32")


def test_probe_reads_a_captured_device(tmp_path: Path) -> None:
    captured = Path(__file__).parents[1] / "captures" / "jetson-orin-nano-8gb"

    done = run("probe", "--root", captured, "-o", tmp_path / "nano.yaml")

    assert done.exit_code == 0, done.stderr
    assert document("plan", "--profile", tmp_path / "nano.yaml", "--json")["power_mode"] == "25W"


def test_a_context_that_leaves_no_token_for_a_slot_is_refused() -> None:
    for command in ("plan", "fit"):
        result = run(
            command, "--profile", "jetson-orin", "--model", "qwen3-0.6b", "--context", "1", "--slots", "4"
        )

        assert result.exit_code == 2
        assert "no token for each of 4 slots" in result.stderr


def test_a_floor_that_is_no_number_is_refused() -> None:
    result = run("plan", "--profile", "jetson-orin", "--min-tokens-per-second", "nan")

    assert result.exit_code == 2
    assert "nan is no speed" in result.stderr


def test_fit_and_plan_agree_beyond_the_trained_context() -> None:
    result = run(
        "fit", "--model", "qwen2.5-1.5b-instruct", "--profile", "jetson-agx-orin-64gb", "--context", "65536"
    )

    assert result.exit_code == NothingFits.exit_code
    assert "does NOT fit" in result.stdout
    assert "binding: context: the model was trained for 32768 tokens" in result.stdout
    assert "hint: --context 32768" in result.stdout


def test_exact_is_of_llama_cpp_alone() -> None:
    result = run("fit", "--model", "qwen3-0.6b", "--runtime", "transformers", "--exact")

    assert result.exit_code == 11
    assert "--exact asks llama.cpp, and this is for transformers" in result.stderr


def test_a_model_that_is_nearly_right_is_named() -> None:
    result = run("plan", "--profile", "jetson-orin", "--model", "qwen2.5-1.5b-instrct")

    assert result.exit_code == 3
    assert "did you mean 'qwen2.5-1.5b-instruct'?" in result.stderr


def test_a_refused_fit_names_the_smallest_scheme_that_was_tried() -> None:
    """IQ2_XS would fit, but is nothing without calibration: what was not tried is not said to fail."""
    words = ("fit", "--model", "qwen2.5-7b-instruct", "--profile", "raspberry-pi-5-4gb", "--scheme")

    assert "no scheme down to Q2_K fits" in run(*words, "Q8_0").stdout
    assert "Q2_K of this one fits at no context" in run(*words, "Q2_K").stdout
    assert run(*words, "IQ2_XS").exit_code == 0


def test_a_file_that_is_no_bundle_and_a_flash_without_a_device_are_called_so(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a tar\n" * 200, encoding="utf-8")

    inspected, flashed = run("inspect", file), run("flash", file)

    assert (inspected.exit_code, flashed.exit_code) == (6, 2)
    assert "it is no bundle" in inspected.stderr
    assert f"no device is named for {file}" in flashed.stderr
