"""Report pages from jinja2 templates: one file each, with no script and no network, readable on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .metrics import figure_text


def render(package: str, template: str, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """A page from a template in the ``templates`` folder of a package; the layout and the macros are this package's.

    Values are escaped. A name that the template uses and ``values`` lacks is an error.

    Args:
        filters: further filters; ``figure`` is always there.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(__package__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure_text, **(filters or {})}
    return environment.get_template(template).render(values)
