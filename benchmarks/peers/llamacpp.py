"""llama.cpp's own server, built here for this processor from the sources that llama-cpp-python carries."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.figures import BenchError, Trace
from benchmarks.peers.http_server import UNKNOWN_ID, HttpPeer
from benchmarks.peers.peer import About, call, make_environment, once
from benchmarks.workload import BenchRequest

VERSION = "0.3.36"  # of llama-cpp-python
SLOTS = 32
TOOLS = ("llama-server", "llama-quantize", "llama-bench")
# docs/build.md: a release build with GGML_NATIVE uses every instruction set of the machine it runs on.
BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class LlamaCpp(HttpPeer):
    title = "llama.cpp server"
    path = "/completion"
    kind: ClassVar[str]  # the type of its weights, as llama-quantize calls it

    @property
    def weights(self) -> Path:
        source = self.setting.source
        return self.home / f"{source.stem if source else 'none'}.{self.kind}.gguf"

    def install(self) -> None:
        source = self.setting.source
        if source is None:
            raise BenchError("it is given weights made from a GGUF file, and this model has none")
        once(self.home, f"build-{VERSION}", self._build)
        # The checkpoint that Salver serves is this file in bfloat16: so is what llama-quantize makes of it.
        quantize = self.home / "build" / "bin" / "llama-quantize"
        command = [quantize, "--allow-requantize", source, self.weights, self.kind]
        once(self.home, f"weights-{source.stem}-{self.kind}", lambda log: call(command, log=log))

    def _build(self, log: Path) -> None:
        # cmake and ninja come as packages: nothing but a compiler is asked of the machine.
        python = make_environment(self.home, log, ["cmake>=3.28,<5", "ninja"])
        sources = self.home / "src"
        package = f"llama-cpp-python=={VERSION}"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        call([*pip, "--no-binary", "llama-cpp-python", "-d", self.home, package], log=log)
        with tarfile.open(self.home / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(sources, filter="data")
        tree = sources / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
        tools = python.parent
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        call([tools / "cmake", "-S", tree, "-B", self.home / "build", "-G", "Ninja", ninja, *BUILD], log=log)
        call([tools / "cmake", "--build", self.home / "build", "--target", *TOOLS], log=log)

    def command(self, port: int) -> list[str | Path]:
        threads = str(self.setting.threads)
        options = ["-t", threads, "-tb", threads, "-np", str(SLOTS)]
        # Cells of its own for each slot: one pool for all (--kv-unified) was slower here.
        options += [
            "-c",
            str(SLOTS * min(2048, self.setting.max_model_len)),
            "-b",
            "2048",
            "-ub",
            "512",
            "-fa",
            "auto",
        ]
        # Prompts never come twice here: no copies of finished ones are kept.
        options += ["--no-cache-prompt", "--cache-ram", "0", "--no-cache-idle-slots", "--no-webui"]
        self.about = About({"llama.cpp in llama-cpp-python": VERSION}, " ".join(options))
        binary = self.home / "build" / "bin" / "llama-server"
        return [binary, "-m", self.weights, "--host", "127.0.0.1", "--port", str(port), *options]

    def question(self, request: BenchRequest) -> dict[str, Any]:
        return {
            "prompt": list(request.prompt),
            "n_predict": request.max_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }

    def note(self, event: dict[str, Any], moment: float, trace: Trace) -> None:
        """Bytes of an unfinished character are held back: their tokens' ids are lost, not their number."""
        new = event["tokens_predicted"] - len(trace.token_ids)
        if new > 0:
            known = event.get("tokens", [])[-new:]
            trace.token_ids.extend([UNKNOWN_ID] * (new - len(known)) + known)
            trace.arrivals.append((moment, new))


class Bfloat16(LlamaCpp):
    name = "llamacpp-bf16"
    precision = "bf16"
    kind = "BF16"


class Q8(LlamaCpp):
    name = "llamacpp-int8"
    precision = "int8"
    kind = "Q8_0"


class Q4(LlamaCpp):
    """The type that most tensors of the default model's file have: they stay as they are."""

    name = "llamacpp-int4"
    precision = "int4"
    kind = "Q4_1"
