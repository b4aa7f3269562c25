"""How a bundle was made: an in-toto statement with a SLSA provenance predicate, without time or host.

Formats: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md and
https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import edgepack
from edgepack import runtimes, schemes
from edgepack.artifact import Artifact, Checkpoint
from edgepack.bundle.oci import Layer
from edgepack.plan import Plan

BUILDER = "urn:edgepack:builder"


def provenance(
    plan: Plan, plan_json: str, artifact: Artifact, checkpoint: Checkpoint, layers: Sequence[Layer]
) -> str:
    """The statement as JSON text: its subjects are the bundle's files, its materials what they came from.

    ``plan_json`` is plan.json as it lies in the bundle; ``layers`` are the other files of the bundle.
    """
    source = runtimes.named(plan.runtime).source(plan.profile.backend)
    materials: list[dict[str, object]] = [
        {"name": "model", "uri": checkpoint.source, "digest": _revision(checkpoint.revision)},
        {
            "name": plan.runtime,
            "uri": source.repository,
            "annotations": {"version": plan.runtime_version},
        },
    ]
    if artifact.imatrix_sha256 is not None:
        materials.append({"name": "imatrix", "digest": {"sha256": artifact.imatrix_sha256}})
    if artifact.calibration_sha256 is not None:
        materials.append({"name": "calibration", "digest": {"sha256": artifact.calibration_sha256}})
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicateType": "https://slsa.dev/provenance/v1",
        "subject": [
            {"name": layer.filepath, "digest": {"sha256": layer.sha256}}
            for layer in sorted(layers, key=lambda layer: layer.filepath)
        ],
        "predicate": {
            "buildDefinition": {
                "buildType": f"urn:edgepack:build:{schemes.file_format(plan.scheme)}:v1",
                "externalParameters": {
                    "model": plan.model.id,
                    "profile": plan.profile.name,
                    "runtime": plan.runtime,
                    "scheme": plan.scheme,
                },
                "internalParameters": {
                    "plan": {"sha256": hashlib.sha256(plan_json.encode("utf-8")).hexdigest()}
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {"edgepack": edgepack.__version__, "quantizer": artifact.tool},
                }
            },
        },
    }
    return json.dumps(statement, indent=2, sort_keys=True) + "\n"


def _revision(revision: str) -> dict[str, str]:
    algorithm, colon, value = revision.partition(":")
    return {algorithm: value} if colon else {"gitCommit": revision}
