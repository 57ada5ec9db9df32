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
        attached: other classes over the same network in which its adapters are tested, as `attach` takes them.
        exact: images of f = 0 are bit-equal to the plain pipeline's; else equal up to rounding.
        note: what is special, and what does not work and why.
    """

    models: str
    steps: tuple[int, ...] = (1, 2, 4)
    schedule: str = "sigmas"
    lora: bool = True
    attached: tuple[str, ...] = ()
    exact: bool = True
    note: str = ""


FACTS: dict[str, Facts] = {
    "SanaSprintPipeline": Facts(
        "SANA-Sprint 0.6B, 1.6B (`sana`, `sana-1.6b`)", schedule="timesteps",
        note="f is given timestep 1, as in the paper's code, where the scheduler's rounded pi/2 makes 1.0000037",
        attached=("SanaSprintImg2ImgPipeline",),
    ),
    "StableDiffusionPipeline": Facts(
        "SD-Turbo (`sd-turbo`), LCM-LoRA, Hyper-SD15", schedule="both",
        attached=("StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"),
    ),
    "FluxPipeline": Facts(
        "FLUX.1-schnell (`flux`), FLUX.1-dev with Hyper or Turbo LoRAs",
        attached=("FluxImg2ImgPipeline", "FluxControlNetPipeline"),
    ),
    "StableDiffusionXLPipeline": Facts(
        "SDXL-Turbo (`sdxl-turbo`), SDXL-Lightning (`sdxl-lightning`), Hyper-SDXL, DMD2", schedule="both",
        note="DMD2 in one step starts at `timesteps = [399]`, Hyper at `[800]`",
        attached=(
            "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
        ),
    ),
    "LatentConsistencyModelPipeline": Facts(
        "LCM Dreamshaper (`lcm`)", schedule="timesteps", note="guidance is embedded, 8.5 unless said otherwise",
        attached=("LatentConsistencyModelImg2ImgPipeline",),
    ),
    "StableDiffusion3Pipeline": Facts(
        "SD3.5-Large-Turbo (`sd3.5-turbo`)",
        attached=("StableDiffusion3Img2ImgPipeline", "StableDiffusion3ControlNetPipeline"),
    ),
    "Flux2KleinPipeline": Facts(
        "FLUX.2-klein (`flux2-klein`)",
        attached=("Flux2KleinInpaintPipeline",),
    ),
    "ZImagePipeline": Facts(
        "Z-Image-Turbo (`z-image-turbo`)",
        attached=("ZImageImg2ImgPipeline",),
    ),
    "QwenImagePipeline": Facts(
        "Qwen-Image-Lightning (`qwen-image`)",
        attached=("QwenImageImg2ImgPipeline", "QwenImageControlNetPipeline"),
    ),
    "PixArtAlphaPipeline": Facts(
        "PixArt-LCM, PixArt-DMD (`pixart`)", schedule="both", lora=False, note="the learned variance is left out of f"
    ),
    "PixArtSigmaPipeline": Facts("PixArt-Sigma with distilled networks", schedule="both", lora=False),
    "SanaPipeline": Facts("SANA with distilled networks", schedule="both"),
    "ChromaPipeline": Facts(
        "Chroma with distillation LoRAs",
        note="checkpointing of f or generator is refused: diffusers drops the attention mask in recomputed blocks",
        attached=("ChromaImg2ImgPipeline",),
    ),
    "HiDreamImagePipeline": Facts(
        "HiDream-I1-Fast", exact=False,
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


@dataclass(frozen=True)
class Setting:
    """How a published model is called, and where that was read: its files could not be opened here.

    Attributes:
        model: as it is known.
        backend: the name that has it by default; empty: it needs `options`.
        hub: repository of the pipeline.
        steps: sampler steps that it was distilled for.
        guidance: the guidance scale at which no classifier-free guidance runs, or the embedded one.
        options: what is set beside the model, as the backend has it or as `--set backend....` gives it.
        read: where it was read; what is from memory is said to be.
    """

    model: str
    backend: str
    hub: str
    steps: str
    guidance: float
    options: str
    read: str


_XL = "stabilityai/stable-diffusion-xl-base-1.0"
SETTINGS = (
    Setting(
        "SANA-Sprint 0.6B", "sana", "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", "1 to 4", 4.5, "",
        "diffusers' page of the class",
    ),
    Setting(
        "SANA-Sprint 1.6B", "sana-1.6b", "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "1 to 4", 4.5, "",
        "diffusers' page of the class",
    ),
    Setting("SD-Turbo", "sd-turbo", "stabilityai/sd-turbo", "1 to 4", 0.0, "", "arXiv 2508.09968 and its code"),
    Setting("FLUX.1-schnell", "flux", "black-forest-labs/FLUX.1-schnell", "1 to 4", 0.0, "", "arXiv 2508.09968"),
    Setting("SDXL-Turbo", "sdxl-turbo", "stabilityai/sdxl-turbo", "1 to 4", 0.0, "", "diffusers' guide of the model"),
    Setting(
        "SDXL-Lightning", "sdxl-lightning", _XL, "4", 0.0,
        "network_id=ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors, scheduler=EulerDiscreteScheduler, "
        "scheduler_config=timestep_spacing=trailing", "its model card",
    ),
    Setting(
        "Hyper-SDXL", "", _XL, "1", 0.0,
        "network_id=ByteDance/Hyper-SD/Hyper-SDXL-1step-Unet.safetensors, scheduler=LCMScheduler, timesteps=800",
        "its list of files and its node for ComfyUI; the scheduler from memory",
    ),
    Setting(
        "DMD2", "", _XL, "4", 0.0,
        "lora=tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors, scheduler=LCMScheduler, timesteps=999,749,499,249",
        "code that quotes its model card",
    ),
    Setting(
        "DMD2", "", _XL, "1", 0.0,
        "network_id=dmd2_sdxl_1step_unet_fp16.bin stored as safetensors, scheduler=LCMScheduler, timesteps=399",
        "code that quotes its model card",
    ),
    Setting(
        "LCM Dreamshaper", "lcm", "SimianLuo/LCM_Dreamshaper_v7", "4 to 8", 8.5, "",
        "diffusers' class: 8.5 is its default, and its example has 8.0",
    ),
    Setting(
        "SD3.5-Large-Turbo", "sd3.5-turbo", "stabilityai/stable-diffusion-3.5-large-turbo", "4", 0.0, "",
        "the publisher's demonstration",
    ),
    Setting(
        "Z-Image-Turbo", "z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", "8", 0.0, "",
        "diffusers' class: 8 steps, which its page still calls 9",
    ),
    Setting(
        "FLUX.2-klein 4B", "flux2-klein", "black-forest-labs/FLUX.2-klein-4B", "4", 1.0, "",
        "its `model_index.json`: `is_distilled`, so no guidance runs at any scale; the steps from memory",
    ),
    Setting(
        "Qwen-Image-Lightning", "qwen-image", "Qwen/Qwen-Image", "4", 1.0,
        "lora=lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-4steps-V2.0.safetensors, "
        "scheduler_config=base_shift=ln 3, max_shift=ln 3, shift_terminal=null", "its model card and its list of files",
    ),
    Setting(
        "PixArt-LCM", "pixart", "PixArt-alpha/PixArt-LCM-XL-2-1024-MS", "2 to 8", 0.0, "",
        "its list of files; steps and guidance from memory",
    ),
)  # fmt: skip
