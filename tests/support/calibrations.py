"""A calibration taken from an ONNX bundle: what its products read, and convolutions give, in a few conversations.

It stands in for omniport calibrate where a test only needs honest ranges and factors: values are kept in memory, and
factors come from plain formulas.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.calib.calibration.sites import SitePlan, find_sites
from omniport.calib.calibration_file import Calibration, Header, Site, SiteRecord
from omniport.export.evaluation.conversations import Conversation, standard_conversations
from omniport.export.evaluation.half_emulation import load_copy, open_graph
from omniport.runtime.backends.base import Array, Backend, GraphWrapper, KvCache, Outputs, RunHandle
from omniport.runtime.bundle.graph_spec import GraphSpec, TensorSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.session import OmniSession

#: values of a site that its histogram is taken over
SAMPLE = 200_000


def calibrate_bundle(
    root: Path, names: Sequence[str] = ("text", "audio and image"), *, tokens: int = 8, codes: int = 24
) -> Calibration:
    """Answer built-in conversations over an FP32 bundle."""
    bundle = Bundle.open(root)
    backend = Observer(bundle)
    with tempfile.TemporaryDirectory() as folder, OmniSession(bundle, backend) as session:
        conversations = standard_conversations(Path(folder), names)
        for conversation in conversations:
            _answer(session, conversation, tokens, codes)
        header, sites = {}, {}
        for name, graph in backend.graphs.items():
            rows = [graph.site(index) for index in range(len(graph.listed))]
            sites[name], header[name] = tuple(rows), tuple(row.record for row in rows)
    found = Header(
        fingerprint=bundle.manifest.source.fingerprint,
        data="0" * 64,
        samples=len(conversations),
        seed=0,
        created_by={"tests": "0"},
        graphs=header,
    )
    return Calibration(found, sites)


def _answer(session: OmniSession, conversation: Conversation, tokens: int, codes: int) -> None:
    thinker = replace(session.manifest.thinker_sampling, temperature=0.0, max_new_tokens=tokens)
    talker = session.manifest.talker_sampling
    assert talker is not None
    talker = replace(talker, max_new_tokens=codes)
    for _ in session.reply(conversation.messages(), speak=True, thinker=thinker, talker=talker):
        pass


class Observer(Backend):
    """A backend over copies of the graphs that also give what their sites were."""

    name = "ort-cpu"

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.graphs: dict[str, ObservedGraph] = {}

    def graph(self, name: str) -> ObservedGraph:
        if name not in self.graphs:
            self.graphs[name] = ObservedGraph(self._bundle, self._bundle.manifest.graphs[name])
        return self.graphs[name]

    def close(self) -> None:
        pass


class ObservedGraph(GraphWrapper):
    def __init__(self, bundle: Bundle, spec: GraphSpec) -> None:
        path = bundle.path(spec.file)
        self._folder = path.parent
        model, spec = load_copy(path, spec, emulate=False)
        self._model = model
        self.listed = _sites(spec.name, model)
        outputs = []
        for index, (value, _) in enumerate(self.listed):
            node = ir.node("Identity", [value], name=f"seen/{index}")
            out = node.outputs[0]
            out.name, out.dtype = f"seen_{index}", ir.DataType.FLOAT
            out.shape = value.shape
            model.graph.append(node)
            model.graph.outputs.append(out)
            outputs.append(TensorSpec(f"seen_{index}", "float32", ()))
        self.spec = replace(spec, outputs=(*spec.outputs, *outputs))
        super().__init__(open_graph(model, self.spec, path.parent, 2))
        self._tops: list[NDArray[Any] | None] = [None] * len(self.listed)
        self._means: list[list[NDArray[Any]]] = [[] for _ in self.listed]
        self._values: list[list[NDArray[Any]]] = [[] for _ in self.listed]
        self._counts = [0] * len(self.listed)
        self._rng = np.random.default_rng(0)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        outputs = super().run(feeds, cache, handle)
        for index, (_, plan) in enumerate(self.listed):
            self._see(index, outputs.pop(f"seen_{index}"), plan.axis)
        return outputs

    def _see(self, index: int, values: NDArray[np.float32], axis: int) -> None:
        size = np.abs(values)
        channels = np.moveaxis(size, axis, 0).reshape(values.shape[axis], -1)
        top, known = channels.max(axis=1), self._tops[index]
        self._tops[index] = top if known is None else np.maximum(known, top)
        self._means[index].append(channels.mean(axis=1))
        flat = size.reshape(-1)
        self._values[index].append(flat if flat.size <= 4096 else self._rng.choice(flat, 4096))
        self._counts[index] += flat.size

    def site(self, index: int) -> Site:
        _, plan = self.listed[index]
        top, values = self._tops[index], np.concatenate(self._values[index])[:SAMPLE]
        assert top is not None
        highest = float(top.max())
        hist, _ = np.histogram(values, 2048, (0, highest or 1.0))
        record = SiteRecord(
            weights=tuple(weight.name for weight in plan.weights),
            kind=plan.kind,
            count=self._counts[index],
            clips={
                "max": highest,
                "percentile": float(np.quantile(values, 0.9999)),
                "entropy": float(np.quantile(values, 0.999)),
                "mse": _least_error(values, highest),
            },
            output=plan.output,
        )
        arrays: dict[str, Array] = {"absmax": top.astype(np.float32), "hist": hist.astype(np.int64)}
        if plan.kind == "matmul":
            arrays |= self._factors(top, np.mean(self._means[index], axis=0), record.weights)
        return Site(record, arrays)

    def _factors(self, top: Array, mean: Array, weights: Sequence[str]) -> dict[str, Array]:
        matrix = np.concatenate([self._read(weight) for weight in weights], axis=1)
        rows = np.maximum(np.abs(matrix).max(axis=1), 1e-5)
        found = {"smooth": np.sqrt(np.maximum(top, 1e-5) / rows)}
        for block in (32, 128):
            if len(matrix) % block == 0:
                found[f"awq-{block}"] = _awq(matrix[:, :256], mean, block)
        return {name: (array / np.sqrt(array.max() * array.min())).astype(np.float32) for name, array in found.items()}

    def _read(self, name: str) -> NDArray[np.float32]:
        tensor = self._model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        start = (tensor.offset or 0) // 4
        whole = np.memmap(self._folder / tensor.location, np.float32, "r")
        return np.array(whole[start : start + tensor.size]).reshape(tensor.shape.numpy())


def _awq(matrix: Array, mean: Array, block: int) -> NDArray[Any]:
    """The power of the mean magnitudes that rounds with the least error of the product."""
    best: tuple[float, NDArray[Any]] = (np.inf, np.ones(len(mean)))
    for power in np.linspace(0, 1, 11):
        factors = np.maximum(mean, 1e-5) ** power
        scaled = matrix * factors[:, None]
        groups = scaled.reshape(-1, block, scaled.shape[1])
        step = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / 7, 1e-9)
        back = (np.clip(np.rint(groups / step), -8, 7) * step).reshape(scaled.shape) / factors[:, None]
        error = float((((back - matrix) * mean[:, None]) ** 2).sum())
        best = min(best, (error, factors), key=lambda pair: pair[0])
    return best[1]


def _least_error(values: Array, highest: float) -> float:
    """The range whose 127 steps lose the least."""

    def error(top: float) -> float:
        step = top / 127
        return float(((np.minimum(np.rint(values / step), 127) * step - values) ** 2).sum())

    return float(min((highest * part for part in np.linspace(0.3, 1, 29)), key=error)) if highest else 0.0


def _sites(graph: str, model: ir.Model) -> list[tuple[ir.Value, SitePlan]]:
    """(value, site that it is)."""
    found = []
    for plan in find_sites(graph, model):
        node = next(iter(model.graph.initializers[plan.weights[0].name].uses())).node
        value = node.outputs[0] if plan.output else node.inputs[0]
        assert value is not None
        found.append((value, plan))
    return found
