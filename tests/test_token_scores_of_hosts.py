"""Tokens are scored by the host's own attention, counted as a share of its tokens, drawn for each image."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equal_or_loud import equal_or_loud
from hosts import STEPS, ForeignDiT, foreign_dit, inputs, run, small_dit
from naive_refresh import run_naively
from torch import Tensor, nn

import fastcache
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.models.dit import Attention
from fastcache.schedule import REUSE, Schedule, Selection, StepPlan, full_step, refresh

# -- how many tokens ----------------------------------------------------------------------------------


class AnyNumberOfTokens(DiT):
    """Takes any resolution, whatever size it was made for."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def made_for(input_size: int) -> AnyNumberOfTokens:
    """A small DiT that says it has (input_size / 2)^2 tokens."""
    torch.manual_seed(0)
    model = AnyNumberOfTokens(input_size, 2, 4, 32, depth=2, num_heads=2, num_classes=10)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def refreshed(model: nn.Module, policy: fastcache.Policy, size: int) -> list[int]:
    """How many tokens each image refreshed in each branch of each partial step."""
    with fastcache.accelerate(model, policy, STEPS, record_tokens=True) as session, torch.no_grad():
        for step in range(STEPS):
            model(*inputs(step, 4, size))
    return [int(n) for chosen in session.tokens.values() for mask in chosen.values() for n in mask.sum(1)]


@pytest.mark.parametrize("method", [fastcache.ToCa, fastcache.DuCa], ids=lambda method: method.__name__)
@pytest.mark.parametrize("score", ["attention", "norm"])
@pytest.mark.parametrize(
    ("made", "size", "expected"),
    [(16, 8, 4), (8, 16, 16), (16, 12, 9)],
    ids=["fewer tokens", "more tokens", "a share that is a whole number"],
)
def test_a_fresh_ratio_is_a_share_of_the_tokens_that_there_are(
    method: type, score: str, made: int, size: int, expected: int
) -> None:
    policy = method(3, 0.25, cache_type=score, ratio_scheduler="constant")
    try:
        counts = refreshed(made_for(made), policy, size)
    except fastcache.FastCacheError:
        return
    assert counts and set(counts) == {expected}, sorted(set(counts))


def test_a_share_follows_a_resolution_that_changes_between_generations() -> None:
    model, policy = made_for(16), fastcache.ToCa(3, 0.25, ratio_scheduler="constant")
    found = []
    try:
        with fastcache.accelerate(model, policy, STEPS, record_tokens=True) as session, torch.no_grad():
            for size in (16, 8):
                for step in range(STEPS):
                    model(*inputs(step, 2, size))
                found.append(
                    {int(n) for chosen in session.tokens.values() for m in chosen.values() for n in m.sum(1)}
                )
    except fastcache.FastCacheError:
        return
    assert found == [{16}, {4}]


class FewerTokensLater(ForeignDiT):
    """Leaves out each second token half way."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for index, block in enumerate(self.blocks):
            x = block(x[:, ::2] if index == 2 else x, c)
        return self.finish(x, c)


@pytest.mark.parametrize("score", ["random", "norm"])
def test_a_block_with_fewer_tokens_chooses_among_its_own_or_is_refused(score: str) -> None:
    model = foreign_dit()
    model.__class__ = FewerTokensLater
    layout = recognise(model).layout()
    step = StepPlan(
        layout, tuple(refresh(5) if branch.name == "mlp" else REUSE for branch in layout.branches)
    )
    schedule = Schedule(layout, (full_step(layout), step), selection=Selection(score, 0.05))
    try:
        with fastcache.accelerate(model, schedule, calls_per_step=1, record_tokens=True) as session:
            run(model, 2)
    except fastcache.FastCacheError:
        return
    chosen = {layout.branches[index].block: mask for index, mask in session.tokens[1].items()}
    assert {block: mask.shape[1] for block, mask in chosen.items()} == {0: 64, 1: 64, 2: 32, 3: 32}
    assert all(set(mask.sum(1).tolist()) == {5} for mask in chosen.values())


# -- whose attention ----------------------------------------------------------------------------------


class SecondAttention(Attention):
    """Pools what it attended to by another attention, whose maps say nothing about tokens."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        flat = torch.zeros_like(output)[:, None]
        return output + F.scaled_dot_product_attention(flat, flat, output[:, None])[:, 0]


class FirstAnotherAttention(Attention):
    """The other attention comes first."""

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.zeros_like(x)[:, None]
        return super().forward(x + F.scaled_dot_product_attention(flat, flat, x[:, None])[:, 0])


class HeadByHead(Attention):
    """One call of scaled_dot_product_attention for each head."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        heads = [
            F.scaled_dot_product_attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1])
            for h in range(self.num_heads)
        ]
        return self.proj(torch.cat(heads, 1).transpose(1, 2).reshape(B, N, D))


class InWindows(Attention):
    """Attention within windows of four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        return super().forward(x.reshape(B * N // 4, 4, D)).reshape(B, N, D)


class WithContext(Attention):
    """Attends to other tokens afterwards: as many queries, fewer keys."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        context = output[:, None, :3]
        return output + F.scaled_dot_product_attention(output[:, None], context, context)[:, 0]


class WithRegisters(Attention):
    """Puts four tokens of its own before those of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        registers = torch.linspace(-1, 1, 4)[None, :, None].to(x).expand(len(x), 4, x.shape[2])
        return super().forward(torch.cat([registers, x], 1))[:, 4:]


def own_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    logits = q @ k.transpose(-1, -2) * scale
    return (logits if bias is None else logits + bias).softmax(-1) @ v


def rotated(x: Tensor) -> Tensor:
    """x [B, H, N, d] turned by an angle that grows with the token."""
    angle = torch.linspace(0, 9, x.shape[2]).to(x)[:, None] * torch.linspace(1, 0.2, x.shape[3] // 2).to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class OwnSoftmax(Attention):
    """Multiplies its own softmax."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own_softmax(q, k, v, q.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.split(x)).transpose(1, 2).reshape(x.shape))


class RotarySoftmax(OwnSoftmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(rotated(q), rotated(k), v)


class NormedSoftmax(OwnSoftmax):
    """Normalises queries and keys under no name that one would look for."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(F.normalize(q, dim=-1) * 4, F.normalize(k, dim=-1) * 4, v)


class HotSoftmax(OwnSoftmax):
    """Has a scale of its own, which is no attribute."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own_softmax(q, k, v, 1.5)


class BiasedSoftmax(OwnSoftmax):
    """Adds a bias by distance, as relative positions do."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2]).to(q)
        return own_softmax(q, k, v, q.shape[-1] ** -0.5, -0.5 * (at[:, None] - at[None]).abs())


class KeysFirst(OwnSoftmax):
    """Its packed projection is keys, values, queries."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v, q = super().split(x)
        return q, k, v


class HeadMajor(OwnSoftmax):
    """Its packed projection has the heads outermost."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).view(*x.shape[:2], self.num_heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)


def partial(model: nn.Module, score: str) -> Schedule:
    layout = recognise(model).layout()
    step = StepPlan(
        layout, tuple(refresh(5) if branch.name == "mlp" else REUSE for branch in layout.branches)
    )
    return Schedule(layout, (full_step(layout), step, step, step) * 2, selection=Selection(score, 0.05))


def scored_by(attention: Callable[[nn.Module, Tensor], tuple]) -> Callable:
    """What the original takes scores from: an attention's own maps [B, H, N, N] and values."""

    def attention_and_score(body: nn.Module, h: Tensor, score: fastcache.Score) -> tuple[Tensor, Tensor]:
        maps, v = attention(body, h)
        return body(h), maps.mean(1) if score is fastcache.Score.ATTENTION else v.norm(dim=-1)

    return attention_and_score


def maps_of_sdpa(body: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = body.qkv(h).view(*h.shape[:2], 3, body.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1), v


def maps_after_another(body: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    return maps_of_sdpa(body, h + h.mean(1, keepdim=True))


def maps_of_own_softmax(body: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = body.split(h)
    return body.attend(q, k, torch.eye(h.shape[1]).to(h).expand(*q.shape[:2], -1, -1)), v


BODIES = {
    SecondAttention: maps_of_sdpa,
    FirstAnotherAttention: maps_after_another,
    HeadByHead: maps_of_sdpa,
    WithContext: maps_of_sdpa,
    OwnSoftmax: maps_of_own_softmax,
    RotarySoftmax: maps_of_own_softmax,
    NormedSoftmax: maps_of_own_softmax,
    HotSoftmax: maps_of_own_softmax,
    BiasedSoftmax: maps_of_own_softmax,
    KeysFirst: maps_of_own_softmax,
    HeadMajor: maps_of_own_softmax,
}


def with_attention(kind: type[Attention]) -> nn.Module:
    """A small DiT with this attention and large weights in it: its maps are far from even."""
    model = small_dit()
    for block in model.blocks:
        block.attn.qkv.weight.mul_(2)
        block.attn.__class__ = kind
    return model


@pytest.mark.parametrize("score", ["attention", "kv-norm"])
@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_tokens_are_scored_by_the_blocks_own_attention_or_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: type[Attention], score: str
) -> None:
    model = with_attention(kind)
    schedule = partial(model, score)
    monkeypatch.setattr("benchmarks.originals.attention_and_score", scored_by(BODIES[kind]))
    expected = run_naively(model, schedule)

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, schedule):
            return run(model)

    equal_or_loud(play, expected, fastcache.HostError, 1e-4)


@pytest.mark.parametrize("score", ["attention", "kv-norm"])
@pytest.mark.parametrize("kind", [InWindows, WithRegisters], ids=lambda kind: kind.__name__)
def test_an_attention_over_other_tokens_than_the_streams_is_refused(
    kind: type[Attention], score: str
) -> None:
    model = with_attention(kind)
    with pytest.raises(fastcache.HostError, match="blocks.0.attn"):
        with fastcache.accelerate(model, partial(model, score)):
            run(model)


# -- random scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["random", "compress"])
@pytest.mark.parametrize("batch", [2, 4])
def test_images_of_an_unguided_batch_are_drawn_for_by_themselves(score: str, batch: int) -> None:
    model = small_dit()
    layout = recognise(model).layout()
    step = StepPlan(
        layout, tuple(refresh(5) if branch.name == "mlp" else REUSE for branch in layout.branches)
    )
    schedule = Schedule(layout, (full_step(layout), *[step] * 7), selection=Selection(score, 0.0))
    x, t, y = inputs(0, 1)
    one = [
        (x.expand(batch, -1, -1, -1), t.expand(batch) - 100 * step, y.expand(batch)) for step in range(STEPS)
    ]
    with fastcache.accelerate(model, schedule, record_tokens=True) as session, torch.no_grad():
        for each in one:  # one image several times: only what is drawn tells its copies apart
            model(*each)
    chosen = torch.stack(
        [mask for masks in session.tokens.values() for mask in masks.values()]
    )  # [draws, B, N]
    assert len(chosen) >= 7
    for other in range(1, batch):
        assert not torch.equal(chosen[:, 0], chosen[:, other]), (
            f"images 0 and {other} share their random scores"
        )


def test_both_halves_of_a_guided_batch_share_what_is_drawn() -> None:
    model = small_dit()
    policy = fastcache.ToCa(4, 0.3, cache_type="random", soft_fresh_weight=0.0)
    none = model.config.num_classes
    with fastcache.accelerate(model, policy, STEPS, record_tokens=True) as session, torch.no_grad():
        for step in range(STEPS):
            x, t, y = inputs(step)
            model.forward_with_cfg(x, t, torch.cat([y[:2], torch.full((2,), none)]), 2.0)
    chosen = [mask for masks in session.tokens.values() for mask in masks.values()]
    assert chosen and all(torch.equal(mask[:2], mask[2:]) for mask in chosen)
