"""Whether llama.cpp quantizes to the same bytes on x86-64 and on aarch64: its llama-quantize of both, on one model.

    python scripts/quantize_across.py [--exact] [--types Q4_K_M …] [--model demo]

Two programs out of the toolchain's own objects, the one for aarch64 under QEMU, quantize one GGUF file, and each tensor
is compared. GCC joins a product and a sum to one operation with one rounding where the instruction set has it, as
aarch64 does and plain x86-64 does not: ``--exact`` compiles aarch64's quantizers without (-ffp-contract=off).
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gguf import GGUFReader

from edgepack import hub, modelspec, toolchain
from edgepack.builders import convert, gguf
from edgepack.device import agent
from edgepack.progress import Terminal
from edgepack.toolchain import Machine

TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS")
TOOL = ("llama-quantize-impl.dir/quantize.cpp.o", "llama-quantize.dir/main.cpp.o")
ELSEWHERE = r"/[^\s=]+/llama_cpp_python-[^/]+/vendor/llama\.cpp"
"""Where the source lay when the tree was configured: the cache may have moved."""
QUANTIZERS = ("ggml-base.dir/ggml-quants.c.o", "ggml-base.dir/ggml.c.o")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--exact", action="store_true")
    asked = parser.parse_args(words)
    toolchain.install(Terminal())
    toolchain.static_runtime("aarch64", Terminal())
    with tempfile.TemporaryDirectory(prefix="quantize-") as name:
        folder = Path(name)
        source = unquantized(asked.model, folder)
        programs = {
            "x86_64": quantizer("x86_64", folder, ()),
            "aarch64": quantizer("aarch64", folder, ("-ffp-contract=off",) if asked.exact else ()),
        }
        print("| type | tensors equal | bytes that differ |\n| --- | --- | --- |")
        for kind in asked.types:
            made = {arch: quantized(arch, program, source, kind) for arch, program in programs.items()}
            print(row(kind, made), flush=True)


def unquantized(model: str, folder: Path) -> Path:
    """The model as BF16 in a GGUF file."""
    checkpoint = hub.resolve(model, revision=None, offline=True, progress=Terminal())
    spec = replace(modelspec.read(checkpoint.path), header_bytes=convert.header_size(checkpoint.path))
    return gguf.build(
        checkpoint, spec, "BF16", folder, imatrix=None, toolchain=toolchain.find(), progress=Terminal()
    ).path


def quantizer(arch: Machine, folder: Path, flags: Sequence[str]) -> Path:
    """llama-quantize linked statically out of the objects of the toolchain's build tree, which stays as it is.

    ``flags``: how its quantizers are compiled again.
    """
    static = toolchain.static_runtime(arch, Terminal()).parent
    tree = toolchain._build_tree(static if arch == "aarch64" else toolchain.find().root)
    ninja = shutil.which("ninja")
    if ninja is None:
        raise SystemExit("there is no ninja on PATH")
    source = toolchain._source(Terminal()) / "vendor" / "llama.cpp"
    said = subprocess.run([ninja, "-C", tree, "-t", "commands", "bin/llama-quantize"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    lines = re.sub(ELSEWHERE, str(source), said.stdout).splitlines()
    objects = {}
    for name in (*TOOL, *(QUANTIZERS if flags else ())):
        words = command(next(line for line in lines if f"{name} -c " in line))
        objects[name] = folder / f"{arch}-{Path(name).name}"
        words[words.index("-o") + 1] = str(objects[name])
        words[words.index("-MF") + 1] = f"{objects[name]}.d"
        subprocess.run([*words, *(flags if name in QUANTIZERS else ())], cwd=tree, check=True)
    program = folder / f"llama-quantize-{arch}"
    link = [word for word in command(lines[-1]) if not word.endswith((TOOL[1], "libllama-quantize-impl.a"))]
    at = link.index("-o")
    link[at + 1] = str(program)
    # Objects come before the archives, so that theirs are taken.
    link[at:at] = [str(path) for path in objects.values()]
    subprocess.run([*link, "-static"], cwd=tree, check=True, stderr=subprocess.DEVNULL)
    return program


def command(line: str) -> list[str]:
    return [word for word in shlex.split(line) if word not in (":", "&&")]


def quantized(arch: str, program: Path, source: Path, kind: str) -> Path:
    emulator = toolchain.find_emulator("aarch64")
    under = [str(emulator), "-cpu", agent.EMULATED_CPUS["aarch64"]] if arch == "aarch64" else []
    out = program.with_name(f"{arch}-{kind}.gguf")
    subprocess.run([*under, str(program), str(source), str(out), kind, "1"], check=True, capture_output=True)
    return out


def row(kind: str, made: Mapping[str, Path]) -> str:
    x86, arm = (GGUFReader(made[arch]).tensors for arch in ("x86_64", "aarch64"))
    differ = {
        one.name: int((one.data.view("u1") != other.data.view("u1")).sum())
        for one, other in zip(x86, arm, strict=True)
    }
    total = sum(int(tensor.n_bytes) for tensor in x86)
    equal = sum(count == 0 for count in differ.values())
    types = sorted({tensor.tensor_type.name for tensor in x86 if differ[tensor.name]})
    of = f" ({', '.join(types)})" if types else ""
    return f"| {kind} | {equal} of {len(differ)} | {sum(differ.values()):,} of {total:,}{of} |"


if __name__ == "__main__":
    main()
