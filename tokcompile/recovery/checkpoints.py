"""Checkpoints of a recovery: tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokcompile.errors import RecoveryError

FORMAT = "tokcompile-recovery"
_STATE, _TENSORS, _START = "state.json", "tensors.safetensors", "start.safetensors"


class Checkpoints:
    """A folder with the last checkpoint of one run; a run with other settings is refused.

    Args:
        settings: what has to be the same for a run to be continued (JSON values).
        parameters: the trained ones by name.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        accelerator: Accelerator,
    ) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.parameters, self.optimizer, self.scheduler = parameters, optimizer, scheduler
        self.accelerator = accelerator

    def _saved(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if (p / _STATE).is_file() and not p.name.endswith(".part"))

    def start(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that the run began with: written once, read by a run that goes on."""
        path = self.folder / _START
        if not self._saved():
            if self.accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({n: w.contiguous() for n, w in weights.items()}, path)
            self.accelerator.wait_for_everyone()
            return dict(weights)
        return load_file(path, device=str(self.accelerator.device))

    def save(self, step: int, history: Mapping[str, Any]) -> None:
        """After ``step`` steps; earlier checkpoints go once this one is complete."""
        target = self.folder / f"step-{step:08d}"
        part = target.with_suffix(".part")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        save_file(_random_state(), part / f"random-{self.accelerator.process_index}.safetensors")
        if main:
            tensors = {f"weight/{n}": p.detach().contiguous() for n, p in self.parameters.items()}
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{key}/{name}"] = torch.as_tensor(value).contiguous()
            save_file(tensors, part / _TENSORS)
            state = {
                "format": FORMAT,
                "step": step,
                "settings": self.settings,
                "history": history,
                "schedule": self.scheduler.state_dict(),
            }
            (part / _STATE).write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()
        if main:
            old = self._saved()
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
            for path in old:
                if path != target:
                    shutil.rmtree(path, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Take over the last checkpoint: -> (steps done, history), or None where there is none.

        Raises:
            RecoveryError: it belongs to a run with other settings, or cannot be read.
        """
        saved = self._saved()
        if not saved:
            return None
        last = saved[-1]
        try:
            state = json.loads((last / _STATE).read_text())
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']!r}")
            before = state["settings"]
        except (ValueError, KeyError, OSError) as error:
            raise RecoveryError(f"{last} is not a checkpoint of recover ({error}); name another folder") from error
        for key in before.keys() | self.settings.keys():
            if before.get(key) != self.settings.get(key):
                raise RecoveryError(
                    f"{self.folder} holds a run with another {key}: {_short(before.get(key))} there, "
                    f"{_short(self.settings.get(key))} here; name another folder, or call with the same settings"
                )
        tensors = load_file(last / _TENSORS)
        for name, parameter in self.parameters.items():
            if tensors[f"weight/{name}"].shape != parameter.shape:
                raise RecoveryError(
                    f"{last}: {name} is {tuple(tensors[f'weight/{name}'].shape)} there, "
                    f"{tuple(parameter.shape)} in this model; start from the model that the run began "
                    "with (same recipe and calibration)"
                )
        for full, tensor in tensors.items():
            key, _, name = full.partition("/")
            parameter = self.parameters[name]
            if key == "weight":
                with torch.no_grad():
                    parameter.copy_(tensor)
            else:  # Adam keeps its count of steps on the host
                device = "cpu" if key == "step" else parameter.device
                self.optimizer.state[parameter][key] = tensor.to(device)
        self.scheduler.load_state_dict(state["schedule"])
        for group, rate in zip(self.optimizer.param_groups, state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        _restore_random(load_file(last / f"random-{self.accelerator.process_index}.safetensors"))
        return state["step"], state["history"]


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
