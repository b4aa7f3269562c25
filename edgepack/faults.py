"""What goes wrong when a language model runs on a device: how it shows in a log, why it happens, what to do.

Each fault is a row of RULES: how to add one is to add it there, and a real log that shows it to tests/data/logs. Facts
are those of the sources that the rows name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from edgepack.units import GIB, KIB, MIB, show

Certainty = Literal["sure", "likely"]
"""sure: the line says it. likely: the line is what this cause leaves behind, and others could."""
SEEN = 300
"""Characters of a line that are quoted."""
Section = Literal["journal", "service", "kernel"]
"""Which of a device's logs: its installer's journal, its service's log, its kernel's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is read: lines of programs, or what a check is told as."""

    text: str
    numbered: bool
    """False for lines that were made of a check: their numbers say nothing."""
    sections: tuple[tuple[Section, int], ...] = ()
    """Of a device: its logs one after the other, each with the position at which it begins."""

    def section_at(self, position: int) -> tuple[Section | None, int, int]:
        """Name, begin and end of the section at a position; all of the text where there is none."""
        ends = [start for _, start in self.sections[1:]] + [len(self.text)]
        for (name, start), end in zip(self.sections, ends, strict=False):
            if position < end:
                return name, start, end
        return None, 0, len(self.text)

    def line_at(self, position: int) -> tuple[int | None, str]:
        """Number, from 1 in its section, and text of the line at a position; of a long line what stands there."""
        section, first_line, _ = self.section_at(position)
        start = self.text.rfind("\n", 0, position) + 1
        end = self.text.find("\n", position)
        line = self.text[start : end if end >= 0 else len(self.text)]
        if len(line) > SEEN:
            first = max(0, min(position - start - SEEN // 4, len(line) - SEEN))
            line = (
                f"{'…' if first else ''}{line[first : first + SEEN]}{'…' if first + SEEN < len(line) else ''}"
            )
        numbered = self.numbered and section != "journal"  # whose lines are told here, with their time
        return (self.text.count("\n", first_line, position) + 1 if numbered else None), line.strip()


Values = Mapping[str, str]


def _named(found: re.Match[str], log: Log) -> Values | None:
    """The named parts of the line, for the texts."""
    return {name: value or "" for name, value in found.groupdict().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A fault: how it shows, why it happens, what to do."""

    id: str
    symptom: str
    """What a person sees, for the table of rules."""
    patterns: tuple[re.Pattern[str], ...]
    """Any of them, within one line; none for what is only asked for by name."""
    cause: str
    cure: str
    """Texts; ``{name}`` takes what ``values`` says, ``{_name}`` is left out where it says nothing."""
    source: str
    certainty: Certainty = "sure"
    values: Callable[[re.Match[str], Log], Values | None] = _named
    """What stands in the texts, from the line and the log around it; None when this match is not the fault."""
    explains: tuple[str, ...] = ()
    """Rules whose diagnosis is a consequence when this one holds."""
    client: bool = False
    """Who asked is at fault, and the server is well: told after what is wrong with the device."""
    recovered: re.Pattern[str] | None = None
    """What a later line of the same section says when the program went on all the same."""


# ── numbers of a line ────────────────────────────────────────────────────────────────────────────────

_UNIT = {"bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}


def _bytes(count: str, unit: str) -> int:
    return round(float(count) * _UNIT[unit])


def _part(name: str) -> Callable[[re.Match[str], Log], Values | None]:
    """llama.cpp's failed allocation, if it was for this part: what it says within the next lines tells which.

    The weights are what is left when neither the cache nor the graph is named.
    """

    def values(found: re.Match[str], log: Log) -> Values | None:
        after = log.text[found.start() : found.start() + 1500]
        named = next((part for part, words in _PARTS.items() if re.search(words, after, re.I)), "weights")
        if named != name:
            return None
        groups = found.groupdict()
        size = _bytes(groups["mib"], "MiB") if groups.get("mib") else int(groups.get("bytes") or 0)
        free = re.search(r"(\d+) MiB free\b", log.text[: found.start()])
        told = re.search(r"\bn_ctx(?:_seq|_per_seq)? +(?:= |\()(\d+)", log.text)
        half = max(256, int(told.group(1)) // 2 // 256 * 256) if told else None
        return {
            "_asked": f": {show(size)} were asked for in one piece" if size else "",
            "_free": f"; {free.group(1)} MiB were free before" if free else "",
            "context": str(half) if half else "HALF",
        }

    return values


_PARTS = {
    "kv_cache": r"kv.cache|kv_cache",
    "compute": r"compute (?:pp )?buffers?|graph_reserve|gallocr",
}


def _refused_memory(found: re.Match[str], log: Log) -> Values:
    return {"needed": show(int(found["needed"])), "free": show(int(found["free"]))}


def _collected(found: re.Match[str], log: Log) -> str:
    """The package that pip was at."""
    at = re.findall(r"^Collecting ([\w.-]+)", log.text[: found.start()], re.MULTILINE)
    return at[-1] if at else "a package"


def _cuda_fault(found: re.Match[str], log: Log) -> Values | None:
    """What CUDA said, where it says none of what the other rules are for."""
    what = found["what"].strip()
    return None if _TOLD_BY_OTHERS.search(what) else {"what": what}


_TOLD_BY_OTHERS = re.compile(
    "out of memory|no kernel image|invalid device function|kernel image is invalid|named symbol|CU(?:BLAS|DNN)_STATUS|"
    "resource allocation failed|library was not initialized|failed to launch on the GPU|internal operation failed|"
    "functionality is not supported|unsupported value or parameter|no CUDA-capable|CUDA driver version|unsupported "
    "toolchain|forward compatibility|unsupported display driver"
)


def _library(found: re.Match[str], log: Log) -> Values:
    """The library's name, and of which CUDA it is where its number says so."""
    toolkit = re.match(r"lib(?:cudart|cublas\w*|nvrtc|cufft|cusparse|nvJitLink)\.so\.(\d+)", found["name"])
    return {"name": found["name"], "_of": f" (it belongs to CUDA {toolkit.group(1)})" if toolkit else ""}


def _largest_of(found: re.Match[str], log: Log) -> Values:
    size = found.groupdict().get("bytes")
    return {"_size": f" of {show(int(size))}" if size else ""}


def _torch_memory(found: re.Match[str], log: Log) -> Values | None:
    """Where PyTorch holds more in pieces than it asked for, it is another rule's."""
    needed, free = _torch_sizes(found)
    if _held_in_pieces(found) >= needed:
        return None
    return {"needed": show(needed), "free": show(free)}


def _torch_pieces(found: re.Match[str], log: Log) -> Values | None:
    needed, free = _torch_sizes(found)
    pieces = _held_in_pieces(found)
    if pieces < needed:
        return None
    return {"needed": show(needed), "free": show(free), "pieces": show(pieces)}


def _torch_sizes(found: re.Match[str]) -> tuple[int, int]:
    return _bytes(found["asked"], found["asked_unit"]), _bytes(found["free"], found["free_unit"])


def _held_in_pieces(found: re.Match[str]) -> int:
    line = found.string[found.start() : found.string.find("\n", found.start()) % (len(found.string) + 1)]
    held = re.search(r"([\d.]+) (bytes|KiB|MiB|GiB) is reserved by PyTorch but unallocated", line)
    return _bytes(held.group(1), held.group(2)) if held else 0


def _cache_of_onnx(found: re.Match[str], log: Log) -> Values:
    """Bytes of keys and values: fp32 on the CPU, which is what runs when this message comes from one."""
    groups = found.groupdict()
    if groups.get("length"):
        shape = [int(found[name]) for name in ("batch", "heads", "length", "head", "layers")]
        size = 2 * 4
        for count in shape:
            size *= count
        return {"needed": f"{show(size)} for keys and values of {found['length']} tokens"}
    return {"needed": show(int(groups["bytes"])) if groups.get("bytes") else "memory"}


def _utilization(found: re.Match[str], log: Log) -> Values:
    free, total = float(found["free"]), float(found["total"])
    return {
        **{name: found[name] for name in ("free", "total", "asked")},
        "held": f"{total - free:.2f}",
        "share": f"{int(free / total * 100) / 100:.2f}",
    }


def _threads(found: re.Match[str], log: Log) -> Values | None:
    threads, cores = int(found["threads"]), int(found["cores"])
    return {"threads": str(threads), "cores": str(cores)} if threads > cores else None


def _layers(found: re.Match[str], log: Log) -> Values | None:
    """A build without GPU says so to every --gpu-layers, a CPU plan's 0 too: a fault only where a GPU was meant."""
    groups = found.groupdict()
    if not groups.get("all"):
        _, begin, end = log.section_at(found.start())  # a kernel names NVIDIA wherever there is a card
        return {"layers": "no layer is"} if _GPU_MEANT.search(log.text, begin, end) else None
    on, of = int(groups["on"]), int(groups["all"])
    return {"layers": f"{on} of {of} layers are"} if on < of else None


_GPU_MEANT = re.compile(
    r"(?:gpu-layers|-ngl)[ =](?:[1-9]|all|auto)|CUDA|NVIDIA|\btegra\b|jetson", re.IGNORECASE
)


def _killed(found: re.Match[str], log: Log) -> Values:
    """Who was killed and what it held, where the kernel says so here or further down."""
    line = re.compile(r"Killed process \d+ \((?P<name>.+?)\).*?anon-rss:(?P<rss>\d+)kB")
    said = line.search(log.text, found.start())
    if said is None:
        return {"who": "a process"}
    return {"who": said["name"], "_held": f" ({show(int(said['rss']) * KIB)})"}


def _saved_prompt(found: re.Match[str], log: Log) -> Values | None:
    """Only where the out-of-memory killer came after it."""
    if not re.search(r"oom-kill|OOM killer|Out of memory: Killed", log.text[found.end() :]):
        return None
    return {"size": show(_bytes(found["mib"], "MiB")), "tokens": found["tokens"]}


def _gone_back(found: re.Match[str], log: Log) -> Values:
    back = "nothing runs there" if found["back"] == "none" else f"release {found['back']} runs there again"
    return {"release": found["release"], "back": back, "_why": f" ({found['why']})" if found["why"] else ""}


def _exceeded(found: re.Match[str], log: Log) -> Values:
    groups = found.groupdict()
    if groups.get("asked") and groups.get("holds"):
        return {"told": f"{groups['asked']} tokens were asked of a slot of {groups['holds']}"}
    return {"told": "prompt and answer together are longer than a slot"}


def _llama_flag(found: re.Match[str], log: Log) -> Values:
    flag = found["flag"]
    why = found.groupdict().get("why")
    cure = f"write {_LLAMA_FLAGS[flag]}" if flag in _LLAMA_FLAGS else "look it up in `llama-server --help`"
    return {"flag": flag, "_why": f" ({why})" if why else "", "instead": cure}


_LLAMA_FLAGS = {
    "--no-mmap": "`--load-mode none`",
    "--mmap": "`--load-mode mmap`",
    "--mlock": "`--load-mode mlock`",
    "--direct-io": "`--load-mode dio`",
    "-dio": "`--load-mode dio`",
}
"""Flags that llama-server dropped in September 2026 (https://github.com/ggml-org/llama.cpp/pull/28334)."""


def _vllm_flag(found: re.Match[str], log: Log) -> Values:
    flag = found["flag"].strip()
    name = flag.split("=")[0].split()[0].lstrip("-").replace("-", "_")
    return {
        "flag": flag,
        "instead": _VLLM_FLAGS.get(name, "leave it out, or look it up in `vllm serve --help=all`"),
    }


_VLLM_FLAGS = {
    "swap_space": "it left vLLM in 0.18.0 (V1 recomputes instead of swapping); leave it out, or offload with "
    "`--kv-offloading-size`",
    "use_beam_search": "it left SamplingParams in 0.6.3; a request may say it (`use_beam_search: true`)",
    "max_cpu_cache_buffer": "no version had it; leave it out",
    "chunked_prefill_tokens": "no version had it; it is `--max-num-batched-tokens`",
    "model_dir": "no version had it; it is `--model`",
    "num_scheduler_steps": "it left with the V0 engine; leave it out",
    "max_concurrency": "no version had it; it is `--max-num-seqs`",
}
"""Flags of recipes of 2024 and what became of them (facts of the wheels 0.4.2 to 0.33.0)."""


def _gguf_version(found: re.Match[str], log: Log) -> Values:
    return {"file": found["file"], "reads": found["reads"]}


def _context_that_fits(found: re.Match[str], log: Log) -> Values:
    groups = found.groupdict()
    fits = groups.get("fits")
    if fits is None:
        later = re.search(r"estimated maximum model length is (\d+)", log.text[found.start() :])
        fits = later.group(1) if later else None
    needed = (
        f" ({groups['needed']} of keys and values, {groups['free']} are there)" if groups.get("free") else ""
    )
    return {"asked": groups["asked"] or "", "_needed": needed, "fits": fits or "LESS"}


def _any(*texts: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(text) for text in texts)


_TORCH = _any(
    r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+) (?P<asked_unit>KiB|MiB|GiB)\. GPU \d+ has a total "
    r"capac(?:i)?ty of [\d.]+ \wiB of which (?P<free>[\d.]+) (?P<free_unit>bytes|KiB|MiB|GiB) is free",
    r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+) (?P<asked_unit>KiB|MiB|GiB) \(GPU \d+; [\d.]+ \wiB "
    r"total capacity; [\d.]+ \wiB already allocated; (?P<free>[\d.]+) (?P<free_unit>bytes|KiB|MiB|GiB) free",
)
_LLAMA_MEMORY = _any(
    r"allocating (?P<mib>[\d.]+) MiB on device \d+: cudaMalloc failed: out of memory",
    r"ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size (?P<bytes>\d+)",
    r"(?m)^cudaMalloc failed: out of memory",
    r"ggml_aligned_malloc: insufficient memory \(attempted to allocate +(?P<mib>[\d.]+) MB\)",
    r"mmap failed: Cannot allocate memory",
    r"unable to allocate \w+ buffer",
    r"ggml_vulkan: Device memory allocation of size (?P<bytes>\d+) failed",
)
_SERVES = re.compile(r"initializing, n_slots|model loaded|listening on http")
_HUB = "https://github.com/"
_LLAMA = f"{_HUB}ggml-org/llama.cpp/"
_SERVER_README = f"{_LLAMA}blob/master/tools/server/README.md"
_VLLM = f"{_HUB}vllm-project/vllm/"
_GENAI = f"{_HUB}microsoft/onnxruntime-genai/"
_JETSON = f"{_HUB}dusty-nv/jetson-containers/"
_MEMORY = ("memory-weights", "memory-kv-cache", "memory-compute")
_LOADING = (
    *_MEMORY, "gpu-not-used", "torch-memory", "vllm-no-kv-memory", "torch-nvml-assert", "cuda-memory",
    "cublas-memory",
)  # fmt: skip
_DROP = "`sync; sudo sysctl -w vm.drop_caches=3 vm.compact_memory=1`"


RULES: tuple[Rule, ...] = (
    # the machine is another one, or something of it does not answer
    Rule(
        id="wrong-architecture",
        symptom="`exec format error`; a bundle for another CPU",
        patterns=_any(
            r"(?i)\bexec format error",
            r"machine: architecture: expected (?P<expected>\S+), measured (?P<measured>\S+)",
            r"no matching manifest for (?P<measured>linux/\S+)",
            r"requested image's platform \((?P<expected>[^)]+)\) does not match the detected host platform "
            r"\((?P<measured>[^)]+)\)",
        ),
        values=lambda found, log: {
            "_told": f": it is for {found['expected']}, this is {found['measured']}"
            if "expected" in found.re.groupindex
            else ""
        },
        cause="the program, the image or the bundle is for another CPU architecture{_told}",
        cure="build for this device: `edgepack profiles list`, then `edgepack build --profile P`; with an "
        "image, pull it for this platform (`docker pull --platform linux/arm64`). `edgepack check "
        "--emulate` runs an Arm bundle on x86",
        source=f"{_HUB}jabloink/seerr/issues/1",
        explains=("other-device", "no-card", "memory-short"),
    ),
    Rule(
        id="other-device",
        symptom="the check says that this is not the planned device",
        patterns=_any(
            r"machine: (?P<fact>memory|device tree|GPU|L4T): expected (?P<expected>.+), measured (?P<measured>.+)"
        ),
        cause="the plan was made for another device: its {fact} is {expected}, here it is {measured}",
        cure="`edgepack probe -o device.yaml` on the device itself, then `edgepack build --profile "
        "device.yaml`",
        source="https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide/",
        certainty="likely",
        explains=("slow-decode", "memory-short", "check-peak"),
    ),
    Rule(
        id="no-card",
        symptom="the bundle computes on an NVIDIA card, and `nvidia-smi` does not answer",
        patterns=_any(r"machine: accelerator: "),
        cause="there is no NVIDIA driver, or no card",
        cure="`nvidia-smi` must list the card; install the driver, or build for the CPU with another "
        "`--profile`",
        source="https://docs.nvidia.com/datacenter/tesla/driver-installation-guide/",
    ),
    Rule(
        id="driver-library-mismatch",
        symptom="`Driver/library version mismatch`, `NVRM: API mismatch`",
        patterns=_any(
            r"(?i)driver/library version mismatch",
            r"NVRM: API mismatch",
            r"RM has detected an NVML/RM version mismatch",
        ),
        cause="the NVIDIA driver was updated and the kernel still has the older module loaded",
        cure="reboot the device; hold the driver back from unattended upgrades (`sudo apt-mark hold`)",
        source=f"{_HUB}NVIDIA/nvidia-container-toolkit/issues/171",
        explains=("nvidia-runtime-missing", *_LOADING),
    ),
    Rule(
        id="cuda-driver-too-old",
        symptom="`CUDA driver version is insufficient`, `NVIDIA driver on your system is too old`",
        patterns=_any(
            r"CUDA driver version is insufficient for CUDA runtime version",
            r"(?i)nvidia driver (?:on your system )?is too old",
            r"cudaErrorInsufficientDriver|cudaSetDevice err: 35\b",
            r"the provided PTX was compiled with an unsupported toolchain",
            r"unsatisfied condition: cuda *>= *[\d.]+",
        ),
        cause="the program or image was built for a newer CUDA than this driver knows",
        cure="take a build for the driver's CUDA (`nvidia-smi`, top right, says which) or update the driver. A "
        "Jetson's driver comes with its L4T: JetPack 6 has CUDA 12.6, so images of CUDA 13 need JetPack 7",
        source=f"{_HUB}ollama/ollama/issues/7666",
        explains=("cuda-no-kernel", "gpu-not-seen", *_LOADING),
    ),
    Rule(
        id="cuda-forward-compatibility",
        symptom="`forward compatibility was attempted on non supported HW` (error 804), error 803",
        patterns=_any(
            r"forward compatibility was attempted on non supported HW",
            r"(?i)system has unsupported display driver / cuda driver combination",
        ),
        cause="the image brings a newer CUDA with its compatibility library, which only data-center cards may "
        "use",
        cure="an image of the CUDA that the host's driver has, or a newer driver on the host; then the "
        "compatibility library (/usr/local/cuda/compat) is not needed: keep it out of LD_LIBRARY_PATH",
        source=f"{_VLLM}issues/4940",
        explains=("cuda-driver-too-old", "cuda-no-kernel", *_LOADING),
    ),
    Rule(
        id="cuda-no-kernel",
        symptom="`no kernel image is available for execution on the device`",
        patterns=_any(
            r"no kernel image is available for execution on the device",
            r"cudaErrorNoKernelImageForDevice",
            r"Error named symbol not found at line \d+",
            r"CUDA error: invalid device function",
            r"device kernel image is invalid",
        ),
        cause="the build has no code for this GPU's compute capability: many wheels leave out Jetson (sm_87, "
        "sm_110) or cards older than sm_75",
        cure="`nvidia-smi --query-gpu=compute_cap --format=csv` says which it needs (Orin: 8.7). Build "
        "llama.cpp with `-DCMAKE_CUDA_ARCHITECTURES=87`; on a Jetson take wheels of its own index "
        "(https://pypi.jetson-ai-lab.io)",
        source=f"{_HUB}pytorch/pytorch/issues/145560",
        explains=("bitsandbytes-cuda", "cublas-failed", "cuda-fault", "program-fault"),
    ),
    Rule(
        id="nvcc-too-old",
        symptom="`nvcc fatal: Unsupported gpu architecture 'compute_…'`",
        patterns=_any(r"nvcc fatal\s*: +Unsupported gpu architecture '(?:compute|sm)_(?P<wanted>[^']*)'"),
        cause="this nvcc has no code for the GPU architecture it was asked for ({wanted}): the toolkit is older than "
        "the card, another nvcc comes first in PATH, or no card was found when the build was configured",
        cure="`nvcc --version` and `nvcc --list-gpu-arch` say what it has; put the toolkit of the driver's CUDA first "
        "(`export PATH=/usr/local/cuda/bin:$PATH`), delete the build folder and name the card: "
        "`-DCMAKE_CUDA_ARCHITECTURES=87` (Orin), `TORCH_CUDA_ARCH_LIST=8.7` for PyTorch's extensions",
        source=f"{_LLAMA}issues/13271",
        explains=("kernels-not-compiled",),
    ),
    Rule(
        id="nvidia-runtime-missing",
        symptom='`could not select device driver "" with capabilities: [[gpu]]`',
        patterns=_any(
            r"could not select device driver .{0,12} with capabilities: \[\[gpu\]\]",
            r"(?i)unknown or invalid runtime name: nvidia",
        ),
        cause="docker does not know NVIDIA's runtime",
        cure="`sudo apt install nvidia-container-toolkit`, `sudo nvidia-ctk runtime configure "
        "--runtime=docker`, `sudo systemctl restart docker`; docker from snap does not see it",
        source=f"{_HUB}NVIDIA/nvidia-docker/issues/1642",
    ),
    Rule(
        id="jetson-gpus-flag",
        symptom="`invoking the NVIDIA Container Runtime Hook directly … is not supported`",
        patterns=_any(r"invoking the NVIDIA Container Runtime Hook directly"),
        cause="a Jetson's GPU is not given to a container with `--gpus`",
        cure="`docker run --runtime nvidia …` without `--gpus`; a bundle's compose.yaml says `runtime: nvidia`",
        source=f"{_JETSON}issues/1577",
    ),
    Rule(
        id="nvmap-permission",
        symptom="`NvRmMemInitNvmap failed with Permission denied`; no access to /dev/nvmap or /dev/nvidia*",
        patterns=_any(
            r"NvRmMemInitNvmap failed with Permission denied",
            r"(?i)/dev/(?:nvmap|nvhost|nvidia|dri/)[\w/.-]{0,60}:? .{0,40}permission denied",
        ),
        cause="the user of the server may not open the GPU's device files, which belong to the groups video and "
        "render",
        cure="`sudo usermod -aG video,render USER` and a new login; a unit: SupplementaryGroups=video render; "
        "a container: `--group-add $(getent group video | cut -d: -f3)`. A bundle's unit and compose.yaml "
        "have them",
        source=f"{_HUB}NVIDIA/NemoClaw/pull/5018",
        explains=("nvmap-not-passed", "cuda-driver-too-old", *_LOADING),
    ),
    Rule(
        id="nvmap-not-passed",
        symptom="`NvRmMemInitNvmap failed with No such file or directory`",
        patterns=_any(r"NvRmMemInitNvmap failed with No such file or directory"),
        cause="the container was not given the Jetson's device files",
        cure="`docker run --runtime nvidia …`, from an image of this device's L4T (`cat "
        "/etc/nv_tegra_release`)",
        source=f"{_JETSON}issues/384",
        explains=("libcuda-missing", *_LOADING),
    ),
    Rule(
        id="libcuda-missing",
        symptom="`libcuda.so.1: cannot open shared object file`",
        patterns=_any(r"lib(?:cuda|nvidia-ml)\.so\.1: cannot open shared object file"),
        cause="the driver's library is not there: a container without NVIDIA's runtime, or a host without the "
        "driver",
        cure="on the host `nvidia-smi` must answer; start the container with `--gpus all` (a Jetson: "
        '`--runtime nvidia`), or make it the default: {{"default-runtime": "nvidia"}} in '
        "/etc/docker/daemon.json",
        source=f"{_JETSON}issues/1397",
        explains=("gpu-not-used", "gpu-not-seen", "onnx-provider-missing"),
    ),
    Rule(
        id="library-missing",
        symptom="`libcudart.so.12: cannot open shared object file`, `libcudnn.so.9: …`",
        patterns=_any(
            r"(?<!with error: )(?<!dlerror: )(?P<name>\blib(?!cuda\.so|nvidia-ml\.so|onnxruntime)[\w+-]{1,80}"
            r"(?:\.\d{1,9}){0,4}\.so[.\d]*): cannot open shared object file"
        ),
        values=_library,
        cause="{name} is not where the loader looks{_of}: the program was built for libraries that are not installed",
        cure="take the build for the CUDA that is there (`nvidia-smi`; a Jetson: `apt list --installed "
        "nvidia-jetpack`), or install the library and name its folder in LD_LIBRARY_PATH; `ldconfig -p | grep LIBRARY` "
        "says what the loader finds. `edgepack build --with-runtime` carries a static llama-server",
        source=f"{_VLLM}issues/1718",
        explains=("gpu-not-used", "server-ended", "package-missing", "unit-failed"),
    ),
    Rule(
        id="gpu-not-seen",
        symptom="`No CUDA GPUs are available`, `Found no NVIDIA driver`, `no CUDA-capable device is detected`, "
        "`Failed to infer device type`",
        patterns=_any(
            r"No CUDA GPUs are available",
            r"Found no NVIDIA driver on your system",
            r"no CUDA-capable device is detected",
            r"cudaSetDevice err: 100\b",
            r"ggml_cuda_init: failed to initialize CUDA: (?!CUDA driver version|forward compat|.*PTX)",
            r"Failed to infer device type",
        ),
        cause="the process sees no GPU: a container without NVIDIA's runtime, an empty CUDA_VISIBLE_DEVICES, no "
        "driver, or a package for another kind of device",
        cure="`nvidia-smi` in the same place must list the card; a container gets it with `--gpus all` (a Jetson: "
        "`--runtime nvidia`), `unset CUDA_VISIBLE_DEVICES`. Without a card: a plan for the CPU, `edgepack build "
        "--profile P`",
        source="https://docs.vllm.ai/en/latest/usage/troubleshooting/",
        explains=("gpu-not-used", "onnx-provider-missing"),
    ),
    Rule(
        id="torch-without-cuda",
        symptom="`Torch not compiled with CUDA enabled`",
        patterns=_any(r"Torch not compiled with CUDA enabled"),
        cause="the PyTorch that is installed is the CPU's (on aarch64 PyPI has no other for a Jetson)",
        cure="`python -c 'import torch; print(torch.version.cuda)'` must not print None: a wheel of the card's CUDA "
        "(https://download.pytorch.org/whl/), a Jetson's of its own index (https://pypi.jetson-ai-lab.io)",
        source=f"{_HUB}facebookresearch/detectron2/issues/460",
        explains=("gpu-not-used",),
    ),
    Rule(
        id="docker-iptables-raw",
        symptom="``can't initialize iptables table `raw'`` when a container starts",
        patterns=_any(r"can't initialize iptables table `raw'"),
        cause="docker 28 and later want the kernel module iptable_raw, which Jetson's kernel has not",
        cure="`network_mode: host` (`docker run --network host`), or docker 27: `sudo apt install "
        "docker-ce=5:27.*`",
        source=f"{_HUB}moby/moby/issues/49557",
    ),
    Rule(
        id="docker-socket",
        symptom="`permission denied while trying to connect to the Docker daemon socket`",
        patterns=_any(r"(?i)permission denied while trying to connect to the docker daemon"),
        cause="this user may not talk to docker",
        cure="`sudo docker …`, or `sudo usermod -aG docker $USER` and a new login (which is as good as root)",
        source="https://docs.docker.com/engine/install/linux-postinstall/",
    ),
    Rule(
        id="package-missing",
        symptom="`ModuleNotFoundError: No module named …`",
        patterns=_any(
            r"(?:ModuleNotFoundError|ImportError): No module named '?(?P<name>[\w.]+)'?",
            r"(?:Error|Exception): .{0,300}\b[Pp]lea(?:se|es) install (?P<name>[\w.-]+)",
            r"Error: .{0,300}\bpip install (?:-\S+ )*'?(?P<name>[\w.-]+)",
            r"the package (?P<name>\w+) seems to be not installed",
        ),
        cause="this Python has no package {name}: the bundle's requirements were not installed into it",
        cure="`sh start.sh install` makes the bundle's own environment from requirements.txt; EDGEPACK_PYTHON names "
        "another Python that has them",
        source="https://packaging.python.org/en/latest/tutorials/installing-packages/",
        explains=("server-ended", "unit-failed"),
    ),
    Rule(
        id="wheel-not-found",
        symptom="pip: `No matching distribution found for …`",
        patterns=_any(r"No matching distribution found for (?P<name>[\w.-]+)"),
        cause="there is no {name} for this Python and this CPU in pip's index (32-bit and newest Pythons have few, "
        "Jetson and other aarch64 fewer)",
        cure="`python -VV` and `uname -m` against the files on https://pypi.org/project/{name}/#files: another Python, "
        "the 64-bit system, on a Jetson its own index (https://pypi.jetson-ai-lab.io), or `edgepack build --runtime "
        "llama.cpp --with-runtime`, which needs no wheel",
        source=f"{_GENAI}issues/1102",
        explains=("package-missing", "server-ended"),
    ),
    Rule(
        id="wheel-not-built",
        symptom="pip: `Failed building wheel for …`",
        patterns=_any(
            r"Failed building wheel for (?P<name>[\w.-]+)",
            r"Building wheel for (?P<name>[\w.-]+).* did not run successfully",
            r"Getting requirements to build wheel did not run successfully",
        ),
        values=lambda found, log: {"name": found.groupdict().get("name") or _collected(found, log)},
        cause="pip found no wheel of {name} for this Python and this CPU, and compiling it here failed: mostly for "
        "lack of compiler, cmake or headers",
        cure="the first `error:` above says what; `sudo apt install build-essential cmake python3-dev`, a Python that "
        "it has wheels for, or `edgepack build --runtime llama.cpp --with-runtime`, which needs none",
        source=f"{_HUB}abetlen/llama-cpp-python/issues/1947",
        certainty="likely",
        explains=("package-missing",),
    ),
    Rule(
        id="package-versions",
        symptom="`ImportError: cannot import name … from …`, `compiled using NumPy 1.x cannot be run in NumPy 2`",
        patterns=_any(
            r"ImportError: cannot import name '(?P<what>\w+)' from (?:partially initialized module )?'(?P<name>\w+)",
            r"A module that was compiled using (?P<what>NumPy 1\.x) cannot be run in\s+(?P<name>NumPy)",
        ),
        cause="the installed {name} is another version than the one that {what} was taken from",
        cure="install the versions that belong together: `sh start.sh install` makes the bundle's own environment from "
        "requirements.txt; by hand `pip check` names what disagrees",
        source=f"{_HUB}vllm-project/vllm-ascend/pull/2365",
        explains=("server-ended",),
    ),
    Rule(
        id="unit-program-missing",
        symptom="systemd: `status=203/EXEC`, `status=127`",
        patterns=_any(r"code=exited, status=(?P<status>127|126|203/EXEC)"),
        cause="the unit's program is not where ExecStart says, may not be executed, is for another CPU, or lacks a "
        "library (status {status})",
        cure="`systemctl cat UNIT` names the program: run it by hand as the unit's user; `file PROGRAM` says for which "
        "CPU it is. A bundle's unit belongs where the bundle was unpacked (`edgepack unpack`)",
        source="https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html",
        explains=("unit-failed",),
    ),
    Rule(
        id="package-interface",
        symptom="`AttributeError: module 'vllm' has no attribute …`, `'….GeneratorParams' object has no attribute …`",
        patterns=_any(
            r"module '(?P<name>[a-z]\w+)[\w.]*' has no attribute '(?P<what>\w+)'",
            r"'(?P<name>[a-z]\w+)\.[\w.]+' object has no attribute '(?P<what>\w+)'",
        ),
        cause="what calls {name} was written for another version of it: this one has no {what}",
        cure="install the versions that belong together: `sh start.sh install` makes the bundle's own environment; an "
        "example or a plugin must be that of the installed version (`pip show {name}`)",
        source=f"{_HUB}microsoft/semantic-kernel/issues/13001",
        certainty="likely",
        explains=("server-ended",),
    ),
    Rule(
        id="binary-mismatch",
        symptom="`undefined symbol: _ZN3c10…`",
        patterns=_any(r"(?<![\w+.-])(?P<name>[\w+.-]{1,200}\.so[.\d]*): undefined symbol:? (?P<symbol>\w+)"),
        values=lambda found, log: {
            "name": found["name"],
            "needs": "PyTorch" if re.search("torch|c10|at[0-9]", found["symbol"]) else "library",
        },
        cause="{name} was compiled against another version of {needs} than the one that is loaded",
        cure="install both anew, so that they belong together: the PyTorch that the package asks for (`pip check`), in "
        "an environment of its own (`sh start.sh install`), and `unset LD_LIBRARY_PATH` where it brings in others",
        source=f"{_VLLM}issues/5501",
        explains=("package-missing", "server-ended"),
    ),
    Rule(
        id="static-tls",
        symptom="aarch64: `cannot allocate memory in static TLS block`",
        patterns=_any(r"(?<![\w/.-])(?P<path>/[^\s:]{1,300}): cannot allocate memory in static TLS block"),
        cause="{path} was loaded too late: the room for its thread-local variables is given out when a program starts",
        cure="load it first: `export LD_PRELOAD={path}` in the server's environment (a unit: Environment=); nothing is "
        "wrong with the device's memory",
        source=f"{_HUB}NVIDIA-AI-IOT/jetcard/issues/34",
        explains=("server-ended",),
    ),
    Rule(
        id="glibc-too-old",
        symptom="``version `GLIBC_2.38' not found``",
        patterns=_any(r"version .(?P<symbol>GLIBC(?:XX)?_[\d.]+). not found"),
        cause="the program was linked against a newer C library ({symbol}) than this system has",
        cure="`edgepack build --with-runtime` carries a static llama-server that needs none; or build on the "
        "device. JetPack 6 (Ubuntu 22.04) has glibc 2.35, Debian 12 has 2.36",
        source=f"{_LLAMA}issues/9794",
    ),
    Rule(
        id="illegal-instruction",
        symptom="`Illegal instruction (core dumped)`",
        patterns=_any(
            r"(?i)illegal instruction(?! was encountered)",
            r"trap invalid opcode",
            r"code=(?:killed|dumped), status=4/ILL",
        ),
        cause="the program was built for a CPU with more instructions than this one has (built with "
        "-march=native, or for AVX2)",
        cure="`edgepack build --with-runtime` carries a server for the profile's CPU; by hand build llama.cpp "
        "with `-DGGML_NATIVE=OFF` and without what `lscpu` does not list",
        source=f"{_LLAMA}issues/8734",
        explains=("unit-failed",),
    ),
    Rule(
        id="compiler-missing",
        symptom="`Could not find nvcc`, `Failed to find C compiler`, `No working C++ compiler found`, `Python.h: No "
        "such file or directory` when a server starts",
        patterns=_any(
            r"Could not find (?P<program>nvcc)\b",
            r"No such file or directory: '(?P<program>[^'\n]*\b(?:nvcc|ninja|gcc|g\+\+|cc))'",
            r"(?P<program>\bnvcc): (?:command )?not found",
            r"Failed to find (?P<program>C compiler)",
            r"InvalidCxxCompiler: .*(?P<program>C\+\+ compiler)",
            r"fatal error: (?P<program>Python\.h): No such file or directory",
            r"(?P<program>CUDA_HOME) environment variable is not set",
        ),
        cause="a part of the server compiles its kernels when it starts (FlashInfer, Triton, torch.compile), and "
        "{program} is not here",
        cure="install what is missing: `sudo apt install build-essential python3-dev`, a CUDA toolkit of PyTorch's "
        "CUDA (CUDA_HOME=/usr/local/cuda). Or do without: under vLLM VLLM_USE_FLASHINFER_SAMPLER=0 and the wheels "
        "flashinfer-cubin and flashinfer-jit-cache of the same version; the image vllm/vllm-openai has it all",
        source=f"{_VLLM}issues/49497",
        explains=("kernels-not-compiled",),
    ),
    Rule(
        id="kernels-not-compiled",
        symptom="FlashInfer: `Command '['ninja', …]' returned non-zero exit status`, `Ninja build failed`; Triton: "
        "`ptxas fatal`; torch.compile: `CppCompileError`",
        patterns=_any(
            r"CppCompileError: C\+\+ compile error",
            r"Command '\[?'?[^\]\n]*\bninja\b.* returned non-zero exit status",
            r"Ninja build failed",
            r"ptxas (?:fatal|error)\s*:",
            r"PTXASError|PTXAS error|LLVM ERROR: Cannot select|\bmlir::triton::",
            r"ninja: build stopped: subcommand failed",
        ),
        cause="kernels that are compiled when the server starts (FlashInfer, Triton, torch.compile) did not compile: a "
        "card that this version does not know (older or newer than it), no compiler, headers of another CUDA, or too "
        "little memory for it",
        cure="the first `error:` or `FAILED:` above, or what is under `Output:`, says what; `nvcc --version` must have "
        "the CUDA of PyTorch, MAX_JOBS=1 needs the least memory, and what an earlier version compiled goes with `rm -r "
        "~/.cache/flashinfer`. Under vLLM VLLM_USE_FLASHINFER_SAMPLER=0 does without the sampler's",
        source=f"{_HUB}flashinfer-ai/flashinfer/issues/4410",
        certainty="likely",
    ),
    Rule(
        id="bf16-unsupported",
        symptom="`Bfloat16 is only supported on GPUs with compute capability of at least 8.0`",
        patterns=_any(
            r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0"
            r"(?:\. Your (?P<gpu>.+?) GPU has compute capability (?P<has>[\d.]+\d))?"
        ),
        values=lambda found, log: {"_told": f" ({found['gpu']}: {found['has']})" if found["gpu"] else ""},
        cause="the checkpoint is in bfloat16, which this GPU does not compute{_told}",
        cure="serve in half precision (`--dtype half`), or build with the card's own profile: `edgepack build "
        "--profile P`",
        source=f"{_VLLM}issues/1157",
    ),
    Rule(
        id="half-on-cpu",
        symptom="PyTorch: `\"addmm_impl_cpu_\" not implemented for 'Half'`",
        patterns=_any(r"\"(?P<what>\w+)\" not implemented for '(?P<type>Half|BFloat16|Byte|Char|Float8\w*)'"),
        cause="PyTorch does not compute {type} here ({what}): the model runs on the CPU, or an older PyTorch than its "
        "format wants",
        cure="serve in fp32 or bf16 on a CPU (edgepack's server chooses what the CPU computes), with a newer PyTorch, "
        "or a scheme for CPUs: `edgepack build --profile P --runtime llama.cpp`. If there is a GPU, see that it is "
        "used: `python -c 'import torch; print(torch.cuda.is_available())'`",
        source=f"{_HUB}huggingface/transformers/issues/27769",
    ),
    Rule(
        id="dtypes-mixed",
        symptom="PyTorch: `Input type (…) and weight type (…) should be the same`, `Expected all tensors to be on the "
        "same device`",
        patterns=_any(
            r"(?P<what>Input type \(.+?\) and (?:weight|bias) type \(.+?\)) should be the same",
            r"(?P<what>expected (?:m1 and m2|mat1 and mat2|scalar type \w+ but found \w+|.* same dtype))",
            r"(?P<what>mat1 and mat2 must have the same dtype)",
            r"(?P<what>Expected all tensors to be on the same device)",
        ),
        cause="parts of the model are in different number formats or places ({what}): its code does not know how this "
        "checkpoint is quantized, or half of it was left on the CPU",
        cure="`edgepack build --runtime transformers` of a scheme that the model's parts all take (`edgepack plan "
        "--explain`); by hand leave the vision part out of the quantization (`llm_int8_skip_modules`), and the model "
        "whole on one device",
        source=f"{_HUB}njucckevin/SeeClick/issues/4",
        certainty="likely",
    ),
    Rule(
        id="quantization-unsupported",
        symptom="vLLM: `The quantization method awq is not supported for the current GPU`",
        patterns=_any(
            r"quantization method (?P<method>[\w-]+) is not supported for the current GPU\. Minimum capability: "
            r"(?P<needs>\d+)\. Current capability: (?P<has>\d+)",
            r"Quantization scheme is not supported for[ ',]+the current GPU\. Min capability: (?P<needs>\d+)[ .',]+"
            r"Current capability: (?P<has>\d+)",
        ),
        values=lambda found, log: {
            "method": found.groupdict().get("method") or "this quantization",
            **{name: f"{int(found[name]) // 10}.{int(found[name]) % 10}" for name in ("needs", "has")},
        },
        cause="vLLM computes {method} from compute capability {needs} on; this GPU has {has}",
        cure="another `--scheme`: `edgepack plan --runtime vllm --profile P` chooses one that the card computes "
        "(gptq-int4-g128 needs the least), or `--runtime llama.cpp`, whose Q4_K_M runs on older cards",
        source=f"{_VLLM}issues/1282",
    ),
    Rule(
        id="quantization-mismatch",
        symptom="vLLM: `Quantization method specified in the model config (…) does not match`",
        patterns=_any(
            r"Quantization method specified in the model config \((?P<config>[^)]+)\) does not match the quantization "
            r"method specified in the `?quantization`? argument \((?P<flag>[^)]+)\)"
        ),
        cause="`--quantization {flag}` is asked for and the checkpoint is {config}",
        cure="leave `--quantization` out: vLLM reads it from the checkpoint, as a bundle's flags do",
        source=f"{_VLLM}issues/5842",
    ),
    Rule(
        id="bitsandbytes-cuda",
        symptom="bitsandbytes: `CUDA Setup failed`, `libbitsandbytes_cuda… not found`",
        patterns=_any(
            r"CUDA Setup failed despite (?:CUDA|GPU) being available",
            r"Required library version not found: libs?bitsandbytes",
            r"Configured CUDA binary not found at \S*libbitsandbytes",
        ),
        cause="bitsandbytes has no library for this CUDA version (its aarch64 wheels none for Jetson)",
        cure="a bitsandbytes whose wheel names the CUDA of `python -c 'import torch; "
        "print(torch.version.cuda)'`; `python -m bitsandbytes` says what it found. On a Jetson choose "
        "another scheme: `edgepack build --scheme Q4_K_M`, or gptq-int4-g128 for vLLM",
        source=f"{_HUB}bitsandbytes-foundation/bitsandbytes/issues/1172",
    ),
    Rule(
        id="bitsandbytes-cpu",
        symptom="bitsandbytes: `was compiled without GPU support`",
        patterns=_any(r"bitsandbytes was compiled without GPU support"),
        cause="bitsandbytes found no library for this CUDA and took its own for the CPU; that matters only to INT8 and "
        "NF4 checkpoints",
        cure="as with bitsandbytes-cuda, where the model is INT8 or NF4; else leave it, or uninstall bitsandbytes",
        source=f"{_HUB}bitsandbytes-foundation/bitsandbytes/issues/1172",
        certainty="likely",
    ),
    Rule(
        id="onnx-provider-missing",
        symptom="`Cuda interface not available`; CUDAExecutionProvider is not available",
        patterns=_any(
            r"Cuda interface not available",
            r"CUDA execution provider is not enabled in this build",
            r"Specified provider 'CUDAExecutionProvider' is not in available provider names",
            r"Failed to load library \S*libonnxruntime_providers_cuda\.so with error: (?P<library>[^:\s]+)",
        ),
        values=lambda found, log: {
            "_library": f" (it misses {found['library']})" if "library" in found.re.groupindex else ""
        },
        cause="the package that is installed has no CUDA provider, or cannot load it{_library}",
        cure="x86 with an NVIDIA card: uninstall onnxruntime and onnxruntime-genai, `pip install "
        "onnxruntime-genai-cuda` with its CUDA 13 and cuDNN 9; a Jetson has no wheel on PyPI: `edgepack "
        "build --runtime llama.cpp`. On the CPU: `edgepack build --runtime onnx-genai` for a profile "
        "without a card",
        source=f"{_GENAI}issues/1191",
    ),
    Rule(
        id="gpu-not-used",
        symptom="`offloaded 0/29 layers to GPU`, and slow",
        patterns=_any(
            r"offloaded (?P<on>\d+)/(?P<all>\d+) layers to GPU",
            r"no usable GPU found, --gpu-layers option will be ignored",
        ),
        values=_layers,
        cause="{layers} computed on the GPU; the CPU does the rest, and slowly",
        cure="start with the bundle's own flags (`--gpu-layers 99`); if they do not fit, `edgepack plan "
        "--profile P --explain` says what does. Without any GPU in `llama-server --list-devices` it was "
        "built without CUDA",
        source=f"{_LLAMA}issues/12614",
        certainty="likely",
        explains=("slow-decode",),
    ),
    # memory
    Rule(
        id="nvmap-error-12",
        symptom="Jetson: `NvMapMemAllocInternalTagged: … error 12`",
        patterns=_any(
            r"NvMapMemAllocInternalTagged: (?P<bytes>\d+) error 12",
            r"NvMapMem(?:AllocInternalTagged|HandleAlloc)\b.*error (?:12|0)\b",
        ),
        values=_largest_of,
        cause="the Jetson's memory manager found no contiguous memory for an allocation{_size}: it is "
        "fragmented, or full of page cache, or (L4T 36.4.7) single requests near 1 GiB are refused",
        cure=f"{_DROP}, then start again; a reboot if it stays. L4T 36.4.7: update to 36.5 (JetPack 6.2.2). "
        "Then smaller pieces: `edgepack build … --ubatch 128 --context N`",
        source=f"{_LLAMA}pull/23732",
        explains=_LOADING,
    ),
    Rule(
        id="memory-short",
        symptom="`bytes of memory are needed and … are available` (start.sh, `edgepack doctor BUNDLE`)",
        patterns=_any(
            r"(?<!\d)(?P<needed>\d+) bytes of memory are needed and (?P<free>\d+) are available",
            r"(?<!\d)(?P<needed>\d+) bytes on the card are needed and (?P<free>\d+) are free",
        ),
        values=_refused_memory,
        cause="the plan may need {needed}, and {free} are free now",
        cure=f"end what else holds memory (`ps --sort=-rss -eo rss,comm | head`; a Jetson: {_DROP}, and `sudo "
        "systemctl isolate multi-user.target` ends the desktop). Else a smaller plan: `edgepack plan "
        "--profile P --explain`, `edgepack build … --context N --kv-type q8_0`",
        source="https://docs.kernel.org/filesystems/proc.html",
        explains=(
            "unit-failed",
            "kernel-oom",
            "cgroup-oom",
            "check-killed",
            "check-refused",
            "memory-thrash",
            *_MEMORY,
        ),
    ),
    Rule(
        id="memory-kv-cache",
        symptom="llama.cpp: `failed to allocate buffer for kv cache`",
        patterns=_LLAMA_MEMORY,
        values=_part("kv_cache"),
        cause="there was no memory for the KV cache{_asked}{_free}",
        cure="`edgepack build … --context {context}` (the cache is linear in it), `--kv-type q8_0` (53 % of "
        "f16), or fewer `--slots`; `edgepack fit --profile P --model M` says the largest context that "
        "fits",
        source=f"{_LLAMA}issues/19711",
        recovered=_SERVES,
        explains=("check-refused",),
    ),
    Rule(
        id="memory-compute",
        symptom="llama.cpp: `failed to allocate compute buffers`",
        patterns=_LLAMA_MEMORY,
        values=_part("compute"),
        cause="there was no memory for the compute buffers{_asked}{_free}",
        cure="`edgepack build … --ubatch 128` (they are linear in it), flash attention on (`-fa on`: without "
        "it they grow with the context), or a shorter `--context`",
        source=f"{_LLAMA}issues/16725",
        recovered=_SERVES,
        explains=("check-refused",),
    ),
    Rule(
        id="memory-weights",
        symptom="llama.cpp: `unable to allocate CUDA0 buffer` while loading",
        patterns=_LLAMA_MEMORY,
        values=_part("weights"),
        cause="there was no memory for the weights{_asked}{_free}",
        cure="`edgepack plan --profile P --explain` chooses model and scheme that fit; `--scheme Q4_K_M` or "
        "lower takes less. End what else holds the card (`nvidia-smi`)",
        source=f"{_LLAMA}issues/20431",
        recovered=_SERVES,
        explains=("check-refused",),
    ),
    Rule(
        id="cuda-memory",
        symptom="`CUDA error: out of memory` while it runs",
        patterns=_any(
            r"CUDA (?:error|failure)(?: \d+)?(?: at \S+)?: out of memory",
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY",
            r"CUDA out of memory(?!\. Tried to allocate)",
        ),
        cause="the card ran full after the load: buffers that grow with use, or another program took memory",
        cure="`nvidia-smi` says who holds it. Start with the bundle's flags, which bound everything; on a "
        "Jetson build llama.cpp with `-DGGML_CUDA_NO_VMM=ON`, whose pool reserves more than there is",
        source=f"{_LLAMA}issues/4680",
        certainty="likely",
        explains=("cublas-memory", "program-fault"),
    ),
    Rule(
        id="cublas-memory",
        symptom="`CUBLAS_STATUS_ALLOC_FAILED`, `CUBLAS_STATUS_NOT_INITIALIZED`, `the resource allocation failed`",
        patterns=_any(
            r"CU(?:BLAS|DNN)_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)",
            r"CUDA error: the (?:resource allocation failed|library was not initialized)",
        ),
        cause="cuBLAS found no memory on the card for its handle and workspace: model and KV cache have taken it all; "
        "on a Jetson also the libraries of another CUDA (a desktop card's)",
        cure="leave more of the card free: `edgepack build … --context N`, a `--scheme` of fewer bits, and under vLLM "
        "the plan's `--kv-cache-memory-bytes`; `nvidia-smi` says who else holds memory. A Jetson: the build for its "
        "JetPack, and LD_LIBRARY_PATH without another CUDA's folder",
        source=f"{_HUB}jax-ml/jax/issues/7118",
        certainty="likely",
        explains=("program-fault",),
    ),
    Rule(
        id="cublas-failed",
        symptom="`CUBLAS_STATUS_EXECUTION_FAILED` and other CUBLAS_STATUS_ and CUDNN_STATUS_",
        patterns=_any(
            r"(?P<status>CU(?:BLAS|DNN)_STATUS_(?!SUCCESS\b|ALLOC_FAILED|NOT_INITIALIZED)[A-Z_]+)",
            r"CUDA error: (?P<status>the function failed to launch on the GPU|an internal operation failed|the "
            r"requested functionality is not supported|an unsupported value or parameter was passed to the function)",
        ),
        cause="the GPU refused a call of cuBLAS or cuDNN ({status}): mostly libraries of another CUDA than the "
        "driver's (on a Jetson a desktop card's), else a number format that this GPU does not compute",
        cure="`ldd PROGRAM | grep -i cu` names the libraries: they must be those of the driver's CUDA, on a Jetson "
        "JetPack's (build llama.cpp on the device, `unset LD_LIBRARY_PATH`); llama.cpp does without cuBLAS with "
        "`-DGGML_CUDA_FORCE_MMQ=ON`. A PyTorch model that computes in bf16: try `--dtype half`",
        source=f"{_HUB}ollama/ollama/issues/6999",
        certainty="likely",
        explains=("program-fault",),
    ),
    Rule(
        id="cuda-fault",
        symptom="`CUDA error: an illegal memory access was encountered`, `invalid argument`, `device-side assert "
        "triggered`; `NVRM: Xid`",
        patterns=_any(
            r"CUDA (?:error|failure \d+): (?P<what>[^;\n]+)",
            r"(?P<what>an illegal (?:memory access|instruction) was encountered|cudaErrorIllegalAddress)",
            r"NVRM: (?P<what>Xid \(PCI:[^)]*\): \d+)",
            r"(?P<what>GPU has fallen off the bus)",
            r"(?P<what>cudaSetDevice err: (?!35\b|100\b|80[34]\b)\d+)",
        ),
        values=_cuda_fault,
        cause="a kernel failed on the GPU ({what}): a fault of the runtime for this model, quantization or card, an "
        "index out of range (a token beyond the vocabulary), or a card that is failing",
        cure="another version of the runtime first; then what names the kernel: CUDA_LAUNCH_BLOCKING=1, under vLLM "
        "`--enforce-eager`, llama.cpp with `-fa off` or GGML_CUDA_DISABLE_GRAPHS=1. `dmesg | grep -i xid` tells a "
        "failing card or too weak a power supply",
        source="https://docs.vllm.ai/en/latest/usage/troubleshooting/",
        certainty="likely",
        explains=("cublas-failed", "cublas-memory", "program-fault"),
    ),
    Rule(
        id="torch-memory",
        symptom="PyTorch: `CUDA out of memory. Tried to allocate …`",
        patterns=_TORCH,
        values=_torch_memory,
        cause="{needed} were asked for and {free} of the card were free",
        cure="less of what grows: `edgepack build … --context N --slots 1`, a `--scheme` of fewer bits; under "
        "vLLM also a smaller `--max-num-batched-tokens` and the plan's `--kv-cache-memory-bytes`. "
        "`nvidia-smi` says who else holds memory",
        source=f"{_VLLM}issues/17835",
        explains=("vllm-no-kv-memory",),
    ),
    Rule(
        id="memory-fragmented",
        symptom="PyTorch: out of memory, and much `is reserved by PyTorch but unallocated`",
        patterns=_TORCH,
        values=_torch_pieces,
        cause="{needed} were asked for, {free} were free, and PyTorch itself held {pieces} in pieces too small "
        "for it",
        cure="`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` in the server's environment; under vLLM the "
        "KV cache is paged already, so give it less: `--kv-cache-memory-bytes` of the plan",
        source=f"{_HUB}kaito-project/kaito/issues/976",
        explains=("vllm-no-kv-memory",),
    ),
    Rule(
        id="torch-nvml-assert",
        symptom="PyTorch: `NVML_SUCCESS == r INTERNAL ASSERT FAILED`",
        patterns=_any(r"NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
        cause="PyTorch ran out of memory and failed while asking the driver how much there is, which a Jetson's "
        "(and MIG's) does not tell",
        cure=f"treat it as out of memory: {_DROP} on a Jetson, then a shorter `--context` or a `--scheme` of "
        "fewer bits",
        source=f"{_HUB}pytorch/pytorch/issues/185240",
        certainty="likely",
    ),
    Rule(
        id="quantized-offloaded",
        symptom="transformers: `Some modules are dispatched on the CPU or the disk`",
        patterns=_any(r"Some modules are dispatched on the CPU or the disk"),
        cause="the quantized model does not fit the card's free memory, and INT8 and NF4 cannot lie on the CPU",
        cure="end what else holds the card (`nvidia-smi`); else a smaller model or fewer bits (`edgepack plan "
        "--profile P --explain`), or `--runtime llama.cpp`, which computes what does not fit on the CPU",
        source=f"{_HUB}meta-llama/llama-cookbook/issues/56",
    ),
    Rule(
        id="host-memory",
        symptom="`DefaultCPUAllocator: can't allocate memory`, `std::bad_alloc`, `MemoryError`",
        patterns=_any(
            r"DefaultCPUAllocator: (?:can't allocate|not enough) memory: you\s+tried to allocate (?P<bytes>\d+) bytes",
            r"what\(\): +std::bad_alloc|instance of 'std::bad_alloc'",
            r"(?m)(?:^|\s)(?:numpy\.\S+\.)?_?(?:Array)?MemoryError\b",
            r"\[Errno 12\] Cannot allocate memory",
        ),
        values=_largest_of,
        cause="the program was refused host memory{_size}: there is no more, or a limit of its container or `ulimit "
        "-v` is lower than what it needs",
        cure="`free -m` and `ulimit -v` say which; then a plan that fits: `edgepack plan --profile P --explain`, "
        "`edgepack build … --context N`, a `--scheme` of fewer bits. A checkpoint that is not quantized is loaded "
        "whole",
        source=f"{_HUB}huggingface/transformers/issues/23016",
        explains=("check-refused", "program-fault"),
    ),
    Rule(
        id="thread-refused",
        symptom="`std::system_error`, `what():  Resource temporarily unavailable`; `can't start new thread`",
        patterns=_any(
            r"what\(\): +Resource temporarily unavailable",
            r"(?:system_error|constructor failed|pthread_create\b.*|creation failed): Resource temporarily unavailable",
            r"RuntimeError: can't start new thread",
        ),
        cause="the program was refused a thread: a limit on tasks (a unit's TasksMax=, `docker run --pids-limit`, "
        "`ulimit -u`) or on address space (LimitAS=, `ulimit -v`) is lower than what it needs",
        cure="`systemctl show -p TasksMax -p LimitAS -p LimitNPROC UNIT` and `ulimit -a` say which; a bundle's files "
        "allow as many tasks as its server starts (a thread for each slot and 36 more) and any address space: look in "
        "the drop-ins (`systemctl cat UNIT`) and in what starts the container",
        source=f"{_LLAMA}issues/17168",
        explains=("program-fault", "server-ended", "unit-failed"),
    ),
    Rule(
        id="vllm-context-too-long",
        symptom="vLLM: `KV cache is needed, which is larger than the available KV cache memory`",
        patterns=_any(
            r"max seq len \((?P<asked>\d+)\), \((?P<needed>[\d.]+ [KMG]iB) KV cache is needed, which is larger "
            r"than the available KV cache memory \((?P<free>[\d.]+ [KMG]iB)\)",
            r"max seq len \((?P<asked>\d+)\) is larger than the maximum number of tokens that can be stored in "
            r"KV cache \((?P<fits>\d+)\)",
        ),
        values=_context_that_fits,
        cause="one request of {asked} tokens does not fit the KV cache{_needed}",
        cure="`edgepack build --runtime vllm … --context {fits}` (`--max-model-len {fits}`), or `--kv-type "
        "fp8`; the plan sizes the pool itself (`--kv-cache-memory-bytes`)",
        source=f"{_VLLM}issues/16118",
    ),
    Rule(
        id="vllm-no-kv-memory",
        symptom="vLLM: `No available memory for the cache blocks`",
        patterns=_any(r"No available memory for the cache blocks"),
        cause="nothing is left for the KV cache: weights and activations take all that "
        "`--gpu-memory-utilization` of the card allows, or `--kv-cache-memory-bytes` is less than one "
        "block for each layer",
        cure="`edgepack plan --runtime vllm --profile P --explain`: a `--scheme` of fewer bits and smaller "
        "`--max-num-batched-tokens` and `--max-num-seqs` leave room; utilization is of the card's total, "
        "so raise it only when nothing else uses the card",
        source=f"{_VLLM}issues/2248",
    ),
    Rule(
        id="vllm-memory-taken",
        symptom="vLLM: `Free memory on device … is less than desired GPU memory utilization`",
        patterns=_any(
            r"(?i)free memory on device (?:cuda:\d+ )?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less "
            r"than desired GPU memory utilization \([\d.]+, (?P<asked>[\d.]+) GiB\)"
        ),
        values=_utilization,
        cause="others hold {held} GiB of {total}: {free} GiB are free and {asked} are asked for",
        cure=f"end them (`nvidia-smi`; a server that just ended may take seconds; a Jetson: {_DROP}), or ask "
        f"for what is free: `--gpu-memory-utilization {{share}}`",
        source=f"{_VLLM}issues/20305",
        explains=("vllm-no-kv-memory",),
    ),
    Rule(
        id="vllm-preemption",
        symptom="vLLM: `Sequence group … is preempted`; slow under load",
        patterns=_any(
            r"is preempted by PreemptionMode\.\w+ mode because there is not enough KV cache",
            r"Preempt(?:ed|ing) request \S+",
        ),
        cause="more requests run than the KV cache holds, so some are thrown out and computed again",
        cure="fewer at a time: `edgepack build --runtime vllm … --slots N` (`--max-num-seqs`) so that slots x "
        "context fit the pool; `--kv-type fp8` doubles it",
        source=f"{_VLLM}issues/18115",
    ),
    Rule(
        id="onnx-memory",
        symptom="ONNX Runtime: `Failed to allocate memory for requested buffer`, `Could not allocate the "
        "key-value cache`",
        patterns=_any(
            r"Failed to allocate memory for requested buffer of size (?P<bytes>\d+)",
            r"Could not allocate the key-value cache buffer of shape: \[batch_size \((?P<batch>\d+)\), "
            r"num_key_value_heads \((?P<heads>\d+)\), max_length \((?P<length>\d+)\), head_size \((?P<head>\d+)\)\] "
            r"for (?P<layers>\d+) layers",
        ),
        values=_cache_of_onnx,
        cause="there was no memory: {needed} were asked for. ONNX Runtime GenAI allocates `search.max_length` "
        "at once, and its default is the model's whole context",
        cure="`edgepack build --runtime onnx-genai … --context N` writes the planned length into "
        "genai_config.json; by hand set search.max_length and past_present_share_buffer: true there",
        source=f"{_GENAI}issues/980",
    ),
    Rule(
        id="prompt-cache-oom",
        symptom="llama-server is killed after many requests, last words `saving prompt with length`",
        patterns=_any(r"saving prompt with length (?P<tokens>\d+), total state size = (?P<mib>[\d.]+) MiB"),
        values=_saved_prompt,
        cause="llama-server kept prompts in host memory (one of {tokens} tokens takes {size}): its cache is 8 "
        "GiB unless `--cache-ram` says less, and no limit of the card counts it",
        cure="start with the bundle's flags, which set `--cache-ram` and `--ctx-checkpoints`; by hand "
        "`--cache-ram 0 --ctx-checkpoints 0`",
        source=f"{_LLAMA}issues/20509",
        certainty="likely",
        explains=("kernel-oom", "cgroup-oom"),
    ),
    Rule(
        id="cgroup-oom",
        symptom="`Memory cgroup out of memory: Killed process`",
        patterns=_any(r"Memory cgroup out of memory: Kill", r"oom-kill:constraint=CONSTRAINT_MEMCG"),
        values=_killed,
        cause="{who}{_held} went over the limit of its container or unit",
        cure="the limit must cover the plan's upper end on the host (`edgepack plan`): compose.yaml "
        "`mem_limit`, a unit's MemoryMax=, `docker run --memory`. A bundle's files have it right; a limit "
        "of your own must not be lower",
        source=f"{_HUB}apache/doris/issues/3525",
        explains=("kernel-oom", "container-oom", "container-killed", "check-killed", "killed"),
    ),
    Rule(
        id="kernel-oom",
        symptom="`Out of memory: Killed process`, `invoked oom-killer`, `Failed with result 'oom-kill'`",
        patterns=_any(
            r"Out of memory: Kill(?:ed)? process",
            r"invoked oom-killer: ",
            r"killed by the OOM killer",
            r"Failed with result 'oom-kill'",
        ),
        values=_killed,
        cause="the system ran out of memory, and the kernel killed {who}{_held}",
        cure="a plan that fits: `edgepack plan --profile P --explain`, `edgepack build … --context N --kv-type "
        "q8_0`. Start with `sh start.sh`, which refuses too little memory, or the unit, whose "
        "OOMScoreAdjust spares the rest",
        source=f"{_HUB}b4rtaz/distributed-llama/issues/59",
        explains=("container-killed", "check-killed", "killed"),
    ),
    Rule(
        id="container-oom",
        symptom='docker: `"OOMKilled": true`',
        patterns=_any(r"\"?OOMKilled\"?\s*[:=]\s*true"),
        cause="the container went over its memory limit",
        cure="`edgepack plan` says what the server needs at most: raise `mem_limit` (`docker run --memory`) to "
        "it, or build smaller: `edgepack build … --context N --kv-type q8_0`",
        source=f"{_HUB}kudarap/dotagiftx/issues/123",
        explains=("container-killed",),
    ),
    Rule(
        id="container-killed",
        symptom="a container `exited with code 137`",
        patterns=_any(r"exited with code 137", r"Exited \(137\)", r"\"ExitCode\"\s*:\s*137\b"),
        values=lambda found, log: None if re.search(r"OOMKilled\"?\s*[:=]\s*false", log.text) else {},
        cause="the container was killed (128 + SIGKILL): nearly always for memory, also by `docker stop` after "
        "its time",
        cure="`docker inspect -f '{{{{.State.OOMKilled}}}}' NAME` and `dmesg | grep -i oom` say which; for "
        "memory see container-oom",
        source=f"{_HUB}getwud/wud/issues/610",
        certainty="likely",
    ),
    Rule(
        id="killed",
        symptom="`Killed`, `signal: killed`, `SIGKILL`, exit code -9",
        patterns=_any(
            r"(?m)^(?:\S+: line \d+: +\d+ )?Killed(?:$|  )",
            r"signal: killed",
            r"(?:died with|received) (?:<Signals\.)?SIGKILL|Signal 9 \(SIGKILL\)",
            r"exit ?code ?:? -9\b",
        ),
        cause="the process was killed with SIGKILL: nearly always by the kernel, for memory",
        cure="`dmesg | grep -i -E 'oom|killed process'` says whether; then a plan that fits: `edgepack plan --profile "
        "P --explain`, `edgepack build … --context N --kv-type q8_0`. `sh start.sh` refuses too little memory",
        source=f"{_HUB}ollama/ollama/issues/788",
        certainty="likely",
    ),
    Rule(
        id="check-killed",
        symptom="the check: `oom-killed`",
        patterns=_any(r"(?:check: |failed its test: )oom-killed (?:during |\()(?P<stage>\w+)"),
        cause="the server was killed for memory during {stage}",
        cure="`edgepack build … --context N --kv-type q8_0`, or a `--scheme` of fewer bits; `edgepack plan "
        "--profile P --explain` says what fits. With `--memory-limit` the limit is what it names",
        source=f"{_LLAMA}issues/23472",
        explains=("rolled-back",),
    ),
    Rule(
        id="check-refused",
        symptom="the check: `allocation-refused`",
        patterns=_any(r"(?:check: |failed its test: )allocation-refused (?:during |\()(?P<stage>\w+)"),
        cause="the server was refused memory during {stage}",
        cure="see what else holds memory; then `edgepack build … --context N --kv-type q8_0`, or a `--scheme` "
        "of fewer bits",
        source=f"{_LLAMA}issues/16725",
        explains=("rolled-back",),
    ),
    Rule(
        id="memory-thrash",
        symptom="it runs, but far too slowly, and reads its weights from disk again and again",
        patterns=_any(r"check: thrash during ", r"check: item paging: fail", r"failed its test: thrash \("),
        cause="the memory is not enough: mapped weights are dropped and read back for every token",
        cure="`--load-mode none` makes it fail at once instead; what helps is less: a `--scheme` of fewer "
        "bits, a shorter `--context`, or no swap on flash (`sudo swapoff -a`)",
        source=_SERVER_README,
        explains=("slow-decode", "rolled-back"),
    ),
    Rule(
        id="check-peak",
        symptom="the check: peak memory or budget above the plan",
        patterns=_any(
            r"check: item (?P<item>peak memory|budget|host budget|unexplained rest): fail",
            r"failed its test: (?P<item>its memory peaked at \d+ bytes)",
        ),
        cause="the server held more than the plan's upper end ({item})",
        cure="run the llama-server that was planned with (the check's row `server` names it) with the bundle's "
        "own flags; if it was, report it with `edgepack check --json`: the plan's interval is wrong",
        source=f"{_LLAMA}pull/23861",
        certainty="likely",
        explains=("rolled-back",),
    ),
    # flags
    Rule(
        id="llama-flag-refused",
        symptom="llama-server: `error: invalid argument: --no-mmap`",
        patterns=_any(
            r"error: (?:invalid|unknown) argument: (?P<flag>\S+)",
            r"error while handling argument \"(?P<flag>[^\"]+)\": (?P<why>.+)",
        ),
        values=_llama_flag,
        cause="this llama-server does not take {flag}{_why}: flags and their values change between versions",
        cure="{instead}; or run the server that the bundle was planned with (`edgepack build --with-runtime`, "
        "`edgepack toolchain install`)",
        source=f"{_LLAMA}pull/28334",
        explains=("unit-failed",),
    ),
    Rule(
        id="vllm-flag-refused",
        symptom="vLLM: `error: unrecognized arguments`, `unexpected keyword argument`",
        patterns=_any(
            r"(?:api_server\.py|vllm(?: serve)?): error: unrecognized arguments: (?P<flag>.+)",
            r"(?:EngineArgs|LLM|SamplingParams)\.__init__\(\) got an unexpected keyword argument '(?P<flag>\w+)'",
        ),
        values=_vllm_flag,
        cause="this vLLM does not take {flag}",
        cure="{instead}. `edgepack build --runtime vllm` renders only flags that the planned version has",
        source=f"{_HUB}unslothai/unsloth-zoo/issues/1210",
    ),
    Rule(
        id="kv-needs-flash-attention",
        symptom="llama.cpp: `quantized V cache requires flash_attn`",
        patterns=_any(r"(?:quantized V cache|V cache quantization) requires flash_attn"),
        cause="the values of the KV cache are quantized, which llama.cpp computes only with flash attention",
        cure="`--flash-attn on`, as the bundle's flags have it; or `edgepack build … --kv-type q8_0/f16`, "
        "which leaves the values as they are",
        source=_SERVER_README,
    ),
    Rule(
        id="remote-code",
        symptom="`requires you to execute the configuration file in that repo`, `trust_remote_code=`",
        patterns=_any(
            r"requires you to execute the configuration file in that repo",
            r"contains custom code which must be executed to correctly load the model",
            r"[Pp]lease pass the argument `trust_remote_code=",
        ),
        cause="the model brings program code of its own, which nothing here runs unasked",
        cure="choose a model that the runtime itself knows (`edgepack plan --profile P`); edgepack runs no code out of "
        "a model's folder. By hand, after having read it: `--trust-remote-code`",
        source=f"{_VLLM}issues/9531",
    ),
    Rule(
        id="hub-gated",
        symptom="`You are trying to access a gated repo`, `Access to model … is restricted`",
        patterns=_any(
            r"access a gated repo",
            r"Cannot access gated repo",
            r"GatedRepoError",
            r"Access to model \S+ is restricted",
        ),
        cause="the model is given only to who has accepted its license and says who they are",
        cure="on the build host: accept the license on the model's page, set HF_TOKEN, build again; the device needs "
        "neither, its bundle carries the weights",
        source=f"{_HUB}xorbitsai/inference/issues/1734",
        explains=("hub-unreachable",),
    ),
    Rule(
        id="hub-unreachable",
        symptom="`We couldn't connect to 'https://huggingface.co'`, `is not a local folder and is not a valid model "
        "identifier`",
        patterns=_any(
            r"We couldn't connect to 'https://huggingface\.co'",
            r"(?:host='huggingface\.co'|https://huggingface\.co/\S{1,200}).{0,80}(?:Max retries exceeded|timed out)",
            r"is not a local folder and is not a valid model identifier",
            r"cannot find the (?:requested files|appropriate snapshot folder)",
            r"(?i)offline mode is enabled",
        ),
        cause="the model was asked of the Hugging Face Hub: the name that was given is no folder here, and the Hub "
        "does not answer or does not have it",
        cure="name a folder that holds the model (its config.json in it), through the mount in a container; a bundle "
        "carries its model and asks nobody (HF_HUB_OFFLINE=1). On the build host `edgepack build --model FOLDER`, or "
        "HF_ENDPOINT for a mirror",
        source="https://huggingface.co/docs/transformers/installation",
    ),
    # files
    Rule(
        id="gguf-damaged",
        symptom="llama.cpp: `data is not within the file bounds`, `invalid magic characters`",
        patterns=_any(
            r"data is not within the file bounds, model is corrupted or incomplete",
            r"invalid magic (?:characters|number)|unknown \(magic, version\) combination",
            r"gguf_init\w*: failed to read (?:magic|key-value|tensor)",
        ),
        cause="the model file is cut off or is no GGUF: a copy or a download that broke, or a file of the format "
        "before GGUF (`ggml` in its name)",
        cure="copy it again; `edgepack inspect BUNDLE` verifies every byte before it goes to the device, and "
        "`sha256sum` on the device must say what the manifest does",
        source=f"{_LLAMA}pull/6885",
    ),
    Rule(
        id="gguf-too-new",
        symptom="llama.cpp: `this GGUF file is version …`",
        patterns=_any(
            r"this GGUF file is version (?P<file>\d+) but this software only supports up to version (?P<reads>\d+)"
        ),
        values=_gguf_version,
        cause="the file has GGUF version {file}, this llama.cpp reads up to {reads} (or the file is damaged)",
        cure="a newer llama-server: `edgepack toolchain install`, or `edgepack build --with-runtime`, which "
        "carries the one that wrote it",
        source="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
    ),
    Rule(
        id="unknown-architecture",
        symptom="`unknown model architecture`, `unknown pre-tokenizer type`",
        patterns=_any(
            r"unknown model architecture: '(?P<name>[^']*)'",
            r"unknown pre-tokenizer type: '(?P<name>[^']*)'",
            r"has invalid ggml (?P<name>type \d+)",
            r"Unknown (?P<name>quantization method:? *'?[\w-]+)",
            r"Unrecognized configuration class <class '(?P<name>[\w.]+)'",
            r"`(?P<name>rope_scaling)` must be a dictionary with",
            r"(?P<name>Tokenizer class \w+) does not exist or is not currently imported",
            r"[Uu]nsupported model_type(?: in config\.json)?:? *'?(?P<name>[\w.-]+)",
            r"has model type `(?P<name>[^`]+)` but Transformers does not recognize this architecture",
            r"Model architectures \['(?P<name>\w+)'.*?\] are not supported",
        ),
        values=lambda found, log: {"name": found["name"] or "no name at all: it is no language model"},
        cause="the runtime is older than the model, or never knew it: {name}",
        cure="a newer runtime (`edgepack toolchain install`; `pip install -U` of vLLM or transformers on the "
        "device), or a model that the planned one knows: `edgepack plan --profile P`",
        source=f"{_LLAMA}issues/12021",
    ),
    Rule(
        id="onnx-too-new",
        symptom="ONNX Runtime: `Unsupported model IR version: 10, max supported IR version: 9`",
        patterns=_any(
            r"Unsupported model IR version: (?P<file>\d+), max supported IR version: (?P<reads>\d+)",
            r"Opset (?P<file>\d+) is under development and support for this is limited.*? till opset (?P<reads>\d+)",
        ),
        cause="the model was written by a newer ONNX ({file}) than this ONNX Runtime reads ({reads})",
        cure="a newer ONNX Runtime: `sh start.sh install` takes the versions that the bundle was built with; by hand "
        "`pip install -U onnxruntime onnxruntime-genai`",
        source=f"{_HUB}microsoft/onnxruntime/issues/20559",
    ),
    Rule(
        id="onnx-config-unknown",
        symptom="ONNX Runtime GenAI: `Error encountered while parsing … genai_config.json`",
        patterns=_any(r"Error encountered while parsing '(?P<path>[^']+)' JSON Error: (?P<why>.+)"),
        cause="this ONNX Runtime GenAI does not read {path} ({why}): another version wrote it, or it was edited",
        cure="the version that the bundle was built with (`sh start.sh install`), or build again with the one there is",
        source=f"{_GENAI}issues/971",
    ),
    Rule(
        id="tokenizer-too-new",
        symptom="`data did not match any variant of untagged enum`",
        patterns=_any(r"data did not match any variant of untagged enum (?P<part>\w+)"),
        cause="tokenizer.json was written by a newer tokenizers than the one that reads it ({part}), or is damaged",
        cure="`pip install -U tokenizers transformers`, or the bundle's own environment (`sh start.sh install`), whose "
        "versions read it",
        source=f"{_HUB}huggingface/transformers/issues/31789",
    ),
    Rule(
        id="tensors-differ",
        symptom="llama.cpp: `wrong number of tensors`, `has wrong shape`, `tensor … not found`",
        patterns=_any(
            r"wrong number of tensors; expected (?P<expected>\d+), got (?P<got>\d+)",
            r"key not found in model: \S+",
            r"Error\(s\) in loading state_dict|size mismatch for \S+: copying a param",
            r"KeyError: '(?:model|lm_head|layers?|transformer|language_model)\.[\w.]+'",
            r"There is no module or parameter named '?\S+ in \w+",
            r"cannot find tokenizer (?:merges|vocab|scores) in model file",
            r"tensor '(?P<name>[^']+)' has wrong shape",
            r"error loading model: (?:create_tensor: )?(?:missing )?tensor '(?P<name>[^']+)'(?: not found|$)",
        ),
        values=lambda found, log: {},
        cause="the file was converted by another version than the one that reads it, or for another model",
        cure="convert it again with this edgepack (`edgepack quantize`, `edgepack build`), which holds every "
        "tensor against the architecture, and run it with the server it was planned with",
        source=f"{_LLAMA}issues/7157",
    ),
    Rule(
        id="model-file-missing",
        symptom="llama.cpp: `failed to open GGUF file`",
        patterns=_any(
            r"failed to open GGUF file '(?P<path>[^']*)'(?: \((?P<why>[^)]*)\))?",
            r"failed to open (?:model )?(?P<path>\S+): (?P<why>[A-Z][^\n.]+)",
        ),
        values=lambda found, log: {
            "path": found["path"],
            "why": found["why"] or "it is not there, or may not be read",
            "_small": ": a 32-bit system opens no file of 2 GiB, install the 64-bit one"
            if "too large" in (found["why"] or "")
            else "",
        },
        cause="{path} cannot be opened: {why}{_small}",
        cure="unpack the bundle on the device (`edgepack unpack BUNDLE FOLDER`) and start it with `sh "
        "start.sh`, which names the file; the user of the server must be able to read it, in a container "
        "through the mount",
        source=_SERVER_README,
    ),
    Rule(
        id="checkpoint-incomplete",
        symptom="`SafetensorError: … incomplete metadata`, `Error no file named model.safetensors`, `Could not find "
        "the quantized model`, no quantize_config.json",
        patterns=_any(
            r"SafetensorError: .*",
            r"Error no file named (?:model\.safetensors|pytorch_model\.bin)",
            r"does not appear to have a file named \S+",
            r"Cannot find the config file for \w+",
            r"Should have a `model_type` key in its config\.json",
            r"No such file or directory: '[^']*quantize_config\.json'",
            r"Could not find (?:the quantized model|(?:a )?model(?: file)?) (?:in|at) .*",
            r"Cannot find any model weights with ",
        ),
        cause="the checkpoint's folder is not whole: a file is missing or cut off, as after a download or copy "
        "that broke, or a GPTQ folder without its configuration",
        cure="copy the folder again; a bundle is verified byte for byte (`edgepack inspect BUNDLE`), and "
        "`edgepack quantize` writes a GPTQ folder whole or not at all",
        source=f"{_HUB}QwenLM/Qwen3-VL/issues/492",
    ),
    Rule(
        id="onnx-incomplete",
        symptom="ONNX Runtime: `Protobuf parsing failed`, `Error opening … genai_config.json`",
        patterns=_any(
            r"Load model from \S+ failed:\s*Protobuf parsing failed",
            r"External initializer: .*(?:out of bounds|exceed)",
            r"Error opening \S*genai_config\.json",
        ),
        cause="the model's folder is not whole: model.onnx, model.onnx.data and genai_config.json belong "
        "together",
        cure="copy the folder again; a bundle is verified byte for byte (`edgepack inspect BUNDLE`)",
        source=f"{_GENAI}issues/971",
    ),
    Rule(
        id="tokenizer-missing",
        symptom="`Couldn't instantiate the backend tokenizer`, `Invalid file: …/tokenizer.json`",
        patterns=_any(
            r"Couldn't instantiate the backend tokenizer",
            r"Can't load tokenizer for '",
            r"Invalid file: \S*tokenizer\.json",
            r"cannot find tokenizer (?:vocab|merges) in model file",
        ),
        cause="the model has no tokenizer files",
        cure="tokenizer.json and tokenizer_config.json go into the model's folder; `edgepack build` refuses a "
        "model without them, so build from the whole checkpoint",
        source="https://huggingface.co/docs/transformers/main/en/fast_tokenizers",
    ),
    Rule(
        id="chat-template-missing",
        symptom="`default chat template is no longer allowed`, `tokenizer.chat_template is not set`",
        patterns=_any(
            r"default chat template is no longer allowed",
            r"Cannot use chat template functions because tokenizer\.chat_template is not set",
        ),
        cause="the model has no chat template: it is a base model, or its template was left behind",
        cure="ask /v1/completions, take the model's -Instruct sibling, or put its chat_template into "
        "tokenizer_config.json before the build; edgepack's own server then answers chats with a plain "
        "template, which it says in /v1/models",
        source=f"{_VLLM}issues/29849",
    ),
    Rule(
        id="onnx-fp16-on-cpu",
        symptom="ONNX Runtime: `Shape mismatch attempting to re-use buffer`",
        patterns=_any(r"Shape mismatch attempting to re-use buffer"),
        cause="an fp16 model runs on the CPU, for which ONNX Runtime GenAI builds it without complaint and "
        "cannot run it",
        cure="`edgepack build --runtime onnx-genai --scheme onnx-int4` (or onnx-int8); `onnx-fp16` is for CUDA "
        "only, and edgepack refuses the pair",
        source=f"{_GENAI}issues/2009",
        certainty="likely",
    ),
    Rule(
        id="onnx-max-length",
        symptom="ONNX Runtime GenAI: `max_length (…) cannot be greater than model context_length`",
        patterns=_any(
            r"max_length \((?P<asked>\d+)\) cannot be greater than model context_length \((?P<holds>\d+)\)"
        ),
        cause="{asked} tokens are asked for and the model holds {holds}",
        cure="`edgepack build --runtime onnx-genai … --context {holds}` at most; the server then clamps each "
        "request to it",
        source=f"{_GENAI}issues/1425",
    ),
    # requests
    Rule(
        id="port-in-use",
        symptom="`couldn't bind HTTP server socket`, `address already in use`",
        patterns=_any(
            r"couldn't bind HTTP server socket, hostname: (?P<host>\S+), port: (?P<port>\d+)",
            r"(?i)address already in use",
            r"\"event\": \"cannot_listen\", .*?\"port\": (?P<port>\d+)",
        ),
        values=lambda found, log: {"port": found.groupdict().get("port") or "PORT"},
        cause="another program listens on the port already",
        cure="`ss -ltnp 'sport = :{port}'` names it; stop it, or start with EDGEPACK_PORT=OTHER",
        source=f"{_VLLM}issues/7514",
        explains=("unit-failed",),
    ),
    Rule(
        id="api-key-refused",
        client=True,
        symptom="401: `Invalid API Key`, `Unauthorized`",
        patterns=_any(
            r"(?i)unauthorized: invalid api key",
            r"\"Invalid API Key\"",
            r"HTTP/1\.\d\" 401\b",
            r"\"refused\": \"key\"",
        ),
        cause="a client sent no API key, or not the server's",
        cure="`sh start.sh key` says where the key is; send it as `Authorization: Bearer KEY`",
        source=_SERVER_README,
    ),
    Rule(
        id="context-exceeded",
        client=True,
        symptom="400: `exceeds the available context size`, `maximum context length is …`",
        patterns=_any(
            r"request \((?P<asked>\d+) tokens\) exceeds the available context size \((?P<holds>\d+) tokens\)",
            r"the request exceeds the available context size",
            r"maximum context length is (?P<holds>\d+) tokens\. However, you requested (?P<asked>\d+) tokens",
            r"max_tokens=(?P<asked>\d+) cannot be greater than max_model_len=(?P<holds>\d+)",
            r"input_ids size \((?P<asked>\d+)\) \+ current sequence length \(\d+\) exceeds max length "
            r"\((?P<holds>\d+)\)",
            r"= (?P<asked>\d+) tokens; a slot holds (?P<holds>\d+)",
            r"\"refused\": \"context\"",
        ),
        values=_exceeded,
        cause="{told}",
        cure="ask for fewer `max_tokens`, or shorten the conversation in the client; more room: `edgepack "
        "build … --context N` (all slots together) or fewer `--slots`",
        source=f"{_LLAMA}pull/15780",
    ),
    Rule(
        id="queue-full",
        client=True,
        symptom="429 (vLLM: 503, `The engine is currently busy`): the queue is full",
        patterns=_any(r"HTTP/1\.\d\" 429\b", r"\"refused\": \"queue_full\"", r"wait: the queue is full"),
        cause="more requests came than run and wait at the same time; nothing is wrong with the server",
        cure="clients wait as long as Retry-After says (vLLM sends none: some seconds) and ask again; for more "
        "at a time `edgepack build … --slots N`, as far as the KV cache fits",
        source=f"{_VLLM}pull/49445",
    ),
    # disk
    Rule(
        id="disk-full",
        symptom="`No space left on device`",
        patterns=_any(
            r"(?i)no space left on device",
            r"Disk quota exceeded",
            r"machine: (?P<needed>\d+) bytes of disk are needed and (?P<free>\d+) are free",
        ),
        values=lambda found, log: {
            "_told": f": {show(int(found['needed']))} are needed and {show(int(found['free']))} are free"
            if found.re.groupindex
            else ""
        },
        cause="the disk (or the container's /dev/shm or /tmp) is full{_told}",
        cure="`df -h` and `docker system df` say where; `docker system prune`, or EDGEPACK_CACHE on another "
        "disk; in a container `--shm-size 1g` or a larger `--tmpfs`",
        source=f"{_HUB}NVIDIA/Megatron-LM/issues/878",
    ),
    Rule(
        id="disk-read-only",
        symptom="`Read-only file system`",
        patterns=_any(r"(?i)read-only file system(?:: '(?P<path>[^']+)')?"),
        values=lambda found, log: {"_path": f" ({found['path']})" if found["path"] else ""},
        cause="something is written where nothing may be{_path}: a container with a read-only root, or a file "
        "system that the kernel made read-only after errors",
        cure="in a container give caches a place: `HF_HOME=/tmp`, `XDG_CACHE_HOME=/tmp`, `--tmpfs /tmp`; on "
        "the host `dmesg | grep -i 'remount.*read-only'` means that the card or disk is failing",
        source=f"{_HUB}OHF-Voice/wyoming-faster-whisper/issues/27",
    ),
    # answers
    Rule(
        id="logits-nan",
        symptom="`probability tensor contains either inf, nan or element < 0`; `found -nan`",
        patterns=_any(
            r"probability tensor contains either .?inf.?, .?nan.? or element < 0",
            r"\bfound -?nan for\b",
        ),
        cause="the logits are NaN: fp16 overflows in this model's activations, a quantized kernel is wrong on "
        "this GPU, or the weights are damaged",
        cure="`edgepack quality ARTIFACT` on the build host says whether the weights are good; if so serve "
        "with bf16, another `--scheme` (gptq-int4-g128 instead of awq-int4-g128), or `-fa off` to find "
        "the kernel",
        source=f"{_HUB}QwenLM/Qwen3/issues/522",
        certainty="likely",
    ),
    Rule(
        id="context-beyond-training",
        symptom="llama.cpp: `possible training context overflow`; answers fall apart when they get long",
        patterns=_any(
            r"n_ctx(?:_seq|_per_seq)? \((?P<asked>\d+)\) > n_ctx_train \((?P<trained>\d+)\) -- possible training "
            r"context overflow",
            r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
            r"\(\w+=(?P<trained>\d+)",
        ),
        cause="a slot of {asked} tokens is longer than what the model was trained on ({trained})",
        cure="`edgepack build … --context {trained}` for each slot at most, which edgepack's plans keep to",
        source=f"{_LLAMA}issues/18070",
        certainty="likely",
    ),
    Rule(
        id="tokenizer-guessed",
        symptom="llama.cpp: `GENERATION QUALITY WILL BE DEGRADED`",
        patterns=_any(
            r"missing pre-tokenizer type, using: 'default'", r"GENERATION QUALITY WILL BE DEGRADED"
        ),
        cause="the GGUF does not say how its text is split, so another splitting than the model's is used",
        cure="convert it again from the checkpoint: `edgepack build --model FOLDER`, which writes "
        "tokenizer.ggml.pre",
        source=f"{_HUB}ollama/ollama/issues/4126",
    ),
    Rule(
        id="template-twice",
        symptom="llama.cpp: `the final prompt starts with 2 BOS tokens`",
        patterns=_any(r"the prompt also starts with a BOS token", r"Detected duplicate leading \"<"),
        cause="the chat template writes the begin token and the tokenizer adds it again",
        cure="send messages to /v1/chat/completions and let the server render them; who pastes the template by "
        "hand leaves its begin token out",
        source=f"{_HUB}deepseek-ai/DeepSeek-Coder-V2/issues/50",
    ),
    Rule(
        id="answers-differ",
        symptom="the check: quality: the answers are not those recorded at build; garbage",
        patterns=_any(
            r"check: item quality: fail: .*measured (?P<measured>.+?)(?:: the answers|$)",
            r"failed its test: its answers are not those recorded at build: (?P<measured>.+)",
        ),
        cause="the server computes something else than the build did ({measured}): other weights, damaged ones, "
        "or a kernel that is wrong for this quantization on this device",
        cure="`edgepack inspect BUNDLE` on the device verifies the weights; then run the server that was "
        "planned with (row `server`), with `-fa off`, and without the GPU (`--gpu-layers 0`): what makes "
        "it right is the fault",
        source=f"{_LLAMA}issues/3750",
        explains=("rolled-back",),
    ),
    # speed
    Rule(
        id="throttled",
        symptom="`soctherm: OC ALARM`, `Under-voltage detected`, `throttled`",
        patterns=_any(
            r"soctherm: OC ALARM",
            r"(?i)system throttled due to over-?current",
            r"(?i)under-?voltage detected",
            r"throttled=0x(?!0\b)[0-9a-fA-F]+",
            r"cpu clock throttled",
            r"SW Thermal Slowdown\s*: Active",
        ),
        cause="the device slows down to protect itself: too little power, or too much heat",
        cure="a power supply of the board's rating (Pi 5: 5 V 5 A), a heat sink and fan; a Jetson: `sudo "
        "nvpmodel -q` says the mode, choose one by name that the supply carries and plan with "
        "`--power-mode NAME`",
        source=f"{_HUB}OE4T/meta-tegra/issues/538",
        explains=("slow-decode",),
    ),
    Rule(
        id="too-many-threads",
        symptom="llama.cpp: `n_threads = 64 … / 2`, and slow",
        patterns=_any(r"n_threads = (?P<threads>\d+) \(n_threads_batch = \d+\) / (?P<cores>\d+)"),
        values=_threads,
        cause="{threads} threads wait for each other on {cores} cores",
        cure="`--threads {cores}` at most, and one less where something else runs; the bundle's flags have the "
        "profile's cores",
        source=f"{_LLAMA}issues/9881",
        certainty="likely",
        explains=("slow-decode",),
    ),
    Rule(
        id="kv-cache-off",
        symptom="`Setting use_cache=False`: each token reads the whole text again",
        patterns=_any(r"[Ss]etting .?use_cache=False", r"\"use_cache\": false"),
        cause="the KV cache is off, as training leaves it (gradient checkpointing)",
        cure='`"use_cache": true` in config.json and generation_config.json of the checkpoint, then build '
        "again; edgepack's server always uses it, and the check's row `second turn` shows that it works",
        source=f"{_HUB}huggingface/trl/pull/3891",
        certainty="likely",
    ),
    Rule(
        id="turn-not-reused",
        symptom="the check: second turn: every turn reads the whole conversation again",
        patterns=_any(r"check: item second turn: (?:warn|fail)"),
        cause="the server does not use the first turn's KV cache again: a model with recurrent state, a "
        "template that rewrites earlier turns, or `cache_prompt` off",
        cure="send the conversation unchanged, each turn behind the earlier ones, leave `cache_prompt` on, and "
        "one slot for each user: `edgepack build … --slots N`",
        source=f"{_LLAMA}pull/16391",
        certainty="likely",
    ),
    Rule(
        id="slow-decode",
        symptom="the check: decode slower than planned",
        patterns=_any(
            r"check: item decode: (?:fail|warn): expected (?P<expected>[\d.]+ tok/s).*?measured "
            r"(?P<measured>[\d.]+ tok/s)(?!.*not judged)"
        ),
        cause="{measured} were measured, {expected} planned: another power mode, heat, other programs, or no "
        "GPU",
        cure="a Jetson: `sudo nvpmodel -q` (plan with `--power-mode NAME`), `sudo jetson_clocks`, `tegrastats` "
        "for heat; a Pi: `vcgencmd get_throttled` must be 0x0; `uptime` for the load; then `edgepack "
        "calibrate` fits the plan to the device",
        source=f"{_JETSON}issues/532",
        certainty="likely",
    ),
    Rule(
        id="context-not-held",
        symptom="the check: slots or context filled: fewer tokens than planned",
        patterns=_any(
            r"check: item (?P<item>slots|context filled): fail: expected (?P<expected>.+), measured (?P<measured>.+)",
            r"failed its test: it has (?P<measured>slots of .+ tokens), the plan says (?P<expected>.+)",
            r"failed its test: of (?P<expected>\d+ tokens) the context held (?P<measured>.+)",
        ),
        cause="the server holds {measured} instead of {expected}: it was started with other flags, or lowered "
        "them itself (`--fit on`)",
        cure="start it with the bundle's flags (`sh start.sh`), `--fit off` among them",
        source=f"{_LLAMA}issues/18889",
        explains=("rolled-back",),
    ),
    Rule(
        id="program-fault",
        symptom="`GGML_ASSERT(…) failed`, `Assertion '…' failed`, `Segmentation fault`",
        patterns=_any(
            r"(?<![\w.-])(?P<what>[\w.-]{1,99}:\d{1,6}: GGML_ASSERT)\(",
            r"GGML_ASSERT: \S*?(?P<what>[\w.-]+:\d+):",
            r"(?P<what>Assertion [`'].+' failed)",
            r"(?P<what>Assertion failed: [^(\n]+)",
            r"(?i)(?P<what>segmentation fault|SIGSEGV|signal: segmentation)",
            r"Main process exited, code=(?:killed|dumped), (?P<what>status=(?:6/ABRT|7/BUS|8/FPE|11/SEGV|31/SYS))",
        ),
        cause="the program itself failed ({what}): a fault in it for this model, quantization, flags or device, "
        "libraries of another version than its own, or a model file that another version wrote",
        cure="run the server that the bundle was planned with (`edgepack build --with-runtime`, `sh start.sh install`) "
        "with the bundle's own flags; if it was, search its issues for the line, and find what it takes: llama.cpp "
        "with `-fa off`, `--gpu-layers 0`, a cache of f16; vLLM with `--enforce-eager`",
        source=f"{_LLAMA}issues/20587",
        certainty="likely",
        explains=("unit-failed",),
    ),
    Rule(
        id="buffers-differ",
        symptom="the check: weights, kv_cache, compute or output differ from the plan",
        patterns=_any(
            r"check: item (?P<item>weights|kv_cache|recurrent_state|compute|output): fail: expected (?P<expected>.+?), "
            r"measured (?P<measured>.+?)(?:: |$)"
        ),
        cause="{item} is {measured}, planned were {expected}: another llama.cpp than the planned one, other "
        "flags, or an error of edgepack's",
        cure="row `server` of the check names both versions: run the planned one (`edgepack toolchain "
        "install`, or a bundle `--with-runtime`); if they are the same, report it with `edgepack check "
        "--json`",
        source=f"{_LLAMA}pull/23861",
        certainty="likely",
        explains=("check-peak",),
    ),
    Rule(
        id="server-ended",
        symptom="the check: `did-not-start`, `crashed`, `timeout`",
        patterns=_any(
            r"(?:check: |failed its test: )(?P<kind>did-not-start|crashed|timeout) (?:during |\()(?P<stage>\w+)\)?: "
            r"(?P<message>.+)"
        ),
        cause="the server did not carry the bundle ({kind} during {stage}): {message}",
        cure="`sh start.sh` on the device shows its whole log; give that to `edgepack doctor`",
        source=_SERVER_README,
        certainty="likely",
        explains=("rolled-back",),
    ),
    # what a device's own journal says
    Rule(
        id="release-damaged",
        symptom="`edgepack flash --status`: `DAMAGED: --fsck`; a release on the device is not whole",
        patterns=_any(r"release (?P<release>[0-9a-f]{12}) is not whole there"),
        cause="files of release {release} were lost on the device's disk, or have other bytes than were signed",
        cure="`edgepack flash --fsck BUNDLE HOST` has every byte read again and sends what is missing; a disk that "
        "does it again is failing (on the device `dmesg | grep -i 'i/o error'`)",
        source=f"{_HUB}raspberrypi/firmware/issues/601",
        explains=("rolled-back",),
    ),
    Rule(
        id="unit-failed",
        symptom="systemd: `edgepack.service: Failed with result 'exit-code'`, `Start request repeated too quickly`",
        patterns=_any(
            r"edgepack\.service: Failed with result '(?P<result>(?!oom-kill)[\w-]+)'",
            r"edgepack\.service: (?P<result>Start request repeated too quickly)",
        ),
        cause="the service ended by itself ({result}), and no later line says that it is up again",
        cure="the lines before it say why (`journalctl -u edgepack`, or `--user-unit`); on the device `sh start.sh` in "
        "the release's folder shows a start as it is. `edgepack flash --rollback HOST` runs the release before",
        source="https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html",
        certainty="likely",
        recovered=re.compile(r"Started (?:edgepack|.*language model)"),
    ),
    Rule(
        id="rolled-back",
        symptom="`edgepack flash`: `ROLLED BACK`; the device went back to the release before",
        patterns=_any(
            r"went back from release (?P<release>[0-9a-f]{12}) to (?:release )?(?P<back>\w+)(?:: (?P<why>.+))?"
        ),
        values=_gone_back,
        cause="release {release} was not good on the device{_why}; {back}",
        cure="what comes before this says why, where it is known; `edgepack check BUNDLE --on HOST` tests the release "
        "again without switching to it, and `edgepack flash BUNDLE HOST` takes a better one, with a higher "
        "`--release-sequence`",
        source="https://docs.balena.io/reference/os/updates/rollbacks",
    ),
    # what no log shows: rows of the article's table
    Rule(
        id="long-dialogue-slow",
        symptom="long conversations get slow",
        patterns=(),
        cause="the prompt is computed in pieces that are too small, or not kept between turns, or the KV cache "
        "is read slowly because it is long",
        cure="a larger `--ubatch` (512 to 1024) for long prompts, one slot for each user (`--slots`), "
        "the conversation sent unchanged; `edgepack check` measures the second turn with and without the "
        "cache",
        source="https://docs.vllm.ai/en/latest/configuration/optimization/",
    ),
    Rule(
        id="quantized-too-lossy",
        symptom="a quantized model answers worse than it should; `is above the limit of`",
        patterns=_any(r"(?:perplexity|KL).* is above the limit of "),
        cause="the scheme loses too much for this model: too few bits, too large groups, or calibrated on other "
        "text",
        cure="`edgepack quantize --preset article-better` (groups of 64 and act order: "
        "gptq-int4-g64-actorder), an 8-bit scheme (gptq-int8-g128, Q8_0), or `--calibration` of what it "
        "will be asked",
        source=f"{_HUB}ModelCloud/GPTQModel",
    ),
    Rule(
        id="distill-slow",
        symptom="distilling takes too long, or runs out of memory",
        patterns=(),
        cause="the teacher is run at every step, or the batch does not fill the machine",
        cure="leave `--online` out, so that the teacher is run once; a recipe's `micro` and `recompute: true` "
        "(gradient checkpointing) for memory, a larger `--batch` for speed, a shorter `--length`",
        source="https://huggingface.co/docs/transformers/perf_train_gpu_one",
    ),
    Rule(
        id="student-weak",
        symptom="a student stays far behind its teacher",
        patterns=(),
        cause="too little data, too few steps, a start that is cut instead of a sibling, or too little weight "
        "on the teacher",
        cure="a pre-trained sibling (`--student`) before anything cut, more `--data` of the domain, more "
        "`--steps`, a smaller `--alpha` (the teacher has the rest)",
        source="https://arxiv.org/abs/2407.14679",
    ),
    Rule(
        id="lora-too-large",
        symptom="LoRA trains too many parameters",
        patterns=(),
        cause="the rank is high and all seven matrices of each layer are trained",
        cure="`edgepack distill --lora 16` (parameters are linear in the rank); it is for siblings: it cannot "
        "heal a student that was cut",
        source="https://arxiv.org/abs/2106.09685",
    ),
)
"""In the order of causation: of two that hold, the earlier one may explain the later."""
