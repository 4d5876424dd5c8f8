"""Write the pages, and parts of pages, that come from the code: ``make docs``. A test checks that they are fresh."""

from __future__ import annotations

from pathlib import Path

from . import cli_docs, module_map, validate_docs


def pages() -> dict[Path, str]:
    """Page -> what the code says it is."""
    return {
        cli_docs.PAGE: cli_docs.render(),
        validate_docs.PAGE: validate_docs.render(validate_docs.PAGE.read_text(encoding="utf-8")),
        module_map.DESIGN: module_map.render_design(module_map.DESIGN.read_text(encoding="utf-8")),
        module_map.MODULES: module_map.render_modules(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
