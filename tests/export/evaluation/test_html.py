"""Pages from templates: values are escaped, and no name is left out without a word."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from omniport.export.evaluation import html

PAGE = """{% extends "page.html.j2" %}{% from "macros.html.j2" import facts, table %}
{% block title %}{{ name }}{% endblock %}
{% block body %}{{ facts("Facts", {"a": name}) }}{% call table(["#n"]) %}<tr><td>{{ 0.12345|figure }}</td></tr>
{% endcall %}{{ name|loud }}{% endblock %}"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a template of its own."""
    folder = tmp_path / "pages_of_a_test"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "templates" / "one.html.j2").write_text(PAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder.name


def test_values_are_escaped_everywhere(package: str) -> None:
    text = html.render(package, "one.html.j2", {"loud": str.upper}, name="<b>&")
    assert "<b>" not in text.lower()
    assert text.count("&lt;b&gt;&amp;") == 2
    assert "&lt;B&gt;&amp;" in text
    assert '<th class="number">n</th>' in text
    assert "<td>0.123</td>" in text


def test_a_name_that_nobody_gave_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError, match="name"):
        html.render(package, "one.html.j2", {"loud": str.upper})
