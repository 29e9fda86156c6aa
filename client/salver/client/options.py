"""How to connect."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import grpc

from salver.client.security import BearerToken, Tls
from salver.client.tracing import trace_context

GENERATION_TIMEOUT = 300.0  # seconds, for calls that generate or score
DEFAULT_TIMEOUT = 60.0  # for the others


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Of a channel.

    Attributes:
        tls: TLS, from files; None is plaintext.
        token: a bearer token, sent with every call; or a function that gives it, asked each time
            (`token_from_file`). Over plaintext, everybody on the way can read it.
        credentials: TLS of gRPC's own making, instead of `tls`.
        metadata: sent with every call.
        max_message_bytes: of one message, in either direction; the server has a limit of its own.
        keepalive: seconds between pings on a quiet connection with calls under way.
        max_attempts: a call that ends UNAVAILABLE before its first message is tried so often in
            all, with growing pauses or the server's push-back; 1 is no retry. By gRPC itself, for
            every call, within a budget: when many fail, it stops.
        resume_attempts: a call that generates or scores and ends UNAVAILABLE all the same is begun
            so often again, on whichever server answers; a stream from its tokens so far. 0 is never.
        allow_numerics_mismatch: a stream may go on at a server of another numerics_id, whose tokens
            may not be those that the lost one would have given.
        max_concurrent_calls: further calls wait here, on their own deadline, until one has ended;
            a stream then begins when it is first read. None is no bound.
        health_checking: calls go only to servers whose health says SERVING, so that one that loads
            or drains gets none. None: where the address may stand for several servers.
        compression: of requests.
        channel_arguments: further gRPC channel arguments.
    """

    tls: Tls | None = None
    token: BearerToken | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    max_message_bytes: int = 16 << 20
    keepalive: float = 30.0
    max_attempts: int = 4
    resume_attempts: int = 6
    allow_numerics_mismatch: bool = False
    max_concurrent_calls: int | None = None
    health_checking: bool | None = None
    compression: grpc.Compression | None = None
    channel_arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.tls is not None and self.credentials is not None:
            raise ValueError("tls and credentials are two ways to say one thing: give one of them")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; 1 is the least, no retry")
        if self.resume_attempts < 0:
            raise ValueError(f"resume_attempts is {self.resume_attempts}; 0 is the least, never")
        if self.max_concurrent_calls is not None and self.max_concurrent_calls < 1:
            raise ValueError(f"max_concurrent_calls is {self.max_concurrent_calls}; None is no bound")

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """TLS, however it was given; None is plaintext. Raises OSError for files that cannot be read."""
        return self.credentials if self.tls is None else self.tls.credentials()

    def call_metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call. Raises what the function that gives the token raises."""
        metadata = (*self.metadata, *trace_context())
        if self.token is None:
            return metadata
        token = self.token if isinstance(self.token, str) else self.token()
        return (*metadata, ("authorization", f"Bearer {token}"))

    def arguments(self, several: bool = False) -> list[tuple[str, Any]]:
        """As gRPC channel arguments, the retry policy in the service config.

        `several`: whether more than one server may be behind the address.
        """
        config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
        if several if self.health_checking is None else self.health_checking:
            config["healthCheckConfig"] = {"serviceName": "readiness"}
        if self.max_attempts > 1:
            config["methodConfig"] = [
                {
                    "name": [{}],
                    "retryPolicy": {
                        "maxAttempts": min(self.max_attempts, 5),
                        "initialBackoff": "0.1s",
                        "maxBackoff": "2s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ]
            # The budget: once half of its tokens are spent on failures, nothing is retried.
            config["retryThrottling"] = {"maxTokens": 20, "tokenRatio": 0.2}
        return [
            ("grpc.service_config", json.dumps(config)),
            ("grpc.enable_retries", int(self.max_attempts > 1)),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", int(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", 10_000),
            # A server that was restarted is found again within seconds; gRPC's own 2 minutes are for the
            # internet. So is what a name stands for.
            ("grpc.initial_reconnect_backoff_ms", 200),
            # Sooner than resumption gives up: one of two servers may go when the other has just come back.
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.dns_min_time_between_resolutions_ms", 5_000),
            *(self.tls.arguments() if self.tls is not None else ()),
            *self.channel_arguments,
        ]
