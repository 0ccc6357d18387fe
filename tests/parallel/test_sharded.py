import pytest
import torch
import torch.distributed as dist
from torch import nn

from holdfast.errors import UsageError
from holdfast.meter import Meter
from holdfast.parallel.launch import launch
from holdfast.parallel.partition import ContiguousArena, partition_activations
from holdfast.parallel.sharded import Sharded, Traffic
from holdfast.places import ArenaFull, HostArena

SHAPES = [torch.Size([2, 3]), torch.Size([]), torch.Size([4])]
BLOCKS, ROWS, WIDTH = 3, 67, 33  # 2211 elements of an input, which neither 2 nor 4 divides


def collectives():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = Sharded(SHAPES)
    whole = torch.arange(11.0)
    flat = torch.zeros(layout.padded)
    own = torch.cat([whole, torch.zeros(layout.padded - 11)])
    layout.own(flat).copy_(layout.own(own))
    with Traffic() as traffic:
        layout.gather_(flat)
        gathered = torch.equal(flat, own)
        flat.mul_(rank + 1)
        layout.begin_reduce(flat, layout.own(flat)).wait()
        dist.all_reduce(torch.ones(8, dtype=torch.float64))
        dist.broadcast(torch.ones(3), 0)
    mean = layout.own(own) * (ranks + 1) / 2
    sent = {kind: (traffic.elements(kind), traffic.nbytes(kind)) for kind in traffic.calls()}
    # What ranks say they hold, put together, is every element once.
    held: list = [None] * ranks
    pieces = [(n, s.start, s.stop, t.stop - t.start) for n, s, t in layout.pieces()]
    dist.all_gather_object(held, pieces)
    return gathered, torch.allclose(layout.own(flat), mean), sent, held, layout.shard


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x, scale):
        return x + self.drop(torch.tanh(self.linear(x))) * scale


def recomputed(kind):
    """Whether gradients are those of plain blocks; bytes that wait, and those of the arena."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    x, scale = torch.randn(ROWS, WIDTH), torch.full((1,), 0.5)

    def run():
        torch.manual_seed(1)
        h = x
        for block in blocks:
            h = block(h, scale)
        return h

    run().square().mean().backward()
    want = [p.grad for p in blocks.parameters()]
    shard = -(-ROWS * WIDTH // dist.get_world_size()) * 4
    arena = {
        "device": None,
        "host": HostArena(2**20, pinned=False),
        "contiguous": ContiguousArena(BLOCKS * (shard + 15)),
    }[kind]
    handle = partition_activations(blocks, arena=arena)
    for _ in range(2):
        for p in blocks.parameters():
            p.grad = None
        with Meter(blocks, inputs=[x, scale]) as meter:
            loss = run().square().mean()
            waiting = meter._storages.live_bytes() - meter.base
            loss.backward()
    got = [p.grad for p in blocks.parameters()]
    equal = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    handle.remove()
    used = {
        "device": lambda: None,
        "host": lambda: arena.peak_bytes,
        "contiguous": lambda: arena.used_peak,
    }[kind]()
    left = 0 if arena is None else len(arena)
    return equal, waiting, shard, used, left


def everything():
    # Time of four processes is dear.
    kinds = ("device", "host", "contiguous") if dist.get_world_size() == 2 else ("device",)
    return collectives(), {kind: recomputed(kind) for kind in kinds}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return request.param, launch(everything, request.param, limit=120.0)


def test_collectives_and_their_traffic(ranks):
    n, found = ranks
    for (gathered, reduced, sent, held, shard), _ in found:
        assert gathered and reduced and shard == -(-11 // n)
        whole = (n - 1) * shard
        assert sent == {
            "gather": (whole, 4 * whole),
            "reduce": (whole, 4 * whole),
            "all-reduce": (2 * 8 * (n - 1) // n, 16 * 8 * (n - 1) // n),
            "broadcast": (3, 12),
        }
        elements = [(number, i) for rank in held for number, a, b, _ in rank for i in range(a, b)]
        assert sorted(elements) == [(k, i) for k, s in enumerate(SHAPES) for i in range(s.numel())]
        assert all(b - a == length for rank in held for _, a, b, length in rank)


def test_partitioned_checkpoints(ranks):
    """Inputs wait as shards; on a CPU the host arena is the same memory (simulated)."""
    n, found = ranks
    checked = [(kind, *result) for _, by_kind in found for kind, result in by_kind.items()]
    assert len(checked) == {2: 6, 4: 4}[n]
    for kind, equal, waiting, shard, used, left in checked:
        assert equal and left == 0
        # What the mean of squares saves: the output, and a scalar for the loss.
        loss = ROWS * WIDTH * 4 + 4
        assert waiting - loss == (0 if kind == "contiguous" else BLOCKS * shard)
        want = {
            "device": None,
            "host": BLOCKS * shard,
            "contiguous": BLOCKS * (-(-shard // 16) * 16),
        }
        assert used == want[kind]


def test_a_contiguous_arena_is_a_stack_with_a_cap():
    arena = ContiguousArena(64)
    a, b = torch.arange(5.0), torch.arange(4.0).double()
    arena.put("a", a)
    arena.put("b", b)
    assert arena.used_peak == arena.resident_bytes == 64
    with pytest.raises(ArenaFull, match="device arena is full"):
        arena.put("c", a)
    arena.evict("a")
    with pytest.raises(ArenaFull):
        arena.put("c", a)  # the top is still held
    assert torch.equal(arena.get("b"), b)
    arena.evict("b")
    arena.put("c", a)
    assert torch.equal(arena.get("c"), a)
    with pytest.raises(UsageError, match="the key is taken"):
        arena.put("c", b)
