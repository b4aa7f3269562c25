"""Measures what onnxruntime-genai takes on a CPU for a random model, beside what edgepack predicts.

    python scripts/measure_onnx_genai.py HIDDEN FFN LAYERS VOCAB SCHEME PROMPT [tied]

Needs torch, transformers, onnx, onnx_ir and onnxruntime-genai 0.18.0, and a folder to work in (TMPDIR). The child
process that runs the model reports its own memory (VmRSS, VmHWM) after each step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from edgepack import layouts, memory, modelspec
from edgepack.catalog import built_in
from edgepack.runtimes import onnx_genai
from edgepack.units import MIB

CHILD = """
import sys
import onnxruntime_genai as og
def say(what):
    lines = dict(line.split(':', 1) for line in open('/proc/self/status'))
    print(what, *(lines[k].split()[0] for k in ('VmRSS', 'VmHWM', 'RssAnon')))
folder, prompt, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
say('import')
model = og.Model(folder)
say('model')
options = og.GeneratorParams(model)
options.set_search_options(max_length=length, batch_size=1)
generator = og.Generator(model, options)
say('generator')
generator.append_tokens([[5 + i % 1000 for i in range(prompt)]])
for _ in range(8):
    generator.generate_next_token()
say('prompt')
"""
MAKE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Qwen2Config
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(Qwen2Config(**json.loads(sys.argv[1])))
for name, weight in model.named_parameters():
    if name.endswith('bias'):
        torch.nn.init.normal_(weight)
model.to(torch.float32).save_pretrained(sys.argv[2])
"""


def main() -> None:
    hidden, ffn, layers, vocab = (int(word) for word in sys.argv[1:5])
    scheme, prompt = sys.argv[5], int(sys.argv[6])
    config = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": "tied" in sys.argv,
    }
    spec = modelspec.from_config({"model_type": "qwen2", **config}, name="random")
    length = prompt + 16
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, built = Path(folder) / "hf", Path(folder) / "built"
        run("-c", MAKE, json.dumps(config), str(checkpoint))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (checkpoint / name).write_bytes((built_in()["demo"] / name).read_bytes())
        asked = layouts.parse(scheme)
        rounding = "k_quant_mixed" if asked.mixed else "default"
        builder = (
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            "x",
            "-i",
            str(checkpoint),
            "-o",
            str(built),
        )
        options = ("--extra_options", f"block_size={asked.group}", f"algo_config={rounding}")
        run(*builder, "-p", f"int{asked.bits}", "-e", "cpu", "-c", str(Path(folder) / "cache"), *options)
        size = sum(path.stat().st_size for path in built.glob("model.onnx*"))
        steps = run("-c", CHILD, str(built), str(prompt), str(length))
    settings = onnx_genai.settings_for(None, context=length, slots=1, kv_type="f16", ubatch=512)
    estimate = memory.estimate(
        spec,
        scheme,
        replace(settings, kv_type="f32", gpu_layers=0),
        backend="cpu",
        runtime=onnx_genai.NAME,
    )
    print(f"file {size} bytes, predicted {estimate.file_bytes}")
    for line in steps.splitlines():
        what, *figures = line.split()
        rss, peak, own = (int(figure) / 1024 for figure in figures)
        print(f"{what:<10} RSS {rss:7.1f}  peak {peak:7.1f}  of its own {own:7.1f} MiB")
    print(f"predicted  {estimate.total / MIB:.1f} MiB [{estimate.low / MIB:.1f}, {estimate.high / MIB:.1f}]")
    for part in estimate.parts:
        print(f"  {part.name:<12} {part.bytes / MIB:8.1f} [{part.low / MIB:.1f}, {part.high / MIB:.1f}]")


def run(*words: str) -> str:
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
