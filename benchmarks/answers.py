"""Greedy answers of several forms of a model to three instructions, in full, as Markdown.

    python benchmarks/answers.py dense=model.gguf small=small.gguf --xllamacpp PYTHON

A form is a name and a checkpoint, dense or packed, which `sparsellm serve` runs, or a GGUF file, which llama.cpp does
(`--llama-server`, or `--xllamacpp` as in serving.py). The instructions were written before any answer was seen.
"""

from __future__ import annotations

from pathlib import Path

from measure import code_version, cpu_name
from serving import Form, chat, parser_of_forms, serving

OUT = Path(__file__).parent / "out"
INSTRUCTIONS = (
    "Write one SQL query. The table `orders` has the columns `customer`, `day` and `total`. For every customer with "
    "more than three orders I need the sum of the totals, the largest sum first. Answer with the query alone.",
    "What is wrong with this Python function, and how do you mend it?\n\n"
    "def add_item(item, items=[]):\n    items.append(item)\n    return items",
    "Explain in three sentences to somebody who has never programmed why a cache makes a program faster, and what it "
    "costs.",
)


def main() -> None:
    parser = parser_of_forms(__doc__, new_tokens=300, context=1024, out=OUT)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    answers: dict[str, list[str]] = {}
    for text in asked.forms:
        name, _, path = text.partition("=")
        with serving(Form.of(path), asked) as server:
            made = [
                chat(server, instruction, asked.new_tokens)
                for instruction in INSTRUCTIONS
            ]
        answers[name] = [
            one["choices"][0]["message"]["content"].strip() for one in made
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
