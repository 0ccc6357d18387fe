"""`holdfast cache lengthen`: one command from 64 positions to 256, resumed, opened by AutoModel."""

import json

import pytest
import torch
import typer
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from holdfast.cli.cache_lengthen import lengthen
from holdfast.context.attention import masked_lm
from holdfast.context.attention.masked_lm import mask_tokens
from holdfast.errors import UsageError
from holdfast.training.tokenizers import byte_tokenizer

SIZES = {
    "vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def predicted_once(monkeypatch):
    """Most tests train the same model at the same length."""
    made = masked_lm.predicted

    def once(settings, config, dtype):
        key = (config.model_type, settings.attention, settings.length)
        if key not in ledgers:
            ledgers[key] = made(settings, config, dtype)
        return ledgers[key]

    monkeypatch.setattr(masked_lm, "predicted", once)


ledgers: dict = {}


def save(path, kind="bert", masks=True):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.cls_token, tokenizer.sep_token = "<|bos|>", "<|eos|>"
    tokenizer.bos_token = tokenizer.eos_token = None  # as BERT's
    if masks:
        tokenizer.mask_token = "<|reserved|>"
    if kind == "roberta":
        config = RobertaConfig(
            **SIZES, max_position_embeddings=66, pad_token_id=1, bos_token_id=256, eos_token_id=257
        )
        model = RobertaForMaskedLM(config)
    else:
        heads = {
            "bert": BertForMaskedLM, "classifier": BertForSequenceClassification,
            "distilbert": DistilBertForMaskedLM,
        }  # fmt: skip
        config = BertConfig(**SIZES, max_position_embeddings=64)
        if kind == "distilbert":
            config = DistilBertConfig(vocab_size=264, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
        model = heads[kind](config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def bench(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    for i in range(4):
        text = " ".join(f"note {i}: the patient of bed {j} slept well." for j in range(20))
        (tmp_path / "notes" / f"{i}.txt").write_text(text)
    save(tmp_path / "short")

    def run(**changes):
        options = {
            "model": str(tmp_path / "short"), "out": tmp_path / "long",
            "domain": [str(tmp_path / "notes")], "attention": "longformer", "length": 256,
            "steps": 6, "batch": 1, "learning_rate": 1e-3, "window": 32, "block": 8, "glob": None,
            "text_field": "text", "validation": 0.2, "checkpoint_every": 2, "seed": 0,
            "device": "cpu", "json": True,
        }  # fmt: skip
        lengthen(**options | changes)
        printed = capsys.readouterr()
        return printed.out, printed.err

    run.path = tmp_path
    return run


@pytest.mark.parametrize("attention", ["longformer", "bigbird"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_one_command_and_auto_model_reads_on(bench, kind, attention):
    source = save(bench.path / kind, kind)
    out, err = bench(model=source, attention=attention)
    report = json.loads(out)
    assert "step 6/6" in err
    predicted, measured = report["predicted"], report["measured"]
    assert predicted["peak_bytes"] == measured["peak_bytes"] > 0
    assert predicted["by_category"] == measured["by_category"]
    assert report["loss"]["held_out_after"] < report["loss"]["held_out_before"]
    folder = bench.path / "long"
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.model_type == {"longformer": "longformer", "bigbird": "big_bird"}[attention]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 256
    assert (tokenizer.bos_token, tokenizer.sep_token) == (None, "<|eos|>")
    assert model.config.sep_token_id == tokenizer.sep_token_id
    ids = tokenizer("x" * 250, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 250, 264)
        # Without Holdfast the held-out loss is what the run reported.
        assert loss_of(model, tokenizer, bench) == pytest.approx(
            report["loss"]["held_out_after"], abs=1e-4
        )
    assert len((folder / "log.jsonl").read_text().splitlines()) == 6
    assert not list(bench.path.glob(".long*"))


def loss_of(model, tokenizer, bench):
    """Of transformers' own model on the held-out part, under the run's masks."""
    settings = json.loads((bench.path / "long" / "lengthen.json").read_text())["settings"]
    source = masked_lm.DataSource(**settings["data"] | {"paths": tuple(settings["data"]["paths"])})
    reader = masked_lm.load_tokenizer(settings["model"])
    reader.eos_token, reader.bos_token = reader.sep_token, reader.cls_token
    held = masked_lm.prepare(source, reader, 256).validation
    special = torch.tensor(tokenizer.all_special_ids)
    losses = []
    for index in range(len(held)):
        ids = held.batch(torch.tensor([index]))["input_ids"]
        generator = torch.Generator().manual_seed(index)
        inputs = mask_tokens(ids, tokenizer.mask_token_id, special, len(tokenizer), generator)
        losses.append(float(model.eval()(**inputs).loss))
    assert losses
    return sum(losses) / len(losses)


def test_a_killed_run_goes_on_and_ends_the_same(bench, monkeypatch):
    whole = json.loads(bench(out=bench.path / "whole")[0])
    step, calls = masked_lm._step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(masked_lm, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        bench()
    assert not (bench.path / "long").exists()
    state = bench.path / ".long.lengthening"
    with pytest.raises(UsageError, match="holds a run with other settings or data; continue it"):
        bench(seed=1)
    monkeypatch.setattr(masked_lm, "_step", step)
    report = json.loads(bench()[0])
    assert report["loss"] == whole["loss"] and not state.exists()
    assert report["measured"] == whole["measured"]
    one, two = (bench.path / name / "model.safetensors" for name in ("long", "whole"))
    assert one.read_bytes() == two.read_bytes()
    steps = [json.loads(line)["step"] for line in (bench.path / "long/log.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_reported_again_and_never_overwritten(bench):
    first = bench()[0]
    assert json.loads(bench()[0]) == json.loads(first)
    with pytest.raises(UsageError, match="exists and holds a run with other settings"):
        bench(steps=7)
    (bench.path / "mine").mkdir()
    with pytest.raises(UsageError, match="exists and holds something else; name a new directory"):
        bench(out=bench.path / "mine")


def test_converting_alone_needs_no_text_and_changes_no_weight(bench):
    out, _ = bench(steps=0, domain=None, attention="bigbird")
    assert json.loads(out)["steps"] == 0
    short = BertForMaskedLM.from_pretrained(bench.path / "short").eval()
    long = AutoModelForMaskedLM.from_pretrained(bench.path / "long").eval()
    ids = torch.randint(256, (2, 60))
    with torch.no_grad():
        torch.testing.assert_close(long(ids).logits, short(ids).logits, atol=1e-4, rtol=0)


def test_people_are_told_bytes_loss_and_how_to_open_it(bench):
    out, _ = bench(json=False)
    assert "predicted" in out and "measured" in out and "held_out_after" in out
    assert "reads 256 tokens and opens with AutoModel.from_pretrained(" in out


def test_bad_input_says_what_to_do(bench):
    for changes, message in (
        ({"domain": None}, "no --domain to train on; name text of it, or give --steps 0"),
        ({"steps": -1}, "steps -1 is out of range"),
        ({"model": str(bench.path / "nothing")}, "nothing' does not open as a"),
        ({"length": 64}, "max_len=64 is no more than the 64 positions of BertForMaskedLM"),
        ({"attention": "full"}, "unknown attention 'full'"),
        ({"length": 100_000}, "too little data"),
    ):
        with pytest.raises(UsageError, match=message):
            bench(**changes)
    for kind, message in (
        ("distilbert", "DistilBertForMaskedLM cannot be lengthened"),
        ("classifier", "has no masked-LM head .* is missing"),
    ):
        with pytest.raises(UsageError, match=message):
            bench(model=save(bench.path / kind, kind))
    with pytest.raises(UsageError, match=r'has no mask token.*set "mask_token"'):
        bench(model=save(bench.path / "maskless", masks=False))
    assert not (bench.path / "long").exists()


def test_fifteen_per_cent_of_ordinary_tokens_carry_loss():
    ids = torch.randint(5, 200, (8, 2000))
    ids[:, ::100] = 3
    generator = torch.Generator().manual_seed(0)
    inputs = mask_tokens(ids, 4, torch.tensor([3, 4]), 264, generator)
    chosen = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][chosen], ids[chosen])
    assert not chosen[:, ::100].any() and abs(chosen.float().mean() - 0.15 * 0.99) < 0.01
    now = inputs["input_ids"]
    assert torch.equal(now[~chosen], ids[~chosen])
    assert abs((now[chosen] == 4).float().mean() - 0.8) < 0.03
    assert abs((now[chosen] == ids[chosen]).float().mean() - 0.1) < 0.03
    few = mask_tokens(torch.tensor([[3, 7]]), 4, torch.tensor([3, 4]), 264, generator)
    assert (few["labels"] == torch.tensor([[-100, 7]])).all()


def test_the_verb_has_help_with_an_example():
    app = typer.Typer(rich_markup_mode=None)
    app.command("lengthen")(lengthen)
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0 and "Example: holdfast cache lengthen" in shown.output
