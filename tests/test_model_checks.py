"""Checks that model code makes on its inputs hold in a rewritten graph: the model refuses what it refused before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils.import_utils import torch_compilable_check

import tokcompile
from tests.members import members
from tests.pruning import optimized, recipe
from tests.zoo.vlm import IMAGE, llava, shallow
from tokcompile.capture.capture import DYNAMO_CONFIG
from tokcompile.errors import CheckError, ExportError
from tokcompile.runtime import compiled_call

HALF = [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}]
TODRE = [{"pass": "todre", "params": {"keep": 0.25, "drop_layer": 1}}]
RANDOM = [{"pass": "random", "params": {"keep": 0.25}}]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (t.view(batch, tokens, 2, -1).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.n2(x))


class Encoder(nn.Module):
    """Patches and a class token; ``kind`` asks something of the labels and the picture, ``late`` of hidden values."""

    def __init__(self, kind: Callable[[Tensor, Tensor], None], late: bool = False) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
        self.pos, self.blocks = nn.Parameter(torch.randn(1, 17, 16)), nn.ModuleList(Block(16) for _ in range(2))
        self.kind, self.late, self.head = kind, late, nn.Linear(16, 5)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        if not self.late:
            self.kind(image, labels)
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        scores = self.head(x[:, 0])
        if self.late:
            self.kind(scores, labels)
        return scores + 0 * labels[:, None]


def check_item(image: Tensor, labels: Tensor) -> None:
    torch._check(labels.max().item() < 5, lambda: "labels are below 5")


def check_all(image: Tensor, labels: Tensor) -> None:
    torch._check_tensor_all(labels < 5, lambda: "labels are below 5")


def check_async(image: Tensor, labels: Tensor) -> None:
    torch._assert_async((labels < 5).all(), "labels are below 5")


_ASSERT: dict[str, Any] = {}  # not as code of this file: pytest rewrites assertions
exec('def check_assert(image, labels):\n    assert (labels < 5).all(), "labels are below 5"', _ASSERT)
check_assert = _ASSERT["check_assert"]


def check_compilable(image: Tensor, labels: Tensor) -> None:
    torch_compilable_check(labels < 5, lambda: "labels are below 5")


def check_count(image: Tensor, labels: Tensor) -> None:  # a number, compared with a size: tracing takes them for equal
    torch._check((labels < 5).sum().item() == image.shape[0], lambda: "labels are below 5")


def check_sum(image: Tensor, labels: Tensor) -> None:
    torch._check(2 * (labels < 5).sum().item() - image.shape[0] >= image.shape[0], lambda: "labels are below 5")


def check_nonzero(image: Tensor, labels: Tensor) -> None:  # the size is all that there is
    torch._check((labels < 5).nonzero().shape[0] == image.shape[0], lambda: "labels are below 5")


def check_mean(image: Tensor, labels: Tensor) -> None:
    torch._check((labels < 5).float().mean().item() > 0.99, lambda: "labels are below 5")


KINDS = [
    check_item,
    check_all,
    check_async,
    check_assert,
    check_compilable,
    check_count,
    check_sum,
    check_nonzero,
    check_mean,
]


def inputs(*labels: int) -> dict[str, Tensor]:
    return {"image": torch.randn(len(labels), 3, 32, 32), "labels": torch.tensor(labels)}


@pytest.mark.parametrize(
    ("kind", "late"),
    [*((kind, False) for kind in KINDS), (check_async, True), (check_count, True)],
    ids=lambda value: getattr(value, "__name__", "late" if value else "early"),
)
def test_refuses_what_the_model_refuses(kind: Any, late: bool) -> None:
    model = Encoder(kind, late).eval()
    fast = optimized(model, HALF)
    with torch.no_grad():
        more = (inputs(4, 0, 7), inputs(4, 0, 3)) if kind is check_count else ()  # of other sizes
        for given in (inputs(1, 5), inputs(1, 2), inputs(7, 2), *more):  # before and after the graph was made
            try:
                model(**given)
            except Exception as error:
                with pytest.raises(type(error), match="below 5"):
                    fast(**given)
            else:
                assert torch.isfinite(fast(**given)).all()
    entry = tokcompile.report(fast).steps[0]
    assert entry.status == "matched", entry.reason
    assert all(stage.captured for stage in tokcompile.report(fast).stages)


@pytest.mark.parametrize("ask", [torch._assert_async, torch.ops.aten._assert_async.default], ids=["torch", "aten"])
def test_a_check_without_words_holds(ask: Any) -> None:
    model = Encoder(lambda image, labels: ask((labels < 5).all())).eval()
    fast = optimized(model, HALF)
    with torch.no_grad():
        for given in (inputs(1, 5), inputs(1, 2), inputs(7, 2)):
            if (given["labels"] < 5).all():
                fast(**given)
            else:
                with pytest.raises(RuntimeError, match=r"Assertion is failed|got zero"):  # the words of torch
                    fast(**given)


@pytest.mark.inductor
@pytest.mark.parametrize("late", members([False, True], [True]), ids=["early", "late"])
def test_holds_in_compiled_graphs(late: bool) -> None:
    fast = optimized(Encoder(check_count, late).eval(), HALF, lowering="inductor")
    with torch.no_grad():
        assert torch.isfinite(fast(**inputs(1, 2))).all()
        with pytest.raises(RuntimeError, match="below 5"):
            fast(**inputs(1, 5))
        assert torch.isfinite(fast(**inputs(1, 3))).all()


def test_holds_in_training() -> None:
    model = Encoder(check_compilable).train()
    fast = optimized(model, HALF)
    fast(**inputs(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="below 5"):
        fast(**inputs(1, 6))


def test_holds_as_a_backend() -> None:
    """Nobody else can say what is wrong there: the error names the code that checks."""
    # under torch before 2.12, torch.compile itself fails on the other one
    kind, code = (check_item, "_check") if compiled_call._LOSES_CHECKS else (check_compilable, "torch_compilable_check")
    model = Encoder(kind).eval()
    fast = torch.compile(model, backend="tokcompile", options={"recipe": recipe(HALF)}, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG):
        fast(**inputs(1, 2))
        with pytest.raises(CheckError, match=code):
            fast(**inputs(1, 6))


def test_the_choice_is_the_same_with_and_without_checks() -> None:
    torch.manual_seed(0)
    with_checks = Encoder(check_count, late=True).eval()
    without = Encoder(lambda image, labels: None).eval()
    without.load_state_dict(with_checks.state_dict())
    given = inputs(1, 2)
    one, two = optimized(with_checks, HALF), optimized(without, HALF)
    with torch.no_grad(), tokcompile.record(one) as first, tokcompile.record(two) as second:
        assert torch.equal(one(**given), two(**given))
    assert torch.equal(first.kept[0].indices, second.kept[0].indices)


@pytest.mark.parametrize("name", members(["todre", "random"], ["todre"]))
def test_placeholders_and_features(name: str) -> None:
    case = shallow(llava(), 3)
    given, fast = case.inputs(), optimized(case.model, {"todre": TODRE, "random": RANDOM}[name])
    ids = given["input_ids"]
    with torch.no_grad():
        for more in (-1, 1, 16):  # the first one before the graph for right inputs was made
            wrong = torch.cat([ids[:, :3], torch.full((1, max(0, more)), IMAGE), ids[:, 3 + max(0, -more) :]], 1)
            bad = {"input_ids": wrong, "attention_mask": torch.ones_like(wrong), "pixel_values": given["pixel_values"]}
            with pytest.raises(ValueError, match="do not match"):
                fast.generate(**bad, max_new_tokens=2)
            with pytest.raises(ValueError, match="do not match"):
                fast(**bad)
            assert fast.generate(**given, max_new_tokens=2).shape[1] == ids.shape[1] + 2
    assert tokcompile.report(fast).steps[0].status == "matched"


class Checked(nn.Module):
    """A token embedding that says which ids it takes; transformers' models have none."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, ids: Tensor) -> Tensor:
        torch._check_tensor_all(ids != 99, lambda: "99 is no word")
        return nn.functional.embedding(ids, self.weight)


def test_holds_in_decode_steps() -> None:
    case = shallow(llava())
    tower = case.text_tower
    tower.embed_tokens = Checked(tower.embed_tokens)  # type: ignore[assignment]
    fast = optimized(case.model, RANDOM)
    with torch.no_grad():
        cache = fast(**case.inputs(), use_cache=True).past_key_values
        fast(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match="99 is no word"):
            fast(input_ids=torch.tensor([[99]]), past_key_values=cache, use_cache=True)


def test_where_torch_loses_track_of_checks(monkeypatch: Any) -> None:
    """torch before 2.12 fails on a check of a whole tensor; it is asked in another way there."""
    monkeypatch.setattr(compiled_call, "_LOSES_CHECKS", True)
    before = torch._check_tensor_all
    fast = optimized(Encoder(check_compilable).eval(), HALF)
    with torch.no_grad():
        for _ in range(2):
            fast(**inputs(1, 2))
            with pytest.raises(ValueError, match="below 5"):
                fast(**inputs(1, 6))
    assert torch._check_tensor_all is before


@pytest.mark.parametrize(
    ("kind", "late"),
    members(
        [(kind, late) for kind in (check_item, check_async) for late in (False, True)],
        [(check_item, False), (check_async, True)],
    ),
    ids=lambda value: getattr(value, "__name__", "late" if value else "early"),
)
def test_exported_files_say_and_the_runner_refuses(kind: Any, late: bool, tmp_path: Path) -> None:
    model = Encoder(kind, late).eval()
    given = inputs(1, 2)
    tokcompile.export_onnx(model, given, tmp_path / "out", recipe=recipe(HALF))
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]["model"]
    assert entry["checks"]
    assert str(Path(__file__).parent) not in json.dumps(entry)
    run = tokcompile.OnnxModel.from_pretrained(tmp_path / "out")
    right = run(**{name: value.numpy() for name, value in given.items()})
    assert list(right) == [output["name"] for output in entry["outputs"]]
    with pytest.raises(ExportError, match=r"below 5|does not hold"):
        run(image=given["image"].numpy(), labels=np.array([1, 6]))
