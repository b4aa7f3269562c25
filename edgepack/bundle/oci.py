"""The bundle's container: one uncompressed tar that is an OCI image layout, byte for byte reproducible.

Layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md; the manifest and its media
types: https://github.com/modelpack/model-spec/blob/main/docs/spec.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgepack.errors import BadInput, Untrusted
from edgepack.units import pad
from edgepack.workspace import require_space, whole_file

BLOCK = 512
PAGE = 4096
"""Alignment of the weights inside the tar, so that they can be mapped or cloned in place."""
PIECE = 1 << 20

OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILEPATH = "org.cncf.model.filepath"

Signer = Callable[[str], bytes]
"""From the manifest's sha256 (hex) to the bytes of the signature file."""
Kind = Literal["weight", "weight.config", "doc", "code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One file of the bundle, stored as it is."""

    filepath: str
    """Name it gets when the bundle is unpacked."""
    kind: Kind
    content: bytes | Path
    """Small files as bytes; a big one as a path, with its digest and size already known."""
    sha256: str
    bytes: int

    @property
    def media_type(self) -> str:
        return f"application/vnd.cncf.model.{self.kind}.v1.raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What goes into the tar; ``layers`` in order, the one to be aligned to a page last."""

    name: str
    config: Mapping[str, object]
    annotations: Mapping[str, str]
    layers: tuple[Layer, ...]

    def manifest(self) -> bytes:
        """Canonical JSON of the ModelPack manifest; its sha256 is what gets signed."""
        config = canonical(self.config)
        return canonical(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "config": {
                    "mediaType": CONFIG_TYPE,
                    "digest": f"sha256:{_sha256(config)}",
                    "size": len(config),
                },
                "layers": [
                    {
                        "mediaType": layer.media_type,
                        "digest": f"sha256:{layer.sha256}",
                        "size": layer.bytes,
                        "annotations": {FILEPATH: layer.filepath},
                    }
                    for layer in self.layers
                ],
                "annotations": dict(self.annotations),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The finished tar."""

    manifest_sha256: str
    bytes: int
    """Size of the whole tar."""


def text_layer(filepath: str, kind: Kind, text: str) -> Layer:
    """A small layer out of text, as UTF-8."""
    content = text.encode("utf-8")
    return Layer(filepath=filepath, kind=kind, content=content, sha256=_sha256(content), bytes=len(content))


def canonical(value: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def write(
    out: Path,
    image: Image,
    *,
    sign: Signer | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Written:
    """Writes the tar to ``out``, which appears whole or not at all.

    Without ``sign`` the bundle is unsigned. Files are read once: streamed into the tar and hashed on the way.
    Raises Untrusted when a file is no longer what its digest says, NoSpace, and BadInput for file names that
    cannot be unpacked.
    """
    _refuse_bad_layers(image.layers)
    manifest = image.manifest()
    digest = _sha256(manifest)
    members = tuple(_members(image, manifest, sign(digest) if sign else None))
    tar_bytes = sum(BLOCK + pad(member.size, BLOCK) for member in members) + 2 * BLOCK
    require_space(out.parent, tar_bytes)
    with whole_file(out) as temporary, temporary.open("wb") as stream:
        for member in members:
            for piece in _entry(member):
                stream.write(piece)
                on_bytes(len(piece))
        stream.write(bytes(2 * BLOCK))
    return Written(manifest_sha256=digest, bytes=tar_bytes)


def tar_header(name: str, size: int) -> bytes:
    """The one ustar header that a regular file of this name and size can have in a bundle.

    Everything that could differ between two machines (owner, mode, time) is constant. Size is octal, or
    GNU base-256 from 8 GiB on, as `tar` itself does.
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100:
        raise BadInput(f"{name} is longer than the 100 bytes of a tar header")
    length = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    fields = (
        encoded.ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        length,
        b"00000000000\0",
        b"        ",
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(247),
    )
    header = b"".join(fields)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    name: str
    content: bytes | Path
    size: int
    sha256: str | None = field(default=None)
    """Expected digest of a file; None for bytes, which cannot change."""


def _members(image: Image, manifest: bytes, signature: bytes | None) -> Iterator[_Member]:
    config = canonical(image.config)
    descriptor = {
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "digest": f"sha256:{_sha256(manifest)}",
        "size": len(manifest),
        "annotations": {"org.opencontainers.image.ref.name": image.name},
    }
    index = canonical({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [descriptor]})
    head = [_bytes_member("oci-layout", OCI_LAYOUT), _bytes_member("index.json", index)]
    if signature is not None:
        head.append(_bytes_member("signature.sshsig", signature))
    head += [_blob(manifest), _blob(config)]
    head += [_layer_member(layer) for layer in image.layers[:-1]]
    unique = tuple({member.name: member for member in head}.values())
    yield from unique
    last = _layer_member(image.layers[-1])
    after_padding_header = sum(BLOCK + pad(member.size, BLOCK) for member in unique) + BLOCK
    yield _bytes_member(".padding", bytes(-(after_padding_header + BLOCK) % PAGE))
    yield last


def _bytes_member(name: str, content: bytes) -> _Member:
    return _Member(name=name, content=content, size=len(content))


def _blob(content: bytes) -> _Member:
    return _bytes_member(f"blobs/sha256/{_sha256(content)}", content)


def _layer_member(layer: Layer) -> _Member:
    return _Member(
        name=f"blobs/sha256/{layer.sha256}", content=layer.content, size=layer.bytes, sha256=layer.sha256
    )


def _entry(member: _Member) -> Iterator[bytes | memoryview]:
    yield tar_header(member.name, member.size)
    if isinstance(member.content, bytes):
        yield member.content
    else:
        yield from _verified(member.content, member)
    yield bytes(-member.size % BLOCK)


def _verified(path: Path, member: _Member) -> Iterator[memoryview]:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))
    count = 0
    with path.open("rb", buffering=0) as source:
        while (read := source.readinto(buffer)) and count <= member.size:
            digest.update(buffer[:read])
            count += read
            yield buffer[:read]
    if count != member.size or digest.hexdigest() != member.sha256:
        raise Untrusted(
            f"{path} changed while it was packed: expected sha256 {member.sha256} over {member.size} bytes",
            hint="nothing was written; run the build again",
        )


def _refuse_bad_layers(layers: Sequence[Layer]) -> None:
    names = [layer.filepath for layer in layers]
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or any(part in ("", ".", "..") for part in parts) or not name.isascii():
            raise BadInput(f"{name!r} cannot be a file name in a bundle")
    if len(layers) > 1 and layers[-1].sha256 in {layer.sha256 for layer in layers[:-1]}:
        raise BadInput(f"{names[-1]} is byte for byte another file of the bundle")
    if len(set(names)) != len(names):
        raise BadInput(f"two files of the bundle have one name: {sorted(names)}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
