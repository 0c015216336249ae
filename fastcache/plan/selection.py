"""How refreshed tokens are chosen: scores, ages, spatial bonus."""

import enum
from dataclasses import asdict, dataclass
from typing import Any

from fastcache.errors import ScheduleError


class Score(enum.Enum):
    """What a token's base score is. The first two are taken at a COMPUTE of the block's self-attention."""

    ATTENTION = "attention"  # attention that the token received, mean over heads
    KV_NORM = "kv-norm"  # sum over heads of 1 - ||v||
    SIMILARITY = "similarity"  # 1 - cosine of the branch's input and its stored feature, at each refresh
    NORM = "norm"  # norm of the branch's input, at each refresh
    RANDOM = "random"  # uniform in 0..1, from a generator of the session's own
    COMPRESS = "compress"  # half random, half attention over its largest
    STRAIGHT = "straight"  # one for every token: ages decide

    @property
    def taken(self) -> bool:
        """True if the score comes from a computed self-attention."""
        return self in (Score.ATTENTION, Score.KV_NORM, Score.COMPRESS)

    @property
    def local(self) -> bool:
        """True if the score needs the stream as it is before the branch: one selection a block."""
        return self in (Score.SIMILARITY, Score.NORM)

    @property
    def normalized(self) -> bool:
        """True if the base score is divided by its L2 norm over tokens."""
        return self not in (Score.RANDOM, Score.COMPRESS, Score.STRAIGHT)


@dataclass(frozen=True)
class Selection:
    """How the tokens of every REFRESH of a schedule are chosen (docs/methods/toca.md, "Which tokens").

    score + age_weight * age, where age counts the refreshes of the branch that left the token out;
    then, with `cell`, the best token of every cell x cell square of the token grid gains `bonus`
    times its own score; the best ones are taken. `seed` starts the random scores, which are the
    same for both halves of a CFG batch.
    """

    score: Score
    age_weight: float = 0.0
    cell: int = 0
    bonus: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.score, Score):
            object.__setattr__(self, "score", _score(self.score))
        if self.cell < 0 or (self.cell == 0) != (self.bonus == 0.0):
            raise ScheduleError(
                "cell, bonus: a bonus needs a cell of 1 or more tokens a side and a cell a bonus, got"
                f" cell={self.cell}, bonus={self.bonus}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return {**asdict(self), "score": self.score.value}


def _score(name: object) -> Score:
    try:
        return Score(name)
    except ValueError:
        raise ScheduleError(
            f"score: expected one of {', '.join(score.value for score in Score)}, got {name!r}"
        ) from None
