"""Rows of files, folders and data sets: every one of them with its place, the bad ones named, the others read."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepkto_fast.errors import RunError
from stepkto_fast.rows import RowError, read_rows, shown, text_column

ROWS = [{"a": "one", "b": [True, None]}, {"a": "zwölf ки", "b": [False]}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(source, **options):
    return list(read_rows(str(source), **options))


def rows(source, **options):
    found = read(source, **options)
    assert all(complaint is None for _, _, complaint in found)
    return [row for _, row, _ in found]


@pytest.fixture
def hub_folder(tmp_path):
    """Laid out as a repository of the hub."""
    folder = tmp_path / "repository"
    for split in ("train", "test"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist([*ROWS, {"a": split, "b": []}]), folder / f"data/{split}-00000-of-1.parquet"
        )
    (folder / "README.md").write_text("# Rows\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache/rows.json").write_text("[]")
    return folder


def write_jsonl(path):
    path.write_text(lines(ROWS), encoding="utf-8")


def write_gzip(path):
    path.write_bytes(gzip.compress(lines(ROWS).encode()))


def write_list(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("x.jsonl", write_jsonl, "12"),
        ("x.JSONL", write_jsonl, "12"),
        ("x.jsonl.gz", write_gzip, "12"),
        ("x.json", write_jsonl, "12"),
        ("x.json", write_list, "01"),
        ("x.parquet", write_parquet, "01"),
    ],
)
def test_files_give_their_rows_and_places(tmp_path, name, write, places):
    write(tmp_path / name)
    expected = [(f"{tmp_path / name}:{place}", row, None) for place, row in zip(places, ROWS, strict=True)]
    assert read(tmp_path / name) == expected


def test_csv_has_texts_and_the_line_on_which_a_row_ends(tmp_path):
    path = tmp_path / "x.csv"
    long = "z" * 200_000
    path.write_bytes(f'\ufeffa,b\n1,"two\nlines"\n1,2,3\n4\n"{long}",é\n'.encode() + b"\xff,6\n7,8\n")
    first, three, one, wide, broken, last = read(path)
    assert first == (f"{path}:3", {"a": "1", "b": "two\nlines"}, None)
    assert three == (f"{path}:4", None, "has 3 fields, the header 2: quote the fields that hold commas")
    assert one[2].startswith("has 1 fields, the header 2")
    assert wide[1] == {"a": long, "b": "é"}
    assert broken == (f"{path}:7", None, "column 'a' is not UTF-8: save the file as UTF-8")
    assert last[1] == {"a": "7", "b": "8"}


def test_one_bad_line_is_one_complaint(tmp_path):
    path = tmp_path / "x.jsonl"
    bad = {
        b'{"a": "\xff"}': r"is not UTF-8: invalid start byte at byte 8 of the line",
        b'{"a": 1': "is not JSON: .* give one object a line",
        b"[1, 2]": r"is not an object but list \[1, 2\]",
        b'{"a": 1, "b": [NaN]}': "column 'b' holds NaN or Infinity",
        b'{"a": -Infinity}': "column 'a' holds NaN or Infinity",
        b'{"a": "\\ud83d"}': "column str 'a' holds half of a surrogate pair",
        b"[" * 100_000: "is not JSON: maximum recursion depth",
        b'{"a": ' + b"9" * 5000 + b"}": "is not JSON: Exceeds the limit",
    }
    good = '{"a": "NaN \U0001d7d9 \u2028 \\ud83d\\ude00"}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(line + b"\r\n\n" + good + b"\n" for line in bad))
    found = read(path)
    assert [where for where, _, _ in found] == [f"{path}:{3 * n + k}" for n in range(len(bad)) for k in (1, 3)]
    for (where, row, complaint), message in zip(found[::2], bad.values(), strict=True):
        assert row is None, where
        assert re.search(message, complaint), complaint
    assert all(row == {"a": "NaN \U0001d7d9 \u2028 \U0001f600"} for _, row, _ in found[1::2])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(data=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.none() | st.booleans()), max_size=4))
def test_lines_that_json_writes_come_back(tmp_path, data):
    path = tmp_path / "x.jsonl"
    for plain in (True, False):
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=plain) + "\n" for row in data), encoding="utf-8", newline=""
        )
        assert rows(path) == data


def test_a_list_with_bad_items_gives_the_others(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(' [{"a": 1}, 2, {"a": NaN}, {"a": 3}]')
    assert [(where[-1], row) for where, row, _ in read(path)] == [
        ("0", {"a": 1}),
        ("1", None),
        ("2", None),
        ("3", {"a": 3}),
    ]
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(RunError, match=r"x\.json is not JSON: .*utf-8"):
        read(path)


def test_text_of_a_parquet_row_that_is_not_utf8_is_named_by_its_column(tmp_path):
    path = tmp_path / "x.parquet"
    raw = pa.array([b"fine", b"\xff", b"fine"])
    pq.write_table(pa.table({"n": [0, 1, 2], "a": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), path)
    found = read(path)
    assert found[1] == (f"{path}:1", None, "column 'a' is not UTF-8: write it again as UTF-8")
    assert [row for _, row, _ in found[::2]] == [{"n": 0, "a": "fine"}, {"n": 2, "a": "fine"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1", "cannot be read, or not to its end"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], "cannot be read, or not to its end"),
        (
            "x.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        ("x.txt", b"a", r"ending that is not known: name it \.jsonl, .*\.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} .*{message}"):
        read(tmp_path / name)


def test_a_cut_off_parquet_file_is_an_error_behind_its_good_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [f"{n:0999}" for n in range(4000)]}), path, row_group_size=1000, use_dictionary=False)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    found = read_rows(str(path))
    assert next(found)[1] == {"a": "0" * 999}
    with pytest.raises(RunError, match=r"x\.parquet cannot be read, or not to its end"):
        list(found)


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "~/absent/rows", "owner/rows.parquet"])
def test_a_path_that_is_not_there_is_no_name_on_the_hub(name):
    with pytest.raises(RunError, match=f"{name} does not exist"):
        read(name)


def test_a_name_that_the_hub_does_not_give_is_named():
    with pytest.raises(RunError, match=r"nobody/nothing cannot be loaded: .*Check the name"):
        read("nobody/nothing", split="train")


def test_folders_are_read_split_by_split(hub_folder):
    train = rows(hub_folder, split="train")
    assert train == [*ROWS, {"a": "train", "b": []}]
    assert read(hub_folder, split="test")[2][0] == f"{hub_folder}/data/test-00000-of-1.parquet:2"
    with pytest.raises(RunError, match=r"several splits \(test, train\): name one"):
        read(hub_folder)
    with pytest.raises(RunError, match="no file of the split 'tests'"):
        read(hub_folder, split="tests")
    (hub_folder / "data/test-00000-of-1.parquet").unlink()
    assert rows(hub_folder) == train


def test_splits_of_other_names_are_found_in_file_names(tmp_path):
    for name in ("gsm8k", "math"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"a": name}]))
    assert rows(tmp_path) == [{"a": "gsm8k"}, {"a": "math"}]
    assert rows(tmp_path, split="math") == [{"a": "math"}]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no data file"):
        read(tmp_path / "empty")


def test_a_file_has_no_splits(tmp_path):
    write_jsonl(tmp_path / "x.jsonl")
    for option in ("split", "config"):
        with pytest.raises(RunError, match="is one file and has no splits or configurations: leave 'test' out"):
            read(tmp_path / "x.jsonl", **{option: "test"})


def test_load_dataset_reads_what_has_a_configuration(hub_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = read(hub_folder, split="test", config="default")
    assert found[2] == (f"{hub_folder}[test]:2", {"a": "test", "b": []}, None)
    assert rows(hub_folder, split="train[1:]+test[:1]", config="default") == [ROWS[1], {"a": "train", "b": []}, ROWS[0]]
    with pytest.raises(RunError, match="has the splits train, test: name one"):
        read(hub_folder, config="default")
    for wrong in ({"config": "default", "split": "tests"}, {"config": "main", "split": "test"}):
        with pytest.raises(RunError, match="cannot be loaded: ValueError"):
            read(hub_folder, **wrong)


def test_saved_datasets_are_read(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [(f"{tmp_path}/one:{n}", row, None) for n, row in enumerate(ROWS)]
    DatasetDict({s: Dataset.from_list([{"a": s}], split=s) for s in ("train", "test")}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two", split="test") == [(f"{tmp_path}/two[test]:0", {"a": "test"}, None)]
    for folder, split, message in (
        ("one", "test", "has no split 'test', but none"),
        ("two", "valid", "has no split 'valid', but train, test"),
        ("two", None, "has the splits train, test: name one"),
    ):
        with pytest.raises(RunError, match=message):
            read(tmp_path / folder, split=split)
    assert rows(tmp_path / "two" / "train", split="train") == [{"a": "train"}]
    with pytest.raises(RunError, match="has no split 'test', but train"):
        read(tmp_path / "two" / "train", split="test")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(RunError, match="one cannot be loaded"):
        read(tmp_path / "one")


def test_a_column_of_text_is_that_or_an_error():
    assert text_column({"a": " b "}, "a") == " b "
    for row, message in (
        ({"b": 1, "c": 2}, "column 'q.a' is missing: there are b, c"),
        ({}, "column 'q.a' is missing: there are none"),
        ({"a": 3}, "column 'q.a' is int 3: give a text"),
        ({"a": None}, "column 'q.a' is NoneType None"),
        ({"a": " \n"}, "column 'q.a' is empty"),
    ):
        with pytest.raises(RowError, match=message):
            text_column(row, "a", "q.")


def test_values_in_messages_are_short():
    assert shown("x" * 10**6).startswith("str 'xxx")
    assert max(len(shown(v)) for v in ("x" * 10**6, ["y"] * 1000, {"z": "z" * 1000})) < 80
