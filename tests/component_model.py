"""A small model of blocks with components attn and mlp, and a stand-in sampler, for the compat tests."""

import torch
from torch import Tensor, nn

STEPS = 6


class Block(nn.Module):
    """Residual branches without norms or gates."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x).tanh()
        return x + self.mlp(x).tanh()


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.fail:
                raise RuntimeError("out of memory")
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def x_of(step: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, generator=torch.Generator().manual_seed(step))


def generation(host: Model, batch: int = 2, steps: int = STEPS) -> list[Tensor]:
    return [host(x_of(step, batch)) for step in range(steps)]


def tiny_diffusers_dit() -> nn.Module:
    """diffusers' DiT with two blocks."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return (
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=4,
            num_embeds_ada_norm=10,
        )
        .eval()
        .requires_grad_(False)
    )


def call_tiny(host: nn.Module, step: int) -> Tensor:
    """One call of it as a sampler makes."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    return host(
        x, timestep=torch.tensor([900 - step] * 2), class_labels=torch.tensor([1, 2]), return_dict=False
    )[0]
