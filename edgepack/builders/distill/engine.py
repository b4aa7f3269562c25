"""The process that teaches a student: transformers' Trainer around a `Learner`, in one process or under accelerate.

The loop, accumulation, precision, processes, optimizer, schedule and checkpoints are the Trainer's; here are the loss,
held-out checks, which checkpoints count, and the log. The loss is the sum over the targets of all processes and
micro-batches of a step, divided by their number, so its gradient does not depend on how they are split.

A checkpoint counts once its marker is there, which is written last. It is read back with torch.load(weights_only=True)
(optimizer, schedule, random states) and safetensors (weights): nothing in it can run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors import SafetensorError

from edgepack import serde
from edgepack.builders import child
from edgepack.builders import safetensors as headers
from edgepack.builders.distill import Recipe
from edgepack.builders.distill.course import Course, Exam, Pool, collate
from edgepack.builders.distill.learner import Learner, Source, adapt, load, trainable, vocabulary
from edgepack.builders.distill.teacher import computed
from edgepack.builders.distill.train import LOG, Check, Curves, Job, Step, read, updates
from edgepack.builders.quantizers import TOKENIZER_FILES
from edgepack.errors import BadInput, BuildFailed, NoSpace, Unsupported
from edgepack.units import MIB
from edgepack.workspace import free_bytes, fsync_dir, is_full, require_space, whole_dir, write_text

MARKER = "complete"
"""Of a checkpoint, written last; it says how weights were split."""
WEIGHTS = "model.safetensors"
KEPT = 2
"""Checkpoints to go on from; of the best one the weights are kept beside."""
_COPIED = ("config.json", *TOKENIZER_FILES, "LICENSE", "LICENSE.txt", "NOTICE")
"""Of a student's folder, what goes with what it became."""
_STORED: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def run(job: Job) -> None:
    """Trains from the newest checkpoint, or from the start, to the end; the main process then writes the student."""
    checkpoint = newest(job.work)
    main = int(os.environ.get("RANK", "0")) == 0
    log = Log(job.work / LOG, upto=_step(checkpoint) if checkpoint else None, writes=main)
    plan = Plan.of(job)
    reached = _step(checkpoint) if checkpoint else 0
    if checkpoint is None or not (reached >= plan.steps or log.curves.out_of_patience(job.recipe.patience)):
        _train(job, plan, log, checkpoint)
    if main and not job.out.exists():
        finish(job, log.curves)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(
            cpu=not torch.cuda.is_available()
        ).wait_for_everyone()  # no machine is done before the student


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the batches of a job go through its processes."""

    pool: Pool
    held_out: Pool
    steps: int
    checks: frozenset[int]
    """Steps after which the held-out loss is taken and a checkpoint written."""
    micro: int
    accumulation: int

    @classmethod
    def of(cls, job: Job) -> Plan:
        """Raises BadInput for data that hold nothing, and a batch that processes cannot share."""
        recipe = job.recipe
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if recipe.batch % processes:
            raise BadInput(
                f"{processes} processes cannot share a batch of {recipe.batch} examples",
                hint=f"take a batch of {processes * max(1, round(recipe.batch / processes))}",
            )
        each = recipe.batch // processes
        micro = max(size for size in range(1, min(recipe.micro, each) + 1) if each % size == 0)
        pool = Pool(job.parts, recipe.seed)
        steps = updates(recipe, len(pool))
        return cls(
            pool=pool,
            held_out=Pool(job.held_out, recipe.seed),
            steps=steps,
            checks=frozenset(math.ceil(i * steps / recipe.checks) for i in range(1, recipe.checks + 1))
            | {steps},
            micro=micro,
            accumulation=each // micro,
        )


class Log:
    """The curves, a line of JSON an event: {"step", "loss", "ce", "divergence", "rate"} and {"step", "held_out"}."""

    def __init__(self, path: Path, *, upto: int | None, writes: bool) -> None:
        """Keeps what is there of the first ``upto`` steps, the rest will come again; None keeps nothing."""
        known = read(path) if upto is not None else Curves(steps=(), checks=())
        self.path, self.writes = path, writes
        self._steps = [step for step in known.steps if step.step <= (upto or 0)]
        self._checks = [check for check in known.checks if check.step <= (upto or 0)]
        if writes:
            events: list[Step | Check] = [*self._steps, *self._checks]
            events.sort(key=lambda event: (event.step, isinstance(event, Check)))
            write_text(path, "".join(_line(event) for event in events))

    @property
    def curves(self) -> Curves:
        return Curves(steps=tuple(self._steps), checks=tuple(self._checks))

    def step(self, step: Step) -> None:
        self._steps.append(step)
        self._append(step)

    def check(self, check: Check) -> None:
        self._checks.append(check)
        self._append(check)

    def sync(self) -> None:
        """Makes all lines durable."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def _append(self, event: Step | Check) -> None:
        if self.writes:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(event))


def _line(event: Step | Check) -> str:
    values = {name: value for name, value in _fields(event).items() if name != "hidden" or value is not None}
    if isinstance(event, Check):
        step = values.pop("step")
        values = {"step": step, "held_out": values}
    return json.dumps(values, allow_nan=False) + "\n"


def _fields(event: Step | Check) -> dict[str, object]:
    dumped = serde.dump(event)
    return dict(dumped) if isinstance(dumped, dict) else {}


# ── training ──


def _train(job: Job, plan: Plan, log: Log, checkpoint: Path | None) -> None:
    recipe = job.recipe
    transformers.set_seed(recipe.seed)
    bf16 = wants_bf16(recipe)
    learner = build(job, plan, bf16=bf16)
    trainer = Trainer(job, plan, log, learner, arguments(job, plan, bf16=bf16, fresh=checkpoint is None))
    if checkpoint is not None:
        _same_layout(checkpoint, trainer.layout)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def build(job: Job, plan: Plan, *, bf16: bool) -> Learner:
    """The student with what is learned of it in 32 bits, and the teacher beside it. Raises BadInput, Unsupported."""
    recipe = job.recipe
    objective, source = recipe.objective, _source(plan, recipe)
    attention = "sdpa"
    frozen = (
        torch.bfloat16
        if bf16 and recipe.lora and stored_type(job.student) is torch.bfloat16
        else torch.float32
    )
    student = load(job.student, frozen, attention=attention)
    largest = max(plan.pool.largest(), plan.held_out.largest())
    if largest >= vocabulary(student):
        raise BadInput(
            f"the examples have the token {largest} and {job.student.name} knows {vocabulary(student)}",
            hint="prepare them with the student's own tokenizer",
        )
    if recipe.recompute:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.lora is not None:
        student = adapt(student, recipe.lora).get_base_model()
    teacher = None
    if job.online is not None:
        teacher = load(job.online, torch.bfloat16 if bf16 else torch.float32, attention=attention)
        teacher.eval().requires_grad_(requires_grad=False)
    if teacher is None and source is None and objective.alpha < 1:
        raise BadInput(
            f"a weight of {1 - objective.alpha:g} on the divergence needs a teacher, and there is none",
            hint="keep a teacher's rows, run one beside the student, or train on hard labels (alpha 1)",
        )
    if teacher is None and objective.hidden:
        raise BadInput("matching hidden states needs the teacher beside the student")
    if teacher is not None and source is not None:
        raise BadInput("a teacher beside the student and kept rows exclude each other")
    if source is not None and objective.temperature not in (1.0, source.temperature):
        raise BadInput(
            f"the teacher was kept for temperatures 1 and {source.temperature:g}, not for {objective.temperature:g}",
            hint="keep it again at this temperature",
        )
    if source is not None and source.vocabulary > vocabulary(student):
        raise BadInput(
            f"the teacher was kept over {source.vocabulary} ids and the student has {vocabulary(student)}",
            hint="keep it again over the ids that both have",
        )
    return Learner(student, objective, source=source, teacher=teacher, layers=job.layers)


def _source(plan: Plan, recipe: Recipe) -> Source | None:
    """What all kept rows were made with. Hard labels can be learned while a teacher's rows are held out, not otherwise.

    Raises BadInput where what is held out was kept in another way.
    """
    learned, held_out = plan.pool.source, plan.held_out.source
    if learned != held_out and recipe.objective.alpha < 1:
        raise BadInput(
            "a teacher's rows for the held-out examples are made in another way than those to learn from, or missing",
            hint="keep both with the same temperature and vocabulary",
        )
    return held_out


def wants_bf16(recipe: Recipe) -> bool:
    """Whether matrices are multiplied in bfloat16. Raises Unsupported where that was asked and is not to be had."""
    has = computed("auto") == "bf16"
    if recipe.precision == "bf16" and not has:
        raise Unsupported("this machine does not multiply in bf16", hint="--precision fp32, or auto")
    return recipe.precision != "fp32" and has


def arguments(job: Job, plan: Plan, *, bf16: bool, fresh: bool) -> transformers.TrainingArguments:
    recipe = job.recipe
    return transformers.TrainingArguments(
        output_dir=str(job.work),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro,
        per_device_eval_batch_size=plan.micro,
        gradient_accumulation_steps=plan.accumulation,
        average_tokens_across_devices=True,
        train_sampling_strategy="sequential",
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(recipe.warmup * plan.steps),  # the first of them has a rate of 0
        weight_decay=recipe.decay,
        max_grad_norm=recipe.clip,
        optim="adamw_torch_fused",
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        eval_on_start=fresh,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
    )


class Trainer(transformers.Trainer):  # type: ignore[misc]  # transformers is not typed here
    """The Trainer with the sums of a Learner as its loss, and checks and checkpoints where the plan has them."""

    def __init__(
        self, job: Job, plan: Plan, log: Log, learner: Learner, args: transformers.TrainingArguments
    ) -> None:
        recipe = job.recipe
        self.job, self.plan, self.log_, self.learner = job, plan, log, learner
        super().__init__(
            model=learner,
            args=args,
            data_collator=collate,
            train_dataset=Course(
                plan.pool,
                batch=recipe.batch,
                steps=plan.steps,
                seed=recipe.seed,
                rows=recipe.objective.alpha < 1,
            ),
            eval_dataset=Exam(plan.held_out, plan.micro * args.world_size),
            callbacks=[_Checks(plan.checks)],
        )
        self.remove_callback(transformers.PrinterCallback)
        learner.place(args.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=args.device)
        self._targets = 0
        self.control: transformers.TrainerControl
        self._means: list[float] = []

    @property
    def layout(self) -> str:
        """How weights and updates lie in a checkpoint."""
        return "split" if self.is_fsdp_enabled else "whole"

    def create_accelerator_and_postprocess(self) -> None:
        """As it is, and with FSDP on CPUs as well, which accelerate takes for GPUs only.

        torch splits over gloo as over nccl. FSDP's own casts would round the teacher's rows and the losses to 16 bits.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if (
            os.environ.get("ACCELERATE_USE_FSDP") == "true"
            and state.distributed_type is DistributedType.MULTI_CPU
        ):
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if not self.is_fsdp_enabled:
            return
        plugin = state.fsdp_plugin
        if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
            raise BadInput(
                f"FSDP {plugin.fsdp_version} with {plugin.state_dict_type} is not known here",
                hint="fsdp_version: 2 and fsdp_state_dict_type: FULL_STATE_DICT in the configuration of accelerate",
            )
        if self.args.bf16:
            plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices; neither norms nor biases."""
        return [name for name, weight in model.named_parameters() if weight.ndim >= 2]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part that these inputs have in the mean over all targets of the step.

        Times the number of processes, as gradients are averaged over them.
        """
        sums = model(**inputs)
        self._sums += sums.detach().double()
        self._targets = int(num_items_in_batch)
        loss = self.learner.loss(sums) * self.accelerator.num_processes / max(1, self._targets)
        return (loss, sums) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Comes before every update: the place to stop before weights are spoiled."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        sums = self.accelerator.reduce(self._sums, "sum") / max(1, self._targets)
        self._sums = torch.zeros_like(self._sums)
        loss = float(self.learner.loss(sums))
        self._means = [loss, *sums.tolist()]
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise BuildFailed(
                f"the loss is {loss:g} and its gradient {float(norm):g} long at step {self.state.global_step + 1}, at "
                f"a rate of {self._get_learning_rate():g}",
                hint=self._calmer(),
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called after every update, by all processes; and at the end with figures that depend on the clock."""
        if "learning_rate" not in logs:
            return
        loss, entropy, divergence, hidden = self._means
        step = Step(
            step=self.state.global_step,
            loss=loss,
            ce=entropy,
            divergence=divergence if self.job.recipe.objective.alpha < 1 else None,
            rate=logs["learning_rate"],
            hidden=hidden if self.learner.layers else None,
        )
        self.log_.step(step)
        if self.is_world_process_zero():
            child.report(self.state.global_step, self.plan.steps)

    def evaluate(self, *args: Any, **named: Any) -> dict[str, float]:
        """The held-out objective, exact over all targets whatever the processes."""
        model = self.model_wrapped
        model.eval()
        total = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                total[:3] += model(**inputs).double()
                total[3] += (inputs["labels"] >= 0).sum()
        total = self.accelerator.reduce(total, "sum")
        means = total[:3] / total[3]
        loss = float(self.learner.loss(means))
        if not math.isfinite(loss):
            raise BuildFailed(
                f"the held-out loss is {loss:g} after step {self.state.global_step}",
                hint=self._calmer(),
            )
        entropy, divergence, hidden = means.tolist()
        known = self.learner.source is not None or self.learner.teacher is not None
        self.log_.check(
            Check(
                step=self.state.global_step,
                loss=loss,
                ce=entropy,
                divergence=divergence if known else None,
                hidden=hidden if self.learner.layers else None,
            )
        )
        metrics = {"eval_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.log_.curves.out_of_patience(self.job.recipe.patience):
            self.control.should_training_stop = True
        return metrics

    def _calmer(self) -> str:
        rate = self.job.recipe.rate
        return f"take a lower --rate than {rate:g}, or look for damaged data; checkpoints are kept"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is learned, under the names that it has here; the rest is the student's as it was."""
        state = self.model.state_dict() if state_dict is None else state_dict
        names = [name for name, _ in trainable(self.model)]
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: state[name].detach().cpu().contiguous() for name in names}
        safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            fill(self.learner, Path(resume_from_checkpoint) / WEIGHTS)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that counts only when it is whole; then older ones go."""
        folder = self.job.work / f"checkpoint-{self.state.global_step}"
        main = self.is_world_process_zero()
        if main:
            shutil.rmtree(folder, ignore_errors=True)  # what a process that was killed had written of it
            require_space(self.job.work, self._bytes())
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if _disk_is_full(error, self.job.work):
                shutil.rmtree(folder, ignore_errors=True)
                raise NoSpace(
                    f"the disk is full while writing {folder}; earlier checkpoints are kept",
                    hint="free some space; the same command goes on from the last one",
                ) from error
            raise
        self.accelerator.wait_for_everyone()
        if main:
            self.log_.sync()
            complete(folder, self.layout)
            best = self.log_.curves.best
            prune(self.job.work, best=best.step if best is not None else 0)
        self.accelerator.wait_for_everyone()

    def _bytes(self) -> int:
        """Of a checkpoint: weights in 32 bits, and as much again for each of Adam's two averages."""
        copies = 4 if self.is_fsdp_enabled else 3
        return MIB + copies * 4 * sum(int(weight.numel()) for _, weight in trainable(self.model))


class _Checks(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Asks for a check and a checkpoint after the steps of a plan."""

    def __init__(self, steps: frozenset[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True


# ── checkpoints ──


def newest(work: Path) -> Path | None:
    """The whole checkpoint with the most steps."""
    return max(
        (folder for folder in work.glob("checkpoint-*") if (folder / MARKER).is_file()),
        key=_step,
        default=None,
    )


def complete(folder: Path, layout: str) -> None:
    """Makes a checkpoint durable, then lets it count."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    fsync_dir(folder)
    write_text(folder / MARKER, f"{layout}\n")


def prune(work: Path, *, best: int) -> None:
    """Removes all checkpoints but the newest KEPT, and the weights of the one after step ``best``."""
    folders = sorted((f for f in work.glob("checkpoint-*") if f.is_dir()), key=_step)
    for folder in folders[:-KEPT]:
        (folder / MARKER).unlink(missing_ok=True)  # first, so that half of a checkpoint never counts
        if _step(folder) != best:
            shutil.rmtree(folder)
            continue
        for file in folder.iterdir():
            if file.name != WEIGHTS:
                file.unlink()


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _same_layout(checkpoint: Path, layout: str) -> None:
    was = (checkpoint / MARKER).read_text(encoding="utf-8").strip()
    if was != layout:
        raise BadInput(
            f"{checkpoint} was written with weights {was} over the processes, and they are {layout} now",
            hint="go on with the configuration of accelerate that it was begun with",
        )


def fill(learner: Learner, file: Path, *, prefix: str = "") -> None:
    """Gives a learner the weights of a checkpoint whose names begin with ``prefix``.

    Raises BuildFailed where they are not all that it learns.
    """
    stored = {n: w for n, w in safetensors.torch.load_file(file).items() if n.startswith(prefix)}
    apart = stored.keys() ^ {name for name, _ in trainable(learner)}
    if apart:
        raise BuildFailed(f"{file} is not of this student: {min(apart)} is in one of them alone")
    learner.load_state_dict(stored, strict=False)


# ── the student at the end ──


def finish(job: Job, curves: Curves) -> None:
    """Writes ``job.out``: the best weights, merged, as the student stored its own, with its other files."""
    transformers.set_seed(job.recipe.seed)
    student = load(job.student, torch.float32, attention="sdpa")
    adapted = adapt(student, job.recipe.lora) if job.recipe.lora else None
    best = curves.best
    if best is not None and best.step > 0:
        learner = Learner(adapted.get_base_model() if adapted else student, job.recipe.objective)
        fill(learner, job.work / f"checkpoint-{best.step}" / WEIGHTS, prefix="student.")
    if adapted is not None:
        student = adapted.merge_and_unload()
    stored = stored_type(job.student)
    student.to(stored)
    lost = next(
        (name for name, weight in student.named_parameters() if not bool(weight.isfinite().all())), None
    )
    if lost is not None:
        raise BuildFailed(
            f"{lost} has grown beyond what {stored} holds", hint="take a lower rate, or a student in bf16"
        )
    student.generation_config = transformers.GenerationConfig()  # the student's own is copied, as it is
    require_space(job.out.parent, MIB + sum(w.numel() * w.element_size() for w in student.parameters()))
    with whole_dir(job.out) as folder:
        try:
            student.save_pretrained(folder)
        except SafetensorError as error:
            if _disk_is_full(error, folder):
                raise NoSpace(
                    f"the disk is full while writing {job.out}; checkpoints are kept",
                    hint="free some space or choose another folder with -o; the same command goes on",
                ) from error
            raise
        (folder / "generation_config.json").unlink(missing_ok=True)
        for name in _COPIED:
            if (job.student / name).is_file():
                shutil.copyfile(job.student / name, folder / name)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors' writer leaves some to their owner alone


def stored_type(folder: Path) -> torch.dtype:
    """The type that most of a checkpoint's bytes are in."""
    sizes: dict[str, int] = {}
    for tensor in headers.checkpoint(folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    kind = max(sizes, key=lambda name: sizes[name])
    if kind not in _STORED:
        raise Unsupported(
            f"{folder} stores its weights as {kind}", hint=f"{', '.join(_STORED)} can be trained"
        )
    return _STORED[kind]


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """torch and safetensors hide the number of the system's error."""
    return (isinstance(error, OSError) and is_full(error)) or free_bytes(folder) < MIB


def work(place: str) -> None:
    job = serde.load_json(Job, Path(place))
    torch.set_num_threads(max(1, job.threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it finds bugs, at the price of a write to all memory
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run(job)


if __name__ == "__main__":
    child.main(work, sys.argv[1:])
