"""DPG-Bench (TencentQQGYLab/ELLA at 3c228f1): prompts are a folder of files, images one grid each with the same name.

What it is, in our words: `dpg_bench/prompts/` holds 1,065 `.txt` files of one prompt each, without a line end
(`0.txt`, `COCOval2014000000010363.txt`, ...). `dpg_bench/compute_dpg_bench.py`
- takes every entry of the image folder as an image (190-200), so that nothing else may lie there;
- looks the questions up by the file name up to its first dot (119-120); an unknown name is printed and left out (213);
- crops four squares of side `--resolution` in reading order from the file (111-118), `--pic-num 4` being what
  `dist_eval.sh` passes: the grid is 2 x 2 and `--resolution` the side of one image;
- keeps its tables by the column `item_id` of a `.csv` whose column `text` holds the prompt (70, 76).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hnkit import InputError
from hnkit.generate import GenerateSettings, generate_pairs
from hnkit.output.layouts import check_layout
from hnkit.prompts import read_prompts, read_records
from tests.hnkit.fake_backend import FakeBackend, Options

PROMPTS = {
    "0": "A long kite rests on a field,  its tail in the grass.",
    "10": "Three forks beside a \u201cblue\u201d cup; none of them is clean.",
    "COCOval2014000000010363": "Un café in the rain.",
    "posescript_12": "A person bends to the left.",
}


@pytest.fixture
def folder_of_prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item, prompt in PROMPTS.items():
        (folder / f"{item}.txt").write_text(prompt, encoding="utf-8")
    (folder / "README.md").write_text("no prompt")
    return folder


def crops(image_folder: Path, resolution: int) -> dict[str, list[np.ndarray]]:
    """The four crops of every item, as the scorer takes them."""
    found = {}
    for path in image_folder.iterdir():
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert picture.size == (2 * resolution, 2 * resolution)
            corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
            found[path.name.split(".")[0]] = [
                np.asarray(picture.crop((x, y, x + resolution, y + resolution))) for x, y in corners
            ]
    return found


def test_a_folder_of_prompts_becomes_the_grids_that_the_scorer_reads(folder_of_prompts, tmp_path):
    records = read_records(folder_of_prompts)
    assert list(records) == [PROMPTS[item] for item in sorted(PROMPTS)]
    assert {record["item_id"]: prompt for prompt, record in records.items()} == PROMPTS
    folder = tmp_path / "run"
    folder.mkdir()
    generate_pairs(FakeBackend(Options()), list(records), GenerateSettings(layout="dpg-bench"), folder, records=records)
    for kind in ("base", "steered"):
        found = crops(folder / f"dpg-bench-{kind}", resolution=4)
        assert found.keys() == PROMPTS.keys()
        for number, prompt in enumerate(records):
            for row, crop in enumerate(found[records[prompt]["item_id"]]):
                with Image.open(folder / f"prompt-{number:03d}" / f"{kind}-{row:02d}.png") as picture:
                    assert np.array_equal(crop, np.asarray(picture))


def test_the_table_of_questions_names_the_items_too(tmp_path):
    table = tmp_path / "dpg_bench.csv"
    table.write_text(
        'item_id,text,proposition_id,dependency\n0,"One, two",1,0\n0,"One, two",2,"0,1"\n7,A kite.,1,0\n',
        encoding="utf-8-sig",
    )
    records = read_records(f"{table}:text")
    assert {prompt: record["item_id"] for prompt, record in records.items()} == {"One, two": "0", "A kite.": "7"}
    check_layout("dpg-bench", list(records), 4, records)


@pytest.mark.parametrize("item", ["", "a.b", "a/b", "../a", "a\0b", "x" * 201, " a"])
def test_item_ids_that_the_scorer_could_not_look_up_are_refused(item):
    with pytest.raises(InputError, match="item_id"):
        check_layout("dpg-bench", ["a"], 4, {"a": {"item_id": item}})


def test_prompts_without_items_are_refused_at_the_start(refused):
    assert "no item_id" in refused("dpg-bench")


def test_folders_that_are_no_prompt_sets(folder_of_prompts, tmp_path):
    (folder_of_prompts / "twice.txt").write_text(f" {PROMPTS['0']}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"twice\.txt: the same prompt as in 0\.txt"):
        read_prompts(folder_of_prompts)
    (folder_of_prompts / "twice.txt").write_text("one\n\ntwo\n")
    with pytest.raises(InputError, match=r"twice\.txt: 2 prompts"):
        read_prompts(folder_of_prompts)
    (folder_of_prompts / "twice.txt").write_text("\n")
    with pytest.raises(InputError, match=r"twice\.txt: 0 prompts"):
        read_prompts(folder_of_prompts)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_prompts(tmp_path / "empty")
