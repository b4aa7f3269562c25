"""Brings a bundle onto a device: asks what is there, decides, sends what is missing, switches, and judges.

What is decided here is decided from facts, and shown by a dry run; the device's own agent (devices.py) refuses whatever
it must refuse, and nothing out of a bundle runs before that agent has verified it.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgepack import bundle as bundles
from edgepack import check, devices, serde
from edgepack.check import CheckReport
from edgepack.device import agent
from edgepack.devices import Device, Fsck, Installed, Missing, Offer, Outcome, Status, Store
from edgepack.errors import Busy, CheckFailed, EdgepackError, Untrusted
from edgepack.evaluation import Quality
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.remote import Dropped
from edgepack.units import KIB, MIB, show

PIECE = 256 * KIB
"""Bytes handed on at once."""
SMALL = MIB
"""Bytes of a file up to which it travels deflated: plans and start files shrink to a quarter, weights not at all."""
PATIENCE = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0)
"""Seconds to wait before each further try to reach a device; they count anew whenever something arrived. Together they
are longer than an agent waits for bytes that do not come (installer.IDLE), which then gives its store back."""


# ── deciding ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user wants of a flash."""

    switch: bool = True
    """Else the release is laid out beside what runs."""
    self_test: bool = True
    keep: int | None = None
    """Good releases that stay; None as the device was enrolled."""
    allow_downgrade: bool = False
    other_device: bool = False
    """Also onto another device than the planned one."""
    force: bool = False
    """That, and with too little memory."""

    def allowances(self) -> list[str]:
        """The agent's words for what it may let pass."""
        downgrade = ["--allow-downgrade"] if self.allow_downgrade else []
        other = ["--other-device"] if self.other_device else []
        return [*downgrade, *(["--force-device"] if self.force else other)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A device and what it says to a bundle, before anything there is changed."""

    store: Store
    offer: Offer


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to be done, and the bytes of the bundle that it moves."""

    action: Literal["send", "install", "collect"]
    text: str
    bytes: int = 0


def steps(facts: Facts, cargo: Cargo, asked: Asked) -> tuple[Step, ...]:
    """What has to be done so that the device has the bundle as it was asked; nothing when it has. Pure."""
    return tuple(_steps(facts.store, facts.offer, cargo, asked))


def _steps(store: Store, offer: Offer, cargo: Cargo, asked: Asked) -> Iterator[Step]:
    if offer.missing:
        there = len(cargo.files) - len(offer.missing)
        text = f"send {len(offer.missing)} files, {show(offer.left)} ({there} are there already)"
        yield Step(action="send", text=text, bytes=offer.left)
    others = (release for release in store.releases if release.digest != cargo.release)
    before = next((release.name for release in others if release.current), None)
    if not asked.switch:
        if offer.state not in ("installed", "current"):
            yield Step(action="install", text=f"lay {cargo.name} out beside what runs")
    elif offer.state != "current" or not offer.good:
        test = "self-test, and back if it fails" if asked.self_test else "no self-test"
        way = f"switch from {before} to" if before else "switch to"
        yield Step(action="install", text=f"{way} {cargo.name}; {test}")
    if asked.keep is not None:
        yield Step(action="collect", text=f"keep {asked.keep} good releases and remove the others")


# ── the bundle here ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Cargo:
    """A verified bundle, ready to travel."""

    path: Path
    name: str
    release: str
    """sha256 of its manifest, in hex."""
    head: tuple[tuple[str, bytes], ...]
    """Name and bytes of each part that the agent judges before it takes the rest."""
    files: Mapping[str, tuple[int, int]]
    """Offset in the bundle and size of every file, by its digest."""
    plan: Plan
    quality: Quality | None

    @property
    def sequence(self) -> int:
        """The release's number, which never falls on a device."""
        manifest = json.loads(dict(self.head)["manifest"])
        return int(manifest["annotations"]["org.edgepack.release-sequence"])


def load(path: Path, signers: Path | None) -> Cargo:
    """A bundle, every byte of it verified, and where its parts lie. Raises NotFound, Untrusted, BadInput, MissingTool.

    An unsigned one is refused: no device takes it.
    """
    found, signature = bundles.verified(path, signers)
    if signature.state == "unsigned":
        raise Untrusted(
            f"{path} is not signed, and devices take only what an enrolled key signed",
            hint="build it with --key (edgepack key new PATH makes one)",
        )
    with bundles.translated(path):
        head, _ = agent.read_head(str(path))
        plan_json = agent.read_file(found, "plan.json")
        plan = serde.load(Plan, agent.parse_json(plan_json, "plan.json"), source="plan.json")
    blobs = (head.config, plan_json)
    return Cargo(
        path=path,
        name=found["name"],
        release=found["manifest_digest"].removeprefix("sha256:"),
        head=(
            ("index", head.index_json),
            ("signature", head.signature or b""),
            ("manifest", head.manifest),
            *((f"sha256:{hashlib.sha256(blob).hexdigest()}", blob) for blob in blobs),
        ),
        files={file["digest"]: (file["offset"], file["size"]) for file in found["files"]},
        plan=plan,
        quality=bundles.quality_in(found, path),
    )


def frames(
    cargo: Cargo, missing: Iterable[Missing], on_bytes: Callable[[int], None] = lambda _: None
) -> Iterator[bytes]:
    """What is missing of a bundle, as the agent reads it: a line of JSON that says what comes, then the bytes.

    ``on_bytes`` is told how many bytes of files have left. Raises Untrusted for a bundle that changes meanwhile.
    """
    with cargo.path.open("rb") as source:
        for one in missing:
            place, size = cargo.files.get(one.digest, (0, -1))
            left = size - one.have
            if left < 0 or one.have < 0:
                raise EdgepackError(
                    f"the device asks for {one.digest} from {one.have} on, which {cargo.name} has not"
                )
            source.seek(place + one.have)
            if size <= SMALL and one.have == 0:
                yield packed(one.digest, source.read(size))
                on_bytes(size)
                continue
            yield _line({"name": one.digest, "offset": one.have, "bytes": left})
            while left:
                piece = source.read(min(PIECE, left))
                if not piece:
                    raise Untrusted(f"{cargo.path} became shorter while it was sent", hint="copy it again")
                yield piece
                left -= len(piece)
                on_bytes(len(piece))


def packed(name: str, content: bytes) -> bytes:
    """A whole small part as a frame, deflated where that makes it shorter."""
    line: dict[str, object] = {"name": name, "offset": 0, "bytes": len(content)}
    small = zlib.compress(content, 9)
    if len(small) < min(len(content), SMALL):
        return _line(line | {"zlib": len(small)}) + small
    return _line(line) + content


def _line(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


# ── doing ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Flashed:
    """What a flash did, or would do."""

    host: str
    root: str
    name: str
    release: str
    steps: tuple[Step, ...]
    outcome: Outcome | Literal["planned"]
    previous: str | None = None
    sent: int = 0
    """Bytes that were handed to the line, those that were lost with it included."""
    seconds_to_send: float | None = None
    seconds_to_switch: float | None = None
    reasons: tuple[str, ...] = ()
    """Why the device went back."""
    report: CheckReport | None = None
    """The self-test's facts against the plan; None when there was none, or it did not get that far."""
    notes: tuple[str, ...] = ()


def flash(
    cargo: Cargo,
    device: Device,
    asked: Asked,
    *,
    progress: Progress,
    dry_run: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Flashed:
    """Makes a device run a bundle, or leaves it as it was; with ``dry_run`` it only says how.

    Raises what the agent refuses as BadInput, Untrusted, NoSpace, MissingTool and Busy, and Offline when the line
    stays cut. A release that failed its test there is a value: its outcome is "rolled-back".
    """
    store = device.status().store
    facts = Facts(store=store, offer=_offered(cargo, device, asked, dry_run=dry_run))
    other = f"{device.name} has another edgepack's agent: `edgepack flash --enroll {device.name}` brings this one's"
    begun = Flashed(
        host=device.name,
        root=device.root,
        name=cargo.name,
        release=cargo.release,
        steps=steps(facts, cargo, asked),
        outcome="planned" if dry_run else "current",
        notes=() if devices.is_ours(store) else (other,),
    )
    if dry_run:
        return begun
    return _execute(begun, facts.offer, cargo, device, asked, progress=progress, sleep=sleep)


def _execute(
    begun: Flashed,
    offer: Offer,
    cargo: Cargo,
    device: Device,
    asked: Asked,
    *,
    progress: Progress,
    sleep: Callable[[float], None],
) -> Flashed:
    done = begun
    for step in begun.steps:
        progress.step(step.text)
        if step.action == "send":
            before = time.monotonic()
            sent = send(offer, cargo, device, asked, progress=progress, sleep=sleep)
            done = replace(done, sent=sent, seconds_to_send=time.monotonic() - before, outcome="installed")
        elif step.action == "install":
            done = _installed(done, cargo, device, asked, progress)
        elif done.outcome != "rolled-back":
            device.collect(asked.keep or 1)
    return done


def send(
    offer: Offer,
    cargo: Cargo,
    device: Device,
    asked: Asked,
    *,
    progress: Progress,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Sends what is missing, and goes on where it stopped when the line is cut; returns the bytes handed to the line.

    Raises Dropped when further tries bring nothing more, and what the agent refuses.
    """
    sent = 0
    left, waits, was_cut = offer.left + 1, iter(PATIENCE), False
    known: Offer | None = offer

    def counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal sent
        for piece in pieces:
            sent += len(piece)
            yield piece

    while True:
        try:
            known = known or _offered(cargo, device, asked)
            if not known.missing:
                return sent
            if known.left < left:
                left, waits = known.left, iter(PATIENCE)
            with progress.bar(f"sending to {device.name}", known.left, rate=True) as advance:
                pieces = counted(frames(cargo, known.missing, advance))
                known = device.receive(cargo.release, pieces)
            if known.left >= left:
                raise EdgepackError(f"{device.name} took nothing of what it said was missing")
        except (Dropped, Busy) as error:
            wait = next(waits, None)
            if wait is None or (isinstance(error, Busy) and not was_cut):
                raise
            was_cut, known = True, None  # the agent at the other end of the cut line may not have noticed yet
            progress.step(f"{error.message}; trying again in {wait:.0f} s")
            sleep(wait)


def _installed(done: Flashed, cargo: Cargo, device: Device, asked: Asked, progress: Progress) -> Flashed:
    words = [] if asked.switch else ["--no-switch"]
    words += [] if asked.self_test and asked.switch else ["--no-self-test"]
    words += [] if asked.keep is None else ["--keep", str(asked.keep)]
    answer = device.install(cargo.release, [*words, *asked.allowances()], progress.step)
    return replace(
        done,
        outcome=answer.outcome,
        previous=answer.current if answer.outcome == "rolled-back" else answer.previous,
        seconds_to_switch=answer.seconds_to_switch,
        reasons=answer.reasons,
        report=None if answer.selftest is None else judged(cargo, answer.selftest, source=device.name),
    )


def _offered(cargo: Cargo, device: Device, asked: Asked, *, dry_run: bool = False) -> Offer:
    head = (packed(name, content) for name, content in cargo.head)
    return device.offer(head, asked.allowances(), keep=asked.keep, dry_run=dry_run)


def judged(
    cargo: Cargo, selftest: Mapping[str, object], *, source: str, strict_device: bool = False
) -> CheckReport | None:
    """A self-test that ran there, held against the plan here; None for one that ended before there were facts.

    Raises BadInput when it cannot be read.
    """
    facts = {name: value for name, value in selftest.items() if name != "verdict"}
    if not facts:
        return None
    return check.evaluate(
        cargo.plan,
        check.facts_from(facts, source=f"{source}: self-test"),
        measured=cargo.quality,
        strict_device=strict_device,
    )


def check_on(
    cargo: Cargo,
    device: Device,
    asked: Asked,
    *,
    full: bool = False,
    memory_limit: int | None = None,
    strict_device: bool = False,
    progress: Progress,
) -> CheckReport:
    """Runs a bundle's self-test on a device and judges it here; what runs there rests meanwhile, and runs on.

    The bundle is sent first where it is missing. Raises as `flash` does, and CheckFailed for a test without facts.
    """
    flash(cargo, device, replace(asked, switch=False, keep=None), progress=progress)
    words = ["--force-device"] if asked.force else []
    words += ["--full"] if full else []
    words += ["--memory-limit", str(memory_limit)] if memory_limit is not None else []
    answer = device.self_test(cargo.release, words, progress.step)
    report = judged(cargo, answer, source=device.name, strict_device=strict_device)
    if report is None:
        verdict = answer.get("verdict")
        reasons = verdict.get("reasons") if isinstance(verdict, dict) else None
        raise CheckFailed(f"{device.name}: {'; '.join(map(str, reasons or ['the test gave no facts']))}")
    return report


def fsck(
    cargo: Cargo | None,
    device: Device,
    asked: Asked,
    *,
    progress: Progress,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Fsck, int]:
    """Has every byte of a store hashed again; with a bundle, what its release lacks is sent, and all is read once more.

    Returns what was found, with what is missing at the end, and how many bytes were sent. Raises as `flash` does.
    """
    found = device.fsck(progress.step)
    if cargo is None or all(one.release != cargo.release for one in found.missing):
        return found, 0
    sent = send(_offered(cargo, device, asked), cargo, device, asked, progress=progress, sleep=sleep)
    after = device.fsck(progress.step)  # other releases share files, which are links to what came
    mended = found.mended + len(found.missing) - len(after.missing)
    return replace(after, bad=(*found.bad, *after.bad), mended=mended), sent


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────


def shortfall(done: Flashed) -> CheckFailed | None:
    """The failure that a flash ends with although every step was done: the device, or this judge, said no."""
    if done.outcome == "rolled-back":
        before = (
            f"release {done.previous[:12]} runs there as before" if done.previous else "nothing runs there"
        )
        return CheckFailed(
            f"rolled back: {done.name} failed on {done.host}: {'; '.join(done.reasons)}",
            hint=f"{before}; edgepack doctor --on {done.host} names the cause where it is known, and edgepack check "
            f"BUNDLE --on {done.host} tests it again, without switching",
        )
    if done.report is None or done.report.passed:
        return None
    failed = ", ".join(item.name for item in done.report.items if item.status == "fail")
    return CheckFailed(
        f"check failed: {failed}; {done.name} runs on {done.host} all the same",
        hint=f"edgepack flash --rollback {done.host} goes back",
    )


def unstarted(back: Installed, host: str) -> CheckFailed | None:
    """The failure that a rollback ends with when the release before does not start either."""
    if not back.reasons:
        return None
    return CheckFailed(
        f"{host} went back to release {(back.current or '?')[:12]}, which does not start: {'; '.join(back.reasons)}",
        hint=f"edgepack flash BUNDLE {host} makes another run there, the one that was left too; "
        f"edgepack flash --fsck {host} says whether this one is damaged",
    )


def damage(found: Fsck, host: str) -> Untrusted | None:
    """The failure that a search ends with when files are still missing."""
    if not found.missing:
        return None
    releases = sorted({one.release[:12] for one in found.missing})
    told = f"{len(found.missing)} files of {', '.join(releases)} on {host} were damaged and are set aside"
    return Untrusted(
        told if found.restarts else f"{told}; {_next_start(found)}",
        hint=f"edgepack flash --fsck BUNDLE {host} sends what is missing of a release",
    )


def _next_start(found: Fsck) -> str:
    """What becomes of a current release that lost files."""
    then = (
        "does not start again before they are back"
        if found.back is None
        else f"starts {found.back[:12]} next"
    )
    return f"what runs there runs on, and {then}"


def to_document(done: Flashed) -> dict[str, object]:
    """What was done, as JSON; the report of the self-test as `edgepack check` writes it."""
    report = None if done.report is None else check.to_document(done.report)
    told = serde.dump(replace(done, report=None))
    return {"schema_version": 1, **(told if isinstance(told, dict) else {}), "report": report}


def table(done: Flashed) -> str:
    """The same for people."""
    lines = [f"{done.name}  sha256:{done.release}  on {done.host}"]
    if done.outcome == "planned":
        lines += [f"would {step.text}" for step in done.steps] or [
            "nothing to do: it runs there, and is good"
        ]
        return _text([*lines, *done.notes])
    if done.seconds_to_send is not None:
        pace = done.sent / max(done.seconds_to_send, 1e-3)
        lines.append(f"sent      {show(done.sent)} in {done.seconds_to_send:.1f} s, {show(round(pace))}/s")
    if done.seconds_to_switch is not None:
        lines.append(f"switched  in {done.seconds_to_switch:.2f} s")
    told = {
        "good": "it runs there, and its self-test passed",
        "installed": "it lies there, beside what runs",
        "current": "nothing to do: it runs there, and is good",
        "rolled-back": "ROLLED BACK",
    }
    lines += [
        told[done.outcome] if done.outcome != "good" or done.report else "it runs there, untested",
        *done.notes,
    ]
    return _text(lines) + ("" if done.report is None else "\n" + check.table(done.report))


def status_table(found: Status, host: str) -> str:
    """A store, its releases and its journal, for people."""
    store = found.store
    lines = [f"{host}: mode {store.mode}, {show(store.free)} free, highest sequence {store.sequence}"]
    for one in sorted(store.releases, key=lambda one: one.sequence or 0, reverse=True):
        told = [one.name or "?", *(name for name in ("current", "previous") if getattr(one, name))]
        told += ["good" if one.good else "not known good", *([] if one.whole else ["DAMAGED: --fsck"])]
        lines.append(
            f"{one.digest[:12]}  {show(one.bytes or 0):>10}  {one.sequence or 0:>4}  {', '.join(told)}"
        )
    for line in found.journal:
        rest = ", ".join(
            f"{name} {value}" for name, value in sorted(line.items()) if name not in ("at", "event")
        )
        lines.append(f"{devices.moment(line)}  {line.get('event')}  {rest}")
    return _text(lines)


def fsck_table(found: Fsck) -> str:
    """What a search for damage found, for people."""
    lines = [
        f"{found.checked} files read; {len(found.bad)} bad, {found.mended} mended, {len(found.missing)} missing"
    ]
    lines += [f"bad      {show(one.bytes):>10}  {one.path}" for one in found.bad]
    lines += [f"missing  {one.release[:12]}/{one.path}" for one in found.missing]
    lines += [] if found.restarts else [_next_start(found)]
    return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
