"""What is known of each family from its tests: its row in the table of docs/families.md is written from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What the tests of a family run, and what they know does not work.

    Attributes:
        models: distilled models of the class.
        steps: sampler steps at which f = 0 gives the plain images bit for bit.
        schedule: `timesteps`, `sigmas`, both or neither: what the class takes.
        lora: whether the class loads LoRAs.
        exact: images of f = 0 are bit-equal to the plain pipeline's; else equal up to rounding.
        slow: its tests run with `-m slow` alone.
        note: what is special, and what does not work and why.
    """

    models: str
    steps: tuple[int, ...] = (1, 2, 4)
    schedule: str = "sigmas"
    lora: bool = True
    exact: bool = True
    slow: bool = False
    note: str = ""


FACTS: dict[str, Facts] = {
    "SanaSprintPipeline": Facts(
        "SANA-Sprint 0.6B, 1.6B (`sana`, `sana-1.6b`)", schedule="timesteps",
        note="f is given timestep 1, as in the paper's code, where the scheduler's rounded pi/2 makes 1.0000037",
    ),
    "StableDiffusionPipeline": Facts("SD-Turbo (`sd-turbo`), LCM-LoRA, Hyper-SD15", schedule="both"),
    "FluxPipeline": Facts("FLUX.1-schnell (`flux`), FLUX.1-dev with Hyper or Turbo LoRAs"),
    "StableDiffusionXLPipeline": Facts(
        "SDXL-Turbo (`sdxl-turbo`), SDXL-Lightning (`sdxl-lightning`), Hyper-SDXL, DMD2", schedule="both",
        note="DMD2 in one step starts at `timesteps = [399]`, Hyper at `[800]`",
    ),
    "LatentConsistencyModelPipeline": Facts(
        "LCM Dreamshaper (`lcm`)", schedule="timesteps", note="guidance is embedded, 8.5 unless said otherwise"
    ),
    "StableDiffusion3Pipeline": Facts("SD3.5-Large-Turbo (`sd3.5-turbo`)"),
    "Flux2KleinPipeline": Facts("FLUX.2-klein (`flux2-klein`)"),
    "ZImagePipeline": Facts("Z-Image-Turbo (`z-image-turbo`)"),
    "QwenImagePipeline": Facts("Qwen-Image-Lightning (`qwen-image` with `lora`)"),
    "PixArtAlphaPipeline": Facts(
        "PixArt-LCM, PixArt-DMD (`pixart`)", schedule="both", lora=False, note="the learned variance is left out of f"
    ),
    "PixArtSigmaPipeline": Facts("PixArt-Sigma with distilled networks", schedule="both", lora=False),
    "SanaPipeline": Facts("SANA with distilled networks", schedule="both"),
    "ChromaPipeline": Facts(
        "Chroma with distillation LoRAs",
        note="`hypernetwork_checkpointing` is refused: diffusers drops the attention mask in recomputed blocks",
    ),
    "HiDreamImagePipeline": Facts(
        "HiDream-I1-Fast", exact=False, slow=True,
        note="its mixture of experts runs in training mode, without which diffusers drops its gradients; sums have "
        "another order there, so images are equal up to rounding; images are as large as the class says",
    ),
    "AuraFlowPipeline": Facts("AuraFlow with distilled networks"),
    "Lumina2Pipeline": Facts("Lumina-Image 2.0 with distilled networks"),
    "HunyuanDiTPipeline": Facts("HunyuanDiT-distilled", schedule="neither", lora=False),
    "HunyuanImagePipeline": Facts(
        "HunyuanImage-2.1-Distilled", lora=False, note="guidance is embedded (`distilled_guidance_scale`)"
    ),
    "CogView4Pipeline": Facts(
        "CogView4 with distilled networks", schedule="both",
        note="nothing masks shorter prompts: rows of other lengths run in a batch of their own",
    ),
    "OvisImagePipeline": Facts("Ovis-Image with distilled networks", lora=False),
    "BriaPipeline": Facts("Bria with distilled networks", schedule="timesteps", lora=False),
    "WanPipeline": Facts("Wan with distillation LoRAs, one frame", schedule="neither"),
}  # fmt: skip
