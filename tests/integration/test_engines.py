"""Both engines on the built-in model: they answer what the runtime's own loop does, and memory stays flat."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepack.server import engines
from edgepack.server.engines import CannotLoad, Engine, Options, Sampling, Token
from tests import quantized
from tests.quantized import DEMO, build
from tests.server_process import fuzz, running

pytestmark = pytest.mark.integration

CONTEXT, CHUNK = 192, 48
EXAMPLES = 5
"""Of schemathesis for each operation."""
GREEDY = Sampling(temperature=0, ignore_eos=True)
PROMPT = [int(token) for token in quantized.heldout()[:130]]


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("onnx-int8", tmp_path_factory.mktemp("engine"), context=CONTEXT).path


def options(name: str, folder: Path, **changed: object) -> Options:
    kept: dict[str, object] = {
        "model": folder, "context": CONTEXT, "slots": 2, "ubatch": CHUNK, "threads": 1, "provider": "cpu",
        "kv_type": "f32",
    }  # fmt: skip
    return Options(**(kept | changed))  # type: ignore[arg-type]  # checked by the tests that use it


@pytest.fixture(scope="session")
def onnx(onnx_folder: Path) -> Iterator[Engine]:
    engine = engines.load("onnx-genai", options("onnx-genai", onnx_folder))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def torch_engine() -> Iterator[Engine]:
    engine = engines.load("transformers", options("transformers", DEMO))
    yield engine
    engine.close()


@pytest.fixture(params=["onnx", "torch_engine"])
def engine(request: pytest.FixtureRequest) -> Engine:
    loaded: Engine = request.getfixturevalue(request.param)
    return loaded


def answer(
    engine: Engine,
    prompt: list[int],
    limit: int,
    sampling: Sampling = GREEDY,
    *,
    slot: int = 0,
    reuse: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Token]:
    return list(engine.generate(slot, prompt, sampling, limit, reuse=reuse, cancelled=cancelled))


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_transformers_answers_as_generate_does_in_32_bits(torch_engine: Engine) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, local_files_only=True)
    said = model.generate(torch.tensor([PROMPT]), max_new_tokens=40, min_new_tokens=40, do_sample=False)

    assert ids(answer(torch_engine, PROMPT, 40)) == said[0, len(PROMPT) :].tolist()


def test_onnx_answers_as_onnxruntime_genai_does(onnx: Engine, onnx_folder: Path) -> None:
    """The whole prompt at once in its own classes, which have no token barred either."""
    import onnxruntime_genai as og

    model = og.Model(str(onnx_folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=CONTEXT)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    logits = generator.get_logits()[0, 0]

    token = answer(onnx, PROMPT, 1, Sampling(temperature=0, logprobs=3))[0]
    generator.generate_next_token()

    assert token.id == int(generator.get_sequence(0)[-1])
    assert token.logprob == pytest.approx(
        float(logits.max() - np.logaddexp.reduce(logits.astype(float))), abs=1e-3
    )
    assert token.top[0] == (token.id, token.logprob)


def test_engines_agree_on_what_is_likely(onnx: Engine, torch_engine: Engine) -> None:
    """8-bit weights: the same likeliest token, and log probabilities of the first few within 0.1."""
    first = answer(onnx, PROMPT, 1, Sampling(temperature=0, logprobs=5))[0]
    second = answer(torch_engine, PROMPT, 1, Sampling(temperature=0, logprobs=5))[0]

    assert first.id == second.id
    others = dict(second.top)
    assert [log for _, log in first.top] == pytest.approx([others[i] for i, _ in first.top], abs=0.1)


def test_chunks_answer_as_the_whole_prompt(onnx_folder: Path, engine: Engine) -> None:
    folder = onnx_folder if engine.name == "onnx-genai" else DEMO
    whole = engines.load(engine.name, options(engine.name, folder, ubatch=CONTEXT, slots=1))

    expected = ids(answer(whole, PROMPT, 40))
    whole.close()

    assert ids(answer(engine, PROMPT, 40)) == expected


def test_a_conversation_is_taken_up_where_it_was_and_answers_the_same(engine: Engine) -> None:
    first = answer(engine, PROMPT[:60], 10)
    longer = [*PROMPT[:60], *ids(first), *PROMPT[60:90]]
    held = engine.cached(0, longer)

    again = answer(engine, longer, 20, reuse=True)

    assert held == 69, "the last token of an answer was never read"
    assert ids(again) == ids(answer(engine, longer, 20, slot=1))
    assert engine.cached(0, longer) == len(longer) - 1, "one token is read again for its logits"
    assert engine.cached(0, [*longer[:7], longer[7] + 1]) == 7
    assert engine.cached(0, []) == 0


def test_the_same_prompt_again_answers_the_same(engine: Engine) -> None:
    first = ids(answer(engine, PROMPT, 10))

    assert ids(answer(engine, PROMPT, 10, reuse=True)) == first


def test_cancelling_ends_between_chunks_and_between_tokens(engine: Engine) -> None:
    asked = itertools.count()
    in_prompt = answer(engine, PROMPT, 40, cancelled=lambda: next(asked) == 1)
    held = engine.cached(0, PROMPT)

    asked_again = itertools.count()
    chunks = -(-len(PROMPT) // CHUNK) + 1
    in_answer = answer(engine, PROMPT, 40, reuse=True, cancelled=lambda: next(asked_again) > chunks)

    assert in_prompt == []
    assert held == CHUNK
    assert 0 < len(in_answer) < 40
    assert ids(answer(engine, PROMPT, 40, reuse=True))[: len(in_answer)] == ids(in_answer)


def test_an_answer_that_nobody_hears_out_leaves_the_slot_usable(engine: Engine) -> None:
    expected = ids(answer(engine, PROMPT, 12))
    left = engine.generate(0, PROMPT, GREEDY, 40, reuse=True, cancelled=lambda: False)
    for _ in range(3):
        next(left)
    del left

    assert ids(answer(engine, PROMPT, 12, reuse=True)) == expected


def test_slots_answer_at_the_same_time_what_they_answer_alone(engine: Engine) -> None:
    prompts = [PROMPT[:100], PROMPT[20:130]]
    alone = [ids(answer(engine, prompt, 30, slot=slot)) for slot, prompt in enumerate(prompts)]
    together: list[list[int]] = [[], []]

    def work(slot: int) -> None:
        together[slot] = ids(answer(engine, prompts[slot], 30, slot=slot))

    threads = [threading.Thread(target=work, args=(slot,)) for slot in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert together == alone


def test_text_is_whole_characters_and_all_of_it(engine: Engine) -> None:
    text = "Ünï 你好 🙂 done"
    tokens = engine.tokenize(text, special=True)
    said = answer(engine, PROMPT[:40], 60, Sampling(temperature=1.5, seed=5, ignore_eos=True))

    assert engine.detokenize(tokens) == text
    whole = engine.detokenize(ids(said)).rstrip("\ufffd")
    assert "".join(token.text for token in said).rstrip("\ufffd") == whole


def test_a_prompt_may_end_in_the_token_that_models_pad_with(engine: Engine) -> None:
    """0, which ends a sequence and is padding: 0.18 would answer from the token before it."""
    prompt = [*PROMPT[:30], 0]
    assert engine.tokenize("<|endoftext|>", special=True) == [0]

    together = answer(engine, prompt, 1, Sampling(temperature=0, logprobs=1))[0]
    answer(engine, prompt[:-1], 1)
    apart = answer(engine, prompt, 1, Sampling(temperature=0, logprobs=1), reuse=True)[0]

    assert together.id == apart.id
    assert together.logprob == pytest.approx(apart.logprob, abs=0.1)
    assert len(answer(engine, [0] * 100, 2)) == 2, "padding only"


def test_memory_is_flat_over_prompts_of_many_lengths(engine: Engine) -> None:
    """After two rounds through all kinds of lengths; a kernel for each length would be 1 MiB apiece."""
    some = random.Random(4)

    def rounds(count: int) -> None:
        for i in range(count):
            prompt = [some.randrange(1, engine.vocabulary) for _ in range(some.randrange(1, CONTEXT - 4))]
            answer(engine, prompt, 2, slot=i % 2)

    rounds(24)
    before = resident()
    rounds(40)

    assert resident() - before < 4 << 20


def resident() -> int:
    line = next(
        x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def test_what_an_engine_counts_is_what_the_model_has(onnx: Engine, torch_engine: Engine) -> None:
    """6 layers, 2 heads of 64 for keys and for values, 192 tokens in each of two slots, fp32 in both here."""
    cache = 6 * 2 * 2 * 64 * 4 * CONTEXT * 2

    assert onnx.memory()["kv_cache"] == torch_engine.memory()["kv_cache"] == cache
    assert torch_engine.memory()["weights"] == 4 * (
        2048 * 256 + 256 + 6 * (2 * 256 + 256 * 768 + 3 * 256 * 1024)
    )


@pytest.mark.parametrize("name", ["onnx-genai", "transformers"])
def test_more_than_the_model_can_is_refused_when_it_loads(name: str, onnx_folder: Path) -> None:
    folder = onnx_folder if name == "onnx-genai" else DEMO

    with pytest.raises(CannotLoad, match="512 positions"):
        engines.load(name, options(name, folder, context=513))


def test_what_is_no_artifact_is_refused_in_one_line(tmp_path: Path, onnx_folder: Path) -> None:
    with pytest.raises(CannotLoad, match="safetensors"):
        engines.load("transformers", options("transformers", tmp_path))
    with pytest.raises(CannotLoad, match=r"genai_config\.json"):
        engines.load("onnx-genai", options("onnx-genai", tmp_path))
    with pytest.raises(CannotLoad, match="keeps its cache in f32, not bf16"):
        engines.load("onnx-genai", options("onnx-genai", onnx_folder, kv_type="bf16"))
    with pytest.raises(CannotLoad, match="is not an engine"):
        engines.load("tensorrt", options("tensorrt", tmp_path))


def test_text_that_cannot_be_tokenized_is_a_value_error(engine: Engine) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        engine.tokenize("\ud800", special=True)
    if engine.name == "onnx-genai":
        with pytest.raises(ValueError, match="NUL"):
            engine.tokenize("a\0b", special=True)


def test_layers_with_a_window_see_the_window_only(tmp_path: Path) -> None:
    """Mistral, every layer with a window of 16: all tokens are kept, and the answer is generate()'s."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = quantized.random_model(tmp_path / "mistral", "mistral", sliding_window=16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    said = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    engine = engines.load("transformers", options("transformers", folder))

    found = ids(answer(engine, PROMPT, 12))
    engine.close()

    assert found == said[0, len(PROMPT) :].tolist()


def test_nothing_that_follows_or_breaks_its_description_fails_in_a_real_engine(
    onnx_folder: Path, tmp_path: Path
) -> None:
    program = (sys.executable, "-m", "edgepack.server", "--engine", "onnx-genai", "--model", str(onnx_folder))
    with running(
        program, tmp_path, "--ctx-size", str(2 * CONTEXT), "--parallel", "2", "--threads", "1"
    ) as one:
        said = fuzz(one, tmp_path, phases="fuzzing", examples=EXAMPLES)
        lived = one.api("POST", "/v1/completions", {"prompt": "It was", "max_tokens": 2}).status

    assert "10 selected / 10 total" in said
    assert lived == 200
