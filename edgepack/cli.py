"""The command line: parses, calls one function, prints; turns errors into exit codes."""

from __future__ import annotations

import functools
import gc
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from edgepack import __version__, errors
from edgepack.errors import BadInput, CheckFailed, EdgepackError, Interrupted, NotFound, NothingFits
from edgepack.progress import Progress, Silent, Terminal
from edgepack.screen import PLAIN, Screen

if TYPE_CHECKING:
    from edgepack.check import CheckReport
    from edgepack.doctor import Report as Diagnosed
    from edgepack.plan import Candidate, Plan, Request
    from edgepack.remote import Connection

Command = TypeVar("Command", bound=Callable[..., Any])


PLANNED = (
    "profile",
    "power_mode",
    "desktop",
    "model",
    "teacher",
    "distill",
    "scheme",
    "runtime",
    "context",
    "kv_type",
    "min_decode",
)
"""Options of `build` that a plan file has already answered."""
TEACHING = {"data_files": "--data", "steps": "--steps", "preset": "--preset"}
"""Options of `build` that only a student that is still to be made has a use for."""
ANYWHERE = frozenset({"-q", "--quiet", "-v", "--verbose"})


Completed = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
SHELLS = ("bash", "zsh", "fish")


def _completed(names: Callable[[], Iterable[str]], *, files: bool = False) -> Completed:
    """What a shell offers for a value: those of ``names`` that begin so, and with ``files`` what lies on the disk."""

    def offered(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names() if name.lower().startswith(begun.lower())]
        return found or ([CompletionItem(begun, type="file")] if files else [])

    return offered


def _with_cache(command: Command) -> Command:
    """A command that makes or uses what is in the cache: nothing is taken out of it meanwhile."""

    @functools.wraps(command)
    def guarded(*args: Any, **options: Any) -> Any:
        from edgepack import workspace

        with workspace.cache_used():
            return command(*args, **options)

    return cast(Command, guarded)


def _profile_names() -> Iterable[str]:
    from edgepack import profile

    known = [profile.load(name) for name in profile.names()]
    return sorted(name for found in known for name in (found.name, *found.aliases))


def _model_names() -> Iterable[str]:
    from edgepack import catalog

    return sorted({*(model.id for model in catalog.models()), *catalog.built_in()})


def _runtime_names() -> Iterable[str]:
    from edgepack import runtimes

    return (runtime.NAME for runtime in runtimes.RUNTIMES)


def _scheme_names() -> Iterable[str]:
    from edgepack import runtimes

    return sorted({scheme for runtime in runtimes.RUNTIMES for scheme in runtime.SCHEMES})


def _kinds_of_cache() -> Iterable[str]:
    from edgepack import cache

    return cache.KINDS


def _schema_names() -> Iterable[str]:
    from edgepack import documents

    return (document.name for document in documents.DOCUMENTS)


def _symptom_names() -> Iterable[str]:
    from edgepack import faults

    return sorted(rule.id for rule in faults.RULES)


def _exit_codes() -> str:
    """The table at the end of `edgepack --help`, out of the errors themselves."""
    told = {0: "Done, and all that was asked is so.", 1: "Anything without a code of its own."}
    for kind in errors.EdgepackError.__subclasses__():
        told[kind.exit_code] = str(kind.__doc__).splitlines()[0]
    return "\n".join(("\b", "Exit codes:", *(f"  {code:>3}  {text}" for code, text in told.items())))


class Group(click.Group):
    """Turns every EdgepackError into one message on stderr and its own exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """-q and -v count wherever they stand, as people type them."""
        early = [word for word in args if word in ANYWHERE]
        return super().parse_args(ctx, early + [word for word in args if word not in ANYWHERE])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgepackError as error:
            _fail(error)
        except KeyboardInterrupt:
            _fail(Interrupted("stopped", hint="run the same command again; it resumes"))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            _fail(_translated(error))


def _fail(error: EdgepackError) -> NoReturn:
    click.echo(f"edgepack: {error.message}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)
    sys.exit(error.exit_code)


def _translated(error: OSError) -> EdgepackError:
    from edgepack.errors import NoSpace
    from edgepack.workspace import is_full

    if is_full(error):
        return NoSpace(
            f"the disk is full ({error.filename or 'while writing'})",
            hint="free some space; then rerun",
        )
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{error.filename} does not exist")
    if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)):
        return BadInput(f"{error.filename}: {(error.strerror or 'cannot be used').lower()}")
    return EdgepackError(f"{error.filename or 'the system'}: {(error.strerror or str(error)).lower()}")


def main() -> None:
    """Entry point of the `edgepack` program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a bar's signs, where the terminal knows ASCII only
    gc.set_threshold(100_000)  # a survey makes many small values and no cycles; the default costs it a tenth
    cli(standalone_mode=True)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_exit_codes(),
)
@click.version_option(__version__, prog_name="edgepack")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors.")
@click.option("-v", "--verbose", is_flag=True, help="Say more about what is done.")
@click.pass_context
def cli(ctx: click.Context, quiet: bool, verbose: bool) -> None:
    """Turn a language model into a signed bundle that provably runs on a given edge device.

    \b
    Examples:
      edgepack plan  --profile jetson-orin
      edgepack fit   --profile raspberry-pi-5-8gb --model ./Qwen2.5-1.5B-Instruct --scheme Q4_K_M
      edgepack build --profile jetson-orin --model demo --key ~/.ssh/edgepack -o out/
      edgepack check out/demo-q6_k-jetson-orin-nano-8gb.tar
    """
    ctx.obj = Silent() if quiet else Terminal(verbose=verbose)


def _model_options(command: Command) -> Command:
    for option in (
        click.option("--kv-type", metavar="T",
                     help="KV cache type, or K/V pair: f16, q8_0, q8_0/q4_0 … (left out: planned; fit: the "
                          "runtime's first)."),
        click.option("--ubatch", type=click.IntRange(32, 8192), default=512, show_default=True,
                     help="Tokens computed at once; bounds the compute buffer."),
        click.option("--slots", type=click.IntRange(1, 256), default=1, show_default=True,
                     help="Users served at the same time; llama.cpp keeps at least 256 tokens for each."),
        click.option("--context", type=click.IntRange(1), metavar="N",
                     help="Tokens in all slots together (left out: 4096 a slot)."),
        click.option("--runtime", metavar="R",
                     help="llama.cpp, vllm, onnx-genai or transformers; left out, the planner weighs those that "
                          "the device runs, and fit takes the scheme's, llama.cpp first.",
                     shell_complete=_completed(_runtime_names)),
        click.option("--catalog", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                     help="YAML file of more models, in the form of edgepack/catalog/*.yaml."),
        click.option("--scheme", metavar="S", help="Quantization scheme, e.g. Q4_K_M, gptq-int4-g128, onnx-int4.",
                     shell_complete=_completed(_scheme_names)),
    ):  # fmt: skip
        command = option(command)
    return command


def _student_options(command: Command) -> Command:
    for option in (
        click.option("--distill", is_flag=True,
                     help="Choose what a student of --teacher begins as: a smaller model of its family, or what "
                          "is kept of itself; a build teaches it."),
        click.option("--teacher", metavar="T", help="Choose among this teacher's known students.",
                     shell_complete=_completed(_model_names, files=True)),
    ):  # fmt: skip
        command = option(command)
    return command


def _device_options(command: Command) -> Command:
    for option in (
        click.option("--power-mode", metavar="NAME", help="Power mode by name, e.g. 25W."),
        click.option("--desktop", is_flag=True, help="A desktop session runs on the device."),
        click.option("--profile", metavar="P", help="A profile's name, alias, or YAML file.",
                     shell_complete=_completed(_profile_names, files=True)),
    ):  # fmt: skip
        command = option(command)
    return command


def _choice_options(command: Command) -> Command:
    for option in (
        click.option("--disk", metavar="SIZE", help="What the artifact may take on the device's disk, e.g. 4GiB."),
        click.option("--license", "licenses", multiple=True, metavar="ID",
                     help="Only models under this licence (repeat it); default: all that allow commercial use."),
        click.option("--min-tokens-per-second", "min_decode", type=click.FloatRange(0), metavar="X",
                     help="Refuse candidates that may be slower with a full context (default 5; 0: off)."),
        click.option("--goal", type=click.Choice(["quality", "latency", "throughput", "context"]),
                     default="quality", show_default=True,
                     help="What to make most of: throughput is that of all slots together."),
    ):  # fmt: skip
        command = option(command)
    return command


def _calibration_options(command: Command) -> Command:
    for option in (
        click.option("--jobs", type=click.IntRange(1), metavar="N", help="Threads (default: all cores)."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                     help="Draws the calibration data."),
        click.option("--calibration-tokens", type=click.IntRange(2), metavar="N",
                     help="Tokens to calibrate on (default 65536)."),
        click.option("--calibration", "calibration_files", multiple=True, type=click.Path(path_type=Path),
                     metavar="FILE", help="Calibration data: text, or jsonl of texts or chats (repeat it)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _quality_options(command: Command) -> Command:
    for option in (
        click.option("--no-quality", is_flag=True, help="Do not measure what the artifact lost."),
        click.option("--quality-text", type=click.Path(path_type=Path), metavar="FILE",
                     help="Held-out text to measure on (default: a built-in one)."),
        click.option("--quality-tokens", type=click.IntRange(1), metavar="N", help="Tokens of it (default 4096)."),
        click.option("--max-ppl-loss", metavar="X", help="Refuse an artifact that raises perplexity by more, e.g. 2%."),
        click.option("--max-kl", type=click.FloatRange(0), metavar="X",
                     help="Refuse an artifact that diverges more from its parent (mean KL, nats a token)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _distillation_options(command: Command) -> Command:
    for option in (
        click.option("--preset", metavar="NAME|FILE",
                     help="How a student is taught: article (T = 2, 0.7 CE + 0.3 KL, LoRA), hard-labels (no teacher, "
                          "to compare with), or a YAML file (docs/distilling.md)."),
        click.option("--steps", type=click.IntRange(1), metavar="N",
                     help="Updates of a student's weights (default: three passes over the data)."),
        click.option("--data", "data_files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
                     help="Text, or jsonl of texts, chats or instructions, to teach a student on (repeat it; default: "
                          "a built-in text)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _recipe_options(command: Command) -> Command:
    """What is changed most of a preset; all the rest of it stands in a file."""
    for option in (
        click.option("--online", is_flag=True,
                     help="Run the teacher beside the student instead of keeping its logits."),
        click.option("--top-k", "k", type=click.IntRange(1), metavar="N",
                     help="Logits of the teacher that are kept of each token (default 88)."),
        click.option("--length", type=click.IntRange(2), metavar="N",
                     help="Tokens of the longest example (default 1024)."),
        click.option("--batch", type=click.IntRange(1), metavar="N", help="Examples of one step (default 16)."),
        click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="X",
                     help="Highest learning rate (default 0.001)."),
        click.option("--full", is_flag=True, help="Train all weights, also with --preset article."),
        click.option("--lora", type=click.IntRange(1), metavar="RANK",
                     help="Train low-rank updates only, merged at the end."),
        click.option("--divergence", type=click.Choice(["forward", "reverse", "js"]),
                     help="KL to the student, the default, from it, or Jensen-Shannon."),
        click.option("--temperature", type=click.FloatRange(0, min_open=True), metavar="T",
                     help="Of the divergence from the teacher (default 1)."),
        click.option("--alpha", type=click.FloatRange(0, 1), metavar="X",
                     help="Weight of the data's own tokens (default 0.5); the teacher has the rest."),
        click.option("--epochs", type=click.FloatRange(0, min_open=True), metavar="X", help="Passes over the data."),
    ):  # fmt: skip
        command = option(command)
    return command


def _place_options(command: Command) -> Command:
    """Where a device keeps its releases, and as whom it is entered."""
    for option in (
        click.option("--sudo", is_flag=True, help="Run the agent there with sudo -n."),
        click.option("--root", metavar="PATH", help="The store there, where it is in no usual place."),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@cli.command()
@click.option("--model", required=True, metavar="M", help="Folder, config.json, .gguf, or catalog id.",
              shell_complete=_completed(_model_names, files=True))  # fmt: skip
@_device_options
@_model_options
@click.option("--imatrix", is_flag=True, help="Sizes as with an importance matrix.")
@click.option("--exact", is_flag=True, help="Ask llama.cpp itself (no weights needed) and print both.")
@json_option
@click.pass_obj
def fit(progress: Progress, /, **options: Any) -> None:
    """Does it fit? Exact memory arithmetic; needs no weights, no device and no torch.

    Exits with 4 when it does not fit the profile.

    \b
    Examples:
      edgepack fit --model Qwen2.5-1.5B-Instruct --profile jetson-orin --scheme Q4_K_M --context 8192
      edgepack fit --model config.json --scheme Q8_0 --context 4096 --slots 4 --kv-type q8_0 --json
    """
    from edgepack import pipeline

    document = pipeline.fit_document(options, progress)
    if options["as_json"]:
        _print_json(document)
    else:
        from edgepack import tables

        click.echo(tables.fit(document, _screen()), nl=False)
    if document["fits"] is False:
        raise NothingFits(f"{document['model']} at {document['scheme']} does not fit {options['profile']}")


@cli.command()
@_device_options
@click.option("--model", metavar="M", help="Folder, config.json, .gguf, catalog id, or Hub id.",
              shell_complete=_completed(_model_names, files=True))  # fmt: skip
@_student_options
@_model_options
@click.option("--imatrix", is_flag=True, help="An importance matrix will be given to the build.")
@click.option("--calibrated", is_flag=True,
              help="Calibration data will be given to the build: gguf-budget is considered too.")  # fmt: skip
@_choice_options
@click.option("--explain", is_flag=True, help="Say why this, why not the others, and what would change it.")
@click.option(
    "--pareto", is_flag=True, help="Show the candidates that no other beats in quality, speed and memory."
)
@click.option("--force", is_flag=True, help="Plan even what does not fit; the plan carries the reason.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan here.")
@json_option
def plan(
    output: Path | None, as_json: bool, explain: bool, pareto: bool, calibrated: bool, **options: Any
) -> None:
    """Choose model, quantization, KV cache and context for a device.

    \b
    Examples:
      edgepack plan --profile jetson-orin --explain
      edgepack plan --profile consumer-8gb --goal context --min-tokens-per-second 30
      edgepack plan --profile consumer-8gb --goal throughput --slots 8 --context 16384
      edgepack plan --profile raspberry-pi-5-8gb --license Apache-2.0 --disk 3GiB --pareto
      edgepack plan --profile jetson-orin --model ./my-model -o my.plan.json
      edgepack plan --profile raspberry-pi-5-4gb --teacher ./my-model --distill
    """
    from edgepack import choice, pipeline, serde, tables, workspace

    if calibrated:
        options |= {"imatrix": True, "budgeted": True}
    request, models = _asked(pipeline, options)
    chosen = pipeline.make_plan(request, models)
    explanation = choice.explain(chosen, request, models) if explain else None
    document: Any = serde.dump(chosen)
    if explanation is not None:
        document |= {"explanation": serde.dump(explanation)}
    if output is not None:
        workspace.write_text(output, serde.to_json(document))
    if as_json:
        _print_json(document)
    else:
        click.echo(tables.plan(chosen, explanation, _screen()), nl=False)
        if pareto:
            click.echo(tables.pareto(chosen, _screen()), nl=False)


@cli.command()
@_device_options
@click.option("--model", metavar="M", help="Folder, .gguf, catalog id, or Hub id.",
              shell_complete=_completed(_model_names, files=True))  # fmt: skip
@_student_options
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Build exactly this plan.")
@_model_options
@_choice_options
@_distillation_options
@_calibration_options
@_quality_options
@click.option("--imatrix", "imatrix_file", type=click.Path(path_type=Path),
              help="Importance matrix, by llama-imatrix, instead of calibration data.")  # fmt: skip
@click.option("--key", type=click.Path(path_type=Path), help="Sign with this ed25519 private key.")
@click.option("--with-runtime", is_flag=True, help="Carry a static llama-server (CPU devices).")
@click.option("--image-digest", metavar="SHA256", help="Pin the runtime image to this digest.")
@click.option("--release-sequence", type=click.IntRange(1), default=1, show_default=True,
              help="Recorded and signed, for installers to refuse a lower one.")  # fmt: skip
@click.option("--revision", metavar="REV", help="Commit of the Hub repository.")
@click.option("--offline", is_flag=True, help="Fetch nothing.")
@click.option("--force", is_flag=True, help="Build even what does not fit; the bundle carries the reason.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path(),
              help="Folder for the bundle and its plan.")  # fmt: skip
@json_option
@click.pass_obj
@_with_cache
def build(
    progress: Progress,
    /,
    plan_file: Path | None,
    output: Path,
    key: Path | None,
    with_runtime: bool,
    image_digest: str | None,
    release_sequence: int,
    offline: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make one bundle file: plan, fetch, convert, quantize, measure, record, render, sign.

    \b
    Examples:
      edgepack build --profile jetson-orin --model demo --key ~/.ssh/edgepack -o out/
      edgepack build --profile raspberry-pi-5-8gb --model ./my-model --scheme Q4_K_M --with-runtime
      edgepack build --profile jetson-orin --model ./my-model --calibration mine.jsonl --max-ppl-loss 2%
      edgepack build --profile raspberry-pi-5-4gb --teacher ./my-model --distill --data mine.jsonl
      edgepack build --plan my.plan.json
    """
    from edgepack import pipeline, serde, tables

    if plan_file is not None:
        planned = [name for name in PLANNED if options.get(name)]
        if planned:
            raise BadInput(
                f"--plan holds the whole plan, and --{planned[0].replace('_', '-')} would change it",
                hint="plan again with `edgepack plan … -o FILE`",
            )
        chosen = pipeline.read_plan(plan_file)
    else:
        calibrated = bool(options["calibration_files"])
        weighted = calibrated or bool(options["imatrix_file"])
        more: dict[str, Any] = {
            "imatrix": weighted,
            "budgeted": calibrated and pipeline.fills_budgets(),
            "offline": offline,
        }
        if with_runtime and options["runtime"] is None:
            more["runtime"] = "llama.cpp"  # the only one whose server can travel
        chosen = _planned(pipeline, {**options, **more})
    given = [flag for name, flag in TEACHING.items() if options[name]]
    if chosen.model.lesson is None and given:
        raise BadInput(
            f"{given[0]} says how a student is taught, and {chosen.model.id} is there already",
            hint="leave it out, or have one made: --teacher T --distill",
        )
    if not as_json and not isinstance(progress, Silent):
        click.echo(tables.plan(chosen, None, _screen(err=True)), nl=False, err=True)
    teaching = None if chosen.model.lesson is None else pipeline.distillation_options(options)
    if dry_run:
        _print_json(serde.dump(chosen)) if as_json else click.echo("dry run: nothing was built", err=True)
        return
    _, made = pipeline.build(
        chosen,
        pipeline.BuildOptions(
            out=output,
            key=key,
            with_runtime=with_runtime,
            quantization=pipeline.quantization_options(options),
            image_digest=image_digest,
            sequence=release_sequence,
            offline=offline,
            distillation=teaching,
        ),
        progress,
    )
    if not made.signed:
        click.echo("warning: the bundle is UNSIGNED; sign it with --key (edgepack key new PATH)", err=True)
    if as_json:
        _print_json(_document(serde.dump(made)))
    else:
        click.echo(str(made.path))


@cli.command()
@click.option("--model", required=True, metavar="M", shell_complete=_completed(_model_names, files=True),
              help="Folder, .gguf in full precision, catalog id, or Hub id.")  # fmt: skip
@click.option("--scheme", metavar="S", help="Quantization scheme, e.g. gptq-int4-g128, Q4_K_M, onnx-int4.",
              shell_complete=_completed(_scheme_names))  # fmt: skip
@click.option("--preset", type=click.Choice(["article", "article-better"]),
              help="The article's GPTQ (4 bits, group 128), or its cure (group 64, act order).")  # fmt: skip
@click.option("--profile", metavar="P", shell_complete=_completed(_profile_names, files=True),
              help="Device that it is for: ONNX graphs differ, gguf-budget fills it.")  # fmt: skip
@click.option("--context", type=click.IntRange(1), metavar="N",
              help="Tokens of one sequence on the device (default 4096, or all the model was trained on).")  # fmt: skip
@_calibration_options
@_quality_options
@click.option("--imatrix", "imatrix_file", type=click.Path(path_type=Path),
              help="Importance matrix for a GGUF, by llama-imatrix.")  # fmt: skip
@click.option("--revision", metavar="REV", help="Commit of the Hub repository.")
@click.option("--offline", is_flag=True, help="Fetch nothing.")
@click.option("--dry-run", is_flag=True, help="Say what the artifact would weigh and stop.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path(),
              help="Folder for the artifact.")  # fmt: skip
@json_option
@click.pass_obj
@_with_cache
def quantize(progress: Progress, /, output: Path, as_json: bool, **options: Any) -> None:
    """Make one artifact of a scheme, for any runtime, and measure what it lost.

    \b
    Examples:
      edgepack quantize --model ./my-model --scheme gptq-int4-g128 --calibration mine.jsonl -o out/
      edgepack quantize --model ./my-model --scheme IQ3_XXS --calibration mine.txt --max-kl 0.2
      edgepack quantize --model ./my-model --scheme onnx-int4 --profile consumer-8gb --context 8192
      edgepack quantize --model ./my-model --preset article --max-ppl-loss 2%
    """
    from edgepack import pipeline, serde, tables

    account = pipeline.quantize(options, output, progress)
    if as_json:
        _print_json(serde.dump(account))
    elif isinstance(progress, Silent):
        click.echo(str(account.path))
    else:
        click.echo(tables.quantized(_document(serde.dump(account))), nl=False)


@cli.command()
@click.option("--teacher", required=True, metavar="T", help="Folder, catalog id, or Hub id.",
              shell_complete=_completed(_model_names, files=True))  # fmt: skip
@click.option("--student", metavar="S",
              help="Smaller model with the same tokenizer to start from, or an earlier student.")  # fmt: skip
@click.option("--prune", metavar="SPEC",
              help="Start from what is kept of the teacher: layers=0.5,ffn=1024,heads=…,hidden=….")  # fmt: skip
@click.option("--profile", metavar="P", shell_complete=_completed(_profile_names, files=True),
              help="Without --student and --prune: the largest student that runs well there.")  # fmt: skip
@click.option("--replay", "replay_files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="What an earlier student was made with, mixed in so that it is not forgotten.")  # fmt: skip
@click.option("--replay-share", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="X",
              help="Share of the examples that come from --replay (default 0.2).")  # fmt: skip
@_distillation_options
@_recipe_options
@click.option("--tasks", type=click.Path(path_type=Path), metavar="FILE",
              help="jsonl of multiple-choice or exact-match items, for accuracy.")  # fmt: skip
@click.option("--accelerate", type=click.Path(path_type=Path), metavar="FILE",
              help="Configuration of accelerate launch, for several processes and machines.")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", help="Orders the data (default: 0, or the recipe's)."
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Threads (default: all cores).")
@click.option("--revision", metavar="REV", help="Commit of the teacher's Hub repository.")
@click.option("--offline", is_flag=True, help="Fetch nothing.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would be made and what the teacher's logits would weigh."
)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path),
              help="The student's folder (default: the teacher's name and what is kept of it, here).")  # fmt: skip
@json_option
@click.pass_obj
@_with_cache
def distill(progress: Progress, /, output: Path | None, as_json: bool, **options: Any) -> None:
    """Make a student: cut it out of its teacher or take a smaller model, and teach it on your data.

    What is made is a Hugging Face folder that `build`, `quantize` and `quality` take, with a model card, the curves,
    and what was measured on data that it was not trained on. Stopped at any point, the same command goes on.

    \b
    Examples:
      edgepack distill --teacher ./my-7b --student ./my-0.5b --data chats.jsonl -o student/
      edgepack distill --teacher ./my-model --prune layers=0.5 --data domain.txt --steps 2000 -o half/
      edgepack distill --teacher ./my-model --profile jetson-orin --data chats.jsonl --steps 2000
      edgepack distill --teacher ./my-model --student half/ --data new.jsonl --replay chats.jsonl -o half-2/
    """
    from edgepack import pipeline, serde, tables

    account = pipeline.distill(options, output, progress)
    if as_json:
        _print_json(serde.dump(account))
    elif isinstance(progress, Silent):
        click.echo(str(account.path))
    else:
        click.echo(tables.distilled(_document(serde.dump(account))), nl=False)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="M", help="The model that it was made from: folder, .gguf, catalog id, or Hub id."
)
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="Held-out text, or jsonl of texts (default: a built-in one).")  # fmt: skip
@click.option("--tasks", type=click.Path(path_type=Path), metavar="FILE",
              help="jsonl of multiple-choice or exact-match items, for accuracy.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), metavar="N", help="Tokens to measure on (default 4096).")
@click.option(
    "--window", type=click.IntRange(2), metavar="N", help="Tokens that are read together (default 256)."
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Threads (default: all cores).")
@click.option("--offline", is_flag=True, help="Fetch nothing.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here."
)
@json_option
@click.pass_obj
@_with_cache
def quality(
    progress: Progress,
    /,
    artifact: Path,
    against: str | None,
    text: Path | None,
    tasks: Path | None,
    tokens: int | None,
    window: int | None,
    jobs: int | None,
    offline: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure what an artifact lost: perplexity, KL to its parent, agreement and accuracy, with intervals.

    ARTIFACT is a .gguf, a folder (GPTQ, AWQ, INT8, compressed-tensors, ONNX, or unquantized), or a bundle; each is run
    by its own runtime.

    \b
    Examples:
      edgepack quality my-model-q4_k_m.gguf --against ./my-model
      edgepack quality my-model-gptq-int4-g128/ --against ./my-model --text held-out.jsonl --tasks mmlu.jsonl
      edgepack quality out/demo.tar --against demo --json -o quality.json
    """
    from edgepack import heldout, hub, quality, serde, tables, workspace
    from edgepack.scoring import tasks as questions

    parent = None if against is None else hub.resolve(against, offline=offline, progress=progress)
    with quality.subject(_existing(artifact), progress) as subject:
        measured = quality.measure(
            subject.path,
            against=parent.path if parent else None,
            text=heldout.read(text),
            fingerprints=subject.fingerprints,
            tasks=questions.read(tasks) if tasks else None,
            tokens=tokens or quality.TOKENS,
            window=window or quality.WINDOW,
            kv_type=subject.kv_type,
            threads=jobs,
            progress=progress,
        )
    if output is not None:
        workspace.write_text(output, serde.to_json(measured))
    document = _document(serde.dump(measured))
    if as_json:
        _print_json(document)
    else:
        click.echo(tables.quality(artifact.name, document), nl=False)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--allowed-signers", type=click.Path(path_type=Path), help="OpenSSH allowed_signers file.")
@json_option
def inspect(bundle: Path, allowed_signers: Path | None, as_json: bool) -> None:
    """Verify a bundle, every byte of it, and show what is in it.

    \b
    Examples:
      edgepack inspect out/demo.tar
      edgepack inspect out/demo.tar --allowed-signers signers --json
    """
    from edgepack import bundle as bundles
    from edgepack import serde, tables

    found = bundles.inspect(_existing(bundle), allowed_signers=allowed_signers)
    if as_json:
        _print_json(serde.dump(found))
    else:
        click.echo(tables.inspect(found, _screen()), nl=False)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write it here (default: standard output).")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["html", "md", "json", "svg"]),
              help="Default: by the name of the output, else html.")  # fmt: skip
@click.option("--model", metavar="M", help="The model's folder or config.json, where the catalog lacks it.")
@click.option("--catalog", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="YAML file of more models.")  # fmt: skip
@click.option("--allowed-signers", type=click.Path(path_type=Path), help="OpenSSH allowed_signers file.")
@click.pass_obj
def report(
    progress: Progress,
    /,
    files: tuple[Path, ...],
    output: Path | None,
    form: Literal["html", "md", "json", "svg"] | None,
    allowed_signers: Path | None,
    **options: Any,
) -> None:
    """Tell a colleague: one page of what a plan, bundle or check says, or several side by side.

    FILE is a bundle, or the JSON of plan, check, inspect, quality or doctor; what belongs together is put together.

    \b
    Examples:
      edgepack report out/demo.tar check.json -o report.html
      edgepack plan --profile jetson-orin --explain --json > plan.json && edgepack report plan.json -o plan.html
      edgepack report small.tar large.tar -o compared.html
      edgepack report check.json --format md
    """
    from edgepack import pipeline, workspace
    from edgepack import report as reports
    from edgepack.report import documents
    from edgepack.report import render as renders

    chosen = form or next(
        (known for known in renders.FORMATS if output and output.suffix == f".{known}"), None
    )
    found = []
    for path in files:
        progress.step(f"reading {path}")
        found.append(documents.read(path, allowed_signers=allowed_signers))
    text = renders.render(
        reports.report_of(found, shapes=pipeline.shapes(options), tool=f"edgepack {__version__}"),
        chosen or "html",
    )
    if output is None:
        click.echo(text.encode("utf-8"), nl=False)  # the page says that it is UTF-8, whatever the locale
    else:
        workspace.write_text(output, text)
        progress.step(f"wrote {output}")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--allowed-signers", type=click.Path(path_type=Path), help="OpenSSH allowed_signers file.")
@click.option("--full", is_flag=True, help="Fill every slot, not only one.")
@click.option("--memory-limit", metavar="SIZE", help="Simulate a smaller device, e.g. 2GiB.")
@click.option("--strict-device", is_flag=True, help="Fail when this is not the planned device.")
@click.option(
    "--emulate",
    is_flag=True,
    help="Run a bundle of another CPU architecture under QEMU; speed and peak memory are then not judged.",
)
@click.option(
    "--server", type=click.Path(path_type=Path), help="llama-server, or a Python that has the runtime."
)
@click.option(
    "--on",
    "host",
    metavar="HOST",
    help="Run it on an enrolled device; what runs there rests meanwhile, and nothing is switched.",
)
@_place_options
@click.option("--force", is_flag=True, help="With --on: run it there with too little memory, too.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here."
)
@json_option
@click.pass_obj
@_with_cache
def check(
    progress: Progress,
    bundle: Path,
    allowed_signers: Path | None,
    full: bool,
    memory_limit: str | None,
    strict_device: bool,
    emulate: bool,
    server: Path | None,
    host: str | None,
    root: str | None,
    sudo: bool,
    force: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the bundle here, or on a device, fill its KV cache, and hold every part against the plan.

    \b
    Examples:
      edgepack check out/demo.tar
      edgepack check out/demo.tar --full --json -o report.json
      edgepack check out/demo.tar --memory-limit 2GiB
      edgepack check out/demo-q8_0-raspberry-pi-5-4gb.tar --emulate
      edgepack check out/demo.tar --on pi@raspberrypi -o report.json
    """
    from edgepack import check as checks
    from edgepack import workspace
    from edgepack.units import parse_bytes

    limit = parse_bytes(memory_limit) if memory_limit else None
    if host is not None:
        for flag, given in (("--emulate", emulate), ("--server", server is not None)):
            if given:
                raise BadInput(
                    f"{flag} is for a check here, and --on runs it on {host}",
                    hint="the server of a device is named when it is enrolled: flash --enroll --server PATH",
                )
        report = _checked_on(
            host, _existing(bundle), allowed_signers, root=root, sudo=sudo, full=full, memory_limit=limit,
            strict_device=strict_device, force=force, progress=progress,
        )  # fmt: skip
    elif root is not None or sudo or force:
        raise BadInput("--root, --sudo and --force are for a device", hint="name it with --on HOST")
    else:
        report = checks.check(
            _existing(bundle),
            server=server,
            full=full,
            memory_limit=limit,
            allowed_signers=allowed_signers,
            strict_device=strict_device,
            emulate=emulate,
            progress=progress,
        )
    document = checks.to_document(report)
    if output is not None:
        workspace.write_text(output, json.dumps(document, indent=2, sort_keys=True) + "\n")
    if as_json:
        _print_json(document)
    else:
        click.echo(checks.table(report, _screen()), nl=False)
    if not report.passed:
        failed = ", ".join(item.name for item in report.items if item.status == "fail")
        raise CheckFailed(
            f"check failed: {failed}", hint="the report above says what was expected and measured"
        )


@cli.command()
@click.argument("words", nargs=-1, metavar="[BUNDLE]... HOST")
@click.option("--enroll", "enrolls", is_flag=True,
              help="Put this edgepack's agent, and who may sign, onto the device first.")  # fmt: skip
@click.option("--signers", type=click.Path(path_type=Path), metavar="FILE",
              help="OpenSSH allowed_signers: whose bundles the device takes (`key new` writes it).")  # fmt: skip
@click.option("--replace-signers", is_flag=True, help="Put them in the place of others that are enrolled.")
@click.option("--mode", type=click.Choice(["system", "user", "none"]),
              help="Whose services run releases (default: system for root, else user; none: nobody's).")  # fmt: skip
@_place_options
@click.option("--server", metavar="PATH", help="With --enroll: llama-server, or a Python, on the device.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Good releases that stay on the device.")
@click.option("--inventory", metavar="FILE",
              help="Flash all hosts of an Ansible inventory, a canary first (docs/fleet.md).")  # fmt: skip
@click.option("--limit", metavar="PATTERN", help="Of an inventory's hosts only these, as Ansible names them.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what would travel; touch nothing.")
@click.option("--rollback", is_flag=True, help="Go back to the release before.")
@click.option("--status", is_flag=True, help="Say what is on the device, and what happened there.")
@click.option(
    "--fsck", is_flag=True, help="Read every byte there again; with a BUNDLE, send what is damaged."
)
@click.option("--allow-downgrade", is_flag=True, help="Take a lower release sequence than ran there.")
@click.option(
    "--force", is_flag=True, help="Take another device than the planned one, and too little memory."
)
@click.option("--no-self-test", is_flag=True, help="Switch without testing; nothing goes back by itself.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here."
)
@json_option
@click.pass_obj
def flash(
    progress: Progress,
    /,
    words: tuple[str, ...],
    enrolls: bool,
    signers: Path | None,
    replace_signers: bool,
    server: str | None,
    mode: Literal["system", "user", "none"] | None,
    root: str | None,
    sudo: bool,
    keep: int | None,
    inventory: str | None,
    limit: str | None,
    dry_run: bool,
    rollback: bool,
    status: bool,
    fsck: bool,
    allow_downgrade: bool,
    force: bool,
    no_self_test: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Bring a bundle onto a device over ssh: send what it lacks, switch, test, and stay or go back.

    HOST is user@host, a name in your ssh configuration, ssh://user@host:port, or a path with a slash: a store on a disk
    of this machine. Cut off at any point, the same command goes on, and the device runs the old release or the new one.

    \b
    Examples:
      edgepack flash --enroll --signers key.allowed_signers pi@raspberrypi
      edgepack flash out/demo.tar pi@raspberrypi
      edgepack flash out/demo.tar jetson --sudo --dry-run
      edgepack flash --status jetson --sudo
      edgepack flash --enroll --signers key.allowed_signers --mode none /media/card/var/lib/edgepack
      edgepack flash out/demo-q6_k-jetson-orin-nano-8gb.tar out/demo-q8_0-raspberry-pi-5-8gb.tar --inventory hosts.ini
    """
    from contextlib import closing

    from edgepack import devices, serde, workspace
    from edgepack import flash as flashes

    where = devices.Where(root=root, mode=mode, sudo=sudo)
    asked = flashes.Asked(self_test=not no_self_test, keep=keep, allow_downgrade=allow_downgrade, force=force)
    if inventory is not None:
        if enrolls or rollback or status or fsck:
            raise BadInput(
                "--inventory flashes bundles, and takes no --enroll, --rollback, --status or --fsck"
            )
        named_bundles = tuple(_existing(Path(word)) for word in words)
        _flash_fleet(
            progress, named_bundles, inventory, limit=limit, signers=signers, where=where, asked=asked,
            dry_run=dry_run, output=output, as_json=as_json,
        )  # fmt: skip
        return
    if limit is not None:
        raise BadInput("--limit is of an inventory's hosts", hint="--inventory FILE")
    if not words:
        raise BadInput("name the host", hint="edgepack flash BUNDLE HOST")
    *named, host = words
    alone = [
        name for name, given in (("--rollback", rollback), ("--status", status), ("--fsck", fsck)) if given
    ]
    if len(alone) > 1 or (alone and (enrolls or dry_run)):
        raise BadInput(f"{alone[0]} goes alone")
    if enrolls and dry_run:
        raise BadInput(
            "--dry-run changes nothing, and --enroll does", hint="enroll first, then try the flash"
        )
    if not enrolls and (server is not None or replace_signers):
        given = "--server" if server is not None else "--replace-signers"
        raise BadInput(f"{given} says how a device is enrolled", hint="edgepack flash --enroll HOST …")
    if len(named) > 1:
        raise BadInput(f"{len(named)} bundles for one host, {host}", hint="a host takes one bundle at a time")
    if named and alone and not fsck:
        raise BadInput(f"{alone[0]} takes a host alone, not {named[0]} too")
    if not named and not alone and not enrolls:
        lacks = f"no device is named for {host}" if Path(host).is_file() else f"no bundle for {host}"
        raise BadInput(lacks, hint="edgepack flash BUNDLE HOST, or --status, --enroll …")
    cargo = None
    if named:
        progress.step(f"verifying {named[0]}")
        cargo = flashes.load(_existing(Path(named[0])), signers)
    failure: EdgepackError | None = None
    with closing(_connected(host)) as connection:
        if enrolls:
            found = devices.enroll(
                connection, where, signers=signers, server=server, keep=keep, replace_signers=replace_signers,
                progress=progress,
            )  # fmt: skip
            document, shown = _document(serde.dump(found)), flashes.status_table(found, host)
        if named or alone:
            device = devices.find(connection, where)
        if status:
            found = device.status()
            document, shown = _document(serde.dump(found)), flashes.status_table(found, host)
        elif rollback:
            back = device.rollback(progress.step)
            document, failure = _document(serde.dump(back)), flashes.unstarted(back, host)
            shown = f"{host}: release {back.current} is current again\n"
        elif fsck:
            state, sent = flashes.fsck(cargo, device, asked, progress=progress)
            document = {**_document(serde.dump(state)), "sent": sent}
            shown, failure = flashes.fsck_table(state), flashes.damage(state, host)
        elif cargo is not None:
            done = flashes.flash(cargo, device, asked, dry_run=dry_run, progress=progress)
            document, shown, failure = flashes.to_document(done), flashes.table(done), flashes.shortfall(done)
    if output is not None:
        workspace.write_text(output, json.dumps(document, indent=2, sort_keys=True) + "\n")
    if as_json:
        _print_json(document)
    else:
        click.echo(shown, nl=False)
    if failure is not None:
        raise failure


def _flash_fleet(
    progress: Progress,
    bundles: tuple[Path, ...],
    inventory: str,
    *,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    from edgepack import fleet, workspace

    if not bundles:
        raise BadInput(
            "no bundle for the hosts of an inventory", hint="edgepack flash BUNDLE --inventory FILE"
        )
    done = fleet.flash(bundles, inventory, progress=progress, **options)
    document = fleet.to_document(done)
    if output is not None:
        workspace.write_text(output, json.dumps(document, indent=2, sort_keys=True) + "\n")
    if as_json:
        _print_json(document)
    else:
        click.echo(fleet.table(done), nl=False)
    failure = fleet.shortfall(done)
    if failure is not None:
        raise failure


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--ansible", "what", flag_value="ansible", help="A folder with role, playbooks and bundles.")
@click.option(
    "--swu", "what", flag_value="swu", help="An SWUpdate image of a bundle, as hawkBit hands it out."
)
@click.option("--signature", "what", flag_value="signature",
              help="The signature of a bundle as an OCI image layout, for a registry.")  # fmt: skip
@click.option("--tar", "what", flag_value="tar",
              help="The bundle again: named are the two folders that skopeo pulled, bundle and signature.")  # fmt: skip
@click.option("--signers", type=click.Path(path_type=Path), metavar="FILE",
              help="With --ansible: the allowed_signers that devices are enrolled with.")  # fmt: skip
@click.option("--cert", type=click.Path(path_type=Path), metavar="FILE",
              help="With --swu: the certificate of --key, PEM; devices know it.")  # fmt: skip
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE",
              help="With --swu: the private key that signs the image, PEM.")  # fmt: skip
@click.option("--hardware", multiple=True, metavar="REVISION",
              help="With --swu: /etc/hwrevision of the devices (repeat it; default: the profile's name).")  # fmt: skip
@click.option("--root", metavar="PATH", help="With --swu: the store there, where it is in no usual place.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Write it here.")
@json_option
@click.pass_obj
def emit(
    progress: Progress,
    /,
    bundles: tuple[Path, ...],
    what: Literal["ansible", "swu", "signature", "tar"] | None,
    signers: Path | None,
    cert: Path | None,
    key: Path | None,
    hardware: tuple[str, ...],
    root: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Write bundles in the form that other tools deliver: an Ansible project, an SWUpdate image, registries' folders.

    \b
    Examples:
      edgepack emit --ansible out/a.tar out/b.tar --signers key.allowed_signers -o fleet/
      edgepack emit --swu out/demo.tar --cert fleet.crt --key fleet.key -o demo.swu
      edgepack emit --signature out/demo.tar -o signature/
      edgepack emit --tar pulled/ pulled-signature/ -o demo.tar
    """
    from edgepack import devices, flash, fleet, registry, serde, swu

    for name, value, form in (
        ("--signers", signers, "ansible"), ("--cert", cert, "swu"), ("--key", key, "swu"),
        ("--hardware", hardware or None, "swu"), ("--root", root, "swu"),
    ):  # fmt: skip
        if value is not None and what != form:
            raise BadInput(f"{name} is for --{form}")
    paths = [_existing(path) for path in bundles]
    if what in ("swu", "signature") and len(paths) != 1:
        raise BadInput(f"--{what} is of one bundle, and these are {len(paths)}")
    document: dict[str, Any] = {"schema_version": 1, "path": str(output)}
    if what == "ansible":
        if signers is None:
            raise BadInput("name who may sign", hint="--signers FILE: `edgepack key new` wrote it")
        fleet.emit(paths, output, signers=signers, progress=progress)
    elif what == "swu":
        if cert is None or key is None:
            raise BadInput("an image is signed", hint="--cert and --key; docs/fleet.md says how to make them")
        progress.step(f"verifying {paths[0]}")
        cargo = flash.load(paths[0], None)
        with progress.bar("writing the image", cargo.path.stat().st_size, rate=True) as advance:
            written = swu.write(
                cargo, output, certificate=cert, key=key, root=root or devices.SYSTEM_ROOT, hardware=hardware,
                on_bytes=advance,
            )  # fmt: skip
        document = _document(serde.dump(written))
    elif what == "signature":
        registry.signature_layout(flash.load(paths[0], None), output)
    elif what == "tar":
        if len(paths) != 2:
            raise BadInput(
                f"--tar is out of two folders, and these are {len(paths)}",
                hint="the bundle's, the signature's",
            )
        with progress.bar("writing the bundle", None) as advance:
            tar = registry.assemble(paths[0], paths[1], output, on_bytes=advance)
        document |= {"manifest_digest": f"sha256:{tar.manifest_sha256}", "bytes": tar.bytes}
    else:
        raise BadInput("say in which form", hint="--ansible, --swu, --signature or --tar")
    if as_json:
        _print_json(document)
    else:
        click.echo(str(output))


@cli.command()
@click.argument("source", required=False, metavar="BUNDLE|CHECK.json|LOG|-")
@click.option("--symptom", metavar="NAME", help="Answer by name what no log shows (docs/troubleshooting.md).",
              shell_complete=_completed(_symptom_names))  # fmt: skip
@click.option("--on", "host", metavar="HOST",
              help="Read a device: its installer's journal, its service's log, its kernel's.")  # fmt: skip
@_place_options
@json_option
def doctor(
    source: str | None, symptom: str | None, host: str | None, root: str | None, sudo: bool, as_json: bool
) -> None:
    """Name cause and cure of a failed check, of a log, of a device, or of a bundle that this machine would not carry.

    \b
    Examples:
      edgepack doctor server.log
      journalctl -u edgepack | edgepack doctor -
      edgepack check out/demo.tar --json | edgepack doctor -
      edgepack doctor out/demo.tar
      edgepack doctor --on pi@raspberrypi
    """
    from edgepack import doctor as doctors

    given = [word for word in (source, symptom and "--symptom", host and "--on") if word is not None]
    if not given:
        raise BadInput(
            "name a bundle, a report, a log or -, a --symptom, or a device with --on HOST",
            hint="docs/troubleshooting.md lists the symptoms",
        )
    if len(given) > 1:
        raise BadInput(f"{given[-1]} goes alone, not with {given[0]} too")
    if host is None and (root is not None or sudo):
        raise BadInput("--root and --sudo are for a device", hint="name it with --on HOST")
    if host is not None:
        report = _examined_on(host, root=root, sudo=sudo)
    elif symptom is not None:
        report = doctors.answer(symptom)
    elif source == "-":
        report = doctors.examine(None, sys.stdin.buffer.read().decode("utf-8", "replace"))
    else:
        report = doctors.examine(Path(str(source)))
    if as_json:
        _print_json(doctors.to_document(report))
    else:
        click.echo(doctors.table(report, _screen()), nl=False)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--allowed-signers", type=click.Path(path_type=Path), help="OpenSSH allowed_signers file.")
@click.pass_obj
def unpack(progress: Progress, /, bundle: Path, folder: Path, allowed_signers: Path | None) -> None:
    """Lay a verified bundle's files out as its start script, units and compose file expect them.

    \b
    Examples:
      edgepack unpack out/demo.tar /opt/edgepack --allowed-signers signers
    """
    from edgepack import bundle as bundles

    bundles.unpack(_existing(bundle), folder, allowed_signers=allowed_signers, progress=progress)
    click.echo(str(folder))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens to decode.")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the sampler.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end of text.")
@click.option("--allowed-signers", type=click.Path(path_type=Path), help="OpenSSH allowed_signers file.")
@click.option(
    "--server", type=click.Path(path_type=Path), help="llama-server, or a Python that has the runtime."
)
@click.pass_obj
@_with_cache
def run(progress: Progress, /, bundle: Path, prompt: str, **options: Any) -> None:
    """Start a bundle here, with the flags it ships, and continue a text.

    \b
    Examples:
      edgepack run out/demo.tar --prompt "It was the best of times"
      edgepack run out/demo.tar --prompt "Once upon a time" --temperature 0 --tokens 64
    """
    from edgepack.run import speak

    before = (
        prompt  # said with the first words that follow it: a bundle may be refused, or its server not start
    )
    for piece in speak(_existing(bundle), prompt, progress=progress, **options):
        click.echo(before + piece, nl=False)
        before = ""
    click.echo(before)


@cli.command()
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("/"),
    help="Read a captured /proc, /sys and /etc below this folder instead of the live machine's.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the YAML here.")
@json_option
@click.pass_obj
def probe(progress: Progress, root: Path, output: Path | None, as_json: bool) -> None:
    """Write the profile of the machine this runs on, or of one whose /proc, /sys and /etc were captured.

    \b
    Examples:
      edgepack probe -o this.yaml
      edgepack probe --root captured/jetson -o jetson.yaml
      edgepack plan --profile this.yaml
    """
    from edgepack import probe as probes
    from edgepack import serde, workspace

    found = probes.probe(root)
    text = probes.to_yaml(found)
    if output is not None:
        workspace.write_text(output, text)
        progress.step(f"wrote {output}")
    elif as_json:
        _print_json(_document(serde.dump(found)))
    else:
        click.echo(text, nl=False)


@cli.command()
@click.option("--profile", required=True, metavar="P", help="A profile's name, alias, or YAML file.",
              shell_complete=_completed(_profile_names, files=True))  # fmt: skip
@click.option("--power-mode", metavar="NAME", help="Power mode that was measured; default the profile's.")
@click.option("--from", "files", multiple=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="llama-bench JSON, a check report, or rows; give it more than once.")  # fmt: skip
@click.argument("more", nargs=-1, type=click.Path(dir_okay=False, path_type=Path), metavar="[FILE]...")
@click.option("--run", "measure", is_flag=True, help="Measure two models here, with llama-bench.")
@click.option("--on", "host", metavar="HOST",
              help="Check each FILE that is a bundle (.tar) on an enrolled device, and read the report.")  # fmt: skip
@_place_options
@click.option("--force", is_flag=True, help="With --on: run it there with too little memory, too.")
@click.option("--catalog", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="YAML file of more models, in the form of edgepack/catalog/*.yaml.")  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the profile here."
)
@json_option
@click.pass_obj
@_with_cache
def calibrate(
    progress: Progress,
    /,
    profile: str,
    power_mode: str | None,
    files: tuple[Path, ...],
    more: tuple[Path, ...],
    measure: bool,
    host: str | None,
    root: str | None,
    sudo: bool,
    force: bool,
    catalog: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Fit a device's speed constants on its own runs and write a profile that has them.

    On a device only its server is measured, since llama-bench is not there: two bundles of models of different size,
    planned for PROFILE, tell what the memory gives from what a layer costs.

    \b
    Examples:
      edgepack calibrate --profile jetson-orin --power-mode 25W --from small.json --from large.json -o mine.yaml
      edgepack calibrate --profile this-machine.yaml --run -o mine.yaml
      edgepack calibrate --profile jetson-orin --on jetson out/small.tar out/large.tar -o mine.yaml
      edgepack plan --profile mine.yaml
    """
    from edgepack import calibrate as calibrations
    from edgepack import pipeline, workspace

    with tempfile.TemporaryDirectory(prefix="edgepack-") as folder:
        given = (*files, *more)
        if host is not None:
            given = _measured_on(
                host, given, Path(folder), root=root, sudo=sudo, force=force, progress=progress
            )
        elif root is not None or sudo or force:
            raise BadInput("--root, --sudo and --force are for a device", hint="name it with --on HOST")
        found, text = pipeline.calibrate(
            profile,
            power_mode=power_mode,
            files=given,
            measure=measure,
            catalog_file=catalog,
            beside=output.parent if output is not None else Path(),
            progress=progress,
        )
    if output is not None:
        workspace.write_text(output, text)
        progress.step(f"wrote {output}")
    if as_json:
        _print_json(calibrations.to_document(found))
    elif output is not None:
        click.echo(calibrations.table(found, _screen()), nl=False)
    else:
        click.echo(text, nl=False)


@cli.group()
def profiles() -> None:
    """Device profiles: list, show, validate, schema."""


@profiles.command("list")
@json_option
def profiles_list(as_json: bool) -> None:
    """All built-in profiles with their budgets.

    \b
    Examples:
      edgepack profiles list
      edgepack profiles list --json
    """
    from edgepack import profile, tables

    everything = [profile.load(name) for name in profile.names()]
    if as_json:
        _print_json({"schema_version": 1, "profiles": [tables.profile_row(p) for p in everything]})
    else:
        click.echo(tables.profiles(everything, _screen()), nl=False)


@profiles.command("show")
@click.argument("name", shell_complete=_completed(_profile_names, files=True))
@json_option
def profiles_show(name: str, as_json: bool) -> None:
    """One profile, by name, alias or file, with everything it inherits.

    \b
    Examples:
      edgepack profiles show jetson-orin
      edgepack profiles show mine.yaml --json
    """
    from edgepack import profile, serde, tables

    found = profile.load(name)
    if as_json:
        _print_json(_document(serde.dump(found)))
    else:
        click.echo(tables.profile(found, _screen()), nl=False)


@profiles.command("validate")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def profiles_validate(files: tuple[Path, ...]) -> None:
    """Read profile files and report all their problems at once.

    \b
    Examples:
      edgepack profiles validate mine.yaml
    """
    from edgepack import profile

    refused: list[BadInput] = []
    for file in map(_existing, files):
        try:
            profile.load(str(file.absolute()))
            click.echo(f"{file}: valid")
        except BadInput as error:
            refused.append(error)
    if refused:
        raise BadInput("\n".join(error.message for error in refused), hint=refused[0].hint)


@profiles.command("schema")
def profiles_schema() -> None:
    """JSON Schema of profile files, for editors.

    \b
    Examples:
      edgepack profiles schema > profile.schema.json
    """
    from edgepack import profile

    _print_json(profile.schema())


@cli.command("schema")
@click.argument("name", required=False, shell_complete=_completed(_schema_names))
@json_option
def schema_command(name: str | None, as_json: bool) -> None:
    """JSON Schema of a document that edgepack writes; without NAME, which there are.

    \b
    Examples:
      edgepack schema
      edgepack schema check > check.schema.json
    """
    from edgepack import documents, tables

    if name is not None:
        _print_json(documents.schema(documents.named(name)))
    elif as_json:
        _print_json(documents.listing())
    else:
        rows = ((d.name, d.title, d.written_by) for d in documents.DOCUMENTS)
        click.echo(tables.schemas(rows, _screen()), nl=False)


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what teaches a shell edgepack's commands, options and values.

    \b
    Examples:
      edgepack completion bash > ~/.local/share/bash-completion/completions/edgepack
      edgepack completion zsh > ~/.zfunc/_edgepack
      edgepack completion fish > ~/.config/fish/completions/edgepack.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise BadInput(f"click knows no shell {shell}")
    click.echo(kind(cli, {}, "edgepack", "_EDGEPACK_COMPLETE").source())


@cli.group("toolchain")
def toolchain_group() -> None:
    """llama.cpp, built once from the pinned source and cached."""


@toolchain_group.command("install")
@click.pass_obj
@_with_cache
def toolchain_install(progress: Progress) -> None:
    """Build llama.cpp (about 8 minutes on 2 cores); resumes, and does nothing when it is there.

    \b
    Examples:
      edgepack toolchain install
    """
    from edgepack import toolchain

    click.echo(str(toolchain.install(progress).root))


@toolchain_group.command("status")
@json_option
def toolchain_status(as_json: bool) -> None:
    """Say whether llama.cpp is built, and which.

    \b
    Examples:
      edgepack toolchain status
    """
    from edgepack import serde, toolchain

    status = _document(serde.dump(toolchain.status()))
    if as_json:
        _print_json(status)
    else:
        for name, value in status.items():
            click.echo(f"{name:<10} {value}")


@cli.group("cache")
def cache_group() -> None:
    """What is kept so that stages resume: how large it is, and how it is made smaller."""


def _cache_options(command: Command) -> Command:
    for option in (
        json_option,
        click.option("--unused", type=click.IntRange(0), default=0, metavar="DAYS",
                     help="Only what was not used for so many days."),
        click.argument("kinds", nargs=-1, metavar="[KIND]...", shell_complete=_completed(_kinds_of_cache)),
    ):  # fmt: skip
        command = option(command)
    return command


@cache_group.command("list")
@_cache_options
@click.pass_obj
def cache_list(progress: Progress, /, kinds: tuple[str, ...], unused: int, as_json: bool) -> None:
    """Show what the cache holds; of kinds that are named, every single thing.

    \b
    Examples:
      edgepack cache list
      edgepack cache list artifacts --unused 30
    """
    from edgepack import cache, serde

    found = cache.contents(kinds, unused=unused)
    if as_json:
        _print_json(serde.dump(found))
    else:
        click.echo(cache.table(found, each=bool(kinds), screen=_screen()), nl=False)


@cache_group.command("remove")
@_cache_options
@click.option("--all", "every", is_flag=True, help="Of every kind, llama.cpp's programs too.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and leave it.")
@click.pass_obj
def cache_remove(
    progress: Progress, /, kinds: tuple[str, ...], unused: int, every: bool, dry_run: bool, as_json: bool
) -> None:
    """Take things out of the cache; what is needed again is made again. Refused while another edgepack works.

    \b
    Examples:
      edgepack cache remove artifacts reference-logits
      edgepack cache remove --all --unused 30 --dry-run
    """
    from edgepack import cache, serde

    if bool(kinds) == every:
        raise BadInput("name what is to go", hint=f"KINDs or --all; the cache has {', '.join(cache.KINDS)}")
    found = cache.contents(kinds, unused=unused)
    account = found if dry_run else cache.remove(found)
    if as_json:
        _print_json(serde.dump(account))
    else:
        click.echo(cache.table(account, each=bool(kinds) or dry_run, screen=_screen()), nl=False)


@cli.group("key")
def key_group() -> None:
    """Signing keys (ed25519, OpenSSH)."""


@key_group.command("new")
@click.argument("path", type=click.Path(path_type=Path))
def key_new(path: Path) -> None:
    """Make a key pair and the allowed_signers line to enroll on devices.

    \b
    Examples:
      edgepack key new ~/.ssh/edgepack
    """
    from edgepack import workspace
    from edgepack.bundle import sign

    sign.new_key(path)
    signers = path.with_name(path.name + ".allowed_signers")
    workspace.write_text(signers, sign.allowed_signer(path))
    click.echo(f"private key      {path}  (keep it on the build host)")
    click.echo(f"allowed_signers  {signers}  (give it to devices and to --allowed-signers)")


def _asked(pipeline: Any, options: dict[str, Any]) -> tuple[Request, list[Candidate]]:
    """The planner's question, and the models it may answer with."""
    request: Request = pipeline.request_from(options)
    models: list[Candidate] = pipeline.candidates(
        options.get("model"),
        options.get("teacher"),
        revision=options.get("revision"),
        offline=bool(options.get("offline")),
        extra=pipeline.extra_models(options),
        distill=bool(options.get("distill")),
        converted=request.takes_gguf,
    )
    return request, models


def _planned(pipeline: Any, options: dict[str, Any]) -> Plan:
    chosen: Plan = pipeline.make_plan(*_asked(pipeline, options))
    return chosen


def _checked_on(
    host: str,
    bundle: Path,
    allowed_signers: Path | None,
    *,
    root: str | None,
    sudo: bool,
    progress: Progress,
    full: bool = False,
    memory_limit: int | None = None,
    strict_device: bool = False,
    force: bool = False,
) -> CheckReport:
    from contextlib import closing

    from edgepack import devices
    from edgepack import flash as flashes

    progress.step(f"verifying {bundle.name}")
    cargo = flashes.load(bundle, allowed_signers)
    with closing(_connected(host)) as connection:
        return flashes.check_on(
            cargo,
            devices.find(connection, devices.Where(root=root, sudo=sudo)),
            # Nothing is switched: the report says what does not match.
            flashes.Asked(allow_downgrade=True, other_device=True, force=force),
            full=full,
            memory_limit=memory_limit,
            strict_device=strict_device,
            progress=progress,
        )


def _measured_on(
    host: str,
    files: tuple[Path, ...],
    folder: Path,
    *,
    root: str | None,
    sudo: bool,
    force: bool,
    progress: Progress,
) -> tuple[Path, ...]:
    """The files, with the report of a check on the device in the place of each bundle."""
    from edgepack import check as checks
    from edgepack import workspace

    if not any(path.suffix == ".tar" for path in files):
        raise BadInput(
            f"no bundle to measure on {host}",
            hint="build two of different size for this profile, and name them",
        )
    reports = []
    for path in files:
        if path.suffix != ".tar":
            reports.append(path)
            continue
        report = _checked_on(
            host, _existing(path), None, root=root, sudo=sudo, force=force, progress=progress
        )
        reports.append(folder / f"{path.stem}.json")
        workspace.write_text(reports[-1], json.dumps(checks.to_document(report)))
    return tuple(reports)


def _examined_on(host: str, *, root: str | None, sudo: bool) -> Diagnosed:
    from contextlib import closing

    from edgepack import devices, doctor, hostlogs

    with closing(_connected(host)) as connection:
        return doctor.examine_host(hostlogs.read(connection, devices.Where(root=root, sudo=sudo)))


def _connected(host: str) -> Connection:
    """A line to a device by the user's ssh, or by the one that EDGEPACK_SSH names with its options."""
    import shlex

    from edgepack import remote

    program = shlex.split(os.environ.get("EDGEPACK_SSH", "ssh"))
    return remote.connect(host, ssh=program, interactive=sys.stdin.isatty())


def _existing(path: Path) -> Path:
    if not path.exists():
        raise NotFound(f"{path} does not exist", hint="check the path")
    return path


def _screen(*, err: bool = False) -> Screen:
    """The terminal that stdout or stderr is; no width and no color where it is none. https://no-color.org"""
    if not (sys.stderr if err else sys.stdout).isatty():
        return PLAIN
    colorless = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return Screen(width=max(40, shutil.get_terminal_size().columns), color=not colorless)


def _document(fields: object) -> dict[str, Any]:
    """A dumped value as a document of its own."""
    return {"schema_version": 1, **fields} if isinstance(fields, dict) else {}


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, sort_keys=True))
