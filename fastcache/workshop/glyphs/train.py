"""Train the glyph DiT: v-prediction, cosine schedule, class dropout for guidance.

    python -m fastcache.workshop.glyphs.train --minutes 66 --out weights/glyph-dit.safetensors

Saves the moving average of the weights in float16. An interrupted run goes on where it stopped, from
the `.resume.pt` file beside `--out`, which is removed at the end.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.extras import needs_extra
from fastcache.files.whole import require_writable, write_whole
from fastcache.models import DiT, DiTConfig
from fastcache.models.checkpoint import Checkpoint, write_checkpoint
from fastcache.workshop.glyphs import DIFFUSION, dataset
from fastcache.workshop.schedulers import make_scheduler

CONFIG = DiTConfig(
    input_size=dataset.SIZE,
    patch_size=4,
    in_channels=3,
    hidden_size=160,
    depth=12,
    num_heads=5,
    num_classes=len(dataset.CLASSES),
    learn_sigma=False,
)
TRAINING_SEED = 1
BATCH = 64
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 200
CLASS_DROPOUT = 0.1
SHAPING_SHARE, SHAPING_FROM = 0.67, 450  # share of the batch at timesteps >= 450, where the shape is decided
SAVE_MINUTES = 5.0


@dataclass
class Run:
    """All that a training run has to remember."""

    model: DiT
    average: DiT
    optimiser: torch.optim.Optimizer
    step: int = 0
    minutes: float = 0.0

    @classmethod
    def start(cls, device: str) -> "Run":
        """A fresh run. Labels start further apart than the family's: in a short training they must tell
        early.
        """
        torch.manual_seed(0)
        model = DiT.from_config(CONFIG).to(device)
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.5)
        average = DiT.from_config(CONFIG).to(device).requires_grad_(False)
        average.load_state_dict(model.state_dict())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            model, average, torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
        )

    def save(self, path: Path) -> None:
        """Write everything to `path`, whole or not at all."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimiser")}
        state = {**parts, "step": self.step, "minutes": self.minutes}
        write_whole(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        saved = torch.load(path, weights_only=True)
        for name in ("model", "average", "optimiser"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.minutes = saved["step"], saved["minutes"]


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, constant, then a cosine to zero over the second half of the run."""
    decay = 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * progress - 1)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * decay


def loss_of(model: DiT, pictures: Tensor, labels: Tensor, alpha_bar: Tensor) -> Tensor:
    """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) x (Salimans and Ho, 2022) at random timesteps."""
    count, device = len(labels), labels.device
    dropped = torch.rand(count, device=device) < CLASS_DROPOUT
    early = torch.randint(SHAPING_FROM, len(alpha_bar), (count,), device=device)
    late = torch.randint(SHAPING_FROM, (count,), device=device)
    t = torch.where(torch.rand(count, device=device) < SHAPING_SHARE, early, late)
    signal = alpha_bar[t].sqrt()[:, None, None, None]
    spread = (1 - alpha_bar[t]).sqrt()[:, None, None, None]
    noise = torch.randn_like(pictures)
    with torch.autocast(device.type, torch.bfloat16):
        v = model(signal * pictures + spread * noise, t, labels.masked_fill(dropped, CONFIG.num_classes))
    return F.mse_loss(v.float(), signal * noise - spread * pictures)


def train_step(run: Run, loss: Tensor, progress: float) -> None:
    """One update of the weights and of their moving average."""
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(run.step, progress)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    decay = min(0.999, (run.step + 1) / (run.step + 10))
    for averaged, current in zip(run.average.parameters(), run.model.parameters(), strict=True):
        averaged.lerp_(current.detach(), 1 - decay)
    run.step += 1


def train(minutes: float, out: Path, per_class: int) -> None:
    """Train until `minutes` of training time are used, and write the moving average to `out`."""
    with needs_extra("demo"):
        from tqdm import tqdm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run, resume = Run.start(device), out.with_suffix(".resume.pt")
    if resume.exists():
        run.load(resume)
    pictures, labels = dataset.make(per_class, TRAINING_SEED, progress=True)
    alpha_bar = make_scheduler("ddpm", 1, DIFFUSION).alphas_cumprod.to(device)
    saved = run.minutes
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} min {postfix}"
    with tqdm(total=minutes, initial=run.minutes, desc="training DiT", bar_format=bar_format) as bar:
        while run.minutes < minutes:
            start = time.perf_counter()
            chosen = torch.randint(len(labels), (BATCH,)).numpy()
            batch = dataset.to_model_range(pictures[chosen]).to(device)
            loss = loss_of(run.model, batch, torch.from_numpy(labels[chosen]).to(device), alpha_bar)
            train_step(run, loss, run.minutes / minutes)
            bar.set_postfix_str(f"step {run.step}, loss {loss.item():.3f}", refresh=False)
            spent = (time.perf_counter() - start) / 60
            run.minutes += spent
            bar.update(spent)
            if run.minutes - saved > SAVE_MINUTES:
                run.save(resume)
                saved = run.minutes
    write_average(run, out)
    resume.unlink(missing_ok=True)


def write_average(run: Run, out: Path) -> None:
    """The moving average in float16, with what a sampler has to know as metadata."""
    state = {name: tensor.half() for name, tensor in run.average.state_dict().items()}
    metadata = {
        "prediction_type": DIFFUSION.prediction_type,
        "beta_schedule": DIFFUSION.beta_schedule,
        "steps": str(run.step),
        "classes": dataset.CLASSES,
    }
    write_checkpoint(out, Checkpoint(state, CONFIG, metadata))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=66, help="training time, interruptions not counted")
    parser.add_argument("--out", type=Path, default=Path("weights/glyph-dit.safetensors"))
    parser.add_argument("--per-class", type=int, default=2500, help="training pictures of each class")
    args = parser.parse_args()
    require_writable(args.out)
    train(args.minutes, args.out, args.per_class)


if __name__ == "__main__":
    main()
