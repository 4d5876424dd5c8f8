"""The server on a cluster: replicas of the same application under Ray Serve. Wants the extra ``ray``."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from omniport.runtime import OmniSession
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, DeploymentActorConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.applications import Starlette

from .app import make_app
from .replicas.session_store import Saving, SessionState, SessionTable
from .service import Service
from .settings import Settings

_LOG = logging.getLogger(__name__)
#: of the places of a replica, how many are taken when another one is started
_BUSY = 0.7
#: seconds between looks at whether a replica is ready, and whether Ray stops it; and to spare when it is stopped
_GLANCE, _SPARE = 0.25, 10.0
#: name of the actor that keeps the sessions of all replicas; seconds between words that a replica lives
_STORE, _RENEWAL = "sessions", 5.0
#: replicas that are asked how busy they are before a conversation begins that names no session
_ASKED = 8


def application(
    open_session: Callable[[], OmniSession],
    settings: Settings | None = None,
    *,
    replicas: int | tuple[int, int] = 1,
    actor_options: Mapping[str, Any] | None = None,
) -> Any:
    """What ``ray.serve.run`` and the command ``serve run`` take.

    Args:
        open_session: opens the bundle, once in each replica.
        settings: of each replica. Address and certificate are of no effect, for Ray Serve's proxies listen.
        replicas: how many; or the least and the most, between which their number follows that of the sessions.
        actor_options: what Ray gives each replica, such as ``{"num_gpus": 1}``.
    """
    settings = settings or Settings()
    limits = settings.limits
    number: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        least, most = replicas
        target = max(1.0, _BUSY * settings.sessions)  # a WebSocket is one request for as long as it lasts
        scaled = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=target)
        number = {"autoscaling_config": scaled}
    deployed = serve.deployment(
        serve.ingress()(_Replica),
        name="omniport",
        ray_actor_options={"num_cpus": 1, **(actor_options or {})},
        # The application refuses when it is full. What Ray counted as too many would wait, unseen, instead.
        max_ongoing_requests=max(limits.connections, limits.requests + settings.sessions + 64),
        max_queued_requests=limits.connections,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),
        deployment_actors=[
            DeploymentActorConfig(name=_STORE, actor_class=ray.remote(_Sessions), actor_options={"num_cpus": 0})
        ],
        graceful_shutdown_wait_loop_s=_GLANCE,
        graceful_shutdown_timeout_s=limits.drain_seconds + _SPARE,
        **number,
    )
    return deployed.bind(open_session, settings)


class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Requests with the same ``x-session-id`` go to the same replica; others to the one that is least busy."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Of several in one list, Ray takes the one with the fewest requests."""
        if pending_request is None or pending_request.metadata.session_id:
            ranked: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
            return ranked
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(_ASKED, len(candidate_replicas)))]


class _Replica:
    """The application in one process of Ray's."""

    async def __init__(self, open_session: Callable[[], OmniSession], settings: Settings) -> None:  # type: ignore[misc]
        self._service = service = Service(open_session(), settings, _Store())
        service.start(failed=lambda: None)
        while service.state == "loading":
            if service.failure is not None:
                service.close()
                raise service.failure
            await asyncio.sleep(_GLANCE)
        self._watching = asyncio.ensure_future(self._watch())

    def __serve_build_asgi_app__(self) -> Starlette:
        return make_app(self._service)

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()

    async def _watch(self) -> None:
        """Drain once Ray stops the replica: it waits then for the requests under way, and WebSockets are such."""
        renewed = 0.0
        while not _stopping():
            if self._service.store is not None and time.monotonic() - renewed > _RENEWAL:
                renewed = time.monotonic()
                with suppress(Exception):  # the store is away, and comes back
                    await asyncio.wait_for(self._service.store.renew(self._service.id), _RENEWAL)
            await asyncio.sleep(_GLANCE)
        _LOG.info("the replica is stopped: it drains")
        self._service.drain()


class _Sessions(SessionTable):
    """The actor's class. Ray copies the module of it, and msgspec's records do not stand that."""


class _Store:
    """The actor that keeps the sessions, which Ray replaces when it is lost."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def save(self, key: str, owner: str, changes: SessionState) -> Saving:
        """See ``SessionStore``."""
        saving: Saving = await self._ask("save", key, owner, changes)
        return saving

    async def owner(self, key: str) -> str | None:
        """See ``SessionStore``."""
        owner: str | None = await self._ask("owner", key)
        return owner

    async def take(self, key: str, owner: str) -> SessionState | None:
        """See ``SessionStore``."""
        state: SessionState | None = await self._ask("take", key, owner)
        return state

    async def forget(self, key: str, owner: str) -> None:
        """See ``SessionStore``."""
        await self._ask("forget", key, owner)

    async def renew(self, owner: str) -> None:
        """See ``SessionStore``."""
        await self._ask("renew", owner)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._actor = self._actor or serve.get_deployment_actor(_STORE)
            return await getattr(self._actor, method).remote(*arguments)
        except Exception:
            self._actor = None  # another one may be there by the next time
            raise


def _stopping() -> bool:
    """Whether Ray stops this replica. It tells nobody, but itself."""
    actors = ray._private.worker.global_worker.actors.values()
    return any(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False) for actor in actors)
