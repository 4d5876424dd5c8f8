"""GET /v1/models: what is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..service import Service
from .routing import json_response, require_model


async def list_models(request: Request, service: Service) -> Response:
    """All models: there is one."""
    return json_response({"object": "list", "data": [describe(service, service.model)]})


async def get_model(request: Request, service: Service) -> Response:
    """One model by its name, which may hold slashes."""
    name = request.path_params["model"]
    require_model(service, name)
    return json_response(describe(service, name))


def describe(service: Service, name: str) -> dict[str, Any]:
    """The model, with what it takes and gives."""
    session = service.session
    manifest, graphs = session.manifest, session.manifest.graphs
    media = {"audio": "audio_encoder", "image": "vision_encoder", "video": "vision_encoder"}
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "omniport",
        "omniport": {
            "voices": service.voice_names,
            "modalities": ["text", "audio"] if manifest.dit is not None else ["text"],
            "input": ["text", *(kind for kind, graph in media.items() if graph in graphs)],
            "max_context": session.max_context,
            "sample_rate": None if manifest.vocoder is None else manifest.vocoder.sample_rate,
            "backend": session.backend.name,
            "bundle_hash": service.fingerprint,
        },
    }
