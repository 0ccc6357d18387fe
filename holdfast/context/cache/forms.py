"""Forms of stored keys and values by name."""

from transformers import PreTrainedModel

from holdfast.errors import unknown
from holdfast.forms.affine import Int4, Int8
from holdfast.forms.base import Form


def stored_form(name: str, model: PreTrainedModel) -> Form | None:
    """The form called dense, int8 or int4, with groups that fit the model's heads."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forms = {"dense": None, "int8": Int8(), "int4": Int4(group=min(64, width & -width))}
    if name not in forms:
        raise unknown("form", name, forms)
    return forms[name]
