"""`Run` in this process: what it writes opens without Holdfast, and failures leave it resumable."""

import contextlib
import doctest
import errno
import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from holdfast import checks, files
from holdfast.errors import HoldfastError, UsageError
from holdfast.meter import Meter
from holdfast.plan import plan as plan_module
from holdfast.plan.file import Methods, PlanFile, Training
from holdfast.plan.plan import Plan
from holdfast.training import checkpoint
from holdfast.training.data import DataSource
from holdfast.training.run import Run, Settings, rate

CONFIG = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(32).view(2, 16)


def make_plan(model, *, batch=2, micro=2, sequence=32, task="pretrain", budget=2**30, **fields):
    rate, clip = fields.pop("learning_rate", 1e-2), fields.pop("clip", None)
    training = Training(learning_rate=rate, clip=clip)
    spec = PlanFile(
        model=str(model),
        task=task,
        batch=batch,
        micro_batch=micro,
        sequence=sequence,
        budget={"device": budget},
        methods=Methods(**fields),
        training=training,
    )
    return Plan(spec)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny matrices: on a busy machine a second thread is mostly waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(f"{i} squared is {i * i}." for i in range(200)))
    return Settings(DataSource((str(path),)), steps=2)


@pytest.fixture(scope="module")
def pretrained(config, settings, tmp_path_factory):
    """A model directory as `train` leaves it, and the run that left it."""
    run = Run(make_plan(config), settings, tmp_path_factory.mktemp("pretrained") / "out")
    run.run()
    return run


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def opened(path):
    return AutoModelForCausalLM.from_pretrained(path)


def test_output_opens_with_transformers(pretrained):
    model = opened(pretrained.out)
    assert torch.equal(logits(model), logits(pretrained.model))
    tokenizer = AutoTokenizer.from_pretrained(pretrained.out)
    assert tokenizer.decode(tokenizer("naïve →")["input_ids"]) == "naïve →"


def test_report_has_what_scripts_rely_on(pretrained):
    report = json.loads((pretrained.out / "report.json").read_text())
    assert report["steps"] == 2 and report["within_budget"]
    assert report["loss"]["last"] < report["loss"]["first"]
    measured = report["measured"]
    assert sum(measured["by_category"].values()) == measured["peak_bytes"] > 0
    assert set(measured["windows"]) == {"steps", "validation", "checkpoint"}
    assert report["measured"]["by_category"]["parameters"] == 4 * sum(
        p.numel() for p in pretrained.model.parameters()
    )


def test_a_finished_run_is_not_repeated(pretrained):
    again = Run(pretrained.plan, pretrained.settings, pretrained.out)
    written = (pretrained.out / "model.safetensors").stat().st_mtime_ns
    assert again.run() == json.loads((pretrained.out / "report.json").read_text())
    assert (pretrained.out / "model.safetensors").stat().st_mtime_ns == written


def test_full_finetune_starts_from_the_weights(pretrained, settings, tmp_path):
    plan = make_plan(pretrained.out, task="finetune")
    run = Run(plan, settings, tmp_path / "out")
    report = run.run()
    before = json.loads((pretrained.out / "report.json").read_text())["loss"]
    assert report["loss"]["first"] < before["first"] - 0.1
    assert torch.equal(logits(opened(run.out)), logits(run.model))


LORA = {"adapter": {"lora": {"rank": 4}}}
INT4 = {"weights": {"int4": {}}}


@pytest.mark.parametrize("methods", [LORA, LORA | INT4], ids=["lora", "lora on int4"])
def test_adapter_opens_with_peft(pretrained, settings, tmp_path, methods):
    run = Run(make_plan(pretrained.out, task="finetune", **methods), settings, tmp_path / "out")
    run.run()
    theirs = logits(PeftModel.from_pretrained(opened(pretrained.out), run.out))
    ours, base = logits(run.model), logits(opened(pretrained.out))
    # Beside int4 weights, the base that peft opens is the one before rounding.
    tolerance = 0.25 * (ours - base).abs().max() if "weights" in methods else 1e-5
    assert (theirs - ours).abs().max() <= tolerance
    assert (ours - base).abs().max() > 1e-2


@pytest.mark.parametrize("methods", [LORA, LORA | INT4], ids=["lora", "lora on int4"])
def test_merged_adapter_opens_with_transformers(pretrained, settings, tmp_path, methods):
    run = Run(
        make_plan(pretrained.out, task="finetune", **methods),
        replace(settings, merge=True),
        tmp_path / "out",
    )
    run.run()
    assert not (run.out / "adapter_config.json").exists()
    merged = opened(run.out)
    assert type(merged).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(merged), logits(run.model), atol=1e-4, rtol=1e-4)
    assert not torch.equal(logits(merged), logits(opened(pretrained.out)))


def test_a_finished_adapter_is_not_merged_afterwards(pretrained, settings, tmp_path):
    plan = make_plan(pretrained.out, task="finetune", **LORA)
    Run(plan, settings, tmp_path / "out").run()
    with pytest.raises(UsageError, match=r"adapter apart; .*--overwrite --merge"):
        Run(plan, replace(settings, merge=True), tmp_path / "out").run()


def test_finetune_without_weights_names_the_remedy(config, settings, tmp_path):
    with pytest.raises(UsageError, match=r"no weights to fine-tune.*--model"):
        Run(make_plan(config, task="finetune"), settings, tmp_path / "out").run()


def test_chats_train_on_the_assistants_turns_only(config, tmp_path):
    turns = [
        {"role": "user", "content": "What is the answer?"},
        {"role": "assistant", "content": "42"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(40)))
    settings = Settings(DataSource((str(path),)), steps=30)
    run = Run(make_plan(config, sequence=32), settings, tmp_path / "out")
    report = run.run()
    assert report["data"]["chats"] == 40
    batch = run.stream.data.batch(torch.tensor([0, 1]))
    tokens = batch["input_ids"][batch["labels"] != -100]
    text = run.tokenizer.decode(tokens, skip_special_tokens=True)
    assert set(text) <= set("42") and "42" in text
    # A constant reply is learnt at once; the questions would not be in 30 steps.
    assert report["loss"]["last"] < 0.1


def test_accumulation_sees_the_same_batch(config, settings, tmp_path):
    whole = Run(make_plan(config, batch=4, micro=4), settings, tmp_path / "whole").run()
    parts = Run(make_plan(config, batch=4, micro=1), settings, tmp_path / "parts").run()
    assert parts["loss"]["last"] == pytest.approx(whole["loss"]["last"], rel=1e-5)
    assert parts["measured"]["peak_bytes"] < whole["measured"]["peak_bytes"]


def test_measured_windows_do_not_change_the_run(config, settings, tmp_path, monkeypatch):
    found = []
    for steps in (0, 2):
        monkeypatch.setattr("holdfast.training.run.METERED_STEPS", steps)
        run = Run(make_plan(config), settings, tmp_path / str(steps))
        run.run()
        found.append((run.out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "methods",
    [
        {"optimizer": {"sgd": {"momentum": 0.9}}},
        {"optimizer": {"qgalore": {}}},
        # The schedule goes on, too: the rate of the step after a resume is not that of its start.
        {"gradients": "backward", "dtype": "bfloat16"},
        {"gradients": "backward", "optimizer": {"adamw4": {}}},
    ],
    ids=str,
)
def test_stopped_run_ends_with_the_same_bytes(config, settings, tmp_path, methods):
    settings = replace(settings, steps=4, checkpoint_every=1)
    whole = Run(make_plan(config, **methods), settings, tmp_path / "whole")
    whole.run()
    stopped = stop_after(whole.plan, settings, tmp_path / "out", 2)
    Run(stopped.plan, settings, stopped.out).run()
    for name in ("model.safetensors", "checkpoints/step-000000004/state.safetensors"):
        assert (whole.out / name).read_bytes() == (stopped.out / name).read_bytes()


class Stop(Exception):
    pass


def stop_after(plan, settings, out, step):
    """A run that ends by an exception after `step`, as a crash of the process would."""

    def on_step(entry):
        if entry["step"] == step:
            raise Stop

    run = Run(plan, settings, out, on_step=on_step)
    with pytest.raises(Stop):
        run.run()
    return run


def test_log_of_a_resumed_run_lists_every_step_once(config, settings, tmp_path):
    settings = replace(settings, steps=5, checkpoint_every=2)
    run = stop_after(make_plan(config), settings, tmp_path / "out", 3)
    report = Run(run.plan, settings, run.out).run()
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert report["loss"]["first"] == lines[0]["loss"]


def test_nan_loss_keeps_and_names_the_last_good_state(config, settings, tmp_path):
    settings = replace(settings, steps=4, checkpoint_every=1)
    run = stop_after(make_plan(config), settings, tmp_path / "out", 2)
    good = checkpoint.latest(run.out / "checkpoints")
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    again = Run(run.plan, settings, run.out)
    load = checkpoint.load

    def poisoned(path, model, optimizer):
        document = load(path, model, optimizer)
        next(model.parameters()).data.fill_(float("nan"))
        return document

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", poisoned)
        with pytest.raises(HoldfastError, match=r"loss is nan at step 3; .*step-000000002") as info:
            again.run()
    assert info.value.exit_code == 1
    assert {p.name: p.read_bytes() for p in good.iterdir()} == before
    assert Run(run.plan, settings, run.out).run()["steps"] == 4


def test_diverging_run_is_stopped(config, settings, tmp_path):
    plan = make_plan(config, optimizer={"sgd": {}}, learning_rate=1e30)
    with pytest.raises(HoldfastError, match=r"loss is .* Lower learning_rate"):
        Run(plan, replace(settings, steps=5), tmp_path / "out").run()


@contextlib.contextmanager
def full_disk(nbytes):
    """Files may not grow beyond `nbytes`: the kernel refuses, as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


def test_full_disk_leaves_the_previous_checkpoint(config, settings, tmp_path):
    settings = replace(settings, steps=4, checkpoint_every=1)
    whole = Run(make_plan(config), settings, tmp_path / "whole")
    whole.run()
    run = stop_after(make_plan(config), settings, tmp_path / "out", 2)
    good = checkpoint.latest(run.out / "checkpoints")
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    full = pytest.raises(HoldfastError, match=r"cannot write .*free space")
    with full_disk(100_000), full as info:
        Run(run.plan, settings, run.out).run()
    assert info.value.exit_code == 1
    assert [p.name for p in (run.out / "checkpoints").iterdir()] == [good.name]
    assert {p.name: p.read_bytes() for p in good.iterdir()} == before
    Run(run.plan, settings, run.out).run()
    assert (run.out / "model.safetensors").read_bytes() == (
        whole.out / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_last_moment(config, settings, tmp_path, monkeypatch, call):
    settings = replace(settings, steps=3, checkpoint_every=1)
    run = stop_after(make_plan(config), settings, tmp_path / "out", 2)
    good = checkpoint.latest(run.out / "checkpoints")
    again = Run(run.plan, settings, run.out)
    save = checkpoint.save

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_on_full(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.os, call, full)
            return save(*args)

    monkeypatch.setattr(checkpoint, "save", save_on_full)
    with pytest.raises(HoldfastError, match="No space left on device"):
        again.run()
    assert [p.name for p in (run.out / "checkpoints").iterdir()] == [good.name]


def test_a_directory_belongs_to_one_run(config, settings, tmp_path):
    run = stop_after(make_plan(config), replace(settings, checkpoint_every=1), tmp_path / "out", 1)
    other = make_plan(config, clip=1.0)
    with pytest.raises(UsageError, match=r"another plan; .*--overwrite"):
        Run(other, run.settings, run.out).run()
    with pytest.raises(UsageError, match="another settings"):
        Run(run.plan, replace(run.settings, steps=9), run.out).run()
    assert Run(other, run.settings, run.out, overwrite=True).run()["steps"] == 2


def test_over_budget_is_said(config, settings, tmp_path):
    report = Run(make_plan(config, budget=2**20), settings, tmp_path / "out").run()
    assert not report["within_budget"]
    assert report["measured"]["peak_bytes"] > report["budget_bytes"] == 2**20


class MeterOneStep(TrainerCallback):
    """Measures the Trainer's last step."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == args.max_steps - 1:
            # The Trainer wraps the optimizer.
            self.meter = Meter(model, optimizer.optimizer).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            self.meter.__exit__(None, None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradients": "backward", "blocks": {"model.layers": "recompute*2"}},
        {"batch": 4, "optimizer": {"adamw4": {}}, "loss_chunk": 32},
    ],
    ids=["gradients in backward, recompute", "accumulation, adamw4, chunked loss"],
)
def test_own_loop_and_trainer_hold_the_same_bytes(config, settings, tmp_path, fields):
    plan = make_plan(config, **fields)
    engine = Run(plan, settings, tmp_path / "out")
    engine.run()
    data, micro = engine.stream.data, plan.spec.micro_batch

    model = engine.source.build("cpu")
    model, optimizer = plan.apply(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for _ in range(2):
        batches = [data.batch(torch.arange(micro)) for _ in range(plan.spec.accumulation)]
        with Meter(model, optimizer, inputs=batches) as loop:
            for batch in batches:
                (model(**batch).loss / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = engine.source.build("cpu")
    model, optimizer = plan.apply(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    rows = [{k: v[0] for k, v in data.batch(torch.tensor([i])).items()} for i in range(8)]
    callback = MeterOneStep()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=plan.spec.accumulation,
        max_grad_norm=plan.spec.training.clip or 0,
        max_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[callback],
    ).train()

    # A step keeps the mean loss; a part's loss and the Trainer's running sum are a number each.
    numbers = 8
    assert abs(engine.measured.windows["steps"] - loop.peak) <= numbers
    # The Trainer has fetched its batches before the step begins, where no meter sees them.
    assert abs(callback.meter.peak + loop.at_peak["inputs"] - loop.peak) <= numbers


def test_examples_in_docstrings_run():
    failed, tried = doctest.testmod(plan_module)
    assert tried and not failed


def test_rate_by_hand():
    assert [rate(s, 10, "constant", 0.2) for s in (0, 1, 9)] == [0.5, 1.0, 1.0]
    assert rate(2, 10, "linear", 0.2) == 1.0 and rate(6, 10, "linear", 0.2) == 0.5
    assert rate(6, 10, "cosine", 0.2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "key", ["recompute", "gradients_in_backward", "accumulation", "optimizers"]
)
def test_check_passes(key):
    result = checks.run_check(key)
    assert result["passed"], result
