"""Sizes as people write them, the budget and what is shared of it, and the prediction against a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import is_tensor
from torch.utils._pytree import tree_leaves

import sparsellm
from sparsellm import Recipe, machine
from sparsellm.errors import MemoryBudgetError, RecipeError
from sparsellm.inputs import parse_bytes
from sparsellm.method.blocks import METHODS
from sparsellm.method.solvers import SOLVERS
from sparsellm.model import Chain, open_chain
from sparsellm.model.products import Bf16Products
from sparsellm.records import Memory
from sparsellm.registry import Workspace
from sparsellm.run import opening, predictions
from sparsellm.run.predictions import (
    Demand,
    Extent,
    device_budget,
    kept_share,
    plan_memory,
    steps_of,
)
from tests.models import VOCABULARY, save_tiny, tiny_llama, windows
from tests.models.families import gemma4_text

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("2tb", 2 * 10**12),
        ("7 kB", 7000),
        (12, 12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size
    assert Recipe(memory=text).memory == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "4 gigs",
        "4G",
        "-1GiB",
        "GiB",
        "0MB",
        "1e9",
        "4GiB!",
        0,
        "8388608TiB",
    ],
)
def test_bad_sizes_are_refused_with_the_units(text: str | int) -> None:
    with pytest.raises(RecipeError, match="such as 4GiB"):
        Recipe(memory=text)


@pytest.fixture
def chain(llama: Path) -> Chain:
    return open_chain(llama, device=CPU)


def test_too_much_goes_to_disk_and_what_cannot_work_is_refused(chain: Chain) -> None:
    def plan(budget: int | None, streams: int = 0) -> Memory:
        return plan_memory(
            chain,
            Demand(Extent(1_000_000, 128, 4096), Workspace(streams=streams)),
            budget,
        )

    hidden = 1_000_000 * 128 * 32 * 4
    free = plan(1 << 50)
    assert (free.hidden_in_memory_bytes, free.hidden_on_disk_bytes) == (hidden, 0)
    assert (
        free.predicted_peak_rss_bytes == free.start_bytes + free.working_bytes + hidden
    )
    assert plan(1 << 50, streams=2).hidden_in_memory_bytes == 3 * hidden
    tight = plan(3 << 30)
    assert tight.hidden_in_memory_bytes + tight.hidden_on_disk_bytes == hidden
    assert 0 < tight.hidden_in_memory_bytes < hidden
    assert tight.predicted_peak_rss_bytes <= 3 << 30
    with pytest.raises(
        MemoryBudgetError, match=r"may take 0\.00 GB; allow more with --memory"
    ):
        plan(1 << 20)


def test_its_own_text_needs_a_model_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_whole", None)  # must not be reached
    recipe = Recipe(
        method="wanda",
        calibration="self:0.5,pydoc:0.5",
        samples=2,
        seq_len=16,
        memory="1MB",
    )
    with pytest.raises(
        MemoryBudgetError,
        match=r"its own text with all .* room for 0\.00 GB; name a text with --cal",
    ):
        sparsellm.prune(llama, recipe, out=tmp_path / "pruned")


def test_outputs_are_kept_in_what_the_hidden_states_leave(chain: Chain) -> None:
    def plan(budget: int, writers: int = 2) -> Memory:
        return plan_memory(
            chain,
            Demand(Extent(100_000, 128, 4096), Workspace(writers=writers)),
            budget,
        )

    one = 100_000 * 128 * 4
    free = plan(1 << 50)
    assert free.kept_bytes == (80 + 32) * one  # the feed-forward unit and attention
    assert plan(1 << 50, writers=1).kept_bytes == 80 * one
    assert plan(1 << 50, writers=0).kept_bytes == 0
    held = free.hidden_in_memory_bytes + free.kept_bytes
    assert free.predicted_peak_rss_bytes == free.start_bytes + free.working_bytes + held
    assert free.steps_bytes["statistics"] == free.predicted_peak_rss_bytes
    least = (
        free.start_bytes + free.working_bytes
    )  # this process has run other tests before
    tight = plan(least + (32 + 40) * one)
    assert (tight.hidden_in_memory_bytes, tight.hidden_on_disk_bytes) == (32 * one, 0)
    assert 0 < tight.kept_bytes < free.kept_bytes
    assert tight.predicted_peak_rss_bytes <= least + (32 + 40) * one
    less = plan(least + 16 * one)
    assert less.hidden_on_disk_bytes > 0
    assert less.kept_bytes == 0


def test_gradients_take_room_for_every_block_and_the_head_its_logits(
    chain: Chain,
) -> None:
    demand = Demand(Extent(4, 128, 4096), Workspace())
    plain = plan_memory(chain, demand, 1 << 50)
    models = (tiny_llama(attn_implementation=how) for how in ("eager", "sdpa"))
    stored, fused = (
        steps_of(open_chain(model, device=CPU), demand) for model in models
    )
    scores = 4 * 4 * 512 * 128 * chain.config.num_attention_heads
    assert (
        stored["statistics"].working - fused["statistics"].working
        == scores - 4 * 4 * 512 * 80
    )
    swept = plan_memory(chain, replace(demand, gradient_tokens=512), 1 << 50)
    blocks = chain.config.num_hidden_layers
    assert (plain.hidden_in_memory_bytes, plain.hidden_on_disk_bytes) == (
        512 * 32 * 4,
        0,
    )
    assert (swept.hidden_in_memory_bytes, swept.hidden_on_disk_bytes) == (
        512 * 32 * 4 * (blocks + 2),
        0,
    )
    large = open_chain(tiny_llama(vocab_size=100_000), device=CPU)
    logits, inputs = (
        3.5 * 256 * 100_000 * 4,
        blocks * 512 * 32 * 4,
    )  # at every block, in a step
    for given, step, more in (
        ({"gradient_tokens": 512}, "gradients", 0),
        ({"passes": 1}, "sweeps", inputs),
    ):
        plan = plan_memory(large, replace(demand, **given), 1 << 50)  # type: ignore[arg-type]
        assert plan.worst == step
        assert (
            plan.working_bytes - predictions.LIBRARIES == logits + more
        )  # the model in memory is there already


def test_scores_and_masks_that_attention_stores_count(chain: Chain) -> None:
    """Of heads whose widths differ, which torch does not fuse on a CPU; then only of windows that slide."""
    demand = Demand(Extent(4, 512, 2048), Workspace())
    wide, copied = (
        4 * 4 * 2048 * 80,
        4 * 2048 * 512,
    )  # in bytes: activations, and a row of numbers for each token
    plain = steps_of(chain, demand)["solving"].working
    for setting, stored in (
        ("v_head_dim", 2.5 * 4 * copied),
        ("sliding_window", copied + 512**2),
    ):
        setattr(chain.config, setting, 16)
        assert steps_of(chain, demand)["solving"].working - plain == stored - wide
        setattr(chain.config, setting, None)


def test_what_a_sweep_holds_in_files_is_read_a_block_at_a_time(chain: Chain) -> None:
    """The best state is a copy more at the end of a first pass, and during later ones."""
    block = 4 * sum(parameter.numel() for parameter in chain.blocks[0].parameters())
    for passes, copies in ((1, 3), (2, 4)):
        steps = steps_of(
            chain,
            Demand(
                Extent(4, 128, 4096, swept=256 * passes), Workspace(), passes=passes
            ),
        )
        states = 2 * 256 * 32 * 4
        assert steps["sweeps"].movable == states + copies * len(chain) * block
        assert steps["keeping"].movable == states + 4 * len(chain) * block
        assert steps["sweeps"].read == 3 * block
    demand = Demand(Extent(4, 128, 4096, swept=256), Workspace(), passes=1)
    plain, pruned = (
        steps_of(chain, replace(demand, zeros=zeros))["sweeps"] for zeros in (0.0, 0.75)
    )
    share = kept_share(chain, 0.75)
    assert 0.25 < share < 0.3  # norms are kept
    assert pruned.movable - states == pytest.approx(
        4 / 3 * share * (plain.movable - states), rel=1e-3
    )  # with places
    assert [Extent(4, 2048, 4096, cut=cut).step(1) for cut in (True, False)] == [
        512,
        2048,
    ]


def test_a_card_holds_hidden_states_or_is_refused_before(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Small Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1 << 30)
    chain.device = torch.device("cuda", 0)
    assert device_budget(chain.device, None) == int(
        0.9 * (12 << 30)
    )  # free, and what torch keeps to use again
    assert [device_budget(chain.device, size) for size in ("2GiB", "20GiB")] == [
        2 << 30,
        12 << 30,
    ]
    assert device_budget(CPU, "2GiB") == 0
    demand, hidden = (
        Demand(Extent(1_000_000, 128, 4096), Workspace()),
        1_000_000 * 128 * 32 * 4,
    )
    free, tight = (
        plan_memory(chain, demand, 1 << 50, on_device=size)
        for size in (1 << 50, 1 << 30)
    )
    working = max(step.working for step in steps_of(chain, demand).values())
    assert (free.hidden_on_device_bytes, free.hidden_in_memory_bytes) == (hidden, 0)
    assert free.predicted_peak_device_bytes == working + hidden
    assert (
        0
        < tight.hidden_on_device_bytes
        < hidden
        == tight.hidden_on_device_bytes + tight.hidden_in_memory_bytes
    )
    assert tight.predicted_peak_device_bytes <= 1 << 30
    said = (
        r"on Small Card for .*may take 0\.00 GB .*--device-memory, lower batch_tokens"
    )
    with pytest.raises(MemoryBudgetError, match=said):
        plan_memory(chain, demand, 1 << 50, on_device=1 << 20)


def test_the_default_is_a_share_of_what_is_free(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_control_group_rooms", lambda: [123])
    assert machine.free_memory() == 123
    monkeypatch.setattr(machine, "free_memory", lambda: 10 << 30)
    plan = plan_memory(chain, Demand(Extent(4, 32, 4096), Workspace()), None)
    assert plan.budget_bytes == pytest.approx(plan.start_bytes + 8 * (1 << 30))


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_outer_groups_count_and_the_page_cache_does_not(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    line = "0::/job/step\n" if version == 2 else "9:name=x:/\n5:cpu,memory:/job/step\n"
    (tmp_path / "proc" / "self" / "cgroup").write_text(line)
    limit, usage, total = (
        ("max", "current", "")
        if version == 2
        else ("limit_in_bytes", "usage_in_bytes", "total_")
    )
    root = tmp_path / "groups" / ("" if version == 2 else "memory")
    for group, most in (("job/step", "max"), ("job", "1000")):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / f"memory.{limit}").write_text(f"{most}\n")
        (root / group / f"memory.{usage}").write_text("700\n")
        counts = f"anon 300\n{total}inactive_file 150\n{total}active_file 200\nactive_anon 50\n"
        (root / group / "memory.stat").write_text(counts)
    assert machine._control_group_rooms() == [1000 - 700 + 150 + 200]


@pytest.mark.parametrize(
    ("ranks", "dtype", "copied"),
    [(2, "bfloat16", 0), (1, "bfloat16", 0), (1, "float32", 1)],
)
def test_bf16_products_copy_other_weights(
    ranks: int, dtype: str, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, torch gathers shards of a sweep in bf16, and a process alone has copies anyway."""
    chain = open_chain(tiny_llama().to(getattr(torch, dtype)), device=CPU)
    monkeypatch.setattr(chain, "device", torch.device("cuda", 0))
    demand = Demand(
        Extent(4, 128, 4096, swept=256, ranks=ranks),
        Workspace(),
        passes=1,
        sweep="resident",
    )
    plain = steps_of(chain, demand)["sweeps"].working
    chain.products = Bf16Products()
    elements = sum(x.elements * x.number for x in chain.kinds)
    assert steps_of(chain, demand)["sweeps"].working - plain == copied * 2 * elements


def test_keys_and_values_of_a_model_that_writes_its_text_count(chain: Chain) -> None:
    extents = [
        Extent(samples, 32, 4096, written=samples * 32) for samples in (1, 3, 16, 40)
    ]
    steps = [
        steps_of(chain, Demand(extent, Workspace()))["calibration"]
        for extent in extents
    ]
    one, three, most, more = (step.working for step in steps)
    config = chain.config
    window = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * 32
        * chain.dtype.itemsize
    )
    assert (three - one, most - one, more) == (2 * window, 15 * window, most)


def test_what_a_block_needs_by_hand() -> None:
    """One linear of each kind: the moments against sums written out."""
    config = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1}
    chain = open_chain(
        tiny_llama(**config), device=CPU
    )  # in memory: its weights are there already
    steps = steps_of(chain, Demand(Extent(100, 16, 64), Workspace(weights=3, grams=2)))
    groups = [
        ([32, 16, 16], 32),
        ([32], 32),
        ([80, 80], 32),
        ([32], 80),
    ]  # outputs of linears with the same inputs
    activations = 64 * (4 * 80 + 8 * 32) * 4
    grams = sum(
        8 * inputs**2 for _, inputs in groups
    )  # sums are fp64; one panel holds such a small one whole
    assert steps["statistics"].working == activations + grams + 4 * 80**2 + 2 * 4 * (
        1 << 23
    )
    solving = []
    for position, (outputs, inputs) in enumerate(groups):
        later = sum(4 * i**2 for _, i in groups[position + 1 :])
        solving.append(3 * 4 * max(outputs) * inputs + 2 * 4 * inputs**2 + later)
    assert steps["solving"].working == max(*solving, activations)


def test_what_blocks_are_given_for_each_token_counts() -> None:
    """Gemma 4's embeddings for each layer, which the calls of all blocks keep, against their own bytes."""
    chain = open_chain(gemma4_text(), device=CPU)
    with chain.outer(head=False), chain.block(0):
        calls = chain.start(windows(4, 16))[1]
    leaves = {
        id(leaf): leaf
        for call in calls
        for leaf in tree_leaves((call.args, call.kwargs))
        if is_tensor(leaf)
    }
    given = sum(
        leaf.nbytes
        for leaf in leaves.values()
        if leaf.shape[:2] == (4, 16) and leaf.dim() == 3
    )
    assert given > 0
    demand = Demand(Extent(4, 16, 64), Workspace())
    with_them = steps_of(chain, demand)["statistics"].working
    chain.config.hidden_size_per_layer_input = 0
    assert with_them - steps_of(chain, demand)["statistics"].working == given


@pytest.mark.parametrize("solver", ["admm", "sparsegpt", "wanda"])
def test_the_solver_inside_a_method_counts(solver: str) -> None:
    inside, method = SOLVERS[solver].workspace, METHODS["sparsellm"]
    workspace = method.workspace.then(
        method.needs(method.check({"solver": solver})).workspace
    )
    assert (
        workspace.weights >= inside.weights + 1
    )  # the weight and the one that its outputs' costs weigh
    assert workspace.grams >= inside.grams
    assert workspace.remembered == inside.remembered


def test_the_head_is_not_read_to_run_the_blocks(chain: Chain, tmp_path: Path) -> None:
    with chain.outer(head=False):
        assert chain.model.get_input_embeddings().weight.device == CPU
        assert chain.model.get_output_embeddings().weight.is_meta
    assert chain.outer_elements() - chain.outer_elements(head=False) == VOCABULARY * 32
    half = open_chain(
        save_tiny(tiny_llama(vocab_size=9000).half(), None, tmp_path / "half"),
        device=CPU,
    )
    held = steps_of(half, Demand(Extent(1, 8, 8), Workspace()))["embedding"].working
    assert (
        held == 4 * half.outer_elements(head=False) + 2 * 9000 * 32
    )  # both, while it is widened


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm"])
def test_the_prediction_is_within_a_quarter_of_a_real_process(
    method: str, tmp_path: Path
) -> None:
    sparsellm.inspect(
        "demo"
    )  # to convert its GGUF file, which takes more memory than this run
    command = [
        sys.executable,
        "-m",
        "sparsellm",
        "prune",
        "demo",
        "--out",
        str(tmp_path / "p"),
        "--method",
        method,
    ]
    command += ["--samples", "4", "--seq-len", "512", "--json", "--verbose"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    report = json.loads(done.stdout)
    assert (
        f"predicted peak memory {report['memory']['predicted_peak_rss_bytes'] / 1e9:.2f} GB"
        in done.stderr
    )
    assert report["peak_rss_bytes"] == pytest.approx(
        report["memory"]["predicted_peak_rss_bytes"], rel=0.25
    )
