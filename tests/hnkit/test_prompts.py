"""Prompt sets: formats, damage, and the split."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnkit import InputError
from hnkit.prompts import read_prompts, require_disjoint, split_prompts

EXPECTED = ["a red three", "two fours", "ünïcode 漢字"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a red three\n\n  two   fours \nünïcode 漢字\ntwo fours\n"),
        ("p.json", json.dumps(["a red three", "two fours", " ünïcode 漢字", "two fours"])),
        ("q.json", json.dumps({"1": "a red three", "2": "two fours", "3": "ünïcode 漢字"})),
        ("p.jsonl", "\n".join(json.dumps({"tag": "x", "prompt": p}) for p in [*EXPECTED, EXPECTED[0]])),
    ],
)
def test_formats(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_prompts(path) == EXPECTED
    path.write_text("\ufeff" + content, encoding="utf-8")
    assert read_prompts(path) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a", r"\.csv.*accepted are"),
        ("p", b"a", "without a suffix"),
        ("p.txt", b"", "no prompt"),
        ("p.txt", b" \n\t\n", "no prompt"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.json", b"[1, 2]", "list or dict of strings"),
        ("p.json", b'"one"', "list or dict of strings"),
        ("p.json", b'["a"', "not valid JSON"),
        ("p.json", b"[" * 100_000, "not valid JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}', "line 2: no string field 'prompt'"),
        ("p.jsonl", b'{"prompt": 3}', "line 1: no string field"),
        ("p.jsonl", b"{", "line 1: not valid JSON"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")


class Table(dict):
    @property
    def column_names(self):
        return list(self)


def test_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "missing/one":
            raise RuntimeError("no such data set\nand a second line")
        return Table(prompt=["a", "b", "a"], caption=["c"])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_prompts("hf:org/name") == ["a", "b"]
    assert read_prompts("hf:org/name:test:caption") == ["c"]
    assert asked == [("org/name", "train"), ("org/name", "test")]
    with pytest.raises(InputError, match="no column 'text'; it has prompt, caption"):
        read_prompts("hf:org/name:train:text")
    with pytest.raises(InputError, match=r"could not be loaded \(no such data set\)"):
        read_prompts("hf:missing/one")
    with pytest.raises(InputError, match="no data set is named"):
        read_prompts("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_prompts("hf:org/name")


@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=30), st.data())
def test_split_is_a_partition_that_ignores_order(prompts, data):
    prompts = sorted(prompts)
    held_out = data.draw(st.integers(0, len(prompts) - 1))
    training, evaluation = split_prompts(prompts, held_out)
    assert len(evaluation) == held_out
    assert sorted([*training, *evaluation]) == prompts
    again = split_prompts(prompts[::-1], held_out)
    assert [set(part) for part in again] == [set(training), set(evaluation)]


@pytest.mark.parametrize("held_out", [-1, 3, 10])
def test_split_refuses(held_out):
    with pytest.raises(InputError, match="to hold out of 3"):
        split_prompts(["a", "b", "c"], held_out)


def test_disjoint():
    require_disjoint(["a red three"], ["a blue three"])
    with pytest.raises(InputError, match=r"1 evaluation prompts .* 'A  Red three'"):
        require_disjoint(["a red three"], ["two fours", "A  Red three"])
