"""How long streams wait when what is served changes: the steps of a full batch while an adapter is loaded
and the weights are replaced, and the moment at which steps stand still.

    python -m benchmarks.changes [--model smollm2] [--batch 8] [--rank 8] [--kernels torch|native]

The engine of the server in this process, without a front: a random adapter of every linear layer (torch
alone), and the model's own weights again.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, it is no package's module

import torch
from safetensors.torch import save_file

from benchmarks.checkpoint import checkpoint_of, default_cache_dir
from salver.model.kernels.build import find_or_build
from salver.model.weights import open_weights
from salver.server.engine.changes import (
    AdapterSource,
    ApplyWeights,
    Change,
    Changed,
    LoadAdapter,
    StageWeights,
)
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore
from salver.server.engine.encoder_startup import start_any_engine
from salver.server.engine.request import EngineRequest, SamplingParams, StoppingParams
from salver.server.engine.status_page import StatusPage
from salver.server.engine.updates import Updates

_ADAPTED = re.compile(r"(model\.layers\.\d+\..*_proj)\.weight")
STEPS = 30


def write_adapter(checkpoint: Path, directory: Path, rank: int) -> None:
    """A random adapter of every linear layer of a Llama-shaped checkpoint."""
    tensors = {}
    for name, file in open_weights(checkpoint).items():
        if match := _ADAPTED.fullmatch(name):
            out, width = file.read(name).shape
            prefix = f"base_model.model.{match[1]}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, width) / width**0.5
            tensors[f"{prefix}.lora_B.weight"] = 0.01 * torch.randn(out, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}}}'
    )


class Running:
    """An engine whose batch decodes; steps are timed."""

    def __init__(self, checkpoint: Path, batch: int, kernels: str) -> None:
        dtype, library = "float32", ""
        if kernels == "native":
            dtype, library = "bfloat16", str(find_or_build(default_cache_dir()))
        config = EngineConfig(
            str(checkpoint), device="cpu", dtype=dtype, kernels=kernels, kernel_library=library,
            max_num_seqs=batch, max_model_len=4096, kv_cache_memory=1 << 30, weights_digest="first",
            more_adapters=kernels == "torch",
        )  # fmt: skip
        core, ready = start_any_engine(config, StatusPage.create(), [], time.perf_counter())
        self.core: EngineCore = core
        self.updates = Updates(core, config, ready)
        for number in range(batch):
            prompt = tuple(range(100 + number, 132 + number))
            core.add(EngineRequest(number, prompt, SamplingParams(temperature=0.0), StoppingParams(4000)))
        for _ in range(4):
            core.step()

    def step(self) -> float:
        begin = time.perf_counter()
        self.core.step()
        return time.perf_counter() - begin

    def change(self, what: str, *changes: Change) -> None:
        """Makes them while it steps, and prints what that did to the steps."""
        usual = statistics.median(self.step() for _ in range(STEPS))
        begin = time.perf_counter()
        for change in changes:
            self.updates.begin(change)
        steps, done = list[float](), list[Changed]()
        while len(done) < len(changes):
            steps.append(self.step())
            if (changed := self.updates.finish()) is not None:
                done.append(changed)
        seconds = time.perf_counter() - begin
        refused = [changed.message for changed in done if changed.refusal is not None]
        assert not refused, refused
        print(
            f"{what}: {seconds:.2f} s beside {len(steps)} steps of {statistics.median(steps) * 1000:.1f} ms "
            f"(longest {max(steps) * 1000:.1f}; {usual * 1000:.1f} without), "
            f"pause {max(changed.pause for changed in done) * 1000:.2f} ms"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--kernels", choices=("torch", "native"), default="torch")
    options = parser.parse_args()
    dtype = "float32" if options.kernels == "torch" else "bfloat16"
    checkpoint = checkpoint_of(options.model, dtype, options.cache_dir)
    running = Running(checkpoint, options.batch, options.kernels)
    with tempfile.TemporaryDirectory() as directory:  # new weights read the adapters anew
        if options.kernels == "torch":
            write_adapter(checkpoint, Path(directory), options.rank)
            running.change(
                f"an adapter of rank {options.rank}", LoadAdapter(1, AdapterSource("a@1", directory))
            )
        running.change("the weights", StageWeights(2, str(checkpoint), "second"), ApplyWeights(3, 2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
