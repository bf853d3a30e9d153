"""What a compiled graph needs of its session. The session keeps its graphs, so they cannot name its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokcompile.errors import RewriteError
from tokcompile.kinds import Stage
from tokcompile.plan.observed import Observed
from tokcompile.plan.pass_base import Pass
from tokcompile.recipe.steps import Step
from tokcompile.reporting.report import StageReport
from tokcompile.rewrite.context import Context
from tokcompile.runtime.memories import Memories
from tokcompile.runtime.recording import Recordings
from tokcompile.state import PreparedState


class Owner(Protocol):
    """Read by :class:`tokcompile.runtime.compiled_graph.CompiledGraph`; see ``runtime.session.Session``."""

    lowering: str
    counting: bool

    @property
    def prepared(self) -> PreparedState | None: ...

    @property
    def observed(self) -> Observed | None: ...

    @property
    def passes(self) -> Sequence[tuple[Step, Pass]]: ...

    @property
    def recordings(self) -> Recordings: ...

    @property
    def remembered(self) -> Memories: ...

    def rewrite(self, ctx: Context, stage: Stage) -> None: ...

    def leave_out(self, error: RewriteError) -> None: ...

    def check_matches(self, stage: Stage) -> None: ...

    def note_compiled(self, stage: StageReport, *, cut: bool) -> None: ...
