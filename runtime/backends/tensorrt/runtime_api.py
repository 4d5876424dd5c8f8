"""TensorRT's runtime behind small Protocols: engines, their tensors, and execution contexts.

TensorRT and TensorRT-RTX have the same Python API under two module names. What the backend needs of it is written down
here, so that this is the only file that calls it, and so that tests can put another engine behind the same face.
"""

from __future__ import annotations

import mmap
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import BackendError
from .packages import import_builder

#: specs' names of TensorRT's dtypes
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "BOOL": "bool",
}


_KEPT_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING")
#: messages that a listener holds at most: nobody reads those of a session that runs well
_MOST_MESSAGES = 1000


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine. ``shape``: -1 where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool


class ExecutionContext(Protocol):
    """Runs an engine at one set of shapes and addresses at a time."""

    def use_profile(self, index: int, stream: int) -> None:
        """Take shapes of this profile, not of the first, once the stream is done. BackendError: the engine refuses."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Shape of an input from now on. BackendError: the engine does not take it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output, once every input has one."""

    def set_address(self, name: str, address: int) -> None:
        """Where a tensor lies from now on."""

    def scratch_bytes(self) -> int:
        """Memory that one run needs for what is computed in between, once every input has a shape."""

    def set_scratch(self, address: int, nbytes: int) -> None:
        """That memory; shared by contexts that never run at once."""

    def capturable(self, stream: int) -> bool:
        """Whether ``enqueue`` can be captured into a CUDA graph as things are."""

    def enqueue(self, stream: int) -> None:
        """Put one run into the stream. BackendError: the engine refuses."""


class LoadedEngine(Protocol):
    """An engine on the device."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """Inputs and outputs by name."""

    @property
    def compiles(self) -> bool:
        """Whether it compiles kernels while it runs, for each shape that it meets."""

    def aliased_input(self, output: str) -> str | None:
        """The input whose buffer this output has to share; None if there is none, or the release cannot tell."""

    def context(self, fixed: bool) -> ExecutionContext:
        """A new context; ``fixed``: its shapes are set once, so it is worth specialising for them."""

    def take_kernels(self, kernels: bytes) -> bool:
        """Use kernels that an earlier process compiled; before the first context, with a device at hand.

        False: they are another environment's, or this engine compiles nothing while it runs.
        """

    def kernels(self) -> bytes:
        """The kernels compiled so far; empty if this engine compiles nothing while it runs."""


class EngineRuntime(Protocol):
    """Loads engines of one builder and version."""

    builder: str
    version: str

    def load(self, path: Path) -> LoadedEngine:
        """Load an engine, which the caller knows to be the one that was built. BackendError: it does not load."""


def attempt(make: Callable[..., Any], *arguments: Any) -> Any:
    """What a class of TensorRT's makes; None where its library made nothing, for want of a GPU or a new enough driver.

    Functions of TensorRT give None themselves then; the constructors of its Python module raise a TypeError.
    """
    try:
        return make(*arguments)
    except TypeError as error:
        if "nullptr" in str(error):
            return None
        raise


class TrtRuntime:
    """TensorRT or TensorRT-RTX, as installed.

    Raises:
        BackendError: it is not installed, does not import, or cannot start.
    """

    def __init__(self, builder: str) -> None:
        self.builder = builder
        self.module = import_builder(builder)
        self.version = str(self.module.__version__)
        self.logger, self.messages = listen(builder, self.module)
        self._runtime = self.given(attempt(self.module.Runtime, self.logger), "runtime")

    def given(self, made: Any, what: str) -> Any:
        """What a call gave. BackendError: nothing."""
        if made is None:
            raise BackendError(f"{self.builder} gives no {what}: {self.messages.reason()}")
        return made

    def load(self, path: Path) -> LoadedEngine:
        """The file is mapped: its pages can be dropped once the engine is on the device."""
        self.messages.take()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"{self.builder} {self.version} cannot load {path}: {self.messages.reason()}. If the GPU is out of "
                "memory, close other programs; otherwise build the engine again (omniport build --force)"
            )
        return _TrtEngine(self, engine)


class _TrtEngine:
    """An ICudaEngine."""

    def __init__(self, runtime: TrtRuntime, engine: Any) -> None:
        self._runtime, self._engine = runtime, engine
        self._kernels = _kernel_cache(engine)
        names = [str(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]
        self._tensors = {name: self._tensor(name) for name in names}

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        return self._tensors

    @property
    def compiles(self) -> bool:
        return self._kernels is not None

    def aliased_input(self, output: str) -> str | None:
        """Engines have aliased tensors from TensorRT 10.15 on."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return None
        return self._engine.get_aliased_input_tensor(output) or None

    def context(self, fixed: bool) -> ExecutionContext:
        module, engine = self._runtime.module, self._engine
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        kinds = getattr(module, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None:
            made = engine.create_execution_context(strategy)
        else:  # TensorRT-RTX compiles kernels for the shapes it sees: at once where they stay, else in the background
            config = self._runtime.given(engine.create_runtime_config(), "runtime configuration")
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if fixed else kinds.LAZY
            if self._kernels is not None and not config.set_runtime_cache(self._kernels):
                self._kernels = None
                reason = self._runtime.messages.reason()
                warnings.warn(f"kernels that are compiled will not be kept: {reason}", RuntimeWarning, stacklevel=2)
            made = engine.create_execution_context(config)
        self._runtime.given(made, "execution context")
        return _TrtContext(self._runtime, engine, made, self._kernels)

    def take_kernels(self, kernels: bytes) -> bool:
        taken = self._kernels is not None and bool(self._kernels.deserialize(kernels))
        self._runtime.messages.take()  # what it says about kernels of another environment is no error
        return taken

    def kernels(self) -> bytes:
        held = None if self._kernels is None else self._kernels.serialize()
        return b"" if held is None else bytes(memoryview(held))

    def _tensor(self, name: str) -> EngineTensor:
        engine = self._engine
        dtype = engine.get_tensor_dtype(name).name
        is_input = engine.get_tensor_mode(name) == self._runtime.module.TensorIOMode.INPUT
        return EngineTensor(name, _DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)), is_input)


class _TrtContext:
    """An IExecutionContext."""

    def __init__(self, runtime: TrtRuntime, engine: Any, context: Any, kernels: Any) -> None:
        self._runtime, self._engine, self._context = runtime, engine, context
        self._kernels = kernels  # has to outlive the context

    def use_profile(self, index: int, stream: int) -> None:
        if not self._context.set_optimization_profile_async(index, stream):
            raise BackendError(f"the engine does not take profile {index}: {self._reason()}")

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise BackendError(f"the engine does not take {list(shape)} as {name!r}: {self._reason()}")

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(f"the engine cannot tell its shapes ({error}): {self._reason()}") from error
        if missing:
            raise BackendError(f"the engine needs shapes or values of {', '.join(missing)} before it can run")
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(f"the engine does not know the shape of {name!r} ({list(shape)}): {self._reason()}")
        return shape

    def set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"the engine does not take an address for {name!r}: {self._reason()}")

    def scratch_bytes(self) -> int:
        """0 is TensorRT's error, except of an engine that never needs any."""
        needed = int(self._context.update_device_memory_size_for_shapes())
        if not needed and self._engine.device_memory_size_v2:
            raise BackendError(f"the engine cannot tell the memory that a run needs: {self._reason()}")
        return needed

    def set_scratch(self, address: int, nbytes: int) -> None:
        """The older call where there is one: the newer is for engines that stream their weights, and none here does."""
        if hasattr(type(self._context), "device_memory"):
            self._context.device_memory = address
        else:
            self._context.set_device_memory(address, nbytes)

    def _reason(self) -> str:
        return self._runtime.messages.reason()

    def capturable(self, stream: int) -> bool:
        """TensorRT always is; TensorRT-RTX says so of engines that allocate nothing."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(stream))

    def enqueue(self, stream: int) -> None:
        self._runtime.messages.take()
        if not self._context.execute_async_v3(stream):
            raise BackendError(f"{self._runtime.builder} could not run the engine: {self._reason()}")


class Messages:
    """What TensorRT said to one listener since it last asked: (severity, text), warnings and errors."""

    def __init__(self) -> None:
        self._held: deque[tuple[str, str]] = deque(maxlen=_MOST_MESSAGES)
        self._lock = threading.Lock()

    def add(self, severity: str, text: str) -> None:
        """Called by the logger, from any thread."""
        with self._lock:
            self._held.append((severity, text))

    def take(self) -> list[tuple[str, str]]:
        """All of them; they are gone then."""
        with self._lock:
            taken = list(self._held)
            self._held.clear()
        return taken

    def reason(self) -> str:
        """The errors in one line, for a message; all is taken."""
        errors = [" ".join(text.split()) for severity, text in self.take() if severity != "WARNING"]
        return "; ".join(errors)[:800] or "it gives no reason"


_loggers: dict[str, Any] = {}
_loggers_lock = threading.Lock()


def listen(builder: str, module: Any) -> tuple[Any, Messages]:
    """The process's logger of a package, and a listener of one's own.

    Args:
        builder: ``tensorrt`` or ``tensorrt-rtx``.
        module: its Python module.
    """
    with _loggers_lock:
        if builder not in _loggers:
            _loggers[builder] = _make_logger(module)
        logger = _loggers[builder]
    messages = Messages()
    logger.listeners.add(messages)
    return logger, messages


def _make_logger(module: Any) -> Any:
    class Caught(module.ILogger):  # type: ignore[misc]  # a base class known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.listeners: weakref.WeakSet[Messages] = weakref.WeakSet()

        def log(self, severity: Any, message: str) -> None:
            if severity.name in _KEPT_SEVERITIES:
                for messages in tuple(self.listeners):
                    messages.add(severity.name, message)

    return Caught()


def _kernel_cache(engine: Any) -> Any:
    """An engine's IRuntimeCache, still empty; None where engines compile nothing while they run."""
    if not hasattr(engine, "create_runtime_config"):
        return None
    config = engine.create_runtime_config()
    return config.create_runtime_cache() if hasattr(config, "create_runtime_cache") else None
