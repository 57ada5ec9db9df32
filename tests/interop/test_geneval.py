"""GenEval (djghosh13/geneval at af4902f): its scorer reads the folders that `--layout geneval` writes.

What `evaluation/evaluate_images.py` does, in our words:
- it walks the image folder and enters the sub-folders whose names are digits only (263-266);
- in each it parses `metadata.jsonl` as one JSON document, in the encoding of the locale (267-268);
- it scores the files of `samples/` whose names begin with digits and `.png` (270-273);
- it takes `tag` and `prompt` by subscription (230, 249-250), so that a document without them ends it;
- every entry of `include` and `exclude` has `class` and `count`, may have `color`, and may have `position`: a relation
  and the number of an earlier entry of `include` (173-194, 215-218).
`generation/diffusers_generate.py` writes the same folders: five digits, `json.dump` of the line of
`prompts/evaluation_metadata.jsonl` as it is (115-128), five digits and `.png` (146).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hnkit import InputError
from hnkit.generate import GenerateSettings, generate_pairs
from hnkit.output.layouts import check_layout
from hnkit.prompts import read_records
from tests.hnkit.fake_backend import FakeBackend, Options

# the fields, kinds of clauses and the order of keys are those of evaluation_metadata.jsonl; the prompts are ours
METADATA = [
    '{"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"}',
    '{"tag": "counting", "include": [{"class": "fork", "count": 3}], "exclude": [{"class": "fork", "count": 4}], '
    '"prompt": "a photo of three forks"}',
    '{"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "cake", "count": 1, "position": '
    '["left of", 0]}], "prompt": "a photo of a cake left of a cup"}',
    '{"tag": "color_attr", "include": [{"class": "bus", "count": 1, "color": "green"}], "prompt": "a photo of a '
    'green  bus, caf\\u00e9"}',
]


def scored(folder: Path) -> list[dict[str, Any]]:
    """What the scorer would report of a folder, with a detector that finds exactly what each prompt asks for."""
    results = []
    for sub in folder.iterdir():
        if not (sub.is_dir() and sub.name.isdigit()):
            continue
        metadata = json.loads((sub / "metadata.jsonl").read_text(encoding="ascii"))
        for image in (sub / "samples").iterdir():
            if not (image.is_file() and re.match(r"\d+\.png", image.name)):
                continue
            found = {clause["class"]: clause["count"] for clause in metadata["include"]}
            placed: list[str] = []
            correct = True
            for clause in metadata["include"]:
                correct &= found[clause["class"]] >= clause["count"]
                if "position" in clause:
                    relation, target = clause["position"]
                    correct &= relation in ("left of", "right of", "above", "below") and bool(placed[target])
                placed.append(clause["class"])
            correct &= all(found.get(clause["class"], 0) < clause["count"] for clause in metadata.get("exclude", []))
            with Image.open(image) as picture:
                results.append({"tag": metadata["tag"], "prompt": metadata["prompt"], "mode": picture.mode,
                                "size": picture.size, "correct": correct, "path": image})  # fmt: skip
    return results


@pytest.fixture
def metadata(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(METADATA) + "\n")
    return file


def test_the_scorer_reads_what_is_written(metadata, tmp_path):
    records = read_records(metadata)
    folder = tmp_path / "run"
    folder.mkdir()
    generate_pairs(FakeBackend(Options()), list(records), GenerateSettings(layout="geneval"), folder, records=records)
    for kind in ("base", "steered"):
        results = scored(folder / f"geneval-{kind}")
        assert len(results) == 4 * len(METADATA)
        assert all(result["correct"] for result in results)
        assert {result["mode"] for result in results} == {"RGB"}
        assert {result["size"] for result in results} == {(4, 4)}
        assert sorted({result["tag"] for result in results}) == ["color_attr", "counting", "position", "single_object"]
        for number, line in enumerate(METADATA):
            # byte for byte what the benchmark's own generation script leaves
            assert (folder / f"geneval-{kind}" / f"{number:05d}" / "metadata.jsonl").read_bytes() == line.encode()
            image = folder / f"prompt-{number:03d}" / f"{kind}-02.png"
            copy = folder / f"geneval-{kind}" / f"{number:05d}" / "samples" / "00002.png"
            assert copy.read_bytes() == image.read_bytes()


def broken(**changes: Any) -> dict[str, Any]:
    record = json.loads(METADATA[2]) | changes
    return {key: value for key, value in record.items() if value is not None}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "no record with tag and include"),
        (broken(tag=None), "no record with tag"),
        (broken(include=None), "no record with include"),
        (broken(tag=3), "'tag' is not a string"),
        (broken(include="cup"), "'include' not a list"),
        (broken(include=["cup"]), "has no 'class' and 'count'"),
        (broken(include=[{"class": "cup"}]), "has no 'class' and 'count'"),
        (broken(exclude=[{"count": 1}]), "has no 'class' and 'count'"),
        (broken(include=[{"class": "cup", "count": 1, "position": ["above", 0]}]), "earlier object"),
        (broken(include=[{"class": "cup", "count": 1, "position": "above"}]), "earlier object"),
    ],
)
def test_what_would_end_the_scorer_is_refused(record, message):
    with pytest.raises(InputError, match=message) as caught:
        check_layout("geneval", ["a"], 4, {"a": record})
    assert "evaluation_metadata.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_without_metadata_are_refused_at_the_start(refused):
    assert "tag" in refused("geneval")
