"""Holds what the agent measured against the plan, part by part: every promise gets a verdict and a residual."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgepack import bundle as bundles
from edgepack import serde, toolchain, workspace
from edgepack.bundle.sbom import commit
from edgepack.device import agent
from edgepack.errors import BadInput, EdgepackError, Interrupted, MissingTool, NoSpace, Untrusted
from edgepack.evaluation import Quality
from edgepack.memory import Part
from edgepack.plan import Plan
from edgepack.profile import Arch
from edgepack.progress import Progress
from edgepack.runtimes import llama_cpp, vllm
from edgepack.screen import PLAIN, Screen
from edgepack.shell import run
from edgepack.units import GIB, MIB, show

Status = Literal["pass", "warn", "fail", "note", "not-comparable"]
"""``note``: measured, but nothing was promised for it or this is not the device it was promised for.
``not-comparable``: measured under an emulator, whose own it is: neither passed nor failed, and never counted."""

LOG_ROUNDING = MIB * 0.005
"""llama.cpp's buffer lines are rounded to 0.01 MiB."""
VLLM_ROUNDING = GIB * 0.005
"""vLLM's are rounded to 0.01 GiB."""
UNEXPLAINED = 0.05
"""Share of the predicted total that the peak may lie above it, unless the plan's own interval is wider."""
PAGING_PER_SECOND = 1.0
"""Major faults a second above which a running server is paging; one whose memory fits takes none."""
PAGING_SHARE = 0.1
"""Share of the weights that a running server may read from disk again; where the kernel reads ahead, this
shows what faults hide. What is read for the first time is taken off, which is at most what it holds of its libraries'
files: a server in Python reads some of them when they are first needed (107 MiB of vLLM's after the first answer, where
the page cache was empty), and llama-server's files are its weights too where they are mapped."""
PAGE = 4096
"""Bytes of the least that a fault brings."""
SPEED_COLLAPSE = 0.5
"""A fitted speed is an estimate; below this share of its lower end the promise is broken."""
BUSY_LOAD = 0.75
"""Load per core, before the server starts, above which this machine is too busy to judge speed."""
BUSY_OTHERS = 0.1
"""Share of the cores above which other programs, while speed was measured, took too much to judge it."""
DRIFT = 0.05
"""Mean drift of the recorded log-probabilities, in nats, up to which the answers are the same. Measured with the
built-in model at Q6_K: another number of threads 0, other batches 0.001, no flash attention 0.014, no repacking
(Q4_0, Q4_K_M) 0.012 and 0.017, an 8-bit KV cache 0.017; x86 against Arm 0.0003 (published). The same weights at
4 bits instead: 0.083 and more. CUDA was not measured."""
DRIFT_WRONG = 0.25
"""Above this the answers are another model's, or those of damaged weights."""
AGREEMENT = 0.9
"""Share of probes with the recorded first choice, ties counted as the same."""
AGREEMENT_WRONG = 0.7
"""Below this they are another model's."""


# ── what the agent measured ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFacts:
    name: str
    manifest_digest: str
    bytes: int
    agent: str | None
    server: str | None = None
    """Digest of the llama-server that it carries."""
    code: str | None = None
    """Digest over edgepack_server's files that it carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    name: str
    memory_total: int | None
    memory_used: int | None
    driver: str
    compute_capability: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    arch: str
    kernel: str
    python: str
    cpu: str | None
    cores: int
    load: float
    memory_total: int | None
    memory_available: int | None
    swap_total: int | None
    device_tree: tuple[str, ...] | None
    l4t: str | None
    gpus: tuple[GpuFacts, ...] | None
    emulated: bool = False
    """Whether its programs run on a processor of another architecture; agents in older bundles did not ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchFact:
    fact: str
    status: Literal["pass", "fail", "unknown"]
    expected: str
    measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightFacts:
    memory_needed: int
    memory_available: int | None
    device_memory_needed: int | None
    disk_needed: int
    disk_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitFacts:
    bytes: int | None
    mechanism: Literal["cgroup-v1", "cgroup-v2", "rlimit-as", "none"]
    address_space: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorFacts:
    name: str
    version: str
    cpu: str
    """The CPU that it emulates; "default" when it is the emulator's own choice."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    program: str
    source: Literal["bundle", "option", "path"]
    args: tuple[str, ...]
    environment: dict[str, str]
    load_seconds: float | None = None
    build: str | None = None
    emulator: EmulatorFacts | None = None
    """What ran the server when it is for another architecture than this machine's."""
    code: str | None = None
    """Digest over the files of edgepack_server that ran; None for a server of the runtime's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotFacts:
    slots: int
    tokens: tuple[int, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFacts:
    prompt_tokens: int
    predicted_tokens: int
    prefill_per_second: float | None
    decode_per_second: float | None
    decode_runs: tuple[float | None, ...]
    first_token_seconds: float | None
    others_cores: float | None = None
    """Cores that other programs kept busy meanwhile; None where that cannot be told, or the agent is an older one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFacts:
    first_turn_tokens: int
    second_turn_tokens: int
    reused_tokens: int
    first_turn: float | None
    second_turn_with_cache: float | None
    second_turn_without_cache: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityFacts:
    probes: int
    agree: int
    ties: int
    missing: int
    mean_drift: float
    max_drift: float
    decode_tokens: int
    decode_same: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FillFacts:
    slots_filled: int
    slots: int
    target_tokens: int
    held_tokens: tuple[int, ...]
    prefill_per_second: float | None
    decode_per_second: float | None
    together_per_second: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupFacts:
    peak: int | None
    anonymous: int | None
    page_cache: int | None
    oom_kills: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessesFacts:
    most: int
    """How many there were at once, at most."""
    peak: int
    """Bytes that they held together, at most."""
    shared: int | None
    """Bytes that were taken off the sum of their RSS, being counted more than once in it; None if unreadable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    peak_rss: int | None
    """Of the server's first process."""
    peak_rss_loaded: int | None
    peak_address_space: int | None
    rss: int | None
    rss_anonymous: int | None
    rss_file: int | None
    rss_shared: int | None
    peak_anonymous: int
    peak_file: int
    swap: int | None
    major_faults_load: int | None
    major_faults_run: int | None
    run_seconds: float | None
    read_bytes: int | None
    read_bytes_run: int | None
    system_drop: int | None
    cgroup: CgroupFacts | None
    gpu: int | None
    nvmap: int | None
    processes: ProcessesFacts | None = None
    """None for a server of one process."""
    code: int | None = None
    """Bytes of programs' and libraries' files that are mapped, whatever of each page is used."""

    @property
    def peak(self) -> int | None:
        """Bytes of all processes of the server at their highest; one of them alone never held more."""
        if self.peak_rss is None or self.processes is None:
            return self.peak_rss
        return max(self.peak_rss, self.processes.peak)

    @property
    def peak_on_host(self) -> int | None:
        """The same for a server whose weights went to an accelerator: pages of their files that it read them from are
        the system's to take back at any time (2.6 GiB of VmHWM for a bf16 1.5B on an H200) and count no more."""
        if self.peak is None or None in (self.rss_file, self.rss_shared) or self.processes is not None:
            return self.peak
        return min(self.peak, self.peak_anonymous + (self.rss_file or 0) + (self.rss_shared or 0))

    def counted(self, peak: int, planned: int, runtime: str) -> int:
        """Of ``peak`` what is held against ``planned``: pages of libraries beyond those known of ``runtime``
        may be mapped only because the page cache holds them together, so they explain what is more than planned."""
        beyond = max(0, (self.code or 0) - agent.RUNTIMES[runtime].libraries)
        return min(peak, max(planned, peak - beyond))

    @property
    def peak_source(self) -> str:
        if self.processes is None:
            return "VmHWM"
        return f"the RSS of {self.processes.most} processes, shared pages counted once"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFacts:
    """What a server that is not llama.cpp's says of itself."""

    runtime: str
    version: str | None
    max_model_len: int | None
    """Tokens that one slot holds."""
    parts: dict[str, int]
    """Bytes by the plan's names of parts."""
    pool_tokens: int | None
    pool_blocks: int | None
    concurrency: float | None
    backend: str | None
    """Where it computes: cpu, cuda; None when it did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    kind: Literal["model", "kv", "rs", "compute", "output"]
    name: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    bytes: int
    cells: int
    layers: int
    sequences: int
    k_type: str
    v_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFacts:
    buffers: tuple[Buffer, ...]
    lines: dict[str, int]
    caches: tuple[Cache, ...]
    context: dict[str, str]
    offloaded_layers: int | None
    load_mode: str | None
    build: str | None

    def size(self, kind: str) -> int:
        return sum(buffer.bytes for buffer in self.buffers if buffer.kind == kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureFacts:
    kind: Literal["allocation-refused", "oom-killed", "thrash", "crashed", "did-not-start", "timeout"]
    stage: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The agent's document; a part is None when the run did not get that far."""

    schema_version: int
    agent: str
    bundle: BundleFacts
    signature: bundles.Signature
    machine: MachineFacts
    match: tuple[MatchFact, ...]
    preflight: PreflightFacts
    limit: LimitFacts
    server: ServerFacts
    slots: SlotFacts | None
    speed: SpeedFacts | None
    turns: TurnFacts | None
    quality: QualityFacts | None
    fill: FillFacts | None
    memory: MemoryFacts | None
    log: LogFacts
    """llama.cpp's; empty for the others."""
    failure: FailureFacts | None
    served: ServedFacts | None = None
    """The others' account; None for llama.cpp."""


def facts_from(document: object, *, source: str) -> Facts:
    """Facts out of the agent's JSON. Raises BadInput."""
    return serde.load(Facts, document, source=source)


# ── the report ───────────────────────────────────────────────────────────────────────────────────────

Verdict = Literal["passed", "passed under emulation", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    name: str
    status: Status
    expected: str
    measured: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Measured minus predicted bytes of one part."""

    part: str
    predicted: int
    measured: int
    provenance: str
    """exact, fitted or measured: how sure the plan said it was."""

    @property
    def bytes(self) -> int:
        return self.measured - self.predicted

    @property
    def relative(self) -> float:
        return self.bytes / self.predicted if self.predicted else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    plan: str
    """Digest of the plan that was checked."""
    same_device: bool
    """Whether nothing here contradicts the plan's profile; else speed is not judged. An emulation never is."""
    emulated: str | None
    """Name and version of the emulator that ran the server, or that the machine is one; None when neither."""
    items: tuple[Item, ...]
    residuals: tuple[Residual, ...]
    facts: Facts
    notes: tuple[str, ...] = ()
    schema_version: int = 1

    @property
    def passed(self) -> bool:
        """Nothing failed; with ``emulated``, nothing of what an emulation can show."""
        return all(item.status != "fail" for item in self.items)

    @property
    def verdict(self) -> Verdict:
        if not self.passed:
            return "failed"
        return "passed" if self.emulated is None else "passed under emulation"


def evaluate(
    plan: Plan,
    facts: Facts,
    *,
    strict_device: bool = False,
    measured: Quality | None = None,
    notes: tuple[str, ...] = (),
) -> CheckReport:
    """The verdict on each promise of the plan; pure. A failed check is a value, nothing is raised."""
    emulated = _emulated(facts)
    same_device = emulated is None and all(row.status != "fail" for row in facts.match)
    same_backend = _server_backend(plan, facts) == plan.profile.backend
    residuals = tuple(_residuals(plan, facts, same_backend=same_backend))
    judged = _Judged(plan=plan, facts=facts, same_device=same_device, same_backend=same_backend)
    items: tuple[Item, ...] = (
        _integrity(facts),
        _signature(facts),
        _device(facts, strict=strict_device),
        *_preflight(plan, facts),
        _server(plan, facts),
        _run(facts),
        *_context(plan, facts),
        *_parts(judged, residuals),
        *_pool(plan, facts),
        *_peak(judged),
        *_paging(plan, facts),
        *_speed(judged),
        *_turns(facts),
        *_measured(measured),
        *_quality(facts),
    )
    if emulated is not None:
        items = tuple(_under_emulation(item) for item in items)
    return CheckReport(
        plan=plan.digest,
        same_device=same_device,
        emulated=emulated,
        items=items,
        residuals=residuals,
        facts=facts,
        notes=notes,
    )


WRITTEN: serde.Also = {
    CheckReport: {"passed": bool, "verdict": Verdict},
    Residual: {"bytes": int, "relative": float},
}
"""What `to_document` adds to the fields of these."""


def to_document(report: CheckReport) -> dict[str, object]:
    """The report as JSON: verdicts, residuals, and the facts they rest on.

    ``emulated`` is null or what ran the server, as "qemu-aarch64-static 7.2.22" or "a machine that emulates aarch64";
    ``verdict`` then says "passed under emulation", and each item's ``status`` is one of Status.
    """
    residuals = [
        {**_object(serde.dump(r)), "bytes": r.bytes, "relative": round(r.relative, 6)}
        for r in report.residuals
    ]
    verdicts = {"passed": report.passed, "verdict": report.verdict}
    return {**_object(serde.dump(report)), **verdicts, "residuals": residuals}


def table(report: CheckReport, screen: Screen = PLAIN) -> str:
    """The report for people."""
    signs: dict[Status, str] = {
        "pass": "ok", "warn": "warn", "fail": "FAIL", "note": "-", "not-comparable": "n/c",
    }  # fmt: skip
    lines = [*screen.line(f"{report.facts.bundle.name}  {report.facts.bundle.manifest_digest}", "title"), ""]
    lines += screen.columns(
        [("", "check", "expected", "measured")]
        + [(signs[i.status], i.name, i.expected, i.measured) for i in report.items],
        styles={"ok": "good", "warn": "warning", "FAIL": "bad", "n/c": "quiet"},
    )
    if screen.width is not None and report.residuals:
        lines += ["", *_bar(report, screen)]
    remarks = [f"{i.name}: {i.message}" for i in report.items if i.message and i.status != "not-comparable"]
    remarks += [f"not comparable: {names}: {why}" for why, names in _not_comparable(report.items).items()]
    if remarks or report.notes:
        lines += ["", *screen.lines((*remarks, *report.notes))]
    lines += ["", *screen.line(_conclusion(report), "good" if report.passed else "bad")]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _bar(report: CheckReport, screen: Screen) -> list[str]:
    """What was measured, part by part, against the most that the plan says it needs, of host and card together."""
    facts = report.facts
    parts = [(residual.part, residual.measured) for residual in report.residuals]
    most = facts.preflight.memory_needed + (facts.preflight.device_memory_needed or 0)
    memory = facts.memory
    peak = None if memory is None else memory.peak
    if memory is not None:
        card = memory.nvmap if memory.nvmap is not None else memory.gpu
        peak = peak if card is None else (memory.peak_on_host or 0) + card
        runtime = llama_cpp.NAME if facts.served is None else facts.served.runtime
        peak = None if peak is None else memory.counted(peak, most, runtime)
    if peak is not None and facts.preflight.device_memory_needed is None:
        parts.append(("process", max(0, peak - sum(size for _, size in parts))))
    told = f"{show(sum(size for _, size in parts))} measured, of up to {show(most)}"
    return [*screen.bar(parts, most, told), *screen.legend(parts)]


def _conclusion(report: CheckReport) -> str:
    bad = ", ".join(item.name for item in report.items if item.status == "fail")
    match report.verdict:
        case "failed":
            return f"FAILED: {bad}" if report.emulated is None else f"FAILED under emulation: {bad}"
        case "passed under emulation":
            return "passed under emulation: speed and peak memory were not comparable"
        case "passed":
            return "passed" if report.same_device else "passed, on another machine than it was planned for"


def _not_comparable(items: tuple[Item, ...]) -> dict[str, str]:
    """Reasons, each with the names of the items that it holds for."""
    reasons: dict[str, str] = {}
    for item in items:
        if item.status == "not-comparable":
            reasons[item.message] = (
                f"{reasons[item.message]}, {item.name}" if item.message in reasons else item.name
            )
    return reasons


# ── what an emulation cannot show ────────────────────────────────────────────────────────────────────

_HOST = "this machine is not the device, only its instructions are emulated"
_SLOW = "each instruction is translated, which says nothing of the device's speed"
_BIGGER = "the emulator and the code it translated are in the process"
_OF_THE_EMULATION = {
    "device": _HOST,
    "free memory": _HOST,
    "free card memory": _HOST,
    "peak memory": _BIGGER,
    "unexplained rest": _BIGGER,
    "budget": _BIGGER,
    "host budget": _BIGGER,
    "decode": _SLOW,
    "prefill": _SLOW,
    "first token": _SLOW,
    "decode, context full": _SLOW,
}
"""Items that are not-comparable under an emulator, and why. All others are the server's own doing: what it allocates
by its own log, its slots, what it reuses and what it answers are the same on the device."""
_PAGED = "this machine's memory was short, with the emulator in it"


def _emulated(facts: Facts) -> str | None:
    """What translated the server's instructions: an emulator that started it, or all of the machine."""
    if facts.server.emulator is not None:
        return str(facts.server.emulator)
    return f"a machine that emulates {facts.machine.arch}" if facts.machine.emulated else None


def _under_emulation(item: Item) -> Item:
    if item.name == "device" and item.status == "fail":  # it was to be the very device
        return item
    reason = _OF_THE_EMULATION.get(item.name)
    if item.name == "paging" and item.status != "pass":
        reason = _PAGED
    return item if reason is None else replace(item, status="not-comparable", message=reason)


# ── judgements, in the order in which they are shown ─────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    plan: Plan
    facts: Facts
    same_device: bool
    same_backend: bool

    def at_home(self, status: Status) -> Status:
        """A failure counts as one only on the device that the plan is for, or under an emulator of it."""
        home = (self.same_device or _emulated(self.facts) is not None) and self.same_backend
        return "warn" if status == "fail" and not home else status

    @property
    def driver(self) -> int:
        """Bytes of driver and context that a server on an accelerator may hold beside the plan's parts."""
        return _driver(self.plan) if self.same_backend else 0


def _driver(plan: Plan) -> int:
    """The reserve for the accelerator's context: the budget has it subtracted, and no part predicts it."""
    return 0 if plan.profile.backend == "cpu" else plan.profile.reserves.accelerator_context


def _beside(text: str, driver: int) -> str:
    return f"{text} + up to {show(driver)} accelerator context" if driver else text


def _integrity(facts: Facts) -> Item:
    return Item(
        name="integrity",
        status="pass",
        expected=_short(facts.bundle.manifest_digest),
        measured=f"all {facts.bundle.bytes:,} bytes verified",
    )


def _signature(facts: Facts) -> Item:
    verified = facts.signature.state == "verified"
    return Item(
        name="signature",
        status="pass" if verified else "warn",
        expected="signed by an enrolled key",
        measured=facts.signature.state,
        message="" if verified else facts.signature.message,
    )


def _device(facts: Facts, *, strict: bool) -> Item:
    wrong = [row for row in facts.match if row.status == "fail"]
    if strict and facts.machine.emulated:
        return Item(
            name="device",
            status="fail",
            expected=", ".join(row.fact for row in facts.match),
            measured="emulated",
            message=f"this is {_emulated(facts)}, not the device",
        )
    unknown = [row.fact for row in facts.match if row.status == "unknown"]
    expected = ", ".join(row.fact for row in facts.match)
    if wrong:
        details = "; ".join(f"{row.fact} is {row.measured}, not {row.expected}" for row in wrong)
        message = (
            f"checked on another machine ({details}): speed is not judged, peak memory only warned about"
        )
        return Item(
            name="device",
            status="fail" if strict else "warn",
            expected=expected,
            measured=f"{len(wrong)} of {len(facts.match)} differ",
            message=message,
        )
    if unknown:
        return Item(
            name="device",
            status="warn",
            expected=expected,
            measured="not all can be read",
            message=f"this machine does not tell its {', '.join(unknown)}",
        )
    return Item(name="device", status="pass", expected=expected, measured="all match")


def _preflight(plan: Plan, facts: Facts) -> Iterator[Item]:
    """What was free before the start; too little of it is a warning, since the run itself decides."""
    needs, driver = facts.preflight, _driver(plan)
    limit = f" (limited by {facts.limit.mechanism})" if facts.limit.bytes is not None else ""
    scarce = "less is free than the plan may need"
    shared = driver if plan.budget.unified else 0
    yield _free("free memory", needs.memory_needed, needs.memory_available, shared, scarce, note=limit)
    if needs.device_memory_needed is not None:
        card = _free_card(plan, facts.machine)
        yield _free("free card memory", needs.device_memory_needed, card, driver, scarce)
    unpacked = "less is free than the bundle's files take; those unpacked before are used again"
    yield _free("free disk", needs.disk_needed, needs.disk_free, 0, unpacked)


def _free(name: str, need: int, free: int | None, driver: int, scarce: str, *, note: str = "") -> Item:
    expected = _beside(f"up to {show(need)}", driver)
    if free is None:
        return Item(name=name, status="warn", expected=expected, measured="cannot be read")
    enough = free >= need + driver
    return Item(
        name=name,
        status="pass" if enough else "warn",
        expected=expected,
        measured=f"{show(free)}{note}",
        message="" if enough else scarce,
    )


def _free_card(plan: Plan, machine: MachineFacts) -> int | None:
    """Free memory of the card that the plan names, or of the first one when it names none."""
    wanted = (plan.profile.match.gpu_name or "").lower()
    gpu = next((gpu for gpu in machine.gpus or () if wanted in gpu.name.lower()), None)
    if gpu is None or gpu.memory_total is None or gpu.memory_used is None:
        return None
    return gpu.memory_total - gpu.memory_used


_NOT_RUN = {
    "unsigned": "it is not signed",
    "unenrolled": "nobody said whose key signed it (--allowed-signers)",
    "unverified": "its signature could not be verified here",
    "verified": "another one was chosen",
}


def _server(plan: Plan, facts: Facts) -> Item:
    """Which server was measured, and whether it is the one that was planned with."""
    server, served = facts.server, facts.served
    remarks = []
    if _carried_but_not_run(facts):
        foreign = any(row.fact == "architecture" and row.status == "fail" for row in facts.match)
        why = (
            f"it is for {plan.profile.arch}"
            if served is None and foreign and server.emulator is None
            else _NOT_RUN[facts.signature.state]
        )
        remarks.append(f"the bundle's own was not run: {why}")
    if served is None:
        planned, built = commit(plan.runtime_version), _built_from(server.build or facts.log.build)
        if planned and built and not (planned.startswith(built) or built.startswith(planned)):
            remarks.append(f"commit {built} is not the planned {planned}, so its buffers may differ")
        program = Path(server.program).name if server.source == "bundle" else server.program
        version = built or "commit unknown"
    else:
        if served.version is not None and _public(served.version) != _public(plan.runtime_version):
            remarks.append(
                f"version {served.version} is not the planned {plan.runtime_version}, so what it takes may differ"
            )
        program = server.program if server.code is None else f"edgepack_server, {server.program}"
        version = served.version or "version unknown"
    under = "" if server.emulator is None else f" under {server.emulator}, {server.emulator.cpu}"
    if server.emulator is None and facts.machine.emulated:
        under = f" on {_emulated(facts)}"
    return Item(
        name="server",
        status="warn" if remarks else "pass",
        expected=f"{plan.runtime} {plan.runtime_version}",
        measured=f"{server.source}: {program} ({version}){under}",
        message="; ".join(remarks),
    )


def _carried_but_not_run(facts: Facts) -> bool:
    """Whether the bundle has a server of its own that was not the one measured, nor the same code."""
    carried = facts.bundle.server if facts.served is None else facts.bundle.code
    if facts.served is not None and facts.server.code in (None, carried):
        return False
    return carried is not None and facts.server.source != "bundle"


def _public(version: str) -> str:
    """A version without its local part, as 0.32.0 of 0.32.0+cpu."""
    return version.partition("+")[0]


def _built_from(build: str | None) -> str | None:
    """The commit in "b1-0c1e57098" or "0c1e57098"; None for "unknown" and for a server that did not say."""
    found = re.search(r"(?:^|-)([0-9a-f]{7,40})\Z", build or "")
    return found.group(1) if found else None


def _run(facts: Facts) -> Item:
    failure = facts.failure
    if failure is None:
        seconds = facts.server.load_seconds
        return Item(
            name="run",
            status="pass",
            expected="starts, answers, stops",
            measured=f"ready after {seconds:.1f} s" if seconds is not None else "ran",
        )
    limit = facts.limit
    within = "" if limit.bytes is None else f" with {show(limit.bytes)} of memory ({limit.mechanism})"
    return Item(
        name="run",
        status="fail",
        expected="starts, answers, stops",
        measured=f"{failure.kind} during {failure.stage}",
        message=f"{failure.message}{within}",
    )


def _context(plan: Plan, facts: Facts) -> Iterator[Item]:
    settings, slots, fill = plan.settings, facts.slots, facts.fill
    per_slot = settings.context // settings.slots
    if slots is not None:
        enough = slots.slots == settings.slots and min(slots.tokens) >= per_slot
        yield Item(
            name="slots",
            status="pass" if enough else "fail",
            expected=f"{settings.slots} of {per_slot} tokens",
            measured=f"{slots.slots} of {min(slots.tokens)} tokens",
            message="" if enough else "the server did not allocate the planned context",
        )
    if fill is not None:
        held = min(fill.held_tokens)
        full = held >= fill.target_tokens - 2
        every = fill.slots_filled == fill.slots
        yield Item(
            name="context filled",
            status="pass" if full else "fail",
            expected=f"{fill.target_tokens} tokens in {'every slot' if every else 'one slot'}",
            measured=f"{held} in {fill.slots_filled} of {fill.slots}, {fill.seconds:.1f} s",
            message="" if full else "the context could not be filled",
        )


def _parts(judged: _Judged, residuals: tuple[Residual, ...]) -> Iterator[Item]:
    """One verdict per part that the server reports on its own."""
    for residual in residuals:
        low, high = _allowed(judged, residual)
        slack = _slack(judged.facts, residual.part)
        inside = low - slack <= residual.measured <= high + slack
        status: Status = "pass" if inside else "fail"
        backend_dependent = residual.part in ("compute", "weights")
        yield Item(
            name=residual.part,
            status=judged.at_home(status) if backend_dependent else status,
            expected=show(residual.predicted),
            measured=f"{show(residual.measured)} ({_difference(residual, slack)})",
            message="" if inside else f"{residual.bytes:+,} bytes from the plan ({residual.provenance})",
        )


def _allowed(judged: _Judged, residual: Residual) -> tuple[int, int]:
    """Bytes that the part may have. A server that counts its tensors must count as many bytes as were planned:
    intervals are for how much of them is resident."""
    if judged.facts.served is not None:
        return residual.predicted, residual.predicted
    parts = _named(judged.plan, judged.facts, residual.part)
    low, high = int(sum(p.low for p in parts)), sum(p.high for p in parts)
    return (min(low, judged.plan.memory.part("weights")), high) if residual.part == "weights" else (low, high)


def _difference(residual: Residual, slack: float) -> str:
    if abs(residual.bytes) > slack:
        return f"{residual.relative:+.2%}"
    return "equal, to the log's digit" if slack else "equal, to the byte"


_POOL = {
    "num_blocks": ("KV blocks", "pool_blocks"),
    "kv_cache_tokens": ("KV pool", "pool_tokens"),
    "max_concurrency": ("concurrency", "concurrency"),
}
"""vLLM's start-up numbers (runtimes/vllm.py): the item that each becomes, and the fact that answers it."""


def _pool(plan: Plan, facts: Facts) -> Iterator[Item]:
    """vLLM's pool of KV blocks, which it cuts from the bytes it is given: each number is the plan's or it is wrong."""
    served, start_up = facts.served, plan.start_up
    if served is None or served.runtime != vllm.NAME:
        return
    for promised, (name, fact) in _POOL.items():
        found = getattr(served, fact)
        if found is None or promised not in start_up:
            continue
        unit = {"KV blocks": "", "KV pool": " tokens", "concurrency": " requests of full length"}[name]
        same = round(found, 2) == round(start_up[promised], 2)
        yield Item(
            name=name,
            status="pass" if same else "fail",
            expected=f"{start_up[promised]:,}{unit}",
            measured=f"{found:,}{unit}",
            message="" if same else "vLLM cut another pool out of the bytes it was given",
        )


def _peak(judged: _Judged) -> Iterator[Item]:
    memory = judged.facts.memory
    if memory is None or memory.peak_rss is None or judged.facts.failure is not None:
        return
    used, how = peak_of(judged.plan, memory, judged.facts)
    if used is None:
        expected = show(judged.plan.memory.total)
        yield Item(name="peak memory", status="warn", expected=expected, measured="cannot be read")
    else:
        yield from _total(judged, used, how)
    on_cpu = _server_backend(judged.plan, judged.facts) == "cpu"
    resident = (memory.peak if on_cpu else memory.peak_on_host) or 0
    yield from _budget(
        judged, memory, memory.counted(resident, judged.plan.budget.host, judged.plan.runtime), used
    )


def _total(judged: _Judged, used: int, how: str) -> Iterator[Item]:
    """The peak against the sum of the parts, and what is left of it when all but the process is taken off."""
    estimate, driver = judged.plan.memory, judged.driver
    rest = used - estimate.total
    allowed = max(estimate.high, round(estimate.total * (1 + UNEXPLAINED)))
    least = min(estimate.low, round(estimate.total * (1 - UNEXPLAINED)))
    fits = used <= allowed + driver
    status: Status = "fail" if not fits else "warn" if used < least else "pass"
    yield Item(
        name="peak memory",
        status=judged.at_home(status),
        expected=_beside(f"{show(estimate.total)} [{show(estimate.low)}, {show(estimate.high)}]", driver),
        measured=f"{show(used)} ({rest / estimate.total:+.2%})",
        message=f"by {how}",
    )
    process = estimate.part("process")
    explained = estimate.total - process
    yield Item(
        name="unexplained rest",
        status=judged.at_home("pass" if fits else "fail"),
        expected=_beside(f"process {show(process)}, up to {show(allowed - explained)}", driver),
        measured=show(used - explained),
        message="" if fits else "more memory is used than the parts explain",
    )


def _budget(judged: _Judged, memory: MemoryFacts, resident: int, used: int | None) -> Iterator[Item]:
    """What is used against what the device has to give: in one memory, or on the card and beside it."""
    room = judged.plan.budget
    if room.unified:
        if used is not None:
            yield _within(judged, "budget", used, room.device, judged.driver)
        return
    if _server_backend(judged.plan, judged.facts) != "cpu":
        if memory.gpu is None:
            yield Item(name="budget", status="warn", expected=show(room.device), measured="cannot be read")
        else:
            yield _within(judged, "budget", memory.gpu, room.device, judged.driver)
    yield _within(judged, "host budget", resident, room.host, 0)


def _within(judged: _Judged, name: str, used: int, room: int, driver: int) -> Item:
    within = used <= room + driver
    return Item(
        name=name,
        status=judged.at_home("pass" if within else "fail"),
        expected=_beside(f"at most {show(room)}", driver),
        measured=show(used),
        message="" if within else "more than the device has to give",
    )


def _paging(plan: Plan, facts: Facts) -> Iterator[Item]:
    memory = facts.memory
    if memory is None or memory.major_faults_run is None or not memory.run_seconds:
        return
    faults, swapped, read = memory.major_faults_run, memory.swap or 0, memory.read_bytes_run or 0
    weights = plan.memory.part("weights")
    first = min(read, memory.peak_file if facts.served is not None else max(0, memory.peak_file - weights))
    again = read - first
    bad = faults - first // PAGE > PAGING_PER_SECOND * memory.run_seconds or again > PAGING_SHARE * weights
    yield Item(
        name="paging",
        status="fail" if bad else "warn" if swapped else "pass",
        expected="nothing read again while running",
        measured=f"{show(read)} read, {faults} major faults in {memory.run_seconds:.0f} s, {show(swapped)} swapped",
        message="the memory is not enough: it reads its own pages back from disk" if bad else "",
    )


def _speed(judged: _Judged) -> Iterator[Item]:
    plan, facts, speed = judged.plan, judged.facts, judged.facts.speed
    if speed is None:
        return
    if speed.decode_per_second is not None:
        yield _decode(judged, speed.decode_per_second)
    promise = plan.speed
    yield Item(
        name="prefill",
        status="note",
        expected=f"{promise.prefill:.0f} tok/s [{promise.prefill_low:.0f}, {promise.prefill_high:.0f}]",
        measured=f"{speed.prefill_per_second or 0:.1f} tok/s over {speed.prompt_tokens} tokens",
    )
    yield Item(
        name="first token",
        status="note",
        expected="",
        measured=f"{speed.first_token_seconds or 0:.2f} s after {speed.prompt_tokens} tokens",
    )
    if facts.fill is not None and facts.fill.decode_per_second is not None:
        yield Item(
            name="decode, context full",
            status="note",
            expected=f"{plan.speed.decode_full:.1f} tok/s",
            measured=f"{facts.fill.decode_per_second:.1f} tok/s",
        )


def _decode(judged: _Judged, measured: float) -> Item:
    promise = judged.plan.speed
    status: Status = "pass"
    message = ""
    machine = judged.facts.machine
    others = judged.facts.speed.others_cores if judged.facts.speed else None
    busy = too_busy(machine.cores, machine.load, others)
    if not (judged.same_device and judged.same_backend):
        status, message = "note", busy
    elif busy:
        status = "warn" if measured < promise.decode_low else "pass"
        if status == "warn":
            message = f"not judged: {busy}"
    elif measured < promise.decode_low * SPEED_COLLAPSE:
        status, message = "fail", "far slower than planned"
    elif measured < promise.decode_low:
        status, message = "warn", "slower than planned"
    elif measured > promise.decode_high:
        message = "faster than planned"
    return Item(
        name="decode",
        status=status,
        expected=f"{promise.decode:.1f} tok/s [{promise.decode_low:.1f}, {promise.decode_high:.1f}]",
        measured=f"{measured:.1f} tok/s",
        message=message,
    )


def too_busy(cores: int, load: float, others: float | None) -> str:
    """Why a machine was too busy to judge speed, or to learn it; empty where it was not."""
    if load > BUSY_LOAD * cores:
        return f"the load was {load:.1f} on {cores} cores before the start"
    if others is not None and others > BUSY_OTHERS * cores:
        return f"other programs, or this machine's neighbors, took {others:.1f} of {cores} cores meanwhile"
    return ""


def _turns(facts: Facts) -> Iterator[Item]:
    turns = facts.turns
    if turns is None or turns.second_turn_with_cache is None or turns.second_turn_without_cache is None:
        return
    gain = turns.second_turn_without_cache / max(turns.second_turn_with_cache, 1e-4)
    yield Item(
        name="second turn",
        status="pass" if turns.reused_tokens > 0 else "warn",
        expected="the first turn's KV cache is used again",
        measured=(
            f"{turns.second_turn_with_cache:.2f} s with, {turns.second_turn_without_cache:.2f} s without "
            f"({gain:.1f}x), {turns.reused_tokens} of {turns.second_turn_tokens} tokens reused"
        ),
        message="" if turns.reused_tokens > 0 else "every turn reads the whole conversation again",
    )


def _measured(quality: Quality | None) -> Iterator[Item]:
    """What the artifact lost when it was made: the drift on this device, in the row below, comes on top of it."""
    if quality is None:
        return
    parent = quality.parent
    told = f"perplexity {quality.perplexity.value:.2f}"
    if parent is not None:
        told = f"KL {parent.kl.value:.4f} nats to the parent, {told} ({parent.ppl_loss.value:+.2%})"
    yield Item(name="quality at build", status="note", expected=told, measured="")


def _quality(facts: Facts) -> Iterator[Item]:
    quality = facts.quality
    if quality is None:
        if facts.failure is None and facts.fill is not None:
            yield Item(
                name="quality", status="note", expected="", measured="no answers were recorded at build"
            )
        return
    share = (quality.agree + quality.ties) / quality.probes
    wrong = quality.mean_drift > DRIFT_WRONG or share < AGREEMENT_WRONG
    doubtful = quality.mean_drift > DRIFT or share < AGREEMENT
    yield Item(
        name="quality",
        status="fail" if wrong else "warn" if doubtful else "pass",
        expected=f"drift up to {DRIFT} nats, {AGREEMENT:.0%} same first choice",
        measured=(
            f"drift {quality.mean_drift:.4f} (worst {quality.max_drift:.3f}), "
            f"{quality.agree} of {quality.probes} same and {quality.ties} tied, "
            f"{quality.decode_same} of {quality.decode_tokens} decoded tokens the same"
        ),
        message="the answers are not those recorded at build" if wrong or doubtful else "",
    )


# ── measured parts ───────────────────────────────────────────────────────────────────────────────────


def _residuals(plan: Plan, facts: Facts, *, same_backend: bool) -> Iterator[Residual]:
    """Each part that the server reports on its own; a run that ended before allocating it reports none."""
    log = facts.log
    caches = sum(cache.bytes for cache in log.caches)
    buffers = {
        "weights": log.size("model"),
        "kv_cache": caches or log.size("kv"),
        "recurrent_state": log.size("rs"),
        "compute": log.size("compute"),
        "output": log.size("output"),
    }
    logged = {name: size for name, size in buffers.items() if _log_lines(facts, name)}
    for name, size in (logged if facts.served is None else facts.served.parts).items():
        parts = _named(plan, facts, name, copies=same_backend)
        predicted = sum(part.bytes for part in parts)
        if predicted:
            provenance = "exact" if all(part.provenance == "exact" for part in parts) else "fitted"
            yield Residual(part=name, predicted=predicted, measured=size, provenance=provenance)


def _named(plan: Plan, facts: Facts, name: str, *, copies: bool = True) -> list[Part]:
    """Parts of the plan that one figure of a server covers.

    llama.cpp's copies of weights are model buffers too; another server's weights are its file, with the tables of
    cosines that lie in it, unless it tells them apart.
    """
    names = {name}
    if name == "weights" and facts.served is None and copies:
        names.add("host_copy")
    if name == "weights" and facts.served is not None and "rope_cache" not in facts.served.parts:
        names.add("rope_cache")
    return [part for part in plan.memory.parts if part.name in names]


_LOG_KIND = {
    "weights": "model",
    "kv_cache": "kv",
    "recurrent_state": "rs",
    "compute": "compute",
    "output": "output",
}


def _log_lines(facts: Facts, part: str) -> int:
    return facts.log.lines.get(_LOG_KIND[part], 0)


def _slack(facts: Facts, part: str) -> float:
    """Bytes by which a server's own figure is rounded; edgepack's server counts its tensors."""
    if facts.served is None:
        return LOG_ROUNDING * max(1, _log_lines(facts, part))
    return VLLM_ROUNDING if facts.served.runtime == vllm.NAME else 0.0


def peak_of(plan: Plan, memory: MemoryFacts, facts: Facts) -> tuple[int | None, str]:
    """Peak bytes of the server on host and accelerator together, as far as they count, and by which source."""
    peak, how = memory.peak, memory.peak_source
    if peak is None:
        return None, "nothing"
    if _server_backend(plan, facts) != "cpu":
        resident = memory.peak_on_host or 0
        if memory.nvmap is not None:
            peak, how = resident + memory.nvmap, f"{how} and nvmap"
        elif memory.gpu is not None:
            peak, how = resident + memory.gpu, f"{how} and the GPU's own count"
        elif not plan.budget.unified:  # the system loses nothing to a card with memory of its own
            return None, "nothing"
        else:
            return memory.system_drop, "what the whole system lost (the GPU's share cannot be read)"
    used = memory.counted(peak, plan.memory.total, plan.runtime)
    if used < peak:
        how += f", less {show(peak - used)} of libraries that may be mapped without being used"
    return used, how


def _server_backend(plan: Plan, facts: Facts) -> str:
    """What the server really used: by its buffers' names, or by its own word; the plan's where it gave none."""
    if facts.served is not None:
        return facts.served.backend or plan.profile.backend
    names = [buffer.name for buffer in facts.log.buffers if buffer.kind in ("model", "kv", "compute")]
    return "cuda" if any(name.startswith("CUDA") for name in names) else "cpu"


# ── running it ───────────────────────────────────────────────────────────────────────────────────────

_RAISES: dict[int, Callable[[str], EdgepackError]] = {
    6: lambda text: Untrusted(text, hint="copy or build the bundle again; do not run what is in it"),
    7: lambda text: MissingTool(text, hint="edgepack toolchain install, or --server PATH"),
    10: lambda text: NoSpace(text, hint="free some space, or set EDGEPACK_CACHE to another disk"),
    130: lambda text: Interrupted(text),
}


def check(
    bundle: Path,
    *,
    progress: Progress,
    server: Path | None = None,
    full: bool = False,
    memory_limit: int | None = None,
    allowed_signers: Path | None = None,
    strict_device: bool = False,
    emulate: bool = False,
) -> CheckReport:
    """Runs a bundle on this machine and judges it; the weights are unpacked in the cache, for as long as it takes.

    Our own agent verifies first. The bundle's own agent runs when it is ours, or when its signer is verified;
    otherwise ours runs in its place. ``server``: llama-server, or the Python (for vLLM also its ``vllm``) that runs
    the bundle's runtime. ``emulate`` runs the llama-server of another architecture under QEMU. Raises BadInput,
    Untrusted, MissingTool, NoSpace, Interrupted, and EdgepackError when the agent itself breaks; a device that does
    not carry the bundle is a report.
    """
    if emulate and (memory_limit is not None or strict_device):
        other = "--memory-limit" if memory_limit is not None else "--strict-device"
        raise BadInput(
            f"{other} and --emulate exclude each other",
            hint="the emulator's own memory would be limited too, and it is never the planned device",
        )
    progress.step(f"verifying {bundle.name}")
    found, signature = bundles.verified(bundle, allowed_signers)
    verified = signature.state == "verified"
    measured = bundles.quality_in(found, bundle)
    with bundles.translated(bundle):
        plan = serde.load(Plan, agent.read_document(found, "plan.json"), source="plan.json")
    own = plan.runtime == llama_cpp.NAME
    if not own and emulate:
        raise BadInput(
            f"--emulate is for {llama_cpp.NAME} bundles, and this is one for {plan.runtime}",
            hint="leave it out",
        )
    arch, here = plan.profile.arch, platform.machine()
    emulator = _emulator(arch, here) if emulate else None
    carried = agent.find_file(found, bundles.SERVER) is not None
    if emulator is not None and server is None and not carried:
        raise BadInput(
            f"{bundle.name} carries no llama-server to emulate",
            hint="build it --with-runtime, or give one for its device with --server PATH",
        )
    runs = carried and verified and (emulator is not None or arch == here)
    if server is None and not own:
        server = toolchain.python_for(plan.runtime)
    elif server is None and not runs:
        server = toolchain.find_server() if emulator is None else toolchain.find_static(arch)
    with workspace.scratch("check") as place:
        program, notes = _agent(found, place, verified=verified, foreign=own and arch != here)
        words: list[str | Path] = [sys.executable, program, "check", bundle, "--out", place / "facts.json"]
        words += ["--work", place / "work"]
        words += ["--server", server] if server is not None else []
        words += ["--app", toolchain.app_in(place / "app")] if not own else []
        words += ["--allowed-signers", allowed_signers] if allowed_signers is not None else []
        words += ["--full"] if full else []
        words += ["--memory-limit", str(memory_limit)] if memory_limit is not None else []
        words += ["--emulator", emulator] if emulator is not None else []
        finished = run(words, check=False, on_line=progress.step)
        if finished.returncode not in (0, 5):
            raise _broken(finished.returncode, finished.stdout, plan.runtime)
        facts = facts_from(serde.read_json(place / "facts.json"), source="the agent's facts")
    if own and not emulate and carried and arch != here and toolchain.find_emulator(arch) is not None:
        notes = (*notes, f"--emulate runs the bundle's own {arch} server here, under QEMU")
    return evaluate(plan, facts, strict_device=strict_device, measured=measured, notes=notes)


def _emulator(arch: Arch, here: str) -> Path:
    """The emulator of ``arch`` for a machine that is none. Raises BadInput and MissingTool."""
    if arch == here:
        raise BadInput(
            f"the bundle is for {arch}, as this machine is: nothing to emulate", hint="leave --emulate out"
        )
    found = toolchain.find_emulator(arch)
    if found is None:
        raise MissingTool(
            f"no emulator of {arch}: neither qemu-{arch}-static nor qemu-{arch} is on PATH",
            hint="apt install qemu-user-static",
        )
    return found


def _broken(status: int, output: str, runtime: str = llama_cpp.NAME) -> EdgepackError:
    """The error of an agent that ended without facts: nothing was measured, so it is no failed check."""
    tail = output.strip().splitlines()[-1:] or ["it said nothing"]
    if status == 7 and runtime != llama_cpp.NAME:
        return MissingTool(
            f"the agent ended with status 7: {tail[0]}",
            hint="name a Python that can run it with --server PATH",
        )
    raises = _RAISES.get(status, EdgepackError)
    return raises(f"the agent ended with status {status}: {tail[0]}")


def _agent(
    found: agent.Bundle, folder: Path, *, verified: bool, foreign: bool
) -> tuple[Path, tuple[str, ...]]:
    """The agent to run: the bundle's when it may be, else ours with a note.

    For a ``foreign`` architecture it is ours: an older one takes the carried server for one that runs here.
    """
    ours = Path(agent.__file__)
    carried = agent.find_file(found, "agent.py")
    if carried is None or carried["digest"] == f"sha256:{workspace.sha256_file(ours)}":
        return ours, ()
    if foreign:
        return ours, ("the bundle's agent differs from this edgepack's: ours was run, which knows emulators",)
    if verified:
        theirs = folder / "agent.py"
        theirs.write_bytes(agent.read_file(found, "agent.py"))
        return theirs, ()
    return ours, ("the bundle's agent differs from this edgepack's and nobody vouches for it: ours was run",)


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("a dataclass dumps to an object")
    return value


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]
