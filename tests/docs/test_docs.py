"""The documents say what the code does: code blocks run, commands exist, generated pages are fresh."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec
import pytest
from omniport.cli.main import app
from omniport.runtime.bundle import engines, manifest
from omniport.runtime.bundle import graph_spec as graphs
from support.paths import REPOSITORY

from scripts import make_docs, module_map
from scripts.sample_media import make_media

#: every page of Markdown that a reader may open, from the root of the repository
PAGES = [
    path.relative_to(REPOSITORY).as_posix()
    for path in sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
]
README_WORDS = 600
STRUCTS = [
    struct
    for module in (manifest, graphs, engines)
    for struct in vars(module).values()
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct) and struct.__module__ == module.__name__
]


@pytest.fixture(scope="module")
def sample_media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A spoken question, a picture and a clip with sound, by kind."""
    return make_media(tmp_path_factory.mktemp("media"))


def blocks(page: str, language: str) -> list[str]:
    """Fenced code blocks of one language."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def links(text: str) -> list[tuple[str, str]]:
    """(target, anchor) of every link and picture; either may be empty."""
    return re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text)


def anchors(page: Path) -> set[str]:
    """Of every heading, what a link to it ends with, as code hosts make it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines() -> list[tuple[str, str]]:
    """(page, line) for every `omniport ...` line of the shell blocks."""
    return [
        (page, line.strip())
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("omniport ") and "[OPTIONS]" not in line
    ]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_shell_lines_parse(page: str, line: str) -> None:
    """The command exists and takes these arguments; nothing is run."""
    import typer

    name, *arguments = shlex.split(line.split(" || ")[0], comments=True)[1:]
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, arguments)
    assert context.params


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS
    commands = [line.split()[1] for page, line in command_lines() if page == "README.md"]
    assert {"export", "run"} <= set(commands)


QUESTION = '"messages": [{"role": "user", "content": "Tell me of the sea."}]'
PYTHON = [(page, number) for page in ("docs/python.md",) for number in range(len(blocks(page, "python")))]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), PYTHON)
def test_python_blocks_run(
    page: str,
    number: int,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    sample_media: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each block runs as it stands, in a folder that has the files it names."""
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    (tmp_path / "checkpoint").symlink_to(tiny_checkpoint)
    (tmp_path / "asked.jsonl").write_text(f"{{{QUESTION}}}\n", encoding="utf-8")
    (tmp_path / "calib.jsonl").write_text(f'{{{QUESTION}, "reply": "It is wide."}}\n', encoding="utf-8")
    (tmp_path / "question.wav").symlink_to(sample_media["audio"])
    (tmp_path / "picture.png").symlink_to(sample_media["image"])
    monkeypatch.chdir(tmp_path)
    code = compile(blocks(page, "python")[number], f"{page} block {number}", "exec")
    exec(code, {"__name__": f"block_{number}"})
    assert capsys.readouterr().out.strip()


def test_there_is_python_to_run() -> None:
    assert len(PYTHON) >= 5


def test_the_index_lists_every_command() -> None:
    text = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands]
    assert len(names) >= 6
    for name in names:
        assert f"`omniport {name}" in text


@pytest.mark.parametrize("folder", ["docs", "docs/decisions", "docs/results"])
def test_an_index_lists_every_page_of_its_folder(folder: str) -> None:
    index = REPOSITORY / folder / "README.md"
    linked = {target for target, _ in links(index.read_text(encoding="utf-8"))}
    pages = {path.name for path in index.parent.glob("*.md")} - {"README.md"}
    assert pages <= linked, f"{folder}/README.md does not list {', '.join(sorted(pages - linked))}"


@pytest.mark.parametrize(("page", "text"), make_docs.pages().items(), ids=lambda value: getattr(value, "name", ""))
def test_pages_from_the_code_are_fresh(page: Path, text: str) -> None:
    assert page.read_text(encoding="utf-8") == text, "run make docs"


def test_every_module_says_what_it_is() -> None:
    """A sentence of its own for each, as docs/modules.md lists it."""
    said = {path: module_map.opening(path) for modules in module_map.packages().values() for path in modules}
    silent = [str(path) for path, text in said.items() if not text]
    assert not silent
    twice = {text for text in said.values() if list(said.values()).count(text) > 1}
    assert not twice


def test_folders_of_the_picture_exist() -> None:
    text = (REPOSITORY / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    folders = re.findall(r'class="path"[^>]*>([^<]*)<', text)
    assert len(folders) >= 10
    assert all((REPOSITORY / folder).is_dir() for folder in folders)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_that_a_page_names_exist(page: str) -> None:
    """`runtime/session.py` and `tests/support` in backticks are files and folders of the checkout."""
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    tree = r"(?:runtime|serve|export|calib|cli|scripts|benchmarks|tests|docs)/[\w./-]*"
    for path in re.findall(rf"`({tree})(?:::\w+)?`", text):
        assert (REPOSITORY / path).exists(), f"{page} names {path}"


def found_in_tree(dotted: str) -> bool:
    """Whether `omniport.runtime.session.OmniSession` is a package, a module, or a name that a module defines."""
    at, names = REPOSITORY, dotted.split(".")[1:]
    while names and (at / names[0]).is_dir():
        at /= names.pop(0)
    if names and (module := at / f"{names[0]}.py").is_file():
        at, names = module, names[1:]
    module = at / "__init__.py" if at.is_dir() else at
    defined = rf"^(?:def|class) {names[0]}\b|^{names[0]}\b.*=|\"{names[0]}\"" if names else ""
    return re.search(defined, module.read_text(encoding="utf-8"), re.MULTILINE) is not None


def test_names_and_pages_that_are_mentioned_exist() -> None:
    """In pages and in the product's own text: `omniport.export.graphs.trace`, and docs/build.md."""
    sources = [path for modules in module_map.packages().values() for path in modules]
    for path in [*sources, *(REPOSITORY / page for page in PAGES)]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`(omniport\.[\w.]*\w)(?:\(\))?`", text):
            assert found_in_tree(name), f"{path} names {name}"
        if path.suffix == ".py":
            for page in re.findall(r"\bdocs/[\w/.-]+\.(?:md|json|svg)\b", text):
                assert (REPOSITORY / page).exists(), f"{path} names {page}"


def test_every_walk_is_short_and_names_its_place() -> None:
    """CONTRIBUTING says for each change where a newcomer begins, in under 60 words."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Where to begin\n")[1].split("\n## ")[0]
    walks = dict(part.split("\n", 1) for part in section.split("### ")[1:])
    wanted = ("Add a solver", "Add a device", "Add a backend", "Add a part")
    assert {*wanted, "Change how incoming sound is cut", "Change how outgoing speech is cut"} <= set(walks)
    for name, walk in walks.items():
        assert len(walk.split()) < 60, name
        assert re.search(r"`(runtime|serve|export|calib|cli)/[\w/.]+`", walk), name


RECORDS = sorted((REPOSITORY / "docs" / "decisions").glob("[!R]*.md"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_a_decision_has_context_decision_and_evidence(record: Path) -> None:
    parts = re.split(r"^(#+ .*)$", record.read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings, bodies = parts[1::2], [body.strip() for body in parts[2::2]]
    assert headings[0].startswith("# ")
    assert headings[1:] == ["## Context", "## Decision", "## Evidence"]
    assert all(bodies[1:]), "a heading with nothing under it"
    index = (record.parent / "README.md").read_text(encoding="utf-8")
    assert f"- [{headings[0].removeprefix('# ')}]({record.name})\n" in index, "the index of decisions does not list it"


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_bundle_page_names_every_field(struct: type[msgspec.Struct]) -> None:
    text = (REPOSITORY / "docs" / "bundle.md").read_text(encoding="utf-8")
    heading = re.search(rf"^###? {struct.__name__}$(.*?)(?=^###? |\Z)", text, re.DOTALL | re.MULTILINE)
    assert heading is not None, f"docs/bundle.md has no section {struct.__name__}"
    section = heading.group(1)
    code = " ".join(re.findall(r"`([^`]*)`", section))
    missing = [field for field in struct.__struct_fields__ if not re.search(rf"\b{field}\b", code)]
    assert not missing, f"docs/bundle.md, {struct.__name__}: {', '.join(missing)} not described"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    for target, anchor in links(path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            found = path.parent / target if target else path
            assert found.exists(), f"{page} links to {target}"
            assert not anchor or anchor in anchors(found), f"{page} links to {target}#{anchor}"


def test_makefile_and_ci_agree() -> None:
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "CONTRIBUTING.md"):
        for block in blocks(page, "sh"):
            for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: no target {target}"
