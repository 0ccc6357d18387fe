import json
import subprocess
import sys

import pytest
import torch
import yaml

from holdfast.errors import UsageError
from holdfast.plan import hardware_probe
from holdfast.plan.hardware import (
    DEFAULT,
    PRESETS,
    default_hardware,
    load_hardware,
    parse_hardware,
    preset_of,
    presets,
    save_hardware,
)

FIELDS = {
    "name": "by-hand",
    "source": "made up",
    "devices": [
        {
            "kind": "cuda",
            "flops": {"float32": "1e12", "bfloat16": 4e12},
            "memory": "24GiB",
            "bandwidth": 1e11,
            "launch_seconds": 1e-5,
            "compute_efficiency": 0.5,
            "bandwidth_efficiency": 0.8,
        }
    ],
    "host": {"memory": 2**35, "bandwidth": 2e10},
    "disk": {"read_bandwidth": 1e9, "write_bandwidth": 5e8},
    "links": [
        {"from": "host", "to": "device", "bandwidth": 1e10, "latency_seconds": 1e-3, "duplex": True}
    ],
}


def changed(path: str, value):
    """FIELDS with one field set, or removed where value is None."""
    fields = json.loads(json.dumps(FIELDS))
    *parents, last = path.split(".")
    node = fields
    for key in parents:
        node = node[int(key)] if key.isdigit() else node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return fields


def test_roofline_by_hand():
    hardware = parse_hardware(FIELDS, "test")
    assert hardware.device.memory == 24 * 2**30
    # compute bound: 1e9 / (0.5 * 1e12) = 2 ms; moving 8e7 bytes takes 1 ms
    assert hardware.seconds(1e9, 8e7, torch.float32) == pytest.approx(2e-3 + 1e-5)
    # four times the rate: moving binds
    assert hardware.seconds(1e9, 8e7, "bfloat16") == pytest.approx(1e-3 + 1e-5)
    assert hardware.seconds(0, 8e7, torch.int64) == pytest.approx(1e-3 + 1e-5)
    with pytest.raises(UsageError, match=r"no flops for int8.*add devices.0.flops.int8"):
        hardware.seconds(1, 0, torch.int8)


def test_transfers_by_hand():
    hardware = parse_hardware(FIELDS, "test")
    assert hardware.transfer_seconds(1e9, "device", "host") == pytest.approx(0.101)
    assert hardware.transfer_seconds(1e9, "host", "disk") == pytest.approx(2)
    assert hardware.transfer_seconds(1e9, "disk", "device") == pytest.approx(1)
    assert hardware.transfer_seconds(1e9, "host", "host") == 0
    one_way = parse_hardware(changed("links.0.duplex", False), "test")
    with pytest.raises(UsageError, match="no link from device to host; add to links"):
        one_way.transfer_seconds(1, "device", "host")
    with pytest.raises(UsageError, match="unknown place 'tape'"):
        hardware.transfer_seconds(1, "tape", "host")
    # Without a GPU both places are the same RAM, and a copy passes over it twice.
    cpu = load_hardware("cpu-2core")
    assert cpu.transfer_seconds(42e9, "device", "host") == pytest.approx(2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("devices.0.bandwidth", None, "devices.0.bandwidth is missing; add it"),
        ("source", None, "source is missing"),
        ("disk.speed", 3, "disk.speed=3 is not a known field"),
        ("devices.0.bandwidth", -1, "devices.0.bandwidth=-1 is wrong: .*greater than 0"),
        ("devices.0.memory", "24 gibi", "devices.0.memory='24 gibi' is wrong: .*24GiB"),
        ("devices.0.compute_efficiency", 1.5, "devices.0.compute_efficiency=1.5 is wrong"),
        ("devices", [], "devices=.* is wrong"),
        ("host", 4, "host=4 is wrong"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    with pytest.raises(UsageError, match=f"hardware file mine.yaml: {message}"):
        parse_hardware(changed(path, value), "mine.yaml")


def test_every_preset_loads_and_names_its_source():
    assert presets() == sorted(path.stem for path in PRESETS.iterdir())
    for name in presets():
        hardware = load_hardware(name.upper())
        assert hardware.name == name and len(hardware.source) > 40
        assert {"float32", "bfloat16", "float16"} <= hardware.device.flops.keys()
    # A better machine is never predicted to be slower.
    work = [(1e12, 1e6, "bfloat16"), (1e6, 1e10, "float32")]
    for call in work:
        ladder = [load_hardware(n).seconds(*call) for n in ("cpu-2core", "l4-24gb", "h100-80gb")]
        assert ladder == sorted(ladder, reverse=True)


def test_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_hardware().name == DEFAULT
    assert default_hardware("cpu").name == "cpu-2core"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert default_hardware().name == "l4-24gb"
    assert preset_of("NVIDIA A100-SXM4-80GB") == "a100-80gb"
    assert preset_of("NVIDIA GeForce RTX 4090") == "rtx-4090-24gb"
    assert preset_of("Tesla T4") is None


def test_unknown_and_malformed_files(tmp_path):
    with pytest.raises(
        UsageError, match=r"unknown hardware 'h10'; nearest known: h100-80gb.*probe"
    ):
        load_hardware("h10")
    path = tmp_path / "h.yaml"
    path.write_text("a: [")
    with pytest.raises(UsageError, match=r"h\.yaml is not YAML"):
        load_hardware(path)
    path.write_text("3")
    with pytest.raises(UsageError, match="not a mapping"):
        load_hardware(path)


def test_saving_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "h.yaml"
    save_hardware(parse_hardware(FIELDS, "test"), path)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match="No space left on device; choose another --out"):
        save_hardware(load_hardware("l4-24gb"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["h.yaml"] and path.read_bytes() == before


def test_a_probe_is_read_back(tmp_path):
    told = []
    hardware = hardware_probe.probe(
        disk_directory=tmp_path, disk_bytes=2**23, box_seconds=0.01, tell=told.append
    )
    save_hardware(hardware, tmp_path / "this.yaml")
    assert load_hardware(tmp_path / "this.yaml") == hardware
    assert [p.name for p in tmp_path.iterdir()] == ["this.yaml"]
    assert len(told) == len(set(told)) >= 5
    # Orders of magnitude that no machine which runs this leaves.
    assert 1e8 < hardware.device.flops["float32"] < 1e15
    assert 1e8 < hardware.device.bandwidth < 1e14
    assert 1e-9 < hardware.device.launch_seconds < 1e-2


def test_probe_without_a_writable_disk(tmp_path):
    with pytest.raises(UsageError, match=r"cannot measure the disk of .*nowhere.*--disk"):
        hardware_probe.disk_bandwidth(tmp_path / "nowhere", 2**20, 0.1)


def test_command_writes_yaml_and_prints_one_json_document(tmp_path, monkeypatch, capsys):
    from holdfast.cli.hw import probe

    def measure(disk_directory, tell):
        tell("disk")
        return load_hardware("l4-24gb")

    monkeypatch.setattr(hardware_probe, "probe", measure)
    out = tmp_path / "this.yaml"
    probe(out=out, disk=tmp_path, json_=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == yaml.safe_load(out.read_text())
    assert load_hardware(out) == load_hardware("l4-24gb")
    assert "measuring disk" in printed.err
    with pytest.raises(UsageError, match="create it or choose another"):
        probe(out=tmp_path / "no" / "this.yaml", disk=None, json_=False)


def test_help_does_not_import_torch():
    code = "import sys, holdfast.cli.hw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
