"""Runs checkpoints in the real vLLM: jobs as JSON come in on standard input, answers go to the file that is named.

This program is started by the interpreter of an environment with vLLM, and is not imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The greedy tokens after each prompt, and the logarithm of the first one's probability."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["path"],
        dtype="float32",
        enforce_eager=not job["compiled"],
        tensor_parallel_size=job["ranks"],
        max_model_len=96,
        max_num_seqs=4,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    given = []
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        first = output.outputs[0]
        ids = list(first.token_ids)
        given.append({"ids": ids, "logprob": first.logprobs[0][ids[0]].logprob})
    return given


def main() -> None:
    jobs = json.load(sys.stdin)
    Path(sys.argv[1]).write_text(json.dumps([answers(job) for job in jobs]))


if __name__ == "__main__":
    main()
