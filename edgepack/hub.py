"""The only download: names a user may give for a model, turned into files on this disk with a known revision.

Files of the Hugging Face Hub go to its own cache ($HF_HOME) in its own layout: what other tools fetched is
used, and what edgepack fetched is theirs too. The transfer is plain HTTP from the standard library, because the
official client drops a half-read file when its process ends, and a model is often one file of many gigabytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from edgepack import catalog, serde
from edgepack.artifact import Checkpoint
from edgepack.errors import BadInput, MissingTool, NoSpace, NotFound, Offline, Unsupported, Untrusted
from edgepack.progress import Progress
from edgepack.units import show
from edgepack.workspace import cache_root, fsync_dir, is_full, require_space, sha256_file, write_text

SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
)
"""What a build reads besides weights. Pickled weights and code are never fetched."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_REVISION = re.compile(r"[\w.][\w./-]*\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_SHA1 = _COMMIT
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_PIECE = 1 << 20
_TRIES = 5
_TIMEOUT = 30.0
_PAUSE = 0.5
"""Seconds before the next try, times the tries so far without a byte."""
_CACHED_ABOVE = 1 << 20
"""Digests of smaller files are not worth remembering."""


def resolve(
    source: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    weights: bool = True,
    progress: Progress,
) -> Checkpoint:
    """The model that ``source`` names, on this disk.

    ``source`` is a built-in model ("demo"), a folder, a .gguf file, a config.json, a catalog id, a Hub repository
    (``org/name`` or ``org/name@revision``) or ``modelscope:org/name``. Without ``weights`` only config and
    tokenizer are fetched. A catalog model is fetched at its pinned commit unless ``revision`` says otherwise.
    Raises NotFound, Offline (with the repository and the way around), Untrusted for content that is not what
    the Hub says it is, NoSpace before a download that would not fit or when the disk fills up meanwhile, and
    Unsupported for pickled weights only.
    """
    own = catalog.built_in().get(source)
    if own is not None or (source and Path(source).exists()):
        return _local(own or Path(source), source, progress)
    if source.startswith("modelscope:"):
        return _modelscope(source, revision, offline=offline, weights=weights, progress=progress)
    name, _, asked = source.partition("@")
    known = catalog.find(name)
    repo = known.repo if known else name
    if not _REPOSITORY.match(repo) or repo.endswith((".gguf", ".json")):
        near = serde.did_you_mean(name, (model.id for model in catalog.models()))
        raise NotFound(
            f"model {source!r} is no file or folder here, no catalog name and no Hub repository{near}",
            hint="give a Hugging Face folder, a .gguf file, org/name of a Hub repository, or a catalog name",
        )
    wanted = revision or asked or (known.revision if known else None) or "main"
    if not _REVISION.match(wanted) or ".." in wanted:
        raise BadInput(f"{wanted!r} is not a revision", hint="give a commit, tag or branch of the repository")
    hub = _Hub.from_environment(os.environ, offline=offline)
    snapshot, commit = hub.snapshot(repo, wanted, weights=weights, progress=progress)
    license = known.license if known else license_in(snapshot)
    return Checkpoint(path=snapshot, source=repo, revision=commit, license=license)


def content_revision(path: Path, progress: Progress) -> str:
    """``sha256:…`` over every byte that a build reads of a local model.

    For a file its digest; for a folder the digest of "digest  name" lines in order of name. Digests of large
    files are remembered by size, time and inode, so that only the first look at a model reads it all.
    """
    if path.is_file():
        return f"sha256:{_digest(path, progress)}"
    names = sorted(p.name for p in path.iterdir() if p.is_file() and (p.name in SMALL or _is_weights(p.name)))
    rows = "".join(f"{_digest(path / name, progress)}  {name}\n" for name in names)
    return f"sha256:{hashlib.sha256(rows.encode()).hexdigest()}"


# ── local models ─────────────────────────────────────────────────────────────────────────────────────


def _local(path: Path, source: str, progress: Progress) -> Checkpoint:
    if path.is_dir() and not (path / "config.json").is_file():
        packed = sorted(path.glob("*.gguf"))
        if len(packed) != 1:
            raise BadInput(
                f"{path} has no config.json and {len(packed)} .gguf files",
                hint="give a Hugging Face folder, or the .gguf file itself",
            )
        path = packed[0]
    if path.is_file() and path.suffix not in (".gguf", ".json"):
        raise BadInput(
            f"{path} is not a model", hint="give a Hugging Face folder, a config.json or a .gguf file"
        )
    folder = path if path.is_dir() else path.parent
    known = catalog.find(source) if path in catalog.built_in().values() else None
    return Checkpoint(
        path=path.resolve(),
        source=source,
        revision=content_revision(path, progress),
        license=known.license if known else license_in(folder),
    )


def license_in(folder: Path) -> str:
    """The licence in the front matter of a model card; "unknown" without one."""
    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    head = front.group(1) if front else ""
    fields: dict[str, str] = dict(
        re.findall(r"^(license|license_name):\s*([\w.+-]+)\s*$", head, re.MULTILINE)
    )
    license = fields.get("license", "unknown")
    return fields.get("license_name", license) if license == "other" else license


def _digest(path: Path, progress: Progress) -> str:
    """Hex sha256 of a file; of a large one remembered while its size, time and inode stay."""
    facts = path.stat()
    if facts.st_size < _CACHED_ABOVE:
        return sha256_file(path)
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    note = cache_root() / "digests" / f"{key}.json"
    identity = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return str(known["sha256"])
    with progress.bar(f"hashing {path.name}", facts.st_size) as advance:
        digest = sha256_file(path, on_bytes=advance)
    settled = time.time_ns() - facts.st_mtime_ns > 2 * 10**9  # else a write in the same tick could go unseen
    if settled:
        write_text(note, json.dumps({"identity": identity, "sha256": digest}))
    return digest


# ── the Hugging Face Hub ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remote:
    """A file of a repository, as the Hub describes it."""

    name: str
    size: int
    digest: str
    """sha256 of its content when it is kept as LFS, else git's sha1 of it as a blob."""


class _Answer(Protocol):
    """What this module needs of an HTTP response."""

    status: int
    headers: Mapping[str, str]

    def read(self, amount: int = ..., /) -> bytes: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hub:
    endpoint: str
    cache: Path
    token: str | None
    offline: bool

    @staticmethod
    def from_environment(environ: Mapping[str, str], *, offline: bool) -> _Hub:
        """As huggingface_hub reads it: HF_ENDPOINT, HF_HUB_CACHE, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE."""
        default = Path(environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
        home = Path(environ.get("HF_HOME", default)).expanduser()
        token = environ.get("HF_TOKEN", "").strip()
        saved = Path(environ.get("HF_TOKEN_PATH", home / "token")).expanduser()
        if not token and saved.is_file():
            token = saved.read_text(encoding="utf-8").strip()
        return _Hub(
            endpoint=environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
            cache=Path(environ.get("HF_HUB_CACHE", home / "hub")).expanduser(),
            token=token or None,
            offline=offline or environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        )

    def snapshot(self, repo: str, revision: str, *, weights: bool, progress: Progress) -> tuple[Path, str]:
        """The folder with the repository's files at a revision, and that revision's commit."""
        storage = self.cache / f"models--{repo.replace('/', '--')}"
        commit = revision if _COMMIT.match(revision) else None
        if commit is None and self.offline:
            ref = storage / "refs" / revision
            commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else None
        if commit is not None and _is_whole(storage / "snapshots" / commit, weights=weights):
            _verify(storage / "snapshots" / commit, repo, weights=weights, progress=progress)
            return storage / "snapshots" / commit, commit
        if self.offline:
            raise Offline(
                f"{repo} at revision {revision} is not on this disk, and the network is not to be used",
                hint=_way_around(repo, revision),
            )
        commit, files = self._files(repo, revision)
        chosen = [f for f in files if f.name in SMALL]
        folder = storage / "snapshots" / commit
        progress.step(f"fetching {repo} at {commit[:12]} from {self.endpoint}")
        if revision != commit:
            write_text(storage / "refs" / revision, commit)
        self._fetch(repo, commit, storage, chosen, progress)
        if not (folder / "config.json").is_file():
            raise Unsupported(
                f"{repo} has no config.json", hint="give a repository of the transformers format"
            )
        if weights:
            self._fetch(repo, commit, storage, _weights_of(repo, folder, files), progress)
        return folder, commit

    def _files(self, repo: str, revision: str) -> tuple[str, tuple[_Remote, ...]]:
        """The commit behind a revision and its files at the root."""
        from http.client import HTTPException
        from urllib.parse import quote

        url = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            answer = self._open(url, repo, revision)
            try:
                raw = answer.read()
            finally:
                answer.close()
            return _listing(json.loads(raw))
        except (OSError, HTTPException) as error:
            raise Offline(
                f"{self.endpoint} could not be reached for {repo} at revision {revision}: {_said(error)}"
                f"{_near(repo)}",
                hint=_way_around(repo, revision),
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Offline(
                f"{self.endpoint} answered something else than a model's description",
                hint=f"check HF_ENDPOINT; or {_way_around(repo, revision)}",
            ) from error

    def _fetch(
        self, repo: str, commit: str, storage: Path, files: Iterable[_Remote], progress: Progress
    ) -> None:
        """Brings files into the cache: content under blobs/, by its digest, and a link in the snapshot."""
        blobs, snapshot = storage / "blobs", storage / "snapshots" / commit
        blobs.mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True, exist_ok=True)
        with (storage / ".edgepack.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second edgepack waits here and then finds the files
            wanted = sorted(files, key=lambda file: file.name)
            missing = [f for f in wanted if not _holds(blobs / f.digest, f.size)]
            require_space(blobs, sum(f.size - _begun(blobs, f) for f in missing))
            for file in wanted:
                blob = blobs / file.digest
                if file in missing:
                    self._download(repo, commit, file, blob, progress)
                else:
                    _check(blob, file.name, repo, progress)
                _link(snapshot / file.name, Path("..") / ".." / "blobs" / file.digest)
        fsync_dir(snapshot)

    def _download(self, repo: str, commit: str, file: _Remote, blob: Path, progress: Progress) -> None:
        """One file, resumed where an earlier run stopped, and accepted only with the right digest."""
        partial = _partial(blob)
        try:
            with partial.open("a+b") as stream, progress.bar(file.name, file.size) as advance:
                found = self._transfer(repo, commit, file, stream, advance)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            if not is_full(error):
                raise
            raise NoSpace(
                f"the disk is full at {show(_begun(blob.parent, file))} of {show(file.size)} of {file.name} of {repo}",
                hint=f"free some space at {blob.parent}, or set HF_HOME to another disk; the same command resumes",
            ) from error
        if found != file.digest:
            partial.unlink()
            raise _corrupted(file.name, repo, found, file.digest)
        partial.replace(blob)
        fsync_dir(blob.parent)

    def _transfer(
        self, repo: str, commit: str, file: _Remote, stream: BinaryIO, advance: Callable[[int], None]
    ) -> str:
        """Appends the rest of a file to ``stream`` and returns the digest of it all."""
        digest = _hasher(file.digest, file.size)
        if stream.seek(0, os.SEEK_END) > file.size:
            stream.truncate(0)
        stream.seek(0)
        while piece := stream.read(_PIECE):
            digest.update(piece)
            advance(len(piece))
        failures = 0
        while (at := stream.tell()) < file.size:
            reason = self._read_on(repo, commit, file, stream, digest, advance)
            failures = 0 if stream.tell() > at else failures + 1
            if failures == _TRIES:
                raise Offline(
                    f"{file.name} of {repo} stopped at {show(at)} of {show(file.size)}: {reason}",
                    hint="the same command resumes there",
                )
            if failures:
                time.sleep(_PAUSE * failures)
        return digest.hexdigest()

    def _read_on(
        self,
        repo: str,
        commit: str,
        file: _Remote,
        stream: BinaryIO,
        digest: hashlib._Hash,
        advance: Callable[[int], None],
    ) -> str:
        """One connection's worth of a file, from where ``stream`` ends; returns why the network stopped.

        Raises OSError when ``stream`` cannot be written: more tries would not help.
        """
        from http.client import HTTPException
        from urllib.parse import quote

        at = stream.tell()
        try:
            answer = self._open(
                f"{self.endpoint}/{repo}/resolve/{commit}/{quote(file.name)}", repo, commit, at
            )
        except (OSError, HTTPException) as error:
            return _said(error)
        with closing(answer):
            skip = 0 if answer.status == 206 else at  # a server without ranges starts over
            while left := file.size - stream.tell():
                try:
                    piece = answer.read(min(_PIECE, skip or left))
                except (OSError, HTTPException) as error:
                    return _said(error)
                if not piece:
                    return "the connection ended early"
                if skip:
                    skip -= len(piece)
                    continue
                stream.write(piece)
                digest.update(piece)
                advance(len(piece))
        return "it is whole"

    def _open(self, url: str, repo: str, revision: str, start: int = 0) -> _Answer:
        """A GET that follows redirects and shows the token to the Hub itself only.

        Raises NotFound for what the Hub refuses, OSError or HTTPException for what may pass.
        """
        import urllib.error
        import urllib.request

        request = urllib.request.Request(
            url, headers={"User-Agent": "edgepack", "Accept-Encoding": "identity"}
        )
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self.token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            answer: _Answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 429 or error.code >= 500:
                raise ConnectionError(f"the server answered {error.code} {error.reason}") from error
            raise _refusal(error.code, error.headers.get("X-Error-Code", ""), repo, revision) from error
        return answer


def _listing(document: object) -> tuple[str, tuple[_Remote, ...]]:
    """Commit and root files of the Hub's answer; raises KeyError, TypeError or ValueError for another one."""
    if not isinstance(document, dict) or not _COMMIT.match(document["sha"]):
        raise ValueError("no commit")
    files = []
    for row in document["siblings"]:
        name, lfs = row["rfilename"], row.get("lfs")
        if "/" in name or name.startswith(".") or "\\" in name:
            continue
        digest = lfs["sha256"] if lfs else row["blobId"]
        if not (_SHA256 if lfs else _SHA1).match(digest):
            raise ValueError(f"{name} has no digest")
        files.append(_Remote(name=name, size=int(row["size"]), digest=digest))
    return str(document["sha"]), tuple(files)


def _weights_of(repo: str, folder: Path, files: Sequence[_Remote]) -> list[_Remote]:
    """The safetensors that make up the model: those the index names, else model.safetensors, else all."""
    tensors = {f.name: f for f in files if _is_weights(f.name)}
    shards = _shards(folder)
    if shards is not None:
        lost = sorted(shards - set(tensors))
        if lost:
            raise Unsupported(f"{repo} lists {lost[0]} in its index and does not have it")
        return [tensors[name] for name in shards]
    if "model.safetensors" in tensors:
        return [tensors["model.safetensors"]]
    if not tensors:
        others = ", ".join(sorted(f.name for f in files if f.name.endswith((".bin", ".pth", ".pt", ".gguf"))))
        raise Unsupported(
            f"{repo} has no safetensors{f', only {others}' if others else ''}",
            hint="pickled weights are never loaded; download a .gguf and give its path",
        )
    return list(tensors.values())


def _shards(folder: Path) -> set[str] | None:
    """File names in the safetensors index of a folder; None when it has no index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    document = serde.read_json(index)
    table = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) and "/" not in v for v in table.values()):
        raise BadInput(f"{index} has no weight_map of file names")
    return set(table.values())


def _is_whole(snapshot: Path, *, weights: bool) -> bool:
    """Every file a build needs is there as a link into blobs/, whose names are digests."""
    if not (snapshot / "config.json").is_file():
        return False
    shards = _shards(snapshot)
    if shards is not None:
        needed = shards
    else:
        needed = {p.name for p in snapshot.glob("*.safetensors")} or {"model.safetensors"}
    needed = {*(needed if weights else ()), "config.json"}
    return all((snapshot / n).is_symlink() and (snapshot / n).is_file() for n in needed) and any(
        (snapshot / name).is_file() for name in (*_TOKENIZERS, "vocab.json")
    )


def _verify(snapshot: Path, repo: str, *, weights: bool, progress: Progress) -> None:
    """What an earlier run, or another tool, left in the cache still has the content its name says."""
    for path in sorted(snapshot.iterdir()):
        if path.is_symlink() and (path.name in SMALL or (weights and _is_weights(path.name))):
            _check(path.resolve(), path.name, repo, progress)


def _check(blob: Path, name: str, repo: str, progress: Progress) -> None:
    """Raises Untrusted, and removes the blob, when its content does not have the digest in its name."""
    if _SHA256.match(blob.name):
        found = _digest(blob, progress)
    elif _SHA1.match(blob.name):
        digest = _hasher(blob.name, blob.stat().st_size)
        digest.update(blob.read_bytes())
        found = digest.hexdigest()
    else:
        raise Untrusted(f"{name} of {repo} is cached under {blob.name}, which is no digest")
    if found != blob.name:
        blob.unlink()
        raise _corrupted(name, repo, found, blob.name)


def _corrupted(name: str, repo: str, found: str, wanted: str) -> Untrusted:
    return Untrusted(
        f"{name} of {repo} has digest {found}, and the Hub says {wanted}",
        hint="the file was removed; run again, and if it stays so, distrust the server or the disk",
    )


def _hasher(digest: str, size: int) -> hashlib._Hash:
    """sha256, or for a 40-digit name git's sha1 of a blob of that size."""
    if _SHA256.match(digest):
        return hashlib.sha256()
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.edgepack-partial")


def _begun(blobs: Path, file: _Remote) -> int:
    partial = _partial(blobs / file.digest)
    return min(file.size, partial.stat().st_size) if partial.is_file() else 0


def _holds(blob: Path, size: int) -> bool:
    return blob.is_file() and blob.stat().st_size == size


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _said(error: Exception) -> str:
    """What a library says, without its wrapping."""
    return str(getattr(error, "reason", error)) or type(error).__name__


def _way_around(repo: str, revision: str) -> str:
    at = f" at revision {revision}" if _COMMIT.match(revision) else ""
    return f"download {repo}{at} elsewhere and give its folder instead of the name, or set HF_ENDPOINT to a mirror"


def _near(repo: str) -> str:
    """A repository of the catalog that may have been meant; nothing for one that is in it."""
    known = [model.repo for model in catalog.models()]
    return "" if repo in known else serde.did_you_mean(repo, known)


def _refusal(status: int, code: str, repo: str, revision: str) -> NotFound:
    if code == "GatedRepo" or (status == 403 and not code):
        return NotFound(
            f"{repo} is gated: the Hub gives it only to accounts that accepted its licence",
            hint=f"accept it on the page of {repo}, then set HF_TOKEN to a token of that account",
        )
    if code == "RevisionNotFound":
        return NotFound(
            f"{repo} has no revision {revision}", hint="give a commit, tag or branch of the repository"
        )
    if code == "EntryNotFound":
        return NotFound(f"{repo} at {revision} lost a file that it listed", hint="run again")
    return NotFound(
        f"the Hub has no repository {repo}, or it is private ({status}){_near(repo)}",
        hint="check the spelling; a private repository needs HF_TOKEN",
    )


# ── ModelScope ───────────────────────────────────────────────────────────────────────────────────────


def _modelscope(
    source: str, revision: str | None, *, offline: bool, weights: bool, progress: Progress
) -> Checkpoint:
    """``modelscope:org/name[@revision]`` by its own client; the revision recorded is over the content."""
    name, _, asked = source.removeprefix("modelscope:").partition("@")
    if not _REPOSITORY.match(name):
        raise BadInput(f"{source!r} is not modelscope:org/name")
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise MissingTool(
            "modelscope is not installed", hint="pip install 'edgepack[modelscope]', or give its folder"
        ) from error
    progress.step(f"fetching {name} from ModelScope")
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or asked or None,
                local_files_only=offline,
                allow_file_pattern=[*SMALL, *(["*.safetensors"] if weights else [])],
            )
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a missing local copy a ValueError
        raise Offline(
            f"ModelScope did not give {name}: {error}",
            hint=f"download {name} elsewhere and give its folder",
        ) from error
    return Checkpoint(
        path=folder, source=source, revision=content_revision(folder, progress), license=license_in(folder)
    )
