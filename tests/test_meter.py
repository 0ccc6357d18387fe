"""The meter's backends agree to the byte, and every byte has its category."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from holdfast.errors import UsageError
from holdfast.forms import Int4
from holdfast.ledger import CATEGORIES
from holdfast.meter import BACKENDS, Meter, fake_step, predict
from holdfast.plan.models import resolve
from holdfast.plan.trace import to_fake_
from holdfast.training.step import StepInBackward

RNG_STATE = torch.get_rng_state().nbytes

LLAMA = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_head": 4, "n_layer": 2,
    "n_positions": 128, "activation_function": "gelu", "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
OPTIMIZERS = {
    "none": None,
    "default": lambda p: torch.optim.AdamW(p),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "for-loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
}


def mlp(width: int = 32, hidden: int = 512) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def step_of(model, optimizer, batch):
    def step():
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def both(step, model, optimizer=None, inputs=()) -> tuple[Meter, Meter]:
    step()
    with Meter(model, optimizer, inputs=inputs) as logical:
        step()
    with Meter(model, optimizer, inputs=inputs, backend="allocator") as allocator:
        step()
    return logical, allocator


@pytest.fixture(scope="module", params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def source(request):
    return resolve(request.param)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_logical_equals_allocator_equals_prediction(source, kind):
    make, batch = OPTIMIZERS[kind], source.example_inputs(2, 64, "cpu")
    model = source.build("cpu")
    optimizer = make(model.parameters()) if make else None
    logical, allocator = both(step_of(model, optimizer, batch), model, optimizer, batch)
    assert logical.peak == allocator.peak
    assert logical.base == allocator.base == logical.end == allocator.end
    assert sum(logical.at_peak.values()) == logical.peak
    weights = sum(p.nbytes for p in model.parameters())
    assert logical.at_peak["parameters"] == weights
    assert logical.at_peak["inputs"] == sum(t.nbytes for t in batch.values())
    if make:
        steps = 4 * len(list(model.parameters()))
        assert logical.at_peak["optimizer"] == 2 * weights + steps

    shallow = source.build("meta")
    with fake_step():
        fake = to_fake_(shallow)
        fake_batch = source.example_inputs(2, 64, "cpu")
        fake_optimizer = make(fake.parameters()) if make else None
        step = step_of(fake, fake_optimizer, fake_batch)
        step()
        with Meter(fake, fake_optimizer, inputs=fake_batch) as predicted:
            step()
    assert predicted.ledger == logical.ledger


def test_two_runs_are_equal(source):
    batch, model = source.example_inputs(2, 64, "cpu"), source.build("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_of(model, optimizer, batch)
    (one, one_allocated), (two, two_allocated) = (
        both(step, model, optimizer, batch) for _ in range(2)
    )
    assert one.ledger == two.ledger
    assert [change for _, change, _ in one.log.events] == [c for _, c, _ in two.log.events]
    assert one_allocated.peak == two_allocated.peak


def test_predict_builds_and_runs_without_memory():
    def build():
        model = mlp()
        return model, torch.optim.AdamW(model.parameters()), torch.empty(16, 32)

    def step(model, optimizer, x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, x = build()
    logical, _ = both(lambda: step(model, optimizer, x), model, optimizer, x)
    assert predict(build, step).ledger == logical.ledger


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(3, 16, 3, padding=1), (4, 3, 32, 32)),
        (lambda: nn.Conv3d(2, 8, 3), (2, 2, 8, 8, 8)),
        (lambda: nn.LSTM(16, 32), (8, 4, 16)),
        (lambda: nn.GRU(16, 32, num_layers=2), (8, 4, 16)),
    ],
    ids=["conv2d", "conv3d", "lstm", "gru"],
)
def test_kernel_workspaces_are_only_seen_by_the_allocator(make, shape):
    model, x = make(), torch.randn(shape)

    def step():
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        model.zero_grad()

    logical, allocator = both(step, model, inputs=x)
    assert logical.base < logical.peak <= allocator.peak
    assert logical.end == logical.base


def test_checkpoints_differ_by_states_of_the_generator():
    model, x = nn.ModuleList(mlp() for _ in range(3)), torch.randn(64, 32, requires_grad=True)

    def step():
        h = x
        for block in model:
            h = checkpoint(block, h, use_reentrant=False)
        h.sum().backward()
        model.zero_grad()
        x.grad = None

    logical, allocator = both(step, model, inputs=x)
    states, rest = divmod(allocator.peak - logical.peak, RNG_STATE)
    assert rest == 0 and 1 <= states <= len(model) + 1


def test_gradients_are_added_in_place_as_without_the_meter():
    # Under a dispatch mode autograd never reuses a gradient's memory; the log must not show that.
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    x = torch.randn(256, 64, requires_grad=True)

    def step():
        h = x.neg()
        sum(linear(h).square().sum() for linear in model).backward()
        model.zero_grad()
        x.grad = None

    logical, allocator = both(step, model, inputs=x)
    assert logical.peak == allocator.peak


def test_a_sum_in_a_python_function_takes_new_memory():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 + grad * 3

    x = torch.randn(1000, requires_grad=True)

    def step():
        Twice.apply(x).sum().backward()
        x.grad = None

    logical, allocator = both(step, None, inputs=x)
    # The input, two products and their sum, beside the loss and the gradient that comes in.
    assert logical.peak == allocator.peak == 4 * (4 * 1000 + 2)


def test_categories_by_hand():
    model, x = mlp(32, 512), torch.randn(64, 32)
    model.register_buffer("table", torch.zeros(100))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, foreach=False)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    logical, _ = both(step, model, optimizer, x)
    weights = sum(p.nbytes for p in model.parameters())
    forward = logical.ledger.column("device", "forward")
    assert forward["parameters"] == forward["optimizer"] == weights
    assert forward["buffers"] == 400 and forward["inputs"] == x.nbytes
    assert forward["gradients"] == 0
    # Before and after GELU.
    assert forward["activations"] >= 2 * 64 * 512 * 4
    stepping = logical.ledger.column("device", "step")
    assert stepping["gradients"] == weights and stepping["activations"] == 0
    for phase in logical.ledger.phases():
        column = logical.ledger.column("device", phase)
        assert set(column) == set(CATEGORIES) and all(v >= 0 for v in column.values())


def test_gradients_that_backward_consumes_are_gradients():
    model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))), torch.randn(8, 64)
    optimizer = StepInBackward(torch.optim.AdamW(model.parameters(), fused=True))

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    logical, allocator = both(step, model, optimizer, x)
    assert logical.peak == allocator.peak
    gradients = logical.ledger.column("device", "backward")["gradients"]
    assert 0 < gradients <= 64 * 64 * 4 + 64 * 4
    assert logical.ledger.phases() == ["forward", "backward"]
    assert logical.ledger.column("device", "backward")["optimizer"] > 2 * 6 * 64 * 64 * 4


def test_recomputed_activations_are_activations():
    model, x = mlp(32, 2048), torch.randn(64, 32, requires_grad=True)

    def step():
        checkpoint(model, x, use_reentrant=False).sum().backward()
        model.zero_grad()
        x.grad = None

    logical, _ = both(step, model, inputs=x)
    # The peak is in the backward of GELU: its recomputed input, and two gradients.
    backward = logical.ledger.column("device", "backward")
    assert backward["activations"] >= 64 * 2048 * 4
    assert backward["temporary"] == 2 * 64 * 2048 * 4


def test_python_numbers_that_autograd_keeps_are_only_seen_by_the_allocator():
    x = torch.randn(1000, requires_grad=True)

    def step():
        (x * 0.5).exp().sum().backward()
        x.grad = None

    logical, allocator = both(step, None, inputs=x)
    assert 8 <= allocator.peak - logical.peak <= 16


def test_a_leak_shows_at_the_end():
    model, x, kept = mlp(), torch.randn(64, 32), []

    def step():
        out = model(x)
        out.sum().backward()
        model.zero_grad()
        kept.append(out.detach())

    step()
    for backend in ("logical", "allocator"):
        with Meter(model, inputs=x, backend=backend) as meter:
            step()
        assert meter.end - meter.base == 64 * 32 * 4
    with Meter(model, inputs=x) as meter:
        model(x).sum().backward()
    assert meter.end - meter.base == sum(p.nbytes for p in model.parameters())
    assert meter.ledger.column("device", "backward")["gradients"] > 0


def test_wrapper_subclasses_are_opened():
    packed = Int4(group=32).encode(torch.randn(64, 256))
    model = nn.Linear(256, 64, bias=False)
    model.weight = nn.Parameter(packed, requires_grad=False)
    with Meter(model) as meter:
        twin = Int4(group=32).encode(torch.randn(64, 256))
    assert meter.base == Int4(group=32).nbytes((64, 256), torch.float32) < 64 * 256
    assert meter.end == 2 * meter.base
    del twin


def test_views_count_once():
    x = torch.zeros(8, 100)
    with Meter(inputs=x) as meter:
        views = [x.T, x[2:4], x.view(-1), x.expand(3, 8, 100), x.detach()]
        copy = x.clone()
        views += [copy[0], copy.T]
    assert meter.base == 3200 and meter.peak == meter.end == 6400
    del views, copy


def test_a_storage_that_grows_is_read_again():
    with Meter() as meter:
        x = torch.empty(0)
        x.resize_(1000)
        x.resize_(500)
    assert meter.peak == meter.end == 4000, "shrinking a tensor keeps its storage"
    del x


def test_what_dies_inside_does_not_add_up():
    with Meter() as meter:
        for _ in range(5):
            torch.zeros(1000)
    assert meter.peak == 4000 and meter.end == meter.base == 0


def test_bad_backends_name_the_remedy():
    with pytest.raises(UsageError, match="backend 'rss' is unknown; use one of"):
        Meter(backend="rss")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="'cuda' needs a CUDA device; use 'logical'"):
            Meter(backend="cuda")
    assert set(BACKENDS) == {"logical", "allocator", "cuda"}


def test_an_error_inside_leaves_nothing_behind():
    model = mlp()
    with pytest.raises(ZeroDivisionError):
        with Meter(model):
            raise ZeroDivisionError
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_resized_storage_is_followed():
    kept = torch.zeros(1000)
    storage = kept.untyped_storage()
    original = torch.UntypedStorage.resize_
    with Meter(inputs=[kept]) as meter:
        storage.resize_(0)
        empty = meter._storages.live_bytes()
        storage.resize_(8000)
        storage.resize_(4000)
    assert (meter.base, empty, meter.peak, meter.end) == (4000, 0, 8000, 4000)
    assert torch.UntypedStorage.resize_ is original


def test_what_an_optimizer_says_it_holds_has_its_category():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.held = {"gradients": [torch.zeros(10)], "optimizer": [torch.zeros(20)]}
    with Meter(model, optimizer) as meter:
        torch.zeros(1)
    assert meter.at_peak["gradients"] == 40 and meter.at_peak["optimizer"] == 80
