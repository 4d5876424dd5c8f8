"""Decoders for OpenVINO: the KV cache becomes variables, in the form that its CPU plugin appends to in place.

The plugin fuses ReadValue, Gather (by sequence), Concat, a broadcast over the query heads and attention into one
operator, which keeps room behind the rows and writes new ones there. So TensorScatter, which OpenVINO does not know,
becomes a concatenation, and Attention is converted here without the slice in front of it: what the variables hold is
the live part of the cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...bundle.graph_spec import GraphSpec

#: input that picks the sequence of each row, of which a conversation has one: number 0
SEQUENCE = "sequence"


def extensions(module: Any) -> Iterator[Any]:
    """What OpenVINO's ONNX frontend makes of the operators of decoders.

    Args:
        module: openvino.
    """
    frontend = importlib.import_module("openvino.frontend.onnx")
    yield frontend.ConversionExtension("TensorScatter", _scatter(module.opset15))
    yield frontend.ConversionExtension("Attention", _attention(module.opset15))


def keep_state(model: Any, spec: GraphSpec, module: Any) -> None:
    """Turn a decoder's cache inputs and outputs into variables, which are empty at first."""
    passes, ops = importlib.import_module("openvino.passes"), module.opset15
    model.reshape({name: _open_ended(spec, name, module) for name in spec.cache})
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(spec.cache))
    manager.run_passes(model)
    sequence = ops.parameter([-1], np.int32, name=SEQUENCE)
    sequence.output(0).set_names({SEQUENCE})
    for node in list(model.get_ops()):
        if node.get_type_name() != "ReadValue":
            continue
        readers = list(node.output(0).get_target_inputs())
        picked = ops.gather(node, sequence, ops.constant(np.int32(0)))
        for reader in readers:
            reader.replace_source_output(picked.output(0))
        shape = node.get_output_partial_shape(0)
        heads, width = (ops.constant(np.asarray([shape[axis].get_length()], np.int64)) for axis in (1, 3))
        count = ops.shape_of(sequence, "i64")
        # A plain 0 would be taken for the length that the variable always has.
        empty = ops.concat([count, heads, ops.subtract(count, count), width], 0)
        zero = ops.constant(0, node.get_output_element_type(0))
        node.set_arguments([ops.broadcast(zero, empty).output(0)])
    model.add_parameters([sequence])
    model.validate_nodes_and_infer_types()


def _open_ended(spec: GraphSpec, name: str, module: Any) -> Any:
    return module.PartialShape([size if isinstance(size, int) else -1 for size in spec.input(name).shape])


def _scatter(ops: Any) -> Callable[[Any], list[Any]]:
    """``past`` is the live part of the cache, so the new rows come behind it."""

    def convert(node: Any) -> list[Any]:
        if node.get_attribute("mode", "linear") != "linear" or node.get_attribute("axis", -2) not in (-2, 2):
            raise RuntimeError("TensorScatter of another kind")
        return [ops.concat([node.get_input(0), node.get_input(1)], 2).output(0)]

    return convert


def _attention(ops: Any) -> Callable[[Any], list[Any]]:
    def convert(node: Any) -> list[Any]:
        queries, mask = node.get_input(0), node.get_input(3)
        keys, values = (_whole(node.get_input(index)) for index in (1, 2))
        heads, width = (queries.get_partial_shape()[axis].get_length() for axis in (1, 3))
        shared = heads // keys.get_partial_shape()[1].get_length()

        def spread(rows: Any) -> Any:
            """[B, Hkv, L, D] for each query head: [B, H, L, D]."""
            if shared == 1:
                return rows
            rows = ops.unsqueeze(rows, ops.constant(np.asarray([2], np.int64)))
            times = ops.constant(np.asarray([1, 1, shared, 1, 1], np.int64))
            rows = ops.broadcast(rows, times, broadcast_spec="BIDIRECTIONAL")
            return ops.reshape(rows, ops.constant(np.asarray([0, heads, -1, width], np.int64)), special_zero=True)

        scale = ops.convert_like(ops.constant(np.float32(node.get_attribute("scale"))), queries)
        made = ops.scaled_dot_product_attention(queries, spread(keys), spread(values), mask, scale)
        return [made.output(0)]

    return convert


def _whole(rows: Any) -> Any:
    """What is sliced to the live part of the cache, which it is already."""
    node = rows.get_node()
    if node.get_type_name() != "Slice" or node.input_value(0).get_node().get_type_name() != "Concat":
        return rows
    return node.input_value(0)
