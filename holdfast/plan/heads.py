"""Training heads of transformers configs: which class carries the loss, what one step is fed."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdfast.errors import UsageError, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Step:
    """What the inputs of one step depend on: int64 ids and labels, `dtype` for pixels and sound."""

    batch: int
    sequence: int
    device: torch.device
    dtype: torch.dtype

    def ids(self, config: "PretrainedConfig") -> Tensor:
        # Special tokens (padding, images) live at the ends of a vocabulary; stay in the middle,
        # so that no model treats these ids as anything but text.
        vocabulary = config.get_text_config().vocab_size
        count = torch.arange(self.batch * self.sequence, device=self.device)
        return (vocabulary // 4 + count % max(1, vocabulary // 2)).view(self.batch, self.sequence)

    def classes(self, config: "PretrainedConfig") -> Tensor:
        return torch.arange(self.batch, device=self.device) % (config.num_labels or 2)

    def signal(self, *shape: int) -> Tensor:
        ramp = torch.linspace(-1, 1, self.batch * math.prod(shape), device=self.device)
        return ramp.to(self.dtype).view(self.batch, *shape)


def _language(config: "PretrainedConfig", step: Step) -> dict[str, Tensor]:
    # Training packs sequences, so there is no padding and no mask to hold.
    ids = step.ids(config)
    return {"input_ids": ids, "labels": ids.clone()}


def _text_classes(config: "PretrainedConfig", step: Step) -> dict[str, Tensor]:
    return {"input_ids": step.ids(config), "labels": step.classes(config)}


def _image_classes(config: "PretrainedConfig", step: Step) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)  # convolutional networks name none; 224 is custom
    height, width = (size, size) if isinstance(size, int) else size
    pixels = step.signal(getattr(vision, "num_channels", 3), height, width)
    return {"pixel_values": pixels, "labels": step.classes(config)}


def _speech(config: "PretrainedConfig", step: Step) -> dict[str, Tensor]:
    try:
        # Whisper's second convolution halves the frames to max_source_positions.
        shape = config.num_mel_bins, 2 * config.max_source_positions
    except AttributeError as error:
        raise UsageError(
            f"speech models of type {config.model_type!r} have no built-in step inputs, only "
            "Whisper has; give module:function with example_inputs"
        ) from error
    return {"input_features": step.signal(*shape), "labels": step.ids(config)}


@dataclass(frozen=True)
class Head:
    """A task: its AutoModelFor class, that class's MODEL_FOR name table, its step inputs."""

    task: str
    auto: str
    table: str
    inputs: Callable[["PretrainedConfig", Step], dict[str, Tensor]]

    def classes(self) -> dict[str, tuple[str, ...]]:
        """model_type -> class names."""
        from transformers.models.auto import modeling_auto

        table = getattr(modeling_auto, f"MODEL_FOR_{self.table}_MAPPING_NAMES")
        return {key: (name,) if isinstance(name, str) else name for key, name in table.items()}


SEQ2SEQ = Head("seq2seq", "Seq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", _language)
SPEECH = Head("speech-seq2seq", "SpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", _speech)
MASKED = Head("masked-lm", "MaskedLM", "MASKED_LM", _language)
CAUSAL = Head("causal-lm", "CausalLM", "CAUSAL_LM", _language)
IMAGE = Head("image-classification", "ImageClassification", "IMAGE_CLASSIFICATION", _image_classes)
TEXT = Head(
    "sequence-classification", "SequenceClassification", "SEQUENCE_CLASSIFICATION", _text_classes
)
HEADS = (CAUSAL, SEQ2SEQ, SPEECH, MASKED, IMAGE, TEXT)


def choose_head(config: "PretrainedConfig") -> Head | None:
    """The head that config.architectures names, else the usual one of its model_type, else None.

    An architecture with a head that is not in `HEADS` (question answering, say) gives None: to
    plan for another head than the one named would be a wrong answer.
    """
    for name in config.architectures or ():
        for head in HEADS:
            if any(name in classes for classes in head.classes().values()):
                return head
        if "For" in name and not name.endswith("ForPreTraining"):
            return None
    if config.is_encoder_decoder:
        order: tuple[Head, ...] = (SEQ2SEQ, SPEECH)
    elif getattr(config, "is_decoder", False):
        order = (CAUSAL,)
    else:
        # Encoders such as BERT also have a causal class; masked is what they are trained as.
        order = (MASKED, CAUSAL, IMAGE)
    return next((head for head in order if config.model_type in head.classes()), None)


def build_head(
    config: "PretrainedConfig",
    head: Head | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
) -> nn.Module:
    """A model in training mode without a cache, initialised as its architecture asks.

    Raises:
        UsageError: the architecture refuses the config.
    """
    import transformers

    config = copy.deepcopy(config)
    config.architectures = config.architectures or []
    auto = getattr(transformers, f"AutoModelFor{head.auto}" if head else "AutoModel")
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        for part in (config, config.get_text_config()):
            part.use_cache = False
        with device:
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:  # constructors check their configs with exceptions of all kinds
        raise UsageError(
            f"a model of type {config.model_type!r} cannot be built from its config: {error}"
        ) from error
    return model.train()


def head_inputs(
    config: "PretrainedConfig", head: Head | None, step: Step, limit: int | None
) -> dict[str, Tensor]:
    """Keyword arguments of one training step, labels included.

    Raises:
        UsageError: no head with a loss, or a sequence longer than the position table.
    """
    if head is None:
        named = ", ".join(config.architectures or ["none"])
        raise UsageError(
            f"model_type {config.model_type!r} with architectures {named} has no built-in training "
            f"loss; known tasks: {', '.join(h.task for h in HEADS)}. Name a class of one of them "
            "in architectures, or give module:function that returns (module, example_inputs)"
        )
    if head is not IMAGE and limit is not None and step.sequence > limit:
        raise UsageError(
            f"sequence {step.sequence} is longer than the {limit} positions of this "
            f"{config.model_type} model; use --sequence {limit} or less"
        )
    return head.inputs(config, step)


def position_limit(config: "PretrainedConfig", build: Callable[[], nn.Module]) -> int | None:
    """Longest sequence that a table of positions allows; None where there is no such table.

    Rotary and relative positions are computed, so max_position_embeddings does not bound them.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_target_positions", None)  # speech decoders
    if limit is None:
        limit = getattr(text, "max_position_embeddings", None)
    computed = getattr(text, "rope_parameters", None) or getattr(text, "alibi", False)
    if not limit or computed or not getattr(text, "position_biased_input", True):
        return None
    for name, module in build().named_modules():
        # RoBERTa's table spends its first rows on padding: 514 rows hold 512 positions.
        table = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if table and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def config_from_dict(fields: Any, origin: str) -> "PretrainedConfig":
    """The transformers config of a parsed config.json.

    Raises:
        UsageError: not an object, no or unknown model_type, or values that its class refuses.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise UsageError(
            f"{origin} is not a transformers config: expected a JSON object with a string "
            'model_type, for example {"model_type": "llama", "hidden_size": 2048}'
        )
    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        error = unknown("model_type", kind, CONFIG_MAPPING)
        remote = ""
        if "auto_map" in fields:
            remote = " (it asks for code from its repository, which is never run)"
        raise UsageError(f"{origin}: {error}{remote}; or give module:function")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(fields))
    except Exception as error:  # each config class validates with exceptions of its own
        reason = " ".join(str(error).split())
        raise UsageError(f"{origin} is not a valid {kind} config: {reason}") from error
