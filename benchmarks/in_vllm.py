"""Log-probabilities and greedy tokens of a checkpoint in vLLM, beside those of plain transformers.

    python benchmarks/in_vllm.py for-vllm --vllm PYTHON

`PYTHON` is the interpreter of an environment with vLLM and compressed-tensors. Both engines compute in bfloat16,
since vLLM's product of 4-bit weights on a CPU has no float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "def median(numbers):\n    ordered = sorted(numbers)\n",
    "In the spring of 1912 the expedition",
    "Dear customer, thank you for",
)
NEW_TOKENS = 32

# each writes a list with, for each prompt: the log-probabilities of its tokens from the second on, and the new tokens
BY_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.load(sys.stdin)
llm = LLM(asked["model"], dtype="bfloat16", max_model_len=256, seed=0, enforce_eager=True)
settings = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], prompt_logprobs=0, ignore_eos=True)
made = []
for output in llm.generate(asked["prompts"], settings):
    chances = [
        place[token].logprob
        for token, place in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
    ]
    made.append([chances, list(output.outputs[0].token_ids)])
print("\\nMADE " + json.dumps(made))
"""
BY_TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
asked = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(asked["model"])
model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.bfloat16)
made = []
for prompt in asked["prompts"]:
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        chances = model(tokens).logits[0, :-1].float().log_softmax(-1)
        written = model.generate(
            tokens, do_sample=False, max_new_tokens=asked["new_tokens"], min_new_tokens=asked["new_tokens"]
        )
    made.append([chances.gather(1, tokens[0, 1:, None])[:, 0].tolist(), written[0, tokens.shape[1] :].tolist()])
print("\\nMADE " + json.dumps(made))
"""


def made_by(
    python: Path, program: str, asked: dict[str, Any]
) -> list[tuple[list[float], list[int]]]:
    """What a program prints behind the word MADE."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), "-c", program],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("MADE "):
            made: list[tuple[list[float], list[int]]] = json.loads(
                line.removeprefix("MADE ")
            )
            return made
    said = done.stdout + done.stderr
    raise SystemExit(f"{python} ended with {done.returncode}:\n{said[-9000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a directory")
    parser.add_argument("--vllm", type=Path, required=True, help="an interpreter")
    arguments = parser.parse_args()
    asked = {
        "model": str(arguments.model.resolve()),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
    }
    theirs = made_by(arguments.vllm, BY_VLLM, asked)
    ours = made_by(Path(sys.executable), BY_TRANSFORMERS, asked)
    furthest = 0.0
    same = 0
    for (chances, tokens), (other_chances, other_tokens) in zip(
        theirs, ours, strict=True
    ):
        differences = [
            abs(chance - other)
            for chance, other in zip(chances, other_chances, strict=True)
        ]
        furthest = max(furthest, *differences)
        pairs = zip(tokens, other_tokens, strict=True)
        same += sum(token == other for token, other in pairs)
    print(
        f"{arguments.model.name}: log-probabilities differ by at most {furthest:.4f} nats; "
        f"{same} of {len(PROMPTS) * NEW_TOKENS} greedy tokens are the same"
    )


if __name__ == "__main__":
    main()
