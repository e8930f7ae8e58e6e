"""Two tasks that show damage which perplexity hides: the last word of a paragraph, and the number of a verb.

    python benchmarks/tasks.py demo pruned packed --text wikitext2:wikitext2-raw-test.txt

Writes both as tasks of lm-eval, data and YAML, into ``--out``, and runs them on each checkpoint by `sparsellm eval`.
``cloze``: the last word of a paragraph of the held-out text among the last words of others; ``acc`` is how often it is
the likeliest, ``rank`` its mean place (1 is the best), ``greedy`` how often the model writes it. ``agreement``: pairs
of sentences, made of templates, that differ in the number of the verb, with a noun of the other number before it;
``acc`` is how often the right one is likelier. `sparsellm eval --tasks-dir` runs them too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

from quality import OUT, command

from sparsellm.text.sources import read_source

WORDS = (20, 80)  # the fewest and the most of a paragraph, without the last one
NOUNS = (
    "key",
    "teacher",
    "river",
    "song",
    "letter",
    "doctor",
    "village",
    "machine",
    "author",
    "garden",
)
OTHERS = (
    "door",
    "student",
    "hill",
    "film",
    "friend",
    "office",
    "road",
    "tool",
    "book",
    "tree",
)
LINKS = ("near the", "behind the", "next to the", "that belongs to the")
ENDS = (
    ("is", "are", "very old"),
    ("was", "were", "well known"),
    ("has", "have", "changed a lot"),
)
METRICS = """metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
CLOZE = """task: cloze
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: 0
process_results: !function cloze.results
"""
RESULTS = '''"""The metrics of the task cloze, whose first choice is the right one."""


def results(doc, scores):
    likelihoods = [score[0] for score in scores]
    rank = 1 + sum(other > likelihoods[0] for other in likelihoods[1:])
    return {"acc": float(rank == 1), "rank": float(rank), "greedy": float(scores[0][1])}
'''
AGREEMENT = """task: agreement
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: sentences
doc_to_target: 0
"""


def cloze(text: str, count: int, choices: int, seed: int) -> list[dict[str, Any]]:
    """Paragraphs without their last word, and that word before some that end other paragraphs."""
    paragraphs = {}
    for line in text.split("\n"):
        match = re.fullmatch(r"(.*\S) (\w{3,}) ?\.?", line.strip())
        if match and WORDS[0] <= len(match[1].split()) <= WORDS[1]:
            paragraphs[match[1]] = match[2]
    draw = random.Random(seed)
    chosen = draw.sample(sorted(paragraphs), min(count, len(paragraphs)))
    words = sorted(set(paragraphs.values()))
    docs = []
    for context in chosen:
        others = draw.sample(
            [word for word in words if word != paragraphs[context]], choices - 1
        )
        docs.append({"context": context, "choices": [paragraphs[context], *others]})
    return docs


def agreement(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of sentences, the right one first; half of the subjects are plural."""
    draw, docs = random.Random(seed), []
    for noun, link, other, end in itertools.product(NOUNS, LINKS, OTHERS, ENDS):
        singular, plural, rest = end
        docs.append(
            [
                f"The {noun} {link} {other}s {verb} {rest}."
                for verb in (singular, plural)
            ]
        )
        docs.append(
            [
                f"The {noun}s {link.replace('belongs', 'belong')} {other} {v} {rest}."
                for v in (plural, singular)
            ]
        )
    return [{"sentences": pair} for pair in draw.sample(docs, count)]


def write_tasks(folder: Path, source: str, count: int, choices: int, seed: int) -> None:
    """The files of both tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = read_source(source, "evaluation")
    text = loaded.joiner.join(loaded.documents)
    docs = {
        "cloze": cloze(text, count, choices, seed),
        "agreement": agreement(count, seed),
    }
    for name, rows in docs.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = json.dumps({"data_files": {"test": str(data.resolve())}})
        where = f"dataset_path: json\ndataset_kwargs: {read}\ntest_split: test\n"
        more = "".join(
            f"  - {{metric: {metric}, aggregation: mean, higher_is_better: {better}}}\n"
            for metric, better in (("rank", "false"), ("greedy", "true"))
        )
        task = (
            CLOZE + where + METRICS + more
            if name == "cloze"
            else AGREEMENT + where + METRICS
        )
        (folder / f"{name}.yaml").write_text(task)
    (folder / "cloze.py").write_text(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", help="checkpoints, dense, pruned or packed"
    )
    parser.add_argument(
        "--text", required=True, help="held-out text, a paragraph a line"
    )
    parser.add_argument("--count", type=int, default=200, help="examples of each task")
    parser.add_argument(
        "--choices", type=int, default=8, help="words among which the last one is"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--window",
        type=int,
        default=512,
        help="of the perplexity that `eval` measures too",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="of that perplexity"
    )
    parser.add_argument("--out", type=Path, default=OUT / "tasks")
    asked = parser.parse_args()
    write_tasks(asked.out, asked.text, asked.count, asked.choices, asked.seed)
    names = [
        ("cloze", "acc"),
        ("cloze", "rank"),
        ("cloze", "greedy"),
        ("agreement", "acc"),
    ]
    print(
        f"{asked.count} examples of each task, the cloze from {Path(asked.text).name}, {asked.choices} choices.\n"
    )
    print(f"| model | perplexity | {' | '.join(' '.join(name) for name in names)} |")
    print("|---|---|---|---|---|---|")
    for model in asked.models:
        protocol = (
            "--seq-len",
            str(asked.window),
            "--max-tokens",
            str(asked.max_tokens),
        )
        tasks = ("--tasks", "cloze,agreement", "--tasks-dir", str(asked.out))
        measured = command("eval", model, "--text", asked.text, *protocol, *tasks)
        shown = []
        for task, metric in names:
            score = measured["tasks"][task][metric]
            shown.append(
                f"{score['value']:.3f}"
                + (f" ± {score['stderr']:.3f}" if score["stderr"] else "")
            )
        print(
            f"| {Path(model).name} | {measured['perplexity']['value']:.2f} | {' | '.join(shown)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
