"""What a device is: memory as the system reports it, bandwidth per power mode, and what must stay free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from edgepack import serde
from edgepack.errors import BadInput, NotFound
from edgepack.parts import Place
from edgepack.units import Bytes, show

Arch = Literal["x86_64", "aarch64"]
Backend = Literal["cuda", "vulkan", "metal", "cpu"]
DeviceClass = Literal["jetson", "nvidia-discrete", "amd-apu", "apple", "android", "rockchip", "cpu"]
Session = Literal["headless", "desktop"]

_ON_THE_CPU: tuple[DeviceClass, ...] = ("android", "rockchip", "cpu")
"""Classes whose devices run models on the CPU, whatever else they have; the others have an accelerator."""

_NOTHING = Bytes(0)

Arithmetic = tuple[tuple[str, int], ...]
"""Names and signed bytes of what adds up to a budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConstants:
    """Of a device that was measured: seconds per token = bytes read / (efficiency x bandwidth) + overhead x layers."""

    decode_efficiency: float
    """Share of the peak bandwidth that decoding reaches, above 0 and at most 1; what computing takes is in it."""
    layer_overhead_us: float
    """Microseconds per layer and token that no bandwidth explains (launches, synchronization)."""
    prefill_tflops: float | None = None
    """2 x weights in use x tokens per second while reading a prompt, 10^12 per second."""
    relative_interval: float = 0.3
    """Half width of the decode interval, as a share of the prediction."""
    runtime: str = "llama.cpp"
    """The runtime that was measured; for others the class's constants hold."""
    readings: int = 0
    """How many runs of this very device they were fitted on (`edgepack calibrate`); 0 when others published them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerMode:
    name: str
    """Name as in /etc/nvpmodel.conf; mode ids differ per SKU, so they are never used."""
    bandwidth_gbs: float
    """Peak memory bandwidth in this mode, 10^9 bytes per second."""
    fp16_tflops: float | None = None
    """Dense FP16, 10^12 FLOP per second."""
    fp32_tflops: float | None = None
    """Peak single precision of what decodes, 10^12 FLOP per second: a GPU's shaders without its matrix units, a CPU's
    vector units (cores x clock x 2 x lanes x units). None when unknown; then the speed law takes what is usual."""
    speed: SpeedConstants | None = None
    """Constants measured in this mode, where they differ from the profile's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    name: str
    backend: Backend
    compute_capability: str | None = None
    memory: Bytes | None = None
    """Memory of its own as NVML reports it; None when it shares the system's (unified)."""
    largest_allocation: Bytes | None = None
    """Largest single allocation known to succeed; above it is warned. None when no limit is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserves:
    """What the model may not use, per kind of session."""

    os_headless: Bytes
    """System memory in use without a desktop, before the model starts."""
    os_desktop: Bytes
    """The same with a desktop session open."""
    accelerator_context: Bytes
    """Driver and context (CUDA, Vulkan, Metal) of one process; 0 on CPU devices."""
    safety: Bytes
    """Kept free for what no estimate names; on a card of its own once there and once in system memory."""
    display_headless: Bytes = _NOTHING
    """Memory of the card that others hold without a desktop (under WSL: Windows); 0 when unified."""
    display_desktop: Bytes = _NOTHING
    """Memory of the card that a desktop session holds; 0 when unified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeImage:
    runtime: str
    reference: str
    """Registry, repository and exact tag."""
    digest: str = "unknown"
    """sha256:… where it could be read; otherwise "unknown", which is warned about."""
    version: str | None = None
    """Of the runtime inside, where it is not the newest that edgepack knows; plans are for it then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    os: str | None = None
    l4t: tuple[str, ...] = ()
    """L4T majors this profile may run on, e.g. ("36",); empty when not a Jetson."""
    cuda: str | None = None
    service_groups: tuple[str, ...] = ()
    """Groups the service user needs (video, render)."""
    images: tuple[RuntimeImage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """How the device is recognised; every given fact must hold."""

    device_tree: tuple[str, ...] = ()
    """Substrings of /proc/device-tree/{model,compatible}, or on a PC of the product name that its firmware gives
    (/sys/class/dmi/id/product_name), any of which matches."""
    gpu_name: str | None = None
    """Substring of the name that NVML gives."""
    memory_min: Bytes | None = None
    memory_max: Bytes | None = None
    """Bounds on MemTotal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    name: str
    title: str
    device_class: DeviceClass
    arch: Arch
    memory: Bytes
    """System memory that the OS reports (MemTotal), not the number on the box."""
    unified: bool
    """Accelerator and CPU share `memory`; true for CPU-only devices too."""
    accelerator: Accelerator | None = None
    cpu_cores: int
    cpu_features: tuple[str, ...] = ()
    power_modes: tuple[PowerMode, ...]
    """At least one; devices without modes have one called "default"."""
    default_mode: str
    reserves: Reserves
    speed: SpeedConstants | None = None
    """None when nothing was measured on this kind of device."""
    disk: Bytes | None = None
    """Free storage to assume; None when unknown."""
    software: Software = field(default_factory=Software)
    match: Match = field(default_factory=Match)
    aliases: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    """Dotted names of fields that are estimates and are warned about."""
    deployable: bool = True

    @property
    def backend(self) -> Backend:
        return self.accelerator.backend if self.accelerator else "cpu"

    def mode(self, name: str | None = None) -> PowerMode:
        """The named power mode, or the default one. Raises KeyError for a name it does not have."""
        wanted = name or self.default_mode
        for mode in self.power_modes:
            if mode.name == wanted:
                return mode
        raise KeyError(wanted)

    def constants(self, name: str | None = None) -> SpeedConstants | None:
        """Speed constants of the named mode, else of the profile. Raises KeyError like ``mode``."""
        return self.mode(name).speed or self.speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes a model server may use on a device, after the reserves."""

    device: Bytes
    """Where weights on the accelerator live; on unified and CPU devices the one shared pool."""
    host: Bytes
    """System memory; equal to `device` on unified and CPU devices."""
    unified: bool
    session: Session
    arithmetic: Arithmetic
    """Named terms, signed, that add up to `device`; shown in refusals."""
    host_arithmetic: Arithmetic = ()
    """Those that add up to `host`; empty in a plan that does not tell them."""

    def equation(self, place: Place) -> str:
        """``"5.51 GiB = 7.43 GiB memory the system reports - 700.0 MiB operating system (headless) - …"``."""
        total, arithmetic = (
            (self.device, self.arithmetic) if place == "device" else (self.host, self.host_arithmetic)
        )
        terms = [(value < 0, f"{show(abs(value))} {name}") for name, value in arithmetic if value]
        if not terms:  # a plan that somebody wrote by hand
            return show(total)
        (_, first), *rest = terms
        return " ".join(
            [f"{show(total)} = {first}", *(f"{'-' if less else '+'} {term}" for less, term in rest)]
        )


def budget(profile: DeviceProfile, session: Session = "headless") -> Budget:
    """The bytes a model server may use on this device in this kind of session."""
    own = profile.accelerator.memory if profile.accelerator else None
    device, host = _terms(profile.memory, own, profile.reserves, session)
    return Budget(
        device=_total(device),
        host=_total(host),
        unified=own is None,
        session=session,
        arithmetic=device,
        host_arithmetic=host,
    )


def _terms(
    memory: Bytes, own: Bytes | None, reserves: Reserves, session: Session
) -> tuple[Arithmetic, Arithmetic]:
    """Of the accelerator's memory and of the system's; twice the same where they share it."""
    headless = session == "headless"
    system = (
        ("memory the system reports", int(memory)),
        (f"operating system ({session})", -(reserves.os_headless if headless else reserves.os_desktop)),
    )
    context, safety = ("accelerator context", -reserves.accelerator_context), ("safety", -reserves.safety)
    if own is None:
        shared = (*system, context, safety)
        return shared, shared
    display = reserves.display_headless if headless else reserves.display_desktop
    shown = ((f"display ({session})", -display),) if display else ()
    return (("memory the card reports", int(own)), *shown, context, safety), (*system, safety)


def _total(terms: Arithmetic) -> Bytes:
    return Bytes(sum(value for _, value in terms))


# ── profiles on disk ─────────────────────────────────────────────────────────────────────────────────

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_NOT_INHERITED = ("extends", "aliases")


def folder() -> Path:
    """Where the built-in profiles are: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_data" / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def names() -> tuple[str, ...]:
    """Names of all built-in profiles, sorted."""
    return tuple(sorted(path.stem for path in folder().glob("*.yaml")))


def load(name_or_path: str) -> DeviceProfile:
    """A built-in profile by name or alias, or the profile in a YAML file; ``extends:`` is merged in.

    Raises NotFound with near names, and BadInput with all problems of the file.
    """
    return _read(_locate(name_or_path, beside=Path()), ())


def schema() -> dict[str, object]:
    """JSON Schema of a profile file, for editors; a file that extends another may leave fields out."""
    document = serde.json_schema(DeviceProfile)
    required, properties, definitions = document["required"], document["properties"], document["$defs"]
    if not isinstance(properties, dict) or not isinstance(definitions, dict):
        raise TypeError("a dataclass's schema has properties")
    whole: dict[str, object] = {}
    for f in fields(DeviceProfile):
        for kind in (definitions.get(name) for name in re.findall(r"\w+", str(f.type))):
            if kind is not None and "tuple" not in str(f.type):
                needed = kind.pop("required", None)
                whole.update({f.name: {"required": needed}} if needed else {})
    extends = {
        "type": "string",
        "description": "A built-in profile or a file; its fields hold where this one gives none.",
    }
    return {
        **{key: value for key, value in document.items() if key != "required"},
        "title": "edgepack device profile",
        "properties": {"extends": extends, **properties},
        "if": {"required": ["extends"]},
        "then": {"required": ["name"]},
        "else": {"required": required, "properties": whole},
    }


def _locate(wanted: str, *, beside: Path) -> Path:
    if wanted.endswith((".yaml", ".yml")) or os.sep in wanted:
        path = beside / wanted
        if not path.is_file():
            raise NotFound(f"profile file {path} does not exist", hint="see edgepack profiles list")
        return path
    known = names()
    if wanted in known:
        return folder() / f"{wanted}.yaml"
    aliases = _aliases()
    if wanted in aliases:
        return folder() / f"{aliases[wanted]}.yaml"
    near = serde.did_you_mean(wanted, (*known, *aliases))
    raise NotFound(
        f"no profile is called {wanted!r}{near}",
        hint=f"built in are {', '.join(known)}; a path to a YAML file works too",
    )


def _aliases() -> dict[str, str]:
    """Alias -> name, from the built-in files."""
    result: dict[str, str] = {}
    for name in names():
        data, _ = serde.read_yaml(folder() / f"{name}.yaml")
        own = data.get("aliases") if isinstance(data, dict) else None
        if isinstance(own, list):
            result.update({alias: name for alias in own if isinstance(alias, str)})
    return result


def _read(path: Path, chain: tuple[Path, ...]) -> DeviceProfile:
    data, lines = _merged(path, chain)
    return serde.load(
        DeviceProfile,
        data,
        source=str(path),
        lines=lines,
        rule=_rule,
        hint="edgepack profiles schema prints the format; edgepack profiles show NAME an example",
    )


def _merged(path: Path, chain: tuple[Path, ...]) -> tuple[object, serde.Lines]:
    """The file over what it extends; lines are those of the file itself."""
    here = path.resolve()
    if here in chain:
        raise BadInput(f"{path} extends itself through {' -> '.join(p.name for p in (*chain, here))}")
    data, lines = serde.read_yaml(path)
    if not isinstance(data, dict) or "extends" not in data:
        return data, lines
    parent = data["extends"]
    if not isinstance(parent, str):
        raise BadInput(f"{path}: line {lines[('extends',)]}: extends: {parent!r} is not a name or a path")
    below = _locate(parent, beside=path.parent)
    _read(below, (*chain, here))  # so that its problems are reported with its own lines
    base, _ = _merged(below, (*chain, here))
    if not isinstance(base, dict):
        raise BadInput(f"{below} is not a profile")
    kept = {key: value for key, value in base.items() if key not in _NOT_INHERITED}
    own = {key: value for key, value in data.items() if key != "extends"}
    return _over(kept, own), lines


def _over(base: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """``own`` over ``base``: sets of fields merge, everything else (lists too) replaces."""
    result = dict(base)
    for key, value in own.items():
        below = result.get(key)
        result[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _rule(loaded: Mapping[str, object]) -> Iterator[tuple[serde.Place, str]]:
    """What the types cannot say about a profile."""
    name = loaded.get("name")
    if isinstance(name, str) and not NAME.match(name):
        yield ("name",), f"{name!r} must be lower-case letters, digits, dots and dashes"
    if loaded.get("memory") == 0:
        yield ("memory",), "must be more than 0"
    cores = loaded.get("cpu_cores")
    if isinstance(cores, int) and cores < 1:
        yield ("cpu_cores",), f"{cores} is not a number of cores"
    modes = loaded.get("power_modes")
    if isinstance(modes, tuple):
        yield from _mode_problems(modes, loaded.get("default_mode"))
    yield from _accelerator_problems(loaded)
    speed = loaded.get("speed")
    if isinstance(speed, SpeedConstants):
        yield from _speed_problems(("speed",), speed)
    software = loaded.get("software")
    if isinstance(software, Software):
        for at, image in enumerate(software.images):
            yield from _image_problems(("software", "images", at), image)
    uncertain = loaded.get("uncertain")
    if isinstance(uncertain, tuple):
        for at, dotted in enumerate(uncertain):
            if not _is_field(loaded, dotted):
                near = serde.did_you_mean(dotted, (f.name for f in fields(DeviceProfile)))
                yield ("uncertain", at), f"{dotted!r} is not a field of the profile{near}"


def _mode_problems(modes: tuple[PowerMode, ...], default: object) -> Iterator[tuple[serde.Place, str]]:
    named = [mode.name for mode in modes]
    if not modes:
        yield ("power_modes",), 'is empty; a device without modes has one called "default"'
    for at, mode in enumerate(modes):
        if mode.bandwidth_gbs <= 0:
            yield ("power_modes", at, "bandwidth_gbs"), f"{mode.bandwidth_gbs} is not a bandwidth"
        if mode.fp16_tflops is not None and mode.fp16_tflops <= 0:
            yield ("power_modes", at, "fp16_tflops"), f"{mode.fp16_tflops} is not a rate"
        if mode.fp32_tflops is not None and mode.fp32_tflops <= 0:
            yield ("power_modes", at, "fp32_tflops"), f"{mode.fp32_tflops} is not a rate"
        if mode.name in named[:at]:
            yield ("power_modes", at, "name"), f"{mode.name!r} is given twice"
        if mode.speed is not None:
            yield from _speed_problems(("power_modes", at, "speed"), mode.speed)
    if isinstance(default, str) and named and default not in named:
        near = serde.did_you_mean(default, named)
        yield ("default_mode",), f"{default!r} is not one of {', '.join(named)}{near}"


def _accelerator_problems(loaded: Mapping[str, object]) -> Iterator[tuple[serde.Place, str]]:
    if not {"device_class", "unified", "memory", "reserves"} <= set(loaded):
        return
    kind, unified, accelerator = loaded["device_class"], loaded["unified"], loaded.get("accelerator")
    if kind in _ON_THE_CPU and accelerator is not None:
        yield ("accelerator",), f"a device of class {kind} has none"
    if kind in _ON_THE_CPU and not unified:
        yield ("unified",), f"is true for a device of class {kind}"
    own: Bytes | None = None
    if isinstance(accelerator, Accelerator):
        own = accelerator.memory
        if unified and own is not None:
            yield ("accelerator", "memory"), "a unified device has no memory of the accelerator's own"
        if not unified and own is None:
            yield ("accelerator", "memory"), "is missing; only unified devices have none"
    elif kind not in _ON_THE_CPU:
        yield ("accelerator",), f"is missing; a device of class {kind} has one"
    reserves, memory = loaded["reserves"], loaded["memory"]
    if not isinstance(reserves, Reserves) or not isinstance(memory, int):
        return
    for session in get_args(Session):
        for terms in dict.fromkeys(_terms(Bytes(memory), own, reserves, session)):
            (name, there_is), *taken = terms
            if _total(terms) <= 0:
                of = f"{show(there_is)} of {name}, {session}"
                yield ("reserves",), f"take {show(-_total(tuple(taken)))}, all the {of}"
                return


def _speed_problems(place: serde.Place, speed: SpeedConstants) -> Iterator[tuple[serde.Place, str]]:
    if not 0 < speed.decode_efficiency <= 1:
        yield (*place, "decode_efficiency"), f"{speed.decode_efficiency} is not above 0 and at most 1"
    if speed.layer_overhead_us < 0:
        yield (*place, "layer_overhead_us"), f"{speed.layer_overhead_us} is below 0"
    if speed.prefill_tflops is not None and speed.prefill_tflops <= 0:
        yield (*place, "prefill_tflops"), f"{speed.prefill_tflops} is not a rate"
    if speed.readings < 0:
        yield (*place, "readings"), f"{speed.readings} is below 0"
    if not 0 <= speed.relative_interval < 1:
        yield (*place, "relative_interval"), f"{speed.relative_interval} is not between 0 and 1"


def _image_problems(place: serde.Place, image: RuntimeImage) -> Iterator[tuple[serde.Place, str]]:
    if image.digest != "unknown" and not _DIGEST.match(image.digest):
        yield (*place, "digest"), f"{image.digest!r} is neither sha256: with 64 hex digits nor unknown"
    _, colon, tag = image.reference.rpartition("/")[2].partition(":")
    if not colon or not tag:
        yield (*place, "reference"), f"{image.reference!r} has no tag"
    elif tag.startswith("latest") and image.digest == "unknown":
        yield (*place, "reference"), f"the tag {tag!r} moves; give an exact one or its digest"


def _is_field(loaded: Mapping[str, object], dotted: str) -> bool:
    first, *rest = dotted.split(".")
    if first not in {f.name for f in fields(DeviceProfile)}:
        return False
    value = loaded.get(first)
    for step in rest:
        if value is None or isinstance(value, tuple):
            return True  # did not load, or one of several: nothing to compare with
        if step not in getattr(type(value), "__dataclass_fields__", {}):
            return False
        value = getattr(value, step)
    return True
