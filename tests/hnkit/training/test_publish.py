"""What a run shares names no place of the machine, can be used, and reaches the Hub as its own client takes it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from safetensors.torch import load_file

from hnkit import InputError
from hnkit.adapters import load_trained
from hnkit.training import publish as publishing
from hnkit.training.publish import publish
from tests.hnkit.cli.test_app import run as command
from tests.hnkit.training.training_runs import run, small


@pytest.fixture
def trained(tmp_path):
    run(small("steps=4"), tmp_path / "run")
    return tmp_path / "run"


class Hub(HfApi):
    """The Hub's client without its network: calls have to fit the signatures of the real one."""

    uploads: list[dict[str, object]] = []  # noqa: RUF012 - one list for the test

    def create_repo(self, *arguments, **named):
        inspect.signature(HfApi.create_repo).bind(self, *arguments, **named)
        return RepoUrl(f"https://huggingface.co/{arguments[0]}")

    def upload_folder(self, **named):
        inspect.signature(HfApi.upload_folder).bind(self, **named)
        self.uploads.append(named)


def test_what_is_shared_stands_by_itself(trained, tmp_path):
    (trained / "samples").mkdir(exist_ok=True)
    for name in ("step-00000002.png", "step-00000004.png"):
        (trained / "samples" / name).write_bytes((trained / "training.png").read_bytes())
    document = publish(trained, out=tmp_path / "shared", license_name="mit")
    shared = Path(document["folder"])
    assert document["url"] is None
    assert {"README.md", "training.png", "step-00000004.png"} < set(document["files"])
    assert "step-00000002.png" not in document["files"]
    assert set(document["files"]).isdisjoint({"config.toml", "metrics.jsonl", "report.json"})
    card = ModelCard.load(shared / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "hnkit"
    assert "arxiv:2508.09968" in card.data.tags
    assert "- Prompts: the backend's own\n" in card.text
    assert "eyring2025noise" in card.text
    for picture in ("training.png", "step-00000004.png"):
        assert f"]({picture})" in card.text
    (weights,) = shared.glob("*.safetensors")
    (original,) = (trained / "adapter").glob("*.safetensors")
    assert all(torch.equal(value, load_file(original)[name]) for name, value in load_file(weights).items())


def test_a_shared_adapter_is_taken_as_its_run_is(trained, tmp_path):
    shared = publish(trained, out=tmp_path / "shared")["folder"]
    backend, _ = load_trained("toy", trained)
    x = torch.randn(3, *backend.noise_shape, generator=torch.Generator().manual_seed(0))
    again, _ = load_trained("toy", shared, [f"backend.{key}={value}" for key, value in _toy(trained).items()])
    condition = backend.encode([""] * 3)
    assert torch.equal(backend.hypernetwork(x, condition), again.hypernetwork(x, condition))


def _toy(folder):
    import tomllib

    return {k: v for k, v in tomllib.loads((folder / "config.toml").read_text())["backend"].items() if k != "name"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("from_pretrained('/home/me/models/sana')", "from_pretrained('sana')"),
        ("at ~/runs/red, and", "at red, and"),
        (r"C:\models\sana", "sana"),
        ("https://arxiv.org/abs/2508.09968", "https://arxiv.org/abs/2508.09968"),
        ("org/model and a/b", "org/model and a/b"),
        ("tr(J^2)/2 and 1 / 2", "tr(J^2)/2 and 1 / 2"),
        ("./relative/path", "./relative/path"),
    ],
)
def test_places_of_the_machine_do_not_travel(text, shown):
    assert publishing._without_places(text) == shown


def test_places_in_a_configuration_do_not_travel(trained, tmp_path):
    config = next((trained / "adapter").glob("*.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "base": ["/secret/place/base"]}))
    card = trained / "adapter" / "README.md"
    card.write_text(card.read_text() + "\n- Started from: the adapter /secret/place/red\n")
    shared = Path(publish(trained, out=tmp_path / "shared")["folder"])
    for path in shared.iterdir():
        assert b"/secret" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_the_hub_gets_the_folder(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", Hub)
    code, out, _ = command(capsys, "push", trained, "--to", "me/red", "--out", tmp_path / "shared", "--json")
    assert code == 0
    assert json.loads(out)["url"] == "https://huggingface.co/me/red"
    (upload,) = Hub.uploads
    assert upload["repo_id"] == "me/red"
    assert Path(str(upload["folder_path"])) == tmp_path / "shared"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (huggingface_hub.errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_the_folder_is_kept(error, words, trained, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(publishing.HfApi, "create_repo", fail)
    code, _, err = command(capsys, "push", trained, "--to", "me/red", "--out", tmp_path / "shared")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert str(tmp_path / "shared") in err
    assert (tmp_path / "shared" / "README.md").is_file()


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no adapter"):
        publish(tmp_path / "empty", out=tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    "name", ["red", "me/red", "me/red.v2_x", "a b", "me/x/y", "-x", "x.", "me/../x", "a--b", "é/x", "x" * 97, ""]
)
def test_names_are_judged_as_the_hub_judges_them(name):
    """The oracle is the Hub's own client."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError:
        with pytest.raises(InputError, match="no name of a repository"):
            publishing._require_name(name)
    else:
        publishing._require_name(name)
