"""`salver serve` with the faulty worker, and with less patience for one that hangs."""

from __future__ import annotations

import asyncio
import functools
import sys
from pathlib import Path

from salver.server.app import run
from salver.server.config import parse_config
from salver.server.engine.process import EngineProcess, EngineTimes
from salver.server.log import set_up_logging

WORKER = (sys.executable, str(Path(__file__).with_name("faulty_worker.py")))

if __name__ == "__main__":
    config = parse_config(sys.argv[1:])
    set_up_logging(config.log_level)
    engine = functools.partial(EngineProcess, command=WORKER, times=EngineTimes(kill_after=0.5))
    raise SystemExit(asyncio.run(run(config, engine)))
