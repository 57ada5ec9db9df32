"""One comparison from plan to page. Every part is written when it is done; `--resume` goes on after the last."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hnkit.adapters import adapter_digests, load_backend
from hnkit.backend import Backend, Reward, backend_factory
from hnkit.errors import InputError
from hnkit.internal.files import (
    atomic_write,
    document_digest,
    new_run_folder,
    pasted,
    read_plain,
    resumable,
    write_json,
    write_sealed,
)
from hnkit.internal.folders import require_resumable, run_lock, sweep_temporaries
from hnkit.internal.provenance import provenance, record_provenance, recorded_provenance
from hnkit.internal.seeds import derived_seed, image_seed, kept_generators
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.values import finite, number_of, or_nan, printable
from hnkit.internal.versions import versions
from hnkit.internal.workers import Workers, shared_out
from hnkit.maps import slices
from hnkit.output.page import Card, Table
from hnkit.output.terminal import Steps, steps
from hnkit.rewards import CallableReward, load_rewards
from hnkit.scaled.compare.baselines import (
    Base,
    BestOfN,
    HyperNoise,
    Method,
    PromptOptimisation,
    ReNO,
    find_proposer,
)
from hnkit.scaled.compare.diversity import DinoSimilarity, Lpips, Metric, pixel_distance
from hnkit.scaled.compare.evaluation import (
    Evaluation,
    Job,
    Scorer,
    evaluate_in_turn,
    foreign_parts,
    images_of,
    read_part,
    without_images,
    write_part,
)
from hnkit.scaled.compare.frontier import frontier_part
from hnkit.scaled.compare.nats import NetworkKL, kept_block, network_kl
from hnkit.scaled.compare.networks import Network, average_of, given, trained
from hnkit.scaled.compare.page import card, printed_table, write_page
from hnkit.scaled.compare.plan import QUICK_STEPS, make_plan
from hnkit.scaled.compare.settings import (
    PLAN,
    PROMPTS,
    Settings,
    chosen_prompts,
    configuration,
    default_prompts,
    gone_on_with,
    read_plan,
    reproducing_command,
    require_same,
)
from hnkit.scaled.compare.tables import component_entries, method_row
from hnkit.scaled.lora.adapter import adapter_options
from hnkit.scaled.pipelines.factory import PipelineFactory
from hnkit.training.processes import evaluation_workers

_WITHOUT_INJECTION = {"injection": 0, "max_delta": 0, "draws": 1, "reward_gradient": "pathwise"}


class Comparison:
    """The entry point of `hnkit compare` for every diffusers backend."""

    def accepts(self, factory: Any) -> bool:
        """Whether the backend makes images with a diffusers pipeline."""
        return isinstance(factory, PipelineFactory)

    def printed(self, document: Mapping[str, Any]) -> tuple[Table, Card]:
        """What the command ends with: table 1, and the answer."""
        return printed_table(document), card(document)

    @kept_generators()
    def __call__(
        self,
        backend: str,
        *,
        methods: Sequence[str] | None = None,
        adapter: str | Path | None = None,
        prompts: Sequence[str] | None = None,
        seeds: int | None = None,
        quick: bool = False,
        resume: str | Path | None = None,
        overrides: Sequence[str] = (),
        out: str | Path | None = None,
    ) -> dict[str, Any]:
        """Run or resume a comparison and write its folder; all global random generators are as they were afterwards.

        Args:
            backend: name of the installed backend.
            methods: the methods of table 1; `None`: all, but prompt optimisation only where there is a proposer.
            adapter: a trained hypernetwork; `None`: one is trained here with the backend's preset.
            prompts: to evaluate on; `None`: the backend's own held-out prompts.
            seeds: noises per prompt.
            quick: the short version.
            resume: a folder to go on with; everything is then taken from it, and what is given besides must agree.
            overrides: `table.key=value`, table one of compare, train, backend, rewards, heldout.
            out: a new folder; `None`: under `runs/`.

        Returns:
            What report.json holds, and `run_folder`.
        """
        given = {"methods": methods, "adapter": adapter, "prompts": prompts, "seeds": seeds, "quick": quick, "out": out}
        if resume is not None:
            folder = Path(resume)
            require_resumable(folder, "compare")
            workers = evaluation_workers(backend, overrides, given)
            settings = read_plan(folder, backend, adapter)
            require_same(
                folder, settings, methods=methods, prompts=prompts, seeds=seeds, quick=quick, overrides=overrides
            )
            settings = gone_on_with(settings, overrides)
            session = _Session(settings, workers)
            if (now := session.base.model_digest()) != settings.model:
                raise InputError(
                    f"--resume {folder}: the base model has changed since (SHA-256 {str(settings.model)[:12]}... then, "
                    f"{str(now)[:12]}... now): restore it, or start a new comparison"
                )
        else:
            workers = evaluation_workers(backend, overrides, given)
            plan, others = make_plan(quick=quick, methods=methods, seeds=seeds, overrides=overrides)
            if adapter is not None and not Path(adapter).is_dir():
                raise InputError(
                    f"--adapter {adapter} is not a folder: name the folder of a trained adapter, or its run"
                )
            files = {}
            if adapter is not None:
                adapter_options(adapter)
                files = adapter_digests(adapter)
            config = configuration(backend, adapter, others)  # a mistake is refused before a folder is made
            chosen = chosen_prompts(config, prompts, plan)
            where = None if adapter is None else str(Path(adapter).resolve())
            settings = Settings(backend, plan, where, files, tuple(chosen), tuple(others), quick)
            # what is missing or cannot be used is refused before a folder is made
            session = _Session(settings, workers, all_methods=methods is None)
            settings = replace(session.settings, model=session.base.model_digest())
            session.settings = settings

            def made() -> Path:
                folder = new_run_folder(None if out is None else Path(out), "compare")
                write_sealed(folder / PLAN, settings.to_json())
                return folder

            folder = workers.on_main(made)
        record = provenance(
            model=settings.model, adapter=settings.adapter_files or None, prompts=settings.prompts, asked=settings.asked
        )

        def entered() -> None:
            sweep_temporaries(folder)
            write_sealed(folder / PLAN, settings.to_json())  # what was moved has been found
            if (before := recorded_provenance(folder)) and before[-1].get("versions") != record["versions"]:
                print("hnkit: versions have changed since: what was evaluated is evaluated again", file=sys.stderr)
            record_provenance(folder, record)

        lock = run_lock(folder) if workers.index == 0 else contextlib.nullcontext()
        again = ("hnkit", "compare", "--backend", backend, "--resume", str(folder))
        with lock, resumable(*again):
            workers.on_main(entered)
            document = session.run(folder, pasted(*again))
        return document | {"run_folder": str(folder)}


class _Session:
    """The parts of a comparison; each reads what is on the disk and does what is not."""

    folder: Path

    def __init__(self, settings: Settings, workers: Workers, *, all_methods: bool = False) -> None:
        config = settings.configuration
        self.config = config
        self.base = load_backend(backend_factory(settings.backend), config.options)
        if all_methods and not settings.plan.proposer and self.base.propose is None:
            offered = tuple(name for name in settings.plan.methods if name != "prompt-optimisation")
            settings = replace(settings, plan=replace(settings.plan, methods=offered))
        self.settings, self.plan, self.workers = settings, settings.plan, workers
        self.device = next(self.base.hypernetwork.parameters()).device
        local: bool = getattr(config.options, "local_files_only", True)
        rewards = load_rewards(config.rewards, self.base.default_reward, self.device, local_files_only=local)
        if not rewards.rewards:
            raise InputError(f"backend {settings.backend!r} has no default reward: --set rewards.NAME=WEIGHT")
        heldout = load_rewards(config.heldout, None, self.device, local_files_only=local)
        self.scorer = Scorer(rewards, heldout, self.base.judge)
        # the baselines climb what training maximises: the weighted sum, at weight one
        self.reward: Reward = CallableReward("reward", 1.0, rewards)
        self.metrics: dict[str, Metric] = {"pixel_distance": pixel_distance}
        if self.plan.dino:
            dino = DinoSimilarity(self.plan.dino, device=str(self.device), local_files_only=local)
            self.metrics["dino_similarity"] = dino
        if self.plan.lpips:
            self.metrics["lpips"] = Lpips(self.plan.lpips).to(self.device)
        self.propose = (
            find_proposer(self.plan.proposer, self.base.propose, local_files_only=local)
            if "prompt-optimisation" in self.plan.methods
            else None
        )
        self.networks: dict[str, Network] = {}
        self.measured: dict[str, NetworkKL] = {}
        self.candidates = {"best-of-2": 2, "best-of-4": 4, "best-of-n": self.plan.best_of}
        for chunk in slices(len(settings.prompts), self.plan.batch):
            self.base.encode(settings.prompts[chunk])

    def run(self, folder: Path, again: str) -> dict[str, Any]:
        """All parts, then the report, in the run's folder; `again` is the command that goes on with it."""
        self.folder, self.again, plan = folder, again, self.plan
        wanted = [name for name in plan.methods if name in ("hypernoise", "direct")]
        jobs: list[tuple[str, Callable[[], None]]] = [(f"network {n}", lambda n=n: self._network(n)) for n in wanted]  # type: ignore[misc]
        for rank in plan.ranks:
            jobs += [
                (f"network {n}", lambda n=n, r=rank: self._network(n, rank=r))  # type: ignore[misc]
                for n in (f"hypernoise-rank{rank}", f"direct-rank{rank}")
            ]
        jobs += [(f"network kl-{k}", lambda k=k: self._network(f"kl-{k}", kl=k)) for k in plan.losses]  # type: ignore[misc]
        if self.workers.index == 0 and (idle := without_images(self._job("base"), self.workers)):
            print(f"hnkit: {idle}", file=sys.stderr)
        results: dict[str, Any] = {}
        parts: list[tuple[str, str, Callable[[], Any]]] = [
            ("table_1", "table 1: methods", self._table_1),
            ("steps", "tables 2 and 8: sampler steps", self._table_steps),
            ("diversity", "table 7: diversity", self._diversity),
            ("ranks", "tables 9 and 10: ranks", self._ranks),
            ("losses", "losses and their exact KL", self._losses),
            ("l2", "how close L2 stayed", self._closeness),
            ("frontier", "reward per nat", self._frontier),
            ("training", "figure 4", self._training),
            ("grid", "grid of images", lambda: self.workers.on_main(self._grid)),
        ]
        with steps(len(jobs) + len(parts)) as progress:
            self.progress: Steps = progress
            for title, job in jobs:
                progress.start(title)
                job()
            self._tell_of_foreign_parts()
            for key, title, part in parts:
                progress.start(title)
                try:
                    results[key] = part()
                except InputError as error:  # of a reward, say; what was found out before lies in the parts
                    raise InputError(f"{error}; go on with {again}") from error
        document = {
            "title": f"hnkit compare: {self.settings.backend}",
            "train_steps": self.train_steps,
            "settings": self.settings.to_json(),
            "config": self.config.to_dict(),
            "trained_reward": {
                name: w.weight for name, w in zip(self.scorer.rewards.names, self.scorer.rewards.rewards, strict=True)
            },
            "noise_shape": list(self.base.noise_shape),
            **results,
        }
        document["command"] = reproducing_command(self.settings, default_prompts(self.base, self.plan))
        document["verdict"] = card(document).to_json()

        def write() -> None:
            write_json(self.folder / "report.json", finite(document))
            write_json(self.folder / PROMPTS, list(self.settings.prompts))
            write_page(self.folder, document)

        self.workers.on_main(write)
        return document

    def _tell_of_foreign_parts(self) -> None:
        """Say, once all networks are known, that parts in the folder are not this comparison's."""
        known = {self._made_from(name) for name in ("base", *self.networks)}
        place = self.folder / "parts"
        if self.workers.index == 0 and (count := foreign_parts(place, known)):
            said = f"{number_of(count, 'part')} in {place} made for something else, or damaged"
            print(printable(f"hnkit: {said}: what is needed of that is made again"), file=sys.stderr)

    @property
    def train_steps(self) -> int:
        """Optimiser steps of what is trained here."""
        steps = self.config.train.steps
        return self.plan.train_steps or (min(steps, QUICK_STEPS) if self.settings.quick else steps)

    # --- networks ------------------------------------------------------------------------------------------

    def _network(self, name: str, *, rank: int | None = None, kl: str | None = None) -> None:
        settings, plan = self.settings, self.plan
        if name == "hypernoise" and settings.adapter is not None:
            self.networks[name] = given(name, settings.backend, Path(settings.adapter), settings.overrides)
            return
        total = self.train_steps
        every = max(1, total // 8)
        overrides = [
            "train.validate_samples=64",
            f"train.ema={average_of(self.config.train, total)!r}",
            *settings.overrides,
            f"train.steps={total}",
            f"train.validate_every={every}",
            f"train.measure_every={every if kl else 0}",
            f"train.measure_samples={plan.measure_samples}",
        ]
        if name.startswith("direct"):
            overrides.append("train.objective=direct")
        if rank is not None:
            overrides += [f"backend.rank={rank}", f"backend.lora_alpha={2 * rank}"]
        if kl is not None or name.startswith("direct"):  # none of these is about injected noise
            overrides += [f"train.{key}={value}" for key, value in _WITHOUT_INJECTION.items()]
        if kl is not None:
            overrides.append(f"train.kl={kl}")
        config = configuration(settings.backend, settings.adapter, overrides)
        self.networks[name] = trained(name, config, self.folder / "runs" / name, self.again)

    # --- evaluations ---------------------------------------------------------------------------------------

    def _method(self, name: str) -> Method:
        plan = self.plan
        if name in self.candidates:
            return BestOfN(self.reward, n=self.candidates[name], name=name)
        if name == "reno":
            return ReNO(self.reward, iterations=plan.reno_iterations)
        if name == "prompt-optimisation":
            assert self.propose is not None  # it was looked for at the start
            return PromptOptimisation(self.reward, self.propose, rounds=plan.rounds, proposals=plan.proposals)
        return HyperNoise() if name in self.networks and not name.startswith("direct") else Base(name)

    def _job(self, name: str, at: int = 1) -> Job:
        network = self.networks.get(name)
        return Job(
            name,
            self._method(name),
            self.base if network is None else network.backend,
            self.settings.prompts,
            self.scorer,
            self.plan.seeds,
            at,
            self.plan.batch,
            self.plan.seed,
            self.folder / "parts",
            self.plan.grid if at == 1 and name in self.plan.methods else 0,
            self._made_from(name),
        )

    def _made_from(self, name: str) -> str:
        """What parts of this name are made from: the comparison's settings, its inputs, versions, and the network."""
        network = self.networks.get(name)
        return document_digest([self.settings.asked, versions(), None if network is None else dict(network.digests)])

    def _evaluate(self, name: str, *, at: int = 1) -> Evaluation:
        job = self._job(name, at)
        evaluate_in_turn([job], self.workers)
        return job.result()

    def _parameters(self, name: str) -> int:
        return self.networks[name].parameters if name in self.networks else 0

    def _table_1(self) -> list[dict[str, Any]]:
        jobs = [self._job(name) for name in dict.fromkeys(("base", *self.plan.methods))]
        for job in jobs:
            if job.name in ("base", "hypernoise", "direct"):  # one pass of each network is the warm-up of all
                job.warm_up()
        evaluate_in_turn(jobs, self.workers)
        base, rows = self._evaluate("base"), []
        for name in self.plan.methods:
            found = base if name == "base" else self._evaluate(name)
            row = method_row(found, base, self._parameters(name))
            rows.append(row | {"components": {} if name == "base" else component_entries(found.rows, base.rows)})
        return rows

    def _table_steps(self) -> list[dict[str, Any]]:
        names = [name for name in ("base", "hypernoise", "direct") if name == "base" or name in self.networks]
        rows = []
        for count in self.plan.steps:
            base = self._evaluate("base", at=count)
            rows += [
                method_row(base if name == "base" else self._evaluate(name, at=count), base, self._parameters(name))
                for name in names
            ]
        return rows

    def _ranks(self) -> list[dict[str, Any]]:
        base = self._evaluate("base")
        names = [f"{kind}-rank{rank}" for rank in self.plan.ranks for kind in ("hypernoise", "direct")]
        return [method_row(self._evaluate(name), base, self._parameters(name)) for name in names]

    def _losses(self) -> list[dict[str, Any]]:
        base = self._evaluate("base")
        rows = []
        for kl in self.plan.losses:
            network = self.networks[f"kl-{kl}"]
            row = method_row(self._evaluate(f"kl-{kl}"), base, network.parameters)
            row["along_training"] = [
                {"step": record["step"], **record["measurement"]}
                for record in network.metrics
                if record.get("measurement")
            ]
            rows.append(row)
        return rows

    # --- what is not a table of scores ---------------------------------------------------------------------

    def _diversity(self) -> list[dict[str, Any]]:
        plan = self.plan
        prompts = self.settings.prompts[: plan.diversity_prompts]
        metrics = self.metrics
        names = ["base", *[n for n in self.networks if n in ("hypernoise", "direct") or n.startswith("kl-")]]
        rows: list[dict[str, Any]] = []
        base_values: dict[str, list[float]] = {}
        for name in names:
            if self.workers.count > 1:
                for index, _ in shared_out(prompts, self.workers):
                    self._prompt_diversity(name, index, metrics)
                self.workers.gather(None)  # nobody reads before all have written
            values: dict[str, list[float]] = {}
            for index in range(len(prompts)):
                for metric, value in self._prompt_diversity(name, index, metrics).items():
                    values.setdefault(metric, []).append(value)
            base_values = base_values or values
            row: dict[str, Any] = {
                "method": name,
                "prompts": len(prompts),
                "seeds": plan.diversity_seeds,
                "metrics": {},
            }
            for metric, entries in values.items():
                mean, stderr = _finite_estimate(entries)
                change, change_stderr = _finite_estimate(
                    [a - b for a, b in zip(entries, base_values[metric], strict=True)]
                )
                row["metrics"][metric] = {
                    "value": mean,
                    "stderr": stderr,
                    "change": change,
                    "change_stderr": change_stderr,
                }
            rows.append(row)
        return rows if prompts else []

    def _prompt_diversity(self, name: str, index: int, metrics: dict[str, Metric]) -> dict[str, float]:
        path = self.folder / "parts" / f"diversity-{name}-{index}.json"
        prompt = self.settings.prompts[index]
        made_from = self._made_from(name)
        saved = read_part(path, made_from)
        if saved is not None and saved.get("prompt") == prompt and isinstance(saved.get("values"), dict):
            with contextlib.suppress(TypeError, ValueError):
                kept = {metric: float(or_nan(value)) for metric, value in saved["values"].items()}
                if set(metrics) <= set(kept):
                    return kept
        network = self.networks.get(name)
        backend = self.base if network is None else network.backend
        seed = derived_seed(self.plan.seed, "diversity")
        seeds = [image_seed(seed, prompt, number) for number in range(self.plan.diversity_seeds)]
        images = self._images(self._method(name), backend, [prompt] * len(seeds), seeds)
        values = {metric: function(images.to(self.device)) for metric, function in metrics.items()}
        if self.base.scenes is not None:
            values["distinct_scenes"] = len(set(self.base.scenes(images))) / len(images)
        write_part(path, finite({"prompt": prompt, "values": values}), made_from)
        return values

    def _images(self, method: Method, backend: Backend, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        parts = slices(len(prompts), self.plan.batch)
        return torch.cat(
            [images_of(method, backend, prompts[rows], seeds[rows]).images.float().cpu() for rows in parts]
        )

    def _closeness(self) -> list[dict[str, Any]]:
        """The KL of the trained hypernetwork by each method that fits, on the same noises and prompts."""
        if "hypernoise" not in self.networks:
            return []
        found = [self._network_kl("hypernoise").figures]
        # beside the exact figure a stochastic one: Arnoldi's where it applies, else Golub and Kahan's
        norm = found[0]["local_norm"]["max"]
        method = "arnoldi" if norm is not None and norm < 1 else "lanczos"
        # which is no part of the short version: at few dimensions it costs many times the products of the exact one
        if method != found[0]["method"] and not (self.settings.quick and found[0]["method"] == "exact"):
            found.append(self._measured("hypernoise", method).figures)
        return found

    def _network_kl(self, name: str) -> NetworkKL:
        """The KL of a network on noises of the comparison, by the method that fits; from its blocks, once a process."""
        if name not in self.measured:
            self.measured[name] = self._measured(name)
        return self.measured[name]

    def _measured(self, name: str, method: str = "auto") -> NetworkKL:
        """The same by a method, block by block of its noises, each of which is a part."""
        plan = self.plan
        return network_kl(
            self.networks[name].backend, self.settings.prompts, plan.seeds, plan.measure_samples, plan.seed,
            method=method, workers=self.workers,
            keep=partial(kept_block, self.folder / "parts" / f"blocks-of-{name}", self._made_from(name)),
        )  # fmt: skip

    def _frontier(self) -> dict[str, Any]:
        """Gain of every method against the most that its nats could buy; no image is made for it."""
        named = [name for name in self.plan.methods if name != "base"]
        losses = [f"kl-{kl}" for kl in self.plan.losses]
        nats = {name: math.log(n) - (n - 1) / n for name, n in self.candidates.items() if n > 1}
        known = [name for name in ("hypernoise", *losses) if name in self.networks]
        measured = {name: self._network_kl(name) for name in known}
        alphas = {name: self.networks[name].alpha for name in measured}
        pool = self._evaluate("best-of-n") if "best-of-n" in named else None
        evaluations = [self._evaluate(name) for name in [*named, *losses]]
        return frontier_part(self._evaluate("base"), evaluations, pool, nats, measured, alphas)

    def _training(self) -> dict[str, list[dict[str, Any]]]:
        """Figure 4: trained reward and independent scores on held-out prompts along training."""
        return {
            name: [
                {"step": record["step"], "scores": record["validation"]["scores"]}
                for record in network.metrics
                if record.get("validation")
            ]
            for name, network in self.networks.items()
            if name in ("hypernoise", "direct")
        }

    def _grid(self) -> dict[str, Any]:
        prompts = list(self.settings.prompts[: self.plan.grid])
        images = {name: self._job(name).shown_images() for name in self.plan.methods}
        grid, content = self.folder / "parts" / "grid.safetensors", save(images)
        if not grid.is_file() or read_plain(grid) != content:
            atomic_write(grid, content)
        judge = self.scorer.judge
        verdicts = {} if judge is None else {name: judge(images[name], prompts).tolist() for name in self.plan.methods}
        return {"prompts": prompts, "methods": list(self.plan.methods), "correct": verdicts}


def _finite_estimate(values: Sequence[float]) -> tuple[float, float | None]:
    mean, stderr = mean_and_stderr(torch.tensor(values, dtype=torch.float64))
    return mean, stderr if stderr == stderr else None


COMPARISON = Comparison()
"""The entry point `diffusers` of the group `hnkit.comparisons`."""
