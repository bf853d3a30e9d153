"""Results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[..., None]]:
    """A progress line on standard error, where that is a terminal; gives a function that says what is being done."""
    console = stderr()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(text, total=None)

        def say(what: str, done: int = 0, total: int | None = None) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield say


def stdout() -> Console:
    width = None if sys.stdout.isatty() else 120
    return Console(file=sys.stdout, width=width)


def stderr() -> Console:
    return Console(file=sys.stderr)


def write_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table_of(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def first_sentence(text: str) -> str:
    flat = " ".join(text.split())
    return flat.split(". ")[0].rstrip(".") + "." if flat else ""


def yaml_text(data: dict[str, Any]) -> str:
    import io

    from ruamel.yaml import YAML

    stream, yaml = io.StringIO(), YAML(typ="rt", pure=True)
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 110
    yaml.dump(data, stream)
    return stream.getvalue()
