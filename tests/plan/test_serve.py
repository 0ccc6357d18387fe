"""Plans for serving: predicted bytes are those of a run, and choices are what was asked for."""

import json

import pytest
import torch

from holdfast.budget import Budget
from holdfast.cli import main
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.conformance import model as tiny
from holdfast.context.cache.forms import stored_form
from holdfast.context.cache.policies import find
from holdfast.context.stream import read
from holdfast.errors import DoesNotFit, UsageError
from holdfast.meter import Meter
from holdfast.plan.serve import Serve, Server
from holdfast.plan.serve_report import document, does_not_fit


@pytest.fixture(scope="module")
def net():
    return tiny(num_hidden_layers=3)


def server(net, budget="1MiB", **asked):
    options = {"batch": 2, "sequence": 128, "reserve": 0, "hardware": "cpu-2core"} | asked
    return Server(Serve(net.config, Budget.parse(budget), **options))


def measured(net, choice, asked):
    """Peaks of a real run whose caches are full: prefill of one request, a step of all."""
    peaks = []
    for rows, tokens in ((1, None), (asked.batch, 1)):
        cache = BoundedCache.for_model(
            net, find(choice.policy), tokens=choice.capacity, batch=rows,
            chunk=min(asked.chunk, choice.capacity // 4), form=stored_form(choice.form, net),
        )  # fmt: skip
        tokens = tokens or cache.chunk
        full = cache.capacity if cache.policy.drops else cache.capacity - tokens
        ids = torch.ones(rows, tokens, dtype=torch.long)
        with torch.no_grad():
            read(net, ids, cache)
            for layer in cache.bounded:
                layer.counts = layer.read = [full] * rows
            with Meter(net) as meter:
                read(net, ids, cache)
        one = BoundedCache.for_model(
            net, find(choice.policy), tokens=choice.capacity, batch=1,
            form=stored_form(choice.form, net),
        )  # fmt: skip
        peaks.append(meter.peak + asked.batch * one.predict_held(choice.capacity))
    return peaks


@pytest.mark.parametrize("policy", ["full", "sinks_recent", "random"])
@pytest.mark.parametrize("form", ["dense", "int8"])
def test_predicted_peaks_are_measured_to_the_byte(net, policy, form):
    made = server(net, allow="lossy")
    choice = made.choice(policy, form, "exact", 128)
    phases = choice.ledger.phase_peaks("device")
    assert [phases["prefill"], phases["decode"]] == measured(net, choice, made.asked)
    held = sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())
    assert phases["load"] == held


def test_exact_where_it_fits_then_int8_then_fewer_tokens(net):
    roomy = server(net).best()
    assert (roomy.policy, roomy.form, roomy.quality) == ("full", "dense", "exact")
    tight = server(net, str(roomy.peak - 1)).best()
    assert (tight.policy, tight.form, tight.quality) == ("full", "int8", "bounded")
    assert server(net, str(tight.peak - 1)).best() is None
    less = server(net, str(tight.peak - 1), allow="lossy").best()
    assert less.quality == "lossy" and less.peak < tight.peak
    dropping = server(net, str(tight.peak - 1), allow="lossy", policies=("sinks_recent",))
    kept = [choice for choice in dropping.choices() if choice.form == "dense"]
    assert [choice.policy for choice in kept] == ["sinks_recent"]
    assert kept[0].capacity < 128 and kept[0].peak <= tight.peak - 1


def test_the_largest_number_of_requests_fits_and_one_more_does_not(net):
    made = server(net, "600KiB")
    choice = made.best()
    at_most = choice.requests
    assert at_most > 2
    assert server(net, "600KiB", batch=at_most, policies=("full",), allow="exact").best()
    assert not server(net, "600KiB", batch=at_most + 1, policies=("full",), allow="exact").best()


def test_what_does_not_fit_names_the_smallest_budget_and_ways_out(net):
    made = server(net, "200KiB", allow="exact")
    assert made.best() is None
    error = does_not_fit(made)
    assert isinstance(error, DoesNotFit) and "Cheapest ways to fit" in str(error)
    need = error.details["smallest_budget"]
    assert server(net, str(need), allow="exact").best() is not None
    assert server(net, str(need - 1), allow="exact").best() is None
    changes = {one["options"].split()[0]: one for one in error.details["relaxations"]}
    assert changes["--sequence"]["peak_bytes"] <= 200 * 1024
    assert changes["--allow"]["peak_bytes"] <= 200 * 1024


def test_models_that_do_not_generate_and_bad_numbers_are_refused():
    from transformers import BertConfig

    with pytest.raises(UsageError, match="is no causal language model"):
        Server(Serve(BertConfig(num_hidden_layers=1), Budget.parse("1GiB")))
    with pytest.raises(UsageError, match="batch 0 is not positive"):
        Serve("gpt2", Budget.parse("1GiB"), batch=0)
    with pytest.raises(UsageError, match="unknown allow"):
        Serve("gpt2", Budget.parse("1GiB"), allow="some")


def test_the_command_prints_one_document_and_the_command_that_serves_it(net, tmp_path, capsys):
    net.config.save_pretrained(tmp_path)
    args = ["fit", str(tmp_path), "--task", "serve", "--batch", "2", "--sequence", "128",
            "--hardware", "cpu-2core", "--reserve", "0"]  # fmt: skip

    def run(*more, code=0):
        with pytest.raises(SystemExit) as stop:
            main([*args, *more])
        out = capsys.readouterr()
        assert stop.value.code == code, out.err
        return out

    found = json.loads(run("--budget", "1MiB", "--json").out)
    assert found["fits"] and found["predicted"]["by_phase"].keys() == {"load", "prefill", "decode"}
    assert found["predicted"]["peak_bytes"] == sum(found["predicted"]["by_category"].values())
    assert found["plan"]["command"].startswith(f"holdfast serve {tmp_path}")
    shown = run("--budget", "1MiB").out
    assert "exact" in shown and "holdfast serve" in shown
    error = json.loads(run("--budget", "200KiB", "--allow", "exact", "--json", code=3).out)
    assert not error["fits"] and error["smallest_budget"] > 200 * 1024
    assert "Cheapest ways to fit" in run("--budget", "200KiB", "--allow", "exact", code=3).err


def test_document_lists_alternatives(net):
    made = server(net, "10MiB", allow="lossy")
    found = list(made.choices())
    best = made.best(found)
    rows = document(made, best, found)["alternatives"]
    assert {row["form"] for row in rows} == {"int8", "int4"}
    assert all(row["peak_bytes"] < best.peak for row in rows)
