"""What tests of exported models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcompile import OnnxModel

#: New tokens that an exported model and its original are compared over: of the prefill, and of 8 decode steps.
STEPS = 9


def arrays(inputs: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def both(path: Path, model: Any, inputs: dict[str, Tensor]) -> tuple[float, bool]:
    """Relative error of the logits of all steps, and whether the tokens are equal."""
    logits: list[Any] = []
    found = OnnxModel.from_pretrained(path).generate(
        **arrays(inputs), max_new_tokens=STEPS, eos_token_id=-1, on_logits=logits.append
    )
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=10_000,
            return_dict_in_generate=True,
            output_logits=True,
        )
    wanted = torch.stack(out.logits, 1).numpy()
    error = float(np.linalg.norm(np.stack(logits, 1) - wanted) / np.linalg.norm(wanted))
    return error, np.array_equal(found, out.sequences.numpy())
