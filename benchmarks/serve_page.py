"""docs/results/serve.md: what serve.json holds, beside what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import table

Figures = Mapping[str, Any]
#: of memory, threads and files after many clients, beyond what was there after the first of them
_FLAT = 1.05


def page(found: Figures) -> str:
    """The page."""
    rows = [(title, asked, *_row(found.get(part), read)) for part, title, asked, read in _ASKED]
    lines = [
        "# A server under load",
        "",
        "Made by `python -m benchmarks.serve_load BUNDLE` from serve.json: do not edit by hand. Server and clients",
        "share one machine, over loopback. A listener plays from the first piece of sound on; real-time factors (RTF)",
        "are the listener's: seconds until all was there, for a second of speech.",
        "",
        *table(("what", "asked", "measured", "", "bundle"), rows),
        "",
    ]
    if "rows" in found.get("sessions", {}):
        head = ("at once", "first sound, s", "95th", "RTF", "95th", "underruns", "dry, s")
        names = ("sessions", "first_sound", "first_sound_95", "rtf", "rtf_95", "underruns", "dry_seconds")
        cells = [[_number(row[name]) for name in names] for row in found["sessions"]["rows"]]
        lines += ["## Sessions at once", "", *table(head, cells), ""]
    lines += ["## Machine", ""]
    for part, figures in found.items():
        place = figures["environment"]
        load = " ".join(map(str, place["load_average"]))
        lines.append(f"- {part}: {place['cores']} cores of {place['processor']}, load {load}; {figures['took']:.0f} s")
    return "\n".join([*lines, ""])


def _row(figures: Figures | None, read: Callable[[Figures], tuple[str, bool | None]]) -> tuple[str, str, str]:
    if figures is None:
        return "*not run*", "", ""
    if "failed" in figures:
        return f"failed: {figures['failed']}", "**no**", figures["bundle"]
    told, good = read(figures)
    return told, {True: "yes", False: "**no**", None: ""}[good], figures["bundle"]


def _number(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _sessions(f: Figures) -> tuple[str, bool | None]:
    return f"{f['most_in_time']} (95th of RTF at most 1)", None


def _refusals(f: Figures) -> tuple[str, bool]:
    told = (
        f"of 16 chats {f['answered']} answered, {f['refused']} refused within {f['refused_after']:.2f} s; of 8 "
        f"WebSockets {f['websockets_open']} open, {f['websockets_refused']} refused"
    )
    return told, not f["others"] and not f["without_retry_after"] and f["answered"] + f["refused"] == 16


def _left(f: Figures) -> tuple[str, bool]:
    before, after = f["before"], f["after"]
    told = "; ".join(f"{name} {_size(name, before[name])} → {_size(name, after[name])}" for name in before)
    flat = all(after[name] <= before[name] * _FLAT + (name != "memory") * 2 for name in before)
    return f"{f['clients']} in {f['seconds']:.0f} s: {told}", flat and f["log_lines"] == 0


def _readers(f: Figures) -> tuple[str, bool]:
    told = (
        f"first sound {f['alone']['first_sound']:.2f} s alone, {f['beside']['first_sound']:.2f} s beside three; all "
        f"free {f['settled']:.1f} s after they had left"
    )
    return told, f["settled"] < 10 and f["log_lines"] == 0


def _drain(f: Figures) -> tuple[str, bool]:
    reply = "the reply was cut" if f["cut"] else f"{f['heard']:.1f} s of speech heard"
    told = f"{reply}, WebSocket closed with {f['websocket_code']}, exit {f['exit_code']} after {f['seconds']:.1f} s"
    return told, not f["cut"] and f["websocket_code"] == 1001 and f["exit_code"] == 0


def _kill(f: Figures) -> tuple[str, bool]:
    told = (
        f"ready after {f['ready_after']:.1f} s; the session is {f['resume_refused']}; {f['turns_given_again']} "
        f"messages given again, answered {f['answered_after']:.1f} s after the kill"
    )
    return told, f["resume_refused"] == "session_not_found" and f["status"] in ("completed", "incomplete")


def _overhead(f: Figures) -> tuple[str, bool]:
    told = f"{1000 * f['later']:.1f} ms (median of {f['pairs']} pairs; {f['python']:.3f} s by the API)"
    return told, f["later"] <= 0.02


def _protocol(f: Figures) -> tuple[str, bool]:
    told = f"{100 * f['share']:.2f} % (in {100 * f['coming']:.2f} %, out {100 * f['going']:.2f} %)"
    return told, f["share"] < 0.01


def _imports(f: Figures) -> tuple[str, bool]:
    return f"{f['seconds']:.2f} s, {', '.join(f['brings']) or 'none'}", f["seconds"] < 0.3 and not f["brings"]


def _soak(f: Figures) -> tuple[str, bool]:
    second, last = f["second_quarter"], f["last_quarter"]
    told = "; ".join(f"{name} {_size(name, second[name])} → {_size(name, last[name])}" for name in second)
    flat = f["memory_growth"] < _FLAT - 1 and last["threads"] <= second["threads"] and last["files"] <= second["files"]
    return f"{f['minutes']:g} min, {f['replies']} replies: {told}", flat and f["log_lines"] == 0


def _size(name: str, value: float) -> str:
    return f"{value / (1 << 20):.0f} MiB" if name == "memory" else f"{value:.0f}"


_ASKED: tuple[tuple[str, str, str, Callable[[Figures], tuple[str, bool | None]]], ...] = (
    ("sessions", "spoken replies at once", "until the machine is full", _sessions),
    ("refusals", "more clients than places", "answered, or refused with `retry-after`; none hangs", _refusals),
    ("drops", "clients that connect and are gone", "nothing is left, nothing logged", _left),
    ("cancels", "replies whose clients leave", "nothing is left, nothing logged", _left),
    ("readers", "clients that do not read", "others are served", _readers),
    ("drain", "SIGTERM", "the reply ends, 1001, exit 0", _drain),
    ("kill", "SIGKILL and a new start", "clients go on", _kill),
    ("overhead", "first sound, later than by the Python API", "at most 20 ms", _overhead),
    ("protocol", "protocol, of a core for a session that hears and speaks", "under 1 %", _protocol),
    ("imports", "import of the runtime", "under 0.3 s, nothing of a server", _imports),
    ("soak", "soak", "memory, threads and files flat", _soak),
)
