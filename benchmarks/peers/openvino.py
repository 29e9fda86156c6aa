"""OpenVINO GenAI's continuous batching, in process; the model is converted by optimum-intel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from benchmarks.peers.peer import TORCH, About, call, make_environment, once
from benchmarks.peers.transformers import InProcessPeer
from benchmarks.processes import InProcess

VERSION = "2026.4.1.0"
PACKAGES = (f"openvino-genai=={VERSION}", "optimum-intel==2.2.0", "nncf==3.4.0")


class OpenVino(InProcessPeer):
    title = "OpenVINO GenAI"
    weights: ClassVar[str]  # as optimum-cli's --weight-format

    @property
    def model(self) -> Path:
        return self.home / f"{self.setting.checkpoint.name}-{self.weights}"

    def install(self) -> None:
        once(self.home, f"install-{VERSION}", self._install)
        checkpoint = self.setting.checkpoint
        command = [self.home / "venv" / "bin" / "optimum-cli", "export", "openvino", "-m", checkpoint]
        command = [*command, "--task", "text-generation-with-past", "--weight-format", self.weights]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        once(
            self.home,
            f"weights-{checkpoint.name}-{self.weights}",
            lambda log: call([*command, self.model], log=log, env=offline),
        )

    def _install(self, log: Path) -> None:
        # Torch is for the conversion alone; whichever version the converter then asks for is right.
        make_environment(self.home, log, [TORCH], PACKAGES)

    def start(self) -> None:
        script = Path(__file__).with_name("openvino_child.py")
        python = self.home / "venv" / "bin" / "python"
        # -P: this folder holds modules named like the packages that the script imports.
        command = [str(python), "-P", str(script), str(self.model), "--threads", str(self.setting.threads)]
        self._process = InProcess(command, what=self.title)
        self.start_seconds = self._process.start_seconds
        said = dict(self._process.about)
        self.about = About(
            {"openvino-genai": said.pop("version")}, f"{self.weights} weights; {said['settings']}"
        )


class Int8(OpenVino):
    name = "openvino-int8"
    precision = "int8"
    weights = "int8"


class Int4(OpenVino):
    name = "openvino-int4"
    precision = "int4"
    weights = "int4"


class Bfloat16(OpenVino):
    """Half-precision weights, and bfloat16 arithmetic: what it chooses on a processor that has it."""

    name = "openvino-bf16"
    precision = "bf16"
    weights = "fp16"
