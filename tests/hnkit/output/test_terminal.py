"""Signs of life: a terminal sees that a model loads and how far the images are; a file sees lines, or nothing."""

from __future__ import annotations

import io

import pytest

from hnkit.output import terminal


@pytest.fixture
def screen(monkeypatch):
    """What a terminal is sent."""
    sent = io.StringIO()

    def console(*, stderr=False):
        assert stderr, "progress is not on stdout"
        return terminal.PlainConsole(file=sent, force_terminal=True, width=80)

    monkeypatch.setattr(terminal, "console", console)
    return sent


def test_a_terminal_sees_that_something_loads(screen):
    with terminal.waiting("loading sana"):
        pass
    assert "loading sana" in screen.getvalue()


def test_beside_a_bar_nothing_else_is_shown_and_nothing_fails(screen):
    with terminal.steps(2) as shown:
        shown.start("table 1")
        with terminal.waiting("loading sana"):
            pass
    assert "table 1" in screen.getvalue()


def test_what_fails_inside_is_not_hidden(screen):
    with pytest.raises(ValueError, match="no weights"), terminal.waiting("loading sana"):
        raise ValueError("no weights")


def test_a_file_sees_lines_for_steps_and_nothing_for_waiting(capsys):
    with terminal.waiting("loading sana"), terminal.steps(1) as shown:
        shown.start("a red three")
    assert capsys.readouterr().err == "[1/1] a red three\n"
    with terminal.steps(1, lines=False) as shown:
        shown.start("a red three")
    assert capsys.readouterr().err == ""


def test_a_bar_counts_images_on_a_terminal(screen):
    with terminal.steps(2, lines=False) as shown:
        shown.start("a red three")
    assert "a red three" in screen.getvalue()
