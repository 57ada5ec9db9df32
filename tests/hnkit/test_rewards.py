"""Rewards of the user's own: how they are found, what is refused before a run begins, and what a failure says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hnkit.config import RewardSpec
from hnkit.errors import InputError
from hnkit.rewards import RewardSum, import_object, load_reward, load_rewards

SCORES = """
import torch
def mean(images, prompts): return images.mean((1, 2, 3))
def one(images): return images.mean((1, 2, 3))
def three(images, prompts, extra): return images.mean((1, 2, 3))
def any_(*arguments): return arguments[0].mean((1, 2, 3))
def raises(images, prompts): raise KeyError("no such colour")
def leaves(images, prompts): raise SystemExit(0)
class Scorer:
    def __init__(self, sign=1.0): self.sign = sign
    def __call__(self, images, prompts): return self.sign * images.mean((1, 2, 3))
class Needs(Scorer):
    def __init__(self, path): super().__init__()
class Wrong:
    def __call__(self, images): return images
scorer = Scorer()
def make(): return Scorer(-1.0)
number = 3
"""
DEEP = """
import helper_of_mine
def raises(images, prompts):
    return helper_of_mine.divided(images)
def library(images, prompts):
    return images.reshape(7, 7)
class Fails:
    def __init__(self):
        self.x = 1 / 0
"""
CPU = torch.device("cpu")
IMAGES, PROMPTS = torch.rand(4, 3, 2, 2), ["a"] * 4


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of rewards, and nothing of it on the path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "myscores.py").write_text(SCORES)
    yield tmp_path
    for name in ("myscores", "deep", "broken", "textwrap2", "helper_of_mine"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "sign"), [("mean", 1), ("any_", 1), ("scorer", 1), ("Scorer", 1), ("make", -1)])
def test_functions_instances_classes_and_factories_are_rewards(name, sign, here):
    rewards = load_rewards({f"myscores:{name}": RewardSpec(2.0)}, None, CPU)
    assert torch.equal(rewards(IMAGES, PROMPTS), 2 * sign * IMAGES.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one", r"takes \(images\): a reward is a function of \(images, prompts\)"),
        ("three", r"takes \(images, prompts, extra\): a reward is"),
        ("Wrong", r"takes \(images\): a reward is"),
        ("Needs", "calling it failed .*path"),
        ("number", "is a int: give a function"),
        ("absent", r"myscores.py\) has no absent"),
    ],
)
def test_what_is_no_reward_is_refused_by_name_before_it_is_used(name, words, here):
    with pytest.raises(InputError, match=rf"--reward myscores:{name} .*{words}|--reward myscores:{name}: .*{words}"):
        load_reward(f"myscores:{name}", RewardSpec(1.0), CPU)


@pytest.mark.parametrize(("name", "words"), [("raises", "raised KeyError: 'no such colour'"), ("leaves", "SystemExit")])
def test_a_reward_that_raises_is_named(name, words, here):
    rewards = load_rewards({f"myscores:{name}": RewardSpec(1.0)}, None, CPU)
    with pytest.raises(InputError, match=f"reward 'myscores:{name}' .*{words}"):
        rewards(IMAGES, PROMPTS)


def test_the_working_directory_is_searched_last_and_not_for_good(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != here])
    (here / "textwrap.py").write_text("raise RuntimeError('not the one that was meant')\n")
    monkeypatch.delitem(sys.modules, "textwrap", raising=False)
    before = list(sys.path)
    assert import_object("textwrap:dedent", "--map")(" a") == "a"  # the installed one, not the file of this folder
    assert import_object("myscores:number", "--map") == 3
    assert sys.path == before
    (here / "broken_scores.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="nothing_of_that_name"):
        import_object("broken_scores:f", "--map")
    assert sys.path == before


def test_a_module_that_calls_exit_is_an_error(here):
    (here / "textwrap2.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(InputError, match=r"importing textwrap2 failed \(SystemExit"):
        import_object("textwrap2:f", "--reward")


@pytest.mark.parametrize(("name", "line"), [("raises", 4), ("library", 6)])
def test_a_reward_that_raises_is_told_its_line(name, line, here):
    """The innermost of the user's own module, not of the libraries that it calls, nor of what runs it."""
    (here / "deep.py").write_text(DEEP)
    (here / "helper_of_mine.py").write_text("def divided(images):\n    return 1 / 0\n")
    reward = load_rewards({f"deep:{name}": RewardSpec(1.0)}, None, CPU)
    with pytest.raises(InputError, match=rf"reward 'deep:{name}' raised .*, at deep\.py:{line}$"):
        reward(IMAGES, PROMPTS)


def test_a_class_and_a_module_that_fail_are_told_their_lines(here):
    (here / "deep.py").write_text(DEEP)
    (here / "helper_of_mine.py").touch()
    with pytest.raises(InputError, match=r"calling it failed \(ZeroDivisionError: division by zero, at deep\.py:9\)"):
        load_reward("deep:Fails", RewardSpec(1.0), CPU)
    (here / "broken.py").write_text("import torch\n\nnumber = int('a')\n")
    with pytest.raises(InputError, match=r"importing broken failed \(ValueError: .*, at broken\.py:3\)"):
        import_object("broken:score", "--reward")


def test_a_reward_object_of_another_package_is_told_its_line_too():
    class Reward:
        name, weight = "mine", 1.0

        def __call__(self, images, prompts):
            raise OSError("the service is gone")

    with pytest.raises(InputError, match=r"the service is gone, at .*test_rewards\.py:\d+$"):
        RewardSum([Reward()])(IMAGES, PROMPTS)


def test_a_file_in_place_of_a_module_is_told_how_to_write_it(here):
    with pytest.raises(InputError, match=r"No module named 'myscores\.py'.*: write the module, myscores:mean$"):
        import_object("myscores.py:mean", "--reward")
