"""GenEval 2 (facebookresearch/GenEval2 at a6e82d2, arXiv 2512.16853): its scorer finds every image by its prompt.

What `evaluation.py` does, in our words: it reads the benchmark line by line as JSON (162) and a second JSON file, one
object from prompt to the path of its single image (163-165); a prompt of the benchmark that is not a key of that object
ends it (169-170); the path is opened as it stands (171, 63), from whatever folder the scorer runs in.
`geneval2_data.jsonl` has `prompt`, `atom_count`, `vqa_list` (question, answer) and `skills` in each of its 800 lines.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hnkit.generate import GenerateSettings, generate_pairs
from hnkit.prompts import read_records
from tests.hnkit.fake_backend import FakeBackend, Options

BENCHMARK = [
    {"prompt": "three glass kites", "atom_count": 3,
     "vqa_list": [["How many kites are in the image?", "three"], ["Are the kites glass?", "Yes"],
                  ["Are there any kites in the image?", "Yes"]], "skills": ["count", "attribute", "object"]},
    {"prompt": "a fork above two  cups ", "atom_count": 4,
     "vqa_list": [["Is the fork above the cups?", "Yes"]], "skills": ["position"]},
]  # fmt: skip


def paths_for(benchmark: Path, image_list: Path) -> list[Path]:
    """The image of every line of the benchmark, as the scorer looks it up."""
    images = json.loads(image_list.read_text())
    return [Path(images[json.loads(line)["prompt"]]) for line in benchmark.read_text().splitlines()]


@pytest.mark.parametrize("count", [1, 3])
def test_the_scorer_finds_every_image(tmp_path, monkeypatch, count):
    benchmark = tmp_path / "geneval2_data.jsonl"
    benchmark.write_text("".join(json.dumps(line) + "\n" for line in BENCHMARK))
    records = read_records(benchmark)
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # the run folder may be given relative to where hnkit runs
    settings = GenerateSettings(count=count, layout="geneval2")
    generate_pairs(FakeBackend(Options()), list(records), settings, Path("run"), records=records)
    monkeypatch.chdir("/")
    for kind in ("base", "steered"):
        lists = sorted((folder / f"geneval2-{kind}").glob("*.json"))
        assert len(lists) == count
        for row, file in enumerate(lists):
            found = paths_for(benchmark, file)
            for number, path in enumerate(found):
                assert path.read_bytes() == (folder / f"prompt-{number:03d}" / f"{kind}-{row:02d}.png").read_bytes()
                with Image.open(path) as picture:
                    assert picture.mode == "RGB"
