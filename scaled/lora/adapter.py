"""Adapters on disk: peft's two files, strict on reading.

`adapter_model.safetensors` has peft's keys (`base_model.model.<layer>.lora_A.weight`); `adapter_config.json` is a LoRA
configuration that plain peft reads, with a block `hnkit` for what peft has no word for: the zero-base last layer, the
base the weights belong to, the options that change what f is given, and checksums. Nothing is ignored on reading:
whatever does not fit is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hnkit.adapters import adapter_folder
from hnkit.errors import InputError
from hnkit.injection import NoiseInjection, read_injection
from hnkit.internal.files import LARGEST, atomic_write, machine_memory, read_plain, read_tensor_file
from hnkit.internal.values import reason_of, shown, typed_value
from hnkit.scaled.lora.base import BaseFiles, base_class, base_record, other_base
from hnkit.scaled.lora.twin import LoraSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED = "adapter_model.bin"
"""What the paper's trainer writes in place of `WEIGHTS`: the same tensors by `torch.save`."""
_FORMAT, _INJECTED = 1, 2
"""Formats of the block `hnkit`: the second is that of adapters with injected noise, which older readers would drop."""
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_UNSUPPORTED = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out",
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "monteclora_config", "velora_config", "kasa_config",
)  # fmt: skip
"""Settings of peft's LoRA that change the layers' outputs, or where there is one."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Objective = Literal["hypernoise", "direct"]


@dataclass(frozen=True)
class Adapter:
    """LoRA weights and what they belong to."""

    objective: Objective
    base_model: str
    base: nn.Module = field(repr=False)
    spec: LoraSpec
    zero_base: str | None
    """The layer whose frozen weight and bias the hypernetwork leaves out; `None` for direct fine-tuning."""
    guidance: float
    weights: Mapping[str, Tensor] = field(repr=False)
    """By `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    """Options that change what f is given, by name; empty where nothing is recorded."""
    injection: NoiseInjection | None = None
    """How f is deployed, as it was trained."""
    base_files: BaseFiles | None = None
    """What the base was loaded from; `None`: it is not known."""
    pipeline_class: str = ""
    """The class of the pipeline that it was trained on; empty where nothing is recorded."""


def write_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write an adapter to a new or empty folder; the configuration comes last, so that its presence means complete.

    Raises:
        InputError: the folder is not empty, or cannot be written.
    """
    folder = Path(folder)
    weights = save(
        {_PREFIX + key: value.detach().cpu().contiguous() for key, value in adapter.weights.items()},
        metadata={"format": "pt"},
    )
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.spec.rank,
        "lora_alpha": adapter.spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "inference_mode": True,
        "target_modules": list(adapter.spec.targets),
        "hnkit": {
            "format": _FORMAT if adapter.injection is None else _INJECTED,
            "objective": adapter.objective,
            "zero_base_layer": adapter.zero_base,
            "guidance": adapter.guidance,
            "conditioning": dict(adapter.conditioning),
            **base_record(adapter.base, adapter.base_files),
            "pipeline_class": adapter.pipeline_class,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            **({} if adapter.injection is None else {"injection": asdict(adapter.injection)}),
        },
    }
    config["hnkit"]["config_sha256"] = _config_checksum(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and is not overwritten: save the adapter to a new folder")
        atomic_write(folder / WEIGHTS, weights)
        atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"the adapter cannot be written to {folder}: {error.strerror}") from error


def read_adapter(folder: str | Path, expected: Adapter) -> Adapter:
    """Read an adapter for the place that `expected` describes.

    Accepts what `write_adapter` wrote and, for noise hypernetworks, what the paper's code publishes and writes: peft's
    files without the block `hnkit`, keys with or without `base_model.model.` and with or without an adapter name, LoRA
    on depthwise convolutions too, as safetensors or as `adapter_model.bin`, of which nothing but tensors is unpickled.

    Args:
        folder: the folder of the adapter, or the run folder that holds it.
        expected: rank, base and objective of the place; of an adapter without the block, guidance and conditioning.

    Raises:
        InputError: a file is missing, truncated or altered; a key is missing or unknown; rank, shapes, base model or
            objective differ from `expected`; a value is not finite.
    """
    files = _read_files(Path(folder))
    folder, config = files.folder, files.config
    rank, alpha = _lora_fields(folder, config)
    block = config.get("hnkit")
    guidance, conditioning, injection = expected.guidance, expected.conditioning, None
    if block is not None:
        guidance = _check_block(files, block, expected)
        conditioning = block.get("conditioning", {})
        injection = read_injection(block.get("injection"), folder / CONFIG)
    elif expected.objective != "hypernoise":
        raise InputError(f"{folder} does not say that it is a direct fine-tuning adapter: hnkit wrote none there")
    if (rank, alpha) != (expected.spec.rank, expected.spec.alpha):
        raise InputError(
            f"{folder} has rank {rank} and alpha {alpha:g}, this backend {expected.spec.rank} and"
            f" {expected.spec.alpha:g}: set backend.rank = {rank} and backend.lora_alpha = {alpha:g}"
        )
    weights = _weights(files, rank)
    layers = {key.rsplit(".lora_", 1)[0] for key in weights}
    _check_layers(folder, layers, expected)
    _check_shapes(files, weights, layers, rank, expected.base)
    return Adapter(
        objective=expected.objective,
        base_model=str(config.get("base_model_name_or_path") or expected.base_model),
        base=expected.base,
        spec=LoraSpec(rank, alpha, tuple(sorted(layers))),
        zero_base=expected.zero_base,
        guidance=guidance,
        weights=weights,
        conditioning=conditioning,
        injection=injection,
        base_files=_recorded_files(block),
        pipeline_class=expected.pipeline_class,
    )


def _recorded_files(block: Any) -> BaseFiles | None:
    if not isinstance(block, dict) or not isinstance(block.get("base_sha256"), str):
        return None
    precision = block.get("base_precision")
    return BaseFiles(block["base_sha256"], precision if isinstance(precision, str) else None)


def adapter_options(
    folder: str | Path, conditioning: Mapping[str, type] | None = None, published: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The backend options that an adapter records: rank, lora_alpha, model_id and, by hnkit, guidance and more.

    Args:
        folder: the folder of the adapter, or the run folder that holds it.
        conditioning: names and types of the options that change what f is given.
        published: those of an adapter without hnkit's block.

    Raises:
        InputError: the files are missing or damaged, the weights have another rank than their configuration, or a
            value is of another type than its option.
    """
    files = _read_files(Path(folder))
    rank, alpha = _lora_fields(files.folder, files.config)
    _weights(files, rank)  # what a configuration claims is held against its weights before anything is allocated
    options: dict[str, Any] = {"rank": rank, "lora_alpha": alpha}
    base, block = files.config.get("base_model_name_or_path"), files.config.get("hnkit")
    if isinstance(base, str) and base:
        options["model_id"] = base
    if not isinstance(block, dict):
        return options | dict(published or {})
    where = files.folder / CONFIG
    if block.get("guidance") is not None:  # of whatever type: what f was trained at is never left to a default
        options["guidance"] = typed_value(block["guidance"], float, f"{where} guidance")
    recorded = typed_value(block.get("conditioning", {}), dict, f"{where} conditioning")
    for name, kind in (conditioning or {}).items():
        if recorded.get(name) is not None:
            options[name] = typed_value(recorded[name], kind, f"{where} {name}")
    return options


def adapter_block(folder: str | Path) -> dict[str, Any]:
    """What hnkit recorded in an adapter beside peft's settings; empty where it wrote none.

    Raises:
        InputError: the files are missing or damaged.
    """
    block = _read_files(Path(folder)).config.get("hnkit")
    return block if isinstance(block, dict) else {}


@dataclass(frozen=True)
class _Files:
    """The two files of an adapter as they lie in its folder."""

    folder: Path
    config: dict[str, Any]
    data: bytes
    name: str
    """Of the file of weights."""

    @property
    def weights(self) -> Path:
        """Path of the file of weights, for messages."""
        return self.folder / self.name

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by the names in the file; nothing but tensors is unpickled."""
        try:
            raw: Any = (
                torch.load(io.BytesIO(self.data), map_location="cpu", weights_only=True)
                if self.name == PICKLED
                else load(self.data)
            )
        except (SafetensorError, UnpicklingError, EOFError, ValueError, LookupError, RuntimeError) as error:
            raise InputError(f"{self.weights} is damaged, or holds more than tensors: {reason_of(error)}") from error
        if not isinstance(raw, Mapping) or not all(
            isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
            for key, value in raw.items()
        ):
            raise InputError(f"{self.weights} holds no tensors by name: it is not the weights of an adapter")
        return raw


def _read_files(folder: Path) -> _Files:
    if not folder.is_dir():
        raise InputError(f"no adapter at {folder}: give the folder that holds {CONFIG} and {WEIGHTS}")
    folder = adapter_folder(folder)
    try:
        config = json.loads(_content(folder / CONFIG))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG}: it is not an adapter, or its saving was interrupted") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG} is damaged: it is not JSON") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} is damaged: it is not a JSON object")
    for name in (WEIGHTS, PICKLED):
        try:
            return _Files(folder, config, _content(folder / name), name)
        except FileNotFoundError:
            continue
    raise InputError(f"{folder} has no {WEIGHTS}: it is missing")


def _content(path: Path) -> bytes:
    try:
        if path.name == WEIGHTS:
            return read_tensor_file(path)
        return read_plain(path, machine_memory() if path.name == PICKLED else LARGEST)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _lora_fields(folder: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG} has peft_type {shown(config.get('peft_type'))}: only LORA is accepted")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{folder / CONFIG} has r = {shown(rank)}: a LoRA rank is a whole number, 1 or more")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 2.0**127:
        raise InputError(f"{folder / CONFIG} has lora_alpha = {shown(alpha)}: it is a number above 0 of float32")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise InputError(f"{folder / CONFIG} uses {used[0]}: hnkit loads plain LoRA only")
    return rank, float(alpha)


def _check_block(files: _Files, block: Any, expected: Adapter) -> float:
    folder, config = files.folder, files.config
    where = folder / CONFIG
    injected = isinstance(block, dict) and block.get("injection") is not None
    if not isinstance(block, dict) or block.get("format") != (_INJECTED if injected else _FORMAT):
        raise InputError(
            f"{where} has an hnkit block of another format: this version reads format {_FORMAT}, and {_INJECTED} with "
            "injected noise"
        )
    if block.get("config_sha256") != _config_checksum(config):
        raise InputError(f"{where} is damaged or was edited: its checksum does not match")
    if block.get("weights_sha256") != hashlib.sha256(files.data).hexdigest():
        raise InputError(f"{files.weights} is damaged: its checksum does not match")
    if block.get("objective") != expected.objective:
        raise InputError(
            f"{folder} is an adapter for objective {block.get('objective')!r},"
            f" this backend is for {expected.objective!r}"
        )
    if block.get("base_class") != base_class(expected.base):
        raise InputError(
            f"{folder} is an adapter of a {block.get('base_class')}, this backend has a {base_class(expected.base)}"
        )
    if difference := other_base(block, expected.base, expected.base_files):
        named, recorded = config.get("base_model_name_or_path"), block.get("conditioning")
        recorded = recorded if isinstance(recorded, dict) else {}
        parts = [f"backend.{name} = {recorded[name]!r}" for name in ("network_id", "lora") if recorded.get(name)]
        cure = (
            f"it was trained with {' and '.join(parts)}: exchange the same in the pipeline, as its README does"
            if parts
            else "set backend.model_id to the folder of the former"
        )
        raise InputError(
            f"{folder} was trained on other weights, {named!r}, than those of {expected.base_model!r} ({difference}):"
            f" {cure}"
        )
    if block.get("zero_base_layer") != expected.zero_base:
        found = block.get("zero_base_layer")
        raise InputError(f"{where} has zero_base_layer {found!r}: {expected.zero_base!r} is expected")
    typed_value(block.get("conditioning", {}), dict, f"{where} conditioning")
    return float(typed_value(block.get("guidance"), float, f"{where} guidance"))


def _weights(files: _Files, rank: int) -> dict[str, Tensor]:
    folder, path = files.folder, files.weights
    weights: dict[str, Tensor] = {}
    for name, value in files.tensors().items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise InputError(f"{path} has the key {name!r}: only lora_A and lora_B weights are accepted")
        key = f"{match['layer']}.lora_{match['side']}.weight"
        if key in weights:
            raise InputError(f"{path} has two tensors for {key!r}")
        if value.dtype not in _DTYPES or value.ndim not in (2, 4):
            raise InputError(f"{path}: {name!r} is no LoRA weight ({value.dtype}, {value.ndim} dimensions)")
        held = value.shape[0 if match["side"] == "A" else 1]
        if held != rank:
            raise InputError(f"{folder}: {name!r} has rank {held}, {CONFIG} says {shown(rank)}")
        if value.nbytes > len(files.data):
            raise InputError(f"{path}: {name!r} claims {value.nbytes} bytes, more than the file has: it is damaged")
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {name!r} has values that are not finite")
        weights[key] = value.float()
    if not weights:
        raise InputError(f"{path} has no LoRA weights: it is not complete")
    return weights


def _check_layers(folder: Path, layers: set[str], expected: Adapter) -> None:
    modules = dict(expected.base.named_modules())
    grouped = {name for name in layers if getattr(modules.get(name), "groups", 1) > 1}
    wanted = set(expected.spec.targets)
    foreign, missing = sorted(layers - grouped - wanted), sorted(wanted - layers)
    if foreign:
        raise InputError(f"{folder} has LoRA for {foreign[0]!r}, which {type(expected.base).__name__} has no place for")
    if missing:
        raise InputError(
            f"{folder} has no LoRA for {missing[0]!r} ({len(missing)} such): it is not complete, or backend.lora_layers"
            " is to say which layers it is for"
        )


def _check_shapes(files: _Files, weights: Mapping[str, Tensor], layers: set[str], rank: int, base: nn.Module) -> None:
    for layer in sorted(layers):
        out, *ins = cast("Tensor", base.get_submodule(layer).weight).shape
        if len(ins) == 1:
            shapes: tuple[tuple[int, ...], ...] = (rank, *ins), (out, rank)
        else:  # the LoRA convolution is dense, also beside a grouped one
            channels = cast("nn.Conv2d", base.get_submodule(layer)).in_channels
            shapes = (rank, channels, *ins[1:]), (out, rank, 1, 1)
        for side, shape in zip("AB", shapes, strict=True):
            key = f"{layer}.lora_{side}.weight"
            if key not in weights:
                raise InputError(f"{files.weights} has no {key!r}: it is not complete")
            if tuple(weights[key].shape) != shape:
                raise InputError(
                    f"{files.folder} is of another base model: {key!r} has shape {tuple(weights[key].shape)},"
                    f" this one needs {shape}"
                )


def _config_checksum(config: Mapping[str, Any]) -> str:
    block = {key: value for key, value in config["hnkit"].items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps({**config, "hnkit": block}, sort_keys=True).encode()).hexdigest()
