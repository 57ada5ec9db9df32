"""Backends: the protocol, the documented base, and what a backend that offers no more than the protocol gets."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from torch import nn

from hnkit import InputError
from hnkit.backend import Backend, BackendBase, backend_factory, completed, installed_names, load_installed
from hnkit.checks.verify_toys import chosen_problems
from hnkit.cli.backends import Options, run
from hnkit.cli.compare import comparison_runner
from hnkit.maps import Condition
from hnkit.rewards import CallableReward, RewardSum, score
from hnkit.toy.backend import ToyBackend, ToyOptions


class Bare:
    """The seven members of the protocol and one offer."""

    def __init__(self) -> None:
        self.name, self.noise_shape = "bare", (3,)
        self.hypernetwork = nn.Identity()

    def encode(self, prompts):
        return Condition(tuple(prompts))

    def generate(self, noise, condition, steps=1):
        return noise

    def save_adapter(self, folder): ...

    def load_adapter(self, folder): ...

    def category(self, prompt):
        return prompt[0]


def test_a_bare_backend_is_completed_and_stays_itself():
    bare = Bare()
    assert isinstance(bare, Backend)
    full = completed(bare)
    assert isinstance(full, BackendBase)
    assert completed(full) is full
    assert (full.name, full.noise_dtype, full.max_steps, full.problem) == ("bare", torch.float32, None, None)
    assert full.prompts is full.judge is full.direct is full.propose is full.default_reward is None
    assert full.category is not None
    assert full.category("cat") == "c"
    assert full.memory_advice() == ""
    bare.hypernetwork = nn.Linear(3, 3)
    full.noise_shape = (4,)
    assert full.hypernetwork is bare.hypernetwork
    assert bare.noise_shape == (4,)


def test_the_map_of_a_bare_backend_is_its_network_under_each_row_s_prompt():
    class Scale(nn.Module):
        def forward(self, noise, condition):
            return noise * torch.tensor([float(len(prompt)) for prompt in condition.prompts])[:, None]

    bare = Bare()
    bare.hypernetwork = Scale()
    f = completed(bare).map_for(["a", "bcd"])
    assert torch.equal(f(torch.ones(2, 3)), torch.tensor([[1.0] * 3, [3.0] * 3]))


def test_backends_of_the_house_derive_from_the_base():
    backend = ToyBackend(ToyOptions())
    assert completed(backend) is backend
    assert backend.map_for([]) is backend.hypernetwork.body


# --- rewards ---------------------------------------------------------------------------------------------------


def mean(images, prompts):
    return images.mean((1, 2, 3))


def test_a_sum_returns_its_parts_and_keeps_nothing():
    rewards = RewardSum([CallableReward("a", 2.0, mean), CallableReward("b", -1.0, lambda x, p: x.amax((1, 2, 3)))])
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = rewards.scores(images, ["x"] * 3)
    assert torch.equal(scores.parts["a"], images.mean((1, 2, 3)))
    assert not scores.parts["a"].requires_grad
    assert torch.allclose(scores.total, 2 * images.mean((1, 2, 3)) - images.amax((1, 2, 3)))
    assert torch.equal(rewards(images, ["x"] * 3), scores.total)
    assert vars(rewards) == {"rewards": rewards.rewards}


def test_a_reward_that_edits_images_in_place_changes_them_for_itself_alone():
    def normalised(images, prompts):
        return images.mul_(2).sub_(1).mean((1, 2, 3))

    rewards = RewardSum([CallableReward("in place", 1.0, normalised), CallableReward("plain", 1.0, mean)])
    images = torch.full((2, 3, 4, 4), 0.75).requires_grad_()
    outputs = images * 1.0
    scores = rewards.scores(outputs, ["x"] * 2)
    assert scores.parts["in place"].tolist() == [0.5, 0.5]
    assert scores.parts["plain"].tolist() == [0.75, 0.75]
    assert torch.equal(outputs, images)
    scores.total.sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 3 / 48))


@pytest.mark.parametrize("error", [ValueError("no such\n model"), SystemExit(3), KeyError("x")])
def test_a_reward_that_raises_is_named(error):
    def broken(images, prompts):
        raise error

    with pytest.raises(InputError, match=f"reward 'broken' raised {type(error).__name__}: ") as caught:
        score(CallableReward("broken", 1.0, broken), torch.zeros(2, 3, 4, 4), ["x"] * 2)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_lack_of_memory_and_input_errors_are_passed_on():
    for error in (torch.OutOfMemoryError("no room"), InputError("one line")):

        def broken(images, prompts, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            score(CallableReward("broken", 1.0, broken), torch.zeros(2, 3, 4, 4), ["x"] * 2)
        assert caught.value is error


# --- entry points of other distributions ------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution of one module with entry points, as its metadata folder says."""

    def add(name: str, module: str, source: str, **groups: dict[str, str]) -> None:
        place = tmp_path / name
        folder = place / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            line
            for group, points in groups.items()
            for line in (f"[hnkit.{group}]", *(f"{point} = {value}" for point, value in points.items()))
        ]
        (folder / "entry_points.txt").write_text("\n".join(lines))
        (place / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


FACTORY = """
class F:
    name, summary, presets = "theirs", "a generator of theirs", {"small": {}}
    def status(self): return "ready"
class Unfinished:
    name = "unfinished"
class Failing(F):
    def status(self): raise RuntimeError("the card fell off the bus")
THEIRS, FAILING = F(), Failing()
"""


def test_one_broken_distribution_hides_no_other_backend(install, capsys):
    install(
        "theirs",
        "theirmodule",
        FACTORY,
        backends={
            "theirs": "theirmodule:THEIRS",
            "unfinished": "theirmodule:Unfinished",
            "failing": "theirmodule:FAILING",
        },
    )
    install("worse", "worsemodule", "raise ValueError('half an edit')\n", backends={"worse": "worsemodule:F"})
    install("needy", "needymodule", "import package_of_theirs\n", backends={"needy": "needymodule:F"})
    run(Options(as_json=True))
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["backends"]}
    assert {"toy", "digits", "theirs", "unfinished", "failing", "worse", "needy"} <= set(found)
    assert "needy should bring it" in found["needy"]["status"]
    assert "the card fell off the bus" in found["failing"]["status"]
    assert found["theirs"] | {"status": "ready"} == found["theirs"]
    assert "pip install 'hnkit[scaled]'" not in found["needy"]["status"]
    assert "package_of_theirs" in found["needy"]["status"]
    assert "of worse is broken (ValueError: half an edit)" in found["worse"]["status"]
    assert "broken" in found["unfinished"]["status"]
    assert found["toy"]["presets"]
    run(Options())
    assert "toy" in capsys.readouterr().out


def test_a_name_that_two_distributions_claim_is_refused_and_names_both(install):
    install("theirs", "theirmodule", FACTORY, backends={"toy": "theirmodule:F"}, rewards={"pretty": "theirmodule:F"})
    with pytest.raises(InputError, match=r"'toy' is claimed by .*theirs \(theirmodule:F\).*uninstall all but one"):
        load_installed("hnkit.backends", "toy")
    assert "toy" in installed_names("hnkit.backends")
    assert load_installed("hnkit.backends", "digits").name == "digits"


def test_a_distribution_that_is_seen_twice_is_one(install, tmp_path, monkeypatch):
    install("theirs", "theirmodule", FACTORY, rewards={"pretty": "theirmodule:F"})
    shutil.copytree(tmp_path / "theirs", tmp_path / "again")
    monkeypatch.syspath_prepend(str(tmp_path / "again"))
    assert load_installed("hnkit.rewards", "pretty").name == "theirs"


def test_a_broken_comparison_of_others_does_not_stop_ours(install):
    source = "class C:\n    def accepts(self, factory): raise TypeError('an old protocol')\nC = C()\n"
    install("aaa", "aaamodule", source, comparisons={"aaa": "aaamodule:C", "aab": "aaamodule:missing"})
    assert type(comparison_runner(backend_factory("digits"))).__name__ == "Comparison"
    with pytest.raises(InputError, match=r"no comparison is installed for backend toy.*is left out: "):
        comparison_runner(backend_factory("toy"))


def test_a_broken_distribution_of_toys_does_not_stop_the_others(install):
    install("theirs", "theirmodule", "raise ValueError('half an edit')\n", problems={"theirs": "theirmodule:P"})
    assert [problem.name for problem in chosen_problems(["linear-gaussian", "rotation"])] == ["linear-gaussian"]
    for names in ([], ["linear-gaussian", "one-of-theirs"]):  # it may be theirs that is asked for
        with pytest.raises(InputError, match=r"of theirs is broken \(ValueError: half an edit"):
            chosen_problems(names)


@pytest.mark.parametrize("name", ["linear-gaussian", "rotation"])
def test_a_toy_that_two_distributions_name_is_refused(name, install):
    install("theirs", "theirmodule", f"P = {{{name!r}: None}}\n", problems={"zzz": "theirmodule:P"})
    with pytest.raises(InputError, match=f"two toys are named '{name}'"):
        chosen_problems(["folding"])
