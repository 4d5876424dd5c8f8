"""KV caches of the OpenVINO backend: states of a compiled decoder, which OpenVINO appends to.

The graph's ``past_*`` inputs and ``present_*`` outputs become variables, and TensorScatter a concatenation: what the
variables hold is the live part of the cache. They belong to a request, so a cache is a request of its own. Whoever
writes below the end has the variables cut first, which copies them once.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from ...bundle.graph_spec import DTYPES, GraphSpec
from ...errors import BackendError, BundleError, OmniportError


class StateCache:
    """KV cache of one decoder.

    Args:
        request: of the compiled decoder, and of this cache alone.
        capacity: tokens at most.
        module: openvino.
    """

    def __init__(self, request: Any, spec: GraphSpec, capacity: int, module: Any) -> None:
        self.capacity, self.request = capacity, request
        self._spec, self._ov, self._length = spec, module, 0
        # The cache is float32 where the graph is not computed in its own type, so this is what the bundle says.
        self._token_bytes = sum(_bytes_per_token(spec, source) for source in spec.cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        return self._length * self._token_bytes

    def rewind(self, tokens: int) -> None:
        """Keep the first ``tokens``, for a call that appends behind them.

        Raises:
            OmniportError: the cache does not hold that many.
        """
        if tokens > self._length:
            raise OmniportError(
                f"write_index is {tokens}, and the KV cache of {self._spec.name!r} holds {self._length} tokens; "
                "at most that many was expected"
            )
        for state in self.request.query_state():
            if tokens == 0:
                state.reset()
            elif state.state.shape[2] > tokens:  # also what a run left behind that was stopped
                state.state = self._cut(state.state, tokens)
        self._length = tokens

    def check_room(self, tokens: int) -> None:
        """BackendError if the cache cannot hold so many tokens."""
        if tokens > self.capacity:
            raise BackendError(
                f"the KV cache of {self._spec.name!r} holds {self.capacity} tokens, and {tokens} were given: shorten "
                "the prompt, or open the session with a larger max_context"
            )

    def grown(self, tokens: int) -> None:
        """A run went well, after which the cache holds so many tokens."""
        self._length = tokens

    def _cut(self, state: Any, tokens: int) -> Any:
        shape = list(state.shape)
        shape[2] = tokens
        kept = self._ov.Tensor(state.element_type, self._ov.Shape(shape))
        self._ov.Tensor(state, self._ov.Coordinate([0] * len(shape)), self._ov.Coordinate(shape)).copy_to(kept)
        return kept


def keep_state(model: Any, spec: GraphSpec, module: Any) -> None:
    """Turn a decoder's cache inputs and outputs into variables, for one conversation (B = 1), empty at first."""
    shapes = {}
    for port in model.inputs:
        tensor = next(tensor for tensor in spec.inputs if tensor.name in port.names)
        dims = [1 if size == "batch" else size if isinstance(size, int) else -1 for size in tensor.shape]
        shapes[port] = module.PartialShape(dims)
    model.reshape(shapes)
    passes = importlib.import_module("openvino.passes")
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(spec.cache))
    manager.run_passes(model)


def scatter_extension(module: Any) -> Any:
    """What OpenVINO's ONNX frontend makes of TensorScatter, which it does not know.

    ``past`` is the live part of the cache, so the new rows come behind it.
    """

    def convert(node: Any) -> list[Any]:
        if node.get_attribute("mode", "linear") != "linear":
            raise RuntimeError("TensorScatter in another mode than 'linear'")
        past, rows = node.get_input(0), node.get_input(1)
        return [module.opset15.concat([past, rows], node.get_attribute("axis", -2)).output(0)]

    return importlib.import_module("openvino.frontend.onnx").ConversionExtension("TensorScatter", convert)


def _bytes_per_token(spec: GraphSpec, source: str) -> int:
    tensor = spec.input(source)
    heads, width = tensor.shape[1], tensor.shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        raise BundleError(f"input {source!r} has shape {tensor.shape}; fixed heads and width were expected")
    return math.prod((heads, width, DTYPES[tensor.dtype]))
