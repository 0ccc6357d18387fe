"""Records of four fields: plain training, what methods make of it, what excludes what."""

import pytest
from torch import nn

from holdfast.errors import UsageError
from holdfast.plan.apply import prepare
from holdfast.plan.file import Methods
from holdfast.plan.method import Method
from holdfast.plan.records import plain, records, refusal
from holdfast.plan.registry import methods


def test_no_method_no_change():
    assert records(Methods(dtype="bfloat16")) == plain("bfloat16")


def test_each_method_edits_its_own_fields_alone():
    spec = Methods(
        weights={"int4": {}},
        adapter={"lora": {}},
        optimizer={"adamw4": {}},
        gradients="backward",
        saved=[{"memsave": {}}],
        blocks={"layers": "recompute*3 disk*1"},
    )
    found = records(spec)
    assert found["parameters"].form == "4-bit codes with group scales"
    assert found["parameters"].extent == "all; two thin matrices a linear train"
    assert found["optimizer"].form == "4-bit codes with scales"
    assert found["gradients"].life == "consumed within backward"
    assert "recomputed in 3 of 4 blocks" in found["activations"].life
    assert "disk for 1 of 4 blocks" in found["activations"].place
    assert found["optimizer"]._replace(form="float32") == plain("float32")["optimizer"]


def test_methods_exclude_each_other_where_they_write_the_same_field():
    assert refusal(["adamw4", "lora", "memsave"]) is None
    assert refusal(["lora", "randlora"]) == "lora and randlora both write the extent of parameters"
    assert refusal(["int4"]).startswith("int4 needs lora")
    assert refusal(["peqa", "int4"]).startswith("peqa excludes int4")


def test_a_plan_with_methods_that_exclude_each_other_is_refused():
    with pytest.raises(UsageError, match="do not go together: int4 needs lora"):
        prepare(nn.Linear(4, 4), Methods(weights={"int4": {}}, adapter={"peqa": {}}))


def test_every_method_writes_categories_that_have_a_record():
    for method in methods().values():
        assert {category for category, _ in method.writes} <= plain("float32").keys(), method.key


def test_a_field_that_no_record_has_is_a_defect():
    with pytest.raises(ValueError, match="colour"):
        Method("x", "saved", {("activations", "colour"): "red"}, lambda model: model)
