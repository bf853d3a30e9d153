"""Editing what a STEM model knows of a token, by its rows: ``tokcompile.stem.edit(model, token, like=other)``.

A STEM table (see ``tokcompile.passes.stem``) holds, for each converted layer, one row per token id. Letting a token
read the rows of another one in every layer makes the feed-forward layers treat it as that other token; its input
embedding and attention stay its own. Nothing is trained and no row is changed: only the index from ids to rows is.

Source: "STEM: Scaling Transformers with Embedding Modules", arXiv 2601.10639 (knowledge editing), which edits at chosen
positions of a prompt; here an edit holds wherever the token occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.state import NAMESPACE, PreparedState

_PASS = "stem"


@dataclass(frozen=True)
class Change:
    """One index entry that an edit changed.

    Attributes:
        layer: module path of the feed-forward layer.
        token: the id.
        before, after: the row that it read and reads now; -1: none (its dense up-projection, or the mean row).
    """

    layer: str
    token: int
    before: int
    after: int


@dataclass
class Edit:
    """What :func:`edit` changed. A context manager: leaving it restores."""

    changes: list[Change]
    _indices: dict[str, torch.Tensor] = field(repr=False)

    def restore(self) -> None:
        """Put back the rows that the tokens read before; harmless when done twice."""
        for change in reversed(self.changes):
            self._indices[change.layer][change.token] = change.before

    def __enter__(self) -> Edit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def edit(model: nn.Module, token: int | Sequence[int], *, like: int | Sequence[int]) -> Edit:
    """Let ``token`` read the rows of ``like`` in every layer that has a table.

    Args:
        model: made by :func:`tokcompile.optimize` with the pass ``stem``; nothing is compiled anew.
        token: an id, or the ids that spell a name.
        like: an id for all of them, or as many ids, taken one by one.

    Returns:
        What was changed; ``.restore()`` undoes it.

    Raises:
        TokcompileError: the model has no tables, an id is outside the vocabulary, ``like`` has no row of its own, or
            the two sequences differ in length. Nothing is changed then.
    """
    state = getattr(model, NAMESPACE, None)
    scopes = (
        {}
        if not isinstance(state, PreparedState)
        else {key: state.scope(_PASS, key) for key in state.keys(_PASS) if "remap" in state.tensors(_PASS, key)}
    )
    if not scopes:
        raise TokcompileError(
            "stem.edit: this model has no tables of token ids; make it with "
            "tokcompile.optimize(model, 'stem_ffn', calibration=...)"
        )
    tokens = [token] if isinstance(token, int) else list(token)
    others = [like] * len(tokens) if isinstance(like, int) else list(like)
    if not tokens or len(tokens) != len(others):
        raise TokcompileError(
            f"stem.edit: {len(tokens)} tokens and {len(others)} to take the rows of; give one id, or "
            "as many (repeat some, or leave some out)"
        )
    indices: dict[str, torch.Tensor] = {key: scope.get_buffer("remap") for key, scope in scopes.items()}
    rows: dict[tuple[str, int], int] = {}
    for key, index in indices.items():
        for number in {*tokens, *others}:
            if not 0 <= number < len(index):
                raise TokcompileError(f"stem.edit: {number} is no token id; the vocabulary has {len(index)}")
            rows[key, number] = int(index[number])
        without = next((n for n in others if rows[key, n] < 0), None)
        if without is not None:
            raise TokcompileError(
                f"stem.edit: token {without} has no row in {key}: calibration never met it; "
                "calibrate with text that has it, or with vocabulary: all"
            )
    made = Edit([], indices)
    for key, index in indices.items():
        for one, other in zip(tokens, others, strict=True):
            made.changes.append(Change(key, one, rows[key, one], rows[key, other]))
            index[one] = rows[key, other]
    return made
