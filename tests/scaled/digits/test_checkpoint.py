"""The bundled folder: whole, intact, small, and every kind of damage named in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from hnkit import InputError
from hnkit.scaled.digits import checkpoint
from hnkit.scaled.digits.train.bundle import data_card


def test_bundled_folder_is_intact_and_small() -> None:
    folder = checkpoint.verified_folder()
    sums = checkpoint.read_checksums(folder)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert set(files) == {*sums, checkpoint.CHECKSUMS}
    assert sum(p.stat().st_size for p in files.values()) < 15_000_000
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) == 7
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    name = weights[0]
    assert sums[name] == hashlib.sha256(files[name].read_bytes()).hexdigest()


def test_data_card_is_current() -> None:
    folder = checkpoint.model_folder()
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert (folder / "DATA_CARD.md").read_text(encoding="utf-8") == data_card(figures)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights.safetensors").write_bytes(b"1234")
    (folder / "config.json").write_text("{}")
    checkpoint.write_checksums(folder)
    return folder


def test_whole_folder_passes(small: Path) -> None:
    assert checkpoint.verified_folder(small) == small


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "directory"])
def test_damage_is_named(small: Path, damage: str) -> None:
    path = small / "part" / "weights.safetensors"
    if damage == "flip":
        path.write_bytes(b"1235")
    elif damage == "truncate":
        path.write_bytes(b"123")
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    with pytest.raises(InputError, match=r"weights\.safetensors") as caught:
        checkpoint.verified_folder(small)
    assert "\n" not in str(caught.value)
    assert "reinstall" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"0" * 64 + b"  ../outside\n", b"0" * 64 + b"  /etc/x\n", b"\xff\xfe"]
)
def test_damaged_lists(small: Path, content: bytes) -> None:
    (small / checkpoint.CHECKSUMS).write_bytes(content)
    with pytest.raises(InputError, match="SHA256SUMS"):
        checkpoint.verified_folder(small)


def test_missing_folder_and_list(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        checkpoint.verified_folder(tmp_path / "nowhere")
    (small / checkpoint.CHECKSUMS).unlink()
    with pytest.raises(InputError, match="SHA256SUMS"):
        checkpoint.verified_folder(small)
    shutil.rmtree(small)
