"""Prompt sets: formats, damage, and the split."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnkit import InputError
from hnkit.prompts import read_prompts, read_records, require_disjoint, split_prompts, spread

EXPECTED = ["a red three", "two   fours", "ünïcode 漢字"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a red three\n\n  two   fours \nünïcode 漢字\ntwo   fours\n"),
        ("P.TXT", "a red three\r\n\r\n  two   fours\t\r\nünïcode 漢字"),
        ("p.json", json.dumps(["a red three", "two   fours", " ünïcode 漢字", "two   fours"])),
        ("q.json", json.dumps({"1": "a red three", "2": "two   fours", "3": "ünïcode 漢字"})),
        ("p.jsonl", "\n".join(json.dumps({"tag": "x", "prompt": p}) for p in [*EXPECTED, EXPECTED[0]])),
        ("p.jsonl", "\r\n".join(json.dumps({"prompt": p}, ensure_ascii=False) for p in EXPECTED)),
        ("p.csv", "id, prompt\r\n1,a red three\r\n2,two   fours \r\n\r\n3,ünïcode 漢字\r\n4,\r\n"),
        ("p.tsv", "prompt\tid\na red three\t1\ntwo   fours\t2\nünïcode 漢字\t3\n"),
        ("p.tsv", 'prompt\tid\n"a red three"\t1\ntwo   fours\t"a ""b"""\nünïcode 漢字\t3\n'),
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
        ("p.yaml", b"a", r"\.yaml.*accepted are"),
        ("p.csv", b"", "no column 'prompt'; it has nothing"),
        ("p.csv", b"text,id\na,1\n", r"no column 'prompt'; it has text, id: name one as p\.csv:COLUMN"),
        ("p.csv", b"prompt,prompt\na,b\n", "more than one column 'prompt'"),
        ("p.csv", b"prompt,id\na red, three,1\n", "line 2: 3 fields where the header has 2.*double quotes"),
        ("p.csv", b"id,prompt\n1\n", "line 2: 1 fields"),
        ("p.csv", b'prompt\n"a', "line 2: not valid CSV"),
        ("p.csv", b'prompt\n"a"b\n', "line 2: not valid CSV"),
        ("p.csv", b"prompt\n \n", "no prompt"),
        ("p.tsv", b'prompt\tid\n"a" b\t1\t2\n', "line 2: not valid CSV"),
        ("p.csv", b"\xff\n", "not UTF-8"),
        ("p.parquet", b"PAR1", "cannot be read"),
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
    for name in ("none.txt", "none.csv", "none.parquet", "none.csv:text"):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts(f"{tmp_path}/{name}")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")
    with pytest.raises(InputError, match="no file is named"):
        read_prompts("")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.json"])
def test_only_line_feeds_end_a_line(tmp_path, name, separator):
    """JSON allows U+2028 inside a string, and a prompt in a text file may hold one; str.splitlines cuts there."""
    prompt = f"a red{separator}three"
    record = json.dumps(prompt, ensure_ascii=False)  # which escapes what JSON forbids
    content = {
        "p.txt": prompt,
        "p.jsonl": f'{{"prompt": {record}}}',
        "p.csv": f"prompt\n{prompt}\n",
        "p.json": f"[{record}]",
    }
    (tmp_path / name).write_text(content[name], encoding="utf-8")
    assert read_prompts(tmp_path / name) == [prompt]


def test_columns_are_named_behind_the_file(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,a caption\none,"two, and\nthree"\n')
    assert read_prompts(f"{tmp_path}/p.csv:a caption") == ["two, and\nthree"]
    assert read_prompts(f"{tmp_path}/p.csv:") == ["one"]
    with pytest.raises(InputError, match="no column 'text'"):
        read_prompts(f"{tmp_path}/p.csv:text")
    (tmp_path / "a:b.txt").write_text("one")  # a colon in a name is no column
    assert read_prompts(tmp_path / "a:b.txt") == ["one"]


def test_quotes_of_a_tsv_may_be_characters(tmp_path):
    """As in PartiPrompts (google-research/parti at 5a65797), where one prompt begins with a quoted word."""
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        '"G I G G L E" painted on a wall.\tIllustrations\tWriting & Symbols\t',
        'a long word\tAbstract\tLinguistic Structures\tIt is: "a disease."',
        'a sign that says "Very Deep Learning"\tWorld Knowledge\tWriting & Symbols\t',
    ]
    (tmp_path / "PartiPrompts.tsv").write_bytes("".join(f"{row}\n" for row in rows).encode())
    assert read_prompts(f"{tmp_path}/PartiPrompts.tsv:Prompt") == [row.split("\t")[0] for row in rows[1:]]


def test_parquet(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {"prompt": ["a  b", None, " c ", "a  b"], "caption": pa.array(["x", "y", "z", "w"]).dictionary_encode(),
         "number": [1, 2, 3, 4]}
    )  # fmt: skip
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == ["a  b", "c"]
    assert read_prompts(f"{tmp_path}/p.parquet:caption") == ["x", "y", "z", "w"]
    with pytest.raises(InputError, match="row 1 is a int, not a string"):
        read_prompts(f"{tmp_path}/p.parquet:number")
    with pytest.raises(InputError, match="no column 'text'; it has prompt, caption, number"):
        read_prompts(f"{tmp_path}/p.parquet:text")
    whole = (tmp_path / "p.parquet").read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(InputError, match="cannot be read") as caught:
            read_prompts(tmp_path / "cut.parquet")
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_prompts(tmp_path / "p.parquet")


def test_records_are_what_the_source_says_of_a_prompt(tmp_path):
    lines = [{"prompt": " a ", "tag": 1}, {"prompt": "b", "tag": 2}, {"prompt": "a", "tag": 3}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_records(tmp_path / "p.jsonl") == {"a": lines[0], "b": lines[1]}
    (tmp_path / "p.csv").write_text("prompt,tag\na,1\n")
    assert read_records(tmp_path / "p.csv") == {"a": {"prompt": "a", "tag": "1"}}
    (tmp_path / "p.txt").write_text("a\n")
    assert read_records(tmp_path / "p.txt") == {"a": {}}


class Table(dict):
    @property
    def column_names(self):
        return list(self)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, as 5.2.0 does it: offline it knows what it has prepared, and folders.

    Read there: `load.py` 1075 to 1124 and 1165 to 1180 (a name on the hub: the switch `config.HF_HUB_OFFLINE` is asked
    first, and without the network what is prepared is taken), `utils/file_utils.py` 279 to 284.
    """
    module = ModuleType("datasets")
    module.config, module.asked = SimpleNamespace(HF_HUB_OFFLINE=False), []

    def load_dataset(name, split):
        module.asked.append((name, split, module.config.HF_HUB_OFFLINE))
        if module.config.HF_HUB_OFFLINE and not name.endswith(("prepared", "snapshot")):
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")
        if name == "missing/one":
            raise RuntimeError("no such data set\nand a second line")
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        return Table(prompt=["a", "b", None, "a"], caption=["c"], label=[3])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_data_sets(hub, monkeypatch):
    def read(source):
        return read_prompts(source, local_files_only=False)

    assert read("hf:org/name") == ["a", "b"]
    assert read("hf:org/name:test:caption") == ["c"]
    assert hub.asked == [("org/name", "train", False), ("org/name", "test", False)]
    with pytest.raises(InputError, match="no column 'text'; it has prompt, caption, label"):
        read("hf:org/name:train:text")
    with pytest.raises(InputError, match="row 1 is a int"):
        read("hf:org/name:train:label")
    with pytest.raises(InputError, match=r"could not be loaded \(no such data set and a second line\)"):
        read("hf:missing/one")
    with pytest.raises(InputError, match="no data set is named"):
        read("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read("hf:org/name")


def test_hub_data_sets_are_not_downloaded_unasked(hub, tmp_path, monkeypatch):
    """Prepared ones are taken, then what `hf download` has left; else the line is that of models and rewards."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_prompts("hf:org/prepared") == ["a", "b"]
    assert hub.asked == [("org/prepared", "train", True)]
    with pytest.raises(InputError) as caught:
        read_prompts("hf:org/name")
    assert str(caught.value) == (
        "prompts 'hf:org/name': 'org/name' is not a local folder and not in the local cache, and nothing is downloaded "
        "unasked: run hf download --repo-type dataset org/name where there is a network, allow it with --set "
        "backend.local_files_only=false, or give a file of prompts"
    )
    repository = tmp_path / "datasets--org--name"
    (repository / "snapshots" / "snapshot").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("snapshot")
    assert read_prompts("hf:org/name:test") == ["a", "b"]
    assert hub.asked[-1] == (str(repository / "snapshots" / "snapshot"), "test", True)
    with pytest.raises(InputError, match=r"could not be loaded \(Unknown split"):
        read_prompts("hf:org/name:dev")
    assert all(offline for _, _, offline in hub.asked)
    assert not hub.config.HF_HUB_OFFLINE


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


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv:prompt"])
def test_a_nul_in_a_prompt_is_refused(name, tmp_path):
    text = {"p.txt": "a cat\na d\0g\n", "p.jsonl": '{"prompt": "a d\\u0000g"}\n', "p.csv:prompt": "prompt\na d\0g\n"}[
        name
    ]
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(InputError, match=r"holds a NUL|not valid CSV") as refused:
        read_prompts(f"{tmp_path}/{name}")
    assert "\0" not in str(refused.value)


def test_some_of_many_prompts_are_from_all_over_their_order():
    assert spread(79, 8) == [0, 9, 19, 29, 39, 49, 59, 69]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(5, 1) == [0]
    for count in range(1, 30):
        for chosen in range(1, 40):
            places = spread(count, chosen)
            assert len(set(places)) == min(count, chosen)
            assert places == sorted(places)
            assert places[-1] < count <= places[-1] + -(-count // len(places))
