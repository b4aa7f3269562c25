"""Hostile bundles and streams: flipped bits, rearranged tars, and manifests that are signed and lie."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgepack.bundle import oci, sign
from edgepack.device import agent
from tests import releases

Part = tuple[str, bytes]
"""A member of the tar: its name and content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle taken apart."""

    key: Path
    stranger: Path
    """A key that no device knows."""
    index: dict[str, Any]
    manifest: dict[str, Any]
    blobs: Mapping[str, bytes]
    """By digest in hexadecimal, in the order of the tar: the config, then the layers."""
    content: bytes
    """The whole file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Something that must change nothing: a bundle's file to install, or streams for offer and receive."""

    kind: str
    tar: bytes | None = None
    offer: bytes | None = None
    receive: bytes | None = None
    """What is sent after the offer, or after an honest one, when ``offer`` is None."""
    release: str | None = None
    """Whose files ``receive`` has, when ``offer`` is one to be taken; they are to be refused before the weights."""


def read(path: Path, key: Path, stranger: Path) -> Bundle:
    head, _ = agent.read_head(str(path))
    content = path.read_bytes()
    whole = agent.read_bundle(str(path))
    blobs = {hashlib.sha256(head.config).hexdigest(): head.config}
    for file in whole["files"]:
        blobs[file["digest"].removeprefix("sha256:")] = content[
            file["offset"] : file["offset"] + file["size"]
        ]
    return Bundle(
        key=key,
        stranger=stranger,
        index=json.loads(head.index_json),
        manifest=json.loads(head.manifest),
        blobs=blobs,
        content=content,
    )


def cases(bundle: Bundle, chance: random.Random) -> Iterator[Case]:
    """Without end; each kind of harm about as often as its weight says."""
    makers: list[tuple[int, Callable[[Bundle, random.Random], Case]]] = [
        (8, flipped), (2, rearranged), (2, cut), (4, lying), (2, lying_documents), (1, wrongly_signed),
        (3, flipped_stream), (2, hostile_stream), (3, lying_start),
    ]  # fmt: skip
    while True:
        maker = chance.choices([m for _, m in makers], [w for w, _ in makers])[0]
        yield maker(bundle, chance)


# ── damaged on the way ──


def flipped(bundle: Bundle, chance: random.Random) -> Case:
    """One to four bits anywhere, each region of the file as often as any other."""
    content = bytearray(bundle.content)
    start, size = chance.choice(regions(bundle.content))
    for _ in range(chance.randint(1, 4)):
        content[start + chance.randrange(size)] ^= 1 << chance.randrange(8)
    return Case(kind="flipped bits", tar=bytes(content) if content != bundle.content else bundle.content[:-1])


def regions(content: bytes) -> list[tuple[int, int]]:
    """Where headers, contents and padding of a tar lie: (start, size)."""
    found, at = [], 0
    while content[at : at + 1] != b"\0":
        size = int(content[at + 124 : at + 135], 8)
        found.append((at, agent.BLOCK))
        if size:
            found.append((at + agent.BLOCK, size))
        fill = -size % agent.BLOCK
        if fill:
            found.append((at + agent.BLOCK + size, fill))
        at += agent.BLOCK + size + fill
    return [*found, (at, len(content) - at)]


def cut(bundle: Bundle, chance: random.Random) -> Case:
    """Too short, too long, or with a piece of it twice."""
    content, at = bundle.content, chance.randrange(len(bundle.content))
    piece = content[at : at + chance.choice([1, 511, 512, 4096])]
    return Case(
        kind="cut or longer",
        tar=chance.choice([
            content[:at], content + piece, content[:at] + piece + content[at:],
            content[:at] + content[at + len(piece) :],
            content + bytes(agent.BLOCK), content + content,
        ]),
    )  # fmt: skip


# ── a tar that is none of ours ──


def parts(content: bytes) -> list[Part]:
    found, at = [], 0
    while content[at : at + 1] != b"\0":
        size = int(content[at + 124 : at + 135], 8)
        name = content[at : at + 100].rstrip(b"\0").decode("ascii")
        found.append((name, content[at + agent.BLOCK : at + agent.BLOCK + size]))
        at += agent.BLOCK + size + -size % agent.BLOCK
    return found


def member(
    name: bytes, content: bytes, *, kind: bytes = b"0", link: bytes = b"", size: int | None = None
) -> bytes:
    """A member as tar writes it, with any name, type and size."""
    length = b"%011o\0" % (len(content) if size is None else size)
    fields = (
        name.ljust(100, b"\0")[:100], b"0000644\0", b"0000000\0", b"0000000\0", length, b"00000000000\0",
        b"        ", kind, link.ljust(100, b"\0")[:100], b"ustar\x0000", bytes(247),
    )  # fmt: skip
    header = b"".join(fields)
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + content + bytes(-len(content) % agent.BLOCK)


def tar(members: list[Part]) -> bytes:
    return b"".join(member(name.encode(), content) for name, content in members) + bytes(2 * agent.BLOCK)


def rearranged(bundle: Bundle, chance: random.Random) -> Case:
    """Members that are missing, twice, in another order, or of another kind: links, devices, folders, paths."""
    members = parts(bundle.content)
    at = chance.randrange(len(members))
    name, content = members[at]
    evil = chance.choice([
        b"../outside", b"/tmp/outside", b"blobs/../../outside", b"blobs/sha256/../../outside", b"./oci-layout",
        b"signature.sshsig", b"index.json", b"\xff\xfe", b"x" * 100, b"", name.encode(),
    ])  # fmt: skip
    kind = chance.choice([b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"\0"])
    pieces = [member(n.encode(), c) for n, c in members]
    change = chance.randrange(6)
    if change == 0:
        del pieces[at]
    elif change == 1:
        pieces.insert(chance.randrange(len(pieces) + 1), pieces[at])
    elif change == 2:
        pieces[at] = member(evil if evil != name.encode() else b"other", content)
    elif change == 3:
        pieces.insert(
            at,
            member(evil, b"" if kind != b"x" else b"30 path=../../outside\n", kind=kind, link=b"/etc/passwd"),
        )
    elif change == 4:
        pieces[at] = member(name.encode(), content, kind=kind, link=b"../../outside")
    else:
        size = chance.choice([0, len(content) + 1, 8**11 - 1, max(0, len(content) - 1)])
        pieces[at] = member(name.encode(), content, size=size if size != len(content) else len(content) + 512)
    return Case(kind="rearranged", tar=b"".join(pieces) + bytes(2 * agent.BLOCK))


# ── signed, and lying ──


def signed(
    bundle: Bundle,
    manifest: bytes,
    blobs: Mapping[str, bytes],
    key: Path | None,
    *,
    index: bytes | None = None,
    text: bytes | None = None,
) -> Case:
    """A bundle with whatever manifest, whose hashes and signature are right; ``text``: what is signed instead of it."""
    digest = hashlib.sha256(manifest).hexdigest()
    row = {**bundle.index["manifests"][0], "digest": f"sha256:{digest}", "size": len(manifest)}
    index = oci.canonical({**bundle.index, "manifests": [row]}) if index is None else index
    signature = (
        None
        if key is None
        else sign.sign(key, hashlib.sha256(manifest if text is None else text).hexdigest())
    )
    *small, last = blobs.items()
    head: list[Part] = [("oci-layout", agent.OCI_LAYOUT), ("index.json", index)]
    frames = [releases.frame("index", index)]
    if signature is not None:
        head.append(("signature.sshsig", signature))
        frames.append(releases.frame("signature", signature))
    head += [(f"blobs/sha256/{digest}", manifest)]
    head += [(f"blobs/sha256/{name}", content) for name, content in small]
    used = sum(agent.BLOCK + len(content) + -len(content) % agent.BLOCK for _, content in head) + agent.BLOCK
    padding = bytes(-(used + agent.BLOCK) % agent.PAGE)
    plan = next(
        (
            one["digest"]
            for one in bundle.manifest["layers"]
            if one["annotations"][agent.FILEPATH] == "plan.json"
        ),
        "",
    )
    wanted = {next(iter(blobs)), plan.removeprefix("sha256:"), *(set(blobs) - set(bundle.blobs))}
    frames += [releases.frame("manifest", manifest)]
    frames += [releases.frame(f"sha256:{name}", content) for name, content in blobs.items() if name in wanted]
    return Case(
        kind="signed",
        tar=tar([*head, (".padding", padding), (f"blobs/sha256/{last[0]}", last[1])]),
        offer=b"".join(frames),
    )


PATHS = (
    "../outside", "/etc/cron.d/outside", "a/../../outside", "a//b", "./a", "a/.", "", ".", "..", "a/", "/", ".release",
    ".release/manifest.json", "a\\..\\b", "a\0b", "a\nb", "x" * 300, "a/" * 200 + "b", "\u202egpj.sh", "\ud800",
    "bin/llama-server/x", "model.gguf/x",
)  # fmt: skip
"""Names that no file of a release may have."""
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**63, 2**64, 10**30, 1.5, 1e308, "", "0", [], {}, [[]], {"a": {}}, "sha256:",
    "sha256:" + "g" * 64,
    "sha512:" + "0" * 128, "SHA256:" + "0" * 64, "../../outside", "9" * 400,
)  # fmt: skip


def lying(bundle: Bundle, chance: random.Random) -> Case:
    """A manifest with one thing wrong that a good signature covers."""
    manifest = json.loads(json.dumps(bundle.manifest))
    layers = manifest["layers"]
    layer = chance.choice(layers)
    change = chance.randrange(9)
    if change == 0:
        own = layer["annotations"][agent.FILEPATH]  # below its own name it would be alone
        layer["annotations"][agent.FILEPATH] = chance.choice(
            [p for p in PATHS if not p.startswith(f"{own}/")]
        )
    elif change == 1:
        other = chance.choice([one for one in layers if one is not layer])
        layer["annotations"][agent.FILEPATH] = other["annotations"][agent.FILEPATH] + chance.choice(
            ["", "/below", "/"]
        )
    elif change == 2:
        name = chance.choice(["size", "digest", "mediaType", "annotations"])
        layer[name] = chance.choice([value for value in VALUES if value != layer[name]])
    elif change == 3:
        name = chance.choice(sorted(manifest))
        manifest[name] = chance.choice([value for value in VALUES if value != manifest[name]])
    elif change == 4:
        manifest["layers"] = layers * chance.choice([0, 2, 400]) if chance.random() < 0.5 else layers[:1]
    elif change == 5:
        manifest["annotations"]["org.edgepack.release-sequence"] = chance.choice([
            "0", "-1", "1", "01", "1e9", "９", "", "9" * 40, " 3", "3\n", 3, None,
        ])  # fmt: skip
    elif change == 6:
        manifest["config"][chance.choice(["size", "digest", "mediaType"])] = chance.choice(VALUES)
    elif change == 7:
        manifest[chance.choice(["subject", "extra", "urls"])] = {"urls": ["http://127.0.0.1/x"]}
    else:
        layer[chance.choice(["urls", "data", "platform"])] = ["http://127.0.0.1/x"]
    raw = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode("ascii")
    return replace(signed(bundle, raw, bundle.blobs, bundle.key), kind="signed, lying manifest")


def lying_documents(bundle: Bundle, chance: random.Random) -> Case:
    """JSON that is no JSON, or that a careless reader would choke on: as manifest, as index, as the plan."""
    raw = oci.canonical(bundle.manifest)
    deep = chance.choice([40, 3000])
    odd = chance.choice([
        b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep, b'{"a":NaN}', b'{"a":1e999}', b'{"a":1,"a":2}',
        b"\xff\xfe{}", b"\xef\xbb\xbf" + raw, raw + b"\n", raw.replace(b":", b": ", 1), b"{", b"null", b"", b"9" * 5000,
        raw.replace(b'"schemaVersion":2', b'"schemaVersion":2.0'), raw[:-1] + b',"layers":[]}',
        b'"' + b"a" * 70000 + b'"',
    ])  # fmt: skip
    where = chance.choice(["manifest", "index", "plan"])
    if where == "manifest":
        return replace(signed(bundle, odd, bundle.blobs, bundle.key), kind="signed, odd manifest")
    if where == "index":
        return replace(signed(bundle, raw, bundle.blobs, bundle.key, index=odd), kind="odd index")
    if chance.random() < 0.6:
        plan = json.loads(content_of(bundle, "plan.json"))
        place = chance.choice(["profile", "memory", "budget", "runtime", "settings"])
        plan[place] = chance.choice(VALUES)
        odd = json.dumps(plan).encode()
    return replace(with_another_file(bundle, "plan.json", odd), kind="signed, odd plan")


def content_of(bundle: Bundle, name: str) -> bytes:
    layers = bundle.manifest["layers"]
    digest = next(one["digest"] for one in layers if one["annotations"][agent.FILEPATH] == name)
    return bundle.blobs[digest.removeprefix("sha256:")]


def with_another_file(bundle: Bundle, name: str, content: bytes | None) -> Case:
    """The bundle signed anew with other bytes under one of its names, or without that file."""
    manifest = json.loads(json.dumps(bundle.manifest))
    layer = next(one for one in manifest["layers"] if one["annotations"][agent.FILEPATH] == name)
    blobs = dict(bundle.blobs)
    if content is None:
        manifest["layers"].remove(layer)
    else:
        digest = hashlib.sha256(content).hexdigest()
        layer.update(digest=f"sha256:{digest}", size=len(content))
        blobs[digest] = content
    order = [one["digest"].removeprefix("sha256:") for one in (manifest["config"], *manifest["layers"])]
    blobs = {digest: blobs[digest] for digest in dict.fromkeys(order)}
    return signed(bundle, oci.canonical(manifest), blobs, bundle.key)


# ── signed, with a server.json or selftest.json that no self-test could begin with ──


def lying_start(bundle: Bundle, chance: random.Random) -> Case:
    """What says how the server is started, or what it must answer, is no such thing: shapes, sizes, names, encodings.

    All files are sent, and none may be looked at but those two: the weights come last and are to be none of the case.
    """
    name = chance.choice(["server.json", "selftest.json"])
    honest = json.loads(content_of(bundle, name))
    change = chance.randrange(4)
    content: bytes | None
    if change == 0:
        content = odd_bytes(content_of(bundle, name), chance)
    elif change == 1 and name == "server.json":
        content = None
    elif name == "server.json":
        content = json.dumps(lying_server(honest, chance)).encode()
    else:
        content = json.dumps(lying_answers(honest, chance)).encode()
    case = with_another_file(bundle, name, content)
    assert case.tar is not None
    members = [part for part in parts(case.tar) if part[0] != ".padding"]
    _, (_, index), (_, signature), (manifest, described), config, *layers = members
    plan = content_of(bundle, "plan.json")
    heads = [
        ("index", index),
        ("signature", signature),
        ("manifest", described),
        (digest_of(config[1]), config[1]),
    ]
    frames = [releases.frame(name, content) for name, content in (*heads, (digest_of(plan), plan))]
    sent = [releases.frame(digest_of(one), one) for _, one in layers if one != plan]
    return replace(
        case, kind=f"signed, odd {name}", offer=b"".join(frames), receive=b"".join(sent),
        release=manifest.removeprefix("blobs/sha256/"),
    )  # fmt: skip


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def odd_bytes(raw: bytes, chance: random.Random) -> bytes:
    """No JSON, or JSON that a careless reader would choke on; of another encoding, or too much of it."""
    deep = chance.choice([40, 3000])
    text = raw.decode()
    return chance.choice([
        b"", b"null", b"7", b'"text"', b"[]", b"{", raw[:-3], raw + b"}", raw + raw, b"\xff" + raw,
        b"\xef\xbb\xbf" + raw, text.encode("utf-16"), text.encode("utf-32"), b"\0" + raw, raw.replace(b'"', b"'"),
        b"[" * deep + b"]" * deep, b'{"args":' * deep + b"1" + b"}" * deep,
        raw.replace(b'"schema_version": 1', b'"schema_version": NaN'),
        raw.replace(b'"schema_version": 1', b'"schema_version": 1e999'),
        raw.replace(b'"schema_version": 1', b'"schema_version": 1, "schema_version": 1'),
        raw.replace(b'"schema_version": 1', b'"schema_version": 1, "more": ' + b"9" * 5000),
        raw.replace(b'"schema_version": 1', b'"schema_version": 1, "more": "\\ud800"'),
        raw + b" " * agent.JSON_LIMIT,
    ])  # fmt: skip


def lying_server(document: dict[str, Any], chance: random.Random) -> object:
    """server.json with one thing in it that no bundle may say."""
    args = document["args"]
    place = chance.choice(
        ["runtime", "args", "env", "schema_version", "word", "flag", "flag", "count", "variable"]
    )
    if place in ("runtime", "args", "env", "schema_version"):
        fine = {"runtime": (), "args": (), "env": ({},), "schema_version": (1,)}[place]
        odd = [
            value for value in (*VALUES, "ollama", "llama.cpp\n", "../llama.cpp") if not_one_of(value, fine)
        ]
        return {**document, place: chance.choice(odd)}
    if place == "word":
        at = chance.randrange(len(args) + 1)
        word = chance.choice([value for value in VALUES if not isinstance(value, str) or len(value) > 200])
        return {**document, "args": [*args[:at], word, *args[at:]]}
    if place == "flag":
        words = chance.choice([
            ["--model", "/etc/passwd"], ["-m", "../../outside"], ["--log-file", "/tmp/outside"], ["--host", "0.0.0.0"],
            ["--api-key", "x"], ["--slot-save-path", "/etc/cron.d/outside"], ["--path", "/"], ["--rpc", "10.0.0.1:1"],
            ["--metrics\n--host=0.0.0.0"], ["--metrics\0"], ["--metrics "], ["--alias", "../../outside"], ["$(reboot)"],
            ["--alias", "a\nb"], ["--alias", "a\0b"], ["--alias", "/tmp/outside"], ["--device", "$(reboot)"], ["--"],
            ["--threads", "1;reboot"], ["--threads", "1\n"], ["--threads", "9" * 30], ["--threads", "９"], [""], ["-"],
            ["--ctx-size"], ["--lora", "outside"], ["--chat-template-file", "/etc/passwd"], ["--mmproj", "x.gguf"],
        ])  # fmt: skip
        at = chance.choice([0, len(args)])
        return {**document, "args": [*args[:at], *words, *args[at:]]}
    if place == "count":
        flag = chance.choice(["--ctx-size", "--parallel"])
        at = args.index(flag)
        values: list[list[Any]] = [
            ["0"], ["-1"], ["1e3"], ["0x200"], ["many"], ["9" * 9], ["9" * 18], ["9" * 40], [""], [" 1"], [512],
            ["1", "1"],
        ]  # fmt: skip
        given = [[flag, *value] for value in values] + [[]]
        return {**document, "args": [*args[:at], *chance.choice(given), *args[at + 2 :]]}
    name, value = chance.choice([
        ("LD_PRELOAD", "x.so"), ("LD_LIBRARY_PATH", "/tmp"), ("PATH", "/tmp"), ("GGML_BACKEND_PATH", "x"), ("", "x"),
        ("LLAMA_ARG_HOST", "0.0.0.0"), ("GGML_X", "/tmp/outside"), ("GGML_X", "a\nb"), ("GGML_X", "a\0b"),
        ("GGML_X", 7), ("GGML_X=Y", "x"), ("GGML_X\0", "x"), ("GGML_X\n", "x"), ("GGML_X", None), ("GGML_X", ["x"]),
        ("PYTHONPATH", "x"),
    ])  # fmt: skip
    return {**document, "env": {name: value}}


def lying_answers(document: dict[str, Any], chance: random.Random) -> object:
    """selftest.json with one thing in it that no answer could be held against."""
    made = json.loads(json.dumps(document))
    probe, decode = made["probes"][0], made["decode"]
    place = chance.choice(
        ["schema_version", "probes", "decode", "probe", "prompt", "top", "choice", "tokens", "missing"]
    )
    fine: tuple[Any, ...] = {
        "schema_version": (1,),
        "probes": ([],),
        "prompt": ("0", "sha256:"),
        "choice": (),
    }.get(place, ())
    odd = [value for value in (*VALUES, float("nan"), "x" * 100_000) if not_one_of(value, fine)]
    value = chance.choice(odd)
    if place in ("schema_version", "probes", "decode"):
        made[place] = value
    elif place == "probe":
        made["probes"].append(value)
    elif place == "prompt":
        value = chance.choice(
            [one for one in odd if not isinstance(one, str) or not 1 <= len(one) <= 1 << 16]
        )
        chance.choice([probe, decode])["prompt"] = value
    elif place == "top":
        probe["top"] = chance.choice([value, [[1, -1.0]] * 1000])
    elif place == "choice":
        probe["top"][0] = chance.choice(
            [value, [7], [7, value if not in_range(value) else "x"], [-1, -0.5], [7, -1e9], [7, 1.5]]
        )
    elif place == "tokens":
        decode["tokens"] = chance.choice([value, [value] if not is_token(value) else [], [7] * 100_000])
    else:
        holder, name = chance.choice(
            [(made, "probes"), (made, "decode"), (probe, "top"), (probe, "prompt"), (decode, "tokens")]
        )
        del holder[name]
    return made


def not_one_of(value: object, fine: tuple[object, ...]) -> bool:
    return not any(type(value) is type(one) and value == one for one in fine)


def in_range(value: object) -> bool:
    """Whether it can be a log-probability."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e4 <= value <= 0.01


def is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def wrongly_signed(bundle: Bundle, chance: random.Random) -> Case:
    """Right in all but the signature: a stranger's, that of another text, none, or of an older release."""
    manifest = json.loads(json.dumps(bundle.manifest))
    manifest["annotations"]["org.edgepack.release-sequence"] = "7"
    raw = oci.canonical(manifest)
    which = chance.randrange(4)
    if which == 0:
        return replace(signed(bundle, raw, bundle.blobs, bundle.stranger), kind="a stranger's signature")
    if which == 1:
        manifest["annotations"]["org.edgepack.release-sequence"] = "1"
        return replace(signed(bundle, oci.canonical(manifest), bundle.blobs, bundle.key), kind="downgrade")
    if which == 2:
        return replace(signed(bundle, raw, bundle.blobs, None), kind="unsigned")
    other = signed(bundle, raw, bundle.blobs, bundle.key, text=chance.randbytes(9))
    return replace(other, kind="another text's signature")


# ── streams, as a workstation or somebody else sends them ──


def offered(bundle: Bundle) -> list[bytes]:
    """The frames of an honest offer."""
    named = dict(parts(bundle.content))
    raw = oci.canonical(bundle.manifest)
    config = bundle.manifest["config"]["digest"]
    plan = next(
        one["digest"]
        for one in bundle.manifest["layers"]
        if one["annotations"][agent.FILEPATH] == "plan.json"
    )
    blobs = [(name, bundle.blobs[name.removeprefix("sha256:")]) for name in (config, plan)]
    heads = [("index", named["index.json"]), ("signature", named["signature.sshsig"]), ("manifest", raw)]
    return [releases.frame(name, content) for name, content in (*heads, *blobs)]


def flipped_stream(bundle: Bundle, chance: random.Random) -> Case:
    """Bits of an offer, or of the files after an honest one."""
    after = chance.random() < 0.5
    sent = [releases.frame(f"sha256:{name}", content) for name, content in bundle.blobs.items()]
    stream = bytearray(b"".join(sent if after else offered(bundle)))
    for _ in range(chance.randint(1, 3)):
        stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
    return Case(
        kind="flipped stream",
        offer=None if after else bytes(stream),
        receive=bytes(stream) if after else None,
    )


def hostile_stream(bundle: Bundle, chance: random.Random) -> Case:
    """Frames that say what they should not: names, offsets, sizes, deflated content, no end."""
    frames = offered(bundle)
    name, content = chance.choice([*bundle.blobs.items()])
    head: dict[str, Any] = {"name": f"sha256:{name}", "offset": 0, "bytes": len(content)}
    body, change = content, chance.randrange(5)
    if change == 0:
        head[chance.choice([*head, "extra"])] = chance.choice(VALUES)
    elif change == 1:
        head["name"] = chance.choice(
            [*PATHS, "index", "signature", "sha256:../../outside", "sha256:" + "0" * 64]
        )
    elif change == 2:
        packed = zlib.compress(
            chance.choice([content, content + b"more", content[:-1], bytes(64 << 20), b""])
        )
        body = packed + chance.choice([b"", b"tail"])
        head["zlib"] = chance.choice([len(body), len(packed), 0, -1, True, 1.5, 2**40, None, "9"])
    elif change == 3:
        head["offset"] = chance.choice([1, len(content), len(content) + 1, 2**40, 2**63])
    line = json.dumps(head).encode("ascii", "backslashreplace")
    if change == 4:
        line = chance.choice(
            [b"", b"{", b"[]", b"9" * 100000, b"\xff", b"{}" * 50, line + b" " * 100000, b'{"a":' * 3000]
        )
    frame = line + chance.choice([b"\n", b"\n", b"\n", b"\r\n", b""]) + body
    if chance.random() < 0.5:
        return Case(kind="hostile frame", receive=frame)
    at = chance.randrange(len(frames) + 1)
    return Case(kind="hostile frame", offer=b"".join([*frames[:at], frame, *frames[at:]]))
