"""Measure forms of the vocoder's activation; writes docs/results/activation-forms.json and its page.

    python -m benchmarks.activation_forms [--frames 24,250] [--rounds 15]

Graphs of two activations (2x up, u + sin^2(alpha u) / beta, 2x down) at the six widths of BigVGAN, on one thread of
ONNX Runtime. All forms take turns, and seconds are those of the processor, which other programs disturb little.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import Chebyshev
from omniport.export.models.bigvgan import polyphase
from omniport.export.models.ops import CURVE, CURVE_FACTOR
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.system.host import cpu_name

from benchmarks.form_runs import Array, GraphMaker, in_turns
from benchmarks.harness import command_line, record, table

#: channels, steps a frame
WIDTHS = ((768, 5), (384, 15), (192, 30), (96, 60), (48, 120), (24, 240))
_END = 2**62
_FILTERS = {name: taps.numpy().reshape(-1) for name, taps in polyphase(1).items()}
#: of the upsampled signal's even samples and its odd ones
_EVEN, _ODD = _FILTERS["up_even"], _FILTERS["up_odd"]
_DOWN = np.stack((_FILTERS["down_even"], _FILTERS["down_odd"]))
#: a convolution that pads one row above and one below gives its first output row from its last row of weights
_UP = np.stack((_ODD, _EVEN))


@dataclass(frozen=True)
class _Snake:
    """A graph and an activation's parameters [C]: u + inverse_beta * sin^2(alpha u)."""

    graph: GraphMaker
    alpha: Array
    inverse_beta: Array
    #: constants are [C * phases, 1, ...] with so many ones
    phases: int = 1
    ones: int = 2

    def constant(self, values: Array) -> str:
        repeated = np.repeat(values, self.phases)
        return self.graph.floats(repeated.reshape(-1, *[1] * self.ones))


# A form of the sine: from v = rate * u, where u is the upsampled signal, and it has a factor that the filter behind
# divides out, to rate * (u + inverse_beta * sin^2(alpha u)), up to a constant that is the filter's bias.
_Curve = Callable[[_Snake, str], str]


def _plain(snake: _Snake, v: str) -> str:
    """Rate 1: as it is written."""
    graph = snake.graph
    sine = graph("Sin", graph("Mul", v, snake.constant(snake.alpha)))
    return graph("Add", v, graph("Mul", snake.constant(snake.inverse_beta), graph("Mul", sine, sine)))


def _sine(snake: _Snake, v: str) -> str:
    """Rate alpha."""
    graph = snake.graph
    sine = graph("Sin", v)
    factor = snake.constant(snake.alpha * snake.inverse_beta)
    return graph("Add", v, graph("Mul", graph("Mul", sine, sine), factor))


def _cosine(snake: _Snake, v: str) -> str:
    """Rate 2 alpha: sin^2(x) = 1/2 - cos(2x) / 2."""
    graph = snake.graph
    factor = snake.constant(-snake.alpha * snake.inverse_beta)
    return graph("Add", v, graph("Mul", graph("Cos", v), factor))


def _rounded(snake: _Snake, v: str, degree: int) -> str:
    """Rate alpha / pi: whole periods taken off by Round, and an odd polynomial."""
    graph = snake.graph
    left = graph("Sub", v, graph("Round", v))
    coefficients = _fit(lambda t: np.sin(np.pi * t) / t, np.sqrt, 1 / 4, (degree + 1) // 2)
    sine = _odd(snake, left, coefficients, np.sqrt(snake.alpha * snake.inverse_beta / math.pi))
    return graph("Add", v, graph("Mul", sine, sine))


def _floored(snake: _Snake, v: str, degree: int) -> str:
    """Rate alpha / pi: whole periods taken off by Floor, and a polynomial of q = r (1 - r) without a constant."""
    graph = snake.graph
    left = graph("Sub", v, graph("Floor", v))
    q = graph("Sub", left, graph("Mul", left, left))

    def ratio(r: Array) -> Array:
        return np.asarray(np.sin(np.pi * r) ** 2 / (r * (1 - r)))

    coefficients = _fit(ratio, lambda q: (1 - np.sqrt(1 - 4 * q)) / 2, 1 / 4, degree)
    factor = snake.alpha * snake.inverse_beta / math.pi
    y = graph("Mul", q, snake.constant(coefficients[-1] * factor))
    for coefficient in coefficients[-2::-1]:
        y = graph("Mul", graph("Add", y, snake.constant(coefficient * factor)), q)
    return graph("Add", v, y)


def _triangle(snake: _Snake, v: str, degree: int) -> str:
    """Rate alpha / pi: sin^2 = 1/2 - sin(2 pi s) / 2 of a triangle s, and an odd polynomial."""
    graph = snake.graph
    left = graph("Sub", v, graph("Floor", v))
    s = graph("Sub", graph("Abs", graph("Sub", left, graph.floats(0.5))), graph.floats(0.25))
    coefficients = _fit(lambda s: np.sin(2 * np.pi * s) / s, np.sqrt, 1 / 16, (degree + 1) // 2)
    return graph("Add", v, _odd(snake, s, coefficients, -snake.alpha * snake.inverse_beta / (2 * math.pi)))


def _doubled(snake: _Snake, v: str) -> str:
    """Rate 1: whole periods taken off by Round, a polynomial of half the angle, and that doubled."""
    graph = snake.graph
    turned = graph("Mul", v, snake.constant(snake.alpha / math.pi))
    left = graph("Sub", turned, graph("Round", turned))
    z = graph("Mul", left, left)
    first, *middle, top = (graph.floats(value) for value in CURVE)
    y = graph("Add", z, first)
    for coefficient in middle:
        y = graph("Add", graph("Mul", y, z), coefficient)
    q = graph("Mul", y, z)
    curve = graph("Mul", q, graph("Sub", top, q))
    return graph("Add", v, graph("Mul", curve, snake.constant(CURVE_FACTOR * snake.inverse_beta)))


def _odd(snake: _Snake, x: str, coefficients: Sequence[float], factor: Array) -> str:
    graph = snake.graph
    square = graph("Mul", x, x)
    y = graph("Mul", square, snake.constant(coefficients[-1] * factor))
    for coefficient in coefficients[-2:0:-1]:
        y = graph("Mul", graph("Add", y, snake.constant(coefficient * factor)), square)
    return graph("Mul", graph("Add", y, snake.constant(coefficients[0] * factor)), x)


def _fit(ratio: Callable[[Array], Array], back: Callable[[Array], Array], end: float, terms: int) -> list[float]:
    """A polynomial in z from 0 to ``end``, constant first, near ratio(back(z))."""
    z = end / 2 * (1 + np.cos(np.pi * (np.arange(400) + 0.5) / 400))
    fitted = Chebyshev.fit(z, ratio(back(z)), terms - 1, domain=[0, end])
    return [float(value) for value in fitted.convert(kind=Polynomial).coef]


def _channels(snake: _Snake, x: str, curve: _Curve, rate: Array, bias: str = "") -> str:
    """Phases as channels of one-dimensional convolutions: [1, C, T] -> [1, C, T]."""
    graph = snake.graph
    ends = graph.integers(0, 0, 3, 0, 0, 3)
    v = _convolved(graph, graph("Pad", x, ends, mode="edge"), _two_phases(rate), len(rate))
    g = curve(snake, v)
    return _convolved(graph, _repeated(graph, g, g, g, len(rate)), _DOWN / rate[:, None, None], len(rate), bias)


def _apart(snake: _Snake, x: str, curve: _Curve, rate: Array) -> str:
    """The same, without a copy of the signal for Pad: both ends are computed once more."""
    graph = snake.graph

    def curved(part: str) -> str:
        return curve(snake, _convolved(graph, part, _two_phases(rate), len(rate)))

    first = graph("Pad", _slice(graph, x, 0, 6, 2), graph.integers(0, 0, 3, 0, 0, 0), mode="edge")
    last = graph("Pad", _slice(graph, x, -6, _END, 2), graph.integers(0, 0, 0, 0, 0, 3), mode="edge")
    first, middle, last = curved(first), curved(x), curved(last)
    whole = graph("Concat", first, middle, last, axis=2)
    return _convolved(graph, _repeated(graph, first, whole, last, len(rate)), _DOWN / rate[:, None, None], len(rate))


def _two_phases(rate: Array) -> Array:
    return (np.stack((_EVEN, _ODD)) * rate[:, None, None]).reshape(-1, 1, 7)


def _repeated(graph: GraphMaker, first: str, whole: str, last: str, count: int) -> str:
    """The signal with its first sample, an even one, and its last, an odd one, three times more in both phases."""
    even, odd = (graph.integers(*(2 * np.arange(count).repeat(2) + phase)) for phase in (0, 1))
    before = graph("Gather", _slice(graph, first, 0, 1, 2), even, axis=1)
    after = graph("Gather", _slice(graph, last, -1, _END, 2), odd, axis=1)
    return graph("Concat", *[before] * 3, whole, *[after] * 3, axis=2)


def _tensors(snake: _Snake, x: str, curve: _Curve, rate: Array, early: bool = False) -> str:
    """A tensor of one row for each phase: [1, C, 1, T] -> [1, C, 1, T]. ``early``: the ends come before the curve."""
    graph = snake.graph
    padded = graph("Pad", x, graph.integers(0, 0, 0, 3, 0, 0, 0, 3), mode="edge")
    scale = rate[:, None, None, None]
    phases = [_convolved(graph, padded, taps * scale, len(rate)) for taps in (_EVEN, _ODD)]
    if not early:
        phases = [curve(snake, phase) for phase in phases]
    before, after = _slice(graph, phases[0], 0, 1, 3), _slice(graph, phases[1], -1, _END, 3)
    sums = []
    for taps, phase in zip(_DOWN, phases, strict=True):
        whole = graph("Concat", *[before] * 3, phase, *[after] * 3, axis=3)
        sums.append(_convolved(graph, curve(snake, whole) if early else whole, taps / scale, len(rate)))
    return graph("Add", *sums)


def _rows(snake: _Snake, x: str, curve: _Curve, rate: Array) -> str:
    """Phases as two rows: [1, C, 1, T] -> [1, C, 1, T]."""
    graph = snake.graph
    padded = graph("Pad", x, graph.integers(0, 0, 0, 3, 0, 0, 0, 3), mode="edge")
    scale = rate[:, None, None, None]
    g = curve(snake, _convolved(graph, padded, _UP * scale, len(rate), pads=[1, 0, 1, 0]))
    axes = graph.integers(2, 3)
    before = graph("Slice", g, graph.integers(0, 0), graph.integers(1, 1), axes)
    after = graph("Slice", g, graph.integers(-1, -1), graph.integers(_END, _END), axes)
    before, after = graph("Concat", before, before, axis=2), graph("Concat", after, after, axis=2)
    return _convolved(graph, graph("Concat", *[before] * 3, g, *[after] * 3, axis=3), _DOWN / scale, len(rate))


def _convolved(graph: GraphMaker, x: str, weight: Array, count: int, bias: str = "", **attributes: Any) -> str:
    extra = (bias,) if bias else ()
    return graph("Conv", x, graph.floats(weight), *extra, group=count, **attributes)


def _slice(graph: GraphMaker, x: str, start: int, end: int, axis: int) -> str:
    return graph("Slice", x, graph.integers(start), graph.integers(end), graph.integers(axis))


@dataclass(frozen=True)
class _Form:
    """A layout of the phases, a curve, the factor of alpha in its rate (0: a rate of 1), of 1 / beta in a bias."""

    layout: Callable[..., str]
    curve: _Curve
    factor: float = 1.0
    bias: float = 0.0

    def run(self, channels: int, steps: int) -> Callable[[], Array]:
        """A function that runs two activations and adds what went in: [1, C, T] -> [1, C, T]."""
        rng = np.random.default_rng(1)
        alpha, inverse_beta = np.exp(rng.normal(0, 0.3, (2, channels)))
        graph = GraphMaker()
        snake = _Snake(graph, alpha, inverse_beta)
        flat = self.layout in (_channels, _apart)
        if flat:
            snake = _Snake(graph, alpha, inverse_beta, phases=2, ones=1)
        rate = self.factor * alpha if self.factor else np.ones(channels)
        whole = graph.input("x", 1, channels, "steps")
        x = entered = whole if flat else graph("Unsqueeze", whole, graph.integers(2))
        for _ in range(2):
            extra = (graph.floats(self.bias * inverse_beta),) if self.bias else ()
            x = self.layout(snake, x, self.curve, rate, *extra)
        x = graph("Add", x, entered)
        graph.outputs.append(x if flat else graph("Squeeze", x, graph.integers(2)))
        session = graph.session()
        feed = np.random.default_rng(2).standard_normal((1, channels, steps), np.float32)
        return lambda: np.asarray(session.run(None, {"x": feed})[0])


_TURN = 1 / math.pi
FORMS = {
    "phases as channels, Sin": _Form(_channels, _plain, factor=0),
    "the same, alpha in the filters' weights": _Form(_channels, _sine),
    "the same, ends computed apart instead of Pad": _Form(_apart, _sine),
    "the same, cosine of the double angle": _Form(_channels, _cosine, 2, 1 / 2),
    "the same, Round and an odd polynomial of degree 7": _Form(_channels, partial(_rounded, degree=7), _TURN),
    "the same, of degree 9": _Form(_channels, partial(_rounded, degree=9), _TURN),
    "the same, Floor and a polynomial of r (1 - r), degree 5": _Form(_channels, partial(_floored, degree=5), _TURN),
    "the same, a triangle by Floor and Abs, and degree 7": _Form(_channels, partial(_triangle, degree=7), _TURN, 1 / 2),
    "phases as rows, Sin": _Form(_rows, _sine),
    "phases as rows, Round and degree 7": _Form(_rows, partial(_rounded, degree=7), _TURN),
    "phases as rows, Round and degree 9": _Form(_rows, partial(_rounded, degree=9), _TURN),
    "phases as two tensors, Sin": _Form(_tensors, _sine),
    "phases as two tensors, Round and degree 9": _Form(_tensors, partial(_rounded, degree=9), _TURN),
    "phases as two tensors, half the angle doubled": _Form(_tensors, _doubled, factor=0),
    "the same, ends before the curve (the graph)": _Form(partial(_tensors, early=True), _doubled, factor=0),
}


def measure(options: argparse.Namespace, found: Any) -> Iterator[dict[str, Any]]:
    """Everything that the page shows: for each form the seconds of all widths, and the largest error of any."""
    rows: dict[str, Any] = {name: {"seconds": {}, "error": 0.0} for name in FORMS}
    for frames in map(int, options.frames.split(",")):
        for channels, rate in WIDTHS:
            runs = {name: form.run(channels, frames * rate) for name, form in FORMS.items()}
            for name, row in in_turns(runs, options.rounds).items():
                seconds = rows[name]["seconds"]
                seconds[str(frames)] = seconds.get(str(frames), 0.0) + row["seconds"]
                rows[name]["error"] = max(rows[name]["error"], row["error"])
    yield {
        "version": import_onnxruntime().__version__,
        "processor": cpu_name(),
        "rounds": options.rounds,
        "forms": rows,
    }


def page(found: dict[str, Any]) -> str:
    """docs/results/activation-forms.md."""
    about = (
        f"ONNX Runtime {found['version']} on one thread of {found['processor']}, in turns in one process: milliseconds "
        "of the processor for two activations at each of the six widths, the least at each width of "
        f"{found['rounds']} rounds. Error: the largest difference to the first form's result."
    )
    base = next(iter(found["forms"].values()))["seconds"]
    rows = []
    for name, row in found["forms"].items():
        cells = [
            cell
            for frames, seconds in row["seconds"].items()
            for cell in (f"{1e3 * seconds:.1f}", f"{base[frames] / seconds:.2f}")
        ]
        rows.append((name, *cells, f"{row['error']:.0e}"))
    columns = [title for frames in base for title in (f"{frames} frames, ms", "times as fast")]
    lines = [
        "# Forms of the vocoder's activation",
        "",
        "Made by `python -m benchmarks.activation_forms` from activation-forms.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
        "",
        *table(("form", *columns, "error"), rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, and measure."""
    parser = command_line(__doc__)
    parser.add_argument("--frames", default="24,250")
    parser.add_argument("--rounds", type=int, default=15)
    record("activation-forms", page, measure, parser)


if __name__ == "__main__":
    main()
