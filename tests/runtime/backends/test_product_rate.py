"""How fast products can be on this processor, by whichever of two libraries knows it better."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from omniport.runtime.backends.onnxruntime import product_rate
from omniport.runtime.errors import BackendError
from omniport.runtime.system import rates


def test_the_graph_is_a_product() -> None:
    model = onnx.load_from_string(product_rate.PRODUCT)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, *node.input, *node.output) == ("MatMul", "a", "b", "y")
    session = onnxruntime.InferenceSession(product_rate.PRODUCT, providers=["CPUExecutionProvider"])
    a, b = np.eye(2, dtype=np.float32)[::-1], np.asarray([[1, 2], [3, 4]], np.float32)
    assert session.run(None, {"a": a, "b": b})[0].tolist() == [[3, 4], [1, 2]]


@pytest.mark.parametrize(("blas", "rate"), [(1e9, 4e9), (9e9, 9e9)])
def test_the_better_of_both_counts(monkeypatch: pytest.MonkeyPatch, blas: float, rate: float) -> None:
    """A product of 1,000 by 1,000 takes half a second here: 4 billion operations a second."""
    monkeypatch.setattr(rates, "product_rate", lambda *_: blas)
    clock = iter(np.arange(0, 100, 0.5))
    assert product_rate.product_rate(1, tries=2, side=1000, clock=lambda: float(next(clock))) == rate


def test_without_onnxruntime_it_is_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BackendError("onnxruntime is not installed")

    monkeypatch.setattr(product_rate, "import_onnxruntime", missing)
    assert product_rate.product_rate(1, tries=1, side=64) > 0
