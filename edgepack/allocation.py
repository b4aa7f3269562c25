"""Which type each tensor gets within a byte budget: the multiple-choice knapsack, and what its items cost.

For a plan the losses are guessed from rounding errors and a greedy walk fills the budget within milliseconds; for a
build they are measured (builders/sensitivity.py) and HiGHS solves the same problem exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter

from edgepack import degradation, memory, schemes
from edgepack.errors import BuildFailed, MissingTool, Unsupported
from edgepack.ggufheader import ALIGNMENT, BLOCKS
from edgepack.modelspec import CONVERTED, ModelSpec, Recipe, Tensor
from edgepack.parts import Part
from edgepack.profile import Arch, Backend, Budget
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.units import pad, show


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A tensor stored as one type."""

    kind: str
    file: int
    """Bytes in the file, padded."""
    memory: int
    """Bytes in the memory that is filled: with its copy, for a tensor that is held twice there."""
    loss: float
    """What it costs in quality; losses add up. Nats a token where measured, else of no unit."""


Item = tuple[Option, ...]
"""What one tensor can be, in ascending order of its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that all tensors together may take; None where nothing limits them."""

    file: int | None
    """Of the file without its header."""
    memory: int | None

    def hold(self, chosen: Iterable[Option]) -> bool:
        file, held = used(chosen)
        return (self.file is None or file <= self.file) and (self.memory is None or held <= self.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the weights will lie, as far as it decides what they take there and which kernels there are."""

    settings: Settings
    backend: Backend
    arch: Arch
    unified: bool
    """Accelerator and CPU share one memory."""

    @property
    def offloaded(self) -> bool:
        return self.backend != "cpu" and self.settings.gpu_layers > 0

    def takes(self, spec: ModelSpec, tensor: Tensor, kind: str) -> int:
        """Bytes of a tensor in the memory that is filled: the accelerator's where it has its own."""
        device, host = llama_cpp.held(spec, tensor, kind, self.settings, backend=self.backend, arch=self.arch)
        return device if self.offloaded and not self.unified else device + host


def planned(
    spec: ModelSpec, scheme: str, place: Place, *, room: Budget | None, disk: int | None = None
) -> tuple[ModelSpec, str]:
    """``spec`` with a recipe that fills what the plan leaves, and the scheme's name with the size of the file.

    The losses are guessed, so the recipe is provisional: a build replaces it. Where even the smallest types do not
    fit, the recipe is of those. Raises Unsupported for a model that edgepack does not convert, and where neither a
    device nor a size is named.
    """
    size = schemes.budget_of(scheme)
    if spec.gguf_types is not None or spec.family not in CONVERTED:
        raise Unsupported(
            f"{schemes.BUDGET} is made from a Hugging Face folder ({', '.join(CONVERTED)}), not from {spec.name}",
            hint="take another GGUF scheme",
        )
    if size is None and room is None:
        raise Unsupported(
            f"{schemes.BUDGET} has no budget: no device is named",
            hint=f"--profile NAME, or a size, as in {schemes.BUDGET}-3GiB",
        )
    all_of_them = _guessed_items(spec, place)
    smallest = recipe(spec, [item[0] for item in all_of_them], measured=True)
    name = schemes.budget_name(size or 0)
    left = None
    if room is not None:
        estimate = memory.estimate(
            smallest, name, place.settings, backend=place.backend, imatrix=True, arch=place.arch
        )
        left = memory_left(estimate.parts, room, place)
    header = int(spec.header_bytes or schemes.header_estimate(spec))
    if size is None:
        most, _ = used(best(all_of_them))
        least, _ = used(min(item, key=attrgetter("file")) for item in all_of_them)
        # What lies elsewhere than in the memory that is filled comes on top of it.
        elsewhere = sum(max(option.file - option.memory for option in item) for item in all_of_them)
        bounds = (most, None if left is None else left + elsewhere, None if disk is None else disk - header)
        size = header + max(least, min(n for n in bounds if n is not None))
    smallest_file = header + used(min(item, key=attrgetter("file")) for item in all_of_them)[0]
    if size < smallest_file:
        raise Unsupported(
            f"{spec.name} takes {show(smallest_file)} in its smallest types, and {name} allows {show(size)}",
            hint="a larger budget or a smaller model",
        )
    limits = Limits(file=size - header, memory=left)
    chosen = greedy(all_of_them, limits)
    file, held = used(chosen)
    most, at_best = used(best(all_of_them))
    slack = min(
        size - header - file, at_best - held, *(() if left is None else (left - held,)), max(most - file, 0)
    )
    return recipe(spec, chosen, measured=False, slack=max(0, slack)), schemes.budget_name(size)


def memory_left(parts: Iterable[Part], room: Budget, place: Place) -> int:
    """Bytes that a plan's other parts, at the upper ends of their intervals, leave for weights and their copies."""
    others = [part for part in parts if part.name not in llama_cpp.WEIGHTS]
    if room.unified:
        return room.device - sum(part.high for part in others)
    pool, limit = ("device", room.device) if place.offloaded else ("host", room.host)
    return limit - sum(part.high for part in others if part.place == pool)


def items(spec: ModelSpec, place: Place, loss: Callable[[Tensor, str], float]) -> tuple[Item, ...]:
    """What every tensor of ``spec`` can be, in its order; one that llama-quantize leaves alone has one option."""
    return tuple(tuple(_options(spec, tensor, place, loss)) for tensor in spec.tensors)


def kinds(tensor: Tensor, backend: Backend) -> tuple[str, ...]:
    """Types that a quantizable tensor may get: those that kernels read fast and whose blocks divide its rows."""
    for family in llama_cpp.fast_types(backend):
        there = tuple(kind for kind in family if tensor.shape[0] % BLOCKS[kind][1] == 0)
        if there:
            # llama-imatrix leaves out what lies outside the blocks, and such types are unusable without importances.
            inside = tensor.name.startswith("blk.")
            return tuple(kind for kind in there if inside or not schemes.requires_importances(kind))
    return ("F16",)


def recipe(spec: ModelSpec, chosen: Sequence[Option], *, measured: bool, slack: int = 0) -> ModelSpec:
    """The same model, its tensors stored as chosen."""
    types = tuple(option.kind for option in chosen)
    return replace(spec, recipe=Recipe(types=types, measured=measured, slack=slack))


def used(chosen: Iterable[Option]) -> tuple[int, int]:
    """Bytes in the file and in memory."""
    file = held = 0
    for option in chosen:
        file += option.file
        held += option.memory
    return file, held


def best(all_of_them: Iterable[Item]) -> list[Option]:
    """Of each tensor the option that costs least quality, whatever it takes."""
    return [min(item, key=attrgetter("loss")) for item in all_of_them]


def lost(chosen: Iterable[Option]) -> float:
    return math.fsum(option.loss for option in chosen)


def guessed(tensor: Tensor, kind: str) -> float:
    """Loss from the rounding error of normal weights, by how much it matters where the tensor lies: of no unit."""
    if len(tensor.shape) < 2:
        return 0.0
    return degradation.importance(tensor.name) * tensor.elements * degradation.ROUNDING_ERROR[kind]


def _guessed_items(spec: ModelSpec, place: Place) -> tuple[Item, ...]:
    """`items` with guessed losses, which are the same for tensors that are alike: made once for each kind of them."""
    numbers, examples = schemes.alike(spec)
    made = [tuple(_options(spec, tensor, place, guessed)) for tensor in examples]
    return tuple(made[number] for number in numbers)


def _options(
    spec: ModelSpec, tensor: Tensor, place: Place, loss: Callable[[Tensor, str], float]
) -> Iterator[Option]:
    if not schemes.quantizable(tensor):
        kept = schemes.unquantized(tensor)
        size = pad(schemes.tensor_bytes(kept, tensor.shape), ALIGNMENT)
        yield Option(kind=kept, file=size, memory=place.takes(spec, tensor, kept), loss=0.0)
        return
    found = [
        Option(
            kind=kind,
            file=pad(schemes.tensor_bytes(kind, tensor.shape), ALIGNMENT),
            memory=place.takes(spec, tensor, kind),
            loss=loss(tensor, kind),
        )
        for kind in kinds(tensor, place.backend)
    ]
    yield from sorted(found, key=attrgetter("memory", "file", "kind"))


# -- the knapsack -------------------------------------------------------------------------------------------


def greedy(all_of_them: Sequence[Item], limits: Limits) -> list[Option]:
    """A choice within the limits whose loss is near the least, or the smallest one where nothing fits.

    From the smallest types the steps of every lower convex hull, those that save most loss a byte first; then whatever
    still fits. Without the second pass it is the solution of the linear relaxation but for its one fractional item.
    """
    if limits.memory is not None:
        chosen = _greedy(all_of_them, limits.memory, attrgetter("memory"))
        if limits.file is None or limits.hold(chosen):
            return chosen
    if limits.file is not None:
        return _greedy(all_of_them, limits.file, attrgetter("file"))
    return best(all_of_them)


def _greedy(all_of_them: Sequence[Item], room: int, size: Callable[[Option], int]) -> list[Option]:
    chosen = [min(item, key=size) for item in all_of_them]
    left = room - sum(size(option) for option in chosen)
    hulls = {key: list(pairwise(_hull(item, size))) for key, item in {id(i): i for i in all_of_them}.items()}
    steps = [
        ((above.loss - below.loss) / (size(above) - size(below)), at, rank, below, above)
        for at, item in enumerate(all_of_them)
        for rank, (below, above) in enumerate(hulls[id(item)])
    ]
    stuck: set[int] = set()
    for _, at, _, below, above in sorted(steps, key=lambda step: step[:3]):
        more = size(above) - size(below)
        if at not in stuck and more <= left:
            chosen[at], left = above, left - more
        else:
            stuck.add(at)  # a later step of this tensor starts from what it has not become
    while True:
        better = [
            (option.loss - chosen[at].loss, at, option)
            for at, item in enumerate(all_of_them)
            for option in item
            if option.loss < chosen[at].loss and size(option) - size(chosen[at]) <= left
        ]
        if not better:
            return chosen
        _, at, option = min(better, key=lambda found: found[:2])
        left -= size(option) - size(chosen[at])
        chosen[at] = option


def _hull(item: Item, size: Callable[[Option], int]) -> list[Option]:
    """Options of the lower convex hull of loss over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(item, key=lambda o: (size(o), o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and (hull[-1].loss - hull[-2].loss) * (size(option) - size(hull[-2])) >= (
            option.loss - hull[-2].loss
        ) * (size(hull[-1]) - size(hull[-2])):
            hull.pop()
        if hull and size(option) == size(hull[-1]):
            continue
        hull.append(option)
    return hull


def solve(all_of_them: Sequence[Item], limits: Limits) -> list[Option]:
    """The choice within the limits with the least loss, proven by HiGHS's branch and bound.

    One binary variable an option, one of each item is 1. Raises Unsupported when no choice is within the limits,
    MissingTool without highspy, BuildFailed when the solver gives up.
    """
    for limit, where in ((limits.file, "file"), (limits.memory, "memory")):
        least = sum(min(getattr(option, where) for option in item) for item in all_of_them)
        if limit is not None and least > limit:
            raise Unsupported(
                f"the smallest types take {show(least)} of {where}, and {show(limit)} are left for the weights",
                hint="a larger budget, a shorter context or a smaller model",
            )
    try:
        import highspy
    except ImportError as error:
        raise MissingTool("highspy is not installed", hint="pip install 'edgepack[quant]'") from error
    worth = [_undominated(item) for item in all_of_them]
    options = [option for item in worth for option in item]
    largest = max((option.loss for option in options), default=0.0) or 1.0

    class Solver(highspy.Highs):  # type: ignore[misc]  # it has no types
        def enableCallbacks(self) -> None:  # highspy's name
            """None are needed, and setting them prints a banner before any option can forbid it."""

    solver = Solver()
    for name, value in _SOLVER.items():
        solver.setOptionValue(name, value)
    solver.addVars(len(options), [0.0] * len(options), [1.0] * len(options))
    columns = list(range(len(options)))
    solver.changeColsCost(len(columns), columns, [option.loss / largest for option in options])
    for column in columns:
        solver.changeColIntegrality(column, highspy.HighsVarType.kInteger)
    at = 0
    for item in worth:
        solver.addRow(1.0, 1.0, len(item), columns[at : at + len(item)], [1.0] * len(item))
        at += len(item)
    for size, limit in ((attrgetter("file"), limits.file), (attrgetter("memory"), limits.memory)):
        if limit is not None:
            # In units of the alignment, so that coefficients stay small integers for any model.
            bytes_of = [-(-size(option) // ALIGNMENT) for option in options]
            solver.addRow(-highspy.kHighsInf, float(limit // ALIGNMENT), len(columns), columns, bytes_of)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        raise Unsupported(
            f"no types stay within {limits.file} bytes of file and {limits.memory} of memory together",
            hint="a larger budget, a shorter context or a smaller model",
        )
    if status != highspy.HighsModelStatus.kOptimal:
        raise BuildFailed(f"HiGHS ended with {solver.modelStatusToString(status)} on {len(worth)} tensors")
    values = solver.getSolution().col_value
    chosen, at = [], 0
    for item in worth:
        chosen.append(max(zip(values[at : at + len(item)], range(len(item)), item, strict=True))[2])
        at += len(item)
    if not limits.hold(chosen):
        raise BuildFailed(f"HiGHS gave {used(chosen)} bytes beyond {limits}")
    return chosen


_SOLVER = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": 1e-6, "mip_abs_gap": 1e-9}
"""One thread and one seed, so that the same problem has the same answer; gaps below what losses are known to."""


def _undominated(item: Item) -> Item:
    """Options that no other beats or equals in file, memory and loss together; ties keep the first."""
    kept: list[Option] = []
    for option in sorted(item, key=attrgetter("loss", "memory", "file", "kind")):
        if not any(other.file <= option.file and other.memory <= option.memory for other in kept):
            kept.append(option)
    return tuple(kept)
