"""A small CNN that reads Glyphs-36: class accuracy, and features for Frechet distances.

python -m fastcache.workshop.glyphs.classifier --out weights/glyph-classifier.safetensors
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.extras import needs_extra
from fastcache.files.whole import require_writable, write_whole
from fastcache.workshop.glyphs import dataset
from fastcache.workshop.metrics import accuracy

FEATURES = 64
HELD_OUT_SEED, TRAINING_SEED = 3, 2  # the DiT is trained on seed 1


class GlyphClassifier(nn.Module):
    """Pictures [n, 3, 32, 32] in [-1, 1] -> class scores [n, 36], by way of 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*_stage(3, 32), *_stage(32, 64), *_stage(64, 128))
        self.to_features = nn.Linear(128 * 4 * 4, FEATURES)
        self.to_logits = nn.Linear(FEATURES, len(dataset.CLASSES))

    def features(self, pictures: Tensor) -> Tensor:
        """The penultimate layer [n, 64], before its activation (so that it is close to Gaussian)."""
        return self.to_features(self.stages(pictures).flatten(1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.logits(self.features(pictures))

    def logits(self, features: Tensor) -> Tensor:
        """Class scores [n, 36] of features [n, 64]."""
        return self.to_logits(F.gelu(features))


def _stage(inner: int, outer: int) -> tuple[nn.Module, ...]:
    """Half the side, `outer` channels."""
    return (
        nn.Conv2d(inner, outer, 3, padding=1, bias=False),
        nn.BatchNorm2d(outer),
        nn.GELU(),
        nn.MaxPool2d(2),
    )


def augment(pictures: Tensor) -> Tensor:
    """Training pictures as imperfect as sampled ones: noise, blur, faded contrast, a pixel or two of
    shift.
    """
    count = len(pictures)
    shift = torch.randint(-2, 3, (2,)).tolist()
    pictures = pictures.roll(shift, dims=(2, 3))
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = pictures.lerp(blurred, torch.rand(count, 1, 1, 1))
    centre = pictures.mean(dim=(2, 3), keepdim=True)
    pictures = centre.lerp(pictures, 0.4 + 0.8 * torch.rand(count, 1, 1, 1))
    return pictures + 0.25 * torch.rand(count, 1, 1, 1) * torch.randn_like(pictures)


def train(per_class: int, epochs: int, *, progress: bool = True) -> GlyphClassifier:
    """Trained from scratch on 36 * per_class pictures, in eval mode; deterministic up to threading."""
    with needs_extra("demo"):
        from tqdm import tqdm
    torch.manual_seed(0)
    made, classes = dataset.make(per_class, TRAINING_SEED, progress=progress)
    pictures, labels = dataset.to_model_range(made), torch.from_numpy(classes)
    model = GlyphClassifier()
    batches = epochs * (len(labels) // 128)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=batches)
    for _ in (bar := tqdm(range(batches), desc="training classifier", unit="batch", disable=not progress)):
        chosen = torch.randint(len(labels), (128,))
        loss = F.cross_entropy(model(augment(pictures[chosen])), labels[chosen], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.inference_mode()
def read(model: GlyphClassifier, pictures: Tensor, *, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 64] and class scores [n, 36], float32, of pictures [n, 3, 32, 32] in [-1, 1]."""
    features = torch.cat([model.features(batch) for batch in pictures.split(batch_size)])
    return features.numpy(), model.logits(features).numpy()


def held_out_accuracy(model: GlyphClassifier, per_class: int = 100) -> float:
    """Share of 36 * per_class unseen, unspoilt pictures that `model` reads correctly."""
    pictures, labels = dataset.make(per_class, HELD_OUT_SEED)
    return accuracy(read(model, dataset.to_model_range(pictures))[1], labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("weights/glyph-classifier.safetensors"))
    parser.add_argument("--per-class", type=int, default=500, help="training pictures of each class")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    require_writable(args.out)
    with needs_extra("demo"):
        from safetensors.torch import save_file
    start = time.perf_counter()
    model = train(args.per_class, args.epochs)
    score = held_out_accuracy(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    config = {"features": FEATURES, "per_class": args.per_class, "epochs": args.epochs, "seed": TRAINING_SEED}
    metadata = {"accuracy": f"{score:.4f}", "config": json.dumps(config), "classes": dataset.CLASSES}
    write_whole(args.out, lambda partial: save_file(state, partial, metadata=metadata))
    print(f"{args.out}: {score:.2%} of held-out glyphs read correctly, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
