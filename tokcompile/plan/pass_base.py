"""What a pass is: :class:`Pass`; and what calibration saw for it: :class:`Seen`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import fx

from tokcompile.plan.plan import Taken
from tokcompile.rewrite.context import Context


class Pass:
    """One compression method. Subclasses are small: parameters, and :meth:`apply`.

    Attributes:
        name: the name in recipes.
        regions: the region kind that it works on by default.
        also: further kinds, for a recipe that names one of them (``target.region``).
        Params: pydantic model of its parameters.
    """

    name: ClassVar[str]
    regions: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()

    #: Whether the pass needs :func:`tokcompile.calibrate`: "none", "optional" or "required".
    calibration: ClassVar[Literal["none", "optional", "required"]] = "none"
    #: "decode": acts in decode steps only, so a prefill without a match is no mistake.
    #: "prefill": has nothing to do in decode steps.
    stage: ClassVar[Literal["any", "decode", "prefill"]] = "any"
    #: Whether it keeps the ``ctx.leading_tokens`` and ``ctx.trailing_tokens`` of an encoder.
    protects_leading: ClassVar[bool] = False
    #: Whether the last tokens of a prompt choose, so that tokens drafted behind it must not be among them.
    last_tokens_choose: ClassVar[bool] = False

    class Params(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def __init__(self, params: Any) -> None:
        self.params = params

    def observe(self, ctx: Context, region: Any, seen: Seen) -> None:
        """Put observers (:meth:`Context.observe`) on ``region`` of the dense graph; they add to ``seen.sums``.

        Called for every graph that has the region. ``seen`` is the same each time.

        Raises:
            NarrowError: the region is not one that the pass can work on; it is left out, with the reason.
        """
        raise NotImplementedError

    def prepare(self, seen: dict[str, Seen]) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        """From what was observed: region key -> (tensors, facts) for :meth:`Context.state`.

        A region that is left out of the result has no state.

        Raises:
            CalibrationError: nothing useful was observed.
        """
        raise NotImplementedError

    #: Whether :meth:`score_features` has something to do in the graph of the image encoder.
    scores_features: ClassVar[bool] = False

    def score_features(self, ctx: Context, features: fx.Node) -> fx.Node:
        """Score image features ``[R, D]`` in the graph of the encoder that makes them: -> ``[R]``.

        Raises:
            NarrowError: the features are not one for each patch, say.
        """
        raise NotImplementedError

    def acts_in(self, stage: str) -> bool:
        """Whether the pass has anything to do in the graph of this stage."""
        return not (stage == "decode" and self.stage == "prefill")

    def cut_layers(self, depth: int) -> list[int]:
        """The first layers below the cuts that the pass makes in a language model of ``depth`` layers."""
        return []

    def plan(self, ctx: Context, region: Any) -> Taken:
        """What :meth:`apply` will do to ``region``; changes nothing.

        A pass that removes tokens says at which layers; one that reads conditions off the graph refuses here already.

        Raises:
            NarrowError, UnprofitableError: as :meth:`apply`.
        """
        return Taken()

    def apply(self, ctx: Context, region: Any) -> dict[str, Any]:
        """Rewrite ``ctx.captured`` for ``region``, of the kind that ``regions`` names; -> details to report.

        Raises:
            NarrowError: the region cannot be rewritten; the reason goes into the report.
            UnprofitableError: rewriting it would not pay; likewise, and it is no mistake.

        Both before anything is changed. After any other error the graph is captured afresh and the step left out of it.
        """
        raise NotImplementedError


@dataclass(eq=False)
class Seen:
    """What calibration saw of one region.

    Attributes:
        key: see :func:`region_keys`. path: its module path.
        layer, depth: its place in its stack of layers, and their number; None outside a stack.
        sums: running sums, name -> tensor or number; what :meth:`Pass.observe` puts there.
        weights: name -> real parameter, for :meth:`Pass.prepare`; not part of a resume file.
        facts: other values from the graph (sizes, variants), likewise.
    """

    key: str
    path: str
    layer: int | None = None
    depth: int | None = None
    sums: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
