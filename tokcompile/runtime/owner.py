"""What a compiled graph needs of its session. The session keeps its graphs, so they cannot name its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokcompile.plan.apply import Matching
from tokcompile.plan.observed import Observed
from tokcompile.plan.pass_base import Pass
from tokcompile.recipe.steps import Step
from tokcompile.reporting.report import Report
from tokcompile.rewrite.context import Context
from tokcompile.runtime.memories import Memories
from tokcompile.runtime.recording import Recording
from tokcompile.state import PreparedState


class Owner(Protocol):
    """Read by :class:`tokcompile.runtime.compiled_graph.CompiledGraph`; see ``runtime.session.Session``."""

    stage: str
    lowering: str
    counting: bool

    @property
    def prepared(self) -> PreparedState | None: ...

    @property
    def observed(self) -> Observed | None: ...

    @property
    def passes(self) -> Sequence[tuple[Step, Pass]]: ...

    @property
    def matching(self) -> Matching: ...

    @property
    def recordings(self) -> Sequence[Recording]: ...

    @property
    def remembered(self) -> Memories: ...

    @property
    def report(self) -> Report: ...

    def rewrite(self, ctx: Context, stage: str) -> None: ...

    def check_matches(self, stage: str | None) -> None: ...
