"""Endpoints for those who run the server: health, readiness, version, metrics, capacity, draining."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from omniport.runtime import OmniSession
from omniport.runtime.system.power import power_mode
from omniport.runtime.system.thermal import temperatures, throttled
from starlette.requests import Request
from starlette.responses import Response

from ..measurements import Measurements
from ..service import Service
from .routing import json_response, require_ready


async def health(request: Request, service: Service) -> Response:
    """The process lives."""
    return json_response({"status": "ok"})


async def ready(request: Request, service: Service) -> Response:
    """Requests are answered."""
    require_ready(service)
    return json_response({"status": service.state})


async def get_version(request: Request, service: Service) -> Response:
    """Of omniport and of the bundle."""
    return json_response({"version": version("omniport"), "model": service.model, "bundle_hash": service.fingerprint})


async def metrics(request: Request, service: Service) -> Response:
    """For Prometheus."""
    admission, measured = service.admission, service.measurements
    measured.replies_active.set(admission.active)
    measured.replies_waiting.set(admission.waiting)
    for state, count in _sessions(service).items():
        measured.sessions.labels(state).set(count)
    held = {"chat": [*service.sessions.kept], "realtime": service.realtime.sessions()}
    await asyncio.get_running_loop().run_in_executor(service.reading, _look, measured, held)
    return Response(measured.page(), media_type="text/plain; version=0.0.4")


def _look(measured: Measurements, held: Mapping[str, Sequence[OmniSession]]) -> None:
    """What is read for the page alone. Sessions have numbers, not ids: there are never more of them than may be."""
    measured.kv_tokens.clear()
    for kind, sessions in held.items():
        for n, session in enumerate(sessions):
            measured.kv_tokens.labels(f"{kind}-{n}").set(sum(item.cached for item in session.items))
    for zone, degrees in temperatures().items():
        measured.temperature.labels(zone).set(degrees)
    measured.throttled.set(throttled())


async def capacity(request: Request, service: Service) -> Response:
    """How much is free, for a load balancer, and what a reply that is asked for now would be like."""
    admission, measured = service.admission, service.measurements
    first = None if measured.first_audio is None else measured.first_audio + admission.expected_wait()
    free = max(0, admission.places - admission.active - admission.waiting) if service.state == "ready" else 0
    return json_response(
        {
            "sessions": admission.places,
            "active": admission.active,
            "waiting": admission.waiting,
            "free": free,
            "state": service.state,
            "realtime": {"sessions": service.realtime.most, **_sessions(service)},
            "predicted_first_audio_s": first,
            "predicted_rtf": measured.rate,
            "power_mode": power_mode(),
        }
    )


def _sessions(service: Service) -> dict[str, int]:
    """Realtime sessions by state. Those that are kept for a client that was lost give way to a new one."""
    realtime = service.realtime
    free = realtime.free if service.state == "ready" else 0
    return {"open": realtime.open, "kept": realtime.kept, "free": free}


async def drain(request: Request, service: Service) -> Response:
    """Take no more requests."""
    service.drain()
    return json_response({"status": service.state}, 202)
