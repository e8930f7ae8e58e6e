"""Greedy answers of several forms of a model to three instructions, in full, as Markdown.

    python benchmarks/answers.py dense=model.gguf small=small.gguf --xllamacpp PYTHON

A form is a name and a checkpoint, dense or packed, which `sparsellm serve` runs, or a GGUF file, which llama.cpp does
(`--llama-server`, or `--xllamacpp` as in serving.py). The instructions were written before any answer was seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import code_version, cpu_name
from serving import Form, Server, serving

OUT = Path(__file__).parent / "out"
INSTRUCTIONS = (
    "Write one SQL query. The table `orders` has the columns `customer`, `day` and `total`. For every customer with "
    "more than three orders I need the sum of the totals, the largest sum first. Answer with the query alone.",
    "What is wrong with this Python function, and how do you mend it?\n\n"
    "def add_item(item, items=[]):\n    items.append(item)\n    return items",
    "Explain in three sentences to somebody who has never programmed why a cache makes a program faster, and what it "
    "costs.",
)


def answer_of(server: Server, instruction: str, new_tokens: int) -> str:
    """The greedy answer of a model to one instruction, in its chat template."""
    made = server.ask(
        "/v1/chat/completions",
        {
            "model": server.ask("/v1/models")["data"][0]["id"],
            "messages": [{"role": "user", "content": instruction}],
            "max_tokens": new_tokens,
            "temperature": 0,
        },
    )
    return str(made["choices"][0]["message"]["content"]).strip()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("forms", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--llama-server", type=Path, help="the program, for GGUF files")
    parser.add_argument(
        "--xllamacpp", type=Path, help="an interpreter with xllamacpp, in its place"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="auto", help="of sparsellm")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the logs")
    # what serving.py asks for besides
    parser.set_defaults(clients=[1], vllm=None, vllm_options="")
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    asked.out.mkdir(parents=True, exist_ok=True)
    answers: dict[str, list[str]] = {}
    for text in asked.forms:
        name, _, path = text.partition("=")
        with serving(Form.of(path), asked) as server:
            answers[name] = [
                answer_of(server, instruction, asked.new_tokens)
                for instruction in INSTRUCTIONS
            ]
    print(
        f"Greedy, at most {asked.new_tokens} tokens; {cpu_name()}, code {code_version()}.\n"
    )
    for number, instruction in enumerate(INSTRUCTIONS):
        print(f"~~~text\n{instruction}\n~~~\n")
        for name, of_form in answers.items():
            print(f"**{name}**\n\n~~~text\n{of_form[number]}\n~~~\n")


if __name__ == "__main__":
    main()
