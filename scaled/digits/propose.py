"""Rewordings of a prompt within the grammar of the digits model, for the prompt-optimisation baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hnkit.scaled.digits.scenes import Prompt, all_prompts, validate_prompt


def rewordings(text: str) -> list[str]:
    """Every sentence of the grammar whose scenes all satisfy `text`, except `text` itself.

    That is: naming the objects in the other order, and naming colours or a relation that `text` leaves open.
    """
    wanted = validate_prompt(text)
    return [other for other, prompt in all_prompts().items() if other != text and _implies(prompt, wanted)]


def _implies(prompt: Prompt, wanted: Prompt) -> bool:
    if prompt.count != wanted.count or sorted(prompt.digits) != sorted(wanted.digits):
        return False
    order = 1 if prompt.digits == wanted.digits else -1
    colours = prompt.colours[::order]
    if any(asked is not None and asked != given for asked, given in zip(wanted.colours, colours, strict=True)):
        return False
    if wanted.relation is None:
        return True
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return prompt.relation == (wanted.relation if order == 1 else opposite[wanted.relation])


def propose(prompt: str, history: Sequence[tuple[str, float]], count: int, generator: torch.Generator) -> list[str]:
    """Up to `count` rewordings not tried yet, drawn with `generator`."""
    tried = {text for text, _ in history}
    fresh = [text for text in rewordings(prompt) if text not in tried]
    order = torch.randperm(len(fresh), generator=generator).tolist()
    return [fresh[i] for i in order[:count]]
