"""What a bundle is made of and runs with, as CycloneDX 1.6; the same bytes for the same bundle.

Format: https://cyclonedx.org/docs/1.6/json/. Time and random serial numbers are optional there and left out
or derived, so that a bundle stays reproducible.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from urllib.parse import quote

import edgepack
from edgepack import runtimes
from edgepack.artifact import Artifact, Checkpoint
from edgepack.plan import Plan
from edgepack.profile import RuntimeImage
from edgepack.workspace import sha256_file

_SPDX = frozenset(
    {"Apache-2.0", "MIT", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC0-1.0"}
)
"""Identifiers that may stand as license.id; other licences (Gemma, Llama, Qwen) are given by name."""


def sbom(
    plan: Plan,
    artifact: Artifact,
    checkpoint: Checkpoint,
    *,
    runtime: Path | None = None,
    image: RuntimeImage | None = None,
    requirements: str = "",
) -> str:
    """The CycloneDX document as JSON text; ``runtime`` is the server binary in the bundle, if any.

    ``requirements``: the bundle's requirements.txt; what it pins is listed where the runtime is one in Python.
    """
    served = _runtime(plan, runtime)
    libraries = _libraries(requirements) if runtimes.named(plan.runtime).MODULES else []
    components: list[dict[str, object]] = [
        _model(plan, artifact, checkpoint),
        served,
        {
            "type": "application",
            "bom-ref": "edgepack",
            "name": "edgepack",
            "version": edgepack.__version__,
            "licenses": [{"license": {"id": "Apache-2.0"}}],
            "purl": f"pkg:pypi/edgepack@{edgepack.__version__}",
        },
    ]
    components += [library for library in libraries if library["purl"] != served["purl"]]
    if image is not None:
        components.append(_container(image))
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(components, sort_keys=True))
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": "bundle", "name": plan.name, "version": "1"},
            "tools": {
                "components": [{"type": "application", "name": "edgepack", "version": edgepack.__version__}]
            },
        },
        "components": components,
        "dependencies": [
            {"ref": "bundle", "dependsOn": sorted(str(c["bom-ref"]) for c in components)},
            *({"ref": str(c["bom-ref"])} for c in components),
        ],
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def commit(runtime_version: str) -> str | None:
    """The commit in a version like "0.5.0-dev (0c1e57098)", None when it names none."""
    found = re.search(r"\(([0-9a-f]{7,40})\)", runtime_version)
    return found.group(1) if found else None


def _model(plan: Plan, artifact: Artifact, checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": plan.model.id,
        "version": checkpoint.revision,
        "licenses": [_license(checkpoint.license)],
        "hashes": [{"alg": "SHA-256", "content": artifact.sha256}],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": plan.model.architecture,
            }
        },
        "properties": [
            {"name": "edgepack:file", "value": runtimes.named(plan.runtime).ARTIFACT},
            {"name": "edgepack:scheme", "value": artifact.scheme},
            {"name": "edgepack:parameters", "value": str(plan.model.parameters)},
            {"name": "edgepack:made-by", "value": artifact.tool},
        ],
    }


def _runtime(plan: Plan, binary: Path | None) -> dict[str, object]:
    source = runtimes.named(plan.runtime).source(plan.profile.backend)
    version = plan.runtime_version
    component: dict[str, object] = {
        "type": "application",
        "bom-ref": "runtime",
        "name": plan.runtime,
        "version": version,
        "licenses": [{"license": {"id": source.license}}],
        "purl": f"{source.purl}@{quote(commit(version) or version, safe='')}",
    }
    if binary is not None:
        component["hashes"] = [{"alg": "SHA-256", "content": sha256_file(binary)}]
        component["properties"] = [{"name": "edgepack:file", "value": "bin/llama-server"}]
    return component


def _libraries(requirements: str) -> list[dict[str, object]]:
    """A component for each line "name[extras]==version"."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)$", requirements, re.MULTILINE)
    return [
        {
            "type": "library",
            "bom-ref": f"library-{name}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version, safe='')}",
        }
        for name, version in dict(pins).items()
    ]


def _container(image: RuntimeImage) -> dict[str, object]:
    name, _, tag = image.reference.rpartition(":")
    component: dict[str, object] = {
        "type": "container",
        "bom-ref": "image",
        "name": name or image.reference,
        "version": image.digest if image.digest != "unknown" else tag,
        "properties": [{"name": "edgepack:reference", "value": image.reference}],
    }
    if image.digest.startswith("sha256:"):
        component["hashes"] = [{"alg": "SHA-256", "content": image.digest.removeprefix("sha256:")}]
    return component


def _license(name: str) -> dict[str, object]:
    known = {identifier.lower(): identifier for identifier in _SPDX}.get(name.lower())
    return {"license": {"id": known} if known else {"name": name or "unknown"}}
