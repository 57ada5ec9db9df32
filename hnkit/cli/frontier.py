"""`hnkit frontier`: what a budget of nats could buy, and what a method bought."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hnkit.cli.folders import refuse_existing
from hnkit.cli.options import WithBackend, command_line
from hnkit.errors import InputError
from hnkit.internal.values import printable, setting
from hnkit.internal.workers import ALONE, Workers, is_first

EXAMPLE = "hnkit frontier --rewards scores.csv"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """Reward per nat: the most that any method could gain, and what yours gains for its nats.

    Either from a table of rewards of anyone's method, without a model, or from a backend with a trained adapter.

    Attributes:
        rewards: CSV with the columns prompt, method, reward and, where known, nats.
        base: which method of the CSV is the base.
        adapter: trained adapter, the run folder that holds it, or `bundled`.
        prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME; default: the backend's held-out ones.
        reward: what to measure in, NAME=WEIGHT (repeatable); default: what the run was trained on.
        base_samples: base images a prompt.
        samples: steered images a prompt.
        generator_steps: sampler steps of the generator.
        seed: seed of noise, probes and bootstrap.
        method: how the KL is computed; default: exact where it can be.
        alpha: temperature of the target; default: the run's own.
    """

    rewards: Path | None = setting(None, metavar="FILE.csv")
    base: str = setting("base", metavar="METHOD")
    adapter: Path | None = setting(None, metavar="DIR")
    prompts: str | None = setting(None, metavar="FILE")
    reward: tuple[str, ...] = setting((), metavar="NAME=WEIGHT")
    base_samples: int = setting(128)
    samples: int = setting(8)
    generator_steps: int = setting(1)
    seed: int = setting(0)
    method: Literal["exact", "arnoldi", "lanczos", "second-order"] | None = setting(None)
    alpha: float | None = setting(None)

    def __post_init__(self) -> None:
        if (self.rewards is None) == (self.backend is None):
            raise InputError("give --rewards FILE.csv, or --backend NAME with --adapter DIR (one of the two)")
        if self.backend is not None and self.adapter is None:
            raise InputError(f"--backend {self.backend} without --adapter: name the folder of the adapter or its run")
        if self.rewards is not None:
            model = {"--adapter": self.adapter, "--prompts": self.prompts, "--alpha": self.alpha}
            for flag, given in {**model, "--model-id": self.model_id}.items():
                if given is not None:
                    raise InputError(f"{flag} with --rewards: a table of rewards has no model; leave it out")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"--alpha {self.alpha:g}: give a finite positive temperature")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: give an integer from 0 to 2^63 - 1")


def run(options: Options) -> int:
    """Measure, write the run folder, print the figures."""
    from hnkit.frontier import frontier_document, methods_on_frontier, page, read_rewards
    from hnkit.internal.files import atomic_write, file_digest, new_run_folder, write_json
    from hnkit.internal.provenance import provenance, record_provenance
    from hnkit.output.page import Code, Section, write_html
    from hnkit.training.processes import evaluation_workers

    if options.backend is None and not is_first():
        return 0  # a table of rewards is no work to share out: one of several processes does it
    refuse_existing(options.out)
    extra: dict[str, Any] = {}
    workers = ALONE
    if options.backend is not None:
        workers = evaluation_workers(options.backend, options.overrides, vars(options))
    if options.rewards is not None:
        frontier, methods = methods_on_frontier(read_rewards(options.rewards), base=options.base, seed=options.seed)
        record = provenance(rewards=file_digest(options.rewards))
    else:
        measured, record = _measured(options, workers)
        frontier, methods, extra = measured.frontier, measured.methods, {"network": measured.figures()}
    if workers.index:
        return 0  # the main process writes and says what all have measured
    document = frontier_document(frontier, methods) | extra
    card = page.card(document)
    document["verdict"] = card.to_json()
    lead = page.sentences(document, beside_card=True)
    picture = page.plot(document)
    sections = [*page.sections(document, picture), Section("Reproduce", (Code(command_line("frontier", options)),))]
    folder = None
    try:
        folder = new_run_folder(options.out, "frontier")
        record_provenance(folder, record)
        atomic_write(folder / "frontier.png", picture)
        write_html(
            folder / "report.html", "hnkit frontier: reward per nat", sections, lead=" ".join(lead), card=card,
        )  # fmt: skip
        write_json(folder / "report.json", document)
    except (OSError, InputError):  # what was measured is not lost with the disk
        _show(document, folder, options, finished=False)
        raise
    _show(document, folder, options)
    return 0


def _show(document: dict[str, Any], folder: Path | None, options: Options, *, finished: bool = True) -> None:
    """Print what was found, as the user asked for it."""
    from hnkit.frontier import page
    from hnkit.output import terminal

    if options.as_json:
        where = {"run_folder": None if folder is None else str(folder)}
        terminal.print_json(document | where | ({} if finished else {"finished": False}))
        return
    screen = terminal.console()
    screen.print(terminal.simple_table(*page.table(document)))
    for sentence in page.sentences(document, beside_card=True):
        screen.print(terminal.Words(sentence))
    terminal.print_card_of(document)
    if finished and folder is not None:
        print(printable(f"report: {folder / 'report.html'}"))


def _measured(options: Options, workers: Workers) -> tuple[Any, dict[str, Any]]:
    """The network on the frontier, and what that was made with."""
    from hnkit.adapters import adapter_digests, default_prompts, load_trained, local_files_only, named_adapter
    from hnkit.config import CONFIG_FILE, own_rewards, parse_reward_flag, resolve_config
    from hnkit.frontier.measured import FrontierSettings, network_on_frontier
    from hnkit.internal.provenance import provenance
    from hnkit.prompts import read_prompts
    from hnkit.rewards import load_rewards

    settings = FrontierSettings(
        base_samples=options.base_samples, samples=options.samples, steps=options.generator_steps, seed=options.seed,
        method=options.method,
    )  # fmt: skip
    name = options.named_backend()
    adapter = named_adapter(name, options.adapter)
    assert adapter is not None
    specs = dict(parse_reward_flag(flag) for flag in options.reward)
    if not specs:
        run_folder = next((folder for folder in (adapter, adapter.parent) if (folder / CONFIG_FILE).is_file()), None)
        if run_folder is not None:
            if own := own_rewards(run_folder):
                words = shlex.join(word for reward in own for word in ("--reward", printable(f"{reward}=WEIGHT")))
                raise InputError(f"{run_folder} was trained on {own[0]!r}, a function of its user's: give {words}")
            specs = dict(resolve_config(resume=run_folder, rewards_of_files="installed").rewards)
    backend, trained = load_trained(name, adapter, options.all_overrides())
    local = local_files_only(name, options.overrides)
    given = options.prompts
    prompts = default_prompts(backend) if given is None else read_prompts(given, local_files_only=local)
    device = next(backend.hypernetwork.parameters()).device
    rewards = load_rewards(specs, backend.default_reward, device, local_files_only=local)
    alpha = trained if options.alpha is None else options.alpha
    record = provenance(model=backend.model_digest(), adapter=adapter_digests(adapter), prompts=prompts)
    return network_on_frontier(backend, rewards, prompts, settings, alpha=alpha, workers=workers), record
