"""Plans of the families: what is counted on tensors without values, against brute-force counts of real runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from hnkit import InputError
from hnkit.backend import backend_factory
from hnkit.cli.app import app
from hnkit.config import RewardSpec, resolve_config
from hnkit.scaled.backends import BACKENDS
from hnkit.scaled.pipelines.loading import load_pipeline
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.scaled.pipelines.skeleton import component_configs
from hnkit.scaled.pipelines.texts import encoders_size
from hnkit.training.plan.cards import RESERVED, find_card
from hnkit.training.plan.count import DECODER, GENERATOR, F
from hnkit.training.plan.plan import Counter, plan_training
from hnkit.training.plan.view import as_text
from tests.scaled.conftest import noise_for
from tests.scaled.families.conftest import settings
from tests.scaled.test_plan import Saved

ROWS = 2
TOKENS = 16
"""Of every prompt, where the class lets one choose: the prompts below are longer, and are cut."""
PROMPTS = ["a red fox that runs over the hill", "two blue cats that sit on a mat"]
SLOW = ("LatentConsistencyModelPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline")
CLASSES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in (
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "Flux2KleinPipeline",
        "ZImagePipeline",
        "QwenImagePipeline",
        "LatentConsistencyModelPipeline",
        "PixArtAlphaPipeline",
    )
]


def planned(name, folder, *changes):
    options = settings(name, folder(name), max_sequence_length=TOKENS, **dict.fromkeys(changes, True))
    flags = [f"backend.{key}={json.dumps(value)}" for key, value in options.items()]
    return resolve_config(
        backend="diffusers",
        overrides=[*flags, f"train.batch={ROWS}", "train.accumulate=1"],
        rewards=["redness=1"],
    )


@pytest.mark.parametrize("name", CLASSES)
def test_what_each_part_saves_is_what_autograd_saves_in_a_real_run(name, folder):
    config = planned(name, folder)
    counter = Counter(config)
    backend = backend_factory("diffusers").load(config.options)
    noise, condition = noise_for(backend, ROWS), backend.encode(PROMPTS)
    vae = backend.pipeline.vae
    modules = [
        *backend.hypernetwork.modules(),
        *vae.modules(),
        *backend.pipeline.components[backend._network].modules(),
    ]
    weights = [*backend.hypernetwork.parameters(), *backend.hypernetwork.buffers(), *vae.parameters(), *vae.buffers()]
    weights += [value for module in modules for value in vars(module).values() if isinstance(value, torch.Tensor)]
    with Saved(noise, *condition.tensors.values(), *weights) as f:
        delta = backend.hypernetwork(noise, condition)
        kept = noise + delta, delta.square().flatten(1).sum(1) / 2
    leaf = kept[0].detach().requires_grad_()
    with Saved(leaf, *condition.tensors.values(), *weights) as generated:
        images = backend.generate(leaf, condition)
    found = {part: counter.part(part, ()).saved * ROWS for part in (F, GENERATOR, DECODER)}
    assert all(output.requires_grad for output in (*kept, images))  # and their graphs live
    assert found[F] == pytest.approx(f.size, rel=0.05)
    assert found[GENERATOR] + found[DECODER] == pytest.approx(generated.size, rel=0.05)
    assert counter.need((), ROWS, find_card("l4")).saved == {
        **found,
        "rewards": counter.part("rewards", ()).saved * ROWS,
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("StableDiffusion3Pipeline", "bfloat16"),
        ("StableDiffusion3Pipeline", "float16"),  # T5 keeps some of its weights in single precision, in this type alone
        ("QwenImagePipeline", "float32"),
        ("Flux2KleinPipeline", "float32"),  # whose last layer is its embedding
    ],
)
def test_text_encoders_take_what_they_take_when_they_are_loaded(name, dtype, folder):
    options = BACKENDS["diffusers"].options(**settings(name, folder(name), dtype=dtype))
    pipe, _, _ = load_pipeline("diffusers", None, options)
    encoders = [pipe.components[part] for part in pipe.components if part.startswith("text_encoder")]
    real = sum(parameter.nbytes for encoder in encoders for parameter in encoder.parameters())
    assert encoders_size(component_configs(options.model_id)[1], getattr(torch, dtype)) == real


@pytest.mark.parametrize("model_id", PUBLISHED_MODELS)
def test_published_text_encoders_have_the_published_number_of_parameters(model_id):
    model = PUBLISHED_MODELS[model_id]
    assert encoders_size(model.components, torch.float32) / 4 == pytest.approx(model.encoders, rel=0.005)


def test_a_decoder_that_keeps_features_in_a_list_is_counted_when_it_is_recomputed(folder):
    config = planned("QwenImagePipeline", folder, "vae_checkpointing")
    counter = Counter(config)
    backend = backend_factory("diffusers").load(config.options)
    noise, condition = noise_for(backend, ROWS).requires_grad_(), backend.encode(PROMPTS)
    backend.generate(noise, condition)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        images = backend.generate(noise, condition)
    events = profile.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert images.requires_grad
    found = sum(counter.part(part, ()).saved for part in (GENERATOR, DECODER)) * ROWS
    assert found == pytest.approx(held, rel=0.05)
    assert counter.part(DECODER, ()).backward > counter.part(DECODER, ()).saved


def test_prompts_are_encoded_beside_what_is_loaded_by_then_and_must_fit_too(folder):
    # a held-out reward is reported alone, and on the card all the time
    config = replace(planned("ZImagePipeline", folder), heldout={"clipscore": RewardSpec()})
    card = find_card("h100")
    counter = Counter(config)
    need = plan_training(config, card, counter=counter).need
    assert need.weights["held-out rewards"] == pytest.approx(4 * 986.1e6, rel=0.01)  # CLIP ViT-H/14 in float32
    loaded = sum(need.weights[name] for name in ("network", "decoder", "rewards", "held-out rewards", "LoRA"))
    encoders = encoders_size(component_configs(config.options.model_id)[1], torch.float32)
    assert encoders > 0
    assert need.encoding == loaded + encoders
    without = Counter(replace(config, heldout={})).need((), need.micro, card)
    assert need.peak - without.peak == need.weights["held-out rewards"]
    # encoders so large that a step fits where they do not: no option of a step is a cure
    counter.skeleton(())
    counter._skeletons[()] = replace(counter.skeleton(()), encoders=need.peak)
    tight = plan_training(config, replace(card, memory=need.peak + 1 + RESERVED), counter=counter)
    assert tight.need.peak + RESERVED < tight.card.memory
    assert not tight.fits
    assert not tight.cures
    assert "Encoding the prompts takes" in as_text(tight)


def test_every_backend_of_a_published_model_has_its_sizes():
    named = {factory.options().model_id for factory in BACKENDS.values() if factory.name != "digits"} - {""}
    assert named == set(PUBLISHED_MODELS)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("ChromaPipeline", {}, "no plan for a ChromaPipeline: plans are made of SanaSprintPipeline, "),
        ("QwenImagePipeline", {"timesteps": (999,)}, "QwenImagePipeline takes no timesteps: leave them out"),
        ("StableDiffusionXLPipeline", {"scheduler": "Nonsense"}, "diffusers has no scheduler of that name"),
        ("StableDiffusionXLPipeline", {"size": 7}, r"refused a call with .*divisible by 8"),
        ("StableDiffusionXLPipeline", {"guidance": 5.0}, r"refused a call with|encodes more texts"),
    ],
)
def test_an_option_that_the_base_lacks_and_a_base_that_cannot_be_followed_are_one_line(name, changes, line, folder):
    config = planned(name, folder)
    with pytest.raises(InputError, match=line) as refused:
        plan_training(replace(config, options=replace(config.options, **changes)), find_card("h100"))
    assert "\n" not in str(refused.value)


UNREADABLE = r"its configuration is damaged|is not a readable model"
DAMAGES = {
    "vae/config.json": (None, "the configuration of its vae is not there"),
    "unet/config.json": ("{", UNREADABLE),
    "text_encoder/config.json": ('{"hidden_size": "wide"}', UNREADABLE),
    "scheduler/scheduler_config.json": ("[]", UNREADABLE),
    "model_index.json": ("[]", UNREADABLE),
}


@pytest.mark.parametrize("damaged", DAMAGES)
def test_a_damaged_configuration_is_one_line(damaged, folder, tmp_path):
    model, (text, said) = tmp_path / "model", DAMAGES[damaged]
    shutil.copytree(folder("StableDiffusionXLPipeline"), model)
    config = planned("StableDiffusionXLPipeline", lambda _: model)
    (model / damaged).unlink() if text is None else (model / damaged).write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        plan_training(config, find_card("h100"))
    assert "\n" not in str(refused.value)


def test_one_of_several_processes_says_the_plan_and_needs_no_weights(folder, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(
        folder("ZImagePipeline"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*")
    )
    options = settings("ZImagePipeline", model)
    words = [word for key, value in options.items() for word in ("--set", f"backend.{key}={json.dumps(value)}")]
    command = ["train", "--backend", "diffusers", "--reward", "redness=1", "--plan", "--json", "--batch", "2", *words]
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            app(command)
        assert ended.value.code == 0
        printed.append(capsys.readouterr().out)
    assert json.loads(printed[0])["processes"] == 2
    assert not printed[1]
