"""One file that runs: writes plan, weights, start files and their provenance into a signed bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal, TypedDict

import edgepack
from edgepack import runtimes, schemes, serde
from edgepack.artifact import Artifact, Checkpoint
from edgepack.bundle import oci, sign
from edgepack.bundle.provenance import provenance
from edgepack.bundle.render import image_for, launch, readers, render
from edgepack.bundle.sbom import sbom
from edgepack.errors import BadInput, CheckFailed, MissingTool, NoSpace, NotFound, Untrusted
from edgepack.evaluation import Quality
from edgepack.plan import Plan
from edgepack.progress import Progress, Silent
from edgepack.units import Bytes
from edgepack.workspace import is_full, require_space, sha256_file, whole_dir

if TYPE_CHECKING:
    from edgepack.device import agent

SERVER = "bin/llama-server"
QUALITY = "quality.json"
STUDENT = "distillation.json"
"""How a student was made and what it reached, as it lies in its folder (modelcard.py)."""
AGENT = Path(__file__).parents[1] / "device" / "agent.py"
APP = Path(__file__).parents[1] / "server"
"""The server of runtimes that have none of their own, and the front of those that have."""
APP_FOLDER = "edgepack_server"
"""Its name in a bundle, where it is a package of its own."""
REQUIREMENTS = "requirements.txt"
_MORE_SPACE = "free some space, or set EDGEPACK_CACHE to another disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on this disk."""

    path: Path
    manifest_digest: str
    """sha256:… of the manifest: names the bundle, and is what the signature covers."""
    bytes: Bytes
    signed: bool


def write(
    plan: Plan,
    artifact: Artifact,
    out: Path,
    *,
    checkpoint: Checkpoint,
    selftest: Mapping[str, object],
    key: Path | None = None,
    runtime: Path | None = None,
    sequence: int = 1,
    image_digest: str | None = None,
    quality: Quality | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Writes the bundle to the file ``out``; the same inputs give the same bytes.

    ``selftest``: what the model answered here, for the check on the device. ``runtime``: a static
    llama-server for the device. ``quality``: what was measured of the artifact, shown by inspect and check.
    ``sequence``: the release's number, which a device never lets fall.
    Without ``key`` the bundle is unsigned, and the caller must say so. Raises BadInput, NoSpace, Untrusted,
    and what `sign.usable_key` raises.
    """
    if sequence < 1:
        raise BadInput(f"release sequence {sequence} is below 1")
    if key is not None:
        sign.usable_key(key)
    plan, checkpoint = _portable(plan, checkpoint)
    layers = _layers(plan, artifact, checkpoint, selftest, quality, runtime, image_digest)
    image = oci.Image(
        name=_reference_name(plan),
        config=_config(plan, artifact, checkpoint, layers),
        annotations=_annotations(plan, artifact, checkpoint, layers, sequence),
        layers=layers,
    )
    total = sum(layer.bytes for layer in layers)
    with (progress or Silent()).bar("writing the bundle", total) as advance:
        written = oci.write(out, image, sign=_signer(key), on_bytes=advance)
    return Bundle(
        path=out,
        manifest_digest=f"sha256:{written.manifest_sha256}",
        bytes=Bytes(written.bytes),
        signed=key is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Who signed a bundle; verified only for a key among those that were allowed."""

    state: Literal["verified", "unenrolled", "unsigned", "unverified"]
    principal: str | None
    key: str | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedFile:
    path: str
    bytes: int
    digest: str
    """sha256:… of its bytes, which were read and are these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What a bundle says of itself, after every byte of it was verified."""

    schema_version: Literal[1] = 1
    path: str
    bytes: int
    name: str
    manifest_digest: str
    signature: Signature
    annotations: Mapping[str, str]
    quality: Quality | None
    """What was measured of the artifact; null when nothing was."""
    files: tuple[InspectedFile, ...]


class ServerDocument(TypedDict):
    """server.json of a bundle: how its server is started, for programs."""

    schema_version: Literal[1]
    runtime: str
    args: list[str]
    env: dict[str, str]


def verified(path: Path, allowed_signers: Path | None) -> tuple[agent.Bundle, Signature]:
    """Every byte of a bundle, verified by the device's own verifier: what is in it, and who signed it.

    Its state is verified only for a key in ``allowed_signers``. Raises what `inspect` raises.
    """
    from edgepack.device import agent  # here, since only readers need it and its imports take 30 ms

    for file in (path, allowed_signers):
        if file is not None and not file.is_file():
            raise NotFound(f"there is no file {file}")
    with translated(path):
        found = agent.read_bundle(str(path))
        try:
            signer = agent.verify_signature(found, str(allowed_signers) if allowed_signers else None)
            return found, Signature(
                state=signer["state"],
                principal=signer["principal"],
                key=signer["key"],
                message=signer["message"],
            )
        except agent.MissingProgram as error:
            raise MissingTool(str(error), hint="install the OpenSSH client") from error


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """The agent's own failures over the bundle ``path``, raised as edgepack's.

    The agent imports nothing of edgepack, so its exceptions are no EdgepackError: every call of it belongs
    into this block. Refused becomes Untrusted, MissingProgram MissingTool, NoSpace and a disk that fills up
    meanwhile NoSpace, and Failed, a server that does not carry the bundle, CheckFailed.
    """
    from edgepack.device import agent

    try:
        yield
    except agent.Refused as error:
        raise Untrusted(
            f"{path} is refused: {error}", hint="copy or build it again; do not run what is in it"
        ) from error
    except agent.MissingProgram as error:
        raise MissingTool(str(error), hint="edgepack toolchain install, or --server PATH") from error
    except agent.NoSpace as error:
        raise NoSpace(str(error), hint=_MORE_SPACE) from error
    except agent.Failed as error:
        raise CheckFailed(error.message, hint="edgepack check says which part is too large") from error
    except OSError as error:
        if not is_full(error):
            raise
        raise NoSpace(f"the disk is full while unpacking {path}", hint=_MORE_SPACE) from error


def inspect(path: Path, *, allowed_signers: Path | None = None) -> Inspected:
    """Verifies every byte of a bundle with the device's own verifier and says what it is.

    Raises NotFound, Untrusted for anything that is not what it must be, and MissingTool when a signature
    is demanded by ``allowed_signers`` and there is no ssh-keygen.
    """
    return described(path, *verified(path, allowed_signers))


def described(path: Path, found: agent.Bundle, signature: Signature) -> Inspected:
    """What a verified bundle is, as `inspect` tells it. Raises Untrusted, BadInput."""
    return Inspected(
        path=str(path),
        bytes=found["size"],
        name=found["name"],
        manifest_digest=found["manifest_digest"],
        signature=signature,
        annotations=found["annotations"],
        quality=quality_in(found, path),
        files=tuple(
            InspectedFile(path=file["path"], bytes=file["size"], digest=file["digest"])
            for file in found["files"]
        ),
    )


def quality_in(found: agent.Bundle, path: Path) -> Quality | None:
    """What was measured of the artifact in a verified bundle; None when nothing was. Raises Untrusted, BadInput."""
    from edgepack.device import agent

    if agent.find_file(found, QUALITY) is None:
        return None
    with translated(path):
        return serde.load(Quality, agent.read_document(found, QUALITY), source=f"{path}: {QUALITY}")


def unpack(
    path: Path, folder: Path, *, allowed_signers: Path | None = None, progress: Progress | None = None
) -> None:
    """Verifies a bundle and lays its files out in a new ``folder``, as the start files expect them.

    The folder appears whole or not at all. Raises what `inspect` raises, BadInput when the folder is there
    already, and NoSpace.
    """
    from edgepack.device import agent

    if folder.exists():
        raise BadInput(f"{folder} is there already and is not overwritten", hint="name a new folder")
    found, _ = verified(path, allowed_signers)
    total = sum(file["size"] for file in found["files"])
    require_space(folder.parent, total)
    bar = (progress or Silent()).bar("unpacking", total)
    with translated(path), whole_dir(folder) as temporary, bar as advance:
        for file in found["files"]:
            agent.extract(found, file["path"], str(temporary), advance)


def server_document(plan: Plan) -> str:
    """server.json: how the server is started, for programs; the start files spell out the same."""
    device = plan.profile
    env = runtimes.named(plan.runtime).environment(plan.settings, backend=device.backend, arch=device.arch)
    return _pretty(
        {"schema_version": 1, "runtime": plan.runtime, "args": list(launch(plan)), "env": dict(env)}
    )


def _portable(plan: Plan, checkpoint: Checkpoint) -> tuple[Plan, Checkpoint]:
    """Without this machine's paths: a local model is named by its folder alone, its hash says the rest."""
    if not checkpoint.revision.startswith("sha256:"):
        return plan, checkpoint
    name = PurePath(checkpoint.source).name
    source = PurePath(plan.model.source).name
    return replace(plan, model=replace(plan.model, source=source)), replace(checkpoint, source=name)


def _layers(
    plan: Plan,
    artifact: Artifact,
    checkpoint: Checkpoint,
    selftest: Mapping[str, object],
    quality: Quality | None,
    runtime: Path | None,
    image_digest: str | None,
) -> tuple[oci.Layer, ...]:
    """Small files by name, then the server, the weights last."""
    plan_json = serde.to_json(plan)
    rendered = render(plan, with_runtime=runtime is not None, image_digest=image_digest)
    small = [
        oci.text_layer("agent.py", "code", AGENT.read_text(encoding="utf-8")),
        oci.text_layer("server.json", "weight.config", server_document(plan)),
        oci.text_layer("plan.json", "weight.config", plan_json),
        oci.text_layer("selftest.json", "weight.config", _pretty(selftest)),
        *(oci.text_layer(name, "code", text) for name, text in rendered.items()),
        *app_layers(),
        oci.text_layer(REQUIREMENTS, "code", requirements(plan)),
    ]
    if quality is not None:
        small.append(oci.text_layer(QUALITY, "weight.config", serde.to_json(quality)))
    told = checkpoint.path / STUDENT
    if told.is_file():
        small.append(oci.text_layer(STUDENT, "doc", told.read_text(encoding="utf-8")))
    server = [] if runtime is None else [_file_layer(SERVER, "code", runtime)]
    artifacts = _artifact_layers(plan, artifact)
    weights = tuple(layer for layer in artifacts if layer.kind == "weight")
    small += [layer for layer in artifacts if layer.kind != "weight"]
    bom = sbom(
        plan,
        artifact,
        checkpoint,
        runtime=runtime,
        image=image_for(plan, image_digest),
        requirements=requirements(plan),
    )
    small += [
        oci.text_layer("sbom.cdx.json", "doc", bom),
        oci.text_layer(
            "provenance.json",
            "doc",
            provenance(plan, plan_json, artifact, checkpoint, [*small, *server, *weights]),
        ),
    ]
    return (*sorted(small, key=lambda layer: layer.filepath), *server, *weights)


def _artifact_layers(plan: Plan, artifact: Artifact) -> tuple[oci.Layer, ...]:
    """The artifact as it lies in the bundle: one file, or a folder's files by size, the largest last."""
    place = runtimes.named(plan.runtime).ARTIFACT
    if artifact.path.is_file():
        return (
            oci.Layer(
                filepath=place,
                kind="weight",
                content=artifact.path,
                sha256=artifact.sha256,
                bytes=artifact.bytes,
            ),
        )
    files = sorted(artifact.path.iterdir(), key=lambda file: (file.stat().st_size, file.name))
    return tuple(_file_layer(f"{place}/{file.name}", _kind(file), file) for file in files)


def _kind(file: Path) -> oci.Kind:
    return "weight" if file.suffix in (".safetensors", ".onnx", ".data") else "weight.config"


def app_layers() -> tuple[oci.Layer, ...]:
    """The modules of edgepack's own server, as a package that needs nothing else of edgepack."""
    return tuple(
        oci.text_layer(
            f"{APP_FOLDER}/{path.relative_to(APP).as_posix()}", "code", path.read_text(encoding="utf-8")
        )
        for path in sorted(APP.rglob("*.py"))
    )


def requirements(plan: Plan) -> str:
    """requirements.txt: what a Python on the device needs to run the plan's server, or the front of a program.

    The runtime in the plan's version; without what PyPI has no wheel of for this device. Where that is the runtime
    itself, what edgepack's server needs beside it.
    """
    runtime = runtimes.named(plan.runtime)
    package = runtime.source(plan.profile.backend).purl.rpartition("/")[2]
    missing = runtime.missing(runtimes.Machine.of(plan.profile))
    alone = not runtime.MODULES or (missing is not None and missing.package == package)
    names = ("front",) if alone else (f"{plan.runtime}-{plan.profile.backend}", plan.runtime)
    places = (APP / "requirements" / f"{name}.txt" for name in names)
    text = next(place for place in places if place.is_file()).read_text(encoding="utf-8")
    text = _pinned(text, package, f"{package}=={plan.runtime_version}")
    if missing is not None:
        text = _pinned(text, missing.package, f"# {missing.package}: not from PyPI. {missing.words}")
    return text + "".join(f"{line}\n" for line in readers(plan))


def _pinned(requirements: str, package: str, line: str) -> str:
    """The requirements with another line for this package, where they have one."""
    return re.sub(rf"^{re.escape(package)}==.*$", line, requirements, flags=re.MULTILINE)


def _file_layer(filepath: str, kind: oci.Kind, path: Path) -> oci.Layer:
    return oci.Layer(
        filepath=filepath, kind=kind, content=path, sha256=sha256_file(path), bytes=path.stat().st_size
    )


def _signer(key: Path | None) -> oci.Signer | None:
    return None if key is None else lambda digest: sign.sign(key, digest)


def _config(
    plan: Plan, artifact: Artifact, checkpoint: Checkpoint, layers: tuple[oci.Layer, ...]
) -> Mapping[str, object]:
    """The ModelPack config: https://github.com/modelpack/model-spec/blob/main/docs/config.md."""
    return {
        "descriptor": {
            "name": plan.model.id,
            "family": plan.model.architecture,
            "revision": checkpoint.revision,
            "licenses": [checkpoint.license],
        },
        "config": {
            "architecture": "transformer",
            "format": schemes.file_format(plan.scheme),
            "paramSize": _count(plan.model.parameters),
            "quantization": artifact.scheme,
        },
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{layer.sha256}" for layer in layers]},
    }


def _annotations(
    plan: Plan, artifact: Artifact, checkpoint: Checkpoint, layers: tuple[oci.Layer, ...], sequence: int
) -> Mapping[str, str]:
    facts: dict[str, object] = {
        "version": edgepack.__version__,
        "profiles": plan.profile.name,
        "architecture": plan.profile.arch,
        "runtime": plan.runtime,
        "runtime-version": plan.runtime_version,
        "scheme": artifact.scheme,
        "model": plan.model.id,
        "revision": checkpoint.revision,
        "license": checkpoint.license,
        "context": plan.settings.context,
        "slots": plan.settings.slots,
        "kv-type": plan.settings.kv_type,
        "weights-bytes": plan.memory.part("weights"),
        "kv-bytes": plan.memory.part("kv_cache"),
        "compute-bytes": plan.memory.part("compute"),
        "total-bytes": plan.memory.total,
        "required-memory-bytes": plan.memory.high,
        "required-disk-bytes": sum(layer.bytes for layer in layers),
        "release-sequence": sequence,
    }
    own = {f"org.edgepack.{name}": str(value) for name, value in facts.items()}
    return {**own, "org.opencontainers.image.ref.name": _reference_name(plan)}


def _reference_name(plan: Plan) -> str:
    """The plan's name in the characters that image references may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plan.name).strip("-.") or "model"


def _count(parameters: int) -> str:
    """Parameters as model names say them: "1.5b", "494m"."""
    for scale, letter in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if parameters >= scale:
            return f"{parameters / scale:.3g}{letter}"
    return str(parameters)


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
