"""Trains SRCNN on patches of pictures that the scikit-image wheel ships.

The low-resolution side of every pair is Pillow's bicubic reduction by 3 of the whole picture. The held-out pictures of
evaluate.py are never opened.

Usage:
    python train.py
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from evaluate import DEFAULT_WEIGHTS, FACTOR, HELD_OUT, load_picture, reduce_picture
from srcnn import srcnn_x3

# File names and how often each is drawn. The two motorcycle views weigh most, as the only colour photographs of
# everyday things here; astronomy and microscopy have little detail that bicubic loses.
TRAINING = {
    "motorcycle_left.png": 5,
    "motorcycle_right.png": 5,
    "camera.png": 4,
    "coins.png": 3,
    "brick.png": 2,
    "grass.png": 2,
    "gravel.png": 2,
    "ihc.png": 2,
    "page.png": 1,
    "hubble_deep_field.jpg": 1,
    "retina.jpg": 1,
    "moon.png": 1,
}
# Reduced copies are sharper than the photographs and show more at the patch's size.
SCALES = (1.0, 0.75, 0.5)
PATCH = 24  # Side of the low-resolution patch in pixels.
BATCH = 16
LEARNING_RATE = 1e-3
# The zero padding of the convolutions reaches this far into the picture. It is a third of a patch but very little of
# a picture, hence its smaller weight in the loss.
BORDER = 6
BORDER_WEIGHT = 0.25


def to_tensor(picture: Image.Image) -> Tensor:
    """Converts a picture of H by W pixels to a float32 RGB tensor, shape (3, H, W), values in 0..1."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def load_pairs(name: str) -> list[tuple[Tensor, Tensor]]:
    """Loads a training picture at every scale.

    Args:
        name: The file name in the data folder of the scikit-image wheel.

    Returns:
        One (low, high) pair a scale, float32 in 0..1, shapes (3, H, W) and (3, 3 * H, 3 * W).
    """
    picture = load_picture(name)
    pairs = []
    for scale in SCALES:
        width, height = (FACTOR * round(side * scale / FACTOR) for side in picture.size)
        high = picture.resize((width, height), Image.Resampling.BICUBIC)
        pairs.append((to_tensor(reduce_picture(high)), to_tensor(high)))
    return pairs


def draw_patch(pair: tuple[Tensor, Tensor], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cuts a random patch out of a pair, randomly turned, mirrored and tinted.

    Args:
        pair: The (low, high) pair to cut from.
        rng: The source of randomness.

    Returns:
        The (low, high) patches, shapes (3, 24, 24) and (3, 72, 72).
    """
    low, high = pair
    top = int(rng.integers(low.shape[1] - PATCH + 1))
    left = int(rng.integers(low.shape[2] - PATCH + 1))
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    # Scaling the channels commutes with the reduction, so both sides stay a true pair. It makes gray pictures coloured.
    tint = torch.from_numpy(rng.uniform(0.6, 1.0, (3, 1, 1)).astype(np.float32))
    patches = []
    for image, factor in ((low, 1), (high, FACTOR)):
        patch = image[:, factor * top : factor * (top + PATCH), factor * left : factor * (left + PATCH)]
        patch = torch.rot90(patch, turns, (1, 2))
        patches.append((patch.flip(2) if mirror else patch) * tint)
    return patches[0], patches[1]


def train(steps: int, seed: int) -> dict[str, Tensor]:
    """Trains the network and prints the progress.

    Args:
        steps: The number of optimizer steps.
        seed: The seed of the initial weights and of the patches.

    Returns:
        The trained weights, float32, contiguous.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pairs = [load_pairs(name) for name in TRAINING]
    weights = np.array(list(TRAINING.values()), dtype=np.float64)
    weights /= weights.sum()

    model = srcnn_x3()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pixel_weight = torch.full((FACTOR * PATCH, FACTOR * PATCH), BORDER_WEIGHT)
    pixel_weight[BORDER:-BORDER, BORDER:-BORDER] = 1
    pixel_weight /= pixel_weight.mean()

    total = 0.0
    for step in range(1, steps + 1):
        drawn = rng.choice(len(pairs), BATCH, p=weights)
        batch = [draw_patch(pairs[index][rng.integers(len(SCALES))], rng) for index in drawn]
        # Channels-last is the faster layout for these convolutions on a CPU.
        low = torch.stack([patch for patch, _ in batch]).contiguous(memory_format=torch.channels_last)
        high = torch.stack([patch for _, patch in batch])
        loss = ((model(low) - high).abs() * pixel_weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
        if step % 500 == 0 or step == steps:
            print(
                f"step {step}/{steps}  mean L1 {total / ((step - 1) % 500 + 1):.5f}  "
                f"CPU {time.process_time() / 60:.1f} min",
                flush=True,
            )
            total = 0.0
    return {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}


def main() -> int:
    """Runs the command line.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(description="Train SRCNN x3 on pictures of the scikit-image wheel.")
    parser.add_argument("--output", type=Path, default=DEFAULT_WEIGHTS, help="where to write the weights")
    parser.add_argument("--steps", type=int, default=18000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and patches (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    overlap = set(TRAINING) & set(HELD_OUT)
    if overlap:
        parser.error(f"held-out pictures in the training set: {sorted(overlap)}")
    torch.set_num_threads(arguments.threads)

    state = train(arguments.steps, arguments.seed)
    # Renaming is atomic: a run that is interrupted never leaves half a file in place of good weights.
    partial = arguments.output.with_name(arguments.output.name + ".part")
    partial.write_bytes(save(state))
    partial.replace(arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes, CPU {time.process_time() / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
