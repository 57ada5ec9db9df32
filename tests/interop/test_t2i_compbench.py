"""T2I-CompBench (Karine-Huang/T2I-CompBench at 1b70949): its scorers read the folder of `--layout t2i-compbench`.

What they do, in our words:
- every scorer lists `samples/` and sorts by the integer between the last `_` and the next dot
  (`BLIPvqa_eval/BLIP_vqa.py` 20-21, `CLIPScore_eval/CLIP_similarity.py` 47-48); nothing else may lie there;
- the prompt of an image is its file name up to the first `_` (`BLIP_vqa.py` 31, `CLIP_similarity.py` 59,
  `UniDet_eval/2D_spatial_eval.py` 167, `numeracy_eval.py` 134), after the last `/` of its path;
- `numeracy_eval.py` 188 takes the number from what lies between the first and the next `_` before `.png`;
- `3_in_1_eval/3_in_1.py` 55-69 takes scores in blocks of ten: image k belongs to prompt k // 10 of the prompt file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hnkit import InputError
from hnkit.generate import GenerateSettings, generate_pairs
from hnkit.output.layouts import check_layout
from hnkit.prompts import read_prompts
from tests.hnkit.fake_backend import FakeBackend, Options

PROMPTS = ["The round kite was above the square fork.", "a red cup and a green cake", "three cats, two dogs"]


def read(folder: Path) -> list[tuple[int, str, Path]]:
    """Number and prompt of every image, in the order in which the scorers take them."""
    names = [entry.name for entry in (folder / "samples").iterdir()]
    names.sort(key=lambda name: int(name.rsplit("_", 1)[-1].partition(".")[0]))
    return [
        (int(name.partition(".png")[0].split("_")[1]), name.split("_")[0], folder / "samples" / name) for name in names
    ]


def test_the_scorers_read_what_is_written(tmp_path):
    (tmp_path / "complex_val.txt").write_bytes("\r\n".join(PROMPTS).encode())  # as published: CR LF, no last one
    prompts = read_prompts(tmp_path / "complex_val.txt")
    folder = tmp_path / "run"
    folder.mkdir()
    settings = GenerateSettings(count=10, layout="t2i-compbench")
    generate_pairs(FakeBackend(Options()), prompts, settings, folder)
    for kind in ("base", "steered"):
        images = read(folder / f"t2i-compbench-{kind}")
        assert [number for number, _, _ in images] == list(range(10 * len(PROMPTS)))
        for number, prompt, path in images:
            assert prompt == PROMPTS[number // 10]
            written = folder / f"prompt-{number // 10:03d}" / f"{kind}-{number % 10:02d}.png"
            assert path.read_bytes() == written.read_bytes()
            with Image.open(path) as picture:
                assert picture.mode == "RGB"


@pytest.mark.parametrize("prompt", ["a/b", "a_b", "a\tb", "photo.png of", "a\\b", "x" * 201])
def test_prompts_that_no_file_name_holds_are_refused(prompt):
    with pytest.raises(InputError, match="names files by their prompt"):
        check_layout("t2i-compbench", [prompt], 10)


def test_ten_images_are_needed_and_said_at_the_start(refused):
    assert "--count 10" in refused("t2i-compbench")
