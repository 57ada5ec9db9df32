"""A plan's account on tensors without values, against brute-force counts of real runs of the tiny checkpoints."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import diffusers
import pytest
import torch
from transformers import CLIPConfig

from hnkit import InputError
from hnkit.backend import backend_factory
from hnkit.cli.app import app
from hnkit.config import RewardSpec, resolve_config
from hnkit.output import terminal
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.training.plan import plan
from hnkit.training.plan.cards import CARDS, RESERVED, find_card
from hnkit.training.plan.count import DECODER, GENERATOR, REWARDS, F
from hnkit.training.plan.ledger import stored
from hnkit.training.plan.plan import Counter, Need, Plan, plan_training
from hnkit.training.plan.skeleton import without_weights
from hnkit.training.plan.view import as_text, memory_table
from hnkit.training.processes import Processes
from hnkit.training.session import Session
from hnkit.training.view import TrainView
from tests.scaled import tiny
from tests.scaled.conftest import noise_for

FAMILIES = ("sana", "sd-turbo", "flux")
ROWS = 3
CHECKPOINTING = ("hypernetwork_checkpointing", "generator_checkpointing", "vae_checkpointing")


class Packed:
    """A tensor that autograd has saved, for as long as its graph lives."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Saved:
    """Brute force: every storage that autograd has saved while this was entered, but for the given tensors', once.

    What belongs to a graph that nothing uses, as the last text stream of a transformer, has gone with it; so what was
    computed is to be held until `size` is read.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.packed: weakref.WeakSet[Packed] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> Packed:
        packed = Packed(tensor)
        self.packed.add(packed)
        return packed

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda packed: packed.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def size(self) -> int:
        storages = [packed.tensor.untyped_storage() for packed in self.packed]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self.known)


def configured(name, checkpoint, *overrides: str):
    options = tiny.options(name, checkpoint(name))
    options |= dict.fromkeys(backend_factory(name).savers, False)  # whatever its preset says
    flags = [f"backend.{key}={json.dumps(value)}" for key, value in options.items()]
    return resolve_config(
        backend=name,
        overrides=[*flags, f"train.batch={ROWS}", "train.accumulate=1", *overrides],
        rewards=["redness=1"],
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FAMILIES),
        *((name, {"dtype": "bfloat16", "lora_autocast": True, "quantize": "fp8"}) for name in FAMILIES),
        ("sana", {"lora_layers": ["to_q", "to_k"]}),
    ],
)
def test_what_each_part_saves_is_what_autograd_saves_in_a_real_run(name, options, checkpoint):
    config = configured(name, checkpoint, *(f"backend.{key}={json.dumps(value)}" for key, value in options.items()))
    counter = Counter(config)
    backend = backend_factory(name).load(config.options)
    noise = noise_for(backend, ROWS)
    condition = backend.encode(tiny.PROMPTS[:ROWS])
    vae = backend.pipeline.vae
    weights = [*backend.hypernetwork.parameters(), *backend.hypernetwork.buffers(), *vae.parameters(), *vae.buffers()]
    with Saved(noise, *condition.tensors.values(), *weights) as f:
        delta = backend.hypernetwork(noise, condition)
        kept = noise + delta, delta.square().flatten(1).sum(1) / 2
    leaf = kept[0].detach().requires_grad_()
    with Saved(leaf, *condition.tensors.values(), *weights) as generated:
        made = backend.generate(leaf, condition)
    latents = []
    decode = vae.decode

    def noted(z, **options):
        latents.append(z.detach().requires_grad_())
        return decode(z, **options)

    vae.decode = noted
    backend.generate(leaf, condition)
    vae.decode = decode
    with Saved(latents[0], *weights) as decoded:
        images = (decode(latents[0], return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
    found = counter.need((), ROWS, find_card("h100")).saved
    assert all(output.requires_grad for output in (*kept, made, images))  # and their graphs live
    assert found[F] == pytest.approx(f.size, rel=0.05)
    assert found[DECODER] == pytest.approx(decoded.size, rel=0.05)
    # what the sampler's own variables hold until it returns is the generator's here, and is no saved tensor
    assert found[GENERATOR] + found[DECODER] == pytest.approx(generated.size, rel=0.05)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sana", ()),
        ("flux", CHECKPOINTING),
        ("sd-turbo", ("vae_slicing",)),
        *(pytest.param(name, (), marks=pytest.mark.slow) for name in ("sd-turbo", "flux")),
        *(pytest.param(name, CHECKPOINTING, marks=pytest.mark.slow) for name in ("sana", "sd-turbo")),
    ],
)
def test_the_peak_that_is_put_together_is_that_of_a_whole_real_step(name, changes, checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    switched = [f"backend.{change}=true" for change in changes]
    config = configured(name, checkpoint, *switched, f"train.prompts={tmp_path / 'prompts.txt'}")
    need = Counter(config).need((), ROWS, find_card("h100"))
    session = Session(config, Processes(), TrainView(terminal.console(stderr=True), quiet=True))
    session.update(session.gradients())  # the first step makes the optimiser's state
    session.optimizer.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        session.update(session.gradients())
    peak = allocated_peak(profile)
    standing = sum(need.weights.values()) - need.weights["gradients"]
    # kernels' own scratch memory passes no dispatcher: at this size it is a few percent, of recomputed blocks more
    assert (0.8 if changes else 0.95) < (need.peak - standing) / peak < 1.02


def allocated_peak(profile) -> int:
    """The most bytes that torch's own allocator had given out beyond those at the start."""
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("model_id", PUBLISHED_MODELS)
def test_a_published_configuration_has_the_published_number_of_parameters(model_id):
    model = PUBLISHED_MODELS[model_id]
    config = dict(model.components[model.network])
    network = without_weights(lambda: getattr(diffusers, config["_class_name"]).from_config(config))
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(model.parameters, rel=0.005)


def test_a_plan_names_the_options_that_make_a_run_fit(checkpoint):
    config, card = configured("sana", checkpoint, "train.batch=4"), find_card("h100")
    counter = Counter(config)
    needed = counter.need((), 4, card)
    card = replace(card, memory=needed.peak - 1 + RESERVED)
    plan = plan_training(config, card, counter=counter)
    assert not plan.fits
    assert [need.changes for need in plan.cures] == [()]  # smaller micro-batches are enough
    card = replace(card, memory=counter.need((), 1, card).peak - 1 + RESERVED)
    plan = plan_training(config, card, counter=counter)
    assert plan.cures
    assert all(need.fits(card) and need.changes for need in plan.cures)
    need = plan.cures[0]
    switched = replace(
        config,
        options=replace(config.options, **dict.fromkeys(need.changes, True)),
        train=replace(config.train, accumulate=4 // need.micro),
    )
    assert plan_training(switched, card).need.peak == need.peak  # what it promises is what the next plan says
    assert [need.seconds for need in plan.cures] == sorted(need.seconds for need in plan.cures)
    none = plan_training(config, replace(card, memory=RESERVED + 1), counter=counter)
    assert not none.cures
    assert "No memory option makes it fit" in as_text(none)


GIB = 2**30
NEED = Need(
    changes=(),
    micro=18,
    weights={"network": GIB, "decoder": GIB // 2, "rewards": 12 * GIB, "LoRA": GIB // 4, "optimiser": GIB // 4},
    saved={F: 40 * GIB, GENERATOR: 20 * GIB, DECODER: 10 * GIB, REWARDS: 5 * GIB},
    peak=120 * GIB,
    where="decoder, backward",
    held=60 * GIB,
    gradients=0,
    flops=2 * 10**15,
    seconds=36.0,
    encoding=20 * GIB,
)


def planned(need: Need, *, cures: tuple[Need, ...] = (), processes: int = 1, **train: int) -> Plan:
    config = resolve_config(backend="digits")
    config = replace(config, train=replace(config.train, **({"batch": 54, "accumulate": 3, "steps": 1000} | train)))
    return Plan(config, find_card("h100"), processes, need, cures, need.most)


def test_the_words_of_a_plan_that_does_not_fit():
    cure = replace(NEED, micro=1, changes=("lora_autocast",), peak=60 * GIB, seconds=40.0)
    assert (
        as_text(planned(NEED, cures=(cure,)))
        == """\
digits on H100 SXM 80 GB: counted, not measured

on each card                               GiB
frozen network                             1.0
autoencoder                                0.5
reward models                             12.0
LoRA                                      0.25
optimiser                                 0.25
saved by f                                40.0
saved by generator                        20.0
decoder, backward: saved and working      46.0
peak, in decoder, backward               120.0

The rows add up to the peak of a step, with 18 samples at a time, 3 times for a step (train.accumulate). \
When the backward pass begins, the parts have saved: f 40.0, generator 20.0, decoder 10.0, rewards 5.0. \
While prompts are encoded, before the first step, 20.0 GiB are taken; text encoders leave the card after that.

A step is 2,000 TFLOP on the card: 100 steps per hour, 1,000 steps in 10.0 hours, if 40 % of the most that the card \
can do is reached (an assumption, not a measurement; small batches reach less).
It does not fit: 120.0 GiB are needed, of the 80.0 GiB of one H100 SXM 80 GB, of which 1.5 are kept free.
What makes it fit, the quickest first:
  --set backend.lora_autocast=true --set train.accumulate=54: 60.0 GiB, 90 steps per hour"""
    )


def test_the_words_of_a_plan_where_nothing_makes_it_fit_say_what_to_do():
    text = as_text(planned(NEED))
    assert text.endswith(
        "No memory option makes it fit (the least is 120.0 GiB): lower backend.size or backend.rank, leave out a "
        "reward, or take a larger card."
    )
    encoding = replace(NEED, encoding=130 * GIB)
    text = as_text(replace(planned(encoding), least=130 * GIB))
    assert "It does not fit: 130.0 GiB are needed while prompts are encoded, of the 80.0 GiB" in text
    assert text.endswith("no memory option lowers that: take a larger card.")


def test_a_small_plan_is_in_a_unit_of_its_size():
    """A toy needs kilobytes: `3.1e-07 GiB` is no figure to read."""
    for scale, unit in ((2**20, "MiB"), (2**10, "KiB")):
        small = {name: size * scale // GIB for name, size in NEED.weights.items()}
        saved = {name: size * scale // GIB for name, size in NEED.saved.items()}
        need = replace(
            NEED,
            micro=1,
            weights=small,
            saved=saved,
            peak=120 * scale,
            held=60 * scale,
            encoding=20 * scale,
            seconds=0.36,
        )
        plan = planned(need, batch=1, accumulate=1)
        table = memory_table(plan)
        assert table.headers[1] == unit
        assert table.rows[-1][1] == "120.0"
        text = as_text(plan)
        assert f"It fits: 120.0 {unit}, of the 80.0 GiB of one H100 SXM 80 GB, of which 1.5 are kept free." in text
        assert "with 1 sample at a time. When" in text
        assert f"20.0 {unit} are taken" in text
        assert "1,000 steps in 6.0 minutes" in text
        assert "e-" not in text
    assert "TFLOP on each of 2 cards" in as_text(planned(NEED, processes=2, batch=36, accumulate=1))


def test_options_save_what_a_plan_says_of_them(checkpoint):
    """The base in 8 bits, and LoRA in the network's type: weights by their storages, f by what autograd saves."""

    def needed(*changes):
        return Counter(configured("flux", checkpoint, "backend.dtype=bfloat16", *changes)).need((), 1, find_card("l4"))

    plain, half, stored = needed(), needed("backend.lora_autocast=true"), needed('backend.quantize="fp8"')
    assert half.weights == plain.weights
    assert half.saved[F] < 0.8 * plain.saved[F]
    assert half.saved[GENERATOR] == plain.saved[GENERATOR]
    options = tiny.options("flux", checkpoint("flux"), dtype="bfloat16", quantize="fp8")
    base = backend_factory("flux").load(backend_factory("flux").options(**options))._base
    assert stored.weights["network"] == sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    assert stored.weights["network"] < 0.8 * plain.weights["network"]
    few = needed('backend.lora_layers=["to_q"]')
    assert few.weights["LoRA"] < 0.3 * plain.weights["LoRA"]
    assert few.saved[F] < plain.saved[F]


def test_a_network_that_is_shared_out_is_counted_by_shares(checkpoint):
    def needed(processes, *changes):
        return Counter(configured("flux", checkpoint, *changes), processes).need((), 1, find_card("l4"))

    whole, shared = needed(3), needed(3, "backend.shard=true")
    base = backend_factory("flux").load(configured("flux", checkpoint).options)._base
    size = sum(tensor.nbytes for tensor in (*base.parameters(), *base.buffers()))
    assert whole.weights["network"] == size
    assert shared.weights["network"] == -(-size // 3)
    blocks = [
        sum(p.nbytes for p in block.parameters())
        for block in (*base.transformer_blocks, *base.single_transformer_blocks)
    ]
    outside = sum(p.nbytes for p in base.parameters()) - sum(blocks)
    assert shared.weights["whole blocks"] == 2 * outside + 2 * max(blocks)
    alone = needed(1, "backend.shard=true")
    assert alone.weights == needed(1).weights  # one process holds all of it


def test_rewards_that_leave_the_card_stand_in_no_plan(checkpoint, tmp_path):
    CLIPConfig(**SMALL_CLIP).save_pretrained(tmp_path)
    config = configured("sana", checkpoint)
    found = {}
    for kind, options in (("full", {}), ("half", {"dtype": "bfloat16"}), ("off", {"offload": True})):
        spec = RewardSpec(1.0, {"model_id": str(tmp_path), **options})
        found[kind] = Counter(replace(config, rewards={"clipscore": spec})).need((), 1, find_card("l4"))
    weights = {kind: need.weights["rewards"] for kind, need in found.items()}
    assert weights["off"] == 0
    assert weights["half"] == pytest.approx(weights["full"] / 2, rel=0.01)
    assert found["off"].saved[REWARDS] < 0.5 * found["full"].saved[REWARDS]


SMALL_CLIP = {
    "projection_dim": 16,
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    },
}  # fmt: skip


def test_the_rows_of_a_plan_add_up_to_its_peak(checkpoint):
    for changes in (["train.accumulate=3", "train.ema=0.9", "train.optimizer=adamw8bit"], ["train.objective=direct"]):
        need = Counter(configured("sd-turbo", checkpoint, *changes)).need((), 1, find_card("l4"))
        assert sum(need.at_peak().values()) == need.peak
        assert min(need.at_peak().values()) >= 0


def test_what_lives_all_the_time_is_looked_through_once(checkpoint, monkeypatch):
    """A large network has thousands of tensors, and a plan asks for them with every choice of options."""
    counter, card, looked = Counter(configured("sana", checkpoint)), find_card("h100"), []
    monkeypatch.setattr(plan, "stored", lambda tensors: looked.append(1) or stored(tensors))
    first = counter.need((), 1, card)
    once = len(looked)
    assert once
    assert counter.need(CHECKPOINTING, 1, card).weights == first.weights
    assert len(looked) == once


def test_what_a_plan_cannot_follow_is_one_line(checkpoint, tmp_path):
    card = find_card("h100")
    with pytest.raises(InputError, match="unknown card 'abacus': accepted are rtx-3090"):
        find_card("abacus")
    assert {find_card(name) for name in ("H100", "h 100", "H100 SXM 80 GB")} == {card}
    assert find_card("RTX_4090") == find_card("GeForce RTX 4090") == CARDS["rtx-4090"]
    with pytest.raises(InputError, match=r"no plan for train\.kl = 'arnoldi'"):
        plan_training(configured("sana", checkpoint, "train.kl=arnoldi"), card)
    with pytest.raises(InputError, match="no plan for 'nobody/nothing': its configuration is not here"):
        plan_training(configured("sana", checkpoint, "backend.model_id=nobody/nothing"), card)
    with pytest.raises(InputError, match="backend 'diffusers': name a model's folder or hub name by --model-id"):
        plan_training(resolve_config(backend="diffusers"), card)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(InputError, match="the configuration of its unet is not there"):
        plan_training(configured("sd-turbo", checkpoint, f"backend.model_id={tmp_path / 'bare'}"), card)
    for unknown in ("PipelineOfNoOne", "DDPMPipeline"):
        (tmp_path / "bare" / "model_index.json").write_text(json.dumps({"_class_name": unknown}))
        with pytest.raises(InputError, match=f"bare holds a {unknown}: noise hypernetworks are for text-to-image"):
            plan_training(
                resolve_config(backend="diffusers", overrides=[f"backend.model_id={tmp_path / 'bare'}"]), card
            )
    with pytest.raises(InputError, match="leaves a remainder"):
        plan_training(configured("sana", checkpoint), card, processes=2)
    config = replace(configured("sana", checkpoint), rewards={"tests.scaled.test_plan:valued": RewardSpec()})
    with pytest.raises(InputError, match="no plan on tensors without values"):
        plan_training(config, card)


def valued(images, prompts):
    """A reward that looks at the value of its images."""
    return images.mean((1, 2, 3)) * (1.0 if float(images.mean()) > 0 else 2.0)


def test_the_command_prints_a_plan_and_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = tiny.options("flux", checkpoint("flux"))
    words = [word for key, value in options.items() for word in ("--set", f"backend.{key}={json.dumps(value)}")]
    command = ["train", "--backend", "flux", "--reward", "redness=1", "--plan", *words]
    with pytest.raises(SystemExit) as ended:
        app([*command, "--card", "l4", "--json"])
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"]
    assert document["card"]["name"] == "l4"
    for bad, line in ((["--out", "x"], "nothing is written"), (["--card", "abacus"], "unknown card")):
        with pytest.raises(SystemExit) as ended:
            app([*command, *bad])
        assert ended.value.code == 2
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        app(["train", "--backend", "flux", "--card", "l4"])
    assert ended.value.code == 2
    assert "without --plan" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
