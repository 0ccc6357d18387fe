import copy
import itertools
import json
from dataclasses import replace

import pytest
import yaml

from holdfast.errors import DoesNotFit, UsageError
from holdfast.plan import layered
from holdfast.plan.hardware import load_hardware
from holdfast.plan.layered import PRESETS, Layered, load, parse, scaled, sources
from holdfast.plan.ops import Gemm, Op
from holdfast.plan.roofline import Level, Machine, Network, gemm_traffic
from holdfast.plan.superconducting import Workload, check_sweep, compare

FIELDS = yaml.safe_load((PRESETS / "illustrative-scd.yaml").read_text())
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2000, "dtype": "bfloat16",
}  # fmt: skip


def changed(path: str, value):
    fields = copy.deepcopy(FIELDS)
    *parents, last = path.split(".")
    node = fields
    for name in parents:
        node = node[int(name) if name.isdigit() else name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return fields


def product(m: int, k: int, n: int, dtype: str = "bfloat16") -> Op:
    gemm = Gemm(1, m, k, n, 2, ("temporary", "parameters", "temporary"))
    traffic = (("parameters", 2 * k * n), ("temporary", 2 * (m * k + m * n)))
    return Op("forward", "mm", ((m, k), (k, n)), dtype, 2 * m * k * n, traffic, gemm=gemm)


def flat(name: str, peak: float, bandwidth: float) -> Machine:
    """One level, no launches, no latency: nothing but two rates."""
    rates = {"bfloat16": peak, "float32": peak}
    return Machine(name, rates, (Level("memory", 1e15, bandwidth),))


# Tiling


@pytest.mark.parametrize("sizes", [(5, 7, 6), (12, 3, 9), (1, 16, 8), (8, 8, 8)])
@pytest.mark.parametrize("moving", [(True, True, True), (False, True, True), (True, True, False)])
def test_traffic_of_a_product_equals_brute_force(sizes, moving):
    m, k, n = sizes
    left, right, result = m * k * moving[0], k * n * moving[1], m * n * moving[2]
    for held in (3, 5, 9, 20, 33, 64, 150, 400):
        found = []
        # One tile of each matrix in turn stays; a row and a column of the others pass by.
        for rows, columns, fixed in ((m, n, "result"), (k, n, "right"), (m, k, "left")):
            for tall, wide in itertools.product(range(1, rows + 1), range(1, columns + 1)):
                if tall * wide + tall + wide > held:
                    continue
                down, across = -(-rows // tall), -(-columns // wide)
                found.append(
                    {
                        "result": result + left * across + right * down,
                        "right": right + left * across + result * (2 * down - 1),
                        "left": left + right * down + result * (2 * across - 1),
                    }[fixed]
                )
        assert gemm_traffic(Gemm(3, m, k, n, 2, ("", "", "")), 2 * held, moving) == 6 * min(found)


def test_traffic_falls_with_capacity_to_each_matrix_once():
    gemm = Gemm(1, 300, 500, 400, 4, ("", "", ""))
    traffic = [gemm_traffic(gemm, 4 * 2**i) for i in range(2, 22)]
    assert traffic == sorted(traffic, reverse=True)
    assert traffic[-1] == gemm.nbytes < traffic[4]
    # No schedule beats 2mkn/sqrt(S) elements (Hong and Kung) by more than what S holds.
    for i, moved in zip(range(2, 22), traffic, strict=True):
        held = 2**i
        assert moved / 4 >= 2 * 300 * 500 * 400 / held**0.5 - 3 * held
    with pytest.raises(UsageError, match="needs 12 bytes"):
        gemm_traffic(gemm, 8)


def test_a_level_is_met_with_the_tiles_of_the_next_nearer_one():
    near = Level("sram", 2 * (64 * 64 + 128), 4e12)
    far = Level("dram", 1e12, 1e12)
    machine = Machine("two", {"bfloat16": 1e18}, (near, far), store=2 * (8 * 8 + 16))
    op = product(512, 512, 512)
    parts = machine.cost(op).parts
    assert parts["dram"] == gemm_traffic(op.gemm, near.capacity) / 1e12
    assert parts["sram"] == gemm_traffic(op.gemm, machine.store) / 4e12
    # Weights that live in the near level never pass through the far one.
    here = machine.cost(op, {"parameters": 0, "temporary": 1}).parts["dram"]
    assert here == gemm_traffic(op.gemm, near.capacity, (True, False, True)) / 1e12 < parts["dram"]


# One machine


def test_peak_is_macs_times_two_times_clock_times_utilisation():
    machine = parse(FIELDS, "test").machine()
    assert machine.peak["bfloat16"] == pytest.approx(256 * 2 * 30e9 * 0.6 * 64)
    assert machine.joules_per_mac["bfloat16"] == pytest.approx(2500 * 2e-19)
    sram, dram = machine.levels
    assert (sram.capacity, sram.bandwidth) == (24 * 2**20, 30e12)
    # One chip's share of what its blade has once.
    assert (dram.capacity, dram.bandwidth) == (2 * 2**40 / 64, 470e12 / 64)
    assert machine.processors == 64 and machine.store == 64 * 1024 * 64


def test_a_layered_file_of_one_level_is_the_roofline_of_a_hardware_file():
    hardware, layers = load_hardware("h100-80gb"), load("h100-hgx")
    # The same two rates, and a store that holds any tile: what a file of one level stands for.
    level = replace(layers.levels[0].bandwidth, value=0.8 * hardware.device.bandwidth)
    machine = replace(
        layers,
        levels=(replace(layers.levels[0], bandwidth=level, latency=layered.Duration(0, "none")),),
        tile=replace(layers.tile, store=layered.Number(1e15, "any")),
    ).machine()
    one = replace(Machine.from_hardware(hardware), peak=machine.peak, efficiency=1.0)
    for op in (product(4096, 4096, 4096), product(1, 4096, 4096), product(33, 7, 5)):
        assert machine.cost(op).seconds == one.cost(op).seconds
        moved = op.nbytes / (0.8 * hardware.device.bandwidth)
        assert one.cost(op).seconds == max(op.flops / machine.peak["bfloat16"], moved) + 5e-6


def test_energy_is_the_sum_of_its_parts_times_cooling():
    op = product(64, 64, 64)
    level = Level("memory", 1e12, 1e12, joules_per_byte=3e-12)
    machine = Machine("m", {"bfloat16": 1e12}, (level,), joules_per_mac={"bfloat16": 5e-13})
    parts = 64**3 * 5e-13, 3 * 2 * 64 * 64 * 3e-12
    assert machine.cost(op).joules == pytest.approx(sum(parts))
    cold = replace(machine, cooling=400, levels=(replace(level, cooling=12),))
    assert cold.cost(op).joules == pytest.approx(400 * parts[0] + 12 * parts[1])
    assert replace(machine, joules_per_mac=None).cost(op).joules is None
    assert machine.cost(op).seconds == cold.cost(op).seconds


def test_bandwidth_is_monotone_and_saturates_at_the_compute_bound():
    op = product(256, 256, 256)
    times = [flat("m", 1e12, 1e9 * 2**i).cost(op).seconds for i in range(16)]
    assert times == sorted(times, reverse=True) and times[0] > 10 * times[-1]
    assert times[-1] == times[-2] == op.flops / 1e12


def test_latency_counts_for_every_operation():
    fast, slow = (Level("memory", 1e15, 1e15, latency=t) for t in (0.0, 1e-6))
    one, two = (Machine("m", {"bfloat16": 1e15}, (level,)) for level in (fast, slow))
    assert two.cost(product(8, 8, 8)).seconds - one.cost(product(8, 8, 8)).seconds == pytest.approx(
        1e-6
    )


def ring_by_steps(nbytes: float, members: int, bandwidth: float, latency: float) -> float:
    """Every rank passes one of `members` pieces on, until all have the sum of all pieces."""
    have = [[{rank} for _ in range(members)] for rank in range(members)]
    steps = 0
    while any(len(piece) < members for rank in have for piece in rank):
        sent = [
            ((r + 1) % members, (r - steps) % members, set(have[r][(r - steps) % members]))
            for r in range(members)
        ]
        for to, piece, ranks in sent:
            have[to][piece] |= ranks
        steps += 1
    return steps * (latency + nbytes / members / bandwidth)


@pytest.mark.parametrize("members", [2, 3, 8])
def test_ring_all_reduce_equals_its_steps_and_its_closed_form(members):
    network = Network("ring", members, "ring", 5e9, 1e-6)
    found = network.all_reduce_seconds(12e6, members)
    assert found == pytest.approx(ring_by_steps(12e6, members, 5e9, 1e-6))
    assert found == pytest.approx(2 * (members - 1) * (1e-6 + 12e6 / members / 5e9))


def test_collectives_by_topology_and_across_networks():
    times = {
        topology: Network("n", 16, topology, 5e9, 1e-6).all_reduce_seconds(16e6, 16)
        for topology in ("ring", "torus", "switch")
    }
    moved = 2 * 15 / 16 * 16e6 / 5e9
    assert times == pytest.approx(
        {"ring": 30e-6 + moved, "torus": 12e-6 + moved, "switch": 8e-6 + moved}
    )
    near, far = Network("near", 4, "ring", 8e9, 0), Network("far", 2, "ring", 1e9, 0, 1e-9)
    machine = Machine("m", {}, (Level("memory", 1, 1),), networks=(near, far))
    both = machine.all_reduce(8e6, 8)
    assert both.seconds == pytest.approx(2 * 3 / 4 * 8e6 / 8e9 + 2 * 1 / 2 * 2e6 / 1e9)
    assert both.joules is None and both.bottleneck == "far"
    # Data-parallel groups of two beside tensor-parallel groups of four only use the far network.
    across = machine.all_reduce(8e6, 2, inside=4)
    assert across.bound == {"far": pytest.approx(8e6 / 1e9)}
    assert across.joules == pytest.approx(2 * 8e6 * 1e-9)
    with pytest.raises(UsageError, match="3 processors do not divide those of m, 4 x 2"):
        machine.all_reduce(1, 3)
    with pytest.raises(UsageError, match="unknown topology 'star'"):
        replace(near, topology="star").all_reduce_seconds(1, 2)


def test_homes_are_the_nearest_level_with_room():
    machine = Machine("m", {}, (Level("near", 100, 1), Level("far", 1000, 1)))
    homes = machine.homes({"parameters": 80, "temporary": 60, "optimizer": 900})
    assert homes == {"temporary": 0, "parameters": 1, "optimizer": 1}
    with pytest.raises(DoesNotFit, match="optimizer of 950 B fits no level of m: free are near"):
        machine.homes({"parameters": 120, "optimizer": 950})


# Comparisons


def test_decode_tends_to_the_ratio_of_bandwidths_and_products_to_that_of_peaks():
    one, two = flat("one", 1e12, 1e11), flat("two", 7e12, 3e11)
    serving = compare([one, two], Workload(LLAMA, "serve", batch=1, sequence=16))
    (setting,) = serving.settings
    assert setting.speedup(1, "decode") == pytest.approx(3, rel=0.02)
    big = product(20000, 20000, 20000)
    assert one.cost(big).seconds / two.cost(big).seconds == pytest.approx(7, rel=0.02)
    assert setting.speedup(0) == 1 and setting.energy_ratio(1) is None


def test_a_plan_uses_chips_where_they_help_and_counts_their_joules():
    chip = Machine(
        "eight",
        {"bfloat16": 1e12, "float32": 1e12},
        (Level("memory", 1e12, 1e11, joules_per_byte=1e-11),),
        joules_per_mac={"bfloat16": 1e-12, "float32": 1e-12},
        networks=(Network("wires", 8, "switch", 1e12, 0, 0.0),),
    )
    single = replace(chip, name="single", networks=())
    slow = replace(chip, name="slow", networks=(Network("wires", 8, "switch", 1e6, 1, 0.0),))
    work = Workload(LLAMA, "pretrain", batch=4, sequence=64)
    (setting,) = compare([single, chip, slow], work).settings
    alone, joined, kept = setting.outcomes
    assert (alone.tensor, alone.data) == (kept.tensor, kept.data) == (1, 1)
    assert joined.tensor * joined.data == 8 and 4 < setting.speedup(1) <= 8
    assert setting.speedup(2) == 1
    # The same products, and more bytes where weights are held more than once.
    assert setting.energy_ratio(1) <= 1


def test_sweeps_scale_one_number_or_change_the_workload():
    work = Workload(LLAMA, "serve", batch=2, sequence=32)
    # With less of it than the example has, weights are read from far away.
    small_sram = scaled(load("illustrative-scd"), "levels.sram.capacity", 0.05)
    found = compare(
        ["h100-hgx", small_sram],
        work,
        {"levels.dram.bandwidth": [0.01, 1, 100], "batch": [4], "levels.dram.capacity": [1e-6]},
    )
    base, slow, same, fast, batch, small = found.settings
    assert [s.label for s in found.settings][1] == "levels.dram.bandwidth x0.01"
    assert slow.speedup(1) < same.speedup(1) == base.speedup(1) < fast.speedup(1)
    assert slow.outcomes[1].total.bottleneck == "dram" != fast.outcomes[1].total.bottleneck
    assert slow.outcomes[0] == base.outcomes[0]  # the reference stays
    assert (batch.label, batch.outcomes[0].data) == ("batch 4", 4)
    assert isinstance(small.outcomes[1], DoesNotFit) and small.speedup(1) is None
    document = found.document()
    json.dumps(document, allow_nan=False)
    gpu, scd = document["settings"][0]["outcomes"]
    assert gpu["total"]["seconds"] > 0 and gpu["total"]["joules"] > 0
    # An illustrative machine makes no absolute claim.
    assert scd["illustrative"] and scd["total"]["seconds"] is scd["total"]["joules"] is None
    assert scd["speedup"]["decode"] > 0 and scd["energy_ratio"] > 0
    assert "does_not_fit" in document["settings"][5]["outcomes"][1]


def test_what_cannot_be_compared_is_refused():
    work = Workload(LLAMA, "serve", sequence=16)
    with pytest.raises(UsageError, match="two machines or more"):
        compare(["h100-hgx"], work)
    # Machines are compared at one precision or not at all.
    with pytest.raises(UsageError, match=r"other has no rate for bfloat16, only for float32"):
        compare([flat("one", 1, 1), replace(flat("other", 1, 1), peak={"float32": 1.0})], work)
    with pytest.raises(UsageError, match=r"levels.dram.bandwidth of l4-24gb cannot be swept"):
        compare(["h100-hgx", "l4-24gb"], work, {"levels.dram.bandwidth": [2]})
    tiny = replace(flat("tiny", 1e12, 1e9), levels=(Level("memory", 1000, 1e9),))
    with pytest.raises(DoesNotFit, match="fits no level of tiny"):
        compare([flat("one", 1e12, 1e9), tiny], work)
    with pytest.raises(UsageError, match="unknown hardware 'h100-hg'; nearest known: h100-hgx"):
        compare(["h100-hgx", "h100-hg"], work)
    for text in ("bandwidth", "=1", "batch="):
        with pytest.raises(UsageError, match="malformed; write for example"):
            check_sweep(text)
    with pytest.raises(UsageError, match="could not convert string to float: 'x'"):
        check_sweep("levels.dram.bandwidth=x")
    assert check_sweep("batch=1,2") == ("batch", [1, 2])


# Files


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("levels", None, "levels is missing"),
        ("levels", [], "levels=.* is wrong"),
        ("tile", None, "tile is missing"),
        ("levels.0.latency", None, "levels.0.latency is missing; every number is"),
        ("levels.0.bandwidth.source", None, "levels.0.bandwidth.source is missing"),
        ("levels.0.bandwidth.source", "", "levels.0.bandwidth.source='' is wrong"),
        ("device.clock", 30e9, "device.clock=30000000000.0 is wrong; every number is {value: "),
        ("device.clock.value", -1, "device.clock.value=-1 is wrong: .*greater than 0"),
        ("device.speed", 1, "device.speed=1 is not a known field"),
        ("levels.1.stage", "4.2k", "unknown stage '4.2k'; nearest known: 4k"),
        ("blade.network", None, "blade.network is missing, and it joins 64"),
        ("stages.4k.cooling.value", 1, "1 watts .* 4.2 K is less than the 71.43 that an ideal"),
        ("chip.area_mm2.value", 10, "chip.tiles=64 need 4.1e.07 gates, 10 mm2 hold 4e.06"),
        ("device.joules_per_gate", None, "gates_per_mac needs device.joules_per_gate"),
        ("tile.gates_per_mac", None, "one of joules_per_mac and gates_per_mac"),
        ("tile.gates_per_mac.float32", None, "rates for bfloat16, float16, float32 and energies"),
        ("blade.network.topology", "star", "blade.network.topology='star' is wrong"),
    ],
)
def test_a_wrong_file_is_refused(path, value, message):
    with pytest.raises(UsageError, match=f"hardware file mine.yaml: .*{message}"):
        parse(changed(path, value), "mine.yaml")


def test_presets_load_and_only_the_example_is_illustrative(tmp_path):
    found = {name: load(name) for name in layered.presets()}
    assert all(isinstance(machine, Layered) for machine in found.values())
    assert {name for name, m in found.items() if m.illustrative} == {"illustrative-scd"}
    assert all(text.startswith("illustrative") for text in sources(found["illustrative-scd"]))
    # The same machine as in the one-level preset, to what its clock and L2 say.
    flat_one = load_hardware("h100-80gb")
    assert found["h100-hgx"].machine().rate("bfloat16") == pytest.approx(
        0.6 * flat_one.device.flops["bfloat16"], rel=0.01
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FIELDS))
    assert load(path) == found["illustrative-scd"]
    path.write_text("3")
    with pytest.raises(UsageError, match="not a mapping"):
        load(path)
    path.write_text("a: [")
    with pytest.raises(UsageError, match="is not YAML"):
        load(path)


def test_one_number_is_scaled_by_its_path():
    machine = load("illustrative-scd")
    assert scaled(machine, "levels.sram.capacity", 2).levels[0].capacity.value == 48 * 2**20
    assert scaled(machine, "blade.chips", 0.5).blade.chips.value == 32
    assert scaled(machine, "stages.4k.cooling", 2).stages["4k"].cooling.value == 800
    (network,) = scaled(machine, "blade.network.latency", 3).machine().networks
    assert network.latency == pytest.approx(180e-9)
    with pytest.raises(UsageError, match=r"unknown part of 'levels.l2.bandwidth' 'l2'; .* dram"):
        scaled(machine, "levels.l2.bandwidth", 2)
    with pytest.raises(UsageError, match=r"levels.sram is no number but a part"):
        scaled(machine, "levels.sram", 2)
    with pytest.raises(UsageError, match=r"stages.4k.cooling times 0.1: .*ideal refrigerator"):
        scaled(machine, "stages.4k.cooling", 0.1)
