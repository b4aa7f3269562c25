"""Every JSON document that edgepack writes, by name: who writes it, and the schema that it obeys.

The schemas come out of the types that the documents are written from, so that neither can change alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from edgepack import (
    bundle,
    cache,
    calibrate,
    check,
    distillation,
    fit,
    flash,
    quantization,
    record,
    serde,
    swu,
    tables,
)
from edgepack import selftest as selftests
from edgepack.choice import Explanation
from edgepack.devices import Fsck, Installed
from edgepack.devices import Status as DeviceStatus
from edgepack.doctor import Report as Diagnosed
from edgepack.errors import NotFound
from edgepack.evaluation import Quality
from edgepack.fleet import FleetDocument, HostReport
from edgepack.modelcard import Report as StudentReport
from edgepack.plan import Plan
from edgepack.probe import Probed
from edgepack.profile import DeviceProfile
from edgepack.registry import Assembled, Emitted
from edgepack.report import Report
from edgepack.toolchain import Status as ToolchainStatus

VERSION: Mapping[str, object] = {"schema_version": Literal[1]}
"""What the command line puts before a value that has no version of its own."""


class Listed(TypedDict):
    name: str
    title: str
    written_by: list[str]


class ListDocument(TypedDict):
    """The schemas that `edgepack schema NAME` prints."""

    schema_version: Literal[1]
    schemas: list[Listed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A kind of JSON document."""

    name: str
    title: str
    of: type
    """A dataclass that is dumped, or a TypedDict."""
    written_by: tuple[str, ...]
    """Commands with their --json, and files."""
    also: serde.Also = field(default_factory=dict)


DOCUMENTS = (
    Document(
        name="plan",
        title="A plan: model, scheme, runtime and memory for one device",
        of=Plan,
        written_by=("plan --json", "plan -o", "build --dry-run --json", "plan.json in a bundle"),
    ),
    Document(
        name="plan-explained",
        title="A plan and why it was chosen",
        of=Plan,
        written_by=("plan --explain --json",),
        also={Plan: {"explanation": Explanation}},
    ),
    Document(name="fit", title="Does it fit?", of=fit.FitDocument, written_by=("fit --json",)),
    Document(
        name="bundle",
        title="The bundle that was built",
        of=bundle.Bundle,
        written_by=("build --json",),
        also={bundle.Bundle: VERSION},
    ),
    Document(
        name="quantize",
        title="The artifact of a scheme, and its record",
        of=quantization.Account,
        written_by=("quantize --json",),
    ),
    Document(
        name="distill",
        title="The student, and what was measured of it",
        of=distillation.Account,
        written_by=("distill --json",),
    ),
    Document(
        name="quality",
        title="What an artifact lost",
        of=Quality,
        written_by=("quality --json", "quality -o", "quality.json in a bundle"),
    ),
    Document(
        name="inspect",
        title="What is in a verified bundle",
        of=bundle.Inspected,
        written_by=("inspect --json",),
    ),
    Document(
        name="check",
        title="A bundle's run, held against its plan",
        of=check.CheckReport,
        written_by=("check --json", "check --on --json", "check -o"),
        also=check.WRITTEN,
    ),
    Document(
        name="report",
        title="What plans, bundles, checks and qualities say, put together",
        of=Report,
        written_by=("report --format json",),
    ),
    Document(
        name="doctor",
        title="Causes and cures",
        of=Diagnosed,
        written_by=("doctor --json",),
    ),
    Document(
        name="profile",
        title="A device profile, whole",
        of=DeviceProfile,
        written_by=("profiles show --json",),
        also={DeviceProfile: VERSION},
    ),
    Document(
        name="probe",
        title="This machine's profile, and where each field was read",
        of=Probed,
        written_by=("probe --json",),
        also={Probed: VERSION},
    ),
    Document(
        name="profiles",
        title="The built-in profiles",
        of=tables.ProfilesDocument,
        written_by=("profiles list --json",),
    ),
    Document(
        name="calibrate",
        title="Speed constants of a device's own",
        of=calibrate.CalibrationDocument,
        written_by=("calibrate --json",),
    ),
    Document(
        name="flash",
        title="What a flash did, or would do",
        of=flash.Flashed,
        written_by=("flash --json", "flash --dry-run --json"),
        also={**check.WRITTEN, flash.Flashed: VERSION},
    ),
    Document(
        name="flash-status",
        title="What is on a device, and what happened there",
        of=DeviceStatus,
        written_by=("flash --status --json", "flash --enroll --json"),
        also={DeviceStatus: VERSION},
    ),
    Document(
        name="flash-rollback",
        title="The release before, current again",
        of=Installed,
        written_by=("flash --rollback --json",),
        also={Installed: VERSION},
    ),
    Document(
        name="flash-fsck",
        title="What reading every byte of a device's store showed",
        of=Fsck,
        written_by=("flash --fsck --json",),
        also={Fsck: {**VERSION, "sent": int}},
    ),
    Document(
        name="flash-fleet",
        title="What came of the hosts of an inventory",
        of=FleetDocument,
        written_by=("flash --inventory --json",),
        also={**check.WRITTEN, HostReport: {"report": check.CheckReport | None}},
    ),
    Document(
        name="emit",
        title="Where a form of bundles for other tools was written",
        of=Emitted,
        written_by=("emit --ansible --json", "emit --signature --json"),
    ),
    Document(
        name="emit-swu",
        title="An SWUpdate image",
        of=swu.Swu,
        written_by=("emit --swu --json",),
        also={swu.Swu: VERSION},
    ),
    Document(
        name="emit-tar",
        title="A bundle that came back from a registry",
        of=Assembled,
        written_by=("emit --tar --json",),
    ),
    Document(
        name="toolchain",
        title="Whether llama.cpp is built, and which",
        of=ToolchainStatus,
        written_by=("toolchain status --json",),
        also={ToolchainStatus: VERSION},
    ),
    Document(name="schemas", title="These documents", of=ListDocument, written_by=("schema --json",)),
    Document(
        name="cache",
        title="What the cache holds, or what was taken out of it",
        of=cache.Account,
        written_by=("cache list --json", "cache remove --json"),
    ),
    Document(
        name="record",
        title="How an artifact was made",
        of=record.Record,
        written_by=("edgepack.json beside an artifact",),
    ),
    Document(
        name="student",
        title="How a student was made",
        of=StudentReport,
        written_by=("distillation.json in a student and in its bundle",),
    ),
    Document(
        name="server",
        title="How a bundle's server is started",
        of=bundle.ServerDocument,
        written_by=("server.json in a bundle",),
    ),
    Document(
        name="selftest",
        title="What the artifact answered on the build machine",
        of=selftests.SelftestDocument,
        written_by=("selftest.json in a bundle",),
    ),
)
"""provenance.json (in-toto), sbom.cdx.json (CycloneDX) and a bundle's manifest (OCI) have their makers' schemas."""


def named(name: str) -> Document:
    """Raises NotFound with near names."""
    known = {document.name: document for document in DOCUMENTS}
    if name not in known:
        raise NotFound(
            f"there is no schema {name!r}{serde.did_you_mean(name, known)}", hint="edgepack schema lists them"
        )
    return known[name]


def schema(document: Document) -> dict[str, object]:
    """JSON Schema 2020-12 of a document."""
    written = serde.written_schema(document.of, document.also)
    return {**written, "$id": f"urn:edgepack:schema:{document.name}:1", "title": document.title}


def listing() -> ListDocument:
    """All documents, in the order of the work."""
    return {
        "schema_version": 1,
        "schemas": [{"name": d.name, "title": d.title, "written_by": list(d.written_by)} for d in DOCUMENTS],
    }
