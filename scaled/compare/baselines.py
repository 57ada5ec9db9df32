"""What noise hypernetworks are compared with: one protocol, and the cost of every image counted.

A method turns prompts and base noise into images. All methods get the same prompts and the same noise, so that
comparisons are paired; each says what it spent in evaluations of the generator, of the hypernetwork and of the reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hnkit.backend import Backend, Reward, image_noise, steer
from hnkit.errors import InputError, NonFiniteError
from hnkit.internal.seeds import derived_seed, generator_for
from hnkit.maps import Condition


@dataclass(frozen=True)
class Cost:
    """What a batch cost in all: evaluations (rows of a forward pass, `steps` for a multi-step image) and seconds.

    A backward pass is counted in `gradients`, beside the forward pass it belongs to.
    """

    generator: int = 0
    hypernetwork: int = 0
    reward: int = 0
    gradients: int = 0
    proposals: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Outcome:
    """Images of a batch: `(n, 3, H, W)` in [0, 1], the noise and prompts they came from in the end, and the cost.

    `pool` holds the rewards `(n, candidates)` of the base images that each was chosen from, where there were any.
    """

    images: Tensor
    noise: Tensor
    prompts: tuple[str, ...]
    cost: Cost
    pool: Tensor | None = None


class Method(Protocol):
    """A way of turning prompts and noise into images."""

    @property
    def name(self) -> str:
        """How tables call it."""
        ...

    def __call__(
        self, backend: Backend, prompts: Sequence[str], noise: Tensor, *, steps: int, seeds: Sequence[int]
    ) -> Outcome:
        """Images of `prompts` from `noise` `(n, *noise_shape)`; all else that is random in one comes from its seed."""
        ...


def encoded(backend: Backend, prompts: Sequence[str], seeds: Sequence[int]) -> Condition:
    """The condition of the images of these prompts and seeds."""
    return replace(backend.encode(prompts), seeds=tuple(seeds))


def _images(backend: Backend, prompts: Sequence[str], noise: Tensor, steps: int, seeds: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return backend.generate(noise, encoded(backend, prompts, seeds), steps=steps)


def _scores(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = reward(images, prompts)
    if scores.shape != (len(prompts),):
        raise InputError(
            f"reward {reward.name!r} returned shape {tuple(scores.shape)} for {len(prompts)} images: it must return "
            "one score per image"
        )
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).nonzero()[0, 0])
        raise NonFiniteError(f"reward {reward.name!r} returned {scores[row].item()} for {prompts[row]!r}")
    return scores


@dataclass(frozen=True)
class Base:
    """The generator as it is."""

    name: str = "base"

    def __call__(
        self,
        backend: Backend,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        seeds: Sequence[int],
    ) -> Outcome:
        """Images of the base noise."""
        start = time.perf_counter()
        images = _images(backend, prompts, noise, steps, seeds)
        cost = Cost(generator=steps * len(prompts), seconds=time.perf_counter() - start)
        return Outcome(images, noise, tuple(prompts), cost)


@dataclass(frozen=True)
class HyperNoise:
    """One pass of the trained hypernetwork, then the generator: `g(x + f(x))` (arXiv 2508.09968, eq. 6)."""

    name: str = "hypernoise"

    def __call__(
        self,
        backend: Backend,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        seeds: Sequence[int],
    ) -> Outcome:
        """Images of the steered noise."""
        start = time.perf_counter()
        with torch.no_grad():
            moved = steer(backend, noise, encoded(backend, prompts, seeds), steps)
        rows = len(prompts)
        cost = Cost(generator=steps * rows, hypernetwork=rows, seconds=time.perf_counter() - start)
        return Outcome(moved.images, moved.noise, tuple(prompts), cost)


@dataclass(frozen=True)
class BestOfN:
    """The image of highest reward among those of the base noise and `n - 1` further noises (arXiv 2305.13301)."""

    reward: Reward
    n: int = 50
    name: str = "best-of-n"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"best-of-n with n = {self.n}: give at least 1")

    def __call__(
        self, backend: Backend, prompts: Sequence[str], noise: Tensor, *, steps: int, seeds: Sequence[int]
    ) -> Outcome:
        """The best images and the noises they came from."""
        start = time.perf_counter()
        best_images = best_noise = best_scores = None
        pool = []
        for candidate in range(self.n):
            trial, own = noise, seeds  # the first candidate is the base image itself
            if candidate:
                own = [derived_seed(seed, "candidate", candidate) for seed in seeds]
                trial = image_noise(backend, Condition(tuple(prompts), seeds=tuple(own)))
            images = _images(backend, prompts, trial, steps, own)
            with torch.no_grad():
                scores = _scores(self.reward, images, prompts)
            pool.append(scores)
            if best_images is None or best_noise is None or best_scores is None:
                best_images, best_noise, best_scores = images.clone(), trial.clone(), scores.clone()
                continue
            better = scores > best_scores
            best_images[better], best_noise[better], best_scores[better] = images[better], trial[better], scores[better]
        assert best_images is not None
        assert best_noise is not None
        rows = len(prompts)
        cost = Cost(generator=self.n * steps * rows, reward=self.n * rows, seconds=time.perf_counter() - start)
        return Outcome(best_images, best_noise, tuple(prompts), cost, torch.stack(pool, dim=1))


@dataclass(frozen=True)
class ReNO:
    """Reward-based noise optimisation at test time (arXiv 2406.04312).

    Ascends `weight * reward(g(x)) - regularisation * (|x|^2/2 - (d - 1) log|x|)` by SGD with Nesterov momentum, each
    row's gradient clipped by its own norm, and keeps the image of the first iterate of the highest weighted reward. The
    regulariser is the negative log density of the norm of a standard Gaussian, up to a constant. As in the published
    code the last iterate is only looked at: n iterations are n evaluations and n - 1 gradients.
    """

    reward: Reward
    iterations: int = 50
    learning_rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    regularisation: float = 0.01
    name: str = "reno"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"reno with {self.iterations} iterations: give at least 1")

    def __call__(
        self,
        backend: Backend,
        prompts: Sequence[str],
        noise: Tensor,
        *,
        steps: int,
        seeds: Sequence[int],
    ) -> Outcome:
        """The images of the best iterates; the first iterate is the base noise itself."""
        start = time.perf_counter()
        with torch.no_grad():
            condition = encoded(backend, prompts, seeds)
        x = noise.detach().clone().requires_grad_(True)
        optimizer = torch.optim.SGD([x], lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)
        best_images, best_noise = torch.empty(0), x.detach().clone()
        best_scores = torch.full((len(prompts),), -torch.inf, device=x.device)
        dimension = x[0].numel()
        for iteration in range(self.iterations):
            images = backend.generate(x, condition, steps=steps)
            scores = self.reward.weight * _scores(self.reward, images, prompts)
            found = scores.detach().to(best_scores)
            better = found > best_scores
            if iteration == 0:
                best_images = images.detach().clone()
            best_images[better], best_noise[better] = images.detach()[better], x.detach()[better]
            best_scores[better] = found[better]
            if iteration == self.iterations - 1:
                break
            norm = x.float().flatten(1).norm(dim=1)
            penalty = norm.square() / 2 - (dimension - 1) * norm.log()
            loss = (self.regularisation * penalty - scores).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            size = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
            x.grad = gradient * (self.clip / (size + 1e-6)).clamp(max=1.0)
            optimizer.step()
        rows = len(prompts)
        cost = Cost(
            generator=self.iterations * steps * rows,
            reward=self.iterations * rows,
            gradients=(self.iterations - 1) * rows,
            seconds=time.perf_counter() - start,
        )
        return Outcome(best_images, best_noise, tuple(prompts), cost)


Proposer = Callable[[str, Sequence[tuple[str, float]], int, torch.Generator], Sequence[str]]
"""`(prompt, [(candidate, score) so far, best first], how many, generator) -> new candidates`."""


@dataclass(frozen=True)
class PromptOptimisation:
    """Rewrites the prompt instead of the noise: rounds of proposals, scored by the reward of the original prompt.

    The noise stays the base noise. A proposal the backend refuses (outside a vocabulary, too long) is dropped. The
    paper's setting is 10 rounds of 5 proposals, as in arXiv 2501.18096.
    """

    reward: Reward
    propose: Proposer
    rounds: int = 10
    proposals: int = 5
    name: str = "prompt-optimisation"

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.proposals < 1:
            raise InputError(
                f"prompt optimisation with {self.rounds} rounds of {self.proposals} proposals: give at least 1 of each"
            )

    def __call__(
        self, backend: Backend, prompts: Sequence[str], noise: Tensor, *, steps: int, seeds: Sequence[int]
    ) -> Outcome:
        """Images of the best wording found for each prompt."""
        start = time.perf_counter()
        rows = zip(prompts, noise[:, None], seeds, strict=True)
        searches = [self._search(backend, prompt, x, steps, seed) for prompt, x, seed in rows]
        cost = sum((outcome.cost for outcome in searches), Cost())
        return Outcome(
            torch.cat([outcome.images for outcome in searches]),
            noise,
            tuple(outcome.prompts[0] for outcome in searches),
            replace(cost, seconds=time.perf_counter() - start),
        )

    def _search(self, backend: Backend, prompt: str, noise: Tensor, steps: int, seed: int) -> Outcome:
        tried: dict[str, float] = {}
        generator = generator_for(seed, "proposals")
        best = _images(backend, [prompt], noise, steps, [seed])
        with torch.no_grad():
            tried[prompt] = top = float(_scores(self.reward, best, [prompt]))
        wording, images, proposed = prompt, 1, 0
        for _ in range(self.rounds):
            history = sorted(tried.items(), key=lambda item: -item[1])
            candidates = list(self.propose(prompt, history, self.proposals, generator))[: self.proposals]
            proposed += len(candidates)
            for candidate in dict.fromkeys(candidates):
                if candidate in tried:
                    continue
                try:
                    trial = _images(backend, [candidate], noise, steps, [seed])
                except InputError:
                    tried[candidate] = float("-inf")
                    continue
                images += 1
                with torch.no_grad():
                    score = tried[candidate] = float(_scores(self.reward, trial, [prompt]))
                if score > top:
                    wording, best, top = candidate, trial, score
        cost = Cost(generator=images * steps, reward=images, proposals=proposed)
        return Outcome(best, noise, (wording,), cost)


@dataclass(frozen=True)
class TextGenerationProposer:
    """Proposals from a local transformers text-generation model (a folder or a cached hub name).

    Raises:
        InputError: it is not there; it is loaded when the proposer is made.
    """

    model_id: str | Path
    max_new_tokens: int = 60
    device: str = "cpu"
    local_files_only: bool = True
    _tokenizer: Any = field(init=False, repr=False, compare=False)
    _model: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hnkit.scaled.internal.hub import pretrained

        what = f"prompt proposer {str(self.model_id)!r}"
        switch: dict[str, Any] = {"what": what, "local_files_only": self.local_files_only}
        object.__setattr__(self, "_tokenizer", pretrained(AutoTokenizer.from_pretrained, self.model_id, **switch))
        model: Any = pretrained(AutoModelForCausalLM.from_pretrained, self.model_id, **switch)
        object.__setattr__(self, "_model", model.to(self.device).eval())

    def __call__(
        self, prompt: str, history: Sequence[tuple[str, float]], count: int, generator: torch.Generator
    ) -> list[str]:
        """`count` rewordings of `prompt`, sampled with a seed drawn from `generator`."""
        tokenizer, model = self._tokenizer, self._model
        scored = "\n".join(f"{score:.4f}: {text}" for text, score in history[:10])
        request = (
            f"Image descriptions with scores, best first:\n{scored}\n"
            f'Write one better description of "{prompt}" on one line.\nBetter description:'
        )
        tokens = tokenizer([request] * count, return_tensors="pt").to(self.device)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(
                **tokens,
                do_sample=True,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        answers = tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        lines = [answer.strip().splitlines()[0].strip(' "') if answer.strip() else "" for answer in answers]
        return [line for line in lines if line]


def find_proposer(model_id: str, own: Proposer | None, *, local_files_only: bool = True) -> Proposer:
    """What rewrites prompts: a text-generation model where one is named, else the backend's own way.

    Raises:
        InputError: there is neither, or the model is not here.
    """
    if model_id:
        return TextGenerationProposer(model_id, local_files_only=local_files_only)
    if own is None:
        raise InputError(
            "method prompt-optimisation needs a proposer: --set compare.proposer=MODEL names a local text-generation "
            "model, or leave the method out with --methods"
        )
    return own
