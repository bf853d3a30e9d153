"""For mkdocs: the plots of ``benchmarks/results`` are part of the site, though they lie outside of docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the plots, which lie outside of docs/."""
    root = Path(config.config_file_path).parent
    for plot in sorted((root / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"{RESULTS}/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``../benchmarks/results/x.png`` as it is called inside of the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
