import copy
import gc
import inspect
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from holdfast import attach
from holdfast.errors import UsageError
from holdfast.meter import Meter, predict
from holdfast.places import ArenaFull, DiskArena, HostArena, offload

BLOCKS, ROWS, WIDTH = 5, 256, 32
ROW = 4 * ROWS * WIDTH


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("scale", torch.full((ROWS, WIDTH), 0.5))

    def forward(self, x, table=None, *, mask=None):
        h = self.norm(x) * self.scale
        h = h if table is None else h * table
        h = self.down(self.drop(nn.functional.gelu(self.up(h))))
        return x + (h if mask is None else h * mask)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x, **kwargs):
        for block in self.blocks:
            x = block(x, **kwargs)
        return x


@pytest.fixture(params=["host", "disk"])
def arena(request, tmp_path):
    cap = 1 << 23
    kind = request.param == "host"
    with HostArena(cap, pinned=False) if kind else DiskArena(cap, tmp_path) as made:
        yield made


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def grads(net, x, **kwargs):
    torch.manual_seed(1)  # dropout
    net(x, **kwargs).square().mean().backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    return found


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("overlap", [None, True])
def test_gradients_are_bitwise_equal(net, arena, overlap):
    x = torch.randn(ROWS, WIDTH)
    want = grads(net, x)
    with offload(net.blocks, arena, overlap=overlap):
        for _ in range(2):
            assert equal(grads(net, x), want)
            assert len(arena) == 0 and arena.resident_bytes == 0
    assert arena.bytes_in > 0
    assert equal(grads(net, x), want)


def test_bfloat16(net, arena):
    net, x = net.bfloat16(), torch.randn(ROWS, WIDTH).bfloat16()
    want = grads(net, x)
    with offload(net.blocks, arena):
        assert equal(grads(net, x), want)


def step(net, optimizer, x):
    net(x).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    net.zero_grad()


@pytest.mark.parametrize("kind", ["plain", "host", "disk"])
def test_prediction_equals_measurement(kind, tmp_path):
    arenas = []

    def build():
        net = Net()
        if kind != "plain":
            arenas.append(
                HostArena(1 << 23, pinned=False) if kind == "host" else DiskArena(1 << 23, tmp_path)
            )
            offload(net.blocks, arenas[-1])
        return net, torch.optim.AdamW(net.parameters()), torch.randn(ROWS, WIDTH)

    predicted = predict(build, step)
    net, optimizer, x = build()
    step(net, optimizer, x)
    with Meter(net, optimizer, inputs=x) as measured:
        step(net, optimizer, x)
    assert measured.ledger == predicted.ledger and measured.peak == predicted.peak
    assert measured.end == measured.base
    if arenas:
        fake, real = arenas
        assert fake.peak_bytes == real.peak_bytes > 0
        assert (fake.bytes_in, fake.bytes_out) == (real.bytes_in, real.bytes_out)
        real.close()
        fake.close()


def test_between_forward_and_backward_only_small_statistics_stay(net, arena):
    x, held = torch.randn(ROWS, WIDTH), {}
    for blocks in (2, BLOCKS):
        part = Net()
        part.blocks = net.blocks[:blocks]
        for kind in ("plain", "offloaded"):
            handle = offload(part.blocks, arena) if kind == "offloaded" else attach.Handle()
            with handle, Meter(part, inputs=x) as meter:
                loss = part(x).square().mean()
            stored = arena.resident_bytes if arena.place == "host" else 0
            held[kind, blocks] = meter.end - meter.base - stored
            del loss
    more = BLOCKS - 2
    # x, the norm's output, up's and gelu's (4 wide), dropout's output and mask, per block.
    assert held["plain", BLOCKS] - held["plain", 2] > 14 * ROW * more
    # Mean and inverse deviation of each row.
    assert held["offloaded", BLOCKS] - held["offloaded", 2] == 2 * 4 * ROWS * more


def test_on_disk_the_peak_hardly_grows_with_depth(net, tmp_path):
    x, peak = torch.randn(ROWS, WIDTH), {}
    parameters = sum(p.nbytes for p in net.blocks[0].parameters())
    for blocks in (2, BLOCKS):
        part = Net()
        part.blocks = net.blocks[:blocks]
        with DiskArena(1 << 23, tmp_path) as arena, offload(part.blocks, arena):
            with Meter(part, inputs=x) as meter:
                part(x).square().mean().backward()
        peak[blocks] = meter.peak - meter.base
        part.zero_grad()
    assert peak[BLOCKS] - peak[2] <= (BLOCKS - 2) * (parameters + 2 * 4 * ROWS)


def test_storages_of_earlier_blocks_are_gone(net, arena):
    seen = []

    def watch(module, args, output):
        seen.append(weakref.ref(output.untyped_storage()))

    handles = [block.up.register_forward_hook(watch) for block in net.blocks]
    with offload(net.blocks, arena):
        loss = net(torch.randn(ROWS, WIDTH)).sum()
        assert len(seen) == BLOCKS and all(storage() is None for storage in seen)
        loss.backward()
    for handle in handles:
        handle.remove()


def test_shared_inputs_and_buffers_stay(net, arena):
    x, table, mask = (torch.randn(ROWS, WIDTH) for _ in range(3))
    with offload(net.blocks, arena):
        grads(net, x)
        alone = arena.bytes_in
        want = grads(net, x, table=table, mask=mask)
        # The product with table is saved instead of the one with scale; the factors beside table
        # and mask need no gradient of their own, so nothing else is saved.
        assert arena.bytes_in == 2 * alone
    assert equal(grads(net, x, table=table, mask=mask), want)


def test_nothing_moves_without_gradients(net, arena):
    with offload(net.blocks, arena), torch.no_grad():
        net(torch.randn(ROWS, WIDTH))
    assert arena.bytes_in == 0


def test_checkpoint_inside_moves_only_the_inputs(net, arena):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    want = grads(net, x)

    def recompute(forward, *args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    handle = attach.Handle()
    for block in net.blocks:
        handle += attach.wrap(block, recompute)
    handle += offload(net.blocks, arena)
    with handle:
        assert equal(grads(net, x), want)
        # The first input is a leaf that the caller holds; it moves like the others.
        assert arena.peak_bytes == arena.bytes_in == BLOCKS * ROW
    assert equal(grads(net, x), want) and arena.bytes_in == BLOCKS * ROW


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_is_exact(net, arena, reentrant):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    want = grads(net, x)
    handle = offload(net.blocks, arena)
    for block in net.blocks:
        handle += attach.wrap(block, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    with handle:
        assert equal(grads(net, x), want)
    assert len(arena) == 0


def test_accumulation_of_two_graphs(net, arena):
    a, b = torch.randn(2, ROWS, WIDTH)
    net.eval()
    want = grads(net, a), grads(net, b)
    with offload(net.blocks, arena):
        losses = [net(x).square().mean() for x in (a, b)]
        held = arena.resident_bytes
        for loss in losses:
            loss.backward()
        got = [p.grad for p in net.parameters()]
    assert equal(got, [one + two for one, two in zip(*want, strict=True)])
    assert held > 0 and arena.peak_bytes == held
    del loss, losses
    assert arena.resident_bytes == 0


def test_full_arena_leaves_model_usable(net, arena):
    small, x = HostArena(30 * ROW, pinned=False), torch.randn(ROWS, WIDTH)
    want = grads(net, x)
    with offload(net.blocks, small), pytest.raises(ArenaFull, match="host arena is full"):
        grads(net, x)
    gc.collect()
    assert small.resident_bytes == 0 and len(small) == 0
    with offload(net.blocks, arena):
        assert equal(grads(net, x), want)


def test_remove_leaves_no_trace(net, arena):
    before = [dict(vars(block)) for block in net.blocks]
    handle = offload(net.blocks, arena)
    assert inspect.signature(net.blocks[0].forward) == inspect.signature(Block().forward)
    handle.remove()
    handle.remove()
    assert [dict(vars(block)) for block in net.blocks] == before
    outer = offload(net.blocks[0], arena) + attach.wrap(net.blocks[0], lambda f, x: f(x))
    outer.remove()
    inner = offload(net.blocks[0], arena)
    attach.wrap(net.blocks[0], lambda f, x: f(x))
    with pytest.raises(UsageError, match="changed again after it was attached"):
        inner.remove()


def test_deep_copy_runs_its_own_weights(net, arena):
    x = torch.randn(ROWS, WIDTH)
    with offload(net.blocks, arena):
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
        moved = arena.bytes_in
        ours, theirs = grads(net, x), grads(twin, x)
    assert arena.bytes_in > moved
    assert all(g is not None for g in theirs) and not equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned host memory needs CUDA")
def test_cuda_peak_falls_and_gradients_are_equal(net):
    net, x = net.cuda(), torch.randn(64 * ROWS, WIDTH, device="cuda")
    for block in net.blocks:
        block.scale = torch.full((1, WIDTH), 0.5, device="cuda")
    want = grads(net, x)
    with Meter(net, inputs=x, backend="cuda") as plain:
        grads(net, x)
    with HostArena(1 << 31) as arena, offload(net.blocks, arena):
        assert equal(grads(net, x), want)
        with Meter(net, inputs=x, backend="cuda") as ours:
            grads(net, x)
        assert ours.peak - ours.base < 0.8 * (plain.peak - plain.base)
