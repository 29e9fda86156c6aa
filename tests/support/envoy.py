"""A real Envoy in front of servers: gRPC health checks, and faults that calls ask for by their metadata."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.serving import wait_until

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
HEALTH_INTERVAL = "0.2s"


def abort(code: int, percent: int) -> tuple[tuple[str, str], ...]:
    """Metadata: Envoy ends so many of the calls with this gRPC status, instead of passing them on."""
    return (
        ("x-envoy-fault-abort-grpc-request", str(code)),
        ("x-envoy-fault-abort-request-percentage", str(percent)),
    )


def delay(milliseconds: int, percent: int = 100) -> tuple[tuple[str, str], ...]:
    """Metadata: Envoy holds so many of the calls back for so long."""
    return (
        ("x-envoy-fault-delay-request", str(milliseconds)),
        ("x-envoy-fault-delay-request-percentage", str(percent)),
    )


def _typed(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"type.googleapis.com/{kind}", **fields}


def _socket(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def config(backends: Sequence[str]) -> dict[str, Any]:
    """A listener on a free port; round robin among the backends that are healthy."""
    whole = {"numerator": 100, "denominator": "HUNDRED"}
    fault = _typed(
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        abort={"header_abort": {}, "percentage": whole},
        delay={"header_delay": {}, "percentage": whole},
    )
    manager = _typed(
        MANAGER,
        stat_prefix="front",
        codec_type="AUTO",
        stream_idle_timeout="0s",
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    # The client's deadline bounds a call, nothing else.
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "salver", "timeout": "0s"}}],
                }
            ]
        },
        http_filters=[
            {"name": "envoy.filters.http.fault", "typed_config": fault},
            {
                "name": "envoy.filters.http.router",
                "typed_config": _typed("envoy.extensions.filters.http.router.v3.Router"),
            },
        ],
    )
    cluster = {
        "name": "salver",
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        # With one of two backends gone, the rest still only goes to the healthy one.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "typed_extension_protocol_options": {
            HTTP_OPTIONS: _typed(HTTP_OPTIONS, explicit_http_config={"http2_protocol_options": {}})
        },
        "health_checks": [
            {
                "timeout": "1s", "interval": HEALTH_INTERVAL, "no_traffic_interval": HEALTH_INTERVAL,
                "unhealthy_threshold": 1, "healthy_threshold": 1,
                "grpc_health_check": {"service_name": "readiness"},
            }
        ],
        "load_assignment": {
            "cluster_name": "salver",
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _socket(address)}} for address in backends]}
            ],
        },
    }  # fmt: skip
    return {
        "admin": {"address": _socket("127.0.0.1:0")},
        "static_resources": {
            "listeners": [
                {
                    "name": "front",
                    "address": _socket("127.0.0.1:0"),
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": [cluster],
        },
    }


class Envoy:
    """One Envoy process before `backends`; a context manager."""

    def __init__(self, tool: str, directory: Path, backends: Sequence[str]) -> None:
        written, admin = directory / "envoy.json", directory / "admin"
        written.write_text(json.dumps(config(backends)))
        self._log = (directory / "envoy.log").open("w+")
        command = [tool, "--config-path", str(written), "--admin-address-path", str(admin)]
        command += ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
        if setpriv := shutil.which("setpriv"):  # nothing outlives tests that are killed
            command = [setpriv, "--pdeathsig", "KILL", *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT
        )
        self._admin = wait_until("Envoy's admin address", lambda: self._alive() and _text(admin))
        (listener,) = wait_until("Envoy's listener", lambda: self._ask("listeners").get("listener_statuses"))
        self.address = "127.0.0.1:{port_value}".format(**listener["local_address"]["socket_address"])

    def __enter__(self) -> Envoy:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._log.close()

    def _alive(self) -> bool:
        if self.process.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"envoy ended with {self.process.returncode}:\n{self._log.read()}")
        return True

    def _ask(self, what: str) -> Any:
        with urllib.request.urlopen(f"http://{self._admin}/{what}?format=json", timeout=10) as reply:
            return json.load(reply)

    def healthy(self) -> set[str]:
        """The backends that Envoy sends calls to."""
        found = set()
        for host in self._ask("clusters")["cluster_statuses"][0]["host_statuses"]:
            if (
                host["health_status"].get("eds_health_status") == "HEALTHY"
                and len(host["health_status"]) == 1
            ):
                found.add("{address}:{port_value}".format(**host["address"]["socket_address"]))
        return found

    def stat(self, name: str) -> int:
        """A counter; 0 while there is none."""
        return sum(s["value"] for s in self._ask("stats")["stats"] if s.get("name") == name)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
