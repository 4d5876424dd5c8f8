"""HTML page of a deployment: the plan beside what was measured, arranged for ``deploy.html.j2``."""

from __future__ import annotations

from omniport.export.evaluation import html
from rich.filesize import decimal

from .deploy_figures import compared
from .deploy_record import Deployment


def render(record: Deployment) -> str:
    """The page."""
    return html.render(
        __package__,
        "deploy.html.j2",
        {"size": decimal},
        record=record,
        plan=record.plan,
        rows=list(compared(record)),
    )
