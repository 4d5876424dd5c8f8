"""What the page consists of: small files of the package, from this server alone, under a strict policy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omniport.serve.page import assets
from support.bundles import make_bundle
from support.paths import REPOSITORY
from support.served import Served

STATIC = REPOSITORY / "serve" / "page" / "static"
FILES = sorted(STATIC.iterdir())


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(make_bundle(tmp_path_factory.mktemp("page") / "bundle"), keys=("sk-1",)) as served:
        yield served


class Tags(HTMLParser):
    """What tags of the page name, and what they do themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []
        self.ids: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value or "")
            elif name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
            elif name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style") and data.strip():
            self.inline.append(self._within)


def index() -> Tags:
    tags = Tags()
    tags.feed((STATIC / "index.html").read_text(encoding="utf-8"))
    return tags


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 100_000
    assert {path.name: path.read_bytes() for path in FILES} == assets.read_assets(), "every file is served"


@pytest.mark.parametrize("path", ["/", *(f"/page/{path.name}" for path in FILES)])
def test_every_file_is_served_without_a_key_under_the_policy(locked: Served, path: str) -> None:
    response = locked.http().get(path)
    assert response.status_code == 200
    assert response.content == (STATIC / (path.rpartition("/")[2] or "index.html")).read_bytes()
    directives = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert directives["default-src"] == "'none'"
    for name in ("script-src", "style-src", "connect-src"):
        assert directives[name] == "'self'"
    assert {word for value in directives.values() for word in value.split()} == {"'none'", "'self'", "blob:"}
    assert response.headers["x-content-type-options"] == "nosniff"
    kind = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].split(";")[0] == kind[Path(path).suffix or ".html"]


def test_nothing_else_is_served_so(locked: Served) -> None:
    http = locked.http()
    for path in ("/page/", "/page/nothing.js", "/page/..%2fassets.py", "/page/../assets.py", "/page/assets.py"):
        assert http.get(path).status_code in (401, 404), path
    assert http.get("/v1/models").status_code == 401
    assert http.get("/page/main.js", headers={"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_another_origin(path: Path) -> None:
    """Only the names of XML's own vocabulary are URLs, and none of them is fetched."""
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert set(re.findall(r"(?:https?|wss?):?//[^\s\"'`<>)]*", text)) <= {"http://localhost"}, "said in words"
    assert not re.search(r"(?:src|href|url|import|from)\s*[=(]?\s*[\"'`]?//", text)
    assert not re.search(r"\beval\(|new Function|innerHTML|insertAdjacentHTML|document\.write", text)


def test_the_page_links_files_that_there_are_and_has_nothing_inline() -> None:
    tags = index()
    assert not tags.inline
    assert {link for link in tags.links if not link.startswith("#")} <= {f"page/{path.name}" for path in FILES}
    assert len(tags.ids) == len(set(tags.ids))


def test_modules_import_modules_that_there_are() -> None:
    names = {path.name for path in FILES}
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert {name.removeprefix("./") for name in re.findall(r'from "([^"]+)"', text)} <= names
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= set(index().ids), f"elements that {path.name} uses"
