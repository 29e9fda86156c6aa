"""A real Prometheus and a real Alertmanager beside a server under test."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from support.serving import Server, wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def scraping(server: Server, interval: str = "200ms", **labels: str) -> dict[str, Any]:
    """A configuration that looks at the server, and at rules, so often."""
    target = urllib.parse.urlsplit(server.metrics_url)
    return {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": interval,
            "evaluation_interval": interval,
        },
        "scrape_configs": [
            {
                "job_name": "salver",
                "metrics_path": target.path,
                "static_configs": [{"targets": [target.netloc], "labels": labels}],
            }
        ],
    }


@contextmanager
def process(directory: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs until the end of the block; what it says is in the directory's `log`."""
    with (directory / "log").open("wb") as log:
        running = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield running
    finally:
        running.terminate()
        running.wait(20)


class Prometheus:
    """One that runs."""

    def __init__(self, running: subprocess.Popen[bytes], port: int, directory: Path) -> None:
        self._running, self._port, self._directory = running, port, directory

    def query(self, expression: str) -> list[Any]:
        """The series that it has now; empty also while it is not up yet."""
        assert self._running.poll() is None, (self._directory / "log").read_text()
        url = f"http://127.0.0.1:{self._port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                result: list[Any] = json.load(reply)["data"]["result"]
                return result
        except (urllib.error.URLError, ConnectionError):
            return []

    def wait_scraped(self) -> None:
        wait_until("a successful scrape", lambda: [r for r in self.query("up") if r["value"][1] == "1"], 60)


@contextmanager
def prometheus(tool: str, directory: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    directory.mkdir(exist_ok=True)
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = (
        tool, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    )  # fmt: skip
    with process(directory, *command) as running:
        yield Prometheus(running, port, directory)


@contextmanager
def webhook() -> Iterator[tuple[str, list[Any]]]:
    """Its URL, and every message that it gets."""
    received: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=receiver.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{receiver.server_port}/", received
    finally:
        receiver.shutdown()
        thread.join(10)
        receiver.server_close()


@contextmanager
def alertmanager(tool: str, directory: Path, url: str) -> Iterator[str]:
    """Its address; it passes on every alert to the webhook at `url` at once."""
    directory.mkdir(exist_ok=True)
    config = {
        "route": {"receiver": "test", "group_by": ["alertname"], "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "test", "webhook_configs": [{"url": url}]}],
    }
    (directory / "alertmanager.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    command = (
        tool, f"--config.file={directory}/alertmanager.yml", f"--storage.path={directory}/data",
        f"--web.listen-address={address}", "--cluster.listen-address=",
    )  # fmt: skip
    with process(directory, *command) as running:

        def ready() -> bool:
            assert running.poll() is None, (directory / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                    return True
            except (urllib.error.URLError, ConnectionError):
                return False

        wait_until("a ready Alertmanager", ready, 60)
        yield address
