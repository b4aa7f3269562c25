"""`python -m edgepack_server`: one engine, or the front of another server, on one address.

Exit status: 0 stopped when told to, 1 a bug, 2 flags or files that they name are wrong, 3 the engine cannot be
loaded, 4 the address cannot be listened on.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import engines, front, host, log, planned, routes, upstream
from .engines import CannotLoad, Engine, Options
from .guard import BESIDE, Guard, Rules
from .planned import UNPLANNED, Planned
from .serving import Serving, Terms

EXIT_LISTEN = 4
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Load = Callable[[str, Options], Engine]


def main(argv: Sequence[str] | None = None, *, load: Load = engines.load) -> int:
    parser = _parser()
    flags = parser.parse_args(argv)
    try:
        keys = _keys(flags.api_key_file)
        plan = UNPLANNED if flags.plan is None else planned.read(flags.plan)
        _check(flags, keys)
        rules = Rules(
            keys=keys,
            open_metrics=flags.open_metrics,
            body=flags.max_body_bytes or _body_bytes(flags.ctx_size // flags.parallel),
            bodies=flags.parallel + flags.queue_size + BESIDE,
            timeout=flags.timeout,
        )
        served = _front(flags, plan) if flags.engine == "front" else _engine(flags, plan, load)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    log.adopt()
    try:
        listener = _listen(flags.host, flags.port)
    except OSError as error:
        log.event("cannot_listen", host=flags.host, port=flags.port, message=str(error))
        return EXIT_LISTEN
    return served(listener, rules, flags.grace)


Served = Callable[[socket.socket, Rules, float], int]


def _engine(flags: argparse.Namespace, plan: Planned, load: Load) -> Served:
    options = Options(
        model=flags.model,
        context=flags.ctx_size // flags.parallel,
        slots=flags.parallel,
        ubatch=flags.ubatch_size,
        kv_type=flags.cache_type_k,
        threads=flags.threads,
        provider=flags.provider,
    )
    terms = Terms(
        alias=flags.alias or flags.model.resolve().name,
        runtime=flags.engine,
        slots=options.slots,
        context=options.context,
        queue=flags.queue_size,
        timeout=flags.timeout,
        planned=plan,
    )

    def serve(listener: socket.socket, rules: Rules, grace: float) -> int:
        serving = Serving(terms)
        app = Guard(routes.application(serving), rules, serving.metrics, lambda: serving.state)

        def prepare() -> Callable[[], None]:
            engine = load(flags.engine, options)
            if engine.context < terms.context or engine.slots != terms.slots:
                raise CannotLoad(
                    f"the engine holds {engine.slots} x {engine.context} tokens,"
                    f" not {terms.slots} x {terms.context}"
                )
            return lambda: serving.use(engine)

        about: dict[str, log.Value] = {
            "model": terms.alias, "runtime": terms.runtime, "slots": terms.slots, "context": terms.context
        }  # fmt: skip
        return host.run(
            app, serving, listener, prepare=prepare, requests=rules.bodies, grace=grace, about=about
        )

    return serve


def _front(flags: argparse.Namespace, plan: Planned) -> Served:
    key = None if flags.upstream_key_file is None else _keys(flags.upstream_key_file)[0].decode()
    behind = upstream.parse(flags.upstream, key)
    terms = front.Terms(
        slots=flags.parallel,
        context=flags.ctx_size // flags.parallel,
        queue=flags.queue_size,
        timeout=flags.timeout,
        planned=plan,
        alias=flags.alias,
    )

    def serve(listener: socket.socket, rules: Rules, grace: float) -> int:
        target = front.Front(terms, behind)
        app = Guard(front.application(target), rules, target.metrics, lambda: target.state)
        about: dict[str, log.Value] = {"runtime": "front", "upstream": flags.upstream}
        return host.run(
            app,
            target,
            listener,
            prepare=lambda: lambda: None,
            requests=rules.bodies,
            grace=grace,
            about=about,
        )

    return serve


def _check(flags: argparse.Namespace, keys: Sequence[bytes]) -> None:
    if not keys and flags.host not in LOOPBACK:
        raise ValueError(f"--host {flags.host} can be reached by others: give --api-key-file")
    if flags.ctx_size < flags.parallel:
        raise ValueError(
            f"--ctx-size {flags.ctx_size} is less than a token for each of {flags.parallel} slots"
        )
    if flags.engine == "front":
        if flags.upstream is None:
            raise ValueError("--engine front needs --upstream")
        return
    if flags.upstream is not None or flags.upstream_key_file is not None:
        raise ValueError(f"--upstream is for --engine front, not {flags.engine}")
    if flags.model is None or not flags.model.is_dir():
        raise ValueError(f"--model {flags.model} is not a folder")


def _keys(path: Path | None) -> list[bytes]:
    """The keys of a file, one a line; blank lines and comments are left out, as llama-server does."""
    if path is None:
        return []
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if not keys:
        raise ValueError(f"{path} has no key")
    return keys


def _body_bytes(context: int) -> int:
    """Enough for any text that a slot holds: what is longer would only take memory to be refused."""
    return min(1 << 20, max(1 << 16, 32 * context))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=256)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgepack_server", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--engine", required=True, choices=(*sorted(engines.MODULES), "front"))
    add("--model", type=Path, help="folder of the artifact")
    add("--alias", help="name of the model in the API (default: the folder's)")
    add("--host", default="127.0.0.1")
    add("--port", type=_port, default=8080, help="0: any free one, named when ready")
    add("--api-key-file", type=Path, help="keys, one a line; needed beyond loopback")
    add("--open-metrics", action="store_true", help="/metrics without a key")
    add("--ctx-size", type=_count, required=True, help="tokens in all slots together")
    add("--parallel", type=_count, default=1, help="slots")
    add("--ubatch-size", type=_count, default=512, help="tokens of a prompt computed at once")
    add("--cache-type-k", choices=("f32", "f16", "bf16"), default="f32")
    add("--threads", type=_count, default=os.cpu_count() or 1)
    add("--provider", choices=("cpu", "cuda"), default="cpu")
    add("--queue-size", type=_natural, default=32, help="requests that wait for a slot")
    add("--timeout", type=_seconds, default=600.0, help="seconds from a request's arrival to its end")
    add("--grace", type=_seconds, default=30.0, help="seconds that running requests have when told to stop")
    add("--max-body-bytes", type=_count, help="default: 32 a token of a slot, from 64 KiB to 1 MiB")
    add("--plan", type=Path, help="plan.json, for the planned memory in /metrics")
    add("--upstream", help="front: http://HOST:PORT of the server behind")
    add("--upstream-key-file", type=Path, help="front: the key of the server behind")
    return parser


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _count(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return number


def _port(text: str) -> int:
    number = _natural(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is more than 65535")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
