"""How to connect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import grpc

GENERATION_TIMEOUT = 300.0  # seconds, for calls that generate or score
DEFAULT_TIMEOUT = 60.0  # for the others


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Of a channel.

    Attributes:
        credentials: TLS; None is plaintext.
        metadata: sent with every call, e.g. (("authorization", "Bearer ..."),).
        max_message_bytes: of one message, in either direction; the server has a limit of its own.
        keepalive: seconds between pings on a quiet connection with calls under way.
        max_attempts: a call that ends UNAVAILABLE before its first message is tried so often in
            all, with growing pauses or the server's push-back; 1 is no retry.
        compression: of requests.
        channel_arguments: further gRPC channel arguments.
    """

    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    max_message_bytes: int = 16 << 20
    keepalive: float = 30.0
    max_attempts: int = 4
    compression: grpc.Compression | None = None
    channel_arguments: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> list[tuple[str, Any]]:
        """As gRPC channel arguments, the retry policy in the service config."""
        config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
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
            *self.channel_arguments,
        ]
