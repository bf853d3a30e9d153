"""Models whose weights are divided between two processes: the same results as in one, or a refusal that says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokcompile
from tests.small_models import vit, vlm


def recipe(name: str, **params: Any) -> dict[str, Any]:
    return {"recipe_version": 1, "steps": [{"pass": name, "params": params}]}


SPARSE = recipe("token_sparse", keep=0.25, least=4, window=4, min_length=8, calm=1.0)
PRUNED = recipe("todre", keep=0.5)


def llm() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.generation_config = GenerationConfig(pad_token_id=0)
    ids = torch.randint(5, 64, (2, 24))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def parallel(model: nn.Module, plan: dict[str, str] | str = "auto") -> nn.Module:
    """The model, read again from a folder with its weights divided (``tp_plan``)."""
    import torch.distributed as dist

    folder = os.environ["STORE"] + ".model." + type(model).__name__
    if dist.get_rank() == 0:
        model.save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    return type(model).from_pretrained(folder, tp_plan=plan).eval()  # type: ignore[attr-defined, no-any-return]


def equal(name: str, build: Callable[[], tuple[Any, dict[str, Any]]], what: Any, copied: bool = True) -> Any:
    """Prefill and greedy tokens of the divided model against those of the whole one, both optimized."""
    model, inputs = build()
    whole, divided = model, parallel(model)
    if what is not None:
        whole = tokcompile.optimize(model, what, lowering="eager")
        divided = tokcompile.optimize(divided, what, lowering="eager", inplace=not copied)
    torch.testing.assert_close(divided(**inputs).logits, whole(**inputs).logits, rtol=0, atol=1e-4, msg=name)
    more = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(divided.generate(**inputs, **more), whole.generate(**inputs, **more)), name
    if what is not None:
        assert not any(stage.fell_back for stage in tokcompile.report(divided).stages), name
        assert [s.matches for s in tokcompile.report(divided).steps] == [
            s.matches for s in tokcompile.report(whole).steps
        ]
    return divided


def _decoder() -> None:
    divided = equal("decoder", llm, SPARSE)
    layer = divided.model.layers[0].self_attn.q_proj
    held = [c.cell_contents for c in layer.forward.__closure__]
    assert layer in held  # the copy runs its own layers
    with tokcompile.record(divided):  # and nothing of it stands for a plain weight
        assert type(layer.weight).__name__ == "DTensor"


def _vision_language() -> None:
    equal("vlm", vlm, PRUNED)


def _gradients() -> None:
    model, inputs = llm()
    divided = tokcompile.optimize(parallel(model), SPARSE, lowering="eager", on_no_match="ignore")
    with torch.enable_grad():
        torch.testing.assert_close(divided(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)
    assert "call the model under torch.no_grad()" in tokcompile.report(divided).stages[0].reason


def _one_list() -> None:
    model, inputs = llm()
    what = recipe("tokenselect", budget=12, sinks=2, recent=2, dense_below=1)
    divided = tokcompile.optimize(parallel(model), what, lowering="eager", on_no_match="ignore")
    more = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(divided.generate(**inputs, **more), model.generate(**inputs, **more))  # type: ignore[operator]
    assert "one list for all heads" in tokcompile.report(divided).steps[0].reason


def _weights() -> None:
    for name, params in {
        "stem": {"convert": 1.0},
        "moe_from_dense": {"experts": 8, "shared": 3, "active": 3, "gate": "off"},
    }.items():
        model, inputs = llm()
        with pytest.raises(tokcompile.TokcompileError, match="of class DTensor, whose entries cannot be read"):
            tokcompile.optimize(parallel(model), recipe(name, **params), calibration=[inputs], lowering="eager")


def _encoder() -> None:
    """Layers divided by torch itself: what all ranks hold is chosen from, what each has a part of is not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ffn = {"mlp.fc1": ColwiseParallel, "mlp.fc2": RowwiseParallel}
    attention = {f"attention.{n}_proj": ColwiseParallel for n in "qkv"} | {"attention.o_proj": RowwiseParallel}
    for ends, name, served in (
        (ffn, "class_attention", True),
        (attention, "class_attention", False),
        (attention, "patch_random", True),
    ):
        model, pixels = vit()
        half = recipe(name, keep=[0.5], at=[0.5])
        dense = model(pixel_values=pixels)[0]
        want = tokcompile.optimize(model, half, lowering="eager")(pixel_values=pixels)[0]
        plan = {n: k() for n, _ in model.named_modules() for end, k in ends.items() if n.endswith(end)}
        assert len(plan) == 2 * len(ends)
        divided = parallelize_module(vit()[0], init_device_mesh("cpu", (2,)), plan)
        kept = tokcompile.optimize(divided, half, lowering="eager", on_no_match="ignore")
        got = kept(pixel_values=pixels)[0]
        step = tokcompile.report(kept).steps[0]
        torch.testing.assert_close(got, want if served else dense, rtol=0, atol=1e-5)
        assert step.matches == int(served)
        assert served or "divided between processes" in step.reason


CASES = {
    "decoder": _decoder,
    "vision_language": _vision_language,
    "gradients": _gradients,
    "one_list": _one_list,
    "weights": _weights,
    "encoder": _encoder,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        more |= {"CASE": name, "STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.test_tensor_parallel"]
        return subprocess.Popen(command, env=os.environ | more, stderr=subprocess.PIPE, text=True)

    processes = [start(rank) for rank in range(2)]
    said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-2000:] + said[1][-2000:]


if __name__ == "__main__":
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    with torch.no_grad():
        CASES[os.environ["CASE"]]()
    dist.barrier()
    dist.destroy_process_group()
