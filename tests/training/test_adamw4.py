import copy
import pickle
import statistics
import time

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from holdfast import native
from holdfast.errors import UsageError
from holdfast.forms import maps
from holdfast.meter import Meter
from holdfast.native.adamw4 import decode, encode
from holdfast.training.optim.adamw4 import METHOD, AdamW4, state_bytes

built = pytest.mark.skipif(not native.usable(), reason=f"native kernels: {native._open()[1]}")
PATHS = ["off", *native.usable()]
# 1-D, 2-D, 3-D, 4-D; blocks that end with rows, inside rows, and span several; ragged ends.
SHAPES = [(1,), (300,), (5, 7), (256, 384), (257, 129), (100, 64, 3), (90, 1, 33), (64, 3, 3, 16)]


def _parameter(shape, dtype=torch.float32) -> torch.nn.Parameter:
    g = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype))


def _gradients(shape, dtype, steps: int = 3) -> list[torch.Tensor]:
    """Gradients over six decades; the second step has a stretch of zeros, the third is all zero."""
    g = torch.Generator().manual_seed(1)
    decades = [10 ** (6 * torch.rand(shape, generator=g) - 5) for _ in range(steps)]
    out = [(torch.randn(shape, generator=g) * d).to(dtype) for d in decades]
    out[1].view(-1)[:200] = 0
    out[2].zero_()
    return out


def _run(shape, second: str, path: str, dtype=torch.float32, **options) -> tuple:
    p = _parameter(shape, dtype)
    optimizer = AdamW4([p], lr=1e-2, second=second, min_numel=1, **options)
    with native.force(path):
        for grad in _gradients(shape, dtype):
            p.grad = grad
            optimizer.step()
    return p.detach(), optimizer.state[p], optimizer


def _numpy_codes(x: np.ndarray, levels: list[float]) -> np.ndarray:
    return np.abs(x[:, None].astype(np.float64) - levels).argmin(1)


def _numpy(shape, second: str) -> tuple[np.ndarray, ...]:
    """Blocks or rank-1 in numpy, unpacked: parameter, codes of m and v in the order of elements."""
    f, lr, wd = np.float32, 1e-2, 0.01
    signed, linear = (np.array(maps.levels(n), f) for n in ("dynamic4", "linear4"))
    p, n = _parameter(shape).detach().numpy().ravel(), int(np.prod(shape))
    block, where = np.arange(n) // 128, np.indices(shape).reshape(len(shape), n)
    m = v = m_scale = v_scale = np.zeros(n, f)
    for step, grad in enumerate(_gradients(shape, torch.float32), start=1):
        g = grad.numpy().ravel()
        m = m * f(0.9) * m_scale + f(1 - 0.9) * g
        v = v * f(0.999) * v_scale + f(1 - 0.999) * (g * g)
        size, root = f(lr / (1 - 0.9**step)), f(1 / (1 - 0.999**step) ** 0.5)
        p = p * f(1 - lr * wd) + (-size * m) / (np.sqrt(v) * root + f(1e-8))
        m_scale = np.array([np.abs(m[block == b]).max() for b in range(block[-1] + 1)])[block]
        if second == "block":
            v_scale = np.array([v[block == b].max() for b in range(block[-1] + 1)])[block]
        else:
            tops = [
                np.array([v[i == k].max() for k in range(s)])[i]
                for i, s in zip(where, shape, strict=True)
            ]
            v_scale = np.minimum.reduce(tops)
        with np.errstate(divide="ignore"):
            m_inverse, v_inverse = (np.where(s > 0, 1 / s, f(0)) for s in (m_scale, v_scale))
        m_code, v_code = _numpy_codes(m * m_inverse, signed), _numpy_codes(v * v_inverse, linear)
        m, v = signed[m_code], linear[v_code]
    return p, m_code, v_code


def _unpacked(code: torch.Tensor, n: int) -> np.ndarray:
    return torch.cat([code & 15, code >> 4], 1).flatten()[:n].numpy()


def test_maps_are_the_papers():
    signed = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    want = [*(-x for x in reversed(signed)), 0.0, *signed, 1.0]
    assert maps.levels("dynamic4") == pytest.approx(want)
    assert maps.levels("linear4") == tuple(k / 16 for k in range(1, 17))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("second", ["block", "rank1"])
@pytest.mark.parametrize("shape", [(300,), (48, 129), (64, 128), (30, 40, 5)], ids=str)
def test_equals_numpy(shape, second, path):
    if second == "rank1" and len(shape) == 1:
        second = "block"
    p, state, _ = _run(shape, second, path)
    want_p, want_m, want_v = _numpy(shape, second)
    assert np.array_equal(p.numpy().ravel(), want_p)
    assert np.array_equal(_unpacked(state["m_code"], p.numel()), want_m)
    assert np.array_equal(_unpacked(state["v_code"], p.numel()), want_v)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second", ["block", "rank1", "factor"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_native_variant_equals_torch_bitwise(shape, second, dtype):
    want_p, want, _ = _run(shape, second, "off", dtype)
    for variant in native.usable():
        p, state, _ = _run(shape, second, variant, dtype)
        assert torch.equal(p, want_p), variant
        assert all(torch.equal(state[k], want[k]) for k in want), variant


@built
@pytest.mark.parametrize("second", ["block", "rank1"])
def test_the_number_of_threads_changes_nothing(second):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _run((257, 512), second, native.usable()[-1])
        torch.set_num_threads(3)
        three = _run((257, 512), second, native.usable()[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert all(torch.equal(one[1][k], three[1][k]) for k in one[1])


@pytest.mark.parametrize("name", ["dynamic4", "linear4"])
def test_encoding_what_was_decoded_changes_nothing(name):
    code = torch.randint(
        256, (50, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(encode(decode(code, name), name), code)


def test_bytes_by_hand():
    # 98,304 elements: two codes a byte for m and v, 768 block scales, 256 + 384 maxima, the step.
    assert state_bytes((256, 384), torch.float32) == 2 * 49_152 + 4 * 768 + 4 * 640 + 4
    assert state_bytes((256, 384), torch.float32, "block") == 2 * 49_152 + 2 * 4 * 768 + 4
    assert state_bytes((256, 384), torch.float32, "factor") == 49_152 + 4 * 768 + 4 * 640 + 4
    assert state_bytes((64, 64), torch.bfloat16) == 8 * 4096 + 4


@pytest.mark.parametrize("shape", [(4097,), (1, 5000), (4, 5000)], ids=str)
def test_thin_tensors_use_blocks(shape):
    assert state_bytes(shape, torch.float32, "rank1") == state_bytes(shape, torch.float32, "block")


@built
def test_meter_counts_at_most_1_1_bytes_per_parameter():
    shapes = [(1024, 4096), (4096, 1024)] * 2 + [(1024, 1024)] * 3 + [(1024,)] * 9
    model = torch.nn.ParameterList(torch.zeros(s) for s in shapes)
    for p in model:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = AdamW4(model.parameters())
    optimizer.step()
    with Meter(model, optimizer) as logical:
        optimizer.step()
    with Meter(model, optimizer, backend="allocator") as allocator:
        optimizer.step()
    n = sum(p.numel() for p in model)
    assert n > 19_000_000
    kept = sum(state_bytes(p.shape, p.dtype) for p in model)
    assert logical.at_peak["optimizer"] == kept <= 1.1 * n
    # Nothing but the states: no fp32 copy appears while stepping.
    assert logical.peak - logical.base <= 4096
    assert allocator.peak - allocator.base <= 4096


def test_the_torch_path_works_in_bounded_scratch():
    p = torch.nn.Parameter(torch.zeros(2048, 2048))
    p.grad = torch.ones_like(p)
    optimizer = AdamW4([p])
    model = torch.nn.ParameterList([p])
    with native.force("off"):
        optimizer.step()
        with Meter(model, optimizer, backend="allocator") as meter:
            optimizer.step()
    assert meter.peak - meter.base < p.nbytes / 2


def test_rank1_keeps_outlier_rows_better_than_blocks():
    # Consecutive elements of a block lie in one row; outlier columns are what blocks cannot see.
    g = torch.Generator().manual_seed(0)
    grad = torch.rand(128, 128, generator=g) + 0.5
    grad[:, :4] *= 30
    errors = {}
    for second in ("rank1", "block"):
        p = torch.nn.Parameter(torch.zeros(128, 128))
        p.grad = grad
        optimizer = AdamW4([p], second=second)
        optimizer.step()
        v = 0.001 * grad.square()
        errors[second] = ((optimizer.moments(p)[1] - v).abs() / v).mean().item()
    assert errors["rank1"] < 0.5 * errors["block"]


def test_new_states_decode_to_zero():
    p = _parameter((64, 128))
    p.grad = torch.zeros_like(p)
    optimizer = AdamW4([p], weight_decay=0.0)
    start = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, start)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in optimizer.moments(p))


def test_small_tensors_follow_torch():
    ours, theirs = _parameter((64, 64)), _parameter((64, 64))
    pair = AdamW4([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    for grad in _gradients((64, 64), torch.float32):
        ours.grad, theirs.grad = grad, grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert pair[0].state[ours]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_a_transposed_parameter_equals_a_contiguous_one():
    values, grad = torch.randn(96, 80), torch.randn(96, 80)
    plain, turned = (torch.nn.Parameter(t) for t in (values.clone(), values.mT.contiguous().mT))
    plain.grad, turned.grad = grad, grad.clone()
    for p in (plain, turned):
        AdamW4([p]).step()
    assert torch.equal(plain, turned) and not turned.is_contiguous()


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_block(path):
    p = _parameter((64, 128))
    p.grad = torch.ones_like(p)
    p.grad[5, 7] = torch.nan
    optimizer = AdamW4([p])
    with native.force(path):
        for _ in range(2):
            optimizer.step()
            p.grad[5, 7] = 1.0
    wrong = p.isnan()
    assert wrong[5].all() and wrong.sum() == 128
    # Rank-1 scales confine it further.
    assert optimizer.moments(p)[1].isnan().sum() == 1


def test_steps_from_hooks_equal_one_step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(80, 96), torch.nn.Linear(96, 8))
    other = copy.deepcopy(model)
    x = torch.randn(4, 80)
    optimizer, hooked = AdamW4(model.parameters()), AdamW4(other.parameters())
    for p in other.parameters():
        p.register_post_accumulate_grad_hook(hooked.step_param)
    for _ in range(3):
        for m in (model, other):
            m.zero_grad()
            m(x).square().sum().backward()
        optimizer.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_an_update_is_visible_to_autograd():
    p = torch.nn.Parameter(torch.ones(64, 128))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    AdamW4([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fake_tensors_make_the_same_states():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(64, 128))
        optimizer = METHOD.apply([("p", p)], 1e-3)
        p.grad = torch.empty_like(p)
        for _ in range(2):
            optimizer.step()
        kept = sum(t.nbytes for t in optimizer.state[p].values())
    assert kept == state_bytes((64, 128), torch.float32)


def test_operator_is_well_formed():
    p = _parameter((64, 128))
    p.grad = torch.ones_like(p)
    optimizer = AdamW4([p])
    optimizer.step()
    s = optimizer.state[p]
    state = (s["m_code"], s["m_scale"], s["v_code"], s["v_scale"])
    arguments = (p.detach(), p.grad, *state, "rank1", s["step"], 1e-3, 0.9, 0.999, 1e-8, 0.01)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.holdfast.adamw4_.default, arguments, test_utils=tests)


def test_survives_pickling():
    _, state, optimizer = _run((64, 128), "rank1", "off")
    again = pickle.loads(pickle.dumps(optimizer))
    (p,) = again.param_groups[0]["params"]
    assert all(torch.equal(again.state[p][k], t) for k, t in state.items())
    again.step_param(p)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(100, 64, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"sparse gradient.*\(100, 64\).*sparse=False"):
        AdamW4(table.parameters()).step()


def test_meta_parameters_are_refused():
    p = torch.nn.Parameter(torch.empty(64, 128, device="meta"))
    p.grad = torch.empty_like(p)
    with pytest.raises(UsageError, match="meta device"):
        AdamW4([p]).step()


def test_foreign_parameters_are_refused():
    with pytest.raises(UsageError, match=r"shape \(3,\) is not a parameter"):
        AdamW4([_parameter((4,))]).step_param(_parameter((3,)))


def test_a_state_of_other_settings_is_refused():
    _, _, blocks = _run((64, 128), "factor", "off")
    other = AdamW4([_parameter((64, 128))])
    mixed = {**blocks.state_dict(), "param_groups": other.state_dict()["param_groups"]}
    with pytest.raises(UsageError, match="same settings"):
        other.load_state_dict(mixed)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"second": "rank2"}, "nearest known: rank1"),
        ({"lr": -1.0}, "lr=-1.0 must be >= 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps=0.0 must be > 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        AdamW4([_parameter((4,))], **options)


def test_double_precision_is_refused():
    with pytest.raises(UsageError, match=r"torch\.float64.*another optimizer"):
        AdamW4([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])


@built
def test_a_step_takes_no_longer_than_the_default_adamw():
    shapes = [(2048, 1024)] * 3 + [(1024, 2048)] * 3

    def parameters():
        made = [torch.nn.Parameter(torch.full(s, 0.01)) for s in shapes]
        for p in made:
            p.grad = torch.full_like(p, 1e-3)
        return made

    ours, default = AdamW4(parameters()), torch.optim.AdamW(parameters())
    seconds: dict = {ours: [], default: []}
    for _ in range(9):
        for optimizer, times in seconds.items():
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
    # The first steps make the states.
    fastest = [statistics.median(times[2:]) for times in seconds.values()]
    assert fastest[0] <= fastest[1]
