"""Trace a graph on the meta device (names, shapes and operators, no weights), and cache the result.

A traced graph depends on the model's geometry and on this package's code only, so it is kept in a cache folder: a
fine-tune of a model that was exported before is not traced again. ``OMNIPORT_CACHE`` names the folder
(``~/.cache/omniport`` by default; empty switches the cache off).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
import torch
from omniport.runtime.bundle.graph_spec import TensorSpec
from omniport.runtime.system.files import cache_folder, replace_file
from torch.export import Dim

from ..models.module import Constant, Rule
from ..models.part import GraphDefinition
from ..source_code import json_key, tracing_key
from .lowering import OPSETS, lowered_translations
from .passes import FOLD_BYTES, finish
from .translations import translations


def trace(definition: GraphDefinition) -> tuple[ir.Model, dict[str, Rule]]:
    """The finished graph of a definition, without weights.

    Returns:
        the model, whose initializers with a rule have no data yet, and those rules by initializer name.
    """
    module = definition.module()
    rules = dict(module.named_rules(str(module.prefix)))
    path = _cache_path(definition)
    model = _load(path) if path is not None else None
    if model is None:
        model = _trace(definition, module, rules)
        if path is not None:
            _store(model, path)
    return model, {name: rules[name] for name in model.graph.initializers if name in rules}


def _trace(definition: GraphDefinition, module: torch.nn.Module, rules: Mapping[str, Rule]) -> ir.Model:
    sizes = _example_sizes(definition)
    examples = [_example(spec, sizes) for spec in definition.inputs]
    dims = {name: Dim(name) for name in sizes}
    shapes = [_dynamic(spec, dims) for spec in definition.inputs]
    if definition.past:
        n = len(examples) - definition.past
        args, dynamic = (*examples[:n], examples[n:]), (*shapes[:n], shapes[n:])
    else:
        args, dynamic = tuple(examples), tuple(shapes)
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        # Names of shared dimensions and pytree internals: nothing the user can act on.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            args,
            dynamic_shapes=dynamic,
            dynamo=True,
            opset_version=OPSETS[definition.ops],
            optimize=False,
            verbose=False,
            custom_translation_table=translations() if definition.ops == "native" else lowered_translations(),
        )
    assert program is not None
    model = program.model
    for name, value in model.graph.initializers.items():
        # Folding may look at constants of the architecture, never at weights: the result is cached.
        rule = rules.get(name)
        if isinstance(rule, Constant) and rule.value.nbytes <= FOLD_BYTES:
            tensor = ir.tensor(rule.value, name=name)
            value.const_value = tensor if tensor.dtype == value.dtype else None
        elif rule is not None:
            value.const_value = None
    finish(model, definition.inputs, definition.outputs)
    return model


def _cache_path(definition: GraphDefinition) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    key = json_key(
        definition.name,
        definition.precision,
        definition.geometry,
        definition.ops,
        msgspec.to_builtins((definition.inputs, definition.outputs)),
        tracing_key("models", "graphs"),
    )
    return folder / "graphs" / f"{definition.name}-{key[:32]}.onnx"


def _store(model: ir.Model, path: Path) -> None:
    """Keep the graph. A cache that cannot be written is no reason to fail."""
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            value.const_value = ir.ExternalTensor(
                "weights-come-later", 0, 0, value.dtype, shape=_static(value), name=name
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, ir.to_proto(model).SerializeToString())
    except OSError as error:
        logging.getLogger("omniport").info("traced graph not cached in %s: %s", path.parent, error)
    finally:
        for name, value in model.graph.initializers.items():
            value.const_value = held[name]


def _load(path: Path) -> ir.Model | None:
    """The cached graph; None if there is none, or if it cannot be read (it is then traced again)."""
    try:
        model = ir.from_proto(onnx.load_model_from_string(path.read_bytes()))
    except OSError:
        return None
    except Exception:  # noqa: BLE001 - protobuf raises its own types for a damaged file, which is then replaced
        return None
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def _static(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([int(str(dim)) for dim in value.shape])


def _split(dim: int | str) -> tuple[int, str | None]:
    """``"4*units"`` -> (4, "units"); ``"live"`` -> (1, "live"); 80 -> (80, None)."""
    if isinstance(dim, int):
        return dim, None
    factor, star, name = dim.partition("*")
    return (int(factor), name) if star else (1, dim)


def _example_sizes(definition: GraphDefinition) -> dict[str, int]:
    """A size for each symbolic input dimension: distinct and never 0 or 1, which tracing would specialise on."""
    names: dict[str, int] = {}
    for spec in definition.inputs:
        for dim in spec.shape:
            name = _split(dim)[1]
            if name is not None and name not in names:
                names[name] = 3 + 2 * len(names)
    return names


def _example(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [factor * sizes[name] if name else factor for factor, name in map(_split, spec.shape)]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")


def _dynamic(spec: TensorSpec, dims: Mapping[str, Any]) -> dict[int, Any]:
    result = {}
    for axis, (factor, name) in enumerate(map(_split, spec.shape)):
        if name is not None:
            result[axis] = factor * dims[name] if factor > 1 else dims[name]
    return result


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger's warnings for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
