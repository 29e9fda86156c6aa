"""`transformers.generate` on static batches: benchmarks/baseline.py, in the benchmark's own environment."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import BenchError, Trace
from benchmarks.peers.peer import About, Peer
from benchmarks.processes import Baseline, InProcess
from benchmarks.workload import BenchRequest


class InProcessPeer(Peer):
    """A peer whose process is ours and calls it in process."""

    way = "in process"
    _process: InProcess | None = None

    def run(self, requests: Sequence[BenchRequest]) -> tuple[list[Trace], float]:
        if self._process is None:
            raise BenchError("it is not running")
        return self._process.run(requests)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


class Bfloat16(InProcessPeer):
    name = "transformers-bf16"
    title = "transformers generate"
    precision = "bf16"

    def install(self) -> None:
        """The benchmark's own environment has it."""

    def start(self) -> None:
        setting = self.setting
        self._process = Baseline(setting.checkpoint, dtype="bfloat16", threads=setting.threads)
        self.start_seconds = self._process.start_seconds
        said = self._process.about
        self.about = About(
            {"transformers": said["transformers"], "torch": said["torch"]},
            f"static batch, {said['attention']} attention, {said['threads']} threads",
        )
