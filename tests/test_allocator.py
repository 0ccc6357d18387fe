import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.native import allocator
from holdfast.native.allocator import AllocatorPeak, CudaPeak, ProfilerPeak, WholeRunPeak

built = pytest.mark.skipif(
    not AllocatorPeak.supported()[0], reason=f"allocations: {AllocatorPeak.supported()[1]}"
)


def net(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "attention":
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        return nn.TransformerEncoder(layer, 2), torch.randn(2, 24, 32)
    if kind == "convolution":
        body = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(512, 4)), torch.randn(2, 3, 16, 16)
    return nn.LSTM(16, 24, 2), torch.randn(9, 2, 16)


def train(kind: str, steps: int) -> list[torch.Tensor]:
    model, x = net(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        step(model, optimizer, x)
    return [p.detach().clone() for p in model.parameters()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@built
@pytest.mark.parametrize("kind", ["attention", "convolution", "recurrent"])
def test_equals_the_profiler_on_every_step(kind):
    model, x = net(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, x)
    for _ in range(3):
        with ProfilerPeak() as profiler:
            step(model, optimizer, x)
        with AllocatorPeak() as counted:
            step(model, optimizer, x)
        assert (counted.current, counted.peak) == (profiler.current, profiler.peak)
        assert counted.peak > 0 and counted.current == 0


@built
@pytest.mark.parametrize("kind", ["attention", "convolution", "recurrent"])
def test_training_is_bitwise_the_same(kind):
    plain = train(kind, 3)
    with AllocatorPeak() as counted:
        watched = train(kind, 3)
    assert all(map(torch.equal, plain, watched))
    assert counted.current == sum(p.nbytes for p in watched)


@built
def test_bytes_by_hand():
    before = torch.empty(1000)
    with AllocatorPeak() as counted:
        a = torch.empty(10)
        assert a.data_ptr() % 64 == 0
        b = torch.empty(3, dtype=torch.int8)
        torch.empty(0)
        assert (counted.current, counted.peak, counted.allocations) == (43, 43, 2)
        del a, before
        assert (counted.current, counted.peak) == (3, 43)
        counted.reset()
        assert counted.peak == 3
        b.resize_(7)  # torch holds the old and the new at once
        assert (counted.current, counted.peak, counted.allocations) == (7, 10, 3)
    assert (counted.current, counted.peak) == (7, 10)


@built
def test_storages_of_an_earlier_block_are_not_counted():
    with AllocatorPeak() as first:
        kept, freed = torch.arange(64), torch.arange(64)
    kept.resize_(128)  # its storage still knows the counting allocator
    assert kept[:64].tolist() == list(range(64))
    with AllocatorPeak() as second:
        del freed, kept
        assert second.current == 0
        mine = torch.empty(5)
    assert (first.current, second.current, second.peak) == (1024, 20, 20)
    del mine
    assert second.current == 20


@built
def test_every_thread_counts():
    done = threading.Barrier(5)

    def work():
        for _ in range(500):
            torch.empty(25)
        held = torch.empty(250)
        done.wait()
        del held
        done.wait()

    with AllocatorPeak() as counted:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        done.wait()
        assert counted.peak >= 4000
        done.wait()
        for thread in threads:
            thread.join()
        assert (counted.current, counted.allocations) == (0, 4 * 501)
        assert counted.peak <= 4000 + 3 * 100


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_can_allocate():
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            torch.empty(16)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    with AllocatorPeak():
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    torch.empty(16)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@built
def test_lazy_clones_stay_lazy_and_correct():
    with AllocatorPeak() as counted:
        a = torch.arange(100)
        b = torch._lazy_clone(a)
        assert counted.current == 800
        b += 1
        assert counted.current == 1600
        assert (b - a).eq(1).all()
        del a, b
        gc.collect()
    assert counted.current == 0


@built
def test_a_second_block_is_refused_and_meter_uses_the_profiler():
    with AllocatorPeak() as outer:
        with pytest.raises(UsageError, match=r"another block is counting.*end it first"):
            AllocatorPeak().__enter__()
        with Meter(backend="allocator") as meter:
            torch.empty(100)
        assert meter.peak == 400
        kept = torch.empty(1)
    assert outer.current == kept.nbytes


def test_without_the_library_meter_still_measures(monkeypatch):
    monkeypatch.setattr(allocator, "_PATH", Path("/nowhere/_allocator.so"))
    allocator._open.cache_clear()
    try:
        able, reason = AllocatorPeak.supported()
        assert not able and "not built" in reason
        with pytest.raises(UsageError, match=r"cannot be counted: not built"):
            AllocatorPeak().__enter__()
        with Meter(backend="allocator") as meter:
            torch.empty(100)
        assert (meter.peak, meter.end) == (400, 0)
    finally:
        allocator._open.cache_clear()


@built
def test_another_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9+cpu")
    allocator._open.cache_clear()
    try:
        assert "built for torch" in AllocatorPeak.supported()[1]
    finally:
        allocator._open.cache_clear()


def test_whole_run_peak_chooses_by_device():
    assert isinstance(WholeRunPeak("cpu"), AllocatorPeak)
    assert isinstance(WholeRunPeak("cuda:0"), CudaPeak)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_bytes_by_hand():
    before = torch.empty(1000, device="cuda")
    with WholeRunPeak("cuda") as counted:
        a = torch.empty(10, device="cuda")
        b = torch.empty(3, device="cuda", dtype=torch.int8)
        del a
        assert (counted.current, counted.peak) == (3, 43)
        counted.reset()
        assert counted.peak == 3
    del b
    assert before.numel() == 1000 and (counted.current, counted.peak) == (3, 3)
