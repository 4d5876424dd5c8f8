"""What this processor reaches with FP32 matrix products: the better of ONNX Runtime's and BLAS's own."""

from __future__ import annotations

import time

import numpy as np

from ...errors import BackendError
from ...system import rates
from ...system.rates import SIDE, Clock
from .packages import import_onnxruntime

#: y = MatMul(a, b), float32 [n, n] each, as an ONNX file
PRODUCT = (
    b'\x08\x08:[\n\x11\n\x01a\n\x01b\x12\x01y"\x06MatMul\x12\x01gZ\x15\n\x01a\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n'
    b"\n\x03\x12\x01nZ\x15\n\x01b\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01n\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n\x0e"
    b"\x08\x01\x12\n\n\x03\x12\x01n\n\x03\x12\x01nB\x04\n\x00\x10\x11"
)


def product_rate(threads: int, tries: int = 5, side: int = SIDE, clock: Clock = time.perf_counter) -> float:
    """Operations a second of a product of square float32 matrices.

    A BLAS that does not know a processor's vector units takes narrower ones: numpy's alone gave 0.6 of what ONNX
    Runtime reaches on one with AVX-512.

    Args:
        threads: of ONNX Runtime; BLAS has its own.
    """
    blas = rates.product_rate(tries, side, clock)
    try:
        module = import_onnxruntime()
    except BackendError:
        return blas
    options = module.SessionOptions()
    options.intra_op_num_threads = threads
    session = module.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    a = np.random.default_rng(0).standard_normal((side, side), np.float32)
    seconds = rates.best(lambda: session.run(None, {"a": a, "b": a}), tries, clock)
    return max(blas, 2.0 * side**3 / seconds)
