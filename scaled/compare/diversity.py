"""How different the images of one prompt are over noise seeds: pixel distance, DINO similarity, LPIPS.

The last two need weights that the user gives; nothing is downloaded for them unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.maps import slices
from hnkit.scaled.internal.hub import pretrained
from hnkit.scaled.rewards.weights import load_strict, read_state_dict

Metric = Callable[[Tensor], float]
"""Mean over all pairs of the images `(k, 3, H, W)` in [0, 1] of one prompt."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixel_distance(images: Tensor) -> float:
    """Root-mean-square difference of two images, averaged over all pairs; 0 if all images are equal."""
    flat = images.flatten(1).double()
    distances = torch.pdist(flat) / flat.shape[1] ** 0.5
    return float(distances.mean())


class DinoSimilarity:
    """Cosine of the CLS states of a DINO vision transformer, averaged over pairs; higher is less diverse."""

    def __init__(
        self, model_id: str | Path, *, size: int = 224, device: str = "cpu", local_files_only: bool = True
    ) -> None:
        from transformers import AutoModel

        what = "DINO similarity"
        model = pretrained(AutoModel.from_pretrained, model_id, what=what, local_files_only=local_files_only)
        self.model: nn.Module = model.eval().requires_grad_(False).float().to(device)
        self.size = size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> float:
        """The mean cosine over pairs."""
        pixels = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = pixels.new_tensor(_IMAGENET_MEAN).view(3, 1, 1), pixels.new_tensor(_IMAGENET_STD).view(3, 1, 1)
        states = self.model(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]
        unit = F.normalize(states.double(), dim=1)
        above = torch.triu_indices(len(unit), len(unit), offset=1)
        return float((unit[above[0]] * unit[above[1]]).sum(1).mean())


class Lpips(nn.Module):
    """LPIPS on AlexNet (arXiv 1801.03924), averaged over pairs; higher is more diverse.

    The weights are one safetensors file with the convolutions `features.{0,3,6,8,10}.{weight,bias}` of AlexNet and the
    linear heads `lin{0..4}.weight` of shape `(1, c, 1, 1)`.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        what, weights = "LPIPS", Path(weights)
        if not weights.is_file():
            raise InputError(f"{what}: {weights} is not a file: give a safetensors file with AlexNet and LPIPS weights")
        convolutions = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1),
                        (10, 256, 256, 3, 1, 1))  # fmt: skip
        self.features = nn.ModuleDict(
            {str(i): nn.Conv2d(a, b, kernel, stride, padding) for i, a, b, kernel, stride, padding in convolutions}
        )
        for number, (_, _, width, *_) in enumerate(convolutions):
            setattr(self, f"lin{number}", nn.Conv2d(width, 1, 1, bias=False))
        load_strict(self, read_state_dict(weights, what=what), what=what)
        self.requires_grad_(False).eval()

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The five channel-normalised feature maps of images in [0, 1]."""
        x = images.float() * 2 - 1
        shift, scale = x.new_tensor((-0.030, -0.088, -0.188)), x.new_tensor((0.458, 0.448, 0.450))
        x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
        for number, layer in enumerate(self.features.values()):
            if number in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(layer(x))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    @torch.no_grad()
    def distances(self, first: Tensor, second: Tensor) -> Tensor:
        """LPIPS of pairs of images `(k, 3, H, W)`: `(k,)`."""
        total = first.new_zeros(len(first), dtype=torch.float32)
        for number, (a, b) in enumerate(zip(self.stages(first), self.stages(second), strict=True)):
            head = getattr(self, f"lin{number}")
            total = total + head((a - b).square()).mean(dim=(1, 2, 3))
        return total

    def forward(self, images: Tensor) -> float:
        """The mean over pairs."""
        above = torch.triu_indices(len(images), len(images), offset=1)
        chunks = [
            self.distances(images[above[0, pairs]], images[above[1, pairs]]) for pairs in slices(above.shape[1], 64)
        ]
        return float(torch.cat(chunks).double().mean())
