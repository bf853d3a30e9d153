"""``torch.autocast`` around an optimized model: scores and kernels keep their precision, the rest is cast as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.pruning import optimized
from tests.test_only_patches import Encoder
from tests.zoo.vlm import llava, randomize, shallow
from tokcompile.demo import tiny_llm
from tokcompile.kernels.precision import exact_matmul, matmul

TYPES = [torch.bfloat16, torch.float16]


def relative(found: Tensor, wanted: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def moe(gate: str = "off") -> list[dict[str, Any]]:
    return [{"pass": "moe_from_dense", "params": {"experts": 8, "shared": 3, "active": 5, "gate": gate}}]


#: Everything is kept, so that the result is that of the model under autocast, to the precision of the type.
WHOLE: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "todre": ("vlm", [{"pass": "todre", "params": {"keep": 1.0}}]),
    "class_attention": ("vit", [{"pass": "class_attention", "params": {"keep": [1.0], "at": [0.5]}}]),
    "patch_merge": ("vit", [{"pass": "patch_merge", "params": {"keep": [1.0], "at": [0.5]}}]),
    "moe_from_dense": ("llm", moe()),
    "token_sparse": (
        "llm",
        [
            {
                "pass": "token_sparse",
                "params": {"keep": 1.0, "window": 2, "least": 1, "pool": 1, "calm": 1.0, "min_length": 0},
            }
        ],
    ),
}


def made(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    if kind == "vlm":
        case = shallow(llava(), 3)
        return case.model, case.inputs(batch=2)
    if kind == "vit":
        return randomize(Encoder(1, 0)), {"image": torch.randn(2, 3, 32, 32)}
    return tiny_llm()


def values(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", members(WHOLE, ["todre", "class_attention", "moe_from_dense"]))
def test_as_the_model_under_autocast(name: str) -> None:
    kind, steps = WHOLE[name]
    model, inputs = made(kind)
    fast = optimized(model, steps, calibration=[inputs] if name.startswith("moe") else None)
    with torch.no_grad():
        exact = values(model(**inputs))
        for dtype in TYPES if kind == "vit" else TYPES[:1]:
            with torch.autocast("cpu", dtype):
                wanted, found = values(model(**inputs)), values(fast(**inputs))
            assert found.dtype == wanted.dtype
            assert relative(found, wanted) < 3 * relative(wanted, exact)
        assert relative(values(fast(**inputs)), exact) < 1e-5  # no graph of a call under autocast serves another
    assert tokcompile.report(fast).steps[0].status == "matched"


def test_generation_and_training() -> None:
    case = shallow(llava(), 3)
    inputs = case.inputs(batch=2)
    fast = optimized(case.model, [{"pass": "todre", "params": {"keep": 0.25, "criterion": "k_center"}}])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = fast.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert all(torch.isfinite(step).all() for step in out.logits)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fast(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in fast.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in fast.parameters()) > 10


@pytest.mark.slow
def test_experts_train_under_autocast() -> None:
    model, inputs = tiny_llm()
    fast = optimized(model, moe(), calibration=[inputs])
    with torch.autocast("cpu", torch.bfloat16):
        fast(**inputs, labels=inputs["input_ids"]).loss.backward()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    mine, theirs = (m.model.embed_tokens.weight.grad.norm() for m in (fast, model))  # type: ignore[union-attr]
    assert abs(mine - theirs) < 0.05 * theirs


def test_the_choice_is_made_in_its_own_precision() -> None:
    """The same patches with and without autocast where the scores read what autocast leaves alone."""
    torch.manual_seed(0)
    like = torch.randn(2, 40, 16)
    wanted = like @ like.mT
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matmul(like, like.mT), wanted)
        assert not torch.equal(like @ like.mT, wanted)
        assert torch.ops.tokcompile.exact_matmul(like, like.mT).dtype == torch.float32


def test_product_and_its_gradients() -> None:
    a = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exact_matmul, (a, b))
    torch.library.opcheck(exact_matmul, (a, b))
