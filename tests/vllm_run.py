"""One engine of vLLM in a process of its own: ``python -m tests.vllm_run JOB.json``; writes what came out next to it.

The job: ``engine`` (arguments of ``vllm.LLM``), ``prompts`` (``[text, [picture file, ...]]``), ``rounds``, ``tokens``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(file: Path) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    job = json.loads(file.read_text())
    engine = LLM(**job["engine"])
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, logprobs=5, ignore_eos=True)
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": [Image.open(name) for name in names]}}
        for text, names in job["prompts"]
    ]
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(job["rounds"]):
        rounds.append([])
        for answer in engine.generate(prompts, sampling):
            (found,) = answer.outputs
            rounds[-1].append(
                {
                    "prompt": len(answer.prompt_token_ids),
                    "cached": answer.num_cached_tokens,
                    "tokens": list(found.token_ids),
                    "logprobs": [{str(t): p.logprob for t, p in step.items()} for step in found.logprobs],
                }
            )
    file.with_suffix(".out").write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
