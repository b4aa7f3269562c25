"""Bundles through container registries: the signature as an artifact beside them, and the same file again.

skopeo copies a bundle as it is, but a registry keeps a manifest and its blobs, not the signature that lies beside them
in the bundle's tar, and not the tar. So the signature is pushed as a small artifact of its own, whose subject is the
bundle's manifest, and `assemble` makes of both what was pushed, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from edgepack.bundle import oci
from edgepack.errors import BadInput, NotFound, Untrusted
from edgepack.flash import Cargo
from edgepack.workspace import whole_dir

SIGNATURE_TYPE = "application/vnd.edgepack.signature.v1"
"""artifactType of the artifact, and with +sshsig the media type of its one layer."""
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"
SMALL = 4 << 20
"""Bytes of a manifest or a config, at most."""


class Emitted(TypedDict):
    schema_version: Literal[1]
    path: str


class Assembled(Emitted):
    manifest_digest: str
    bytes: int


def signature_layout(cargo: Cargo, out: Path) -> None:
    """Writes a bundle's signature as an OCI image layout into a new folder, for skopeo to push.

    Format: https://github.com/opencontainers/image-spec/blob/v1.1.0/manifest.md, guidelines for artifact usage.
    Raises BadInput for a folder that is there.
    """
    if out.exists():
        raise BadInput(f"{out} is there already and is not overwritten", hint="name a new folder")
    parts = dict(cargo.head)
    subject = {"mediaType": oci.MANIFEST_TYPE, **_described(parts["manifest"])}
    layer = {
        "mediaType": f"{SIGNATURE_TYPE}+sshsig",
        **_described(parts["signature"]),
        "annotations": {"org.opencontainers.image.title": "signature.sshsig"},
    }
    manifest = oci.canonical(
        {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST_TYPE,
            "artifactType": SIGNATURE_TYPE,
            "config": {"mediaType": EMPTY_TYPE, **_described(b"{}")},
            "layers": [layer],
            "subject": subject,
        }
    )
    entry = {"mediaType": oci.MANIFEST_TYPE, "artifactType": SIGNATURE_TYPE, **_described(manifest)}
    index = {"schemaVersion": 2, "mediaType": oci.INDEX_TYPE, "manifests": [entry]}
    with whole_dir(out) as folder:
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        (folder / "oci-layout").write_bytes(oci.OCI_LAYOUT)
        (folder / "index.json").write_bytes(oci.canonical(index))
        for content in (manifest, b"{}", parts["signature"]):
            (blobs / hashlib.sha256(content).hexdigest()).write_bytes(content)


def assemble(
    pulled: Path, signature: Path, out: Path, *, on_bytes: Callable[[int], None] = lambda _: None
) -> oci.Written:
    """The bundle again, out of two folders that `skopeo copy docker://… dir:…` filled: bundle and signature.

    Every blob is hashed on the way. Raises NotFound, BadInput, Untrusted for what the manifest does not name, NoSpace.
    """
    text = _small(pulled / "manifest.json")
    manifest = _object(text, pulled)
    try:
        config = _small(pulled / _hex(manifest["config"]["digest"]))
        layers = tuple(
            oci.Layer(
                filepath=str(one["annotations"][oci.FILEPATH]),
                kind=_kind(str(one["mediaType"])),
                content=_file(pulled / _hex(one["digest"])),
                sha256=_hex(one["digest"]),
                bytes=int(one["size"]),
            )
            for one in manifest["layers"]
        )
        annotations = {str(name): str(value) for name, value in manifest["annotations"].items()}
        name = annotations[REF_NAME]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(
            f"{pulled} holds no bundle: {error!r}", hint="skopeo copy docker://… dir:FOLDER"
        ) from error
    image = oci.Image(name=name, config=_object(config, pulled), annotations=annotations, layers=layers)
    digest = hashlib.sha256(text).hexdigest()
    if image.manifest() != text:
        raise Untrusted(f"{pulled} holds a manifest that edgepack did not write")
    signed = _signature(signature, digest)
    return oci.write(out, image, sign=lambda _: signed, on_bytes=on_bytes)


def _signature(folder: Path, subject: str) -> bytes:
    """The signature out of its artifact. Raises Untrusted when it is another bundle's."""
    manifest = _object(_small(folder / "manifest.json"), folder)
    try:
        named, layer = _hex(manifest["subject"]["digest"]), _hex(manifest["layers"][0]["digest"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder} holds no signature: {error!r}", hint="pull what `emit --signature` wrote"
        ) from error
    if named != subject:
        raise Untrusted(f"{folder} holds the signature of sha256:{named}, not of sha256:{subject}")
    content = _small(folder / layer)
    if hashlib.sha256(content).hexdigest() != layer:
        raise Untrusted(f"{folder / layer} has another sha256 than its name")
    return content


def _described(content: bytes) -> dict[str, object]:
    return {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}


def _kind(media_type: str) -> oci.Kind:
    kinds: Mapping[str, oci.Kind] = {
        f"application/vnd.cncf.model.{kind}.v1.raw": kind
        for kind in ("weight", "weight.config", "doc", "code")
    }
    return kinds[media_type]


def _hex(digest: object) -> str:
    name, _, value = str(digest).partition(":")
    if name != "sha256" or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{digest!r} is no sha256 digest")
    return value


def _object(content: bytes, source: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise BadInput(f"{source}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{source}: no JSON object")
    return value


def _file(path: Path) -> Path:
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    return path


def _small(path: Path) -> bytes:
    if _file(path).stat().st_size > SMALL:
        raise BadInput(f"{path} has more than {SMALL} bytes")
    return path.read_bytes()
