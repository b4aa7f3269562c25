"""What each tensor at each type costs: the divergence of the output, in nats a token, predicted from calibration data.

With small independent errors E of the weights, the expected KL divergence from the parent is half the sum of F * E**2
over all weights, F being the diagonal of the Fisher information: for a matrix with inputs x and output gradients g the
mean of g**2 * x**2 over tokens, the labels drawn from the model itself (Martens, arXiv 1412.1193, section 5; Kunstner
et al., arXiv 1905.12558, on why they must be drawn). One pass over the data gives F; E is ggml's own rounding with the
importances that the build quantizes with. So costs add up, and no quantized model is run.

The model goes through memory layer by layer, in a process of its own; lines of the table appear as layers are done.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import modelspec
from edgepack.artifact import Checkpoint
from edgepack.builders import child, convert, imatrix
from edgepack.builders.safetensors import Stored
from edgepack.errors import BadInput, BuildFailed, MissingTool
from edgepack.ggufheader import BLOCKS
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.toolchain import COMMIT, SDIST_VERSION, Toolchain
from edgepack.units import MIB
from edgepack.workspace import require_space, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

TOKENS = 16384
"""Tokens of calibration data that are used; the rest changes the costs by less than they are off anyway."""
ROWS = 512
"""Rows of a matrix, evenly spread, that are rounded to every type; the others count in proportion to their F * W**2.
Rounding all rows of a model of 7B to eight types would take hours."""
SEED = 0
"""Of the labels that are drawn."""
_METHOD = 1
"""Raised when the same inputs give other figures."""
_DIGITS = 5

Costs = Mapping[str, Mapping[str, float]]
"""Tensor -> type -> nats a token."""


def measure(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    kinds: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    windows: Path,
    matrix: Path,
    toolchain: Toolchain,
    progress: Progress,
    threads: int | None = None,
) -> Costs:
    """The cost of every tensor of ``kinds`` in each of its types, kept in ``folder`` for the next budget.

    ``windows``: a .npy of int32 token ids, [windows, tokens]. ``matrix``: the importance matrix that the build takes.
    Killed and run again, it takes up what was there. Holds one layer in 32 bits, its F and one layer's activations; on
    disk the inputs of all layers. Raises MissingTool without the extra, BadInput for windows that are not the model's,
    NoSpace, BuildFailed with the process's words.
    """
    for package in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingTool(
                f"{package} is not installed", hint="pip install 'edgepack[quant]' (torch first: README)"
            )
    out = folder / f"{_digest(checkpoint, kinds, windows, matrix)}-sensitivity.jsonl"
    if not kinds.keys() <= read(out).keys():
        folder.mkdir(parents=True, exist_ok=True)
        require_space(folder, 4 * TOKENS * spec.hidden * (spec.layers + 1) + MIB)
        _run(
            _Job(
                source=str(checkpoint.path.resolve()),
                package=str(toolchain.package.resolve()),
                windows=str(windows.resolve()),
                matrix=str(matrix.resolve()),
                out=str(out.resolve()),
                kinds={name: list(types) for name, types in kinds.items()},
                threads=threads or len(os.sched_getaffinity(0)),
            ),
            progress,
        )
    found = read(out)
    missing = sorted(kinds.keys() - found.keys())
    if missing:
        raise BuildFailed(f"the sensitivity of {missing[0]} was not measured")
    return found


def read(path: Path) -> Costs:
    """The lines of a table that are whole: a process may have been killed while it wrote the last one."""
    if not path.is_file():
        return {}
    found: dict[str, Mapping[str, float]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        entry = json.loads(line)
        found[entry["tensor"]] = entry["nats"]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    source: str
    package: str
    windows: str
    matrix: str
    out: str
    kinds: Mapping[str, Sequence[str]]
    threads: int


def _digest(checkpoint: Checkpoint, kinds: Mapping[str, Sequence[str]], windows: Path, matrix: Path) -> str:
    inputs = (
        checkpoint.revision, sha256_file(windows), sha256_file(matrix), SDIST_VERSION, COMMIT,
        json.dumps({name: list(types) for name, types in kinds.items()}, sort_keys=True),
        *(str(n) for n in (TOKENS, ROWS, SEED, _METHOD)),
    )  # fmt: skip
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]


def _run(job: _Job, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix="edgepack-") as place:
        words = Path(place) / "job.json"
        words.write_text(json.dumps(asdict(job)), encoding="utf-8")
        child.run(
            __name__,
            [words],
            title="measuring sensitivity",
            cwd=Path(place),
            log=Path(job.out).with_suffix(".log"),
            threads=job.threads,
            progress=progress,
        )


# ── the other process ──


class Rounding:
    """ggml's quantizers and their inverse, on rows of floats."""

    def __init__(self, package: Path, threads: int) -> None:
        self._ggml = ctypes.CDLL(str(package / "llama_cpp" / "lib" / "libllama.so"))
        size, place = ctypes.c_int64, ctypes.c_void_p
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, size, size, size, place]
        self._ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._pool = ThreadPoolExecutor(threads)
        self._threads = threads

    def __call__(
        self, rows: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """``rows`` [n, columns] as they come back from ``kind``; ``importance``: of the columns, as in an imatrix."""
        import numpy as np

        number, weights, size = BLOCKS[kind]
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        back = np.empty_like(rows)
        self._ggml.ggml_quantize_init(number)  # tables of the types that look weights up; not safe in threads
        to_float = self._ggml.ggml_get_type_traits(number).contents.to_float
        columns = rows.shape[1]

        def some(begin: int, end: int) -> None:
            packed = np.empty((end - begin) * columns // weights * size, np.uint8)
            given = None if importance is None else importance.ctypes.data
            self._ggml.ggml_quantize_chunk(
                number, rows[begin:end].ctypes.data, packed.ctypes.data, 0, end - begin, columns, given
            )
            to_float(packed.ctypes.data, back[begin:end].ctypes.data, (end - begin) * columns)

        step = -(-len(rows) // self._threads)
        list(self._pool.map(lambda at: some(at, min(at + step, len(rows))), range(0, len(rows), step)))
        return back


class _Traits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


def cost(
    weights: NDArray[np.float32],
    fisher: NDArray[np.float32],
    kinds: Sequence[str],
    importance: NDArray[np.float32] | None,
    rounding: Rounding,
) -> dict[str, float]:
    """Half the sum of F * E**2 for each type; ``weights`` and ``fisher`` [rows, columns], F a token's mean."""
    import numpy as np

    at = np.unique(np.linspace(0, len(weights) - 1, min(ROWS, len(weights))).astype(np.int64))
    rows, matter = weights[at], fisher[at].astype(np.float64)
    known = float((matter * rows.astype(np.float64) ** 2).sum())
    # A few rows at a time: the table of a large vocabulary has gigabytes.
    pieces = range(0, len(weights), ROWS)
    whole = sum(
        float((fisher[i : i + ROWS] * weights[i : i + ROWS] ** 2).sum(dtype=np.float64)) for i in pieces
    )
    share = whole / known if known else 1.0
    found = {}
    for kind in kinds:
        error = rounding(rows, kind, importance).astype(np.float64) - rows
        found[kind] = float(f"{0.5 * share * float((matter * error**2).sum()):.{_DIGITS}g}")
    return found


class _Model:
    """A transformers decoder of which only the layer in use has its weights."""

    def __init__(self, source: Path, spec: ModelSpec) -> None:
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(source).get_text_config()
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            self.whole = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        self.whole.eval()
        self.body = self.whole.model
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.names = convert.hf_names(spec)
        self.stored = convert.stored(source, spec)
        for module in self.whole.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))

    def fill(self, *tensors: str) -> None:
        """Gives these tensors of the GGUF their values."""
        import torch

        for tensor in tensors:
            path, _, leaf = self.names[tensor].rpartition(".")
            value = load(self.stored[tensor]).to(self.device)
            setattr(self.whole.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))

    def drop(self, *tensors: str) -> None:
        import torch

        for tensor in tensors:
            path, _, leaf = self.names[tensor].rpartition(".")
            module = self.whole.get_submodule(path)
            empty = torch.empty_like(getattr(module, leaf), device="meta")
            setattr(module, leaf, torch.nn.Parameter(empty, requires_grad=False))


def load(stored: Stored) -> torch.Tensor:
    """A tensor of a checkpoint in 32 bits."""
    import numpy as np
    import torch

    kinds = {"BF16": ("<u2", torch.bfloat16), "F16": ("<u2", torch.float16), "F32": ("<u4", torch.float32)}
    bits, kind = kinds[stored.dtype]
    values = np.fromfile(
        stored.file, dtype=bits, count=stored.bytes // np.dtype(bits).itemsize, offset=stored.offset
    )
    signed = values.view(np.dtype(bits).str.replace("u", "i"))
    return torch.from_numpy(signed).view(kind).reshape(stored.shape).float()


class _Measurement:
    """One pass forward, one backward, and the costs of each layer on the way back."""

    def __init__(self, job: _Job) -> None:
        import numpy as np
        import torch

        self.job = job
        source = Path(job.source)
        self.spec = modelspec.read(source)
        self.model = _Model(source, self.spec)
        self.rounding = Rounding(Path(job.package), job.threads)
        self.importances = imatrix.read(Path(job.matrix))
        self.done = set(read(Path(job.out)))
        ids = np.load(job.windows, allow_pickle=False)
        ids = ids[: max(1, TOKENS // ids.shape[1])]
        if ids.min() < 0 or ids.max() >= self.spec.vocab:
            raise BadInput(
                f"{job.windows} has the token {ids.max() if ids.max() >= self.spec.vocab else ids.min()}, and "
                f"{self.spec.name} knows {self.spec.vocab}"
            )
        self.ids = torch.from_numpy(ids.astype(np.int64))
        self.tokens = self.ids.numel()
        blocks: dict[int, list[str]] = {}
        for tensor in self.spec.tensors:
            if tensor.name.startswith("blk."):
                blocks.setdefault(int(tensor.name.split(".")[1]), []).append(tensor.name)
        self.blocks = blocks
        self.steps = 0

    def run(self) -> None:
        import numpy as np

        folder = Path(self.job.out).parent
        with tempfile.TemporaryDirectory(dir=folder, prefix=".sensitivity-") as place:
            shape = (self.spec.layers + 1, *self.ids.shape, self.spec.hidden)
            inputs = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]  # numpy has no types for it
                Path(place) / "inputs.npy", mode="w+", dtype=np.float32, shape=shape
            )
            calls = self._forward(inputs)
            gradient = self._head(inputs[self.spec.layers])
            for layer in reversed(range(self.spec.layers)):
                gradient = self._backward(layer, inputs[layer], gradient, calls[layer])
            self._embedding(inputs[0], gradient)

    def _step(self) -> None:
        """Says how far it is: a layer forward, and twice as much backward with its costs."""
        self.steps += 1
        child.report(self.steps, 4 * self.spec.layers + 4)

    def _forward(self, inputs: Any) -> list[Mapping[str, Any]]:
        """Fills ``inputs`` [layers + 1, windows, tokens, hidden]; what each layer is called with beside them.

        The model's own code runs once a window with layers that only note their arguments, so masks and positions are
        those that it makes.
        """
        import torch

        body = self.model.body
        calls: list[Mapping[str, Any]] = [{} for _ in body.layers]
        originals = [layer.forward for layer in body.layers]

        def noting(number: int) -> Any:
            def forward(hidden: torch.Tensor, *words: Any, **named: Any) -> torch.Tensor:
                if words:
                    raise BuildFailed(
                        f"layer {number} of {self.spec.name} is called in a way that is not known"
                    )
                calls[number] = named
                if number == 0:
                    first.append(hidden)
                return hidden

            return forward

        first: list[torch.Tensor] = []
        self.model.fill("token_embd.weight", "output_norm.weight")
        for number, layer in enumerate(body.layers):
            layer.forward = noting(number)
        with torch.no_grad():
            for window, ids in enumerate(self.ids):
                body(input_ids=ids[None].to(self.model.device), use_cache=False)
                inputs[0, window] = first.pop()[0].cpu().numpy()
            for layer, original in zip(body.layers, originals, strict=True):
                layer.forward = original
            for number, layer in enumerate(body.layers):
                self.model.fill(*self.blocks[number])
                for window in range(len(self.ids)):
                    hidden = torch.from_numpy(inputs[number, window][None]).to(self.model.device)
                    inputs[number + 1, window] = _hidden(layer(hidden, **calls[number]))[0].cpu().numpy()
                self.model.drop(*self.blocks[number])
                self._step()
        return calls

    def _head(self, outputs: Any) -> torch.Tensor:
        """Gradients [windows, tokens, hidden] of the log-probability of drawn labels, and the head's own cost."""
        import torch

        head = "token_embd.weight" if self.spec.tied else "output.weight"
        if not self.spec.tied:
            self.model.drop("token_embd.weight")
            self.model.fill(head)
        weight = self._parameter(head)
        wanted = head in self.job.kinds and head not in self.done
        fisher = torch.zeros_like(weight) if wanted else None
        generator = torch.Generator().manual_seed(SEED)
        gradients = torch.empty(tuple(outputs.shape))
        for window in range(len(outputs)):
            hidden = torch.from_numpy(outputs[window][None]).to(self.model.device).requires_grad_()
            normed = self.model.body.norm(hidden)
            logits = torch.nn.functional.linear(normed, weight)
            if self.model.softcap:
                logits = torch.tanh(logits / self.model.softcap) * self.model.softcap
            logits.retain_grad()
            chances = torch.log_softmax(logits, -1)
            odds = chances.detach().exp()[0]
            drawn = torch.multinomial(odds.cpu(), 1, generator=generator).to(odds.device)
            (-chances[0].gather(-1, drawn).sum()).backward()
            gradients[window] = _gradient(hidden)
            if fisher is not None:
                # Of the head's own outputs the expectation over labels is known: p (1 - p).
                slope = (
                    1.0
                    if not self.model.softcap
                    else (1 - (logits[0] / self.model.softcap) ** 2).detach() ** 2
                )
                fisher.addmm_((odds * (1 - odds) * slope).T, normed.detach()[0].square())
        self.head_fisher = fisher
        if fisher is not None and not self.spec.tied:
            self._write(head, fisher)
            self.head_fisher = None
        if not self.spec.tied:
            self.model.drop(head)
        self._step()
        return gradients

    def _backward(
        self, number: int, inputs: Any, gradient: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        """Gradients of the layer's inputs from those of its outputs, and the costs of its matrices."""
        import torch

        layer = self.model.body.layers[number]
        self.model.fill(*self.blocks[number])
        wanted = [t for t in self.blocks[number] if t in self.job.kinds and t not in self.done]
        fisher = {tensor: torch.zeros_like(self._parameter(tensor)) for tensor in wanted}
        hooks = [self._linear(t).register_forward_hook(_squares(fisher[t])) for t in wanted]
        for window in range(len(self.ids)):
            hidden = torch.from_numpy(inputs[window][None]).to(self.model.device).requires_grad_()
            output = _hidden(layer(hidden, **call))
            output.backward(gradient[window][None].to(self.model.device))
            gradient[window] = _gradient(hidden)
        for hook in hooks:
            hook.remove()
        self._step()
        for tensor in wanted:
            self._write(tensor, fisher.pop(tensor))
        self.model.drop(*self.blocks[number])
        self._step()
        self._step()
        return gradient

    def _embedding(self, inputs: Any, gradient: torch.Tensor) -> None:
        """The cost of the table that rows are looked up in; of a tied one, beside what it costs as the head."""
        import torch

        name = "token_embd.weight"
        if name in self.job.kinds and name not in self.done:
            self.model.fill(name)
            weight = self._parameter(name)
            fisher = self.head_fisher if self.head_fisher is not None else torch.zeros_like(weight)
            # Gemma multiplies what it looked up by a constant (transformers, Gemma3TextScaledWordEmbedding).
            looked_up = weight[self.ids[0].to(weight.device)].cpu().double()
            first = torch.from_numpy(inputs[0]).double()
            scale = float((looked_up * first).sum() / looked_up.square().sum())
            rows = (gradient * scale).square().reshape(-1, gradient.shape[-1]).to(weight.device)
            fisher.index_add_(0, self.ids.reshape(-1).to(weight.device), rows)
            self._write(name, fisher)
        self._step()

    def _parameter(self, tensor: str) -> torch.Tensor:
        path, _, leaf = self.model.names[tensor].rpartition(".")
        found: torch.Tensor = getattr(self.model.whole.get_submodule(path), leaf)
        return found

    def _linear(self, tensor: str) -> torch.nn.Module:
        return self.model.whole.get_submodule(self.model.names[tensor].rpartition(".")[0])

    def _write(self, tensor: str, fisher: torch.Tensor) -> None:
        """One line of the table, on disk before the next is begun."""
        nats = cost(
            self._parameter(tensor).cpu().numpy(),
            fisher.div_(self.tokens).cpu().numpy(),
            self.job.kinds[tensor],
            self.importances.get(tensor),
            self.rounding,
        )
        with Path(self.job.out).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"tensor": tensor, "nats": nats}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _squares(fisher: torch.Tensor) -> Any:
    """A forward hook of a Linear that adds the squares of its output's gradients times those of its inputs."""

    def forward(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        squared = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).square()

        def backward(gradient: torch.Tensor) -> None:
            fisher.addmm_(gradient.reshape(-1, gradient.shape[-1]).square().T, squared)

        output.register_hook(backward)

    return forward


def _hidden(output: Any) -> torch.Tensor:
    """A layer's hidden states; some return them with more."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] of a window's [1, tokens, hidden]."""
    if hidden.grad is None:
        raise BuildFailed("no gradient came back through a layer")
    return hidden.grad[0].cpu()


def _whole_lines(path: Path) -> None:
    """Cuts a line off that a killed process left half-written, so that the next one starts on its own."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as stream:
            stream.truncate(whole)


def _main(place: str) -> None:
    job = _Job(**json.loads(Path(place).read_text(encoding="utf-8")))
    import torch

    torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    _whole_lines(Path(job.out))
    _Measurement(job).run()


if __name__ == "__main__":
    child.main(_main, sys.argv[1:])
