"""What needs a GPU, against the same on the CPU: run ``pytest -m gpu`` on a machine with one.

``SPARSELLM_TEST_DEVICE=cpu`` runs these tests on a CPU, which shows that the tests themselves work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsellm
from reference import (
    FLOATS,
    VALUE_TYPES,
    activations,
    bound,
    random_weight,
)
from sparsellm import Recipe
from sparsellm.files.scratch import Room, Scratch
from sparsellm.method.gram import GramAccumulator
from sparsepack.bench import one_run
from sparsepack.generation import generate
from sparsepack.layout import pack
from sparsepack.loading import load
from sparsepack.module import kernel_name
from tests.files.small import tensors_of
from tests.models import (
    VOCABULARY,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
    windows,
)
from tests.models.pruned import prune_tiny
from tests.parallel.processes import by_torchrun, ended

DEVICE = os.environ.get("SPARSELLM_TEST_DEVICE", "cuda")
CARD = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not CARD, reason="there is no GPU"),
]
on_a_card = pytest.mark.skipif(not CARD, reason="there is no GPU")


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to rounding, but for the few weights that are as important as a pruned one."""
    assert actual.keys() == expected.keys()
    different = total = 0
    for name, value in expected.items():
        other = actual[name].cpu()
        same = (other == 0) == (value == 0)
        different += int((~same).sum())
        total += value.numel()
        torch.testing.assert_close(other[same], value[same], rtol=1e-2, atol=1e-3)
    assert different <= total / 500


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "magnitude": (tiny_llama, {"method": "magnitude"}),
    "wanda": (tiny_gpt2, {"method": "wanda", "sparsity": 0.55}),
    "sparsegpt": (tiny_llama, {"method": "sparsegpt", "pattern": "2:4"}),
    "admm": (tiny_llama, {"method": "admm", "options": {"iterations": 8}}),
    "allocated": (tiny_llama, {"method": "wanda", "allocation": "threshold"}),
    "sparsellm": (tiny_llama, {"method": "sparsellm", "passes": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_pruning_on_the_device_is_that_on_the_cpu(name: str) -> None:
    family, fields = CASES[name]
    pruned = []
    for device in (DEVICE, "cpu"):
        model = family().to(device)  # type: ignore[arg-type]  # torch decorates the method
        result = sparsellm.prune(model, Recipe(**fields), calibration=windows())
        assert result.zeros > 0.45 * result.weights
        pruned.append({name: value.cpu() for name, value in model.state_dict().items()})
    close(*pruned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_streamed_through_the_device(
    dtype: str, llama: Path, tmp_path: Path
) -> None:
    for name, device in (("device", DEVICE), ("cpu", "cpu")):
        recipe = Recipe(
            device=device,
            dtype=dtype,
            method="admm",
            options={"iterations": 8},
            sparsity=0.5,
        )
        result = sparsellm.prune(
            llama, recipe, calibration=windows(), out=tmp_path / name
        )
        assert result.zeros == round(0.5 * result.weights)
    on_device, on_cpu = tensors_of(tmp_path / "device"), tensors_of(tmp_path / "cpu")
    if dtype == "float32":
        close(on_device, on_cpu)
    else:  # a product in bf16 is another one on every machine
        assert all(torch.isfinite(value).all() for value in on_device.values())


def test_a_sweep_on_the_device_lowers_the_divergence() -> None:
    histories = []
    for device in (DEVICE, "cpu"):
        model = tiny_llama().to(device)  # type: ignore[arg-type]  # torch decorates the method
        recipe = Recipe(
            method="sparsellm", passes=3, options={"solver": "wanda"}, sparsity=0.6
        )
        histories.append(
            [
                sweep.held_out
                for sweep in sparsellm.prune(
                    model, recipe, calibration=windows()
                ).sweeps
            ]
        )
    assert histories[0][-1] < histories[0][0]
    assert histories[0] == pytest.approx(histories[1], rel=0.05)


@on_a_card
def test_the_memory_of_the_device_is_measured(tmp_path: Path) -> None:
    large = tiny_llama(
        hidden_size=512,
        intermediate_size=1408,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
    )
    source = save_tiny(large, tiny_tokenizer(), tmp_path / "dense")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    recipe = Recipe(device="cuda", dtype="float32", method="admm")
    result = sparsellm.prune(
        source, recipe, calibration=windows(), out=tmp_path / "out"
    )
    assert result.memory is not None
    used = result.memory.device_peak_bytes - before
    assert used > 0
    assert result.memory.device_peak_bytes <= result.memory.device_budget_bytes


def test_the_same_command_gives_the_same_bits(llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        recipe = Recipe(device=DEVICE, dtype="float32", effort=2)
        sparsellm.prune(llama, recipe, calibration=windows(), out=tmp_path / name)
    first, second = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("on_device", [0, 3 << 22, 1 << 30])
def test_a_store_next_to_the_computation_is_a_list(on_device: int) -> None:
    """Long products run while copies do; each item is read before and after it is replaced."""
    expected = [torch.full((1024, 1024 + shift), float(shift)) for shift in range(6)]
    work = torch.ones(2048, 2048, device=DEVICE)
    with Scratch(Room(1 << 25), on_device=Room(on_device)).store(DEVICE) as store:
        for value in expected:
            store.append(value.to(DEVICE))
        for turn in range(6):
            for index in range(len(store)):
                item = store[index]
                store.expect(index + 1)
                work = (work @ work).clamp_(max=1)
                assert item.device.type == torch.device(DEVICE).type
                store[index] = item * 2 + turn + work.max() - 1
                expected[index] = expected[index] * 2 + turn
        for item, right in zip(store, expected, strict=True):
            assert torch.equal(item.cpu(), right)


def test_a_gram_matrix_of_bf16_inputs_is_exact_to_fp32() -> None:
    x = torch.randn(5000, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    accumulator = GramAccumulator(700, torch.device(DEVICE))
    accumulator.update(x.to(DEVICE))
    matrix, right = (
        accumulator.finish().matrix.cpu().double(),
        x.double().T @ x.double() / len(x),
    )
    assert float((matrix - right).norm()) <= 1e-5 * float(right.norm())


@on_a_card
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_the_compiled_triton_kernel_multiplies(value_type: str) -> None:
    triton_kernels = pytest.importorskip("sparsepack.triton_kernels")
    assert kernel_name("cuda") == "triton"
    for out, columns, sparsity in (
        (1, 1, 0.0),
        (5, 65, 0.7),
        (70, 1100, 0.5),
        (33, 300, -1.0),
        (256, 4096, 0.5),
    ):
        packed, dense = random_weight(out, columns, value_type, sparsity, seed=columns)
        moved = packed.to("cuda")
        for tokens in (1, 2, 3, 5, 8, 16):
            for dtype in FLOATS.values():
                x = activations(tokens, columns, dtype, seed=tokens)
                y = triton_kernels.multiply(moved, x.cuda()).cpu()
                assert bool(
                    ((y.double() - x.double() @ dense.T).abs() <= bound(dense, x)).all()
                ), (out, tokens, dtype)


@pytest.mark.parametrize("values", ["keep", "int8", "int4"])
def test_a_packed_model_generates_on_the_device(values: str, tmp_path: Path) -> None:
    source = save_tiny(prune_tiny(tiny_llama()), tiny_tokenizer(), tmp_path / "pruned")
    sparsellm.pack(source, out=tmp_path / "packed", values=values)
    texts, logits = [], []
    for device in (DEVICE, "cpu"):
        model = load(
            tmp_path / "packed", device=device, dtype="float32", activations="fp32"
        )
        with torch.no_grad():
            logits.append(model(windows()[:1].to(model.device)).logits.float().cpu())
        texts.append(generate(model, tiny_tokenizer(), "a line", max_new_tokens=5).text)
        assert min(one_run(model, 1, 4, 2)) > 0
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-3)
    assert all(texts)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_a_run_stays_on_the_card_that_it_names(llama: Path, tmp_path: Path) -> None:
    for device in ("cuda:0", "cuda:1"):
        before = torch.cuda.memory_reserved(0)
        recipe = Recipe(device=device, dtype="float32", effort=1)
        sparsellm.prune(llama, recipe, calibration=windows(), out=tmp_path / device[-1])
    assert torch.cuda.memory_reserved(0) == before
    close(tensors_of(tmp_path / "1"), tensors_of(tmp_path / "0"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_processes_join_by_nccl(llama: Path, tmp_path: Path) -> None:
    settings = (
        "prune",
        str(llama),
        "--method=wanda",
        "--samples=4",
        "--seq-len=32",
        "--device=cuda",
    )
    for size in (1, 2):
        process = by_torchrun(size, *settings, f"--out={tmp_path / str(size)}")
        _, said = ended(process)
        assert process.returncode == 0, said
    close(tensors_of(tmp_path / "2"), tensors_of(tmp_path / "1"))


@on_a_card
def test_a_weight_packed_from_the_device_is_that_from_the_cpu() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.6] = 0
    on_device, on_cpu = pack(weight.cuda(), "int4"), pack(weight, "int4")
    assert on_device is not None
    assert on_cpu is not None
    assert all(
        torch.equal(on_device.tensors[name], on_cpu.tensors[name])
        for name in on_cpu.tensors
    )
