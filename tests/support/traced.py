"""A torch module of the product's custom ops as ONNX Runtime runs it."""

from __future__ import annotations

import warnings
from typing import Any

import onnxruntime
import torch
from omniport.export.graphs.translations import translations


def traced_session(
    module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], dynamic: tuple[Any, ...]
) -> onnxruntime.InferenceSession:
    """Its graph, of opset 18, on the CPU.

    Args:
        arguments: examples. dynamic: of each, axis -> dimension, or None.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        program = torch.onnx.export(
            module.eval(),
            arguments,
            dynamic_shapes=dynamic,
            dynamo=True,
            opset_version=18,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
