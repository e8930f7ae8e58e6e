"""Prints docs/options.md: every field of the recipe, and every registered method with its options.

python tools/options.py > docs/options.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from sparsellm.method.allocation import ALLOCATIONS
from sparsellm.method.blocks import METHODS
from sparsellm.method.experts import SCORES
from sparsellm.recipe import Recipe, help_of, option_of
from sparsellm.registry import Registry

START = """# Methods and options

`python tools/options.py` writes this page from the code.

## The recipe

Every setting of a run is a field of the recipe. `sparsellm prune --help` shows the common ones as options. Any other is
set by `--set FIELD=VALUE`, with a value as in YAML, and all of them stand in a file for `--recipe`. For example:

```text
--set seed=1 --set "only=['*.mlp.*']" --set "sparsity_of.*.down_proj=0.4" --set options.damping=0.1
```
"""


def page() -> str:
    """The text of the page."""
    return "\n".join([START, *_fields(), *_choices()])


def _fields() -> Iterator[str]:
    yield "| field | default | meaning |"
    yield "|---|---|---|"
    for name, field in Recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        option = option_of(name)
        shown = f"`{default}`"
        if default is None:
            shown = (option.null if option is not None else "") or "none"
        yield f"| `{name}` | {shown} | {help_of(name)} |"


def _choices() -> Iterator[str]:
    yield from _registry("Methods", "method", METHODS, "options")
    yield from _registry("Allocations", "allocation", ALLOCATIONS, "allocation_options")
    yield from _registry("Expert scores", "expert_score", SCORES, "expert_options")


def _registry(
    title: str, field: str, registry: Registry[Any], options: str
) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield f"Values of `{field}`; their options are set by `--set {options}.NAME=VALUE`."
    for entry in registry.values():
        yield f"\n**`{entry.name}`** ({entry.paper}): {entry.summary}"
        known = entry.to_dict()["options"]
        if known:
            yield ""
        for name, option in known.items():
            default = f"{option['type']}, {option['default']}"
            yield f"* `{name}` ({default}): {option['description']}"


if __name__ == "__main__":
    sys.stdout.write(page() + "\n")
