import json
import sys
import time

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.plan.models import loss_of, resolve
from holdfast.plan.shapes import SHAPES

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
      "vocab_size": 128, "decoder_start_token_id": 0, "is_encoder_decoder": True}  # fmt: skip
WHISPER = {"model_type": "whisper", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
           "decoder_ffn_dim": 64, "vocab_size": 128, "max_source_positions": 20,
           "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 3}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_published_parameter_count(shape):
    source = resolve(shape.name)
    model = source.build()
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert model.training and all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert resolve(shape.hub.upper()).fingerprint() == source.fingerprint()


def test_seventy_billion_parameters_in_three_seconds():
    resolve("gpt2").build()  # imports
    start = time.perf_counter()
    resolve("llama-3.1-70b").build(dtype=torch.bfloat16)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("causal-lm", TINY | {"model_type": "gpt_neox"}),
        ("causal-lm", TINY | {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1}),
        ("causal-lm", TINY | {"model_type": "bert", "is_decoder": True}),
        ("masked-lm", TINY | {"model_type": "roberta", "pad_token_id": 0}),
        ("seq2seq", T5),
        ("speech-seq2seq", WHISPER),
        ("image-classification", TINY | {"model_type": "deit", "image_size": 32, "patch_size": 8}),
        ("sequence-classification",
         TINY | {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}),
    ],
)  # fmt: skip
def test_a_step_has_a_loss_and_reaches_every_block(task, config):
    source = resolve(dict(config))
    assert source.task_head == task
    model = source.build("cpu")
    assert model.config.use_cache is False
    loss_of(model(**source.example_inputs(2, 16, "cpu"))).backward()
    with_gradient = [p.grad is not None for p in model.parameters() if p.requires_grad]
    assert sum(with_gradient) > 0.9 * len(with_gradient)


def test_positions_bound_the_sequence_only_where_they_are_a_table():
    with pytest.raises(UsageError, match=r"sequence 1025 is longer than the 1024 positions.*1024"):
        resolve("gpt2").example_inputs(1, 1025)
    assert resolve("gpt2").example_inputs(1, 1024)["input_ids"].shape == (1, 1024)
    assert resolve("tinyllama").max_sequence is None
    assert resolve("t5-small").max_sequence is None
    # 66 rows, of which the first two belong to padding.
    roberta = TINY | {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}
    assert resolve(roberta).max_sequence == 64
    assert resolve(WHISPER).max_sequence == 16


def test_images_take_the_configured_size_and_dtype():
    inputs = resolve("vit-b-16").example_inputs(3, 9999, "meta", torch.bfloat16)
    assert inputs["pixel_values"].shape == (3, 3, 224, 224)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["labels"].shape == (3,)


def test_attention_is_selectable():
    source = resolve("gpt2")
    assert source.build().config._attn_implementation == "sdpa"
    assert source.build(attention="eager").config._attn_implementation == "eager"


def test_file_directory_and_dict_are_one_model(tmp_path):
    config = TINY | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file, folder = resolve(tmp_path / "config.json"), resolve(str(tmp_path))
    assert (file.kind, folder.kind, folder.path) == ("config", "directory", None)
    assert file.fingerprint() == folder.fingerprint() == resolve(config).fingerprint()
    assert file.fingerprint() != resolve(config | {"hidden_size": 64}).fingerprint()
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)).path == tmp_path


def test_hub_id_comes_from_the_local_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    (snapshot / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = resolve("some/model")
    assert (source.kind, source.path) == ("hub", snapshot)
    with pytest.raises(UsageError, match=r"not in the local cache.*save its config.json"):
        resolve("some/other")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lama-3.1-8b", "unknown model 'lama-3.1-8b'; nearest known: llama-3.1-8b.*config.json"),
        ("./nowhere/config.json", "no such file"),
        ("no_such_module:f", "importing no_such_module .* failed: ModuleNotFoundError"),
        ("json:dumpz", "unknown function 'json:dumpz'; nearest known: .*json:dumps"),
        ({"hidden_size": 4}, "not a transformers config.*model_type"),
        ({"model_type": "lama"}, "unknown model_type 'lama'; nearest known: .*llama"),
        ({"model_type": "nope", "auto_map": {}}, "never run"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama config.*hidden_size"),
        (7, "is a int; expected a name"),
    ],
)  # fmt: skip
def test_bad_sources_say_what_to_do(spec, message):
    with pytest.raises(UsageError, match=message):
        resolve(spec)


def test_malformed_and_unbuildable_configs(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(UsageError, match=r"config.json is not readable JSON"):
        resolve(str(tmp_path))
    with pytest.raises(UsageError, match="cannot be built from its config"):
        resolve(TINY | {"model_type": "llama", "intermediate_size": -1}).build()


def test_a_head_without_a_loss_is_not_replaced_by_another():
    source = resolve(TINY | {"model_type": "bert", "architectures": ["BertForQuestionAnswering"]})
    assert source.task_head == "base"
    assert sum(p.numel() for p in source.build().parameters()) > 0
    with pytest.raises(UsageError, match="BertForQuestionAnswering has no built-in training loss"):
        source.example_inputs(1, 8)


MODULE = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return {"loss": self.head(self.embed(ids)).logsumexp(-1).mean()}

def inputs(batch, sequence, device):
    return {"ids": torch.zeros(batch, sequence, dtype=torch.int64, device=device)}

def pair():
    return Tied(), inputs

def bare():
    return Tied()

def wrong():
    return 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "holdfast_models_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "holdfast_models_test"
    sys.modules.pop("holdfast_models_test", None)


def test_module_function(functions):
    source = resolve(f"{functions}:pair")
    assert (source.kind, source.task_head) == ("callable", "custom")
    on_meta = source.build()
    assert on_meta.head.weight is on_meta.embed.weight and on_meta.embed.weight.is_meta
    model = source.build("cpu", torch.bfloat16)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.bfloat16
    assert loss_of(model(**source.example_inputs(2, 4, "cpu"))).shape == ()
    assert source.fingerprint() == resolve(f"{functions}:bare").fingerprint()
    with pytest.raises(UsageError, match=r"bare does not say.*\(module, example_inputs\)"):
        resolve(f"{functions}:bare").example_inputs(1, 4)
    with pytest.raises(UsageError, match=r"wrong' returned int; expected an nn.Module"):
        resolve(f"{functions}:wrong").build()


def test_a_module_is_copied_without_memory():
    model = resolve("gpt2").build()
    model.transformer.wte.weight.requires_grad_(False)
    source = resolve(model)
    assert (source.kind, source.task_head) == ("module", "causal-lm")
    copy = source.build()
    assert copy is not model and copy.lm_head.weight is copy.transformer.wte.weight
    assert not copy.lm_head.weight.requires_grad and copy.transformer.wpe.weight.requires_grad
    assert source.example_inputs(1, 8)["labels"].shape == (1, 8)
    real = nn.Linear(2, 3)
    assert resolve(real).build().weight.is_meta and not real.weight.is_meta


def test_loss_of():
    assert loss_of((torch.ones(()), "logits")) == 1
    with pytest.raises(UsageError, match="returned Tensor without a scalar loss"):
        loss_of(torch.ones(2))
