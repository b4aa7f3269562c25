"""A teacher's pass over the data with real models: what is kept is what it says, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from edgepack import serde, workspace
from edgepack.artifact import Checkpoint
from edgepack.builders import child
from edgepack.builders.distill import Objective, examples, loss, teacher
from edgepack.builders.distill.teacher import Identity, Job, Kept
from edgepack.errors import BadInput, NoSpace, Unsupported
from edgepack.progress import Silent
from tests import checkpoints

pytestmark = pytest.mark.integration

K = 16
TEMPERATURE = 2.0
VOCABULARY = 2048
ROWS = 40
"""Of a shard: there are some dozens of them."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One layer of the built-in model, with rows of padding that would be most likely of all."""
    folder = checkpoints.first_layers(tmp_path_factory.mktemp("teacher") / "padded", 1)
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, 20 * table[:64]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"vocab_size": len(table) + 64}), encoding="utf-8"
    )
    return checkpoints.checkpoint(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose in examples of many lengths, of which some prompts are not to be answered."""
    tokens = checkpoints.heldout(1, 4096)[0].tolist()
    made, at = [], 0
    for number in range(80):
        length = 12 + 7 * (number % 9)
        prompt = 1 + number % 10
        made.append((tokens[at : at + length], [False] * prompt + [True] * (length - prompt)))
        at += length
    made[7] = (made[7][0], [False] * len(made[7][0]))
    return examples.write(made, tmp_path_factory.mktemp("data") / "examples").folder


def keep(source: Checkpoint, data: Path, folder: Path) -> Path:
    return teacher.keep(
        source, data, folder, k=K, temperature=TEMPERATURE, precision="fp32", threads=1, progress=Silent(),
        batch_tokens=128, shard_rows=ROWS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept(source: Checkpoint, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep(source, data, tmp_path_factory.mktemp("kept"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_keeps_what_the_model_itself_says_of_every_token_of_a_response(
    source: Checkpoint, data: Path, kept: Path
) -> None:
    found = Kept.open(kept)
    opened = examples.Examples.open(data)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    exact = []
    for example in opened:
        with torch.inference_mode():
            logits = model(torch.from_numpy(example.tokens.astype(np.int64))[None]).logits[0, :-1]
        exact.append(logits[torch.from_numpy(np.array(example.response[1:])), :VOCABULARY])
    logits = torch.cat(exact).double()
    logits -= logits.amax(1, keepdim=True)

    rows = found.rows(0, len(found))

    assert len(found) == opened.response_tokens == len(logits)
    assert (found.k, found.vocabulary, found.bytes_per_token) == (K, VOCABULARY, K * 11 // 8 + 2 * K + 12)
    kept_logits = torch.from_numpy(rows.logits).double()
    ids = torch.from_numpy(rows.ids).long()
    torch.testing.assert_close(kept_logits, logits.gather(1, ids), rtol=2**-11, atol=1e-4)
    torch.testing.assert_close(kept_logits, logits.topk(K, 1).values, rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(rows.lse).double(), logits.logsumexp(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.from_numpy(rows.lse_t).double(), (logits / TEMPERATURE).logsumexp(1), rtol=1e-3, atol=1e-3
    )
    targets = np.concatenate([e.tokens[np.array(e.response)] for e in opened])
    own = logits.log_softmax(1)[torch.arange(len(logits)), torch.from_numpy(targets.astype(np.int64))]
    torch.testing.assert_close(torch.from_numpy(rows.target).double(), own, rtol=1e-4, atol=1e-4)
    part = found.rows(ROWS - 3, 3 * ROWS + 1)  # over shards
    np.testing.assert_array_equal(part.ids, rows.ids[ROWS - 3 : 3 * ROWS + 1])
    np.testing.assert_array_equal(part.target, rows.target[ROWS - 3 : 3 * ROWS + 1])


def test_the_loss_against_it_is_the_one_against_all_logits_in_buckets(
    source: Checkpoint, data: Path, kept: Path
) -> None:
    """The first example's rows, and a student that is the teacher with noise."""
    example = examples.Examples.open(data)[0]
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(example.tokens.astype(np.int64))[None]).logits
    answered = torch.from_numpy(np.array(example.response))[None]
    full, targets = loss.select(logits, torch.from_numpy(np.array(example.tokens))[None], answered)
    student = full + torch.randn(full.shape, generator=torch.Generator().manual_seed(0))
    objective = Objective(temperature=TEMPERATURE)
    soft = loss.Soft.of(Kept.open(kept).rows(0, len(full)))

    entropy, apart = loss.token_losses(student, targets, soft, objective)

    whole = loss.token_losses(student, targets, full[:, :VOCABULARY], objective)
    torch.testing.assert_close(entropy, whole[0])
    assert (apart <= whole[1] + 1e-3).all()  # what a bucket holds together cannot be told apart
    assert (apart > 0).all()
    q = (full[:, :VOCABULARY].double() / TEMPERATURE).softmax(1)
    p = (student[:, :VOCABULARY].double() / TEMPERATURE).softmax(1)
    q, p = (
        torch.cat([each.gather(1, soft.ids), each.scatter(1, soft.ids, 0).sum(1, True)], 1) for each in (q, p)
    )
    torch.testing.assert_close(apart.double(), (q * (q / p).log()).sum(1), rtol=5e-3, atol=5e-4)


def test_killed_and_run_again_it_ends_with_the_same_bytes(
    source: Checkpoint, data: Path, kept: Path, tmp_path: Path
) -> None:
    words = [str(source.path), source.source, source.revision, str(data), str(tmp_path)]
    program = (
        "import sys; from pathlib import Path; from edgepack.artifact import Checkpoint\n"
        "from tests.integration.test_distill_teacher import keep\n"
        "path, name, revision, data, folder = sys.argv[1:]\n"
        "keep(Checkpoint(path=Path(path), source=name, revision=revision, license=''), Path(data), Path(folder))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **child.own_code()},
    )
    place = tmp_path / kept.name
    until = time.monotonic() + 120
    while not list(place.glob("000003-*.npy")) and time.monotonic() < until and started.poll() is None:
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    whole = {path.name: path.stat().st_mtime_ns for path in place.glob("0*.npy")}
    assert 3 < len(whole) < len(files(kept)) - 1
    assert not (place / teacher.ABOUT).exists()

    again = keep(source, data, tmp_path)

    assert again == place
    assert files(again) == files(kept)
    assert {name: (place / name).stat().st_mtime_ns for name in whole} == whole  # not made twice


def test_a_damaged_shard_is_found_and_made_again(
    source: Checkpoint, data: Path, kept: Path, tmp_path: Path
) -> None:
    place = tmp_path / kept.name
    shutil.copytree(kept, place)
    names = sorted(path.name for path in place.glob("0*.npy"))
    with (place / names[2]).open("r+b") as stream:
        stream.seek(-5, os.SEEK_END)
        stream.write(b"\xff")
    os.truncate(place / names[4], 1000)

    with pytest.raises(BadInput, match=f"{names[4]} is no whole shard"):
        Kept.open(place)
    with pytest.raises(BadInput, match="holds no kept teacher"):
        Kept.open(tmp_path)
    again = keep(source, data, tmp_path)

    assert files(again) == files(kept)


def test_several_processes_read_it_at_once(kept: Path) -> None:
    program = (
        "import hashlib, sys; from pathlib import Path; from edgepack.builders.distill.teacher import Kept\n"
        "kept = Kept.open(Path(sys.argv[1])); print('open', flush=True); sys.stdin.readline()\n"
        "rows = kept.rows(0, len(kept))\n"
        "print(hashlib.sha256(rows.ids.tobytes() + rows.logits.tobytes() + rows.lse.tobytes()).hexdigest())"
    )
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(kept)], env={**os.environ, **child.own_code()}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    opened = [reader.stdout.readline() for reader in readers if reader.stdout is not None]

    said = [reader.communicate("\n")[0] for reader in readers]

    assert opened == ["open\n", "open\n"]
    assert said[0] == said[1] != ""
    assert [reader.returncode for reader in readers] == [0, 0]


# ── in this process: what the other one does ──


def job(source: Path, data: Path, folder: Path) -> Path:
    folder.mkdir()
    identity = Identity(
        teacher="t", tokenizer="t", examples="e", k=K, temperature=TEMPERATURE, vocabulary=VOCABULARY,
        precision="fp32", batch_tokens=128, shard_rows=ROWS,
    )  # fmt: skip
    value = Job(
        teacher=str(source),
        name="the teacher",
        examples=str(data),
        folder=str(folder),
        identity=identity,
        threads=1,
    )
    (folder / "job.json").write_text(serde.to_json(value), encoding="utf-8")
    return folder / "job.json"


def test_a_full_disk_is_said_once_and_whole_shards_stay(
    source: Checkpoint, data: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = job(source.path, data, tmp_path / "kept")
    write = Path.write_bytes
    written: list[Path] = []

    def fills_up(self: Path, content: Any) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(self)
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with pytest.raises(NoSpace, match=r"the disk is full .* the teacher says: 2 of \d\d shards are whole"):
        teacher.work(str(place))
    monkeypatch.undo()
    teacher.work(str(place))

    shards = {name: content for name, content in files(kept).items() if name.endswith(".npy")}
    assert {n: c for n, c in files(place.parent).items() if n.endswith(".npy")} == shards


def test_it_does_not_begin_where_the_disk_is_too_small(
    source: Checkpoint, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 4096)

    with pytest.raises(NoSpace, match=r"4.0 KiB free and .* must be written"):
        keep(source, data, tmp_path)


def test_logits_that_are_no_numbers_are_refused_with_the_token(source: Checkpoint, tmp_path: Path) -> None:
    """The embedding of token 9 is NaN, and so are all logits of the example that has it."""
    broken = tmp_path / "broken"
    shutil.copytree(source.path, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][9] = torch.nan
    weights["lm_head.weight"] = load_file(source.path / "model.safetensors")["model.embed_tokens.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    marks = [False, False, True, True]
    two = examples.write([([1, 2, 3, 4], marks), ([1, 2, 9, 4], marks)], tmp_path / "two").folder

    with pytest.raises(BadInput, match="logits that are no numbers for token 2 of example 1 in"):
        teacher.work(str(job(broken, two, tmp_path / "kept")))


def test_examples_in_other_tokens_and_without_responses_are_refused(
    source: Checkpoint, tmp_path: Path
) -> None:
    other = examples.write([([1, 2, 2050], [False, True, True])], tmp_path / "examples").folder

    with pytest.raises(BadInput, match="has the token 2050, and padded knows 2048"):
        keep(source, other, tmp_path / "kept")
    silent = examples.write([([1, 2, 3], [False, False, False])], tmp_path / "silent").folder
    with pytest.raises(BadInput, match="has no token of a response"):
        keep(source, silent, tmp_path / "kept")


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, final_logit_softcapping=0.5),
        GraniteConfig(**SMALL, logits_scaling=7.0),
        CohereConfig(**SMALL, logit_scale=0.25),
    ],
    ids=lambda config: str(config.model_type),
)
def test_logits_are_scaled_and_capped_as_the_model_does_it(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        states = model.base_model(ids, use_cache=False).last_hidden_state

        found = loss.head(model)(states)

    torch.testing.assert_close(found, expected)


def test_a_model_that_makes_its_logits_in_another_way_is_refused(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "head", lambda model: lambda states: 2 * model.lm_head(states))

    with pytest.raises(Unsupported, match="LlamaForCausalLM\\) makes its logits in a way that is not known"):
        teacher.Teacher(source.path, "the teacher", "fp32", 1)
