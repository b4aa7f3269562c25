"""An engine without a model, whose tokens are the bytes of UTF-8, and a server over it: `python -m tests.fake_engine`.

At temperature 0 it says the prompt's text again and ends; else it says random letters by the seed. A prompt with
"!fail" makes it fail, one with "!slow" makes each token take 50 ms and each chunk of the prompt 200 ms, and
"!stuck" is a chunk of 3 s.
"""

from __future__ import annotations

import codecs
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from edgepack.server.__main__ import main
from edgepack.server.engines import CannotLoad, CannotTokenize, Options, Sampling, Token
from edgepack.server.template import render

BEGIN, END, VOCABULARY = 256, 257, 258
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
)


class FakeEngine:
    name = "fake"
    version = "1.2.3"
    vocabulary = VOCABULARY
    chat_template: str | None = TEMPLATE

    def __init__(self, options: Options) -> None:
        self.context = options.context
        self.slots = options.slots
        self._ubatch = options.ubatch
        self._held: list[list[int]] = [[] for _ in range(options.slots)]

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        if "\0" in text:
            raise CannotTokenize("a NUL character in the text cannot be tokenized")
        return [BEGIN] * special + list(text.encode("utf-8"))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < BEGIN).decode("utf-8", "replace")

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        text = render(self.chat_template, messages, bos="\x02", eos="\x03")
        return [BEGIN, *text.removeprefix("\x02").encode("utf-8")]

    def memory(self) -> Mapping[str, int]:
        return {"weights": 1000, "kv_cache": self.slots * self.context}

    def cached(self, slot: int, prompt: Sequence[int]) -> int:
        held = self._held[slot]
        return next(
            (i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b),
            min(len(held), len(prompt)),
        )

    def generate(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int,
        *,
        reuse: bool,
        cancelled: Callable[[], bool],
    ) -> Iterator[Token]:
        assert len(prompt) + limit <= self.context
        text = bytes(token for token in prompt if token < BEGIN)
        slow = b"!slow" in text
        start = min(self.cached(slot, prompt), len(prompt) - 1) if reuse else 0
        held = self._held[slot] = list(prompt[:start])
        for first in range(start, len(prompt), self._ubatch):
            if cancelled():
                return
            time.sleep(3 if b"!stuck" in text else 0.2 if slow else 0)
            held.extend(prompt[first : min(first + self._ubatch, len(prompt))])
        if b"!fail" in text:
            raise OSError("the fake engine was told to fail")
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        for count, token in enumerate(self._choices(text, sampling)):
            if count == limit or cancelled():
                return
            time.sleep(0.05 if slow else 0)
            held.append(token)
            others = ((token, -0.25), ((token + 1) % VOCABULARY, -2.5), ((token + 2) % VOCABULARY, -1e9))
            yield Token(
                id=token,
                text="" if token == END else decoder.decode(bytes([token])),
                logprob=-0.25 if sampling.logprobs else None,
                top=others[: sampling.logprobs],
                end=token == END,
            )
            if token == END:
                return

    def close(self) -> None:
        print("closed", file=sys.stderr)

    @staticmethod
    def _choices(text: bytes, sampling: Sampling) -> Iterator[int]:
        if sampling.temperature > 0:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            letters = random.Random(f"{seed} {sampling.temperature} {len(text)}")
            while True:
                yield letters.randrange(97, 123)
        count = 0
        while True:
            for byte in text or b"?":
                yield byte
                count += 1
            if not sampling.ignore_eos and count >= sampling.min_tokens:
                yield END
                return


def load(name: str, options: Options) -> FakeEngine:
    if options.model.name == "slow-to-load":
        time.sleep(3)
    if options.model.name == "broken":
        raise CannotLoad("model.onnx is missing", hint="build the bundle again")
    return FakeEngine(options)


if __name__ == "__main__":
    sys.exit(main(load=load))
