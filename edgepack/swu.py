"""A bundle as an SWUpdate image, which hawkBit and other servers hand to devices that nobody can reach.

The image carries the bundle as it is and installs nothing itself: the device's enrolled agent (device/installer.py)
takes it, and refuses it as it would over ssh. It is asked twice, before the weights come and when they are there.
Format: https://sbabic.github.io/swupdate/sw-description.html, as SWUpdate 2022.12 reads it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack import flash, shell
from edgepack.bundle.render import for_sh
from edgepack.devices import SYSTEM_ROOT
from edgepack.errors import BadInput, BuildFailed, NotFound, Untrusted
from edgepack.flash import Cargo
from edgepack.units import MIB, pad
from edgepack.workspace import require_space, whole_file

PART = 3584 * MIB
"""Bytes of a bundle in one member, at most: the sizes of a cpio archive end below 4096 MiB."""
PIECE = MIB
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./@+-]*")
_REVISION = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Swu:
    """An image on this disk."""

    path: Path
    bytes: int
    sha256: str
    version: str
    """What SWUpdate compares: the release's sequence."""
    hardware: tuple[str, ...]
    """Revisions in /etc/hwrevision that take it."""


def write(
    cargo: Cargo,
    out: Path,
    *,
    certificate: Path,
    key: Path,
    root: str = SYSTEM_ROOT,
    hardware: Sequence[str] = (),
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Swu:
    """Writes the image to ``out``, which appears whole or not at all.

    The description is signed with ``key`` as CMS without signed attributes, in which nothing names the time: an RSA
    key gives the same bytes each time, an EC key does not. ``hardware``: revisions beside the profile's name. Raises
    BadInput, NotFound, MissingTool, BuildFailed, NoSpace.
    """
    if not _PLAIN_PATH.fullmatch(root):
        raise BadInput(f"{root} has characters that a description cannot name")
    revisions = tuple(hardware) or (cargo.plan.profile.name,)
    for revision in revisions:
        if not _REVISION.fullmatch(revision):
            raise BadInput(f"{revision!r} is no hardware revision")
    parts = parts_of(cargo.path, PART)
    script = install_script(root)
    text = description(cargo, parts, script, root=root, hardware=revisions).encode("ascii")
    small = {
        "sw-description": text,
        "sw-description.sig": signed(text, certificate, key),
        "install.sh": script,
    }
    require_space(out.parent, sum(part.bytes for part in parts) + sum(map(len, small.values())))
    digest, size = hashlib.sha256(), 0
    with whole_file(out) as temporary, temporary.open("wb") as stream:
        for piece in archive(cargo.path, small, parts, on_bytes):
            stream.write(piece)
            digest.update(piece)
            size += len(piece)
    return Swu(
        path=out, bytes=size, sha256=digest.hexdigest(), version=str(cargo.sequence), hardware=revisions
    )


# ── what the device does ─────────────────────────────────────────────────────────────────────────────


def tar_at(root: str) -> str:
    """Where the bundle lies until the agent has taken it: on the store's disk, so that its bytes can be freed."""
    return f"{root}/.swupdate.tar"


def install_script(root: str) -> bytes:
    """Hands the bundle to the agent, and leaves nothing of it behind."""
    agent = f"{for_sh(f'{root}/agent.pyz')} --root {for_sh(root)}"
    tar = for_sh(tar_at(root))
    return f"""\
#!/bin/sh
# The device's own agent verifies the bundle by the signers that are enrolled here, switches, tests, and stays or goes
# back; its exit status is this update's.
trap 'rm -f {tar}' EXIT
told=$(python3 -I {agent} install --consume {tar})
status=$?
[ -z "$told" ] || printf '%s' "$told" | python3 -I -c '{_TELL}'
exit $status
""".encode("ascii")


_TELL = """\
import json, sys
told = json.load(sys.stdin)
why = told.get("reasons", [])
print("; ".join(["release " + told["release"], told["outcome"], *why]), file=sys.stderr if why else sys.stdout)"""
"""What is said on stderr reaches hawkBit as an error of the action."""


def admission(cargo: Cargo, root: str) -> str:
    """Lua that SWUpdate runs once the description is verified: the agent judges the bundle by its first pages.

    So a bundle that it will refuse (signer, sequence, device, memory, disk) is refused before its weights are fetched.
    Of the disk the whole bundle needs a place, whatever the store has of it.
    """
    pages = b"".join(flash.packed(name, content) for name, content in cargo.head)
    agent = f"{for_sh(f'{root}/agent.pyz')} --root {for_sh(root)}"
    offer = f"offer --room {cargo.path.stat().st_size}"
    return f"""\
function admit(image)
    os.remove('{tar_at(root)}')
    local told = os.tmpname()
    local agent = io.popen('base64 -d | python3 -I {agent} {offer} 2>' .. told .. ' >/dev/null', 'w')
    agent:write([[
{base64.encodebytes(pages).decode("ascii")}]])
    local taken = agent:close() == true
    for line in io.lines(told) do
        require('swupdate').error(line)
    end
    os.remove(told)
    return taken, image
end
"""


# ── the description and its signature ────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of the bundle that is a member of the archive."""

    name: str
    offset: int
    bytes: int
    sha256: str
    checksum: int
    """Sum of its bytes modulo 2³², as cpio's crc format has it."""


def parts_of(path: Path, limit: int) -> tuple[Part, ...]:
    """The bundle in members of ``limit`` bytes and less; it is read once."""
    size = path.stat().st_size
    return tuple(
        _part(path, f"bundle.tar.{number:02d}", offset, min(limit, size - offset))
        for number, offset in enumerate(range(0, size, limit))
    )


def _part(path: Path, name: str, offset: int, count: int) -> Part:
    digest, total = hashlib.sha256(), 0
    for piece in _pieces(path, offset, count):
        digest.update(piece)
        total += _sum(piece)
    return Part(name=name, offset=offset, bytes=count, sha256=digest.hexdigest(), checksum=total & 0xFFFFFFFF)


def description(
    cargo: Cargo, parts: Sequence[Part], script: bytes, *, root: str, hardware: Sequence[str]
) -> str:
    """sw-description: the first part makes the bundle's file, the others are written behind it as they come."""
    first, *others = parts
    tar = _quoted(tar_at(root))
    images = ",".join(
        f"""
        {{
            filename = "{part.name}";
            type = "raw";
            device = {tar};
            offset = "{part.offset}";
            sha256 = "{part.sha256}";
            installed-directly = true;
        }}"""
        for part in others
    )
    return f"""\
software =
{{
    version = "{cargo.sequence}";
    description = {_quoted(f"{cargo.name}, release sha256:{cargo.release}")};
    hardware-compatibility: [ {", ".join(map(_quoted, hardware))} ];
    embedded-script = {_quoted(admission(cargo, root))};
    files: (
        {{
            filename = "{first.name}";
            path = {tar};
            sha256 = "{first.sha256}";
            installed-directly = true;
            hook = "admit";
        }}
    );
    images: ({images}
    );
    scripts: (
        {{
            filename = "install.sh";
            type = "postinstall";
            sha256 = "{hashlib.sha256(script).hexdigest()}";
        }}
    );
}};
"""


def _quoted(text: str) -> str:
    """A string of libconfig, in which lines may end."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def signed(text: bytes, certificate: Path, key: Path) -> bytes:
    """A CMS signature over a description, in DER. Raises NotFound, BadInput, MissingTool, BuildFailed."""
    for file in (certificate, key):
        if not file.is_file():
            raise NotFound(
                f"there is no file {file}", hint="docs/fleet.md says how to make key and certificate"
            )
    with tempfile.TemporaryDirectory(prefix="edgepack-") as folder:
        content, signature = Path(folder) / "sw-description", Path(folder) / "signature"
        content.write_bytes(text)
        words = [
            "openssl",
            "cms",
            "-sign",
            "-binary",
            "-noattr",
            "-nosmimecap",
            "-md",
            "sha256",
            "-outform",
            "DER",
        ]
        files: list[str | Path] = ["-signer", certificate, "-inkey", key, "-in", content, "-out", signature]
        done = shell.run([*words, "-passin", "pass:", *files], check=False, timeout=60)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BuildFailed(
                f"openssl could not sign with {key} and {certificate}: {last}",
                hint="they are a PEM key without a passphrase, RSA or EC, and the certificate of just this key",
            )
        return signature.read_bytes()


# ── the archive ──────────────────────────────────────────────────────────────────────────────────────


def archive(
    bundle: Path,
    small: Mapping[str, bytes],
    parts: Sequence[Part],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[bytes]:
    """A cpio archive, "new ASCII" with checksums; nothing in it says who made it, where or when.

    Raises Untrusted for a bundle that changes meanwhile.
    """
    written = 0
    for number, (name, content) in enumerate(small.items(), 1):
        entry = (
            header(name, number, len(content), _sum(content) & 0xFFFFFFFF)
            + content
            + bytes(-len(content) % 4)
        )
        written += len(entry)
        yield entry
    for number, part in enumerate(parts, len(small) + 1):
        head = header(part.name, number, part.bytes, part.checksum)
        yield head
        digest = hashlib.sha256()
        for piece in _pieces(bundle, part.offset, part.bytes):
            digest.update(piece)
            on_bytes(len(piece))
            yield piece
        if digest.hexdigest() != part.sha256:
            raise Untrusted(f"{bundle} changed while it was packed", hint="run the command again")
        yield bytes(-part.bytes % 4)
        written += len(head) + pad(part.bytes, 4)
    trailer = header("TRAILER!!!", 0, 0, 0)
    yield trailer + bytes(-(written + len(trailer)) % 512)


def header(name: str, number: int, size: int, checksum: int) -> bytes:
    """The header of a regular file of root's, of mode 0644 and of no time (cpio(5), New ASCII Format, magic 070702)."""
    encoded = name.encode("ascii") + b"\0"
    mode = 0o100644 if number else 0
    fields = (number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(encoded), checksum)
    head = b"070702" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4)


def _pieces(path: Path, offset: int, count: int) -> Iterator[bytes]:
    """So many bytes of a file. Raises Untrusted when it has fewer."""
    with path.open("rb") as stream:
        stream.seek(offset)
        while count:
            piece = stream.read(min(PIECE, count))
            if not piece:
                raise Untrusted(f"{path} became shorter while it was packed", hint="run the command again")
            count -= len(piece)
            yield piece


def _sum(content: bytes) -> int:
    import numpy

    return int(numpy.frombuffer(content, dtype=numpy.uint8).sum(dtype=numpy.uint64))
