"""Charts, spectrograms and sounds of a report as data URIs, so that its page needs no other file and no network."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.system.files import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OK, _BAD, _LIMIT = "#2b6cb0", "#c53030", "#718096"
_FLOOR_DB = 80.0  # dynamic range shown


def bars(labels: Sequence[str], values: Sequence[float], limits: Sequence[float], axis: str) -> str:
    """Error by case: a bar each on a logarithmic axis, its limit as a mark. SVG.

    Values that are not finite fill the axis; a difference of 0 has no bar and is called exact.
    """
    from matplotlib.ticker import NullFormatter

    finite = [value for value in (*values, *limits) if np.isfinite(value) and value > 0]
    low = 10.0 ** np.floor(np.log10(min(finite)) - 1) if finite else 1e-9
    high = 10.0 ** np.ceil(np.log10(max(finite)) + 0.3) if finite else 1.0
    chart = figure(8.4, 0.6 + 0.22 * len(labels))
    axes = chart.add_subplot()
    rows = np.arange(len(labels))
    shown = [min(max(value, low), high) if np.isfinite(value) else high for value in values]
    colours = [_OK if value <= bound else _BAD for value, bound in zip(values, limits, strict=True)]
    axes.barh(rows, [v - low for v in shown], left=low, color=colours, height=0.6)
    axes.plot(limits, rows, "|", color=_LIMIT, markersize=9, markeredgewidth=2)
    for row, value in zip(rows, values, strict=True):
        if value == 0:
            axes.annotate(
                "exact", (low, row), (4, 0), textcoords="offset points", fontsize=7, va="center", color=_LIMIT
            )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(rows, labels)
    plain(axes, axis, "")
    return svg(chart)


def layers(name: str, points: Sequence[int], values: Sequence[float], limits: Sequence[float], axis: str) -> str:
    """Error after every layer on a logarithmic axis, with the limit as a dashed line. SVG."""
    from matplotlib.ticker import MaxNLocator

    chart = figure(8.4, 2.4)
    axes = chart.add_subplot()
    finite = [value if np.isfinite(value) and value > 0 else np.nan for value in values]
    axes.plot(points, finite, "o-", color=_OK, markersize=4, linewidth=1.2, label="error")
    axes.plot(points, limits, "--", color=_LIMIT, linewidth=1.2, label="limit")
    beyond = [(p, v) for p, v, bound in zip(points, values, limits, strict=True) if not v <= bound]
    if beyond:
        top = max([v for v in (*values, *limits) if np.isfinite(v)], default=1.0)
        axes.plot(
            [p for p, _ in beyond],
            [v if np.isfinite(v) else top for _, v in beyond],
            "o",
            color=_BAD,
            markersize=5,
            label="beyond the limit",
        )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False, loc="best")
    plain(axes, f"layer of {name}", axis)
    return svg(chart)


def spectrograms(sounds: Mapping[str, NDArray[np.float32]], rate: int) -> str:
    """The picture of `spectrogram_figure` as a data URI (PNG)."""
    return _uri("image/png", _saved(spectrogram_figure(sounds, rate), "png", dpi=150, transparent=True))


def spectrogram_figure(sounds: Mapping[str, NDArray[np.float32]], rate: int) -> Figure:
    """Spectrograms of waveforms float32 [n] side by side, in dB below the loudest of all.

    Args:
        sounds: title -> samples; values that are not finite are shown as silence.
        rate: samples a second.
    """
    size, hop = 512, 128
    pictures = {t: _spectrogram(np.nan_to_num(s, posinf=0, neginf=0), size, hop) for t, s in sounds.items()}
    top = max((float(picture.max()) for picture in pictures.values() if picture.size), default=0.0)
    chart = figure(8.4, 2.2)
    grid = chart.subplots(1, len(pictures), sharey=True, squeeze=False)[0]
    for axes, (title, picture) in zip(grid, pictures.items(), strict=True):
        extent = (0.0, picture.shape[1] * hop / rate, 0.0, rate / 2000)
        axes.imshow(picture, origin="lower", aspect="auto", extent=extent, vmin=top - _FLOOR_DB, vmax=top, cmap="magma")
        axes.set_title(title, fontsize=9, color=_LIMIT)
        plain(axes, "seconds", "kHz" if axes is grid[0] else "")
        axes.tick_params(colors=_LIMIT)
        axes.spines[:].set_color(_LIMIT)
        for part in (axes.xaxis.label, axes.yaxis.label):
            part.set_color(_LIMIT)
    return chart


def sound_uri(samples: NDArray[np.float32], rate: int) -> str:
    """A WAV file of waveform float32 [n] in -1..1, as a data URI."""
    return _uri("audio/wav", wav_file(samples, rate))


def wav_file(samples: NDArray[np.float32], rate: int) -> bytes:
    """A 16-bit WAV file of waveform float32 [n] in -1..1."""
    clipped = np.clip(np.nan_to_num(samples, posinf=1, neginf=-1), -1, 1)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((clipped * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


def _spectrogram(samples: NDArray[np.float32], size: int, hop: int) -> NDArray[np.float64]:
    """Power in dB [size / 2 + 1, frames] under a Hann window."""
    padded = np.pad(samples, (size // 2, size // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=-1)) ** 2
    decibels: NDArray[np.float64] = 10 * np.log10(power.T + 1e-12)
    return decibels


def figure(width: float, height: float) -> Figure:
    """An empty picture, in inches."""
    # no pyplot: its figures live until they are closed, and it looks for a display
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, x: str, y: str) -> None:
    """Label the axes and remove the frame."""
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def svg(chart: Figure) -> str:
    """A picture as a data URI, without a ground: pages are light or dark."""
    return _uri("image/svg+xml", _saved(chart, "svg", transparent=True))


def write(chart: Figure, path: Path) -> None:
    """Write a picture as .svg or .png, by the file's suffix.

    Raises:
        UsageError: the file cannot be written.
    """
    write_output(path, _saved(chart, path.suffix[1:], dpi=120))


def _saved(chart: Figure, kind: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # a fixed salt and no date: the same report gives the same bytes
    with rc_context({"svg.hashsalt": "omniport"}):
        chart.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    return buffer.getvalue()


def _uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
