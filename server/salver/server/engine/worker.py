"""The worker process: owns the device. One thread, one loop: inbox, step, send.

Started by the front as `python -m salver.server.engine.worker --socket-fd N --page-fd M`.
The first message it reads is an `EngineConfig`; it answers `Ready` or `Failed`. It ends
when the front does, because its socket closes then. Ctrl-C and SIGTERM go to the front,
which decides; the worker ignores them so that running streams can finish.
"""

from __future__ import annotations

import argparse
import signal
import socket
import time
from typing import TYPE_CHECKING

from salver.server.engine.changes import ApplyWeights, DropAdapter, DropWeights, LoadAdapter, StageWeights
from salver.server.engine.channel import Channel, ChannelClosed
from salver.server.engine.config import EngineConfig
from salver.server.engine.core import EngineCore
from salver.server.engine.request import Abort, Failed, Shutdown, Submit
from salver.server.engine.status_page import StatusPage

if TYPE_CHECKING:
    from salver.server.engine.gpu_gauges import GpuGauges
    from salver.server.engine.updates import Updates

IDLE_TICK = 0.1  # seconds between signs of life of an idle worker


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m salver.server.engine.worker", description=__doc__)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--page-fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    page = StatusPage.attach(arguments.page_fd)
    channel = Channel(socket.socket(fileno=arguments.socket_fd))
    try:
        return _serve(channel, page)
    except (ChannelClosed, BrokenPipeError, ConnectionResetError):
        return 0  # the front is gone, and with it everyone who waits


def _serve(channel: Channel, page: StatusPage) -> int:
    config = _first_message(channel)
    # Imported here: torch takes a second, and the front's messages can wait in the socket.
    begin = time.perf_counter()
    import torch  # noqa: F401

    imported = time.perf_counter()
    from salver.server.engine.encoder_startup import start_any_engine
    from salver.server.engine.host_memory import keep_freed_memory
    from salver.server.engine.startup import StartError
    from salver.server.engine.updates import Updates

    try:
        core, ready = start_any_engine(config, page, [("import torch", imported - begin)], imported)
    except StartError as error:
        channel.send(Failed(str(error)))
        return 1
    from salver.server.engine.gpu_gauges import GpuGauges

    keep_freed_memory()
    channel.send(ready)
    _loop(channel, page, core, Updates(core, config, ready), GpuGauges.of_this_process(page))
    return 0


def _first_message(channel: Channel) -> EngineConfig:
    while True:
        for message in channel.poll(timeout=IDLE_TICK):
            if not isinstance(message, EngineConfig):
                raise TypeError(f"the first message must be an EngineConfig, not {type(message).__name__}")
            return message


def _loop(
    channel: Channel, page: StatusPage, core: EngineCore, updates: Updates, gauges: GpuGauges | None = None
) -> None:
    checked = core.steps
    while True:
        messages = channel.poll(timeout=0.0 if core.has_work else IDLE_TICK)
        if not messages and not core.has_work and checked != core.steps:
            core.check_integrity()  # idle for a tick, so that nobody waits for it
            checked = core.steps
        for message in messages:
            match message:
                case Submit(request):
                    core.add(request)
                case Abort(request_id, sample_index):
                    core.abort(request_id, sample_index)
                case LoadAdapter() | DropAdapter() | StageWeights() | ApplyWeights() | DropWeights():
                    updates.begin(message)
                case Shutdown():
                    return
                case _:
                    raise TypeError(f"no such message: {type(message).__name__}")
        if (changed := updates.finish()) is not None:
            channel.send(changed)
        report = core.step(channel.send)
        publish(page, core)
        if gauges is not None:
            gauges.publish()
        if report is not None:
            channel.send(report)


def publish(page: StatusPage, core: EngineCore) -> None:
    """Writes the gauges and counters that the front shows at a scrape, and a sign of life."""
    scheduler, pool = core.scheduler, core.pool
    page.num_running = len(scheduler.running)
    page.num_waiting = scheduler.num_waiting
    page.kv_blocks_used = pool.num_used
    page.kv_blocks_total = pool.num_blocks - 1
    page.preemptions = scheduler.preemptions
    page.prefix_queries = scheduler.prefix_queries
    page.prefix_hits = scheduler.prefix_hits
    page.steps = core.steps
    page.generated_tokens = core.generated_tokens
    if scheduler.speculation is not None:
        page.draft_tokens = scheduler.speculation.num_drafts
        page.accepted_draft_tokens = scheduler.speculation.num_accepted
    page.bump()


if __name__ == "__main__":
    raise SystemExit(main())
