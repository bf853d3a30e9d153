"""Weights that are no plain tensors: the same result as the model without tokcompile, or a refusal that says why."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokcompile
from tests.small_models import vit
from tokcompile.demo import tiny_llm, tiny_vit
from tokcompile.lower.wrapped import wrapped_kind


def at_half(keep: float) -> dict[str, Any]:
    return {"recipe_version": 1, "steps": [{"pass": "class_attention", "params": {"keep": [keep], "at": [0.5]}}]}


class Rounded(Tensor):
    """A weight ``values * scale``. It knows ``linear``, and not one of the operations that ``linear`` is made of."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Rounded:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)  # type: ignore

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Rounded:
        return Rounded(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.embedding):
            args = [arg.values * arg.scale if isinstance(arg, Rounded) else arg for arg in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return Rounded(func(args[0].values), func(args[0].scale))
        raise NotImplementedError(f"{func} of a rounded weight")


def round_weights(model: nn.Module, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    for module in model.modules():
        if isinstance(module, kind):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            values = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Rounded(values, scale), requires_grad=False)
    return model


def plain_weights(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Rounded):
                setattr(module, name, nn.Parameter(parameter.values * parameter.scale, requires_grad=False))
    return model


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_a_model_of_wrapped_weights_equals_it(kind: type[nn.Module]) -> None:
    model, inputs = tiny_llm() if kind is nn.Embedding else tiny_vit()
    if kind is nn.Embedding:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    round_weights(model, kind)
    with torch.no_grad():
        fast = tokcompile.optimize(model, at_half(1.0), lowering="eager", on_no_match="ignore")
        assert torch.equal(fast(**inputs)[0], model(**inputs)[0])
    assert all(stage.captured for stage in tokcompile.report(fast).stages)


def test_pruned_as_the_model_with_plain_weights() -> None:
    model, inputs = tiny_vit()
    round_weights(model)
    with torch.no_grad():
        got = tokcompile.optimize(model, at_half(0.5), lowering="eager")(**inputs)[0]
        want = tokcompile.optimize(plain_weights(model), at_half(0.5), lowering="eager")(**inputs)[0]
    assert got.shape[1] < 1 + inputs["pixel_values"].shape[2] ** 2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "params"),
    [("stem", {"convert": 1.0}), ("moe_from_dense", {"experts": 8, "shared": 3, "active": 3, "gate": "off"})],
)
def test_passes_that_read_weights_refuse_by_name(name: str, params: dict[str, Any]) -> None:
    model, inputs = tiny_llm()
    round_weights(model)
    recipe = {"recipe_version": 1, "steps": [{"pass": name, "params": params}]}
    with pytest.raises(tokcompile.TokcompileError, match="of class Rounded, whose entries cannot be read"):
        tokcompile.optimize(model, recipe, calibration=[inputs], lowering="eager")


def test_plain_tensors_are_not_wrapped() -> None:
    assert wrapped_kind(torch.ones(1)) == wrapped_kind(nn.Parameter(torch.ones(1))) == wrapped_kind(3) == ""
    assert wrapped_kind(Rounded(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1))) == "Rounded"


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(name: str) -> None:
    from torchao import quantization

    model, inputs = tiny_vit()
    quantization.quantize_(model, getattr(quantization, name)())
    with torch.no_grad():
        want = model(**inputs)[0]
        assert torch.equal(tokcompile.optimize(model, at_half(1.0), lowering="eager")(**inputs)[0], want)
        assert tokcompile.optimize(model, at_half(0.5), lowering="eager")(**inputs)[0].shape[1] < want.shape[1]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_offload_is_refused_by_name_and_alignment_served() -> None:
    import accelerate

    model, inputs = tiny_vit()
    with torch.no_grad():
        want = tokcompile.optimize(model, at_half(0.5), lowering="eager")(**inputs)[0]
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(io_same_device=True))
        assert torch.equal(tokcompile.optimize(model, at_half(0.5), lowering="eager")(**inputs)[0], want)
        model, inputs = tiny_vit()
        dense = model(**inputs)[0]
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(tokcompile.NoMatchError, match="accelerate moves the weights"):
            tokcompile.optimize(model, at_half(0.5), lowering="eager")(**inputs)
        kept = tokcompile.optimize(model, at_half(0.5), lowering="eager", on_no_match="ignore")
        assert torch.equal(kept(**inputs)[0], dense)


# .. two processes


def _whole(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model, inputs = tiny_vit()
    with torch.no_grad():
        want = tokcompile.optimize(model, at_half(0.5), lowering="eager")(**inputs)[0]
        fully_shard(model)
        assert torch.equal(tokcompile.optimize(model, at_half(0.5), lowering="eager", inplace=True)(**inputs)[0], want)


def _copied(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model, _ = tiny_vit()
    fully_shard(model)
    with pytest.raises(tokcompile.TokcompileError, match="inplace=True"):
        tokcompile.optimize(model, at_half(0.5), lowering="eager")


def _layers(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    for root, policy in ((True, {}), (False, {}), (True, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)})):
        model, inputs = vit()
        inputs = {"pixel_values": inputs}
        half = tokcompile.optimize(copy.deepcopy(model), at_half(0.5), lowering="eager")
        for layer in model.encoder.layer:
            fully_shard(layer, **policy)
        if root:
            fully_shard(model, **policy)
        with torch.no_grad():
            dense = model(**inputs)[0]
        kept = tokcompile.optimize(model, at_half(0.5), lowering="eager", on_no_match="ignore", inplace=True)
        if not policy:
            for _ in range(2):
                with torch.no_grad():
                    assert torch.equal(kept(**inputs)[0], half(**inputs)[0])
                assert all(isinstance(p, DTensor) for p in model.encoder.layer.parameters())  # given back
            kept(**inputs)[0].sum().backward()  # by the layers of FSDP
            assert model.encoder.layer[0].mlp.fc1.weight.grad is not None
        else:
            with torch.no_grad():
                assert torch.equal(kept(**inputs)[0], dense)
        stage = tokcompile.report(kept).stages[-1]
        assert not stage.captured
        assert "FSDP gathers the weights of single layers" in stage.reason


CASES = {"whole": _whole, "copied": _copied, "layers": _layers}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        more = {"RANK": str(rank), "WORLD_SIZE": "2", "CASE": name, "STORE": str(tmp_path / "store")}
        more |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / str(rank))}
        command = [sys.executable, "-m", "tests.test_wrapped_weights"]
        return subprocess.Popen(command, env=os.environ | more, stderr=subprocess.PIPE, text=True)

    processes = [start(rank) for rank in range(2)]
    said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-2000:] + said[1][-2000:]


if __name__ == "__main__":
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    CASES[os.environ["CASE"]](rank)
    dist.barrier()
    dist.destroy_process_group()
