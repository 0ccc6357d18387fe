import gc
import weakref

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.places import (
    ActivationStore,
    ArenaFull,
    DiskArena,
    HostArena,
    SavedTensorChanged,
    State,
)

N = 2000  # elements, above what is worth moving


@pytest.fixture(params=["host", "disk"])
def arena(request, tmp_path):
    cap = 1 << 22
    kind = request.param == "host"
    with HostArena(cap, pinned=False) if kind else DiskArena(cap, tmp_path) as made:
        yield made


def saved_exp(store, x):
    """exp saves its output, which nobody else holds afterwards."""
    with store:
        return x.exp().sum()


def test_states_in_order(arena):
    x = torch.randn(N, requires_grad=True)
    store = ActivationStore(arena)
    assert store.state is State.NEW
    with store:
        y = x.exp()
        assert store.state is State.SAVING and arena.resident_bytes == 0
        z = y * y
    assert store.state is State.RELEASED and arena.resident_bytes == 4 * N
    z.sum().backward(retain_graph=True)
    assert store.state is State.USED and arena.resident_bytes == 4 * N
    del y, z
    assert store.state is State.FREED and arena.resident_bytes == 0


def test_illegal_transitions_raise(arena):
    x = torch.randn(N, requires_grad=True)
    store = ActivationStore(arena)
    loss = saved_exp(store, x)  # keeps the copy alive
    with pytest.raises(HoldfastError, match=r"cannot go from SAVED to SAVING.*make a new store"):
        store.__enter__()
    (span,) = store._live_spans()
    with pytest.raises(HoldfastError, match="cannot go from RELEASED to RELEASED"):
        span.release()
    span.free()
    with pytest.raises(HoldfastError, match="from FREED to PREPARED, only to nothing"):
        span.prepare()
    with pytest.raises(HoldfastError, match="from FREED to LOADED"):
        loss.backward()


def test_device_storage_is_really_freed_and_comes_back(arena):
    x = torch.randn(N, requires_grad=True)
    store, seen = ActivationStore(arena), []
    with store:
        y = x.exp()
        seen.append(weakref.ref(y.untyped_storage()))
        loss = y.sum()
        del y
        assert seen[0]() is not None
    assert seen[0]() is None
    loss.backward()
    assert torch.equal(x.grad, x.detach().exp())
    assert (arena.bytes_in, arena.bytes_out, len(arena)) == (4 * N, 4 * N, 0)


def test_shared_bytes_move_once(arena):
    x = torch.randn(60, 50, requires_grad=True)

    def forward(x):
        y = x.exp()  # saved: y
        return (
            (y.t() @ y).sum()
            + (y * y).sum()
            + y[:30].sin().sum()
            + y.unflatten(1, (5, 10)).cos().sum()
        )

    want = torch.autograd.grad(forward(x), x)[0]
    with ActivationStore(arena):
        loss = forward(x)
    assert arena.bytes_in == 4 * 3000
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)
    assert arena.bytes_out == 4 * 3000  # one load for seven saved tensors


def test_slices_with_gaps_are_stored_compactly_and_keep_their_strides(arena):
    x = torch.randn(100, 90, requires_grad=True)
    strides = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            return t * 2

        @staticmethod
        def backward(ctx, grad):
            strides.append(ctx.saved_tensors[0].stride())
            return grad * ctx.saved_tensors[0]

    def forward(x):
        part = (x + 1)[:, 10:40]
        return Probe.apply(part).sum()

    want = torch.autograd.grad(forward(x), x)[0]
    with ActivationStore(arena):
        loss = forward(x)
    assert arena.resident_bytes == 4 * 100 * 30
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)
    assert strides == [(90, 1), (90, 1)]


@pytest.mark.parametrize("view", [
    lambda y: y.unfold(0, 8, 16),
    lambda y: y.unfold(0, 16, 8),
    lambda y: y[::7].expand(5, -1),
    lambda y: y.view(40, 100).t()[3:, 2:],
    lambda y: y[-1:].expand(3000),
    lambda y: y[:3],
])  # fmt: skip
def test_any_view_comes_back(arena, view):
    x = torch.randn(4000, requires_grad=True)

    def forward(x):
        return view(x + 1).sin().sum()

    want = torch.autograd.grad(forward(x), x)[0]
    with ActivationStore(arena):
        loss = forward(x)
    assert 0 < arena.resident_bytes <= 4 * 4000
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)
    del loss
    assert arena.resident_bytes == 0


def test_lazy_conjugate(arena):
    z = torch.randn(40, 50, dtype=torch.complex64, requires_grad=True)

    def forward(z):
        y = z * 2
        return torch.view_as_real(y.conj() @ y.t() * y.conj().sum()).sum()

    want = torch.autograd.grad(forward(z), z)[0]
    with ActivationStore(arena):
        loss = forward(z)
    assert torch.equal(torch.autograd.grad(loss, z)[0], want)


def test_parameters_small_and_kept_tensors_stay(arena):
    weight = nn.Parameter(torch.randn(50, 50))
    table, x = torch.randn(60, 50), torch.randn(60, 50)
    small = torch.randn(30, requires_grad=True)
    with ActivationStore(arena, keep=[table, x]):
        y = (
            ((x @ weight.t()) * table[:, :50]).sum()
            + small.exp().sum()
            + weight.view(-1).sin().sum()
        )
    assert arena.bytes_in == 0
    y.backward()
    # A small view of a large storage moves: it would keep all of it alive.
    big = torch.randn(3000, requires_grad=True)
    with ActivationStore(arena):
        y = (big * 2)[:10].exp().sin().sum() + (big + 1)[:10].sin().sum()
    assert arena.bytes_in == 4 * 10


def test_other_devices_stay(arena):
    x = torch.randn(N, requires_grad=True)
    saved_exp(ActivationStore(arena, device="cuda"), x)
    assert arena.bytes_in == 0
    saved_exp(ActivationStore(arena, device="cpu"), x)
    assert arena.bytes_in == 4 * N


def test_in_place_change_of_a_saved_tensor_raises(arena):
    x = torch.randn(N, requires_grad=True)
    with pytest.raises(
        SavedTensorChanged, match=r"shape \(2000,\).*version 0 was saved, it is at 1"
    ):
        with ActivationStore(arena):
            y = x.exp()
            y += 1
    assert arena.resident_bytes == 0
    weight = nn.Parameter(torch.randn(N))
    with ActivationStore(arena):
        y = (x * weight).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_change_after_the_forward_does_not_reach_backward(arena):
    x = torch.randn(N, requires_grad=True)
    with ActivationStore(arena):
        y = x.exp()
    with torch.no_grad():
        y.zero_()
    y.sum().backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_change_before_an_overlapped_release_raises(arena):
    x = torch.randn(N, requires_grad=True)
    for when in ("backward", "release"):
        store = ActivationStore(arena, overlap=True)
        with store:
            y = x.exp()
        with torch.no_grad():
            y.zero_()
        with pytest.raises(SavedTensorChanged, match=r"shape \(2000,\)"):
            y.sum().backward() if when == "backward" else store.release()
        del y
        assert arena.resident_bytes == 0


def test_retained_graph_runs_again_and_double_backward(arena):
    x = torch.randn(N, requires_grad=True)
    store = ActivationStore(arena)
    with store:
        y = (x.exp() * x.sin()).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    loaded = arena.bytes_out
    assert torch.equal(torch.autograd.grad(y, x, create_graph=True)[0], first)
    assert arena.bytes_out == 2 * loaded
    g = torch.autograd.grad(y, x, create_graph=True)[0]
    second = torch.autograd.grad(g.sum(), x)[0]
    with torch.no_grad():
        want = 2 * x.exp() * x.cos()
    torch.testing.assert_close(second, want)
    del y, g
    assert store.state is State.FREED and arena.resident_bytes == 0


def test_unpack_inside_the_forward(arena):
    x = torch.randn(N, requires_grad=True)
    with ActivationStore(arena):
        y = x.exp()
        g = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        loss = (g * y).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())


def test_graph_without_backward_frees_its_bytes(arena):
    loss = saved_exp(ActivationStore(arena), torch.randn(N, requires_grad=True))
    assert arena.resident_bytes == 4 * N
    del loss
    assert arena.resident_bytes == 0


def test_exception_in_the_forward_frees_everything(arena):
    x, seen = torch.randn(N, requires_grad=True), []
    store = ActivationStore(arena)
    with pytest.raises(ZeroDivisionError):
        with store:
            y = x.exp()
            seen.append(weakref.ref(y.untyped_storage()))
            loss = y.sum()
            del y
            raise ZeroDivisionError
    assert store.state is State.FREED and arena.bytes_in == 0 and seen[0]() is None
    with pytest.raises(HoldfastError, match=r"forward that failed.*run the forward again"):
        loss.backward()
    plain = x.exp().sum()  # the hooks are gone
    plain.backward()


def test_arena_full_in_the_middle_leaks_nothing(tmp_path):
    for arena in (HostArena(5 * N, pinned=False), DiskArena(5 * N, tmp_path)):
        x, seen = torch.randn(N, requires_grad=True), []
        with pytest.raises(ArenaFull, match=r"7.81 KiB asked, 1.95 KiB free") as info:
            with ActivationStore(arena):
                y = x
                for _ in range(4):
                    y = y.exp().neg()
                    seen.append(weakref.ref(y.untyped_storage()))
        # Also while the traceback, which holds the frames, is alive.
        assert info.tb and arena.peak_bytes == 4 * N and arena.resident_bytes == 0
        del y, info
        gc.collect()
        assert all(storage() is None for storage in seen)
        arena.close()


def test_overlap_releases_one_block_late_and_loads_one_ahead(arena):
    x = torch.randn(N, requires_grad=True)
    stores, y, before = [], x, None
    states = lambda: [store.state.name for store in stores]  # noqa: E731
    for _ in range(3):
        stores.append(ActivationStore(arena, after=before, overlap=True))
        with stores[-1]:
            y = y.sin()
        before = stores[-1]
    # sin saves its input: x itself in the first store.
    assert states() == ["RELEASED", "RELEASED", "SAVED"]
    seen = []
    for tensor_node in (y.grad_fn, y.grad_fn.next_functions[0][0]):
        tensor_node.register_hook(lambda *_: seen.append(states()))
    del tensor_node
    y.sum().backward()
    assert seen[0][:2] == ["RELEASED", "PREPARED"]
    assert seen[1][0] == "PREPARED"
    assert arena.bytes_out == 2 * 4 * N  # the last block never left
    want = torch.cos(x) * torch.cos(x.sin()) * torch.cos(x.sin().sin())
    torch.testing.assert_close(x.grad, want.detach())


def test_stores_of_past_steps_are_not_held(arena):
    x = torch.randn(N, requires_grad=True)
    first = ActivationStore(arena)
    loss = saved_exp(first, x)
    second = ActivationStore(arena, after=first)
    gone = weakref.ref(first)
    del first
    assert gone() is not None  # its saved tensors hold it
    loss.backward()
    del loss
    assert gone() is None
    saved_exp(second, x).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="side streams need CUDA")
@pytest.mark.parametrize("pinned", [True, False])
def test_cuda_gradients_equal_plain(pinned):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(512, 512), nn.GELU()).cuda() for _ in range(6)]
    x = torch.randn(2048, 512, device="cuda")

    def step(arena):
        y, before = x, None
        for layer in layers:
            if arena is None:
                y = layer(y)
                continue
            store = ActivationStore(arena, after=before, device="cuda")
            with store:
                y = layer(y)
            before = store
        torch.cuda.synchronize()
        held = torch.cuda.memory_stats()["requested_bytes.all.current"]
        y.square().sum().backward()
        grads = [p.grad.clone() for layer in layers for p in layer.parameters()]
        for layer in layers:
            layer.zero_grad()
        return held, grads

    plain_held, want = step(None)
    with HostArena(1 << 28, pinned=pinned) as arena:
        for _ in range(3):
            held, got = step(arena)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert len(arena) == 0
            assert held < plain_held - 4 * 2 * x.nbytes  # of 6 layers at most two are there
