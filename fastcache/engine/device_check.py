"""Claims that are compared with the truth on the device while a session runs, and read when it closes.

Reading in the loop would wait for the device. A step notes an error as a tensor; of the generations
before the last one only the largest is kept.
"""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.backends.constants import capturing
from fastcache.errors import SessionError


class Claim(enum.Enum):
    """What was taken to be true, and what to do where it is not."""

    CONDITIONS = (
        "begin: the timesteps or conditions that were announced are not those that the model was called with",
        "pass what the model gets (t at each step, y of the whole batch), or begin without them",
    )
    WEIGHTS = (
        "begin: weights of the modulations were changed between begin and the first step",
        "begin after they are changed",
    )
    GATES = (
        "weights: those of the modulations were written within a generation past PyTorch's counters"
        " (weight.data), and cached steps used those of before",
        "write the parameter itself (with torch.no_grad()), or call session.reset() after the change",
    )
    UNWRITTEN = (
        "condition: the model wrote into the condition of its blocks between them, in inference mode, where"
        " PyTorch does not tell",
        "use torch.no_grad, or let the model make a new tensor",
    )


@dataclass(frozen=True)
class Note:
    """An error [1] on the device, of one step."""

    claim: Claim
    step: int
    error: Tensor
    tolerance: float


class DeviceCheck:
    """Errors that steps have found, on the device, until somebody reads them."""

    def __init__(self) -> None:
        self._now: list[Note] = []
        self._worst: dict[Claim, Tensor] = {}  # of the generations before, as a multiple of what is tolerated

    def note(self, claim: Claim, step: int, error: Tensor, tolerance: float) -> None:
        """What a step found; nothing while a CUDA graph is captured, whose tensors hold nothing yet."""
        if not capturing(error.device):
            self._now.append(Note(claim, step, error.flatten(), tolerance))

    def begin(self) -> None:
        """A generation begins: of those before, the worst errors are kept."""
        for claim in Claim:
            notes = [note for note in self._now if note.claim is claim]
            if notes:
                found = torch.cat([note.error for note in notes]).amax() / notes[0].tolerance
                known = self._worst.get(claim)
                self._worst[claim] = found if known is None else torch.maximum(known, found)
        self._now = []

    def read(self) -> None:
        """SessionError naming the steps at which a claim was not true. Waits for the device."""
        now, worst = self._now, self._worst
        self._now, self._worst = [], {}
        for claim in Claim:
            what, fix = claim.value
            notes = [note for note in now if note.claim is claim]
            errors = torch.cat([note.error for note in notes]).tolist() if notes else []
            wrong = [note.step for note, e in zip(notes, errors, strict=True) if not e <= note.tolerance]
            if wrong:
                some = ", ".join(map(str, wrong[:6])) + (" ..." if len(wrong) > 6 else "")
                raise SessionError(
                    f"{what} (at step {some}, by {max(errors):.2g} of its size), so outputs are wrong; {fix}"
                )
            if claim in worst and not float(worst[claim]) <= 1.0:
                raise SessionError(
                    f"{what} (in an earlier generation of this session), so outputs are wrong; {fix}"
                )
