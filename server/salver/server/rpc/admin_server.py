"""The port of AdminService: a server of its own, so that nothing of it is reachable on the other one."""

from __future__ import annotations

import logging
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from salver.server.admin_config import AdminConfig
from salver.server.log import log_event
from salver.server.metrics import Metrics
from salver.server.rpc.adapters import Adapters
from salver.server.rpc.admin import AdminService
from salver.server.rpc.calls import Call
from salver.server.rpc.health import SERVICE_NAME as HEALTH
from salver.server.rpc.health import HealthService
from salver.server.rpc.interceptor import OUR_PREFIX, CallInterceptor
from salver.server.rpc.reflection import add_reflection
from salver.server.rpc.served import Front
from salver.server.rpc.tenancy import Tenancy
from salver.server.rpc.tls import server_credentials
from salver.server.rpc.weights import Weights
from salver.server.tenants import Tenants
from salver.v1 import admin_pb2, admin_pb2_grpc

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
_log = logging.getLogger("salver.audit")
_MAX_MESSAGE = 64 * 1024
_MAX_CALLS = 64


class AdminServer:
    """Answers AdminService, health and reflection."""

    def __init__(
        self, config: AdminConfig, front: Front, adapters: Adapters, weights: Weights, metrics: Metrics
    ) -> None:
        """On the event loop that it runs on. Raises BadFile for certificates and tokens."""
        self.health = HealthService((ADMIN,))
        self.credentials = server_credentials(*config.admin_tls, metrics.reloaded)
        tokens = config.admin_token_file
        tenants = None
        if tokens is not None:
            tenants = Tenants(tokens, metrics.reloaded, flag="--admin-token-file", settings=False)
        tenancy = Tenancy(tenants, metrics.rejected)
        self._calls = CallInterceptor(metrics, front.require_serving, tenancy.enter, _ended)
        self.server = grpc.aio.server(
            interceptors=(self._calls,),
            options=[
                ("grpc.so_reuseport", 0),  # or a second server shares the port silently
                ("grpc.max_receive_message_length", _MAX_MESSAGE),
            ],
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(
                front, adapters, weights, adapter_root=config.adapter_root, weights_root=config.weights_root
            ),
            self.server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        add_reflection(self.server, (ADMIN, HEALTH))


def _ended(call: Call, code: str, metadata: Any) -> None:
    """One line for each call, also those that were refused: who, what, and what came of it."""
    if not call.method.startswith(OUR_PREFIX):
        return  # health and reflection change nothing
    log_event(
        _log, logging.INFO, "admin call", method=call.method, caller=call.tenant or "anybody",
        peer=call.peer, request_id=call.request_id, code=code,
        seconds=round(time.monotonic() - call.begun, 6), **call.audit,
    )  # fmt: skip
