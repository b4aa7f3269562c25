"""A device that is given hostile bundles, and what it did with each that it must not do."""

from __future__ import annotations

import hashlib
import json
import os
import random
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from edgepack.bundle import oci, server_document, sign
from edgepack.device import installer
from tests import releases
from tests.hostile import cases
from tests.hostile.cases import Bundle, Case
from tests.plans import example_plan

OUTSIDE = ("/tmp/outside", "/etc/cron.d/outside", "/etc/cron.d/../outside", "/outside")
"""What absolute names of the cases would be if one were followed; `stage` refuses to begin where one is there."""
PRECIOUS = ("/etc/passwd", "/etc/cron.d")
"""Targets of links in the cases, and folders of absolute names: nobody may write there."""
REFUSED = (2, 6, 10)
"""Exit statuses of bad usage, refused, and no space."""


@dataclass(slots=True)
class Outcome:
    tried: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A store with a good release, and something beside it that nobody may touch."""

    folder: Path
    device: releases.Device
    bundle: Bundle

    @property
    def sent(self) -> Path:
        return self.folder / "sent.tar"

    @property
    def release(self) -> str:
        return hashlib.sha256(oci.canonical(self.bundle.manifest)).hexdigest()


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """A device on which release 3 runs, which is offered changes of release 5."""
    there = [place for place in OUTSIDE if os.path.lexists(place)]
    if there:
        raise RuntimeError(f"{there[0]} is there already: whether a case made it could not be told")
    keys = [folder / name for name in ("key", "stranger")]
    for key in keys:
        sign.new_key(key)
    # Of what both had the device would take its own copy, and not mind what was sent for it.
    other = {name: f"{text}# first\n" for name, text in releases.UNITS.items()}
    other |= {"start.sh": "#!/bin/sh\n# first\n", "app/empty.txt": "first"}
    other |= {
        "selftest.json": json.dumps({**releases.SELFTEST, "about": "first"}),
        "server.json": json.dumps(json.loads(server_document(example_plan(releases.PROFILE)))),
    }
    first = releases.bundle(
        folder / "first.tar", keys[0], sequence=3, files=other, server=b"#!/bin/sh\n# first\n"
    )
    second = releases.bundle(folder / "second.tar", keys[0], sequence=5, weights=b"GGUF" + bytes(9000))
    beside = folder / "beside"
    (beside / "home").mkdir(parents=True)
    (beside / "home" / "precious").write_text("as it was", encoding="utf-8")
    device = releases.Device(beside / "store")
    before = Path.cwd()
    os.chdir(beside / "home")
    try:
        assert device.enroll(sign.allowed_signer(keys[0])).status == 0
        assert device.run("install", first).status == 0
        yield Stage(folder=folder, device=device, bundle=cases.read(second, *keys))
    finally:
        os.chdir(before)


def trial(on: Stage, *, count: int, seed: int) -> Outcome:
    """So many cases of a seed; each fault names its number, so that it can be had again."""
    outcome = Outcome()
    before = seen(on)
    for number, case in enumerate(islice(cases.cases(on.bundle, random.Random(seed)), count)):
        outcome.tried[case.kind] += 1
        for act, status, said in given(on, case):
            outcome.statuses[status] += 1
            if said is not None:
                outcome.faults.append(f"case {number} ({case.kind}), {act}: {said}")
        after = seen(on)
        if after != before:
            outcome.faults.append(f"case {number} ({case.kind}): {difference(before, after)}")
            before = after
    return outcome


def given(on: Stage, case: Case) -> Iterator[tuple[str, int, str | None]]:
    """Hands a case to the agent: (command, exit status, what is wrong with the answer or None)."""
    if case.tar is not None:
        on.sent.write_bytes(case.tar)
        yield answered(on, "install", str(on.sent), stdin=b"", refused=True)
    if case.offer is not None and case.release is not None:
        assert case.receive is not None
        yield answered(on, "offer", stdin=case.offer, refused=False)
        yield answered(on, "receive", case.release, stdin=case.receive, refused=True)
        store, weights = on.device.store, f"sha256:{list(on.bundle.blobs)[-1]}"
        if any(map(os.path.lexists, (store.blob(weights), store.part(weights)))):
            yield "receive", 0, "took the weights of what it refused"
    elif case.offer is not None:
        # What an offer refuses leaves nothing; of what it takes, the files are asked for and none is installed here.
        # That a signed manifest lies of a file's size is told by the file alone: the archive of the case has it.
        yield answered(
            on,
            "offer",
            stdin=case.offer,
            refused=case.kind != "signed, lying manifest"
            and case.kind.startswith(("signed", "downgrade", "a stranger", "another", "unsigned")),
        )
    elif case.receive is not None:
        yield answered(on, "offer", stdin=b"".join(cases.offered(on.bundle)), refused=False)
        yield answered(on, "receive", on.release, stdin=case.receive, refused=False)
    # What was whole of it stays, to go on with; the next case is to find none of it.
    yield answered(on, "gc", stdin=b"", refused=False)


def answered(on: Stage, *words: str, stdin: bytes, refused: bool) -> tuple[str, int, str | None]:
    try:
        answer = on.device.run(*words, stdin=stdin)
    except Exception:
        return words[0], -1, traceback.format_exc(limit=-3)
    if "Traceback" in answer.said:
        return words[0], answer.status, answer.said
    if refused and answer.status not in REFUSED:
        return words[0], answer.status, f"it was not refused: {answer.document}"
    if answer.status not in (0, *REFUSED):
        return words[0], answer.status, f"ended with {answer.status}: {answer.said}"
    if answer.status and len(answer.said.splitlines()[-1]) > 400:
        return words[0], answer.status, f"says {len(answer.said)} characters"
    return words[0], answer.status, None


def seen(on: Stage) -> dict[str, str]:
    """What must stay: all beside the store, its links, releases and settings, and what each blob is called."""
    beside = on.folder / "beside"
    found = {}
    for place in sorted(beside.rglob("*")):
        name = place.relative_to(beside).as_posix()
        inside = name.removeprefix("store/")
        if inside.startswith(("incoming", "lock", "journal.jsonl", "quarantine")):
            continue
        if place.is_symlink():
            found[name] = f"-> {place.readlink()}"
        elif place.is_file() and not inside.startswith("blobs/"):
            found[name] = hashlib.sha256(place.read_bytes()).hexdigest()
        elif place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() != place.name:
            found[name] = "no blob of this name"
    left = [path.name for path in (beside / "store").rglob(".new-*")]
    # Names that climb out of the store, or out of all of this, end in one of these.
    outside = [str(path) for path in on.folder.rglob("outside")] + [
        one for one in OUTSIDE if os.path.lexists(one)
    ]
    watched = {str(path): str(path.stat().st_mtime_ns) for path in map(Path, PRECIOUS) if path.exists()}
    return {
        **found, **watched, **({"left over": str(left)} if left else {}),
        **({"outside": str(outside)} if outside else {}),
    }  # fmt: skip


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return "; ".join(f"{name}: {before.get(name)} is {after.get(name)}" for name in names[:5])


def whole(on: Stage) -> bool:
    """At the end the device still takes the honest release."""
    on.sent.write_bytes(on.bundle.content)
    took = on.device.run("install", on.sent)
    return (
        took.document.get("outcome") == "good" and installer.HEX.match(on.device.current() or "") is not None
    )
