"""Stages whose sizes come from the values of integer inputs: captured for these values, exact, and never by mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokcompile
from tokcompile.capture.by_values import MOST_VARIANTS, ByValues, specialise
from tokcompile.capture.canonical import canonicalise
from tokcompile.capture.capture import from_dynamo
from tokcompile.capture.failures import explain_failure
from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.known_trace import UntraceableError
from tokcompile.capture.packed import PACKED, block_mask
from tokcompile.regions import find_regions
from tokcompile.runtime.compiled_call import CAPTURE_FAILURES
from tokcompile.runtime.session import Session

from .zoo import vlm

GRIDS = (torch.tensor([[1, 4, 4], [1, 2, 6]]), torch.tensor([[1, 2, 2]]), torch.tensor([[1, 6, 4]]))


def run(graph: Any, _inputs: Any) -> Any:
    return graph


class Attention(nn.Module):
    """Attention within each image, images one behind the other in one row."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).view(1, len(x), 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        parts = [
            F.scaled_dot_product_attention(*part).transpose(1, 2).contiguous()
            for part in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        ]
        return self.out(torch.cat(parts, 1).reshape(len(x), -1))


class Packed(nn.Module):
    """An encoder of images of any size: rows of patches, and their grids."""

    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.patch, self.row = nn.Conv2d(3, width, 4, 4), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "attention": Attention(width),
                    "mlp": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)),
                }
            )
            for _ in range(layers)
        )

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        x = self.patch(pixels.view(-1, 3, 4, 4)).flatten(1)
        x = x + self.row(torch.cat([torch.arange(h).repeat_interleave(w) for _, h, w in grid]))
        lengths = grid.prod(-1).tolist()
        for block in self.blocks:
            x = x + block["attention"](block["norm"](x), lengths)
            x = x + block["mlp"](x)
        return x


def patches(grid: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 48, generator=torch.Generator().manual_seed(seed))


def encode(model: nn.Module, kwargs: dict[str, Any]) -> Any:
    return model(**kwargs)


@pytest.fixture
def packed() -> Packed:
    torch.manual_seed(0)
    return Packed().eval()


@pytest.mark.parametrize("grid", GRIDS)
def test_equal_bit_for_bit_on_other_pixels(packed: Packed, grid: Tensor) -> None:
    captured = ByValues(encode, run)
    with torch.no_grad():
        for seed in range(2):
            pixels = patches(grid, seed)
            assert torch.equal(captured(packed, {"pixels": pixels, "grid": grid}), packed(pixels, grid))
    assert captured.made == 1


def test_nodes_carry_module_path_and_line(packed: Packed) -> None:
    graph = specialise(encode, [packed, {"pixels": patches(GRIDS[0]), "grid": GRIDS[0]}]).graph_module.graph
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [module_path(n) for n in linears][:2] == ["blocks.0.attention.qkv", "blocks.0.attention.out"]
    assert all("test_by_values.py" in source_line(n) for n in linears)
    assert "inputs" in str(graph.find_nodes(op="placeholder")[-1].target)


def test_an_encoder_region_of_as_many_layers(packed: Packed) -> None:
    for grid in GRIDS:
        captured = from_dynamo(specialise(encode, [packed, {"pixels": patches(grid), "grid": grid}]).graph_module)
        canonicalise(captured)
        regions = find_regions(captured.graph)
        assert [len(regions.of(kind)) for kind in ("vision_encoder", "attention", "feed_forward")] == [1, 3, 3]
        assert len(regions.of("vision_encoder")[0].layers) == 3
        assert len(captured.graph.find_nodes(op="call_function", target=PACKED)) == (3 if len(grid) > 1 else 0)


def test_packed_attention_is_a_mask_of_blocks() -> None:
    q, k, v = torch.randn(3, 1, 2, 11, 8, dtype=torch.float64).unbind()
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask([3, 1, 7], q.device), scale=0.3)
    torch.testing.assert_close(torch.ops.tokcompile.packed_attention(q, k, v, [3, 1, 7], 0.3), want)


class Unlike(nn.Module):
    """Pieces that are no packed attention: exchanged, of other keys, or joined along another axis."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        a, b = x.view(1, 2, -1, 4).split(grid.prod(-1).tolist(), 2)
        if self.kind == "exchanged":
            return torch.cat([F.scaled_dot_product_attention(t, t, t) for t in (b, a)], 2)
        if self.kind == "other keys":
            return torch.cat([F.scaled_dot_product_attention(q, k, k) for q, k in ((a, b), (b, a))], 2)
        return torch.cat([F.scaled_dot_product_attention(t, t, t, is_causal=t is a) for t in (a, b)], 2)


@pytest.mark.parametrize("kind", ["exchanged", "other keys", "causal"])
def test_pieces_that_are_not_packed_stay(kind: str) -> None:
    grid, x = torch.tensor([[1, 2, 2], [1, 2, 2]]), torch.randn(8, 8)
    specialised = specialise(encode, [Unlike(kind), {"x": x, "grid": grid}])
    captured = from_dynamo(specialised.graph_module)
    canonicalise(captured)
    assert not captured.graph.find_nodes(op="call_function", target=PACKED)
    assert torch.equal(captured.graph_module(x)[0], Unlike(kind)(x, grid))


class Reads(nn.Module):
    """A module that decides by a number."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.scale, self.weight = of, nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(4))
        self.limit: Tensor
        self.register_buffer("limit", torch.tensor(3))

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        if self.of == "input":
            return x * x.sum().item()
        if self.of == "branch":
            return x * 2 if x.mean() > 0 else x
        if self.of == "parameter":
            return x * float(self.scale)
        if self.of == "buffer":
            return x[: int(self.limit)]
        if self.of == "shape":
            return x[x > 0]
        if self.of == "mixed":
            return x[: int((sizes.sum() * (x > 9).any()).item())]
        filled = torch.zeros(6)
        filled[:4] = self.weight
        return x * filled.tolist()[0]


@pytest.mark.parametrize("of", ["input", "branch", "parameter", "buffer", "shape", "mixed", "written"])
def test_reads_of_what_depends_on_an_input_are_refused(of: str) -> None:
    with pytest.raises(UntraceableError, match=r"test_by_values\.py:\d+") as refused:
        specialise(encode, [Reads(of), {"x": torch.randn(6), "sizes": torch.tensor([2])}])
    if of in ("input", "mixed"):
        assert "x" in str(refused.value)
        assert "inputs_" in str(refused.value)


class Fills(nn.Module):
    """Masks and tables filled in place, from values, from literals, and from an input."""

    def forward(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, int]:
        n, mask = len(x), torch.full((len(x), len(x)), -1.0)
        ends = F.pad(sizes.cumsum(0), (1, 0))
        for i in range(1, len(ends)):
            mask[ends[i - 1] : ends[i], ends[i - 1] : ends[i]] = 0.0
        before = mask * x  # as it is now, not as it will be
        mask += torch.tensor(1.0)
        out = torch.empty(n, 2)
        out[:, 0], out[:, 1] = x, torch.arange(n)
        whole = x.new_zeros(n)
        whole[sizes.nonzero().flatten()] = 1.0
        return before + mask, out * whole[:, None], int(sizes.max())


def test_writes_into_constants_and_into_what_inputs_are_written_to() -> None:
    sizes, model = torch.tensor([2, 3, 0, 1]), Fills()
    captured = ByValues(encode, run)
    for seed in range(3):
        x = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        got, want = captured(model, {"x": x, "sizes": sizes}), model(x, sizes)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert got[2] == want[2] == 3
    assert captured.made == 1


def test_variants_by_values_and_settings(packed: Packed) -> None:
    made: list[Any] = []
    captured = ByValues(encode, lambda graph, _: made.append(graph) or graph, made.remove)

    def call(grid: Tensor) -> None:
        assert torch.equal(captured(packed, {"pixels": patches(grid), "grid": grid}), packed(patches(grid), grid))

    call(GRIDS[0])
    call(GRIDS[0].clone())
    assert captured.made == 1
    for n in range(1, MOST_VARIANTS + 2):
        call(GRIDS[0])  # in use, and so not the oldest
        call(torch.tensor([[1, 1, n]]))
    assert captured.made == MOST_VARIANTS + 2
    assert len(captured.variants) == len(made) == MOST_VARIANTS
    call(GRIDS[0])
    assert captured.made == MOST_VARIANTS + 2
    with torch.no_grad():
        packed.row.weight.mul_(2)  # new values need no new graph
    call(GRIDS[0])
    assert captured.made == MOST_VARIANTS + 2
    packed.double()
    grid = GRIDS[0]
    got = captured(packed, {"pixels": patches(grid).double(), "grid": grid})
    assert got.dtype == torch.float64
    assert torch.equal(got, packed(patches(grid).double(), grid))


class Setting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.inner = 2, nn.Dropout(0.5)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return self.inner(x[: int(sizes[0])]) * self.factor


def test_a_changed_setting_makes_a_new_graph() -> None:
    model, captured = Setting().eval(), ByValues(encode, run)
    inputs = {"x": torch.ones(4), "sizes": torch.tensor([3])}
    assert captured(model, inputs).tolist() == [2, 2, 2]
    model.factor = 5
    assert captured(model, inputs).tolist() == [5, 5, 5]
    model.train()
    assert set(captured(model, inputs).tolist()) <= {0.0, 10.0}
    assert captured.made == 3


class Keeps(nn.Module):
    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        self.last = x * 2
        return self.last


def test_modules_are_as_before() -> None:
    model = Keeps()
    with pytest.raises(UntraceableError, match="last keeps a tensor of one call"):
        specialise(encode, [model, {"x": torch.ones(2), "sizes": torch.tensor([1])}])
    assert "last" not in vars(model)
    reads = Reads("input")
    before = {name: id(p) for name, p in [*reads.named_parameters(), *reads.named_buffers()]}
    with pytest.raises(UntraceableError):
        specialise(encode, [reads, {"x": torch.ones(2), "sizes": torch.tensor([1])}])
    assert {name: id(p) for name, p in [*reads.named_parameters(), *reads.named_buffers()]} == before
    assert not reads._forward_hooks
    assert not reads._forward_pre_hooks


def test_gradients(packed: Packed) -> None:
    grid, captured = GRIDS[0], ByValues(encode, run)
    gradients = []
    for call in (
        lambda: captured(packed, {"pixels": patches(grid), "grid": grid}),
        lambda: packed(patches(grid), grid),
    ):
        packed.zero_grad()
        call().square().sum().backward()
        gradients.append([p.grad.clone() for p in packed.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


# .. vision-language models

NAMES = [
    "qwen2_5_vl",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2_vl", "qwen3_vl", "llava_next", "llava_onevision")),
]
KEEP_ALL = {"recipe_version": 1, "steps": [{"pass": "todre", "params": {"keep": 1.0}}]}


def case_inputs(name: str, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    case = vlm.VLMS[name]()
    return case, case.inputs(batch=2, images_per_row=[2, 1], left_padding=3, sizes=list(range(case.n_sizes)), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_image_encoders_are_captured_and_exact(name: str) -> None:
    case, inputs = case_inputs(name)
    fast = tokcompile.optimize(case.model, KEEP_ALL, lowering="eager")
    with torch.no_grad():
        for seed in range(2):
            inputs = case_inputs(name, seed)[1]
            torch.testing.assert_close(fast(**inputs).logits, case.model(**inputs).logits, rtol=0, atol=1e-5)
    report = tokcompile.report(fast)
    stages = [s for s in report.stages if s.name == "encoder"]
    assert stages
    assert all(s.captured for s in stages)
    kinds = [r["kind"] for r in report.regions if r["stage"] == "encoder"]
    assert kinds.count("vision_encoder") == 1
    assert kinds.count("attention") == kinds.count("feed_forward") > 0
    if "image_grid_thw" not in inputs:
        return
    with torch.no_grad():
        pixels, grid = torch.randn(16, inputs["pixel_values"].shape[1]), torch.tensor([[1, 4, 4]])
        fast.base_model.get_image_features(pixel_values=pixels, image_grid_thw=grid)
    said = [s.reason for s in tokcompile.report(fast).stages if s.name == "encoder"]
    assert [text.split(" of ")[0] for text in said] == ["variant 1", "variant 2"]
    assert "image_grid_thw [[" in said[0]
    assert "vision_utils.py:" in said[0]
    assert said[1].endswith("image_grid_thw [[1, 4, 4]]")


def test_choices_inside_the_encoder_are_made_or_refused_by_name() -> None:
    case, inputs = case_inputs("qwen2_5_vl")
    steps = [
        {"pass": "vtc_cls", "params": {"keep": 0.5}},
        {"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}},
        {"pass": "patch_merge", "params": {"keep": [0.5], "at": [0.5]}},
    ]
    report = tokcompile.explain(case.model, inputs, {"recipe_version": 1, "steps": steps})
    reasons = [step.reason for step in report.steps]
    assert "no class token" in reasons[0]
    assert "one behind the other" in reasons[1]
    assert "one behind the other" in reasons[2]


def test_an_encoder_alone_is_captured_too() -> None:
    case, inputs = case_inputs("qwen2_5_vl")
    tower = case.model.model.visual
    inputs = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
    report = tokcompile.explain(tower, inputs)
    assert report.stages[0].captured
    assert [r["kind"] for r in report.regions].count("vision_encoder") == 1


def test_a_failed_capture_says_where_and_what_to_do() -> None:
    def broken(x: Tensor) -> Tensor:
        return torch._dynamo.graph_break() or x

    for backend in ("eager",):
        try:
            torch.compile(broken, backend=backend, fullgraph=True)(torch.ones(1))
        except CAPTURE_FAILURES as error:
            said = explain_failure(error)
    assert "test_by_values.py:" in said
    assert "hint:" in said
    assert "explanation:" in said
    assert "\n" not in said


@pytest.mark.inductor
def test_inductor() -> None:
    torch.manual_seed(0)
    model, grid = Packed(layers=1).eval(), GRIDS[0]
    captured = ByValues(encode, Session(None, lowering="inductor").backend)
    with torch.no_grad():
        for seed in range(2):
            pixels = patches(grid, seed)
            got = captured(model, {"pixels": pixels, "grid": grid})
            torch.testing.assert_close(got, model(pixels, grid), rtol=0, atol=1e-5)


def test_inference_mode(packed: Packed) -> None:
    captured = ByValues(encode, Session(None, lowering="eager").backend)
    with torch.inference_mode():
        assert torch.equal(
            captured(packed, {"pixels": patches(GRIDS[0]), "grid": GRIDS[0]}), packed(patches(GRIDS[0]), GRIDS[0])
        )


def test_integers_alone_are_not_taken_by_value() -> None:
    with pytest.raises(UntraceableError, match="no floating-point input"):
        ByValues(lambda ids: ids[: int(ids[0])], run)(torch.tensor([2, 5, 7]))
