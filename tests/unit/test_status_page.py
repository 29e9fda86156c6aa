"""The shared page: what one process writes another reads, and counters outlive workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from salver.server.engine.status_page import StatusPage

COUNTERS = [
    "preemptions", "prefix_queries", "prefix_hits", "steps", "generated_tokens", "draft_tokens",
    "accepted_draft_tokens",
]  # fmt: skip
GAUGES = ["num_running", "num_waiting", "kv_blocks_used", "kv_blocks_total"]
FIELDS = [*COUNTERS, *GAUGES, "progress"]


def test_another_process_writes_and_this_one_reads():
    page = StatusPage.create()
    script = (
        "import sys\n"
        "from salver.server.engine.status_page import StatusPage\n"
        "page = StatusPage.attach(int(sys.argv[1]))\n"
        f"for value, name in enumerate({FIELDS!r}, 10): setattr(page, name, value)\n"
        "page.bump()\n"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", script, str(page.fd)], pass_fds=[page.fd], check=True)
    for value, name in enumerate(FIELDS[:-1], 10):
        assert getattr(page, name) == value, name
    assert page.progress == 10 + len(FIELDS)  # set, then bumped
    assert begin < page.updated < time.monotonic()
    page.close()


def test_counters_only_grow_over_workers_and_gauges_fall():
    front = StatusPage.create()
    for preemptions, total in ((3, 3), (2, 5), (1, 6)):
        worker = StatusPage.attach(os.dup(front.fd))
        assert worker.preemptions == 0
        worker.preemptions, worker.num_running = preemptions, 4
        assert (front.preemptions, front.num_running) == (total, 4)
        front.retire_worker()
        assert (front.preemptions, front.num_running) == (total, 0)
        worker.close()
    front.close()


def test_large_counts_and_a_second_close():
    page = StatusPage.create()
    page.generated_tokens = 2**63 + 1
    assert page.generated_tokens == 2**63 + 1
    fd = page.fd
    page.close()
    page.close()
    try:
        os.fstat(fd)
    except OSError:
        return
    raise AssertionError("the descriptor is still open")
