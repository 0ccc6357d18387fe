import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from holdfast import native
from holdfast.errors import UsageError
from holdfast.training.optim.adamw4 import AdamW4
from holdfast.training.optim.adamw8 import AdamW8
from holdfast.training.optim.coat import CoatAdamW

built = pytest.mark.skipif(not native.usable(), reason=f"native kernels: {native._open()[1]}")


@pytest.fixture
def fresh():
    """Opens the library anew, before and after the test."""
    yield native._open.cache_clear(), native._choose.cache_clear()
    native._open.cache_clear()
    native._choose.cache_clear()


def _ready(make=AdamW4) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(160, 160, generator=g))
    p.grad = torch.randn(p.shape, generator=g)
    return p, make([p])


def _stepped(make=AdamW4) -> torch.Tensor:
    p, optimizer = _ready(make)
    optimizer.step()
    return p.detach()


@built
def test_status_names_the_fastest_variant(monkeypatch):
    monkeypatch.delenv("HOLDFAST_NATIVE", raising=False)
    variant = native.usable()[-1]
    assert native.status() == {"available": True, "reason": "", "variant": variant}


@built
@pytest.mark.parametrize("asked", ["off", "portable"])
def test_the_environment_chooses(monkeypatch, asked):
    monkeypatch.setenv("HOLDFAST_NATIVE", asked)
    assert native.status()["available"] == (asked == "portable")
    assert (native.library() is None) == (asked == "off")


@built
def test_an_unknown_variant_is_a_reason_and_not_a_crash(monkeypatch):
    monkeypatch.setenv("HOLDFAST_NATIVE", "avx1024")
    assert "is not one of off, portable, avx2, avx512" in native.status()["reason"]
    assert _stepped().isfinite().all()


@built
def test_force_refuses_an_unknown_variant():
    with pytest.raises(UsageError, match="'neon' cannot be used"), native.force("neon"):
        pass


@pytest.mark.parametrize("make", [AdamW4, AdamW8, CoatAdamW])
def test_without_the_library_torch_does_the_work(monkeypatch, fresh, make):
    want = _stepped(make)
    monkeypatch.setattr(native, "_PATH", Path("/nonexistent/_kernels.so"))
    native._open.cache_clear()
    native._choose.cache_clear()
    status = native.status()
    assert not status["available"] and "no C++ compiler" in status["reason"]
    assert native.usable() == []
    assert torch.equal(_stepped(make), want)


def test_a_broken_library_is_a_reason(monkeypatch, fresh, tmp_path):
    path = tmp_path / "_kernels.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_PATH", path)
    native._open.cache_clear()
    native._choose.cache_clear()
    assert "cannot be used" in native.status()["reason"]


@built
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
    # In a process of its own: scikit-learn, which other tests import, brings another runtime.
    script = (
        "import torch; from holdfast.training.optim.adamw4 import AdamW4\n"
        "p = torch.nn.Parameter(torch.ones(128, 64)); p.grad = torch.ones_like(p)\n"
        "AdamW4([p]).step()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("make", [AdamW4, AdamW8, CoatAdamW])
def test_a_forked_process_steps(make):
    want = _stepped(make).numpy().tobytes()  # starts the parent's threads, which the child has not
    p, optimizer = _ready(make)
    child = os.fork()
    if child == 0:
        # torch's own parallel operators would hang here; the kernel must not.
        optimizer.step()
        os._exit(0 if p.detach().numpy().tobytes() == want else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
