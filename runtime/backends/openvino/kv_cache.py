"""KV caches of the OpenVINO backend: variables of a compiled decoder (`stateful_decoder`), which OpenVINO appends to.

They belong to a request, so a cache is a request of its own. Whoever writes below the end has the variables cut first,
which copies them once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...bundle.graph_spec import DTYPES, GraphSpec
from ...errors import BackendError, BundleError, OmniportError
from .stateful_decoder import SEQUENCE


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
        request.set_tensor(SEQUENCE, module.Tensor(np.zeros(1, np.int32)))
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


def _bytes_per_token(spec: GraphSpec, source: str) -> int:
    tensor = spec.input(source)
    heads, width = tensor.shape[1], tensor.shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        raise BundleError(f"input {source!r} has shape {tensor.shape}; fixed heads and width were expected")
    return math.prod((heads, width, DTYPES[tensor.dtype]))
