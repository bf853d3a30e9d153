"""What :func:`tokcompile.recover` gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RecoveryReport:
    """What :func:`recover` did.

    Attributes:
        steps: optimizer steps, those of an earlier run that was continued included.
        losses: mean loss over the positions of each step. rates: its learning rate.
        tokens: positions that were trained on, in all.
        trained: name -> number of values of the trained parameters.
        unused: those that the loss does not depend on; they stayed as they were.
        seconds: time of this call.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / len(part) for part in (self.losses[:tenth], self.losses[-tenth:]))
        return (
            f"{self.steps} steps on {self.tokens} positions, {sum(self.trained.values())} values in "
            f"{len(self.trained)} parameters trained ({len(self.unused)} not used by the loss); loss "
            f"{first:.4g} -> {last:.4g} (mean of the first and the last {tenth} steps)"
        )
