"""Which tensors of a model changed since it was optimized."""

from __future__ import annotations

from torch import nn

from tokcompile.api import session_of
from tokcompile.save.format import plain_json
from tokcompile.state import origin


def changed(model: nn.Module) -> dict[str, str]:
    """Tensors of the dense model that are no longer what they were when it was optimized: name -> how.

    Seen are changes in place (an optimizer step, ``load_state_dict``) and conversions of the dtype, not writes to
    ``tensor.data``, which PyTorch does not count.
    """
    session = session_of(model)
    now, lost = origin(model), dict(session.changed)
    for name, (version, dtype) in session.origin.items():
        if name not in now:
            lost[name] = "removed"
        elif now[name][1] != dtype:
            lost[name] = f"converted from {plain_json(dtype)} to {plain_json(now[name][1])}"
        elif now[name][0] != version:
            lost[name] = "changed in place"
    return lost
