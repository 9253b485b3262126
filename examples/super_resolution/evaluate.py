"""Measures SRCNN against Pillow's bicubic enlargement on pictures kept out of training.

Every picture is reduced by 3 with Pillow's bicubic filter, enlarged again by both methods, and compared with the
original. The figure is the PSNR on 8-bit RGB over the whole picture: no border is cropped away. The exit status is 1
when the mean gain over bicubic is below 0.3 dB.

Usage:
    python evaluate.py
    python evaluate.py --write-picture picture.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage
import torch
from PIL import Image
from safetensors.torch import load_file

from srcnn import SRCNN, srcnn_x3

FACTOR = 3
REQUIRED_GAIN_DB = 0.3
# The RGB photographs of everyday subjects in the scikit-image wheel. train.py never opens them, and nothing it does
# open shows any of these scenes.
HELD_OUT = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
DEMO_PICTURE = "chelsea.png"
DEFAULT_WEIGHTS = Path(__file__).with_name("srcnn_x3.safetensors")


def load_picture(name: str) -> Image.Image:
    """Opens a picture of the scikit-image wheel, cropped so that both sides divide by the factor.

    Args:
        name: The file name in the wheel's data folder. Only the disk is read, nothing is downloaded.

    Returns:
        The RGB picture, cropped at the right and at the bottom by at most two pixels.
    """
    with Image.open(Path(skimage.__file__).parent / "data" / name) as file:
        picture = file.convert("RGB")
    width, height = picture.size
    return picture.crop((0, 0, width - width % FACTOR, height - height % FACTOR))


def reduce_picture(picture: Image.Image) -> Image.Image:
    """Reduces a picture by the factor with Pillow's bicubic filter, which smooths before it samples.

    Args:
        picture: The picture, both sides divisible by the factor.

    Returns:
        The reduced picture.
    """
    width, height = picture.size
    return picture.resize((width // FACTOR, height // FACTOR), Image.Resampling.BICUBIC)


def enlarge(model: SRCNN, picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Enlarges a picture with the network, including the scaling before it and the clipping after it.

    Args:
        model: The network, in evaluation mode.
        picture: The RGB picture, H by W.

    Returns:
        The enlarged picture, uint8, shape (3 * H, 3 * W, 3).
    """
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    with torch.inference_mode():
        output = model(pixels.permute(2, 0, 1).unsqueeze(0))
    rounded = (output[0].clamp(0, 1) * 255).round().to(torch.uint8)
    array: npt.NDArray[np.uint8] = rounded.permute(1, 2, 0).numpy()
    return array


def psnr(truth: npt.NDArray[np.uint8], estimate: npt.NDArray[np.uint8]) -> float:
    """Computes the peak signal-to-noise ratio over all pixels and channels.

    Args:
        truth: The original, uint8, any shape.
        estimate: The reconstruction, uint8, the same shape.

    Returns:
        The ratio in dB, infinite for equal pictures.
    """
    error = float(np.mean((truth.astype(np.float64) - estimate.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def evaluate(model: SRCNN) -> float:
    """Prints the PSNR table of the held-out pictures.

    Args:
        model: The trained network, in evaluation mode.

    Returns:
        The mean gain over Pillow's bicubic enlargement in dB.
    """
    scores = []
    print(f"{'picture':<16}{'size':>10}{'bicubic dB':>12}{'SRCNN dB':>12}{'gain dB':>10}")
    for name in HELD_OUT:
        picture = load_picture(name)
        reduced = reduce_picture(picture)
        truth = np.array(picture)
        bicubic = psnr(truth, np.array(reduced.resize(picture.size, Image.Resampling.BICUBIC)))
        network = psnr(truth, enlarge(model, reduced))
        scores.append((bicubic, network))
        size = f"{picture.width}x{picture.height}"
        print(f"{name:<16}{size:>10}{bicubic:>12.2f}{network:>12.2f}{network - bicubic:>+10.2f}")
    mean_bicubic, mean_network = (float(value) for value in np.mean(scores, axis=0))
    gain = mean_network - mean_bicubic
    print(f"{'mean':<26}{mean_bicubic:>12.2f}{mean_network:>12.2f}{gain:>+10.2f}")
    return gain


def main() -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 1 when the mean gain is below the required one.
    """
    parser = argparse.ArgumentParser(description="Measure SRCNN against Pillow's bicubic on the held-out pictures.")
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="default: beside the script")
    parser.add_argument(
        "--write-picture",
        type=Path,
        metavar="PNG",
        help=f"only write {DEMO_PICTURE} reduced by {FACTOR}, the demo's input, and measure nothing",
    )
    arguments = parser.parse_args()
    if arguments.write_picture is not None:
        reduce_picture(load_picture(DEMO_PICTURE)).save(arguments.write_picture)
        return 0
    model = srcnn_x3().eval()
    model.load_state_dict(load_file(arguments.weights))
    gain = evaluate(model)
    if gain < REQUIRED_GAIN_DB:
        print(f"The mean gain is below {REQUIRED_GAIN_DB} dB.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
