"""How many tokens to keep: :class:`Budget`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from tokcompile.recipe.wording import percent_hint, shown

_MAX_DENOMINATOR = 10**6


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep: a ratio in (0, 1], or a count of at least 1. Held in integers.

    A float ``ceil(ratio * n)`` differs between runtimes; ``(n * num + den - 1) // den`` does not.

    Attributes:
        num: numerator of the ratio, or the count.
        den: denominator of the ratio (at most 10**6), 1 for a count.
        is_count: whether it is a count. In YAML ``1`` is a count of one token, ``1.0`` the ratio "all".
    """

    num: int
    den: int
    is_count: bool = False

    @classmethod
    def of(cls, value: Any) -> Budget:
        """Make a budget from a ratio (float) or a count (int).

        Raises:
            ValueError: neither a ratio in [1e-6, 1] nor an integer of at least 1.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"should be a ratio in (0, 1] or a whole number of tokens, found {shown(value)}" + percent_hint(value)
            )
        if isinstance(value, int):
            if value < 1:
                raise ValueError(f"a count of tokens should be at least 1, found {value}")
            return cls(value, 1, True)
        if not (math.isfinite(value) and 0 < value <= 1):
            hint = (
                f"; for a count write {value:.0f}" if math.isfinite(value) and value > 1 and value.is_integer() else ""
            )
            raise ValueError(f"a ratio should be in (0, 1], found {value}{hint}")
        ratio = Fraction(str(value)).limit_denominator(_MAX_DENOMINATOR)
        if not ratio:
            raise ValueError(f"a ratio should be at least {1 / _MAX_DENOMINATOR:.6f}, found {value}")
        return cls(ratio.numerator, ratio.denominator)

    @property
    def value(self) -> int | float:
        """The budget as a recipe writes it: an int for a count, a float for a ratio."""
        return self.num if self.is_count else self.num / self.den

    def count(self, n: Any) -> Any:
        """Tokens kept of ``n`` (an int, or a symbolic size that is at least 1): at least 1, at most ``n``; 0 of 0."""
        if not self.is_count:
            return (n * self.num + self.den - 1) // self.den
        if isinstance(n, int):
            return min(n, self.num)
        import torch

        return torch.sym_min(n, self.num)  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        return str(self.num) if self.is_count else f"{100 * self.num / self.den:g} %"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.plain_serializer_function_ser_schema(lambda budget: budget.value)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "ratio"},
                {"type": "integer", "minimum": 1, "description": "count"},
            ],
            "unit": "share of the tokens, or tokens",
        }
