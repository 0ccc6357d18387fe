"""MEMO: rows of what a layer saves are swapped or computed again, and gradients do not change."""

import copy
import threading

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from holdfast.errors import DoesNotFit, HoldfastError, UsageError
from holdfast.meter import Meter
from holdfast.native.allocator import AllocatorPeak
from holdfast.parallel.addresses import Planned
from holdfast.parallel.memo_swap import Memo, Sizes, host_bytes, solve_rows
from holdfast.parallel.token_rows import attend
from holdfast.places import SavedTensorChanged, copies
from holdfast.training.step import recompute

H, HEADS, N, B = 32, 4, 48, 2
PLENTY = 2**30


def llama(depth=4, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 48, "vocab_size": 64, "use_cache": False}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = {"num_hidden_layers": depth, **sizes, **heads, **config}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config)).train()


def gpt2(depth=4, **config):
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_embd": H, "n_head": HEADS, "n_positions": 64, "vocab_size": 64}
    config = {"n_layer": depth, "activation_function": "gelu", **drops, **sizes, **config}
    config |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**config)).train()


MODELS = {"llama": llama, "gpt2": gpt2}


def blocks(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def tokens(n=N, seed=1):
    return torch.randint(1, 64, (B, n), generator=torch.Generator().manual_seed(seed))


def grads(model, ids, **inputs):
    model.zero_grad()
    model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(got, want, atol=1e-6):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


class Own(nn.Module):
    """A block with parts of its own."""

    def __init__(self, h=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(h), nn.Linear(h, 3 * h)
        self.out, self.mlp = nn.Linear(h, h), nn.Linear(h, h)

    def pre(self, x):
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return q, k, v

    def post(self, x, attention):
        x = x + self.out(attention)
        return x + self.mlp(x).relu()

    def forward(self, x):
        return self.post(x, attend(*self.pre(x), None, None))


class Stack(nn.Module):
    def __init__(self, make, depth=4):
        super().__init__()
        self.body = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x):
        for block in self.body:
            x = block(x)
        return x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
def test_gradients_equal_plain_training_and_the_host_holds_what_the_formula_says(name, alpha):
    model, ids = MODELS[name](), tokens()
    want = grads(model, ids)
    memo = Memo(blocks(model), host=PLENTY, alpha=alpha)
    for _ in range(2):
        same(grads(model, ids), want)
    assert memo.rows == alpha * N
    assert memo.host_nbytes == host_bytes(memo.sizes, 4, memo.rows)
    memo.remove()
    assert memo.host_nbytes == 0
    assert all(torch.equal(a, b) for a, b in zip(grads(model, ids), want, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_in_double_precision_too_with_padding(name):
    model, ids = MODELS[name]().double(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    want = grads(model, ids, attention_mask=mask)
    Memo(blocks(model), host=PLENTY, alpha=0.3)
    same(grads(model, ids, attention_mask=mask), want, atol=1e-13)


def test_a_gpt_block_saves_16bsh_elements_and_its_statistics():
    model, ids = gpt2(), tokens()
    memo = Memo(blocks(model), host=PLENTY, alpha=0.5)
    grads(model, ids)
    element, number = 4 * B * N * H, 4 * B * N
    assert memo.sizes.inputs == element
    assert memo.sizes.attention == element + HEADS * number
    assert memo.sizes.others == 14 * element + 4 * number
    # 2 of 4 layers: input, attention output and log-sum-exp whole, of the rest 24 of 48 tokens.
    assert memo.host_nbytes == 2 * (2 * element + 4 * number + 7 * element + 2 * number)


def peak(make, depth, alpha=None, checkpoints=False):
    """Bytes above weights and gradients, and S."""
    model, ids, memo = make(depth), tokens(), None
    if alpha is not None:
        memo = Memo(blocks(model), host=PLENTY, alpha=alpha)
    if checkpoints:
        for block in blocks(model):
            recompute(block)

    def step():
        model.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids).loss.backward()

    step()
    with Meter(model, inputs=ids) as meter:
        step()
    return meter.peak - meter.base, memo and memo.sizes.total


@pytest.mark.parametrize("name", MODELS)
def test_device_bytes_do_not_grow_with_depth(name):
    make = MODELS[name]
    (at_8, size), (at_16, _) = (peak(make, depth, alpha=0.5) for depth in (8, 16))
    assert at_8 == at_16
    # Two rounding buffers, and what one layer's backward holds beside them.
    assert 2 * size < at_8 < 3 * size
    # Plain training keeps S for each layer, full recompute its input.
    assert peak(make, 4)[0] - peak(make, 3)[0] > 0.9 * size
    inputs = peak(make, 4, checkpoints=True)[0] - peak(make, 3, checkpoints=True)[0]
    assert inputs == 4 * B * N * H


def test_the_last_two_layers_are_never_swapped():
    model, ids = gpt2(3), tokens()
    memo = Memo(blocks(model), host=PLENTY, alpha=1)
    grads(model, ids)
    assert [bool(layer.slots) for layer in memo.layers] == [True, False, False]
    shallow = gpt2(2)
    memo = Memo(blocks(shallow), host=0, alpha="auto")
    same(grads(shallow, ids), grads(gpt2(2), ids))
    assert memo.host_nbytes == 0


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.attention += "attention" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def test_attention_is_never_computed_again_and_other_rows_are_only_once():
    model, ids = gpt2(5), tokens()
    Memo(blocks(model), host=PLENTY, alpha=0.25)
    grads(model, ids)
    rows: list[int] = []
    for block in blocks(model):
        block.mlp.c_fc.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    with _Calls() as calls:
        grads(model, ids)
    assert calls.attention == 5
    assert rows == [N] * 5 + [N * 3 // 4] * 3
    # Full recompute runs it again in every layer.
    plain = gpt2(5)
    for block in blocks(plain):
        recompute(block)
    with _Calls() as calls:
        grads(plain, ids)
    assert calls.attention == 10


def test_copies_run_beside_the_next_layer(monkeypatch):
    model, ids = gpt2(5), tokens()
    memo = Memo(blocks(model), host=PLENTY, alpha=1)
    want = grads(model, ids)
    second, really, waited = threading.Event(), copies._copy, []

    def held(to: Tensor, source: Tensor) -> None:
        # The first layer's copies cannot end before the second layer's forward has begun.
        waited.append(second.wait(timeout=30))
        really(to, source)

    monkeypatch.setattr(copies, "_copy", held)
    handle = blocks(model)[1].ln_1.register_forward_pre_hook(lambda *_: second.set())
    same(grads(model, ids), want)
    assert waited and all(waited)
    handle.remove()
    # So does the way back: the third layer is on the device while the fourth runs backward.
    begun: list[int] = []
    start = memo._copies.start

    def noted(pairs):
        begun.append(memo._turn)
        return start(pairs)

    monkeypatch.setattr(memo._copies, "start", noted)
    same(grads(model, ids), want)
    assert begun == [-1, -1, -1, 3, 2, 1]


def test_a_failed_copy_is_an_error(monkeypatch):
    model = gpt2()
    Memo(blocks(model), host=PLENTY, alpha=1)

    def broken(to, source):
        raise RuntimeError("no such memory")

    monkeypatch.setattr(copies, "_copy", broken)
    with pytest.raises(HoldfastError, match="a copy failed: no such memory"):
        grads(model, tokens())


@pytest.mark.parametrize("seed", range(40))
def test_solved_rows_equal_brute_force(seed):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=g))

    n = draw(2, 60)
    sizes = Sizes(draw(1, 50), draw(1, 50), n * draw(0, 40), n)
    layers, bandwidth = draw(1, 9), draw(1, 100) / 7
    seconds, host = draw(0, 400) / 3, host_bytes(sizes, layers, 0) + draw(0, 9000)
    fitting = [
        rows
        for rows in range(n + 1)
        if sizes.swapped(rows) / bandwidth <= seconds and host_bytes(sizes, layers, rows) <= host
    ]
    got = solve_rows(sizes, layers, bandwidth=bandwidth, seconds=seconds, host=host)
    assert got == max(fitting, default=0)


def test_auto_takes_what_the_host_and_the_link_allow():
    model, ids = gpt2(), tokens()
    memo = Memo(blocks(model), host=PLENTY)
    want = grads(model, ids)
    sizes = memo.sizes
    memo.remove()
    tight = Memo(blocks(model), host=host_bytes(sizes, 4, 20) + 5, bandwidth=1e12, seconds=1.0)
    same(grads(model, ids), want)
    assert tight.rows == 20 and tight.host_nbytes <= tight.host
    tight.remove()
    slow = Memo(blocks(model), host=PLENTY, bandwidth=sizes.swapped(7) + 1.0, seconds=1.0)
    same(grads(model, ids), want)
    assert slow.rows == 7
    slow.remove()
    # Input and attention output cannot stay, however slow the link is.
    Memo(blocks(model), host=PLENTY, bandwidth=1.0, seconds=1e-9)
    same(grads(model, ids), want)


def test_a_small_alpha_is_one_token_and_not_none():
    model, ids = gpt2(), tokens()
    memo = Memo(blocks(model), host=PLENTY, alpha=0.001)
    grads(model, ids)
    assert memo.rows == 1
    exact = Memo(blocks(gpt2()), host=PLENTY, alpha=0.55)
    assert exact._solve(exact.layers[0], Sizes(1, 1, 100, 100), lambda: None) == 55


def test_another_shape_is_planned_anew():
    model = llama()
    memo = Memo(blocks(model), host=PLENTY, alpha=0.5)
    for n in (N, 20, 31):
        same(grads(model, tokens(n)), grads(llama(), tokens(n)))
        assert memo.rows == -(-n // 2)
        assert memo.host_nbytes == host_bytes(memo.sizes, 4, memo.rows)


@pytest.mark.parametrize("name", MODELS)
def test_frozen_weights_half_precision_and_own_blocks(name):
    model, ids = MODELS[name](), tokens()
    model.requires_grad_(False)
    for block in blocks(model):
        block.mlp.requires_grad_(True)
    want = grads(model, ids)
    Memo(blocks(model), host=PLENTY, alpha=0.5)
    same(grads(model, ids), want)
    half = MODELS[name]().bfloat16()
    want = grads(half, ids)
    Memo(blocks(half), host=PLENTY, alpha=0.5)
    assert all(g.dtype is torch.bfloat16 for g in grads(half, ids))
    same(grads(half, ids), want, atol=1e-2)
    torch.manual_seed(0)
    stack, x = Stack(Own), torch.randn(3, 21, 16)
    stack(x).square().mean().backward()
    want = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    Memo(stack.body, host=PLENTY, alpha=0.4)
    stack(x).square().mean().backward()
    same([p.grad for p in stack.parameters()], want)


def test_without_gradients_blocks_are_plain():
    model, ids = llama(), tokens()
    want = model(ids).logits
    memo = Memo(blocks(model), host=0, alpha=1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    assert memo.sizes is None


class Convolution(Own):
    """Mixes tokens outside attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def post(self, x, attention):
        return super().post(x, attention) + self.conv(x.mT).mT


class WrongAxis(Own):
    """Normalises over the tokens."""

    def pre(self, x):
        return super().pre((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))


class Random(Own):
    def post(self, x, attention):
        return torch.dropout(super().post(x, attention), 0.5, True)


class NotItself(Own):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "make, message",
    [
        (Convolution, "Convolution is not token-wise: y of 12 tokens differs"),
        (WrongAxis, "WrongAxis is not token-wise: q of 12 tokens differs"),
        (Random, "attention alone and have no dropout"),
        (NotItself, "NotItself does not compute post"),
    ],
)
def test_blocks_whose_rows_cannot_be_computed_again_are_refused(make, message):
    stack = Stack(make)
    Memo(stack.body, host=PLENTY, alpha=0.5)
    with pytest.raises(UsageError, match=message):
        stack(torch.randn(2, 12, 16))


def test_each_backward_follows_its_forward_and_runs_once():
    stack, x = Stack(Own), torch.randn(2, 12, 16)
    Memo(stack.body, host=PLENTY, alpha=0.5)
    first, second = stack(x).sum(), stack(x).sum()
    second.backward(retain_graph=True)
    with pytest.raises(HoldfastError, match="backward of an earlier forward"):
        first.backward()
    with pytest.raises(HoldfastError, match="run it once"):
        second.backward()
    stack(x).sum().backward()


def test_a_checkpoint_around_it_has_nothing_to_recompute_or_is_refused():
    model, ids = gpt2(), tokens()
    want = grads(model, ids)
    Memo(blocks(model), host=PLENTY, alpha=0.5)
    handles = [recompute(block) for block in blocks(model)]
    same(grads(model, ids), want)
    for handle in handles:
        handle.remove()
    block, x = blocks(model)[0], torch.randn(B, N, H, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(UsageError, match="turn gradient checkpointing off"):
        y.sum().backward()


def test_changes_in_place_are_seen():
    stack, x = Stack(Own), torch.randn(2, 12, 16)
    Memo(stack.body, host=PLENTY, alpha=0.5)
    y = stack.body[0](x)
    z = stack.body[1](y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(SavedTensorChanged):
        stack.body[3](stack.body[2](z))
    y = stack.body[2](stack.body[1](stack.body[0](x)))
    out = stack.body[3](y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(SavedTensorChanged):
        out.sum().backward()


def test_bad_input():
    with pytest.raises(UsageError, match=r"alpha=1.5 is outside \[0, 1\]"):
        Memo(blocks(gpt2()), host=0, alpha=1.5)
    with pytest.raises(UsageError, match="Linear is built neither"):
        Memo([nn.Linear(2, 2)], host=0)
    model = gpt2()
    Memo(blocks(model), host=1000)
    with pytest.raises(DoesNotFit, match=r"2 layers take .* budget is 1000 B"):
        grads(model, tokens())
    model = gpt2()
    Memo(blocks(model), host=10**5, alpha=1)
    with pytest.raises(DoesNotFit, match="raise it or lower alpha"):
        grads(model, tokens())
    with pytest.raises(UsageError, match="2 tokens or more"):
        model(tokens(1))
    with pytest.raises(UsageError, match=r"remove\(\) it first"):
        copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="autocast"):
        model(tokens())


@pytest.fixture
def one_thread():
    # Attention's backward allocates 128 bytes in each further thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_planned_step_allocates_nothing_outside_its_arena(one_thread):
    torch.manual_seed(0)
    model = gpt2(6)
    x = torch.randn(B, N, H, requires_grad=True)
    weight = torch.randn(B, N, H)

    def step():
        model.zero_grad(set_to_none=False)
        y = x
        for block in blocks(model):
            y = block(y)
        torch.autograd.backward(y, weight, inputs=list(blocks(model).parameters()))

    step()
    want = [p.grad.clone() for p in blocks(model).parameters()]
    memo = Memo(blocks(model), host=PLENTY, alpha=0.5)
    planned = Planned(step)
    for _ in range(3):
        planned()
    same([p.grad for p in blocks(model).parameters()], want)
    with AllocatorPeak() as allocator:
        planned()
    assert (allocator.allocations, planned.outside) == (0, 0)
    layout = planned.layout
    # 6 layers forward, 6 backward, and between them what comes before backward's first layer.
    assert len(layout.segments) >= 12
    assert layout.lower_bound <= layout.height <= 1.25 * layout.lower_bound
    assert layout.height < 3 * memo.sizes.total
    with Meter(model, inputs=[x, weight, planned.memory]) as meter:
        planned()
    assert meter.peak == meter.base
