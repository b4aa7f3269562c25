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
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
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
MIB = 1 << 20


class Refused(Exception):
    """The bundle is not byte for byte what its manifest says, or not signed as demanded."""


class MissingProgram(Exception):
    """A program this needs is not on the device."""


class NoSpace(Exception):
    """The disk cannot hold what must be written."""


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
    """A verified bundle; ``offset`` of each file is where its bytes start inside the tar."""

    path: str
    size: int
    name: str
    manifest_digest: str
    annotations: Dict[str, str]
    config: Dict[str, Any]
    files: List[File]
    signature: Optional[bytes]


def read_bundle(path: str, on_bytes: Callable[[int], None] = lambda _: None) -> Bundle:
    """Verifies every byte of a bundle and says where its files are; constant memory, one pass.

    Each header is recomputed and compared, each blob hashed, the set of blobs is exactly the manifest's, and
    all padding is zero, so that no byte can differ unnoticed. Raises Refused with entry and offset, and
    OSError when the file cannot be read.
    """
    if not os.path.isfile(path):
        raise Refused("%s is not a file" % path)
    with open(path, "rb", buffering=0) as stream:
        tar = _Tar(stream, os.fstat(stream.fileno()).st_size, on_bytes)
        bundle = _read_layout(tar)
        with contextlib.suppress(OSError, AttributeError):  # only a hint to free the page cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    bundle["path"] = path
    return bundle


def _read_layout(tar: _Tar) -> Bundle:
    if tar.small("oci-layout") != OCI_LAYOUT:
        raise Refused("oci-layout (offset %d) does not say image layout 1.0.0" % tar.data_start)
    index_bytes = tar.small("index.json")
    index = canonical_json(index_bytes, "index.json")
    signature = None
    if tar.peek() == "signature.sshsig":
        signature = tar.small("signature.sshsig")
        _canonical_armor(signature)
    manifest_name = tar.peek()
    manifest_bytes = tar.blob(manifest_name, limit=MANIFEST_LIMIT)
    manifest = canonical_json(manifest_bytes, "manifest")
    config_descriptor, layers, annotations = _manifest_parts(manifest)
    name = annotations.get(REF_NAME, "")
    _same_index(index, manifest_name, manifest_bytes, name)

    offsets = {manifest_name: tar.data_start}
    config_name = _blob_name(config_descriptor)
    config = canonical_json(
        tar.blob(config_name, limit=MANIFEST_LIMIT, size=config_descriptor["size"]), "config"
    )
    offsets[config_name] = tar.data_start
    if not isinstance(config, dict):
        raise Refused("config is not a JSON object")
    for layer in layers[:-1]:
        blob = _blob_name(layer)
        if blob not in offsets:
            tar.stream_blob(blob, layer["size"])
            offsets[blob] = tar.data_start
    tar.padding()
    weights = _blob_name(layers[-1])
    if weights in offsets:
        raise Refused("the weights are the same blob as a smaller file")
    tar.stream_blob(weights, layers[-1]["size"])
    offsets[weights] = tar.data_start
    if tar.data_start % PAGE:
        raise Refused("the weights start at offset %d, not at a multiple of %d" % (tar.data_start, PAGE))
    tar.end()
    files: List[File] = [
        {
            "path": layer["annotations"][FILEPATH],
            "digest": layer["digest"],
            "size": layer["size"],
            "offset": offsets[_blob_name(layer)],
            "media_type": layer["mediaType"],
        }
        for layer in layers
    ]
    return {
        "path": "",
        "size": tar.size,
        "name": name,
        "manifest_digest": "sha256:" + manifest_name.rsplit("/", 1)[1],
        "annotations": annotations,
        "config": config,
        "files": files,
        "signature": signature,
    }


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

    def stream_blob(self, name: str, size: int) -> None:
        self._open(name, size)
        digest = hashlib.sha256()
        left = size
        while left:
            piece = self._exactly(min(PIECE, left), name)
            digest.update(piece)
            left -= len(piece)
            self._on_bytes(len(piece))
        if digest.hexdigest() != name[-64:]:
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
    return float(text)


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
    if [layer["mediaType"] == WEIGHTS_TYPE for layer in layers] != [False] * (len(layers) - 1) + [True]:
        raise Refused("the weights are not exactly the last layer")
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


def _same_index(index: Any, manifest_name: str, manifest: bytes, name: str) -> None:
    expected = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            {
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "digest": "sha256:" + manifest_name.rsplit("/", 1)[1],
                "size": len(manifest),
                "annotations": {REF_NAME: name},
            }
        ],
    }
    if index != expected:
        raise Refused("index.json does not describe this manifest (digest, size and name %r)" % _shown(name))


def _blob_name(descriptor: Dict[str, Any]) -> str:
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
    with open(bundle["path"], "rb") as stream:
        stream.seek(file["offset"])
        content = stream.read(file["size"])
    if "sha256:" + hashlib.sha256(content).hexdigest() != file["digest"]:
        raise Refused("%s changed after it was verified" % path)
    return content


def read_document(bundle: Bundle, path: str) -> Dict[str, Any]:
    """A JSON object of a verified bundle. Raises Refused."""
    value = parse_json(read_file(bundle, path), path)
    if not isinstance(value, dict):
        raise Refused("%s is not a JSON object" % path)
    return value


def extract(bundle: Bundle, path: str, folder: str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Copies one file out of a verified bundle, hashed as it is read; returns where it is.

    A file that is already there with the right bytes is kept, so that a second check copies nothing. Raises
    NoSpace before writing, and Refused when the bundle changed meanwhile.
    """
    file = find_file(bundle, path)
    if file is None:
        raise Refused("the bundle has no %s" % path)
    target = os.path.join(folder, *path.split("/"))
    mode = 0o755 if path == SERVER else 0o644
    there = os.path.isfile(target) and os.path.getsize(target) == file["size"]
    if there and _sha256(target) == file["digest"]:
        os.chmod(target, mode)
        return target
    os.makedirs(os.path.dirname(target), exist_ok=True)
    _require_space(os.path.dirname(target), file["size"])
    part = target + ".part"
    try:
        with open(bundle["path"], "rb") as source, _new_file(part) as out:
            source.seek(file["offset"])
            digest = hashlib.sha256()
            left = file["size"]
            while left:
                piece = source.read(min(PIECE, left))
                if not piece:
                    raise Refused("%s ends too early; it changed after it was verified" % bundle["path"])
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
    rows.append(_row("memory", "%d to %d bytes" % (low, high), "%s bytes" % total, holds))
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
        rows.append(_row("L4T", " or ".join(l4t), str(machine["l4t"]), known))
    return rows


def _row(fact: str, expected: str, measured: str, holds: Optional[bool]) -> Dict[str, str]:
    status = "unknown" if holds is None else "pass" if holds else "fail"
    return {"fact": fact, "status": status, "expected": expected, "measured": measured}


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
    return {
        "memory_needed": host,
        "memory_available": available,
        "device_memory_needed": None if unified else sum(p["high"] for p in parts if p["place"] == "device"),
        "disk_needed": sum(f["size"] for f in bundle["files"] if f["path"] in (WEIGHTS, SERVER)),
        "disk_free": shutil.disk_usage(folder).free,
    }


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
def memory_limit(size: Optional[int], *, cgroup: bool = True, threads: int = 8) -> Iterator[Limit]:
    """A cgroup for the server, limited to ``size`` bytes; without a writable one, RLIMIT_AS (if ``size``).

    ``threads`` of the server, whose stacks take address space but hardly any memory.
    """
    made = _make_cgroup(size) if cgroup else None
    if made is None and size is None:
        yield Limit(None, "none", None)
        return
    if made is None:
        yield Limit(size, "rlimit-as", None, (size or 0) + ADDRESS_SPACE + threads * THREAD_STACK)
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
            if left_over.startswith("edgepack-check-"):  # of a killed check; one in use cannot be removed
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
    own: Dict[str, str] = {}
    for line in (_read("/proc/self/cgroup") or "").splitlines():
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
        mine = os.path.normpath(os.path.join(mount, inside))
        for folder in dict.fromkeys((mine, os.path.dirname(mine), mount)):
            if folder.startswith(mount) and os.access(folder, os.W_OK):
                yield mechanism, folder


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

SWITCHES = frozenset(
    "--repack -nr --no-repack --kv-unified -kvu --no-kv-unified -no-kvu --slots --no-slots --metrics --no-ui "
    "--no-webui --offline --jinja --no-jinja --warmup --no-warmup --no-host --context-shift "
    "--no-context-shift --cache-prompt --no-cache-prompt --cont-batching -cb --kv-offload --swa-full --no-op-offload "
    "--no-mmproj --perf --no-perf --no-kv-offload "
    "--no-cache-idle-slots --no-cont-batching -nocb".split()
)
OPTIONS = frozenset(
    "-c --ctx-size -np --parallel -b --batch-size -ub --ubatch-size -fa --flash-attn -ctk --cache-type-k "
    "-ctv --cache-type-v -cram --cache-ram -fit --fit -lm --load-mode -ngl --gpu-layers --n-gpu-layers "
    "-ctxcp --ctx-checkpoints --swa-checkpoints -t --threads -tb --threads-batch --threads-http -to "
    "--timeout --cache-reuse --poll --poll-batch --prio -sm --split-mode -mg --main-gpu -dev --device "
    "--lazy-mode -lzm -n --predict --alias -a".split()
)
"""Every flag a bundle may start its server with: those that bound memory and time, none that names a file."""
THREAD_FLAGS = ("-t", "--threads", "-tb", "--threads-batch")
ENVIRONMENT = re.compile(r"^(?:GGML|CUDA|OMP|MALLOC)_[A-Z0-9_]+\Z")

OUT_OF_MEMORY = (
    "unable to allocate",
    "failed to allocate",
    "Cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "NvMapMemAlloc",
    "failed to fit params",
)


def server_arguments(document: Dict[str, Any], load_mode: Optional[str]) -> Tuple[List[str], Dict[str, str]]:
    """Flags and environment from the bundle's server.json, each on the list above. Raises Refused.

    More threads than this machine has cores become as many as it has: llama.cpp's threads wait for each other
    in a busy loop, and one without a core of its own stops all (6 on 2 cores: a hundred times slower).
    """
    args, environment = document.get("args"), document.get("env", {})
    if not isinstance(args, list) or not isinstance(environment, dict):
        raise Refused("server.json has no list args or no object env")
    expect_value = False
    for word in args:
        if not isinstance(word, str) or len(word) > 200:
            raise Refused("server.json holds an argument that is not a short text")
        if expect_value:
            if not re.match(r"^-?[A-Za-z0-9][A-Za-z0-9_.,:=+-]*\Z", word):
                raise Refused("server.json gives the value %r, which is no number or plain word" % word)
            expect_value = False
        elif word in OPTIONS:
            expect_value = True
        elif word not in SWITCHES:
            raise Refused("server.json starts the server with %r, which a bundle may not" % _shown(word))
    if expect_value:
        raise Refused("server.json ends with %s and no value" % args[-1])
    for name, value in environment.items():
        if not ENVIRONMENT.match(name) or not isinstance(value, str) or "\0" in value:
            raise Refused("server.json sets %r in the environment, which a bundle may not" % _shown(name))
    flags = list(args) if load_mode is None else with_load_mode(args, load_mode)
    return with_threads(flags, len(os.sched_getaffinity(0))), dict(environment)


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


def count_threads(args: Sequence[str]) -> int:
    """Threads a server with these flags has: those that compute and those that serve HTTP."""
    counts = {"compute": len(os.sched_getaffinity(0)), "http": 6}
    for word, value in zip(args, args[1:]):  # noqa: B905, RUF007 - pairwise needs Python 3.10
        if word in THREAD_FLAGS and value.isdigit():
            counts["compute"] = int(value)
        elif word == "--threads-http" and value.isdigit():
            counts["http"] = int(value)
    return sum(counts.values())


class Server:
    """A running llama-server: its process, its meter, and requests to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], meter: Meter, port: int, key: str, log: str, limit: Limit
    ) -> None:
        self.process = process
        self.log = log
        self.limit = limit
        self.meter = meter
        self._port = port
        self._key = key

    def get(self, path: str, timeout: float = 60) -> Any:
        status, value = self._request("GET", path, None, timeout)
        if status != 200:
            raise Failed("crashed", "run", "llama-server answers %s with status %d" % (path, status))
        return value

    def post(self, path: str, body: Dict[str, Any], stage: str) -> Any:
        try:
            status, value = self._request("POST", path, body, REQUEST_TIMEOUT)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.failure(stage, error) from None
        if status != 200:
            message = "llama-server answers %s with status %d: %s" % (path, status, value)
            raise Failed("crashed", stage, message)
        return value

    def stream(self, path: str, body: Dict[str, Any], stage: str) -> Iterator[Dict[str, Any]]:
        """Server-sent events of one request, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT)
        try:
            connection.request("POST", path, json.dumps(dict(body, stream=True)), self._headers())
            response = connection.getresponse()
            if response.status != 200:
                said = response.read(4096).decode("utf-8", "replace")
                message = "llama-server answers with status %d: %s" % (response.status, said)
                raise Failed("crashed", stage, message)
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
        began = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise self.failure("load", None)
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if self._request("GET", "/health", None, 5)[0] == 200:
                    return time.monotonic() - began
            if time.monotonic() - began > timeout:
                raise Failed("timeout", "load", "llama-server was not ready after %d s" % timeout)
            time.sleep(0.05)

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
        last = [
            line
            for line in log.splitlines()
            if re.search(r"^[\d.]+ E |^ggml_|terminate called|^qemu[-:]", line)
        ]
        detail = re.sub(r"^[\d.]+ E ", "", last[0]).strip() if last else str(error or "no message")
        if (group is not None and group["oom_kills"]) or status == -signal.SIGKILL:
            return Failed("oom-killed", stage, "the kernel killed llama-server: out of memory")
        if any(text in log for text in OUT_OF_MEMORY):
            line = next((x for x in last if any(text in x for text in OUT_OF_MEMORY)), detail)
            text = re.sub(r"^[\d.]+ E ", "", line).strip()
            return Failed("allocation-refused", stage, "llama-server was refused memory: " + text)
        if status is None:
            return Failed("timeout", stage, "llama-server no longer answers: %s" % detail)
        if stage == "load" and status > 0:
            return Failed("did-not-start", stage, "llama-server ended with status %d: %s" % (status, detail))
        how = "signal %d" % -status if status < 0 else "status %d" % status
        return Failed("crashed", stage, "llama-server ended with %s: %s" % (how, detail))

    def _request(
        self, method: str, path: str, body: Optional[Dict[str, Any]], timeout: float
    ) -> Tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers())
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")
        finally:
            connection.close()

    def _headers(self) -> Dict[str, str]:
        return {"Authorization": "Bearer " + self._key, "Content-Type": "application/json"}


REQUEST_TIMEOUT = 3600.0
"""Seconds without a byte from the server; one batch of a 7B model on a small board takes minutes."""


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
) -> Iterator[Server]:
    """Starts llama-server on a free loopback port with a key of its own; it is gone when the block ends.

    ``under``: the emulator and its flags, when the server is for another architecture. The key lies in
    ``folder`` (mode 0600) beside server.log. The server also dies with this process, however that ends
    (PR_SET_PDEATHSIG).
    """
    key = secrets.token_urlsafe(24)
    key_file = os.path.join(folder, "server.key")
    port = _free_port()
    argv = [*under, program, *args, "-m", model, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--api-key-file", key_file, "--log-verbosity", "4"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    log = os.path.join(folder, "server.log")
    arenas = {} if limit.address_space is None else {"MALLOC_ARENA_MAX": "1"}
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        libc.prctl(1, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        limit.enter()

    # A signal between the start of the child and the block that ends it would leave both behind: it waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    process = None
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(key_file)
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(key + "\n")
        with _new_file(log) as out_log:
            try:
                process = subprocess.Popen(
                    argv,
                    env=dict(inherited, **environment, **arenas),
                    stdin=subprocess.DEVNULL,
                    stdout=out_log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=in_child,
                )
            except OSError as error:
                raise MissingProgram("%s cannot be started: %s" % (argv[0], error.strerror)) from None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        server = Server(process, Meter(process, os.path.getsize(model)), port, key, log, limit)
        server.meter.start()
        try:
            yield server
        finally:
            server.meter.stop()
    finally:
        if process is not None:
            _end(process)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(key_file)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue


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


class Meter:
    """Samples a process ten times a second; all readings in bytes."""

    def __init__(self, process: subprocess.Popen[bytes], weights: int) -> None:
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
        self._process = process
        self._weights = weights
        self._stop = threading.Event()
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
        """VmHWM, RSS by kind, swap and faults of the process at this moment; empty when it is gone."""
        root = "/proc/%d/" % self._process.pid
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

    def _watch(self) -> None:
        window: List[Tuple[float, int]] = []
        while not self._stop.wait(0.1):
            reading = self.now()
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
            again = reading.get("read_bytes", 0) - (self.reads_at_run or 0)
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


def memory_facts(server: Server, gpu_before: Optional[List[Dict[str, Any]]]) -> Dict[str, Any]:
    """Peak memory of the server so far, from every source there is; bytes, None where there is none."""
    reading = server.meter.now()
    meter = server.meter
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
        "swap": reading.get("VmSwap"),
        "major_faults_load": meter.faults_at_run,
        "major_faults_run": run_faults,
        "run_seconds": None if meter.run_began is None else round(time.monotonic() - meter.run_began, 1),
        "read_bytes": reading.get("read_bytes"),
        "read_bytes_run": run_reads,
        "system_drop": drop,
        "cgroup": cgroup_facts(server.limit),
        "gpu": _gpu_memory(server.process.pid, gpu_before),
        "nvmap": _nvmap(server.process.pid),
    }


def _gpu_memory(pid: int, before: Optional[List[Dict[str, Any]]]) -> Optional[int]:
    """Bytes of this process on NVIDIA GPUs; inside a container, where pids differ, what the cards lost."""
    if before is None:
        return None
    rows = _nvidia_smi("--query-compute-apps=pid,used_memory") or []
    mine = [_mib(row[1]) for row in rows if len(row) == 2 and row[0] == str(pid)]
    known = [size for size in mine if size is not None]
    if known:
        return sum(known)
    after = _gpus() or []
    pairs = [(now["memory_used"], then["memory_used"]) for now, then in zip(after, before)]  # noqa: B905
    if not pairs or any(used is None for pair in pairs for used in pair):
        return None
    return sum(int(now) - int(then) for now, then in pairs)


def _nvmap(pid: int) -> Optional[int]:
    """Bytes a process holds through Tegra's nvmap, which no RSS counts; needs root."""
    text = _read("/sys/kernel/debug/nvmap/iovmm/clients")
    if text is None:
        return None
    sizes = re.findall(r"^\S+\s+\S+\s+%d\s+(\d+)K" % pid, text, re.M)
    return sum(int(kib) * 1024 for kib in sizes)


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
GREEDY = {"temperature": 0.0, "seed": 1, "samplers": ["temperature"], "ignore_eos": True}


def slot_facts(server: Server) -> Dict[str, Any]:
    """How many slots the server has and how many tokens each holds, by its own /props and /slots."""
    props = server.get("/props")
    per_slot = [props["default_generation_settings"]["n_ctx"]] * props["total_slots"]
    source = "/props"
    if props.get("endpoint_slots"):
        per_slot = [slot["n_ctx"] for slot in server.get("/slots")]
        source = "/slots"
    return {"slots": props["total_slots"], "tokens": per_slot, "source": source}


def text_tokens(server: Server, count: int) -> List[int]:
    """``count`` tokens of the fixed text, with whatever token the model begins texts with."""
    once = server.post("/tokenize", {"content": TEXT, "add_special": True}, "tokenize")["tokens"]
    again = server.post("/tokenize", {"content": TEXT, "add_special": False}, "tokenize")["tokens"]
    tokens = list(once)
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

    ``on_prompt(done, total, seconds)`` is told how the prompt proceeds. Raises Failed.
    """
    began = time.monotonic()
    first: Optional[float] = None
    tokens: List[int] = []
    final: Dict[str, Any] = {}
    body = dict(GREEDY, prompt=list(prompt), n_predict=predict, id_slot=slot, cache_prompt=reuse)
    for event in server.stream("/completion", dict(body, return_progress=True), stage):
        progress = event.get("prompt_progress")
        if progress is not None:
            on_prompt(progress["processed"], progress["total"], time.monotonic() - began)
        elif event.get("tokens_predicted", 0) >= 1 and not event.get("stop"):
            first = time.monotonic() - began if first is None else first
            tokens += event.get("tokens", [])
        if event.get("stop"):
            final = event
    if not final:
        raise server.failure(stage, None)
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


def _rate(count: int, milliseconds: float) -> Optional[float]:
    return round(1000 * count / milliseconds, 3) if count > 0 and milliseconds > 0 else None


SPEED_SECONDS = 15
"""About how long the speed is measured; a slow machine gets fewer tokens and runs."""


def measure_speed(server: Server, per_slot: int) -> Dict[str, Any]:
    """Prefill and decode speed on an otherwise empty slot; decode is the median of up to three runs."""
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
    prompt = text_tokens(server, target - FULL_PREDICT - 1)
    runs: List[Dict[str, Any]] = []
    for slot in range(count if full else 1):
        run = complete(
            server,
            prompt,
            predict=FULL_PREDICT,
            stage="fill",
            slot=slot,
            on_prompt=_Eta("context of slot %d" % slot),
        )
        runs.append(dict(run, slot=slot))
    together = _all_at_once(server, prompt, [run["tokens"] for run in runs]) if len(runs) > 1 else None
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


def _all_at_once(server: Server, prompt: List[int], answers: List[List[int]]) -> Optional[float]:
    """Tokens per second of all slots decoding together."""
    results: List[Any] = [None] * len(answers)

    def one(slot: int) -> None:
        try:
            results[slot] = complete(
                server, prompt + answers[slot][:8], predict=4, stage="fill", slot=slot, reuse=True
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
    asked = [(text, _top(server, text, TOP)) for text in prompts]
    probes = [{"prompt": text, "top": top} for text, top in asked if top]
    tokens, text = _greedy(server, continuation, predict)
    return {"probes": probes, "decode": {"prompt": continuation, "tokens": tokens, "text": text}}


def probe_quality(server: Server, recorded: Dict[str, Any]) -> Dict[str, Any]:
    """Asks the same again and compares: agreement of first choices, drift of log-probabilities in nats."""
    agree = ties = missing = 0
    drifts: List[float] = []
    for probe in recorded["probes"]:
        then = [(token, value) for token, value in probe["top"]]
        here = _top(server, probe["prompt"], WIDE) or [(-1, NOTHING)]
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
    tokens, text = _greedy(server, decode["prompt"], len(decode["tokens"]))
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


def _top(server: Server, prompt: str, count: int) -> List[Tuple[int, float]]:
    """The likeliest next tokens; none when the first choice is a piece of a character, which the server holds back.

    What the slot holds of the prompt before this one is not read again: probes may grow out of each other.
    """
    body = dict(GREEDY, prompt=prompt, n_predict=1, n_probs=count, cache_prompt=True, id_slot=0)
    answer = server.post("/completion", body, "quality")
    found = (answer.get("completion_probabilities") or [{"top_logprobs": []}])[0]["top_logprobs"]
    return [(entry["id"], round(entry["logprob"], 3)) for entry in found if entry["logprob"] is not None]


def _greedy(server: Server, prompt: str, predict: int) -> Tuple[List[int], str]:
    body = dict(GREEDY, prompt=prompt, n_predict=predict, return_tokens=True, cache_prompt=False, id_slot=0)
    answer = server.post("/completion", body, "quality")
    return answer["tokens"], answer["content"]


# ── the whole check ──────────────────────────────────────────────────────────────────────────────────


def check(options: argparse.Namespace) -> Dict[str, Any]:
    """Facts of one bundle on this machine. A device that does not carry it is a fact (``failure``) too.

    Raises Refused, MissingProgram and NoSpace.
    """
    bundle, facts = _verified(options)
    plan = read_document(bundle, "plan.json")
    args, environment = server_arguments(
        read_document(bundle, "server.json"),
        options.load_mode or ("none" if options.memory_limit is not None else None),
    )
    selftest = read_document(bundle, "selftest.json") if find_file(bundle, "selftest.json") else None
    facts["machine"] = machine_facts()
    facts["match"] = match_device(plan["profile"], facts["machine"])
    facts["preflight"] = preflight(bundle, plan, options.work, options.memory_limit)
    os.makedirs(options.work, exist_ok=True)
    arch = plan["profile"]["arch"]
    emulator = find_emulator(options.emulator, arch) if options.emulator is not None else None
    if emulator is not None:
        args = with_threads(args, max(1, facts["machine"]["cores"] // EMULATED_SHARE))
    runs_here = emulator is not None or arch == facts["machine"]["arch"]
    program, source = _server_program(bundle, facts["signature"], options, carried_runs=runs_here)
    say("unpacking %s" % WEIGHTS)
    model = extract(bundle, WEIGHTS, options.work)
    if options.memory_limit is not None:
        _forget_pages(model)
    facts["server"] = {"program": program, "source": source, "args": args, "environment": environment}
    facts["server"]["emulator"] = emulator.facts if emulator is not None else None
    by_group = options.limit_by == "cgroup"
    with memory_limit(options.memory_limit, cgroup=by_group, threads=count_threads(args)) as limit:
        facts["limit"] = limit_facts(limit)
        before = facts["machine"]["gpus"]
        with running_server(
            program,
            args,
            model=model,
            folder=options.work,
            environment=environment,
            limit=limit,
            under=emulator.under if emulator is not None else (),
        ) as server:
            try:
                _measure(server, facts, plan, selftest, before, options)
            except Failed as failed:
                facts["failure"] = {"kind": failed.kind, "stage": failed.stage, "message": failed.message}
                facts["memory"] = facts["memory"] or memory_facts(server, before)
        facts["log"] = parse_log(_read_log(server.log))
    return facts


def _measure(
    server: Server,
    facts: Dict[str, Any],
    plan: Dict[str, Any],
    selftest: Optional[Dict[str, Any]],
    gpu_before: Optional[List[Dict[str, Any]]],
    options: argparse.Namespace,
) -> None:
    settings = plan["settings"]
    say("starting llama-server")
    facts["server"]["load_seconds"] = round(server.wait_healthy(options.start_timeout), 3)
    facts["slots"] = slot_facts(server)
    per_slot = min(facts["slots"]["tokens"])
    complete(server, text_tokens(server, 8), predict=2, stage="warm-up")
    server.meter.loaded()
    say("speed, and a second turn with and without the KV cache")
    facts["speed"] = measure_speed(server, per_slot)
    facts["turns"] = measure_turns(server, per_slot)
    if selftest is not None and selftest["probes"]:
        say("quality against what was recorded at build")
        facts["quality"] = probe_quality(server, selftest)
    which = "every slot" if options.full else "one slot"
    say("filling the context (%d tokens, %s)" % (settings["context"], which))
    facts["fill"] = fill_context(server, facts["slots"], settings["context"], full=options.full)
    facts["memory"] = memory_facts(server, gpu_before)
    facts["server"]["build"] = server.get("/props").get("build_info")


def _verified(options: argparse.Namespace) -> Tuple[Bundle, Dict[str, Any]]:
    """The bundle and the part of the facts that every sub-command begins with."""
    say("verifying %s" % options.bundle)
    bundle = read_bundle(options.bundle)
    signature = verify_signature(bundle, options.allowed_signers)
    facts: Dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "agent": _sha256(os.path.abspath(__file__)),
        "bundle": {
            "name": bundle["name"],
            "manifest_digest": bundle["manifest_digest"],
            "bytes": bundle["size"],
            "agent": next((f["digest"] for f in bundle["files"] if f["path"] == "agent.py"), None),
            "server": next((f["digest"] for f in bundle["files"] if f["path"] == SERVER), None),
        },
        "signature": signature,
    }
    empty = ("machine", "match", "preflight", "limit", "server", "slots", "speed", "turns", "quality", "fill")
    for name in (*empty, "memory", "log", "failure"):
        facts[name] = None
    return bundle, facts


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


def _forget_pages(path: str) -> None:
    """Drops a file from the page cache, so that whoever reads it next is charged for it."""
    with open(path, "rb") as stream, contextlib.suppress(AttributeError):
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
    """A line of progress on stderr."""
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
        command.set_defaults(act=act)
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
        command.add_argument("--server", metavar="PATH", help="llama-server to run")
        command.add_argument(
            "--emulator", metavar="PATH", help="qemu-ARCH: run a server of another architecture"
        )
        command.add_argument("--run-unverified", action="store_true", help="run the bundle's llama-server")
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
