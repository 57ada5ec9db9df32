"""The pictures of docs/gallery.md and of the finished adapter in README.md, made anew.

    python docs/gallery.py           run the commands and take the pictures (a few minutes; needs Chromium)
    python docs/gallery.py bundled   only the images of the bundled adapter

Reports are opened in headless Chromium at the width of a desk and of a telephone, cut to their head, and stored with
few colours, so that the pictures stay small.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GALLERY, BUNDLED = ROOT / "docs" / "gallery", ROOT / "docs" / "results" / "bundled.png"
MAP = """
import torch

torch.manual_seed(0)
f = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16)).double()
for layer in (f[0], f[2]):
    torch.nn.init.orthogonal_(layer.weight, gain=0.8)
"""
RUNS = {
    "toys": ("verify-bound",),
    "map": ("verify-bound", "--map", "mymaps:f", "--shape", "16"),
    "training": ("train", "--backend", "digits", "--steps", "40", "--set", "train.validate_every=20",
                 "--set", "train.measure_every=20"),
    "comparison": ("compare", "--backend", "digits", "--quick", "--adapter", "bundled",
                   "--methods", "base,hypernoise,best-of-2,best-of-4,best-of-n,reno"),
    "images": ("generate", "--backend", "digits", "--adapter", "bundled", "--prompt", "a red three",
               "--prompt", "a blue seven and a green one"),
}  # fmt: skip
"""Name of a picture -> the command whose report it shows."""
WIDTHS = {"wide": (1280, 1500), "narrow": (400, 1500)}
_COLOURS = 128
PROMPTS = (
    "a red three",
    "a blue seven and a green one",
    "two fives",
    "a four right of a nine",
    "a cyan zero",
    "three twos",
)


def browser() -> str:
    """Chromium's command."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise SystemExit("no Chromium: install one (apt-get install chromium)")


def picture(page: Path, width: int, height: int) -> bytes:
    """The head of a page at this width, with few colours, as the bytes of a PNG file."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}")
        command = [browser(), *flags, f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image, buffer = Image.open(shot).convert("RGB"), io.BytesIO()
    if width > 800:
        image = image.resize((width * 3 // 4, height * 3 // 4), Image.Resampling.LANCZOS)
    # median cut would spend the palette on shades of the page, and turn a blue digit grey
    few = image.quantize(_COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def bundled_images() -> bytes:
    """Base and steered images of the bundled adapter from the same noise, enlarged, with the judge's verdicts."""
    import torch

    from hnkit.adapters import load_trained, named_adapter
    from hnkit.backend import image_noise, steer
    from hnkit.maps import Condition
    from hnkit.output.plots import image_grid, style, to_png

    backend, _ = load_trained("digits", named_adapter("digits", "bundled"))
    condition = backend.encode(PROMPTS).of_images(0, range(len(PROMPTS)))
    noise = image_noise(backend, Condition(PROMPTS).of_images(0, range(len(PROMPTS))))
    with torch.no_grad():
        made = {"base": backend.generate(noise, condition), "+ HyperNoise": steer(backend, noise, condition, 1).images}
    assert backend.judge is not None
    judge = backend.judge
    marks = {name: [bool(right) for right in judge(images, PROMPTS)] for name, images in made.items()}
    with style():
        rows = {name: list(images.permute(0, 2, 3, 1).numpy()) for name, images in made.items()}
        return to_png(image_grid(rows, PROMPTS, marks))


def main() -> int:
    """Make the pictures."""
    BUNDLED.write_bytes(bundled_images())
    if sys.argv[1:] == ["bundled"]:
        return 0
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mymaps.py").write_text(MAP)
        for name, arguments in RUNS.items():
            command = [sys.executable, "-m", "hnkit", *arguments, "--out", name]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            for kind, (width, height) in WIDTHS.items():
                png = picture(Path(folder) / name / "report.html", width, height)
                (GALLERY / f"{name}-{kind}.png").write_bytes(png)
                print(f"{name}-{kind}.png: {len(png) // 1024} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
