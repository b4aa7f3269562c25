"""Students that are cut out of random teachers of real architectures, and of the built-in one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgepack import modelspec
from edgepack.builders import child, convert
from edgepack.builders.distill import examples as sets
from edgepack.builders.distill import prune as pruning
from edgepack.builders.distill.prune import Report
from edgepack.errors import BadInput, Unsupported
from edgepack.progress import Silent
from edgepack.students import parse
from tests import checkpoints
from tests.native import Native

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from random_model import write_tokenizer

pytestmark = pytest.mark.integration

VOCAB = 512
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 128,
    "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 3, "pad_token_id": None,
}  # fmt: skip
_GEMMA = {**_COMMON, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
TEACHERS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "llama": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": False}, "layers=2,ffn=96,heads=2,hidden=64"),
    "llama, tied, biases": (
        "LlamaConfig",
        {**_COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "layers=3,ffn=64,heads=1,hidden=32",
    ),
    "qwen2": ("Qwen2Config", {**_COMMON, "tie_word_embeddings": True}, "layers=2,ffn=96,heads=2,hidden=64"),
    "qwen3": (
        "Qwen3Config",
        {**_COMMON, "head_dim": 32, "tie_word_embeddings": True},
        "ffn=96,heads=1,hidden=64",
    ),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 8}, "layers=2,ffn=96,heads=2"),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": None}, "layers=2,ffn=96,heads=2,hidden=64"),
    "granite": ("GraniteConfig", {**_COMMON, "logits_scaling": 2.0}, "layers=2,ffn=96,heads=2,hidden=64"),
    "smollm3": (
        "SmolLM3Config",
        {**_COMMON, "num_hidden_layers": 8, "head_dim": 16},
        "layers=4,ffn=96,heads=2,hidden=64",
    ),
    "olmo2": ("Olmo2Config", _COMMON, "layers=2,ffn=96"),
    "gemma": ("GemmaConfig", {**_COMMON, "head_dim": 32}, "layers=2,ffn=96,heads=2"),
    "gemma2": ("Gemma2Config", _GEMMA, "layers=2,ffn=96,heads=2"),
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 3, "num_experts_per_tok": 2}, "layers=2"),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {**_COMMON, "head_dim": 32, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "layers=2",
    ),
    "phi3": ("Phi3Config", {**_COMMON, "tie_word_embeddings": False}, "layers=2,ffn=96,heads=2,hidden=64"),
}
"""transformers' class, its arguments, what is cut. 96 and 160 are multiples of 32, which sizes then keep to."""
CONVERTED = ("llama", "llama, tied, biases", "mistral", "qwen2", "qwen3", "gemma3")

Tensors = dict[str, torch.Tensor]


def random_teacher(folder: Path, name: str) -> Path:
    """Weights of 32 bits, far enough from zero that every logit depends on every part."""
    kind, values, _ = TEACHERS[name]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.1 if key.endswith(("norm.weight", "bias")) else 0.08
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)
    return folder


def logits(folder: Path, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary] of transformers in 32 bits; every tensor must be the model's, and all there."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.tensor([list(tokens)])).logits[0].numpy()
    return found


TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, VOCAB - 3, 64))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four examples whose second half are responses."""
    draw = np.random.default_rng(5)
    rows = [(draw.integers(0, VOCAB - 3, 32), [at >= 16 for at in range(32)]) for _ in range(4)]
    return sets.write(rows, tmp_path_factory.mktemp("data") / "examples").folder


Cut = tuple[Path, Path, Report]


@pytest.fixture(scope="module")
def cut(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cut]:
    """Teacher, student and report of one of the TEACHERS; each is made once."""
    made: dict[str, Cut] = {}

    def make(name: str) -> Cut:
        if name not in made:
            place = tmp_path_factory.mktemp("cut")
            teacher = random_teacher(place / "teacher", name)
            report = run(teacher, TEACHERS[name][2], data, place / "student")
            made[name] = teacher, place / "student", report
        return made[name]

    return make


def run(teacher: Path, what: str, data: Path, out: Path, *, apart: bool = False, **words: Any) -> Report:
    """In this process, where torch is loaded already, unless ``apart``."""

    def here(_: str, given: Sequence[Path], **__: object) -> None:
        pruning.work(str(given[0]))

    with pytest.MonkeyPatch.context() as patched:
        if not apart:
            patched.setattr(child, "run", here)
        return pruning.prune(teacher, parse(what), data, out, threads=1, progress=Silent(), **words)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_loads_whole_and_is_of_the_size_that_was_asked_for(
    name: str, cut: Callable[[str], Cut]
) -> None:
    teacher, student, report = cut(name)

    spec, wanted = modelspec.read(student), parse(TEACHERS[name][2])

    assert spec.layers == (wanted.layers or 4) == len(report.layers)
    assert (spec.ffn, spec.kv_heads, spec.hidden) == (
        wanted.ffn or 160,
        wanted.heads or 3,
        wanted.hidden or 96,
    )
    assert (
        sum(tensor.numel() for tensor in load_file(student / "model.safetensors").values()) == spec.parameters
    )
    assert np.isfinite(logits(student, TOKENS)).all()
    assert (student / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    config = transformers.AutoConfig.from_pretrained(student)
    if wanted.heads or wanted.hidden:
        assert config.head_dim == modelspec.read(teacher).head_dim
    assert len(getattr(config, "layer_types", range(spec.layers))) == spec.layers
    assert report.tokens == 64
    assert report.student > 0


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_is_its_teacher_s_kept_rows_and_columns(name: str, cut: Callable[[str], Cut]) -> None:
    teacher, student, report = cut(name)
    spec = modelspec.read(teacher)
    dim, per, width = spec.head_dim, spec.heads // spec.kv_heads, spec.heads * spec.head_dim
    hidden = list(report.hidden or range(spec.hidden))
    whole = slice(None)  # norms of heads, and experts

    expected: Tensors = {}
    for key, tensor in load_file(teacher / "model.safetensors").items():
        words = key.split(".")
        if words[1] != "layers":
            expected[key] = tensor[hidden] if tensor.dim() == 1 else tensor[:, hidden]
            continue
        if int(words[2]) not in report.layers:
            continue
        at = report.layers.index(int(words[2]))
        part = "expert" if "experts" in words else words[-2]
        ffn = list(report.ffn[at] if report.ffn else range(spec.ffn))
        groups = report.heads[at] if report.heads else range(spec.kv_heads)
        query = [
            (group * per + head) * dim + i for group in groups for head in range(per) for i in range(dim)
        ]
        keys = [group * dim + i for group in groups for i in range(dim)]
        rows, columns = {
            "q_proj": (query, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, query),
            "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn),
            "gate_up_proj": ([*ffn, *(spec.ffn + i for i in ffn)], hidden),
            "qkv_proj": (
                [*query, *(width + i for i in keys), *(width + spec.kv_heads * dim + i for i in keys)],
                hidden,
            ),
        }.get(part, (hidden if part.endswith("layernorm") else whole, whole))  # fmt: skip
        value = tensor[rows] if tensor.dim() == 1 else tensor[rows][:, columns]
        expected[".".join([*words[:2], str(at), *words[3:]])] = value

    made = load_file(student / "model.safetensors")
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(made[key], tensor), key


@pytest.mark.parametrize("name", CONVERTED)
def test_llama_cpp_computes_a_student_as_transformers_does(
    name: str, cut: Callable[[str], Cut], tmp_path: Path
) -> None:
    _, student, _ = cut(name)

    gguf = convert.convert(student, tmp_path / "student.gguf", outtype="F32", progress=Silent())

    with Native(gguf) as llama:
        got = llama.logits(list(TOKENS))
    bound = 5e-3 if name == "gemma3" else 2e-4  # ggml looks GELU up in a table of F16 values
    assert np.abs(got - logits(student, TOKENS)).max() < bound


def test_the_same_input_gives_the_same_bytes_and_the_losses_are_those_of_the_folders(
    cut: Callable[[str], Cut], data: Path, tmp_path: Path
) -> None:
    name = "qwen2"
    teacher, student, report = cut(name)

    again = run(teacher, TEACHERS[name][2], data, tmp_path / "again", apart=True)

    assert {path.name: path.read_bytes() for path in student.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()
    }
    assert (again.candidates, again.ffn, again.heads) == (report.candidates, report.ffn, report.heads)
    assert report.teacher == pytest.approx(nats(teacher, data), abs=1e-4)
    assert report.student == pytest.approx(nats(student, data), abs=1e-4)


def nats(folder: Path, data: Path) -> float:
    """A response token, by the definition."""
    losses = []
    for example in sets.Examples.open(data):
        found = torch.from_numpy(logits(folder, example.tokens.tolist())).log_softmax(-1)
        losses += [-float(found[at - 1, example.tokens[at]]) for at in np.flatnonzero(example.response)]
    return float(np.mean(losses))


def test_candidates_have_the_loss_of_the_model_with_just_these_layers(
    cut: Callable[[str], Cut], data: Path, tmp_path: Path
) -> None:
    teacher, _, report = cut("llama")

    for candidate in report.candidates:
        folder = tmp_path / str(candidate.layers)
        folder.mkdir()
        keep = {str(layer): str(place) for place, layer in enumerate(candidate.layers)}
        tensors = {
            ".".join([*words[:2], keep[words[2]], *words[3:]])
            if words[1] == "layers"
            else ".".join(words): tensor
            for words, tensor in (
                (key.split("."), tensor) for key, tensor in load_file(teacher / "model.safetensors").items()
            )
            if words[1] != "layers" or words[2] in keep
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": len(keep)}
        (folder / "config.json").write_text(json.dumps(config))

        assert candidate.loss == pytest.approx(nats(folder, data), abs=1e-4), candidate
    assert report.depth == min(candidate.loss for candidate in report.candidates)
    assert report.layers == report.candidates[0].layers
    assert {candidate.how for candidate in report.candidates} >= {"contiguous"}
    assert len(report.influence) == len(report.alone) == 4


@pytest.mark.parametrize("name", ["llama, tied, biases", "qwen3", "phi3"])
def test_channels_and_heads_that_do_nothing_go_first_and_change_nothing(
    name: str, data: Path, tmp_path: Path
) -> None:
    teacher = random_teacher(tmp_path / "teacher", name)
    spec = modelspec.read(teacher)
    draw = np.random.default_rng(1)
    tensors = load_file(teacher / "model.safetensors")
    live, group = {}, spec.heads // spec.kv_heads * spec.head_dim
    for at in range(spec.layers):
        live[at] = sorted(draw.choice(spec.ffn, 96, replace=False).tolist())
        dead = sorted({*range(spec.ffn)} - {*live[at]})
        tensors[f"model.layers.{at}.mlp.down_proj.weight"][:, dead] = 0
        unused = int(draw.integers(spec.kv_heads))
        tensors[f"model.layers.{at}.self_attn.o_proj.weight"][:, unused * group : (unused + 1) * group] = 0
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    what = "ffn=96" if name == "phi3" else "ffn=96,heads=2"

    report = run(teacher, what, data, tmp_path / "student")

    assert [list(kept) for kept in report.ffn] == [live[at] for at in range(spec.layers)]
    assert np.abs(logits(tmp_path / "student", TOKENS) - logits(teacher, TOKENS)).max() < 1e-4
    assert report.student == pytest.approx(report.teacher, abs=1e-5)


def test_layers_that_do_nothing_go_first_and_change_nothing(tmp_path: Path) -> None:
    teacher = random_teacher(tmp_path / "teacher", "llama")
    tensors = load_file(teacher / "model.safetensors")
    for at in (0, 2):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{at}.{part}.weight"].zero_()
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    own = list(TOKENS[:16])  # and what the teacher itself says next, so that it is right and any other is not
    for _ in range(16):
        own.append(int(logits(teacher, own)[-1].argmax()))
    data = sets.write([(own, [at >= 16 for at in range(32)])], tmp_path / "examples").folder

    report = run(teacher, "layers=2", data, tmp_path / "student")

    assert report.layers == (1, 3)
    assert report.influence[0] == pytest.approx(0, abs=1e-6)
    assert report.influence[2] == pytest.approx(0, abs=1e-6)
    assert report.alone[0] == pytest.approx(report.teacher, abs=1e-6)
    assert np.abs(logits(tmp_path / "student", TOKENS) - logits(teacher, TOKENS)).max() < 1e-5


def test_hidden_channels_that_are_zero_go_first(data: Path, tmp_path: Path) -> None:
    teacher = random_teacher(tmp_path / "teacher", "qwen3")
    dead = sorted(np.random.default_rng(2).choice(96, 32, replace=False).tolist())
    tensors = load_file(teacher / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[dead] = 0
        elif key == "model.embed_tokens.weight":
            tensor[:, dead] = 0
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})

    report = run(teacher, "hidden=64", data, tmp_path / "student")

    assert list(report.hidden) == sorted({*range(96)} - {*dead})


def test_the_built_in_teacher_s_layers_are_at_least_as_well_chosen_as_every_second(tmp_path: Path) -> None:
    windows = checkpoints.heldout(4, 128).numpy()
    data = sets.write([(row, [at > 0 for at in range(128)]) for row in windows], tmp_path / "examples")

    report = run(checkpoints.DEMO, "layers=3", data.folder, tmp_path / "student", tokens=500)

    losses = {candidate.layers: candidate.loss for candidate in report.candidates}
    assert losses[report.layers] <= losses[0, 2, 4]
    assert report.teacher < report.candidates[0].loss < report.teacher + 1.5
    assert {(0, 1, 5), (0, 4, 5), (0, 2, 4)} <= losses.keys()
    assert {tensor.dtype for tensor in load_file(tmp_path / "student" / "model.safetensors").values()} == {
        torch.float16
    }
    assert report.student == report.depth


def test_what_cannot_be_used_is_refused_before_anything_is_written(
    cut: Callable[[str], Cut], data: Path, tmp_path: Path
) -> None:
    teacher, student, _ = cut("llama")
    silent = sets.write([([1, 2, 3], [False] * 3)], tmp_path / "silent").folder
    foreign = sets.write([([1, VOCAB, 3], [False, True, True])], tmp_path / "foreign").folder
    long = sets.write([([1] * 129, [False] + [True] * 128)], tmp_path / "long").folder
    out = tmp_path / "out"

    for what, given, words in (
        ("layers=9", data, "more than the teacher has: 4"),
        ("layers=2", silent, "no responses"),
        ("layers=2", foreign, f"token {VOCAB}"),
        ("layers=2", long, "129 tokens"),
        ("layers=2", tmp_path, "no set of examples"),
    ):
        with pytest.raises(BadInput, match=words):
            run(teacher, what, given, out)
    with pytest.raises(BadInput, match="already there"):
        run(teacher, "layers=2", data, student)
    assert not out.exists()


def test_a_checkpoint_with_unknown_tensors_is_refused(data: Path, tmp_path: Path) -> None:
    teacher = random_teacher(tmp_path / "teacher", "llama")
    tensors = load_file(teacher / "model.safetensors")
    save_file(
        {**tensors, "model.adapter": torch.ones(2)}, teacher / "model.safetensors", metadata={"format": "pt"}
    )

    with pytest.raises(Unsupported, match=r"model\.adapter, which is none of a llama's"):
        run(teacher, "layers=2", data, tmp_path / "student")


def test_a_teacher_without_a_loss_is_refused(data: Path, tmp_path: Path) -> None:
    teacher = random_teacher(tmp_path / "teacher", "llama")
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BadInput, match="a loss of nan"):
        run(teacher, "layers=2,ffn=96", data, tmp_path / "student")
    assert not (tmp_path / "student").exists()
