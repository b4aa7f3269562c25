"""Training of students: the loss through the Trainer, what its curve does not depend on, and what survives a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from edgepack import serde
from edgepack.builders.distill import Lora, Objective, Recipe, course, engine, learner, loss, train
from edgepack.builders.distill import examples as sets
from edgepack.builders.distill import teacher as kept
from edgepack.builders.distill.examples import Examples
from edgepack.builders.distill.train import Job, Part, Trained
from edgepack.errors import BadInput, BuildFailed, NoSpace, Unsupported
from edgepack.progress import Silent

pytestmark = pytest.mark.integration

VOCABULARY = 96
RECIPE = Recipe(
    objective=Objective(alpha=0.2), steps=6, batch=8, micro=4, checks=3, patience=0, warmup=0.0, rate=0.01,
    precision="fp32",
)  # fmt: skip
LORA = Lora(rank=4, alpha=8, dropout=0.1, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """The engine sets these for its own process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a larger teacher, examples of unequal length, others for replay, and held-out ones."""
    folder = tmp_path_factory.mktemp("distill")
    llama(folder / "student", seed=0)
    llama(folder / "teacher", seed=1, layers=3, hidden=48)
    examples(folder / "examples", count=24, seed=0)
    examples(folder / "old", count=10, seed=1)
    examples(folder / "held-out", count=7, seed=2)
    for name in ("examples", "old", "held-out"):
        keep(folder / "teacher", folder / name, folder / f"{name}-kept")
    return folder


def llama(out: Path, *, seed: int, layers: int = 2, hidden: int = 32) -> None:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.1,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(out)
    (out / "tokenizer_config.json").write_text("{}", encoding="utf-8")


def examples(out: Path, *, count: int, seed: int) -> Examples:
    draw = np.random.default_rng(seed)

    def one() -> tuple[list[int], list[bool]]:
        length = int(draw.integers(5, 24))
        prompt = int(draw.integers(1, length - 1))
        return draw.integers(3, VOCABULARY, length).tolist(), [at >= prompt for at in range(length)]

    return sets.write([one() for _ in range(count)], out)


def keep(model: Path, data: Path, out: Path, *, k: int = VOCABULARY) -> None:
    """A teacher's rows, made the plain way."""
    told = Examples.open(data)
    source = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        each = [
            source(torch.from_numpy(e.tokens.astype(np.int64))[None]).logits[0, :-1][
                torch.from_numpy(e.response[1:].copy())
            ]
            for e in told
        ]
    logits = torch.cat(each)
    values, ids = logits.topk(k)
    rows = np.zeros(len(logits), kept.row_type(k, VOCABULARY))
    rows["ids"] = kept.pack(ids.numpy().astype(np.int32), kept.id_bits(VOCABULARY))
    rows["logits"] = (values - values[:, :1]).numpy()
    rows["lse"] = rows["lse_t"] = (logits - values[:, :1]).logsumexp(1).numpy()
    out.mkdir()
    np.save(out / "000000.npy", rows, allow_pickle=False)
    about = kept.About(
        identity=kept.Identity(
            teacher="t", tokenizer="t", examples=told.digest, k=k, temperature=1.0, vocabulary=VOCABULARY,
            precision="fp32", batch_tokens=1, shard_rows=1,
        ),
        rows=len(rows), bytes_per_token=rows.itemsize, shards=("000000.npy",),
    )  # fmt: skip
    (out / "about.json").write_text(serde.to_json(about), encoding="utf-8")


def job(place: Path, out: Path, recipe: Recipe = RECIPE, *, kept: bool = True) -> Job:
    def part(name: str) -> Part:
        return Part(examples=place / name, teacher=place / f"{name}-kept" if kept else None)

    return Job(
        student=place / "student",
        out=out / "student",
        work=out / "work",
        parts=(part("examples"),),
        held_out=(part("held-out"),),
        recipe=recipe,
    )


def taught(given: Job, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """`train` with the work in this process: what the other one would start with is there already."""

    def run(module: str, words: Sequence[Path], **_: Any) -> None:
        engine.work(str(words[0]))

    monkeypatch.setattr("edgepack.builders.child.run", run)
    return train.train(given, Silent())


def losses(trained: Trained) -> list[float]:
    return [step.loss for step in trained.curves.steps] + [check.loss for check in trained.curves.checks]


def digests(folder: Path) -> Mapping[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class Killing(Silent):
    """Progress that kills what it hears from, with SIGKILL, when it is so many percent along."""

    def __init__(self, percent: int) -> None:
        self.left = percent

    def bar(
        self, text: str, total: int | None, *, rate: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        return self._killing()

    @contextmanager
    def _killing(self) -> Iterator[Callable[[int], None]]:
        def advance(percent: int) -> None:
            self.left -= percent
            if self.left <= 0:
                for process in psutil.Process().children():
                    process.kill()

        yield advance


def test_a_training_that_was_killed_goes_on_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=12, lora=LORA, objective=Objective(alpha=0.3))
    whole = taught(job(place, tmp_path / "whole", recipe), monkeypatch)
    monkeypatch.undo()
    cut = job(place, tmp_path / "cut", recipe)

    with pytest.raises(BuildFailed, match="was killed"):
        train.train(cut, Killing(50))
    last = engine.newest(cut.work)
    assert last is not None
    assert not cut.out.exists()
    # As if it had been killed while it wrote the next checkpoint, and a line of the log.
    half = cut.work / "checkpoint-8"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(last, half, ignore=shutil.ignore_patterns(engine.MARKER, "*.pt"))
    (half / engine.WEIGHTS).write_bytes(b"half")
    with (cut.work / train.LOG).open("a", encoding="utf-8") as log:
        log.write('{"step": 9, "lo')
    resumed = train.train(cut, Silent())

    assert digests(resumed.folder) == digests(whole.folder)
    assert resumed.curves == whole.curves
    assert (cut.work / train.LOG).read_bytes() == (tmp_path / "whole/work" / train.LOG).read_bytes()
    assert [step.step for step in resumed.curves.steps] == list(range(1, 13))


def test_a_full_disk_loses_no_checkpoint_and_the_same_job_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = taught(job(place, tmp_path / "whole"), monkeypatch)
    given = job(place, tmp_path / "cut")
    saved = torch.save

    def full(value: object, file: str, **named: Any) -> None:
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        saved(value, file, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        patched.setattr(engine, "free_bytes", lambda _: 0)
        with pytest.raises(
            NoSpace, match=r"the disk is full while writing .*checkpoint-4; earlier checkpoints"
        ):
            taught(given, patched)
    assert sorted(path.name for path in given.work.glob("checkpoint-*")) == ["checkpoint-2"]

    assert digests(taught(given, monkeypatch).folder) == digests(whole.folder)


def test_a_checkpoint_that_would_not_fit_is_not_begun(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepack.workspace.free_bytes", lambda _: 4096)

    with pytest.raises(NoSpace, match="must be written"):
        taught(job(place, tmp_path), monkeypatch)

    assert not list((tmp_path / "work").glob("checkpoint-*"))


def test_the_curve_does_not_depend_on_how_a_batch_is_split(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses are of unequal length, so a mean over micro-batches or processes would be another."""
    at_once = taught(job(place, tmp_path / "8", replace(RECIPE, micro=8)), monkeypatch)
    in_parts = taught(job(place, tmp_path / "2", replace(RECIPE, micro=2)), monkeypatch)
    again = taught(job(place, tmp_path / "again", replace(RECIPE, recompute=True)), monkeypatch)
    monkeypatch.undo()
    configuration = yaml.safe_load(train.FSDP.read_text()) | {"use_cpu": True, "num_processes": 2}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(configuration))
    split = job(place, tmp_path / "split", RECIPE)
    by_two = train.train(split, Silent(), accelerate=tmp_path / "fsdp.yaml")

    assert losses(in_parts) == pytest.approx(losses(at_once), abs=1e-5)
    assert losses(again) == pytest.approx(losses(at_once), abs=1e-5)
    assert losses(by_two) == pytest.approx(losses(at_once), abs=1e-5)
    weights = [load_file(each.folder / "model.safetensors") for each in (at_once, in_parts, by_two)]
    for name, weight in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], weight, atol=2e-3, rtol=2e-3)
    last = engine.newest(split.work)
    assert last is not None
    assert (last / engine.MARKER).read_text() == "split\n"
    with pytest.raises(BadInput, match="weights split over the processes, and they are whole now"):
        engine._same_layout(last, "whole")


def test_a_batch_that_processes_cannot_share_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")

    with pytest.raises(BadInput, match="3 processes cannot share a batch of 8") as refused:
        engine.Plan.of(job(place, tmp_path))

    assert refused.value.hint == "take a batch of 9"


def test_rows_of_all_ids_teach_what_the_teacher_beside_the_student_does(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = taught(job(place, tmp_path / "rows"), monkeypatch)
    online = replace(job(place, tmp_path / "online", kept=False), online=place / "teacher")

    beside = taught(online, monkeypatch)

    assert losses(beside) == pytest.approx(losses(rows), abs=1e-4)
    assert beside.curves.checks[0].divergence == pytest.approx(rows.curves.checks[0].divergence, abs=1e-4)
    assert rows.curves.checks[-1].loss < rows.curves.checks[0].loss


def test_the_result_is_the_student_with_other_weights_in_its_own_type(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = taught(job(place, tmp_path), monkeypatch).folder

    was, became = load_file(place / "student/model.safetensors"), load_file(result / "model.safetensors")
    assert {n: (w.shape, w.dtype) for n, w in became.items()} == {
        n: (w.shape, w.dtype) for n, w in was.items()
    }
    assert any(not torch.equal(became[name], was[name]) for name in was)
    same = sorted(path.name for path in (place / "student").iterdir())
    assert sorted(path.name for path in result.iterdir()) == same
    assert digests(result)["config.json"] == digests(place / "student")["config.json"]


def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "student"
    shutil.copytree(place / "student", student)
    transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).save_pretrained(student)
    given = replace(
        job(place, tmp_path, replace(RECIPE, lora=LORA, rate=0.05, recompute=True)), student=student
    )
    given = replace(given, out=tmp_path / "merged")

    result = taught(given, monkeypatch)

    adapted = learner.adapt(learner.load(student, torch.float32, attention="sdpa"), LORA)
    unmerged = adapted.get_base_model()
    own = learner.Learner(unmerged, Objective())
    engine.fill(own, given.work / f"checkpoint-{result.best}" / engine.WEIGHTS)
    merged = learner.load(result.folder, torch.float32, attention="sdpa")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = learner.load(student, torch.float32, attention="sdpa")(ids).logits
        torch.testing.assert_close(merged(ids).logits, unmerged.eval()(ids).logits, atol=1e-5, rtol=1e-5)
        assert (merged(ids).logits - before).abs().max() > 0.01
    assert result.best > 0
    frozen = {name for name, _ in learner.trainable(own)}
    assert all("lora_" in name for name in frozen)


def test_a_module_that_is_not_there_is_named_with_those_that_are(place: Path) -> None:
    student = learner.load(place / "student", torch.float32, attention="sdpa")

    with pytest.raises(BadInput, match="LlamaForCausalLM has no matrix called c_attn") as refused:
        learner.adapt(student, Lora(targets=("q_proj", "c_attn")))

    assert "down_proj, gate_proj" in str(refused.value.hint)


_SHAPE: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
_CONFIGS = {
    "capped": transformers.Gemma2Config(**_SHAPE, head_dim=16, final_logit_softcapping=2.0),
    "divided": transformers.GraniteConfig(**_SHAPE, logits_scaling=8.0, tie_word_embeddings=True),
    "multiplied": transformers.CohereConfig(**_SHAPE, logit_scale=0.0625),
    "biased": transformers.PhiConfig(**_SHAPE),
}


@pytest.mark.parametrize("kind", _CONFIGS)
def test_losses_are_those_of_the_model_s_own_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_CONFIGS[kind]).eval()
    if kind == "biased":
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.randint(0, 64, (3, 12))
    labels = torch.where(torch.rand(3, 12) < 0.5, ids, learner.IGNORED)
    labels[:, 0] = learner.IGNORED

    loss.verify_head(model, kind)
    sums = learner.Learner(model, Objective(alpha=1.0))(input_ids=ids, labels=labels)

    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    own = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=learner.IGNORED, reduction="sum"
    )
    torch.testing.assert_close(sums[0], own, atol=1e-4, rtol=1e-5)


def test_a_head_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModelForCausalLM.from_config(_CONFIGS["capped"])
    monkeypatch.setattr(loss, "head", lambda model: model.get_output_embeddings())

    with pytest.raises(Unsupported, match="makes its logits in a way that is not known here"):
        loss.verify_head(model, "capped")


def test_a_loss_that_is_no_number_ends_with_step_and_rate_and_keeps_checkpoints(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job(place, tmp_path, RECIPE)
    taught(given, monkeypatch)
    shutil.rmtree(given.out)
    shutil.rmtree(given.work / "checkpoint-6")
    forward = learner.Learner.forward

    def broken(self: learner.Learner, **batch: Any) -> torch.Tensor:
        sums = forward(self, **batch)
        return sums * torch.nan if self.training else sums

    monkeypatch.setattr(learner.Learner, "forward", broken)

    with pytest.raises(BuildFailed, match=r"the loss is nan .* at step 5, at a rate of 0\.0025") as failed:
        taught(given, monkeypatch)

    assert failed.value.hint is not None
    assert failed.value.hint.startswith("take a lower --rate than 0.01")
    assert engine.newest(given.work) == given.work / "checkpoint-4"


def test_a_rate_that_blows_weights_up_is_seen_at_the_next_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, rate=1e30)

    with pytest.raises(BuildFailed, match="its gradient nan long at step 2, at a rate of"):
        taught(job(place, tmp_path, recipe), monkeypatch)


def test_training_ends_when_held_out_loss_no_longer_falls_and_the_best_weights_stay(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random tokens cannot be learned, only remembered: the held-out loss rises soon."""
    recipe = replace(RECIPE, objective=Objective(alpha=1.0), steps=40, checks=20, patience=2, rate=0.01)
    given = job(place, tmp_path, recipe)

    result = taught(given, monkeypatch)

    assert result.stopped_early
    assert result.steps < 40
    assert result.best == min(result.curves.checks, key=lambda check: check.loss).step
    assert [check.step for check in result.curves.checks] == list(range(0, result.steps + 1, 2))
    later = [check.loss for check in result.curves.checks if check.step > result.best]
    assert len(later) == 2
    there = {f"checkpoint-{step}" for step in (result.best, result.steps - 2, result.steps) if step}
    assert {path.name for path in given.work.glob("checkpoint-*")} == there
    assert {step.divergence for step in result.curves.steps} == {None}
    assert all(check.divergence is not None for check in result.curves.checks)
    # Killed before the student was written, it trains no more.
    before, log = digests(result.folder), (given.work / train.LOG).read_bytes()
    shutil.rmtree(given.out)
    monkeypatch.setattr(engine, "build", None)
    assert digests(taught(given, monkeypatch).folder) == before
    assert (given.work / train.LOG).read_bytes() == log


def test_old_and_new_examples_are_mixed_each_with_its_own_rows(place: Path) -> None:
    parts = [
        Part(examples=place / "examples", teacher=place / "examples-kept"),
        Part(examples=place / "old", teacher=place / "old-kept", share=0.4),
    ]

    pool = course.Pool(parts, seed=3)
    order = course.Course(pool, batch=4, steps=14, seed=3, rows=True)

    assert [int((pool.members[:, 0] == part).sum()) for part in (0, 1)] == [24, 4]
    lone = [course.Pool([part], seed=3) for part in parts]
    known = {
        (bytes(item.tokens), None if item.rows is None else bytes(item.rows.logits))
        for only in lone
        for item in (only.item(member) for member in range(len(only)))
    }
    items = [order[at] for at in range(len(order))]
    seen = [(bytes(item.tokens), None if item.rows is None else bytes(item.rows.logits)) for item in items]
    assert sorted(seen[:28]) == sorted(seen[28:])
    assert set(seen[:28]) <= known | {
        (bytes(pool.item(m).tokens), bytes(pool.item(m).rows.logits))  # type: ignore[union-attr]  # they have rows
        for m in range(24, 28)
    }
    assert seen == [
        (bytes(item.tokens), None if item.rows is None else bytes(item.rows.logits))
        for item in (
            course.Course(pool, batch=4, steps=14, seed=3, rows=True)[at] for at in range(len(order))
        )
    ]
    assert seen[:28] != seen[28:]
    for first in range(0, 56, 4):
        lengths = [len(item.tokens) for item in items[first : first + 4]]
        assert lengths == sorted(lengths, reverse=True)


def test_padding_of_held_out_examples_has_no_targets(place: Path) -> None:
    pool = course.Pool([Part(examples=place / "held-out", teacher=place / "held-out-kept")], seed=0)

    exam = course.Exam(pool, multiple=4)
    batches = [course.collate([exam[at] for at in range(first, first + 4)]) for first in (0, 4)]

    targets = [int((batch["labels"] != learner.IGNORED).sum()) for batch in batches]
    assert sum(targets) == Examples.open(place / "held-out").response_tokens
    assert [len(batch["lse"]) for batch in batches] == targets


def test_rows_of_other_examples_are_refused(place: Path) -> None:
    with pytest.raises(BadInput, match="old-kept holds what a teacher says of other examples"):
        course.Pool([Part(examples=place / "examples", teacher=place / "old-kept")], seed=0)


def test_parts_without_rows_beside_parts_with_are_refused(place: Path) -> None:
    parts = [Part(examples=place / "examples", teacher=place / "examples-kept"), Part(examples=place / "old")]

    with pytest.raises(BadInput, match="some parts have other rows of a teacher than others, or none"):
        _ = course.Pool(parts, seed=0).source


@pytest.mark.parametrize(
    ("objective", "kept", "said"),
    [
        (Objective(alpha=0.5), False, "a weight of 0.5 on the divergence needs a teacher"),
        (Objective(alpha=1.0, hidden=0.1), True, "matching hidden states needs the teacher beside"),
        (Objective(temperature=2.0), True, "kept for temperatures 1 and 1, not for 2"),
    ],
)
def test_an_objective_without_its_teacher_is_refused(
    place: Path, tmp_path: Path, objective: Objective, kept: bool, said: str
) -> None:
    given = job(place, tmp_path, replace(RECIPE, objective=objective), kept=kept)

    with pytest.raises(BadInput, match=said):
        engine.build(given, engine.Plan.of(given), bf16=False)


def test_a_token_that_the_student_does_not_know_is_refused(place: Path, tmp_path: Path) -> None:
    sets.write([([3, VOCABULARY], [False, True])], tmp_path / "foreign")
    part = Part(examples=tmp_path / "foreign")
    given = replace(
        job(place, tmp_path, replace(RECIPE, objective=Objective(alpha=1.0)), kept=False), parts=(part,)
    )

    with pytest.raises(BadInput, match="the examples have the token 96 and student knows 96"):
        engine.build(given, engine.Plan.of(given), bf16=False)


def test_hard_labels_can_be_learned_while_divergence_is_held_out_and_not_otherwise(
    place: Path, tmp_path: Path
) -> None:
    both = job(place, tmp_path)
    neither = job(place, tmp_path, replace(RECIPE, objective=Objective(alpha=1.0)), kept=False)
    measured = replace(neither, held_out=both.held_out)

    assert engine.build(measured, engine.Plan.of(measured), bf16=False).source is not None
    for given in (replace(both, held_out=neither.held_out), replace(measured, recipe=RECIPE)):
        with pytest.raises(BadInput, match="for the held-out examples are made in another way"):
            engine.build(given, engine.Plan.of(given), bf16=False)


def test_bf16_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "computed", lambda _: "fp32")

    assert not engine.wants_bf16(Recipe(precision="auto"))
    with pytest.raises(Unsupported, match="does not multiply in bf16"):
        engine.wants_bf16(Recipe(precision="bf16"))


def test_a_work_folder_of_another_job_is_refused(place: Path, tmp_path: Path) -> None:
    given = job(place, tmp_path)
    train._claim(given)
    train._claim(replace(given, threads=2, out=tmp_path / "elsewhere"))

    with pytest.raises(BadInput, match="holds the training of another student, data or recipe"):
        train._claim(replace(given, recipe=replace(RECIPE, rate=0.1)))


def test_a_folder_that_is_there_already_is_not_taken_for_the_result(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "student").mkdir()

    with pytest.raises(BadInput, match="knows nothing of its training"):
        taught(job(place, tmp_path), monkeypatch)


def test_a_student_that_transformers_does_not_know_is_refused(place: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(place / "student", student)
    (student / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")

    with pytest.raises(Unsupported, match="transformers does not load student"):
        learner.load(student, torch.float32, attention="sdpa")


def test_weights_that_are_missing_are_not_drawn_anew(place: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(place / "student", student)
    weights = load_file(student / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BadInput, match=r"has no weights for model\.norm\.weight and 0 more"):
        learner.load(student, torch.float32, attention="sdpa")


def test_training_without_held_out_examples_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no examples to train on, or none are held out"):
        engine.Plan.of(replace(job(place, tmp_path), held_out=()))


def test_layers_are_matched_evenly_from_first_to_last(place: Path) -> None:
    student = learner.load(place / "student", torch.float32, attention="sdpa")
    teacher = learner.load(place / "teacher", torch.float32, attention="sdpa")

    assert learner.matched(student, teacher, None) == (0, 2)
    assert learner.matched(student, teacher, (1, 2)) == (1, 2)
    with pytest.raises(BadInput, match="does not go with a student of 2 and a teacher of 3"):
        learner.matched(student, teacher, (0, 3))


def test_a_student_that_is_its_teacher_has_no_distance_to_it(place: Path) -> None:
    own = learner.load(place / "teacher", torch.float32, attention="sdpa")
    other = learner.load(place / "teacher", torch.float32, attention="sdpa")
    ids = torch.arange(3, 23).view(2, 10)

    same = learner.Learner(own, Objective(hidden=1.0), teacher=other)(input_ids=ids, labels=ids)
    shifted = learner.Learner(own, Objective(hidden=1.0), teacher=other, layers=(1, 1, 2))(
        input_ids=ids, labels=ids
    )

    assert same[1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    assert shifted[2] > 0.01


def test_hidden_states_are_brought_nearer_by_a_projection_that_is_thrown_away(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, objective=Objective(hidden=0.5), rate=0.01)
    given = replace(job(place, tmp_path, recipe, kept=False), online=place / "teacher")

    result = taught(given, monkeypatch)

    distances = [check.hidden for check in result.curves.checks]
    assert all(distance is not None for distance in distances)
    assert distances[-1] < distances[0]  # type: ignore[operator]  # none is None
    assert (
        load_file(result.folder / "model.safetensors").keys()
        == load_file(place / "student/model.safetensors").keys()
    )
    check = result.curves.checks[-1]
    assert check.hidden is not None and check.divergence is not None
    assert check.loss == pytest.approx(0.5 * check.ce + 0.5 * check.divergence + 0.5 * check.hidden, abs=1e-6)


def test_a_line_of_the_log_says_what_was_learned_from(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job(place, tmp_path)

    taught(given, monkeypatch)

    lines = [json.loads(line) for line in (given.work / train.LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 2, 4, 6]
    assert lines[0].keys() == {"step", "held_out"}
    assert lines[1].keys() == {"step", "loss", "ce", "divergence", "rate"}
    assert lines[1]["loss"] == pytest.approx(0.2 * lines[1]["ce"] + 0.8 * lines[1]["divergence"], abs=1e-6)
    assert [line["rate"] for line in lines[1:2]] == [0.01]
