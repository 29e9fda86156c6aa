"""Whose call this is: a bearer token in its metadata, checked before anything else is looked at.

Health needs no token (probes have none, and it tells nothing); everything else does once
`--tokens` is given, reflection too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar

import grpc

from salver.server.rpc.calls import current_call
from salver.server.rpc.errors import ApiError
from salver.server.tenants import ANYBODY, Tenant, Tenants, UnknownToken

_OPEN = ("/grpc.health.v1.Health/",)
# Of these, nothing is computed: a tenant that has used up its rate may still ask.
_FREE = (*_OPEN, "/salver.v1.ModelService/", "/grpc.reflection.")

_current: ContextVar[Tenant] = ContextVar("tenant", default=ANYBODY)


def current_tenant() -> Tenant:
    """Of the call that is being answered."""
    return _current.get()


class Tenancy:
    """Admits calls by their token. Without `tenants` everybody may call."""

    def __init__(self, tenants: Tenants | None, rejected: Callable[[str], None]) -> None:
        """`rejected` is told `unauthenticated`, `permission_denied` or `tenant_rate` of each refusal."""
        self._tenants = tenants
        self._rejected = rejected

    def enter(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Finds the tenant of a call, `current_tenant()` from now on. Raises ApiError for others."""
        if self._tenants is None or method.startswith(_OPEN):
            return
        try:
            tenant = self._tenants.of_token(_bearer_token(metadata))
        except UnknownToken as error:
            self._rejected("unauthenticated")
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, str(error), reason="UNAUTHENTICATED") from None
        if not tenant.may_call(method) and not method.startswith(_FREE):
            self._rejected("permission_denied")
            raise ApiError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"tenant {tenant.name!r} may not call {method.split('/')[1]}",
                reason="PERMISSION_DENIED",
            )
        wait = 0.0 if method.startswith(_FREE) else tenant.allowance.wait()
        if wait:
            self._rejected("tenant_rate")
            raise ApiError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"tenant {tenant.name!r} has used more than its {tenant.allowance.rate:g} tokens a second",
                reason="RATE_LIMITED",
                retry_after=wait,
            )
        _current.set(tenant)
        call = current_call()
        if call is not None:
            call.tenant = tenant.name


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Raises UnknownToken."""
    found = [value for name, value in metadata if name == "authorization"]
    if not found:
        raise UnknownToken("a token is needed, in the metadata as `authorization: Bearer TOKEN`")
    scheme, _, token = str(found[0]).partition(" ")
    if len(found) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise UnknownToken("the authorization must be one `Bearer TOKEN`")
    return token.strip()
