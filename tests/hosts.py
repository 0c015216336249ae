"""A small host model and a stand-in sampler for the session tests."""

import torch
from torch import Tensor, nn

from fastcache.models import DiT

STEPS = 8
CLASSES = 10


def small_dit(seed: int = 0, depth: int = 3, dtype: torch.dtype = torch.float32) -> DiT:
    """A DiT with random weights everywhere (adaLN and final layer too), 16 tokens of width 32."""
    torch.manual_seed(seed)
    model = DiT(
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        depth=depth,
        num_heads=2,
        num_classes=CLASSES,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(
    step: int, batch: int = 4, size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, t, y) of one step, the same for every caller."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(batch, 4, size, size, generator=generator).to(dtype)
    t = torch.full((batch,), 900.0 - 100 * step).to(dtype)
    return x, t, torch.arange(batch) % CLASSES


@torch.no_grad()
def run(model, steps: int = STEPS, batch: int = 4) -> list[Tensor]:
    """Call a model as a sampler would; the outputs of all steps."""
    return [model(*inputs(step, batch)) for step in range(steps)]


@torch.no_grad()
def reference(
    model, full: list[int], steps: int = STEPS, batch: int = 4, sizes: list[int] | None = None
) -> list[Tensor]:
    """The definition of step caching, written naively: x += gate * (computed or stored) feature."""
    stored, outputs = {}, []
    for step in range(steps):
        x, t, y = inputs(step, batch, sizes[step] if sizes else 8)
        x, c = (
            model.embed(x, t, y)
            if isinstance(model, ForeignDiT)
            else (model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y))
        )
        for index, block in enumerate(model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            if step in full:
                stored[index, 0] = block.attn(block.norm1(x) * (1 + scale1) + shift1)
            x = x + gate1 * stored[index, 0]
            if step in full:
                stored[index, 1] = block.mlp(block.norm2(x) * (1 + scale2) + shift2)
            x = x + gate2 * stored[index, 1]
            if isinstance(model, ForeignDiT):
                x = model.between(index, x)
        outputs.append(
            model.finish(x, c) if isinstance(model, ForeignDiT) else model._unpatch(model.final_layer(x, c))
        )
    return outputs


class ForeignBlock(nn.Module):
    """Somebody else's adaLN-Zero block: the structure is known, the class is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
        )
        self.attn = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ForeignDiT(nn.Module):
    """Any resolution, and a hook point between blocks for hosts that look at x there."""

    def __init__(self, width: int = 24, depth: int = 4, between=None) -> None:
        super().__init__()
        self.embedding, self.time, self.label = (
            nn.Linear(4, width),
            nn.Linear(1, width),
            nn.Embedding(CLASSES, width),
        )
        self.blocks = nn.ModuleList(ForeignBlock(width) for _ in range(depth))
        self.final_layer = nn.Linear(width, 4)
        self.between = between or (lambda index, x: x)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding(x.flatten(2).transpose(1, 2)), self.time(t[:, None] / 1000) + self.label(y)

    def finish(self, x: Tensor, c: Tensor) -> Tensor:
        return self.final_layer(x + c[:, None])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for index, block in enumerate(self.blocks):
            x = self.between(index, block(x, c))
        return self.finish(x, c)


def foreign_dit(between=None, depth: int = 4) -> ForeignDiT:
    """A ForeignDiT with seeded weights."""
    torch.manual_seed(1)
    return ForeignDiT(depth=depth, between=between).eval().requires_grad_(False)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Every step within a relative L2 error."""
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, expected, strict=True)
    ]
    assert max(errors) < tolerance, errors
