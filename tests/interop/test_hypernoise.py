"""The paper's own code: github.com/ExplainableML/HyperNoise at bbe3ab4f9e2df89d4ccdd468acdd5246afde5e56.

Rules read there, in our words:

- `models/utils.py` 93 to 127: LoRA goes on every linear layer and convolution of the transformer by its full name,
  depthwise convolutions among them; `main.py` 120 to 126: rank r, alpha a whole multiple of it, `init_lora_weights`
  gaussian, put on by diffusers' `add_adapter` under the name `hypernoise_adapter`.
- `models/utils.py` 130 to 166: the layer `proj_out` then returns `B A x` times alpha / r alone.
- `training/trainer.py` 461 to 481: what is saved is `get_peft_model_state_dict` by `torch.save` as `adapter_model.bin`,
  in bfloat16, and peft's own configuration; the base model's name stays empty.
- `training/trainer.py` 631 to 645: prompts are encoded by `encode_prompt(prompt, device=...)`, whose default is no
  instruction; the transformer gets the noise, timestep 1 and guidance 4.5 times the configured scale.
- `training/optim.py` 8 to 35, `scripts/*.sh`: optimisers, and a warm-up counted in processes (tests of the presets).
- `sana_inference.py` 99 to 120: `intermediate_timesteps=None` at any number of steps.

peft and diffusers are run as that code runs them.
"""

from __future__ import annotations

import json

import diffusers
import peft
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

from hnkit.backend import backend_factory
from hnkit.scaled.attach import attach
from hnkit.scaled.pipelines.families.sana import SanaOptions
from tests.scaled import tiny
from tests.scaled.conftest import noise_for

NAME = "hypernoise_adapter"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build("sana", tmp_path_factory.mktemp("sana") / "model")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A folder as the trainer writes it, and f of the trainer's own transformer on some noises and prompts."""
    pipe = diffusers.SanaSprintPipeline.from_pretrained(model)
    network = pipe.transformer
    targets = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    depthwise = {module: module.groups for module in network.modules() if getattr(module, "groups", 1) > 1}
    assert depthwise
    for module in depthwise:  # the peft of the published environment made dense LoRA convolutions beside these
        module.groups = 1
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=sorted(targets))
    network.add_adapter(config, adapter_name=NAME)
    for layer in network.modules():
        if isinstance(layer, peft.tuners.lora.Conv2d) and layer.base_layer in depthwise:
            layer.base_layer.groups = depthwise[layer.base_layer]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if "lora_" in key:  # trained weights, at the precision that the trainer holds them in
                value.copy_((0.2 * torch.randn(value.shape, generator=generator)).bfloat16())
    last = network.get_submodule("proj_out")
    last.forward = lambda x: last.lora_B[NAME](last.lora_A[NAME](x)) * last.scaling[NAME]

    folder = tmp_path_factory.mktemp("hypernoise") / "final_model"
    folder.mkdir()
    state = {key: value.bfloat16() for key, value in get_peft_model_state_dict(network, adapter_name=NAME).items()}
    torch.save(state, folder / "adapter_model.bin")
    network.peft_config[NAME].save_pretrained(folder)

    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    prompts = tiny.PROMPTS[:3]
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(prompts, device="cpu")
        guidance = torch.full([3], 4.5) * network.config.guidance_embeds_scale
        delta = network(
            hidden_states=noise, encoder_hidden_states=embeds, encoder_attention_mask=mask, guidance=guidance,
            timestep=torch.tensor([1.0]),
        ).sample  # fmt: skip
    return folder, noise, prompts, delta


def test_what_the_trainer_writes_is_what_we_take_it_for(trained):
    folder, *_ = trained
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert all(not key.startswith("base_model") and NAME not in key for key in state)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert config["base_model_name_or_path"] is None
    assert any("conv_depth" in key for key in state)


def test_an_adapter_of_the_published_trainer_is_read_and_is_its_f(trained, model):
    folder, noise, prompts, delta = trained
    factory = backend_factory("sana")
    recorded = factory.recorded(folder)
    assert recorded == {"rank": 4, "lora_alpha": 8.0, "instruction": False}
    backend = factory.load(factory.options(**tiny.options("sana", model) | recorded))
    backend.load_adapter(folder)
    assert len(backend._spec.targets) == len({key.rsplit(".lora_", 1)[0] for key in _state(folder)})
    with torch.no_grad():
        found = backend.hypernetwork(noise, backend.encode(prompts))
    assert float(delta.abs().max()) > 0.1
    torch.testing.assert_close(found, delta, atol=1e-5, rtol=1e-4)


def test_suffixes_of_layer_names_as_peft_shortens_them(trained, model, tmp_path):
    """With many targets peft writes the shortest suffixes that tell them apart; the weights name the layers in full."""
    folder, noise, prompts, delta = trained
    short = tmp_path / "short"
    short.mkdir()
    (short / "adapter_model.bin").write_bytes((folder / "adapter_model.bin").read_bytes())
    document = json.loads((folder / "adapter_config.json").read_text())
    names = {name.rsplit(".", 1)[-1] for name in document["target_modules"]}
    (short / "adapter_config.json").write_text(json.dumps(document | {"target_modules": sorted(names)}))
    factory = backend_factory("sana")
    backend = factory.load(factory.options(**tiny.options("sana", model)))
    backend.load_adapter(short)
    with torch.no_grad():
        torch.testing.assert_close(backend.hypernetwork(noise, backend.encode(prompts)), delta, atol=1e-5, rtol=1e-4)


def test_attached_it_makes_the_images_of_the_published_inference(trained, model):
    """Four steps without a middle timestep, latents moved by f, prompts without the instruction."""
    folder, noise, prompts, delta = trained
    pipe = diffusers.SanaSprintPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = pipe.encode_prompt(prompts, device="cpu")
    call = {
        "num_inference_steps": 4, "intermediate_timesteps": None, "output_type": "pt", "height": 32, "width": 32,
        "use_resolution_binning": False, "return_dict": False,
    }  # fmt: skip
    expected = pipe(
        latents=noise + delta, prompt_embeds=embeds, prompt_attention_mask=mask,
        generator=torch.Generator().manual_seed(1), **call,
    )[0]  # fmt: skip
    steered = attach(pipe, folder)
    found = steered(prompts, latents=noise, generator=torch.Generator().manual_seed(1), **call)[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("middle", [0.0, 1.3, 0.9])
def test_the_middle_timestep_is_an_option(steps, middle, model):
    """0 is the published inference; the pipeline's own default takes 1.3 at two steps, and nothing else has one."""
    factory = backend_factory("sana")
    backend = factory.load(factory.options(**tiny.options("sana", model, intermediate_timestep=middle)))
    condition, noise = backend.encode(tiny.PROMPTS[:1]), noise_for(backend, 1)
    plain = diffusers.SanaSprintPipeline.from_pretrained(model)
    plain.set_progress_bar_config(disable=True)
    with torch.no_grad():
        found = backend.generate(noise, condition, steps, generator=torch.Generator().manual_seed(0))
    expected = plain(
        prompt_embeds=condition.tensors["prompt_embeds"],
        prompt_attention_mask=condition.tensors["prompt_attention_mask"],
        latents=noise, num_inference_steps=steps, height=32, width=32, use_resolution_binning=False, output_type="pt",
        intermediate_timesteps=(middle or None) if steps == 2 else None, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("value", [-0.1, 1.6, float("nan")])
def test_a_middle_timestep_outside_the_samplers_range_is_refused(value):
    with pytest.raises(ValueError, match="between 0 and pi/2"):
        SanaOptions(intermediate_timestep=value)


def _state(folder):
    return torch.load(folder / "adapter_model.bin", weights_only=True)


def test_the_documents_name_the_published_noise_and_have_one_table_of_departures():
    """`training/trainer.py` draws one noise a step for all its prompts: `train.noise = "step"` here."""
    import typing
    from pathlib import Path

    from hnkit.config import TrainConfig

    page = (Path(__file__).parents[2] / "docs" / "real-models.md").read_text(encoding="utf-8")
    assert page.count("Where hnkit departs from the published code") == 1
    (row,) = (line for line in page.splitlines() if line.startswith("| noise in training |"))
    for choice in typing.get_args(typing.get_type_hints(TrainConfig)["noise"]):
        assert f'"{choice}"' in row
