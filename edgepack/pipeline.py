"""The whole job in order: choose, fetch, convert and quantize, record, render, sign. Read this first."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import (
    catalog,
    choice,
    degradation,
    fit,
    modelspec,
    plan,
    profile,
    runtimes,
    schemes,
    serde,
    students,
    workspace,
)
from edgepack.artifact import Artifact, Checkpoint, joint_license
from edgepack.errors import BadInput, BuildFailed, MissingTool, NotFound, NothingFits, Unsupported
from edgepack.plan import Candidate, ModelRef, Plan, Request
from edgepack.profile import Session
from edgepack.progress import Progress, Silent
from edgepack.runtimes import Machine, llama_cpp
from edgepack.students import Prune
from edgepack.units import parse_bytes, parse_share

if TYPE_CHECKING:
    from edgepack import distillation, quantization
    from edgepack.builders.distill import Recipe
    from edgepack.bundle import Bundle
    from edgepack.calibrate import Calibration

DEFAULT_SCHEME = "Q4_K_M"
"""For `fit` without --scheme: what most published GGUF files are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a build needs beside the plan."""

    out: Path
    quantization: quantization.Options
    """Calibration, and what the artifact may lose."""
    key: Path | None = None
    """ed25519 private key; None leaves the bundle unsigned."""
    with_runtime: bool = False
    image_digest: str | None = None
    sequence: int = 1
    """release_sequence: devices refuse a lower one than they run."""
    offline: bool = False
    distillation: distillation.Options | None = None
    """How a student that is still to be made is taught; None: the default way, on the built-in text."""


def candidates(
    model: str | None,
    teacher: str | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    extra: Sequence[catalog.CatalogModel] = (),
    distill: bool = False,
    converted: bool = True,
) -> list[Candidate]:
    """The models to choose from: one that is named, the students of a teacher, or the catalog.

    Of the catalog those that edgepack can build; the ones it only plans for are there by name, and so are the built-in
    ones, which are for trying things out. ``extra``: models of a user's catalog, which come before those of the same
    id. ``distill``: what a student of the teacher can begin as, smaller models of its family and what is kept of
    itself; a build teaches it. ``converted``: whether a named model is to become a GGUF.

    Raises BadInput, NotFound, Offline, Unsupported.
    """
    if distill and (teacher is None or model is not None):
        raise BadInput(
            "--distill makes a student of a teacher", hint="--teacher T --distill, without --model"
        )
    if model is not None:
        return [named(model, revision=revision, offline=offline, extra=extra, converted=converted)]
    hidden = {m.id for m in extra}
    everything = (*extra, *(m for m in catalog.models() if m.id not in hidden))
    if teacher is not None:
        if distill:
            return _distilled(teacher, everything, revision=revision, offline=offline, extra=extra)
        itself = [m for m in everything if teacher.lower() in (m.id.lower(), m.repo.lower())]
        family = [*itself, *_taught_by((teacher,), everything)]
        if not family:
            names = sorted({m.teacher for m in everything if m.teacher} | {m.id for m in everything})
            raise NotFound(f"no student of {teacher} is known", hint=f"teachers known: {', '.join(names)}")
        return [_from_catalog(m) for m in family]
    own = catalog.built_in()
    return [_from_catalog(m) for m in everything if m.repo not in own and modelspec.converts(m.config)]


def named(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    extra: Sequence[catalog.CatalogModel] = (),
    converted: bool = True,
) -> Candidate:
    """A catalog id, a built-in model, a folder, a config.json, a GGUF file or a Hub id, as a candidate.

    Of a Hub repository only config and tokenizer are fetched. ``converted``: whether it is to become a GGUF. Raises
    NotFound, Offline, Unsupported.
    """
    entry = catalog.find(model, extra)
    path = Path(model)
    if entry is not None and not path.exists():
        return _from_catalog(entry, revision=revision)
    if not path.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            known = [m.id for m in catalog.models()]
            raise NotFound(
                f"there is no model {model!r}, as a file or in the catalog{serde.did_you_mean(model, known)}",
                hint=f"a folder, config.json, .gguf, Hub id (org/name), or one of: {', '.join(known)}",
            )
        return _from_hub(model, revision=revision, offline=offline, converted=converted)
    from edgepack import hub

    spec = read_model(path, converted=converted)
    license_name = hub.license_in(path if path.is_dir() else path.parent)
    reference = ModelRef(
        id=path.stem if path.is_file() and path.suffix == ".gguf" else spec.name,
        source=str(path),
        revision=None,
        architecture=spec.family,
        parameters=spec.parameters,
        license=license_name,
        commercial=catalog.allows_commerce(license_name),
    )
    return Candidate(model=reference, spec=spec, panels={})


def extra_models(options: Mapping[str, Any]) -> tuple[catalog.CatalogModel, ...]:
    """Models of the file that --catalog names."""
    given = options.get("catalog")
    return () if given is None else catalog.read(given)


def read_model(path: Path, *, converted: bool = True) -> modelspec.ModelSpec:
    """The shapes of a model; of a Hugging Face folder with a tokenizer also the exact size of its GGUF header.

    ``converted``: whether it is to become a GGUF at all; what cannot is then refused here. Raises Unsupported.
    """
    spec = modelspec.read(path)
    if not converted:
        return spec
    tokenizer = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if not path.is_dir() or not tokenizer or spec.family not in modelspec.CONVERTED:
        return spec
    from edgepack.builders import convert

    return replace(spec, header_bytes=convert.header_size(path))


def shapes(options: Mapping[str, Any]) -> Callable[[Plan], modelspec.ModelSpec | None]:
    """The shapes of a plan's model: of the one that is named, else of the catalog's; None where neither has it.

    What a plan names is looked up and never opened: it may be a stranger's.
    """
    given = named(options["model"]).spec if options.get("model") else None
    extra = extra_models(options)

    def known(chosen: Plan) -> modelspec.ModelSpec | None:
        entry = catalog.find(chosen.model.id, extra)
        return entry.spec() if entry is not None else given

    return known


def make_plan(request: Request, models: Sequence[Candidate]) -> Plan:
    """Surveys all candidates and returns the best plan; raises NothingFits with the nearest one."""
    if len(models) == 1 and models[0].spec.gguf_types is not None and request.scheme is None:
        request = replace(request, scheme=models[0].spec.gguf_scheme)
    chosen = choice.choose(list(plan.survey(request, models)), request, models)
    if chosen.model.lesson is None:
        return chosen
    teachers = [model.teacher for model in models if model.teacher is not None]
    return replace(chosen, warnings=(*chosen.warnings, *_teacher_fits(chosen, request, teachers[0])))


def _teacher_fits(chosen: Plan, request: Request, teacher: Candidate) -> tuple[str, ...]:
    """A warning where the teacher itself runs on the device, and is surely no worse than its student is hoped to be."""
    try:
        whole = choice.choose(list(plan.survey(request, [teacher])), request, [teacher])
    except NothingFits:
        return ()
    if whole.quality.panel != chosen.quality.panel or whole.quality.low < chosen.quality.score:
        return ()
    return (
        f"the teacher itself runs here: {plan.label(whole)} scores {whole.quality.score:.1f} against "
        f"{chosen.quality.score:.1f}, and decodes {whole.speed.decode_full:.1f} tok/s against "
        f"{chosen.speed.decode_full:.1f} with a full context",
    )


def build(chosen: Plan, options: BuildOptions, progress: Progress) -> tuple[Plan, Bundle]:
    """Makes the bundle a plan describes. Every stage resumes; nothing half-written is ever visible."""
    from edgepack import bundle, hub, quantization, selftest, toolchain  # here, for plan must start at once
    from edgepack.builders import convert
    from edgepack.bundle import sign

    is_gguf = schemes.is_gguf(chosen.scheme)
    if not chosen.profile.deployable:
        raise Unsupported(
            f"{chosen.profile.name} is for planning only", hint="edgepack profiles list marks such profiles"
        )
    if (
        is_gguf
        and chosen.model.architecture not in modelspec.CONVERTED
        and not chosen.model.source.endswith(".gguf")
    ):
        raise convert.planning_only(chosen.model.id, chosen.model.architecture)
    if options.with_runtime and chosen.profile.backend != "cpu":
        raise Unsupported(
            f"--with-runtime carries a CPU server, and {chosen.profile.name} runs on {chosen.profile.backend}",
            hint="leave it out: the bundle names an image (docker/ has its Dockerfile)",
        )
    if options.with_runtime and chosen.runtime != llama_cpp.NAME:
        raise Unsupported(
            f"--with-runtime carries a llama-server, and {chosen.runtime} is a Python library",
            hint="leave it out: requirements.txt in the bundle says what the device's Python needs",
        )
    if is_gguf and not schemes.is_budget(chosen.scheme) and chosen.imatrix != options.quantization.weighted:
        wanted = "an importance matrix" if chosen.imatrix else "no importance matrix"
        raise BadInput(
            f"the plan counts with {wanted}",
            hint="give or leave out --calibration or --imatrix FILE accordingly",
        )
    if options.key is not None:
        sign.usable_key(options.key)
    progress.step(f"plan     {plan.label(chosen)} for {chosen.profile.name}")
    # Its small files first: a hub that cannot be reached, or has no such model, is told before minutes of compiling.
    source, revision = chosen.model.source, chosen.model.revision
    if chosen.model.lesson is not None:
        source, revision = chosen.model.lesson.teacher, chosen.model.lesson.revision
    hub.resolve(source, revision=revision, offline=options.offline, weights=False, progress=progress)
    program = toolchain.install(progress).server if is_gguf else _python(chosen.runtime, progress)
    if chosen.model.lesson is not None:
        checkpoint = _student(chosen, options, progress)
    else:
        checkpoint = hub.resolve(
            chosen.model.source, revision=chosen.model.revision, offline=options.offline, progress=progress
        )
    spec = read_model(checkpoint.path, converted=is_gguf)
    _same_model(chosen, spec)
    folder = workspace.cache_root() / "artifacts"
    settings = chosen.settings
    how = replace(
        options.quantization, plan=chosen, backend=chosen.profile.backend,
        context=settings.context // settings.slots, kv_type=settings.kv_type if is_gguf else "f16",
    )  # fmt: skip
    weights = quantization.make(checkpoint, spec, chosen.scheme, how, folder, progress)
    exact = plan.with_spec(chosen, weights.spec, _with_provenance(chosen.model, checkpoint))
    artifact = weights.artifact
    for warning in weights.warnings:
        progress.step(f"warning: {warning}")
    _same_size(exact, artifact)
    progress.step("probe    recording what the artifact answers, to be compared on the device")
    answers = selftest.record(artifact, exact, program, folder, progress)
    runtime = toolchain.static_runtime(exact.profile.arch, progress) if options.with_runtime else None
    out = options.out / f"{exact.name}.tar"
    made = bundle.write(
        exact,
        artifact,
        out,
        key=options.key,
        runtime=runtime,
        sequence=options.sequence,
        image_digest=options.image_digest,
        selftest=answers,
        quality=weights.quality,
        checkpoint=checkpoint,
        progress=progress,
    )
    workspace.write_text(options.out / f"{exact.name}.plan.json", serde.to_json(exact))
    return exact, made


def _python(runtime: str, progress: Progress) -> Path | None:
    """The Python here that can run what is built, to record its answers; None, with a warning, where there is none."""
    from edgepack import toolchain

    try:
        return toolchain.python_for(runtime)
    except MissingTool as error:
        progress.step(f"warning: no answers are recorded for the check: {error.message} ({error.hint})")
        return None


def request_from(options: Mapping[str, Any]) -> Request:
    """The planner's question out of the command line's words; a profile is required."""
    name = options.get("profile")
    if not name:
        raise BadInput(
            "no device is named",
            hint="--profile NAME, or --profile FILE of one that `edgepack probe -o FILE` wrote on the device; "
            f"built in are {', '.join(profile.names())}",
        )
    floor = options.get("min_decode")
    if floor is not None and not math.isfinite(floor):
        raise BadInput(f"--min-tokens-per-second {floor} is no speed", hint="0 switches the floor off")
    _a_token_for_each_slot(options)
    return Request(
        profile=profile.load(name),
        session="desktop" if options.get("desktop") else "headless",
        power_mode=options.get("power_mode"),
        context=options.get("context"),
        slots=options["slots"],
        kv_type=options.get("kv_type"),
        scheme=_scheme(options),
        ubatch=options["ubatch"],
        imatrix=bool(options.get("imatrix")),
        min_decode=options.get("min_decode"),
        goal=options.get("goal") or "quality",
        licenses=tuple(options.get("licenses") or ()),
        disk=parse_bytes(options["disk"]) if options.get("disk") else None,
        force=bool(options.get("force")),
        runtime=_runtime(options),
        budgeted=bool(options.get("budgeted")),
    )


def quantize(options: Mapping[str, Any], folder: Path, progress: Progress) -> quantization.Account:
    """Makes the artifact in ``folder``, or says what it would weigh: where it is, and its record."""
    from edgepack import hub, quantization, record

    scheme = _scheme_or_preset(options)
    device = profile.load(options["profile"]) if options.get("profile") else None
    converted = schemes.is_gguf(scheme)
    model = named(
        options["model"],
        revision=options.get("revision"),
        offline=bool(options.get("offline")),
        converted=converted,
    )
    context = options["context"] or min(plan.DEFAULT_CONTEXT, model.spec.context_train)
    how = replace(quantization_options(options), backend=device.backend if device else "cpu", context=context)
    if schemes.is_budget(scheme):
        filled = _fill(scheme, model, device, context)
        scheme, how = filled.scheme, replace(how, plan=filled, kv_type=filled.settings.kv_type)
        weights: int = int(sum(part.high for part in filled.memory.parts if part.name == "weights"))
    else:
        weights = schemes.weights_bytes(model.spec, scheme, imatrix=how.weighted, backend=how.backend)
    stem = f"{model.model.id.rsplit('/', 1)[-1].lower()}-{scheme.lower()}"
    out = folder / (f"{stem}.gguf" if schemes.is_gguf(scheme) else stem)
    account = quantization.Account(
        path=out,
        scheme=scheme,
        predicted_tensor_bytes=weights,
        provenance="fitted" if schemes.is_budget(scheme) else "exact",
    )
    if options["dry_run"]:
        return account
    _require_writable(out, weights)
    checkpoint = hub.resolve(
        model.model.source,
        revision=model.model.revision,
        offline=bool(options.get("offline")),
        progress=progress,
    )
    made = quantization.make(
        checkpoint,
        read_model(checkpoint.path, converted=converted),
        scheme,
        how,
        workspace.cache_root() / "artifacts",
        progress,
    )
    quantization.publish(made, out, progress)
    return replace(account, record=record.shown(made.record), warnings=made.warnings)


FILLS = ("torch", "transformers", "accelerate", "tokenizers", "highspy")


def _require_writable(out: Path, size: int) -> None:
    """Raises BadInput or NoSpace, before hours of work, for a place where the artifact cannot be put."""
    place = out.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadInput(f"{place} cannot be written into", hint="choose another folder with -o")
    if out.exists() and out.is_dir() != (out.suffix != ".gguf"):
        raise BadInput(
            f"{out} is there already and is not overwritten", hint="choose another -o, or remove it"
        )
    workspace.require_space(place, size)


def fills_budgets() -> bool:
    """Whether what chooses the types of a GGUF for a budget is installed (extra quant)."""
    return all(importlib.util.find_spec(name) is not None for name in FILLS)


def _fill(scheme: str, model: Candidate, device: profile.DeviceProfile | None, context: int) -> Plan:
    """The plan whose weights a budget's artifact fills."""
    if device is None:
        raise BadInput(
            f"{scheme} fills the memory of a device, and none is named",
            hint=f"--profile NAME; known: {', '.join(profile.names())}",
        )
    request = Request(profile=device, scheme=scheme, context=context, imatrix=True, min_decode=0.0)
    return make_plan(request, [model])


def quantization_options(options: Mapping[str, Any]) -> quantization.Options:
    """What the command line says about calibration and quality."""
    from edgepack import quality, quantization

    if options["max_kl"] is not None and not math.isfinite(options["max_kl"]):
        raise BadInput(f"--max-kl {options['max_kl']} limits nothing", hint="nats a token, e.g. 0.05")

    return quantization.Options(
        calibration=tuple(options["calibration_files"]),
        calibration_tokens=options["calibration_tokens"],
        seed=options["seed"],
        imatrix=options["imatrix_file"],
        threads=options["jobs"] or len(os.sched_getaffinity(0)),
        measured=not options["no_quality"],
        text=options["quality_text"],
        tokens=options["quality_tokens"] or quality.TOKENS,
        limits=quantization.Limits(
            max_kl=options["max_kl"],
            max_ppl_loss=parse_share(options["max_ppl_loss"]) if options["max_ppl_loss"] else None,
        ),
    )


def fit_document(options: Mapping[str, Any], progress: Progress) -> fit.FitDocument:
    """The JSON document of ``edgepack fit``; with ``exact`` also llama.cpp's own figures."""
    _a_token_for_each_slot(options)
    device = profile.load(options["profile"]) if options.get("profile") else None
    if device is None and (options.get("power_mode") or options.get("desktop")):
        raise BadInput("--power-mode and --desktop are a device's", hint="name it with --profile")
    if device is not None:
        plan.power_mode(device, options.get("power_mode"))
    machine = Machine.of(device) if device else Machine(backend="cuda")
    asked = _scheme(options)
    wanted = _runtime(options)
    if wanted is None and asked and not schemes.is_gguf(asked):
        wanted = runtimes.reading(asked, machine)[0].NAME
    runtime = runtimes.named(wanted or llama_cpp.NAME)
    spec = named(options["model"], extra=extra_models(options), converted=runtime is llama_cpp).spec
    default = spec.gguf_scheme or DEFAULT_SCHEME if runtime is llama_cpp else runtime.SCHEMES[0]
    scheme = asked or schemes.canonical(default)
    context = options.get("context") or min(plan.DEFAULT_CONTEXT, spec.context_train) * options["slots"]
    kv_type = options.get("kv_type") or runtime.kv_types(machine)[0]
    settings = runtime.settings_for(
        device, context=context, slots=options["slots"], kv_type=kv_type, ubatch=options["ubatch"]
    )
    session: Session = "desktop" if options.get("desktop") else "headless"
    result = fit.fit(
        spec,
        profile=device,
        session=session,
        scheme=scheme,
        settings=settings,
        imatrix=bool(options["imatrix"]),
        runtime=runtime.NAME,
    )
    document = fit.to_document(result)
    if options.get("exact"):
        if schemes.is_budget(scheme):
            raise Unsupported(
                f"--exact asks for types, and {scheme} has none before a build", hint="leave it out"
            )
        if runtime is not llama_cpp:
            raise Unsupported(
                f"--exact asks {llama_cpp.NAME}, and this is for {runtime.NAME}", hint="leave it out"
            )
        from edgepack import toolchain
        from edgepack.builders import exact

        told = exact.exact(
            spec,
            scheme,
            settings,
            imatrix=bool(options["imatrix"]),
            toolchain=toolchain.install(progress),
        )
        document["exact"] = {
            "weights_bytes": int(told.tensor_bytes),
            "file_bytes": None if told.file_bytes is None else int(told.file_bytes),
            "kv_cache_bytes": int(told.kv_cache),
            "recurrent_state_bytes": int(told.recurrent_state),
            "compute_bytes": int(told.compute),
            "output_bytes": int(told.output),
            "provenance": "measured",
            "note": "llama.cpp's CPU buffers, printed in hundredths of a MiB",
        }
    return document


def calibrate(
    name: str,
    *,
    power_mode: str | None,
    files: Sequence[Path],
    measure: bool,
    catalog_file: Path | None,
    beside: Path,
    progress: Progress,
) -> tuple[Calibration, str]:
    """The constants fitted on the files' readings, or on two models run here, and the profile that has them.

    ``beside``: folder that the profile is to be written to, which a base given as a file is named from. Raises BadInput
    when there is nothing to read or nothing that can be used, NotFound, MissingTool.
    """
    from edgepack import calibrate as calibrations

    if bool(files) == measure:
        raise BadInput(
            "give readings with --from FILE, or --run to measure here"
            if not files
            else "--from and --run exclude each other"
        )
    device = profile.load(name)
    mode = plan.power_mode(device, power_mode)
    readings: list[calibrations.Reading] = []
    refused: list[calibrations.Refused] = []
    extra = () if catalog_file is None else catalog.read(catalog_file)
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise NotFound(f"{', '.join(missing)} does not exist", hint="check the path")
    for path in files:
        some, others = calibrations.read(path, device, mode, extra=extra)
        readings, refused = readings + some, refused + others
    warnings: list[str] = []
    if measure:
        from edgepack import toolchain

        tools = toolchain.find()
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if busy := calibrations.too_busy(cores, load, None):
            warnings.append(f"{busy}: do it again on an idle machine")
        with workspace.scratch("calibrate") as folder:
            readings, refused = calibrations.measure(device, tools, folder, progress)
    found = calibrations.calibrate(device, mode, readings, refused, warnings=warnings)
    base = os.path.relpath(name, beside) if Path(name).is_file() else name
    return found, calibrations.to_yaml(found, base=base)


def _a_token_for_each_slot(options: Mapping[str, Any]) -> None:
    context, slots = options.get("context"), options["slots"]
    if context is not None and context < slots:
        raise BadInput(
            f"--context {context} leaves no token for each of {slots} slots",
            hint="--context is that of all slots together",
        )


def read_plan(path: Path) -> Plan:
    """A plan that `edgepack plan -o` or an earlier build wrote; every problem at once."""
    document = serde.read_object(path)
    document.pop("explanation", None)  # of `plan --explain -o`, which a report shows
    return serde.load(Plan, document, source=str(path))


def _runtime(options: Mapping[str, Any]) -> str | None:
    """The runtime asked for; None leaves it to the scheme. Raises Unsupported for one that is not known."""
    wanted: str | None = options.get("runtime")
    return runtimes.named(wanted).NAME if wanted else None


def _scheme_or_preset(options: Mapping[str, Any]) -> str:
    """The scheme of ``edgepack quantize``. Raises BadInput when there is none, or one too many."""
    from edgepack import quantization

    preset = options.get("preset")
    scheme = quantization.PRESETS[preset] if preset else _scheme(options)
    if preset and options.get("scheme"):
        raise BadInput("--scheme and --preset exclude each other: a preset is a scheme", hint="leave one out")
    if scheme is None:
        raise BadInput(
            "name a scheme or a preset", hint="--scheme Q4_K_M, gptq-int4-g128 … or --preset article"
        )
    return scheme


def _scheme(options: Mapping[str, Any]) -> str | None:
    """The scheme asked for by its own name: bf16 is GGUF's unless another runtime than llama.cpp is asked for."""
    asked: str | None = options.get("scheme")
    if not asked:
        return None
    ours = (options.get("runtime") or llama_cpp.NAME) == llama_cpp.NAME
    return schemes.canonical(asked.upper() if ours and asked.upper() in schemes.GGUF else asked.lower())


def _from_hub(repository: str, *, revision: str | None, offline: bool, converted: bool) -> Candidate:
    from edgepack import hub

    checkpoint = hub.resolve(repository, revision=revision, offline=offline, weights=False, progress=Silent())
    spec = read_model(checkpoint.path, converted=converted)
    reference = ModelRef(
        id=repository,
        source=repository,
        revision=checkpoint.revision,
        architecture=spec.family,
        parameters=spec.parameters,
        license=checkpoint.license,
        commercial=catalog.allows_commerce(checkpoint.license),
    )
    return Candidate(model=reference, spec=spec, panels={})


def _from_catalog(entry: catalog.CatalogModel, *, revision: str | None = None) -> Candidate:
    spec = entry.spec()
    reference = ModelRef(
        id=entry.id,
        source=entry.repo,
        revision=revision or entry.revision,
        architecture=spec.family,
        parameters=spec.parameters,
        license=entry.license,
        commercial=entry.commercial,
        teacher=entry.teacher,
    )
    panels = {name: sum(scores.values()) / len(scores) for name, scores in entry.panels.items() if scores}
    known = catalog.panels()
    measures = {name: known[name].measure for name in panels if name in known}
    return Candidate(model=reference, spec=spec, panels=panels, measures=measures)


def _distilled(
    name: str,
    known: Sequence[catalog.CatalogModel],
    *,
    revision: str | None,
    offline: bool,
    extra: Sequence[catalog.CatalogModel],
) -> list[Candidate]:
    """Those of the ``known`` models that a student of this teacher can begin as, and what can be kept of itself."""
    if Path(name).is_file() and not name.endswith(".json"):
        raise Unsupported(
            f"{name} is no teacher: nothing can be trained from it", hint="give a Hugging Face folder"
        )
    try:
        teacher = named(name, revision=revision, offline=offline, extra=extra)
    except NotFound as error:
        ready = ", ".join(m.id for m in _taught_by((name,), known))
        if not ready:
            raise
        raise NotFound(
            f"{error.message} to cut a student out of",
            hint=f"give its folder or Hub id; or leave out --distill, to choose of its known students: {ready}",
        ) from error
    config = _config(name, teacher, offline=offline, extra=extra)
    cut = [_cut(teacher, config, prune) for prune in students.ladder(config)]
    return [*(_taught(m, teacher) for m in _smaller(teacher, config, known)), *cut]


def _smaller(
    teacher: Candidate, config: Mapping[str, object], known: Sequence[catalog.CatalogModel]
) -> list[catalog.CatalogModel]:
    """Models that are smaller and read the same tokens, as far as configurations tell; distilling looks closer."""
    return [
        model
        for model in known
        if model.parameters < teacher.spec.parameters
        and model.config.get("model_type") == config.get("model_type")
        and abs(model.spec().vocab - teacher.spec.vocab) <= PADDING
        and _related(model, teacher)
    ]


def _related(model: catalog.CatalogModel, teacher: Candidate) -> bool:
    """Taught by it, or of its family by name: that configurations are alike does not make tokens so."""
    if model.teacher is not None and model.teacher.lower() in (
        teacher.model.id.lower(),
        teacher.model.source.lower(),
    ):
        return True
    family = degradation.family_of(teacher.model.id)
    return family is not None and family == degradation.family_of(model.id)


PADDING = 512
"""Rows by which the vocabularies of one family differ at most: Qwen2.5 has 151,936 or 152,064."""


def _taught(model: catalog.CatalogModel, teacher: Candidate) -> Candidate:
    """A smaller model that is still to be taught; it scores at least what it does."""
    own = _from_catalog(model)
    lesson = plan.Lesson(teacher=teacher.model.source, revision=teacher.model.revision, prune=None)
    reference = replace(
        own.model,
        id=f"{own.model.id}-taught",
        teacher=teacher.model.id,
        lesson=lesson,
        license=joint_license(own.model.license, teacher.model.license),
        commercial=own.model.commercial and teacher.model.commercial,
    )
    return replace(own, model=reference, teacher=teacher)


def _taught_by(
    names: Sequence[str], everything: Sequence[catalog.CatalogModel]
) -> list[catalog.CatalogModel]:
    """The models distilled from one that has any of these names, with or without its organization."""
    wanted = {part for name in names for part in (name.lower(), name.lower().rsplit("/", 1)[-1])}
    return [m for m in everything if m.teacher is not None and m.teacher.lower() in wanted]


def _config(
    name: str, teacher: Candidate, *, offline: bool, extra: Sequence[catalog.CatalogModel]
) -> Mapping[str, object]:
    """The config.json of a teacher."""
    path = Path(name)
    if path.exists():
        return serde.read_object(path / "config.json" if path.is_dir() else path)
    entry = catalog.find(name, extra)
    if entry is not None:
        return entry.config
    from edgepack import hub

    found = hub.resolve(
        name, revision=teacher.model.revision, offline=offline, weights=False, progress=Silent()
    )
    return serde.read_object(found.path / "config.json")


def _cut(teacher: Candidate, config: Mapping[str, object], prune: students.Prune) -> Candidate:
    """A student that is still to be made: its shapes are sure, its quality is what its size lets one expect."""
    how = students.label(prune)
    name = f"{teacher.model.id.rsplit('/', 1)[-1]}-{_suffix(prune)}"
    spec = modelspec.from_config(students.shrunk(config, prune), name=name)
    lesson = plan.Lesson(teacher=teacher.model.source, revision=teacher.model.revision, prune=how)
    reference = replace(
        teacher.model, id=name, parameters=spec.parameters, teacher=teacher.model.id, lesson=lesson
    )
    lost = students.expected(teacher.spec.parameters, spec.parameters)
    return replace(teacher, model=reference, spec=spec, lost=lost, teacher=teacher)


def _with_provenance(model: ModelRef, checkpoint: Checkpoint) -> ModelRef:
    """What was built: a student that was to be made is a model of its own now."""
    license_name = model.license if model.license != "unknown" else checkpoint.license
    source = model.source if model.lesson is None else checkpoint.source
    return replace(model, source=source, revision=checkpoint.revision, license=license_name, lesson=None)


def _same_model(chosen: Plan, spec: modelspec.ModelSpec) -> None:
    if spec.parameters != chosen.model.parameters or spec.family != chosen.model.architecture:
        raise BadInput(
            f"{chosen.model.source} is a {spec.architecture} of {spec.parameters:,} parameters, the plan is for "
            f"a {chosen.model.architecture} of {chosen.model.parameters:,}",
            hint="plan again with this model",
        )


def _same_size(exact: Plan, artifact: Artifact) -> None:
    predicted = exact.memory.file_bytes
    if exact.memory.file_provenance == "exact" and artifact.bytes != predicted:
        raise BuildFailed(
            f"the artifact has {artifact.bytes} bytes, the plan says {predicted}",
            hint="this is a bug in edgepack's arithmetic; report it with the model's config.json",
        )


def _student(chosen: Plan, options: BuildOptions, progress: Progress) -> Checkpoint:
    """The student that a plan describes, made now unless the cache has it."""
    from edgepack import distillation, hub, modelcard

    model, lesson = chosen.model, chosen.model.lesson
    if lesson is None:
        raise BadInput(f"{model.id} is there already")
    parent = hub.resolve(lesson.teacher, revision=lesson.revision, offline=options.offline, progress=progress)
    start: Prune | Checkpoint
    if lesson.prune is not None:
        start = students.parse(lesson.prune)
    else:
        start = hub.resolve(model.source, revision=model.revision, offline=options.offline, progress=progress)
    how = options.distillation or distillation.Options(threads=len(os.sched_getaffinity(0)))
    made = distillation.make(
        parent, start, how, workspace.cache_root() / "distilled", progress, name=model.id
    )
    for held in made.report.held_out:
        progress.step(f"student  {modelcard.recovery(held)}")
    place = distillation.publish(made, options.out / model.id, progress)
    progress.step(f"student  {place}, with its card")
    found = hub.resolve(str(made.path), progress=progress)
    # The place in this machine's cache says nothing to who reads the bundle; the revision is over all its files.
    return replace(found, source=model.id, license=made.report.license)


def distill(options: Mapping[str, Any], out: Path | None, progress: Progress) -> distillation.Account:
    """Makes the student's folder, or says what it would be: how it was made and what was measured."""
    from edgepack import distillation, hub, modelcard

    asked = distillation_options(options)
    teacher = named(
        options["teacher"],
        revision=options["revision"],
        offline=bool(options["offline"]),
        converted=False,
    )
    chosen = _start(options, progress)
    if not isinstance(chosen, str):
        chosen = students.sizes(
            _config(options["teacher"], teacher, offline=bool(options["offline"]), extra=()), chosen
        )
    stem = teacher.model.id.rsplit("/", 1)[-1].lower()
    place = out or Path(f"{stem}-{_suffix(chosen)}")
    _require_writable(place, 2 * teacher.spec.parameters)
    if place.exists() and not (place / modelcard.NAME).is_file():
        raise BadInput(f"{place} is there already and is no student", hint="choose another -o, or remove it")
    parent = hub.resolve(
        teacher.model.source,
        revision=teacher.model.revision,
        offline=bool(options["offline"]),
        weights=not options["dry_run"],
        progress=progress,
    )
    start = _resolved(chosen, options, progress) if isinstance(chosen, str) else chosen
    folder = workspace.cache_root() / "distilled"
    if options["dry_run"]:
        expected = distillation.expected(parent, start, asked, folder, progress)
        return distillation.Account(path=place, expected=expected)
    made = distillation.make(parent, start, asked, folder, progress, name=place.name, place=place)
    distillation.publish(made, place, progress)
    recovery = tuple(modelcard.recovery(held) for held in made.report.held_out)
    return distillation.Account(path=place, report=made.report, recovery=recovery)


def distillation_options(options: Mapping[str, Any]) -> distillation.Options:
    """What the command line says about how a student is taught. Raises BadInput for what excludes one another."""
    from edgepack import distillation
    from edgepack.builders.distill import teacher
    from edgepack.scoring import tasks

    recipe = _recipe(options)
    if recipe.objective.hidden and not options.get("online"):
        raise BadInput("hidden states are matched with the teacher beside the student", hint="--online")
    if options.get("replay_share") and not options.get("replay_files"):
        raise BadInput("--replay-share shares out --replay, and there is none", hint="--replay FILE")
    if options.get("k") and options.get("online"):
        raise BadInput("--top-k and --online exclude each other: nothing is kept", hint="leave one out")
    accelerate = options.get("accelerate")
    if accelerate is not None:
        _require_configuration(accelerate)
    questions = options.get("tasks")
    return distillation.Options(
        recipe=recipe,
        data=tuple(options["data_files"]),
        replay=tuple(options.get("replay_files") or ()),
        replay_share=options.get("replay_share") or distillation.REPLAY_SHARE,
        k=options.get("k") or teacher.DEFAULT_K,
        online=bool(options.get("online")),
        tasks=None if questions is None else tasks.read(questions),
        accelerate=accelerate,
        threads=options["jobs"] or len(os.sched_getaffinity(0)),
    )


def _require_configuration(path: Path) -> None:
    """Raises NotFound or BadInput for what accelerate would not start with, before the teacher has read everything."""
    hint = "`accelerate config --config_file FILE` writes one; edgepack/builders/distill/fsdp.yaml is one"
    if not path.is_file():
        raise NotFound(f"no file {path}", hint=hint)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not any(line.startswith("distributed_type:") for line in lines):
        raise BadInput(f"{path} is no configuration of accelerate: it has no distributed_type", hint=hint)


def _recipe(options: Mapping[str, Any]) -> Recipe:
    """A preset by name or file, with what the command line changes of it."""
    from edgepack.builders import distill

    name = options["preset"] or "default"
    if name in distill.PRESETS:
        recipe = distill.PRESETS[name]
    elif Path(name).is_file():
        recipe = serde.load_yaml(distill.Recipe, Path(name))
    else:
        near = serde.did_you_mean(name, distill.PRESETS)
        raise NotFound(
            f"no preset {name!r}{near}", hint=f"a YAML file, or one of: {', '.join(distill.PRESETS)}"
        )
    given = {key: options[key] for key in ("steps", "epochs", "batch", "rate", "length") if options.get(key)}
    if "epochs" in given:
        if "steps" in given:
            raise BadInput("--epochs and --steps exclude each other", hint="leave one out")
        given["steps"] = None
    goal = {
        key: options[key] for key in ("alpha", "temperature", "divergence") if options.get(key) is not None
    }
    if options.get("full") and options.get("lora"):
        raise BadInput("--full and --lora exclude each other", hint="leave one out")
    lora = None if options.get("full") else recipe.lora
    if options.get("lora"):
        lora = replace(lora or distill.Lora(), rank=options["lora"])
    changed = replace(
        recipe,
        **given,
        objective=replace(recipe.objective, **goal),
        lora=lora,
        seed=options["seed"] or recipe.seed,
    )
    try:
        return distill.checked(changed)
    except BadInput as error:
        raise BadInput(f"{name}: {error.message}", hint=error.hint) from error


def _start(options: Mapping[str, Any], progress: Progress) -> Prune | str:
    """What the student begins as: kept of the teacher, or the name of smaller weights."""
    ways = [name for name in ("student", "prune", "profile") if options.get(name)]
    if len(ways) != 1:
        raise BadInput(
            f"--{' and --'.join(ways)} exclude each other"
            if ways
            else "nothing says what the student begins as",
            hint="--student MODEL, --prune layers=0.5, or --profile DEVICE",
        )
    if options.get("student"):
        return str(options["student"])
    if options.get("prune"):
        return students.parse(options["prune"])
    request = Request(profile=profile.load(options["profile"]))
    offered = candidates(
        None, options["teacher"], revision=options["revision"], offline=bool(options["offline"]), distill=True
    )
    chosen = make_plan(request, offered).model
    progress.step(
        f"{options['profile']} takes {chosen.id}: {chosen.parameters:,} parameters, {plan.beginning(chosen)}"
    )
    return chosen.source if chosen.prune is None else students.parse(chosen.prune)


def _suffix(start: Prune | str) -> str:
    """What a student's folder is called behind its teacher's name."""
    if isinstance(start, students.Prune):
        return students.label(start).replace("=", "").replace(",", "-")
    return f"to-{start.rstrip('/').rsplit('/', 1)[-1].lower()}"


def _resolved(start: str, options: Mapping[str, Any], progress: Progress) -> Checkpoint:
    from edgepack import hub

    return hub.resolve(
        start, offline=bool(options["offline"]), weights=not options["dry_run"], progress=progress
    )
