"""ONNX Runtime's CUDA provider: whether it really runs on this machine, and the options it is opened with.

That a package was built with the provider says nothing: it loads CUDA's and cuDNN's libraries when a session asks for
it, and where one is missing, or the driver is too old, ONNX Runtime goes on with the CPU. So one convolution is run, in
a session that is not allowed to.
"""

from __future__ import annotations

import io
import platform
import re
from contextlib import redirect_stdout
from functools import cache
from typing import Any

import numpy as np

from ...bundle.graph_spec import GraphSpec
from ...errors import BackendError
from ...system import host
from ...system.stderr import dropped_from_stderr
from .packages import INSTALL_GPU, MEND_GPU, gpu_published
from .providers import PROVIDERS, nodes_by_provider, record_placement

#: y = Conv(x, w), float32 [1, 1, 3] and [1, 1, 2], as an ONNX file
PROBE = (
    b'\x08\x08:_\n\x0f\n\x01x\n\x01w\x12\x01y"\x04Conv\x12\x01gZ\x17\n\x01x\x12\x12\n\x10\x08\x01\x12\x0c\n\x02\x08\x01'
    b"\n\x02\x08\x01\n\x02\x08\x03Z\x17\n\x01w\x12\x12\n\x10\x08\x01\x12\x0c\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x02"
    b"b\x17\n\x01y\x12\x12\n\x10\x08\x01\x12\x0c\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x02B\x04\n\x00\x10\x11"
)
_CUDA = PROVIDERS["cuda"]
# ONNX Runtime's own log, colours and all
_LOGGED = re.compile(rb"(\x1b\[[\d;]*m)*(\d{4}-\d\d-\d\d .*\[[VIWEF]:onnxruntime|$)")
_LOAD_ERROR = re.compile(r"with error: (.*)")


def cuda_options(spec: GraphSpec) -> dict[str, str]:
    """Options of the CUDA provider for a graph.

    The default search for convolutions times every algorithm for every new shape, and the vocoder has hundreds of them.
    The default arena doubles what it takes with each extension.
    """
    options = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    if spec.compute_dtype == "float32" and not host.tf32_asked():
        options["use_tf32"] = "0"
    return options


def why_no_cuda(module: Any) -> str:
    """Why the CUDA provider cannot run here, and what mends it; empty if it runs.

    Args:
        module: onnxruntime.
    """
    if _CUDA not in module.get_available_providers():
        if not gpu_published():
            return (
                f"the installed onnxruntime has no CUDA provider, and no package that has one is published for "
                f"{platform.machine()}: build engines (omniport build)"
            )
        return f"the installed onnxruntime has no CUDA provider: {MEND_GPU}"
    try:
        host.read_gpu()
    except BackendError as error:
        return str(error)
    return _try(module)


@cache
def _try(module: Any) -> str:
    """Run a convolution on the CUDA provider; the reason if that fails. Once a process: libraries stay loaded."""
    reason, said = "", io.StringIO()
    with redirect_stdout(said), dropped_from_stderr(_LOGGED) as logged:  # ONNX Runtime prints what is missing
        try:
            if hasattr(module, "preload_dlls"):  # the libraries of pip's packages are on no search path
                module.preload_dlls()
            reason = _run(module)
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not reason:
        return ""
    log = b"\n".join(logged).decode(errors="replace")
    for better in (_LOAD_ERROR.search(log), re.search(r"Failed to load (.*)", said.getvalue())):
        if better:
            reason = better[1].strip()
            break
    return (
        f"ONNX Runtime {module.__version__} cannot use {_CUDA} here: {reason}. Its CUDA and cuDNN libraries come with "
        f"{INSTALL_GPU}; the driver must be made for their CUDA release, or a newer one"
    )


def _run(module: Any) -> str:
    options = module.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    record_placement(options)
    session = module.InferenceSession(PROBE, options, providers=[(_CUDA, {"use_tf32": "0"})], enable_fallback=0)
    if _CUDA not in session.get_providers():
        return "the session went to the CPU"
    x, w = np.asarray([[[1, 2, 3]]], np.float32), np.asarray([[[10, 1]]], np.float32)
    y = session.run(None, {"x": x, "w": w})[0]
    elsewhere = set(nodes_by_provider(session)) - {_CUDA}
    if elsewhere:
        return f"a convolution went to {', '.join(sorted(elsewhere))}"
    return "" if np.array_equal(y, [[[12, 23]]]) else f"a convolution gave {np.asarray(y).tolist()}, not [12, 23]"
