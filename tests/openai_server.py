"""Plays a server that speaks OpenAI's completions as vLLM does: a token is a character, the next one a sum.

Started as edgepack's own server or as `vllm serve` is; a model's config.json may tell it to break.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WORDS = sys.argv[1:]
VLLM = WORDS[0] == "serve"
PIECE = 16
"""Tokens of a block of vLLM's cache."""


def flag(name: str) -> str:
    return WORDS[WORDS.index(name) + 1]


MODEL = Path(WORDS[1] if VLLM else flag("--model"))
SLOTS = int(flag("--max-num-seqs" if VLLM else "--parallel"))
LENGTH = int(flag("--max-model-len")) if VLLM else int(flag("--ctx-size")) // SLOTS
KEY = os.environ["VLLM_API_KEY"] if VLLM else Path(flag("--api-key-file")).read_text(encoding="utf-8").strip()
WEIGHTS = sum(path.stat().st_size for path in MODEL.iterdir())
HELD: dict[Any, list[int]] = {}
"""What the server remembers: the tokens of each slot, or of each salt."""


def next_token(tokens: Sequence[int]) -> int:
    return 97 + sum(tokens) % 26


def held(body: Mapping[str, Any], tokens: Sequence[int]) -> tuple[int, Any]:
    """Tokens of the prompt that are remembered, and where the whole is to be kept."""
    if VLLM:
        before = HELD.get(body["cache_salt"], [])
        return common(before, tokens) // PIECE * PIECE, body["cache_salt"]
    best = max(HELD, key=lambda slot: common(HELD[slot], tokens), default=None)
    if best is None or (common(HELD[best], tokens) < 8 and len(HELD) < SLOTS):
        best = len(HELD)
    return (common(HELD.get(best, []), tokens) if body["cache_prompt"] else 0), best


def common(first: Sequence[int], second: Sequence[int]) -> int:
    same = 0
    for one, other in zip(first, second[:-1], strict=False):
        if one != other:
            break
        same += 1
    return same


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing of requests."""

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.say(200, b"" if VLLM else b'{"code": 200}')
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.say(401, b'{"error": "Unauthorized"}')
        if self.path == "/version":
            return self.json({"version": "0.33.0" if VLLM else "0.18.0"})
        if self.path == "/v1/models":
            return self.json({"data": [{"id": "tiny", "max_model_len": LENGTH}]})
        if self.path == "/metrics":
            return self.say(200, metrics().encode(), kind="text/plain")
        return self.say(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {KEY}" or body["model"] != "tiny":
            return self.say(401, b'{"error": "Unauthorized"}')
        if self.path == "/tokenize":
            start = [1] if body["add_special_tokens"] else []
            return self.json({"tokens": [*start, *map(ord, body["prompt"])]})
        return self.complete(body)

    def complete(self, body: Mapping[str, Any]) -> None:
        tokens = list(body["prompt"])
        if len(tokens) + body["max_tokens"] > LENGTH:
            return self.say(400, b'{"error": {"message": "too long"}}')
        cached, place = held(body, tokens)
        answer: list[int] = []
        for _ in range(body["max_tokens"]):
            answer.append(next_token(tokens + answer))
        HELD[place] = tokens + answer
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": len(answer),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if not body.get("stream"):
            choice: dict[str, Any] = {"text": "".join(map(chr, answer)), "token_ids": answer}
            if "logprobs" in body:
                choice["logprobs"] = {"top_logprobs": [alternatives(answer[0], body["logprobs"])]}
            return self.json({"choices": [choice], "usage": usage})
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.event({"choices": [{"text": "", "token_ids": []}]})
        for token in answer:
            self.event({"choices": [{"text": chr(token), "token_ids": [token]}]})
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
        return None

    def event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def json(self, value: object) -> None:
        self.say(200, json.dumps(value).encode())

    def say(self, status: int, content: bytes, *, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def alternatives(first: int, count: int) -> dict[str, float]:
    return {f"token_id:{97 + (first - 97 + step) % 26}": -0.1 - step for step in range(min(count, 26))}


def metrics() -> str:
    if not VLLM:
        return (
            "# TYPE edgepack_memory_bytes gauge\n"
            f'edgepack_memory_bytes{{part="weights"}} {WEIGHTS}\n'
            f'edgepack_memory_bytes{{part="kv_cache"}} {LENGTH * SLOTS * 64}\n'
            'edgepack_memory_bytes{part="resident"} 1e+08\n'
        )
    tokens = int(flag("--kv-cache-memory-bytes")) // 64
    labels = f'engine="0",num_gpu_blocks="{tokens // PIECE}",kv_cache_size_tokens="{tokens}"'
    return f"vllm:cache_config_info{{{labels}}} 1.0\n"


def main() -> None:
    told = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    if told.get("say"):
        print(told["say"], file=sys.stderr)
    if "exit" in told:
        sys.exit(told["exit"])
    if told.get("kill"):
        os.kill(os.getpid(), told["kill"])
    if VLLM:
        engine = "import time; held = bytearray(b'x') * (48 << 20); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", engine])
        tokens = int(flag("--kv-cache-memory-bytes")) // 64
        print(
            f"(EngineCore pid=7) INFO 11-26 17:46:00 [kv_cache_utils.py:2327] CPU KV cache size: {tokens:,} tokens, "
            f"Maximum concurrency for {LENGTH:,} tokens per request: {tokens / LENGTH:.2f}x"
        )
    sys.stdout.flush()
    ThreadingHTTPServer(("127.0.0.1", int(flag("--port"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
