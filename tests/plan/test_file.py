import pytest

from holdfast.errors import UsageError
from holdfast.plan import file
from holdfast.plan.file import Methods, PlanFile, format_runs, parse_runs
from holdfast.plan.plan import Plan

GOOD = """\
model: gpt2
sequence: 128
budget: {device: 24GiB}
"""


def read(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return file.read(path)


def test_a_plan_written_by_hand_needs_three_fields(tmp_path):
    plan = read(tmp_path, GOOD)
    assert plan.budget == {"device": 24 * 2**30}
    assert (plan.batch, plan.methods.optimizer) == (1, {"adamw": {}})


def test_round_trip(tmp_path):
    plan = PlanFile(
        model="gpt2",
        batch=4,
        micro_batch=2,
        sequence=128,
        budget={"device": "1GiB", "disk": "2GiB"},
        methods=Methods(adapter={"lora": {"rank": 8}}, blocks={"h": "recompute*3 disk*9"}),
    )
    Plan(plan).save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").spec == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("colour: red", "colour = 'red': unknown field"),
        ("batch: 0", "batch = 0: .*greater than or equal to 1"),
        ("batch: -3", "batch = -3: "),
        ("sequence: long", "sequence = 'long': .*integer"),
        ("budget: {device: 24 potatoes}", "budget.device = '24 potatoes': "),
        ("budget: {device: -1GiB}", "budget.device = '-1GiB': "),
        ("budget: {device: 0}", "leaves no device bytes; write for example device: 24GiB"),
        ("budget: {attic: 1GiB}", "budget.attic.*'device', 'host' or 'disk'"),
        ("methods: {dtype: int7}", "methods.dtype = 'int7': .*'float32' or 'bfloat16'"),
        ("methods: {gradient: step}", "methods.gradient = 'step': unknown field"),
        ("methods: {blocks: {h: keep*x}}", r"'keep\*x' is not a run of blocks"),
        ("methods: {optimizer: {adamw: {}, sgd: {}}}", "optimizer names 2 methods"),
        ("training: {learning_rate: 0}", "training.learning_rate = 0: .*greater than 0"),
        ("training: {learning_rate: .nan}", "training.learning_rate = nan: "),
        ("training: {warmup: 2}", "training.warmup = 2: "),
        ("{batch: 4, micro_batch: 3}", "micro_batch 3 does not divide batch 4"),
        ("{batch: 2, methods: {gradients: backward}}", "excludes accumulation"),
        ("{methods: {gradients: backward}, training: {clip: 1}}", "excludes clip"),
        ("holdfast: 2", "holdfast = 2: "),
    ],
)
def test_errors_name_field_and_value(tmp_path, line, message):
    import yaml

    content = yaml.safe_load(GOOD) | yaml.safe_load(line)
    with pytest.raises(UsageError, match=message):
        read(tmp_path, yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds NoneType; expected fields like model:"),
        ("- model", "holds list"),
        ("model: [", "is not YAML"),
        ("model: gpt2", "sequence: Field required; budget: Field required"),
    ],
)
def test_what_is_no_plan(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


def test_missing_plan(tmp_path):
    with pytest.raises(UsageError, match=r"plan .*none.yaml cannot be read: No such file"):
        file.read(tmp_path / "none.yaml")


def test_runs_round_trip():
    options = ["recompute", "recompute", "keep", "host"]
    assert format_runs(options) == "recompute*2 keep*1 host*1"
    assert parse_runs(format_runs(options)) == parse_runs("recompute*2 keep host") == options
