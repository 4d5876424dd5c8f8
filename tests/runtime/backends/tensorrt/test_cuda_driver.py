"""CudaDriver over a compiled stand-in for the driver's library: no GPU is here, the calls are the real ones."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from omniport.runtime.backends.tensorrt.cuda import DeviceBuffer, PinnedBuffer
from omniport.runtime.backends.tensorrt.cuda_driver import CALLS, CudaDriver
from omniport.runtime.errors import BackendError
from support.cuda_checks import Cycle, round_trip
from support.stub_cuda import ILLEGAL_ADDRESS, LAUNCH_OUT_OF_RESOURCES, OUT_OF_MEMORY, Stub, StubDriver


@pytest.fixture
def driver(stub: Stub) -> CudaDriver:
    return CudaDriver(stub.path)


def test_what_the_driver_says_of_the_gpu(driver: CudaDriver) -> None:
    assert driver.capability() == "8.9"
    assert driver.device_name() == "Stand-in 4090"


def test_memory_goes_there_and_back_from_any_thread(driver: CudaDriver, stub: Stub) -> None:
    """A thread that never used CUDA has no current context."""
    round_trip(driver, 0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: round_trip(driver, seed), range(20)))
    assert stub.left == (0, 0, 0)
    assert stub.fault == ""


def test_work_is_done_late(driver: CudaDriver) -> None:
    stream = driver.create_stream()
    device, host = DeviceBuffer(driver, 16), PinnedBuffer(driver, 16)
    driver.zero(device.address, 16, stream)
    driver.to_host(host.address, device.address, 16, stream)
    assert (host.view((16,), np.dtype(np.uint8)) == 0xFF).all()
    driver.synchronize(stream)
    assert not host.view((16,), np.dtype(np.uint8)).any()


def test_waiting_leaves_other_threads_alone(stub: Stub) -> None:
    """ctypes gives the GIL up: a thread that waits for the GPU holds nobody else."""
    driver = StubDriver(stub)
    stream = driver.create_stream()
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go.wait(20)

    driver.put(stream, "hold", hold)
    waiting = threading.Thread(target=driver.synchronize, args=(stream,))
    waiting.start()
    assert begun.wait(20)
    start = time.perf_counter()
    round_trip(driver, 1)
    assert time.perf_counter() - start < 15
    assert waiting.is_alive()
    go.set()
    waiting.join(20)
    assert not driver.problems


# frees while a stream is captured


def test_what_the_collector_frees_during_a_capture_waits(driver: CudaDriver, stub: Stub) -> None:
    stream = driver.create_stream()
    device, host = DeviceBuffer(driver, 256), PinnedBuffer(driver, 256)
    other = CudaDriver(stub.path)  # another session's
    gc.disable()
    try:
        Cycle(DeviceBuffer(driver, 1 << 20), PinnedBuffer(driver, 1 << 20), DeviceBuffer(other, 1 << 20))

        def body() -> None:
            gc.collect()
            driver.to_device(device.address, host.address, 256, stream)

        graph = driver.capture(stream, body)
    finally:
        gc.enable()
    assert graph
    assert stub.left[0] == 512
    driver.launch(graph, stream)
    driver.synchronize(stream)
    driver.destroy_graph(graph)


def test_frees_of_a_capture_that_failed_are_done_as_well(driver: CudaDriver, stub: Stub) -> None:
    stream = driver.create_stream()

    def body() -> None:
        buffer.release()
        raise ValueError("no engine")

    buffer = DeviceBuffer(driver, 1 << 20)
    with pytest.raises(ValueError, match="no engine"):
        driver.capture(stream, body)
    assert stub.left == (0, 1, 0)
    round_trip(driver, 2)


def test_what_is_forbidden_breaks_the_capture_and_nothing_else(driver: CudaDriver, stub: Stub) -> None:
    stream = driver.create_stream()

    def allocates() -> None:
        with pytest.raises(BackendError, match="STREAM_CAPTURE_UNSUPPORTED"):
            driver.allocate(256)

    def waits() -> None:
        driver.synchronize(stream)

    with pytest.raises(BackendError, match="STREAM_CAPTURE_INVALIDATED"):
        driver.capture(stream, allocates)
    with pytest.raises(BackendError, match=r"cuStreamSynchronize .*STREAM_CAPTURE_UNSUPPORTED"):
        driver.capture(stream, waits)
    round_trip(driver, 3)
    assert stub.left == (0, 1, 0)


def test_other_threads_allocate_during_a_capture(driver: CudaDriver, stub: Stub) -> None:
    stream = driver.create_stream()

    def body() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(round_trip, driver, 4).result()

    driver.destroy_graph(driver.capture(stream, body))
    assert stub.fault == ""


# errors


def test_a_full_gpu(driver: CudaDriver, stub: Stub) -> None:
    stub.room(1000)
    for allocate in (driver.allocate, driver.allocate_host):
        with pytest.raises(BackendError, match=r"no room for 2,000 bytes more \(1,000 of .* are free\).*max_context"):
            allocate(2000)
    stub.room(1 << 30)
    round_trip(driver, 5)


@pytest.mark.parametrize("name", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_a_capture_that_finds_no_memory(driver: CudaDriver, stub: Stub, name: str) -> None:
    """It is an error like any other: whoever captures goes on without the graph."""
    stream = driver.create_stream()
    stub.fail(name, 1, OUT_OF_MEMORY)
    with pytest.raises(BackendError, match=rf"{name} of the CUDA driver failed: CUDA_ERROR_OUT_OF_MEMORY .*are free"):
        driver.capture(stream, lambda: None)
    round_trip(driver, 6)
    assert stub.left == (0, 1, 0)


def test_after_an_illegal_address_only_a_new_process_helps(driver: CudaDriver, stub: Stub) -> None:
    stream = driver.create_stream()
    stub.fail("cuStreamSynchronize", 1, ILLEGAL_ADDRESS)
    for call in (lambda: driver.synchronize(stream), lambda: driver.allocate(16), lambda: CudaDriver(stub.path)):
        with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS .*restart the process") as caught:
            call()
        assert "open the session again" not in str(caught.value)
    driver.destroy_stream(stream)  # never raises


def test_an_error_that_the_driver_has_no_name_for(driver: CudaDriver, stub: Stub) -> None:
    stub.fail("cuStreamCreate", 1, 12345)
    with pytest.raises(BackendError, match="cuStreamCreate of the CUDA driver failed: error 12345"):
        driver.create_stream()


def test_no_gpu(stub: Stub) -> None:
    stub.devices(0)
    with pytest.raises(BackendError, match="sees no GPU"):
        CudaDriver(stub.path)
    stub.fail("cuInit", 1, 100)
    with pytest.raises(BackendError, match=r"cuInit .*CUDA_ERROR_NO_DEVICE .*omniport doctor"):
        CudaDriver(stub.path)


def test_no_driver(tmp_path: Path, stub_library: Path) -> None:
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here: the CUDA driver does not load"):
        CudaDriver(str(tmp_path / "nothing.so"))
    with pytest.raises(BackendError, match=r"too old: it has no cu\w+. Update the driver"):
        CudaDriver("libc.so.6")


def works(driver: CudaDriver) -> None:
    round_trip(driver, 7)
    driver.capability()
    driver.device_name()
    buffer = DeviceBuffer(driver, 64)
    buffer.release()


_QUIET = {"cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuGraphDestroy", "cuGraphExecDestroy"}


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"cuGetErrorName", "cuGetErrorString"}))
def test_every_call_fails_once(stub: Stub, name: str) -> None:
    """At each of its calls. What gives back says nothing; everything else says which call it was; then all works."""

    def whole() -> None:
        works(CudaDriver(stub.path))

    whole()
    before = stub.calls(name)
    whole()
    count = stub.calls(name) - before
    if name == "cuMemGetInfo_v2":
        assert count == 0  # asked for messages only
        count = 1
    assert count
    for call in range(1, count + 1):
        stub.fail(name, call, LAUNCH_OUT_OF_RESOURCES)
        left = stub.left
        problem = ""
        try:
            whole()
        except BackendError as error:
            problem = str(error)
        if problem or name not in _QUIET | {"cuMemGetInfo_v2", "cuCtxSetCurrent"}:
            assert f"{name} of the CUDA driver failed" in problem
            assert name not in _QUIET
        stub.forgive()
        gc.collect()
        lost = [now - then for now, then in zip(stub.left, left, strict=True)]
        assert lost == [0, 0, 0] or name in _QUIET
        whole()
    assert stub.fault == ""


def test_messages_do_not_need_the_memory_info(driver: CudaDriver, stub: Stub) -> None:
    stub.room(1000)
    stub.fail("cuMemGetInfo_v2", 1, LAUNCH_OUT_OF_RESOURCES)
    with pytest.raises(BackendError, match="no room for 2,000 bytes more"):
        driver.allocate(2000)
