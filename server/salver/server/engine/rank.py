"""One further rank of a worker: `python -m salver.server.engine.rank`, started by `ranks.RankGroup`."""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
from pathlib import Path

from salver.server.engine.config import EngineConfig
from salver.server.engine.rank_messages import read_message


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m salver.server.engine.rank", description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--store", required=True)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = read_message(sys.stdin.buffer)
    if config is None:
        return 0  # the worker is gone
    assert isinstance(config, EngineConfig)
    _serve(config, arguments.rank, arguments.store)
    return 0


def _serve(config: EngineConfig, rank: int, store: str) -> None:
    import torch

    from salver.model.errors import CheckpointError
    from salver.model.loader import load_model
    from salver.model.numerics import default_dtype
    from salver.server.engine.ranks import Command, Follower, join
    from salver.server.engine.startup import DTYPES, find_device, use_threads

    device = find_device(config)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    use_threads(config)
    dtype = default_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def read() -> None:
        """In a thread: a rank that waits for the others in a product still sees that the worker is gone."""
        while (message := read_message(sys.stdin.buffer)) is not None:
            commands.put(message)
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="commands").start()
    ranks = join(rank, config.tensor_parallel_size, store, device)
    try:
        model = load_model(
            Path(config.checkpoint), device=device, dtype=dtype, numerics=config.numerics, ranks=ranks
        )
    except CheckpointError:
        threading.Event().wait()  # rank 0 meets the same error and tells it; then this process ends
        raise
    follower = Follower(model)
    while True:
        follower.follow(commands.get())


if __name__ == "__main__":
    raise SystemExit(main())
