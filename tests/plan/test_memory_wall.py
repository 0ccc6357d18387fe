import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from holdfast.errors import HoldfastError, UsageError
from holdfast.plan.formulas.kv import kv_bytes
from holdfast.plan.hardware import hardware_fields, load_hardware, parse_hardware
from holdfast.plan.memory_wall import encoder_decoder, wall
from holdfast.plan.models import resolve
from holdfast.plan.op_trace import decode_ops, trace_ops
from holdfast.plan.roofline import Machine, attainable, gemm_intensity
from holdfast.plan.trend import PARTS, Part, growth, trend

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
}  # fmt: skip
GPT = {
    "model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 4, "vocab_size": 500,
    "n_positions": 600,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
    "intermediate_size": 256, "vocab_size": 500, "max_position_embeddings": 600,
}  # fmt: skip


def flops(ops):
    return sum(op.flops * op.count for op in ops)


def least(ops):
    return sum(op.least * op.count for op in ops)


@pytest.fixture(scope="module")
def llama():
    return resolve(LLAMA)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_a_llama_step_equal_torchs_counter(llama, attention):
    table = trace_ops(llama, "pretrain", 2, 32, attention=attention)
    model, inputs = llama.build("cpu", attention=attention), llama.example_inputs(2, 32, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    # torch's counter has no formula for the fused kernel of CPUs, as it has for those of GPUs: two
    # products forward, five backward.
    fused = (4 + 10) * 5 * 2 * 4 * 32 * 32 * 16 if attention == "sdpa" else 0
    assert flops(table.ops) == counter.get_total_flops() + fused


def test_resident_bytes_equal_those_of_a_real_model(llama):
    model = llama.build("cpu")
    weights = sum(p.numel() * 4 for p in model.parameters())
    resident = trace_ops(llama, "pretrain", 2, 32).resident
    assert [resident[c] for c in ("parameters", "gradients", "optimizer")] == [
        weights, weights, 2 * weights,
    ]  # fmt: skip
    assert trace_ops(llama, "serve", 3, 20).resident["cache"] == kv_bytes(
        llama.config, 3, 21, torch.float32
    )


def test_bytes_of_a_product_its_lookup_and_its_norm_by_hand(llama):
    table = decode_ops(llama, 2, 8)
    by_name = {}
    for op in table.ops:
        by_name.setdefault(op.name, op)
    # Two rows of the table, not the table.
    assert dict(by_name["embedding"].traffic)["parameters"] == 2 * 64 * 4
    head = next(op for op in table.ops if op.shapes[-1:] == ((64, 1000),))
    assert head.flops == 2 * 2 * 64 * 1000 and head.gemm.categories[1] == "parameters"
    assert head.nbytes == head.gemm.nbytes == 4 * (2 * 64 + 64 * 1000 + 2 * 1000)
    assert gemm_intensity(2, 64, 1000, 4) == head.flops / head.nbytes
    # A step reads the 8 cached tokens and writes 9; in place it would write one.
    append = next(op for op in table.ops if op.name == "cat" and op.append)
    token = 2 * 2 * 16 * 4
    assert append.append == 2 * 8 * token and append.least == 2 * token
    # x*x feeds a mean: a fused norm keeps it, an attention's input it does not.
    assert by_name["pow"].fusion >= by_name["pow"].nbytes // 2
    assert all(op.fusion == 0 for op in table.ops if op.flops)
    for op in table.ops:
        assert op.lean().nbytes == op.lean().least == op.least
        assert all(nbytes >= 0 for _, nbytes in op.lean().traffic)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_decode_intensity_is_the_batch_in_half_precision(batch):
    big = resolve(LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
                           "num_attention_heads": 32, "num_key_value_heads": 8})  # fmt: skip
    ops = decode_ops(big, batch, 1, torch.float16).ops
    # 2P*b FLOPs over 2P bytes; the cache of one token is nothing beside them.
    assert flops(ops) / least(ops) == pytest.approx(batch, rel=0.02)


def test_attention_intensity_is_query_heads_per_key_head(llama):
    wide = resolve(LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 1})
    ops = decode_ops(wide, 1, 4000, torch.float16).ops
    attention = next(op for op in ops if "attention" in op.name)
    # 2/e times the four query heads that share one key head.
    assert attention.flops / attention.nbytes == pytest.approx(4, rel=0.01)


def test_decode_bytes_are_affine_in_the_context(llama):
    at = [least(decode_ops(llama, 1, n).ops) for n in (1, 17, 33)]
    assert at[1] - at[0] == at[2] - at[1] == 16 * (2 * 2 * 16 * 4) * 5


def test_an_encoder_reuses_what_a_decoder_reads_again():
    found = encoder_decoder(BERT, GPT, 5)
    steps = [decode_ops(resolve(GPT), 1, n, torch.float16).ops for n in range(1, 5)]
    by_hand = sum(map(flops, steps)) / sum(map(least, steps))
    assert found["decoder"] == pytest.approx(by_hand, rel=1e-12)
    found = encoder_decoder(BERT, GPT, 512)
    assert found["encoder"] >= 10 * found["decoder"]


@pytest.mark.parametrize("preset", ["cpu-2core", "h100-80gb"])
def test_a_machine_of_one_level_is_the_roofline_of_its_file(llama, preset):
    hardware = load_hardware(preset)
    machine = Machine.from_hardware(hardware)
    for op in trace_ops(llama, "pretrain", 2, 16).ops:
        assert machine.cost(op).seconds == hardware.seconds(op.flops, op.nbytes, op.dtype)
    device, rate = hardware.device, machine.rate("bfloat16")
    assert attainable(rate, device.bandwidth, 1e9) == rate
    assert attainable(rate, device.bandwidth, 0.5) == 0.5 * device.bandwidth


def test_verdicts_add_up_and_name_what_moves_them():
    slow = load_hardware("l4-24gb")
    report = wall("llama-3.2-1b", slow, "serve", batch=1, sequence=512)
    assert report.ridge == pytest.approx(0.6 * 121e12 / (0.8 * 300e9))
    for v in report.verdicts:
        assert sum(v.by_resource.values()) == pytest.approx(v.seconds)
        assert v.seconds == pytest.approx(sum(r.seconds for r in report.rows if r.phase == v.phase))
        assert sum(v.by_category.values()) == v.nbytes >= v.least_bytes
        assert v.bound == max(v.by_resource, key=v.by_resource.get) and v.headroom > 1
    assert [v.bound for v in report.verdicts] == ["compute", "memory"]
    decode = report.verdict("decode")
    fewer = next(m for m in decode.moves if m.what == "fewer bytes of parameters")
    assert fewer.room == "weights" and {"int4", "int8"} <= set(fewer.methods)
    batch = next(m for m in decode.moves if m.what.startswith("a batch of"))
    # Half-precision weights: FLOPs per byte are the batch, and the ridge is where both meet.
    assert int(batch.what.split()[3].strip(",")) == pytest.approx(report.ridge, rel=0.05)
    kinds = {row.bound for row in report.rows if row.phase == "prefill"}
    assert {"compute", "memory"} <= kinds  # no one ratio for the whole model


def test_training_phases_and_the_exchange_between_devices():
    # One row, so that sharing out launches does not hide what is asked.
    fields = hardware_fields(load_hardware("h100-80gb"))
    fields["devices"][0]["launch_seconds"] = 0
    fields["links"][1]["bandwidth"] = 1e8
    slow = parse_hardware(fields, "test")
    alone, joined = (wall(LLAMA, slow, "pretrain", 2, 32, devices=n) for n in (1, 4))
    weights = sum(p.numel() * 4 for p in resolve(LLAMA).build("meta").parameters())
    exchange = joined.verdict("backward").by_resource["interconnect"]
    assert exchange == pytest.approx(2 * 3 * (5e-6 + weights / 4 / 1e8))
    assert joined.verdict("backward").seconds == pytest.approx(
        alone.verdict("backward").seconds + exchange
    )
    assert joined.verdict("backward").bound == "interconnect"
    assert joined.verdict("backward").moves[0].room == "parallel"
    step = alone.verdict("step")
    assert (step.flops, step.bound, step.nbytes) == (0, "memory", 7 * weights)
    assert step.headroom is None and "adamw4" in next(
        m.methods for m in step.moves if m.what == "fewer bytes of optimizer"
    )
    json.dumps(alone.document(), allow_nan=False)


def test_report_is_drawn_and_printed(tmp_path):
    pytest.importorskip("matplotlib")
    report = wall(LLAMA, "cpu-2core", "serve", 1, 32)
    assert "decode" in report.table() and "FLOPs/B" in report.table()
    report.plot(tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match=r"cannot draw .*use .png or .svg"):
        report.plot(tmp_path / "roof.doc")


def test_hardware_without_bandwidth_or_rate_is_refused():
    fields = hardware_fields(load_hardware("l4-24gb"))
    del fields["devices"][0]["bandwidth"]
    with pytest.raises(UsageError, match=r"devices.0.bandwidth is missing"):
        parse_hardware(fields, "mine.yaml")
    fields = hardware_fields(load_hardware("l4-24gb"))
    del fields["devices"][0]["flops"]["float16"]
    with pytest.raises(UsageError, match="l4-24gb has no rate for float16, only for float32, bf"):
        wall(LLAMA, parse_hardware(fields, "test"), "serve", dtype="float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "play"}, "unknown task 'play'"),
        ({"batch": 0}, "batch 0 is not positive"),
        ({"devices": 0}, "devices 0 is not positive"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"model": GPT, "task": "serve", "sequence": 600}, "600 positions, 601 are needed; .* 599"),
        ({"hardware": "h10"}, "unknown hardware 'h10'; nearest known: h100"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"model": LLAMA, "hardware": "l4-24gb", "task": "pretrain", "sequence": 16} | change
    with pytest.raises(UsageError, match=message):
        wall(**given)


class Loop(nn.Module):
    def forward(self, x):
        raise RuntimeError("reads its input")

    def example_inputs(self, batch, sequence, device):
        return {"x": torch.ones(batch, sequence, device=device)}


def test_a_model_that_cannot_be_traced_says_why():
    with pytest.raises(HoldfastError, match=r"Loop cannot be traced .*reads its input"):
        wall(Loop(), "l4-24gb", "pretrain")


def test_growth_recovers_planted_rates():
    years = [2012, 2014, 2015, 2018, 2021, 2024]
    generator = torch.Generator().manual_seed(0)
    for rate in (3.0, 1.6, 1.4):
        exact = [7e12 * rate ** ((y - 2012) / 2) for y in years]
        assert growth(years, exact) == pytest.approx(rate, rel=1e-9)
        noise = torch.randn(len(years), generator=generator).mul(0.01).exp().tolist()
        assert growth(years, [v * n for v, n in zip(exact, noise, strict=True)]) == pytest.approx(
            rate, rel=0.01
        )
    with pytest.raises(UsageError, match="two different years"):
        growth([2020, 2020], [1, 2])
    with pytest.raises(UsageError, match="positive"):
        growth([2020, 2021], [1, 0])


def test_trend_projects_the_ridge():
    parts = [
        Part(str(year), year, 1e12 * 3.0 ** ((year - 2010) / 2), 1e11 * 1.5 ** ((year - 2010) / 2),
             1e10, "made up")
        for year in (2010, 2016, 2020)
    ]  # fmt: skip
    found = trend(parts, until=2024)
    assert found["per_two_years"] == pytest.approx(
        {"flops": 3.0, "bandwidth": 1.5, "interconnect": 1.0}
    )
    assert found["ridge"][2024] == pytest.approx(10 * 2.0 ** ((2024 - 2010) / 2))
    shown = trend()["per_two_years"]
    assert shown["flops"] > shown["bandwidth"] > 1  # the wall
    assert all(part.source and math.isfinite(part.flops) for part in PARTS)
