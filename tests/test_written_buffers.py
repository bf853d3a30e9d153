"""Buffers that model code fills slice by slice, and scatters into a token's own row, are followed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokcompile
from tests.oracle import gaps_of_encoder

KEEP = {"recipe_version": 1, "steps": [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}]}
