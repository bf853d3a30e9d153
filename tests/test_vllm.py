"""vLLM with the plugin gives the tokens and probabilities of transformers with the same recipe.

In an environment of its own: ``make test-vllm``. Every engine runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import tokcompile
from tests.vllm_models import FAMILIES, Family, picture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here (make test-vllm)"),
]

TOLERANCE = 1e-4
TOKENS = 6
RATIO = 0.25
BLOCK = 32  # tokens, of the cache: the smallest that vLLM has on a CPU
QUIET = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    place = tmp_path_factory.mktemp("models")
    return {name: make(place / name) for name, make in FAMILIES.items()}


def recipe(family: Family, **params: Any) -> dict[str, Any]:
    params = {"keep": RATIO, "criterion": "herding", "drop_layer": None, "positions": family.positions} | params
    return {"recipe_version": 1, "steps": [{"pass": "todre", "params": params}]}


def prompts(family: Family) -> list[tuple[str, list[tuple[int, int]]]]:
    """Four prompts of different length, with images of different size; the last has two.

    Behind 20 words an image is in the first block of the cache, behind 28 and 30 it is in two blocks.
    """
    words, sizes = [f"w{i}" for i in range(30, 60)], family.sizes
    found = [
        (" ".join([*words[:count], family.image, *words[: 14 + i]]), [sizes[i % len(sizes)]])
        for i, count in enumerate((20, 28, 30))
    ]
    both = [*words[:9], family.image, "w7", family.image, *words[:17]]
    return [*found, (" ".join(both), [sizes[-1], sizes[0]])]


def serve(
    family: Family,
    place: Path,
    given: Any,
    *,
    rounds: int = 2,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> Any:
    """What an engine answers: for each round, for each prompt."""
    settings = {
        "model": str(family.folder),
        "enforce_eager": True,
        "max_model_len": 192,
        "dtype": "float32",
        "max_num_seqs": 4,
        "block_size": BLOCK,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "limit_mm_per_prompt": {"image": 2, **({"video": 0} if "qwen" in family.name else {})},
    }
    if given is not None:
        settings["additional_config"] = {"tokcompile": given}
    asked = []
    for number, (text, sizes) in enumerate(prompts(family)):
        names = [str(place / f"{number}_{i}.png") for i in range(len(sizes))]
        for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
            picture(size, 10 * number + i).save(name)
        asked.append([text, names])
    job = {"engine": settings | engine, "prompts": asked, "rounds": rounds, "tokens": TOKENS}
    file = place / "job.json"
    file.write_text(json.dumps(job))
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_run", str(file)],
        cwd=root,
        env=os.environ | QUIET | (environment or {}),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-8000:])
    return json.loads(file.with_suffix(".out").read_text())


def wanted(family: Family, steps: dict[str, Any] | None) -> list[tuple[list[int], torch.Tensor, int, int]]:
    """Of transformers: tokens, log probabilities ``[T, V]``, length of the whole prompt, and of the pruned one."""
    import copy

    model = copy.deepcopy(family.model)
    if steps is not None:
        model = tokcompile.optimize(model, steps, lowering="eager")
    found = []
    for number, (text, sizes) in enumerate(prompts(family)):
        images = [picture(size, 10 * number + i) for i, size in enumerate(sizes)]
        inputs = family.processor(text=[text], images=images, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                eos_token_id=None,
            )
        visual = inputs["input_ids"][0] == family.model.config.image_token_id
        runs = int((visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])).sum())
        assert runs == len(sizes)
        left = length - int(visual.sum()) + _kept(visual)
        logits = torch.stack([step[0] for step in out.logits]).log_softmax(-1)
        found.append((out.sequences[0, length:].tolist(), logits, length, left if steps is not None else length))
    return found


def _kept(visual: torch.Tensor) -> int:
    """Of each run of image tokens, the share that the recipe keeps, rounded up."""
    total, run = 0, 0
    for flag in [*visual.tolist(), False]:
        if not flag and run:
            total += -(-run * 25 // 100)
            run = 0
        run += int(flag)
    return total


def check(rounds: Any, right: list[tuple[list[int], torch.Tensor, int, int]]) -> None:
    for number, answers in enumerate(rounds):
        for answer, (tokens, logits, _, left) in zip(answers, right, strict=True):
            assert answer["prompt"] == left
            assert answer["tokens"] == tokens
            worst = max(
                abs(value - float(logits[step, int(token)]))
                for step, said in enumerate(answer["logprobs"])
                for token, value in said.items()
            )
            assert worst < TOLERANCE
            assert answer["cached"] == (0 if number == 0 else (left - 1) // BLOCK * BLOCK)
            assert left > BLOCK


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_same_as_transformers(families: dict[str, Family], name: str, tmp_path: Path) -> None:
    """A batch of 4, images of different size, prompts in chunks of 16 tokens; then again, from the prefix cache."""
    family = families[name]
    right = wanted(family, recipe(family))
    assert all(left < length for _, _, length, left in right)
    check(serve(family, tmp_path, {"recipe": recipe(family)}), right)


def test_two_processes(families: dict[str, Family], tmp_path: Path) -> None:
    """Tensor parallel: each process chooses the same tokens."""
    family = families["llava"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    given = {"recipe": recipe(family)}
    found = serve(family, tmp_path, given, rounds=1, environment=environment, tensor_parallel_size=2)
    check(found, wanted(family, recipe(family)))


def test_from_the_environment(families: dict[str, Family], tmp_path: Path) -> None:
    """A method that changes tokens (their mean goes on), asked for by the environment variable, in one chunk."""
    family = families["llava"]
    steps = {"recipe_version": 1, "steps": [{"pass": "pool", "params": {"keep": RATIO, "positions": "compact"}}]}
    environment = {"TOKCOMPILE_VLLM": json.dumps({"recipe": steps})}
    found = serve(family, tmp_path, None, rounds=1, environment=environment, max_num_batched_tokens=256)
    check(found, wanted(family, steps))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop_layer": 0.875}, "drops tokens inside the decoder too"),
        ({"positions": "keep"}, "vLLM counts positions of one axis without gaps"),
    ],
)
def test_refused_when_it_starts(
    families: dict[str, Family], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    family = families["llava"]
    with pytest.raises(RuntimeError, match=words):
        serve(family, tmp_path, {"recipe": recipe(family, **changes)})
