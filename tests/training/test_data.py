import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.errors import UsageError
from holdfast.training.data import (
    BatchStream,
    DataSource,
    PackedTokens,
    load_tokenizer,
    order,
    prepare,
)

LIBRARY = Path(os.__file__).parent
EOS = 257


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("bytes")


def rows(part):
    return part.batch(torch.arange(len(part)))


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_packing_by_hand(tmp_path, byte):
    (tmp_path / "b.txt").write_bytes(b"de\r\n")
    (tmp_path / "a.txt").write_bytes(b"abc")
    data = prepare(DataSource((str(tmp_path),), validation=0), byte, 4)
    assert rows(data.train)["input_ids"].tolist() == [[97, 98, 99, EOS], [100, 101, 13, 10]]
    assert rows(data.train)["labels"].equal(rows(data.train)["input_ids"])
    assert rows(data.train)["labels"].dtype == torch.int64
    assert len(data.validation) == 0
    assert data.report.skipped == {"tokens at the end, short of a sequence": 1}
    assert data.report.tokens == 9
    assert data.report.split == "none"
    assert data.nbytes == data.report.nbytes == 2 * 2 * 4


def test_real_text_loses_only_the_tail(byte):
    names = sorted(LIBRARY.glob("a*.py"))
    data = prepare(DataSource(tuple(map(str, names)), validation=0), byte, 128)
    whole = b"".join(name.read_bytes() for name in names if name.stat().st_size)
    packed = data.train.tokens.reshape(-1)
    text = bytes(packed[packed < 256].astype(np.uint8))
    assert whole.startswith(text)
    assert len(whole) + len(names) - packed.size < 128


def test_directory_skips_and_says_so(tmp_path, byte):
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    for name, content in {
        "deep/keep.py": b"x = 1\n" * 9,
        "deep/.git/config.txt": b"hidden",
        ".hidden.txt": b"hidden",
        "image.bin": b"\0",
        "deep/zero.txt": b"a\0b",
        "latin.txt": b"caf\xe9",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    report = prepare(DataSource((str(tmp_path),), validation=0), byte, 55).report
    assert report.files == report.texts == 1
    assert report.skipped == {
        "hidden files": 2,
        "files of other types (name them with a glob)": 1,
        "binary files": 1,
        "files that are not UTF-8": 1,
        "empty files": 1,
    }
    assert "left out: 1 binary files" in str(report)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["skipped"] == report.skipped


def test_glob_pattern_and_duplicates(tmp_path, byte):
    (tmp_path / "sub").mkdir()
    for name in ("a.py", "b.txt", "sub/c.py", "sub/d.odd"):
        (tmp_path / name).write_text(name)

    def read(*paths, glob=None):
        report = prepare(DataSource(paths, glob, validation=0), byte, 4).report
        return report.tokens - report.texts, report.skipped.get("files given twice", 0)

    root = str(tmp_path)
    assert read(root, glob="**/*.py") == (12, 0)
    assert read(root, glob="*.py") == (4, 0)
    assert read(root, glob="sub/*.odd") == (9, 0)
    assert read(f"{root}/**/*.txt") == (5, 0)
    assert read(f"{root}/a.py", root) == (17, 1)


def test_split_is_by_document_and_disjoint(tmp_path, byte):
    # Equal documents must stay together: 40 texts, each given three times.
    texts = [f"document {i:02} " + "abcdefgh" * (i % 7 + 1) for i in range(40)] * 3
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = prepare(DataSource((path,), validation=0.2), byte, 8)

    def documents(part):
        run = part.tokens.reshape(-1)
        pieces = np.split(run, np.flatnonzero(run == EOS) + 1)
        return {bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces if len(piece) > 1}

    train, validation = documents(data.train), documents(data.validation)
    whole = set(texts)
    # A dropped tail leaves at most one document of a part incomplete.
    assert len(train - whole) <= 1
    assert len(validation - whole) <= 1
    assert not train & validation & whole
    assert data.report.split == "by document"
    share = data.validation.tokens.size / data.report.tokens
    assert 0.15 < share < 0.4


def test_split_depends_on_seed_and_not_on_place(tmp_path, byte):
    def data(folder, seed):
        return prepare(DataSource((str(folder),), seed=seed), byte, 16)

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i in range(50):
            (tmp_path / folder / f"{i:02}.txt").write_text(f"text number {i} " * 5)
    a, b, c = (data(tmp_path / f, s) for f, s in (("one", 0), ("two", 0), ("one", 1)))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert not np.array_equal(a.validation.tokens, c.validation.tokens)


def test_fingerprint_sees_every_setting(tmp_path, byte):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 40)
    source = DataSource((str(path),))
    seen = {
        prepare(source, byte, 16).fingerprint,
        prepare(source, byte, 8).fingerprint,
        prepare(dataclasses.replace(source, validation=0.5), byte, 16).fingerprint,
        prepare(dataclasses.replace(source, seed=1), byte, 16).fingerprint,
    }
    path.write_text("abcdefgh" * 39 + "abcdefgH")
    seen.add(prepare(source, byte, 16).fingerprint)
    assert len(seen) == 5


def test_one_document_is_split_at_its_tail(tmp_path, byte):
    text = "".join(chr(97 + i % 26) for i in range(99))
    (tmp_path / "a.txt").write_text(text)
    data = prepare(DataSource((str(tmp_path / "a.txt"),), validation=0.3), byte, 10)
    run = [*text.encode(), EOS]
    assert data.train.tokens.reshape(-1).tolist() == run[:70]
    assert data.validation.tokens.reshape(-1).tolist() == run[70:]
    assert data.report.split == "tail of the text"


def test_validation_takes_a_sequence_when_there_are_two(tmp_path, byte):
    path = tmp_path / "a.txt"
    path.write_text("x" * 19)
    data = prepare(DataSource((str(path),)), byte, 10)
    assert (len(data.train), len(data.validation)) == (1, 1)
    path.write_text("x" * 15)
    data = prepare(DataSource((str(path),)), byte, 10, batch_hint=2)
    assert (len(data.train), len(data.validation)) == (1, 0)
    assert "too little data for a validation sequence" in data.report.notes[0]
    assert "1 training sequences are fewer than a batch of 2" in data.report.notes[1]


def test_chat_labels_by_hand(tmp_path, byte):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    rest = {"text": "plain"}
    for name, value in (("a", {"messages": chat}), ("b", {"text": chat, "messages": [1]})):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [value, rest])
        data = prepare(DataSource((path,), validation=0), byte, 14)
        user, assistant = 260, 261
        ids = [user, 72, 105, EOS, assistant, 89, 111, EOS, *b"plain", EOS]
        batch = rows(data.train)
        assert batch["input_ids"].tolist() == [ids]
        assert batch["labels"].tolist() == [[-100] * 5 + ids[5:]]
        assert (data.report.chats, data.report.texts) == (1, 1)
        assert data.nbytes == 14 * 3


def test_text_before_chat_keeps_its_loss(tmp_path, byte):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "plain"}, {"messages": chat}])
    labels = rows(prepare(DataSource((path,), validation=0), byte, 14).train)["labels"]
    assert labels.tolist() == [[*b"plain", EOS] + [-100] * 5 + [89, 111, EOS]]


def test_sequences_without_loss_are_left_out(tmp_path, byte):
    chat = [{"role": "user", "content": "u" * 40}, {"role": "assistant", "content": "a" * 20}]
    silent = {"messages": chat[:1]}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}, silent] * 3)
    data = prepare(DataSource((path,), validation=0), byte, 8)
    assert (rows(data.train)["labels"][:, 1:] != -100).any(1).all()
    assert data.report.skipped["chats without an assistant's turn"] == 3
    assert data.report.skipped["sequences without a token that carries loss"] == 192 // 8 - len(
        data.train
    )
    kept = (rows(data.train)["labels"] != -100).sum()
    # A loss token that opens a sequence has nothing to be predicted from.
    assert 3 * 21 - 3 <= kept <= 3 * 21


def test_loss_on_a_first_token_alone_is_no_loss(tmp_path, byte):
    chats = [
        [{"role": "user", "content": "u" * n}, {"role": "assistant", "content": "a" * m}]
        for n, m in ((4, 1), (5, 8))
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    data = prepare(DataSource((path,), validation=0), byte, 8)
    # Rows: loss on `a` at the end; EOS, then only the user; the reply; its last `a` is the tail.
    assert [row[-1] for row in data.train.tokens.tolist()] == [97, 97]
    assert data.report.skipped["sequences without a token that carries loss"] == 1


def test_large_vocabularies_use_int32(tmp_path, byte):
    (tmp_path / "a.txt").write_text("abcd" * 8)
    byte = load_tokenizer("bytes")
    byte.add_tokens([f"<extra {i}>" for i in range(65536 - 264)])
    data = prepare(DataSource((str(tmp_path),), validation=0), byte, 8)
    assert data.train.tokens.dtype == np.int32
    assert rows(data.train)["input_ids"][0].tolist() == list(b"abcdabcd")


def test_progress_ends_at_the_total(tmp_path, byte):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 5000}] * 500)
    (tmp_path / "b.txt").write_text("y" * 1000)
    calls = []
    source = DataSource((path, str(tmp_path / "b.txt")))
    prepare(source, byte, 64, progress=lambda done, total: calls.append((done, total)))
    total = os.path.getsize(path) + 1000
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"text": "a"', r"a\.jsonl:2: malformed JSON"),
        ("[1]", r"a\.jsonl:2: list, expected an object"),
        ('{"body": "x", "id": 3}', "2: no field 'text' and no 'messages'; the fields are body, id"),
        ('{"text": 3}', "2: field 'text' is int, expected a text or a list of messages"),
        ('{"text": "\\ud800"}', "2: field 'text' holds a lone surrogate"),
        ('{"messages": [{"role": "user"}]}', "2: message 0 is"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, byte, line, error):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UsageError, match=error):
        prepare(DataSource((str(path),)), byte, 4)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "no data: 0 files read from .*left out: 1 empty files.*name text files"),
        (b"a\0b", "is a binary file; expected UTF-8 text or .jsonl"),
        (b"caf\xe9", r"not UTF-8 \(byte 3\); convert it, for example: iconv"),
        (b"abc", "too little data: 4 tokens in 1 files, one sequence needs 8; .* to 4 or less"),
    ],
)
def test_unusable_files(tmp_path, byte, content, error):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=error):
        prepare(DataSource((str(path),)), byte, 8)


def test_other_errors(tmp_path, byte):
    with pytest.raises(UsageError, match="'nowhere' does not exist and matches nothing"):
        prepare(DataSource(("nowhere",)), byte, 8)
    with pytest.raises(UsageError, match="no data: 0 files"):
        prepare(DataSource((str(tmp_path),)), byte, 8)
    with pytest.raises(UsageError, match=r"glob '/abs' is malformed.*relative"):
        prepare(DataSource((str(tmp_path),), glob="/abs"), byte, 8)
    with pytest.raises(UsageError, match="sequence 1 predicts nothing"):
        prepare(DataSource((str(tmp_path),)), byte, 1)
    with pytest.raises(UsageError, match=r"validation=1 is not a fraction"):
        DataSource(("x",), validation=1)
    chat = [{"role": "user", "content": "u" * 40}, {"role": "assistant", "content": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    with pytest.raises(UsageError, match="no training sequence of 16 tokens has a token with loss"):
        prepare(DataSource((path,)), byte, 16)


def test_source_is_hashable_and_survives_json():
    source = DataSource(["a", "b"], glob="*.py", seed=3)
    assert hash(source) == hash(DataSource(**json.loads(json.dumps(dataclasses.asdict(source)))))
    assert DataSource("a").paths == ("a",)


def test_order_is_a_pure_function():
    assert order(50, 3, 7).equal(order(50, 3, 7))
    assert order(50, 3, 7).sort().values.equal(torch.arange(50))
    distinct = {tuple(order(50, e, s).tolist()) for e in range(4) for s in range(4)}
    assert len(distinct) == 16


@pytest.mark.parametrize("batch", [1, 3, 5, 12])
def test_stream_resumes_to_the_bit(batch):
    data = PackedTokens(np.arange(5 * 4, dtype=np.uint16).reshape(5, 4))
    stream, seen, states = BatchStream(data, batch, seed=2), [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(stream.state_dict())))
        seen.append(next(stream)["input_ids"])
    for i, state in enumerate(states):
        again = BatchStream(data, batch, seed=2)
        again.load_state_dict(state)
        for want in seen[i:]:
            assert next(again)["input_ids"].equal(want)
    drawn = torch.cat(seen)[:, 0] // 4
    for epoch in range(12 * batch // 5):
        assert drawn[5 * epoch : 5 * epoch + 5].equal(order(5, epoch, 2))


def test_stream_errors():
    data = PackedTokens(np.zeros((2, 4), np.uint16))
    with pytest.raises(UsageError, match="position 3 is outside an epoch of 2 sequences"):
        BatchStream(data, 1).load_state_dict({"epoch": 0, "position": 3})
    with pytest.raises(UsageError, match="cannot draw batches of 1 from 0 sequences"):
        BatchStream(PackedTokens(np.zeros((0, 4), np.uint16)), 1)


def test_shared_text_when_present(byte):
    root = Path(os.environ.get("HOLDFAST_DATA", "../shared/data")) / "text"
    if not root.is_dir():
        pytest.skip(f"no text data at {root}; set HOLDFAST_DATA")
    data = prepare(DataSource((str(root),)), byte, 256)
    assert data.report.texts > 0
    assert 0.02 < len(data.validation) / len(data.train) < 0.15
