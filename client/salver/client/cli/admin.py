"""`salver adapters` and `salver weights`: what an admin port changes."""

from __future__ import annotations

import argparse

from salver.client.admin import Adapter, AdminClient
from salver.client.cli.connection import UsageError, connection_options
from salver.client.cli.output import as_json, table

_COLUMNS = ("name", "version", "rank", "bytes", "running", "waiting", "")


def _connect(options: argparse.Namespace) -> AdminClient:
    try:
        return AdminClient(options.address, connection_options(options))
    except OSError as error:
        raise UsageError(f"--tls-ca, --tls-cert, --tls-key: {error}") from error


def load_adapter(options: argparse.Namespace) -> None:
    with _connect(options) as client:
        done = client.load_adapter(options.name, options.directory, timeout=options.timeout)
    if options.json:
        as_json(done)
    elif done.unchanged:
        print(f"{done.adapter.name} is version {done.adapter.version} with these files already")
    else:
        instead = "" if done.replaced_version is None else f", in the place of {done.replaced_version}"
        print(f"{done.adapter.name} is version {done.adapter.version}{instead}")


def unload_adapter(options: argparse.Namespace) -> None:
    with _connect(options) as client:
        done = client.unload_adapter(
            options.name, "abort" if options.abort else "wait", timeout=options.timeout
        )
    if options.json:
        as_json(done)
    else:
        aborted = f", {done.num_aborted} calls aborted" if options.abort else ""
        print(f"{done.adapter.name} is unloaded{aborted}")


def list_adapters(options: argparse.Namespace) -> None:
    with _connect(options) as client:
        found = client.list_adapters(timeout=options.timeout)
    if options.json:
        as_json(found)
    else:
        table(_COLUMNS, [_row(adapter) for adapter in found])


def _row(adapter: Adapter) -> tuple[object, ...]:
    return (
        adapter.name, adapter.version, adapter.rank, f"{adapter.num_bytes:,}", adapter.num_running,
        adapter.num_waiting, "retired" if adapter.retired else "",
    )  # fmt: skip


def update_weights(options: argparse.Namespace) -> None:
    with _connect(options) as client:
        done = client.update_weights(options.directory, options.in_flight, timeout=options.timeout)
    if options.json:
        as_json(done)
    elif done.unchanged:
        print(f"version {done.version} has these files already")
    else:
        counts = {"abort": f", {done.num_aborted} calls aborted", "keep": f", {done.num_kept} calls kept"}
        print(f"version {done.version}{counts.get(options.in_flight, '')}, pause {done.pause * 1000:.1f} ms")
