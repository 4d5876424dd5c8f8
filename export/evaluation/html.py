"""The parts that pages are made of: one style, tables, pictures. No script, no network, readable on paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

_WORDS = {"pass": "holds", "fail": "fails", "not_run": "not run"}

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1a202c; background: #fff; max-width: 62rem;
  margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e2e8f0; }
th { border-bottom: 2px solid #a0aec0; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; } td.case { min-width: 11rem; }
td.name, td.number, td.status, th { overflow-wrap: normal; white-space: nowrap; }
code, pre { font: .82rem/1.4 "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7fafc; border: 1px solid #e2e8f0; padding: .5rem; }
.verdict { font-weight: 600; padding: .4rem .7rem; border-left: .4rem solid; margin: .8rem 0; }
.pass { color: #22543d; } .fail { color: #9b2c2c; font-weight: 600; } .not_run { color: #744210; }
.verdict.pass { border-color: #38a169; background: #f0fff4; }
.verdict.fail { border-color: #e53e3e; background: #fff5f5; }
img { width: 100%; height: auto; } figure { margin: .4rem 0 1rem; }
.players { display: flex; gap: .5rem; } .players div { flex: 1; font-size: .8rem; }
audio { width: 100%; height: 2.2rem; }
.quiet { color: #4a5568; font-size: .86rem; }
@page { size: A4; margin: 14mm; }
@media print {
  body { font-size: 9.5pt; margin: 0; max-width: none; padding: 0; }
  audio, .players { display: none; }
  figure, .block { break-inside: avoid; } h2, h3, .quiet { break-after: avoid; } tr { break-inside: avoid; }
  thead { display: table-header-group; } table { font-size: 8pt; } td.case { min-width: 9rem; }
  td code { font-size: 6.8pt; white-space: nowrap; }
}
"""


def page(title: str, body: str) -> str:
    """A whole page; ``title`` is text, ``body`` HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def short(names: Sequence[str]) -> list[str]:
    """Names that fit beside a bar."""
    return [name if len(name) <= 48 else f"{name[:30]}...{name[-15:]}" for name in names]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows are cells as HTML; a heading that begins with ``#`` stands over numbers."""

    def cells() -> Iterator[str]:
        for text in head:
            yield f'<th class="number">{escape(text[1:])}</th>' if text.startswith("#") else f"<th>{escape(text)}</th>"

    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(cells())}</tr></thead><tbody>\n{body}\n</tbody></table>"


def cell(value: object, kind: str = "") -> str:
    """A cell; ``kind`` is a class of the style: number, name or case."""
    text = escape(str(value))
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def code(value: str) -> str:
    """A cell in a fixed-width face."""
    return f"<td><code>{escape(value)}</code></td>"


def status(value: str) -> str:
    """A cell that says how a check ended."""
    return f'<td class="status {value}">{_WORDS.get(value, escape(value))}</td>'


def mark(value: str) -> str:
    """The same within a line."""
    return f'<span class="{value}">{_WORDS.get(value, escape(value))}</span>'


def image(uri: str, alternative: str) -> str:
    """A picture from a data URI."""
    return f'<figure><img src="{uri}" alt="{escape(alternative)}"></figure>'
