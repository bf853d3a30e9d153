"""Operations that bring rows of a table from host memory to the device of the ids: start, and wait.

``fetch_rows`` gathers the rows into pinned memory and starts a copy on a stream of its own; ``await_rows`` lets the
current stream wait for that copy. What runs between the two runs beside it. On the host the first gathers and the
second does nothing. The ids themselves are copied to the host once, by ``unique_ids``.

Not differentiable: a table in host memory is not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import operation
from .reference import fetch_rows_reference, unique_ids_reference, wanted_rows

_streams: dict[torch.device, torch.cuda.Stream] = {}
#: When the copy to an index is done, by its device and address.
_events: dict[tuple[torch.device, int], torch.cuda.Event] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a CUDA device on which rows are copied."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


@operation("tokcompile::unique_ids", mutates_args=())
def unique_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids that differ, and where each id is among them, in host memory; see ``reference.unique_ids_reference``.

    Args:
        ids: int64 [...], on any device.

    Raises:
        ValueError: another type.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, found {ids.dtype}")
    return unique_ids_reference(ids.cpu())


@unique_ids.register_fake
def _(ids: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(ids.numel(), dtype=torch.int64, device="cpu") for _ in range(2))  # type: ignore


@operation("tokcompile::fetch_rows", mutates_args=())
def fetch_rows(table: Tensor, remap: Tensor, unique: Tensor, place: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Start to bring the rows of some ids to the device of ``ids``; see ``reference.fetch_rows_reference``.

    Args:
        table: [R, f]. remap: int32 or int64 [V].
        unique, place: of :func:`unique_ids`. All four in host memory.
        ids: says where to.

    Returns:
        Rows [N, f] and index int64 [N], on the device of ``ids``. Neither is to be read before :func:`await_rows`; on
        CUDA the rows that no index names are not written.

    Raises:
        ValueError: a table that is not in host memory, or shapes and types that do not fit together.
    """
    _check(table, remap, unique, place)
    if ids.is_cuda:
        return _started(table, *wanted_rows(table, remap, unique, place), ids.device)
    return fetch_rows_reference(table, remap, unique, place)


@fetch_rows.register_fake
def _(table: Tensor, remap: Tensor, unique: Tensor, place: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    _check(table, remap, unique, place)
    return (
        ids.new_empty(unique.shape[0], table.shape[1], dtype=table.dtype),
        ids.new_empty(unique.shape[0], dtype=torch.int64),
    )


def _check(table: Tensor, remap: Tensor, unique: Tensor, place: Tensor) -> None:
    for name, value in (("table", table), ("remap", remap), ("unique", unique), ("place", place)):
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be in host memory, it is on {value.device}")
    if table.ndim != 2 or remap.ndim != 1 or remap.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expected table [R, f] and an integer remap [V], found {tuple(table.shape)} and "
            f"{remap.dtype} {tuple(remap.shape)}"
        )


def _started(table: Tensor, wanted: Tensor, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows ``wanted`` of the table and ``index``, on their way to ``device``."""
    # pinned memory that is let go of here is not handed out again before the copy that reads it is done
    staged = torch.empty(len(wanted), table.shape[1], dtype=table.dtype, pin_memory=True)
    torch.index_select(table, 0, wanted, out=staged)
    numbers = torch.empty(index.shape, dtype=torch.int64, pin_memory=True).copy_(index)
    stream, current = side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        # memory of this stream: the copy need not wait for what the current one still has to do
        rows = torch.empty(len(index), table.shape[1], dtype=table.dtype, device=device)
        places = torch.empty(index.shape, dtype=torch.int64, device=device)
        rows[: len(wanted)].copy_(staged, non_blocking=True)
        places.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    for value in (rows, places):
        value.record_stream(current)
    _events[device, places.data_ptr()] = event
    return rows, places


@operation("tokcompile::await_rows", mutates_args=())
def await_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Let the current stream wait for what :func:`fetch_rows` started.

    Returns:
        The index; what is computed with it finds ``rows`` in place.
    """
    if index.is_cuda:
        event = _events.pop((index.device, index.data_ptr()), None)
        current = torch.cuda.current_stream(index.device)
        if event is not None:
            current.wait_event(event)
        else:  # a copy of the index, of which no event is known
            current.wait_stream(side_stream(index.device))
    return index.clone()


@await_rows.register_fake
def _(rows: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(index)
