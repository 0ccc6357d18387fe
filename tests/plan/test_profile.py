import json

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.plan import contention
from holdfast.plan.hardware import load_hardware
from holdfast.plan.profile import Op, Profile, op_key

F32 = torch.float32


def test_keys_hold_what_decides_the_time_and_nothing_else():
    x, w = torch.zeros(4, 8), torch.zeros(8, 2, dtype=torch.bfloat16)
    mm, mul = torch.ops.aten.mm.default, torch.ops.aten.mul.Tensor
    assert op_key(mm, (x, w), {}) == "aten.mm.default float32[4,8] bfloat16[8,2]"
    assert op_key(mm, (x, w.t().contiguous().t()), {}).endswith("bfloat16[8,2]'")
    assert op_key(mul, (x, 0.3), {}) == op_key(mul, (x, 0.7), {})
    assert op_key(torch.ops.aten.sum.dim_IntList, (x, [1]), {}).endswith("float32[4,8] 1")


def test_a_missing_operation_is_named_or_estimated_on_request():
    hardware = load_hardware("cpu-2core")
    profile = Profile(ops={"known": 2.0})
    op = Op("aten.mm.default float32[4,8]", 10**9, 10**6, F32)
    assert profile.seconds(op._replace(key="known")) == 2.0
    with pytest.raises(UsageError, match=r"no time for 'aten\.mm\.default .*'; measure"):
        profile.seconds(op)
    assert profile.seconds(op, hardware) == hardware.seconds(10**9, 10**6, F32)
    assert profile.missing([op, op._replace(key="known")]) == {op.key}


def test_collectives_are_read_between_measured_sizes():
    table = [(1000, 1.0), (2000, 2.0), (4000, 3.0)]
    profile = Profile(collectives={"all_reduce": {2: table}})
    sizes = (10, 1000, 1500, 2000, 3000, 8000)
    found = [profile.collective("all_reduce", size, 2) for size in sizes]
    assert found == [1.0, 1.0, 1.5, 2.0, 2.5, 5.0]
    assert profile.collective("all_reduce", 10, 4) is None
    assert profile.collective("send", 10, 2) is None


def test_a_profile_is_read_back_and_other_files_are_refused(tmp_path):
    profile = Profile(
        "cpu", 1, "some processor", {"aten.mm": 1e-5}, {"forward": [(1e-5, 2e-6), (2e-5, 3e-6)]},
        {"all_reduce": {2: [(1024, 1e-4)]}}, {2: 1.25},
    )  # fmt: skip
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    fields = json.loads(path.read_text())
    assert fields["torch"] == torch.__version__
    path.write_text(json.dumps(fields | {"version": 99}))
    with pytest.raises(UsageError, match=r"version is not 2.*sweep --profile FILE"):
        Profile.load(path)
    for text in ("{", "[]", '{"version": 2}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="is no profile"):
            Profile.load(path)


def test_a_gap_grows_with_the_operations_of_its_phase():
    # 3 us and a tenth of the operation; one step was disturbed.
    steps = [(1e-5, 4e-6), (2e-5, 5e-6), (2.1e-5, 9e-5), (4e-5, 7e-6), (8e-5, 11e-6)]
    profile = Profile(gaps={"forward": steps, "recompute": [(1e-5, -1e-6), (1.2e-5, 5e-6)]})
    assert profile.beside("forward", 100, 0.03) == pytest.approx(100 * 3e-6 + 0.003)
    # Operations of like length: a mean gap, and no slope.
    assert profile.beside("recompute", 100, 0.03) == pytest.approx(100 * 2e-6)
    assert profile.beside("backward", 100, 0.03) == 0


class Waits(nn.Module):
    """Two equal products, and a pause that no operation explains."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.pause = 0

    def forward(self, x):
        x = (x @ self.weight) @ self.weight
        for _ in range(self.pause):
            pass
        return x.sum()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_each_key_is_measured_once_and_the_rest_is_a_gap(one_thread):
    model, x = Waits(), torch.randn(64, 64)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1)]
    profile = Profile.of_this_device()

    def measure():
        return profile.measure(model, lambda: model(x), optimizers, recompute=False)

    added = measure()
    keys = [key for key in profile.ops if key.startswith("aten.mm")]
    # Two equal products forward, and in backward one for the input and one with each layout.
    assert keys[0] == "aten.mm.default float32[64,64] float32[64,64]" and added == len(profile.ops)
    assert all(0 < seconds < 1 for seconds in profile.ops.values())
    before = dict(profile.ops)
    assert measure() == 0 and profile.ops == before
    model.pause = 10**6
    measure()
    (_, short), _, (_, long) = profile.gaps["forward"]
    # Three operations forward: two products and a sum.
    assert 3 * (long - short) > 5e-3


def test_a_step_that_changes_is_refused():
    model, x = Waits(), torch.randn(64, 64)
    calls = []

    def run():
        calls.append(0)
        return model(x) if len(calls) % 3 else model(x + len(calls))

    with pytest.raises(UsageError, match="runs other operations each time"):
        Profile().measure(model, run, [], recompute=False)


def test_ranks_of_one_machine_are_measured_beside_each_other():
    profile = Profile("cpu", 1)
    contention.measure(profile, 2, sizes=(1024, 2**20), repeats=2)
    for name in ("all_reduce", "send", "stall"):
        (small, fast), (large, slow) = profile.collectives[name][2]
        assert (small, large) == (1024, 2**20) and 0 <= fast < 1 and 0 <= slow < 1
        assert name == "stall" or min(fast, slow) > 0
        between = profile.collective(name, 2**18, 2)
        assert min(fast, slow) <= between <= max(fast, slow)
    assert profile.slowdown[2] >= 1
    with pytest.raises(UsageError, match="one rank has nobody to wait for"):
        contention.measure(profile, 1)
    with pytest.raises(UsageError, match="the profile is of cuda"):
        contention.measure(Profile("cuda"), 2)
