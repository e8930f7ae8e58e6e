"""What decides about a device: whether it computes, in which dtype and with which settings, and what it lacks.

No GPU is needed: torch's own functions are replaced where they would ask one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import sparsellm
from sparsellm import Recipe, api
from sparsellm.errors import MemoryBudgetError, NumericalError, RecipeError
from sparsellm.machine import computing, resolve_device
from sparsellm.model.products import attention_for
from sparsellm.model.weights import _fast_dtype
from sparsellm.run import opening, walk
from sparsepack import module, triton_kernels
from sparsepack.errors import Note
from tests.files.small import tensors_of
from tests.line import run
from tests.models import save_tiny, tiny_llama, tiny_tokenizer, windows

CARD = torch.device("cuda", 0)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that torch sees and cannot use: here, because it was built without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("visible")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_card_that_does_not_compute_is_refused(name: str) -> None:
    with pytest.raises(
        RecipeError,
        match=r"device 'cuda(:0)?' cannot be used here .*; try another, such as 'cpu'",
    ):
        resolve_device(name)


def test_a_device_that_multiplies_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda x, y: torch.zeros(8, 8) if x is y else torch.mm(x, y),
    )
    assert resolve_device("auto").type == "cpu"
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x + 1)
    with pytest.raises(
        RecipeError,
        match=r"'cpu' cannot be used here .+ product of two small matrices is wrong",
    ):
        resolve_device("cpu")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_half_precision_widens_where_it_has_no_units(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old Card")
    new = capability >= (8, 0)
    assert (
        _fast_dtype(torch.float16, CARD)
        == _fast_dtype(torch.float32, CARD)
        == torch.float32
    )
    assert _fast_dtype(torch.bfloat16, CARD) == (
        torch.bfloat16 if new else torch.float32
    )
    monkeypatch.setattr(opening, "resolve_device", lambda _: CARD)
    if not new:
        for field in ("dtype", "products"):
            with pytest.raises(
                RecipeError,
                match=f"Old Card has no units for bfloat16; give {field} float32 or auto",
            ):
                opening.open_model(
                    "x", tmp_path, Recipe(**{field: "bfloat16"}), False, load=False
                )


def test_fp16_that_overflows_names_the_dtype_to_take(tmp_path: Path) -> None:
    model = tiny_llama().half()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(3e4)
    source = save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    said = "blocks ran in float16, whose largest number is 65504; take dtype float32"
    with pytest.raises(NumericalError, match=said):
        sparsellm.prune(
            source,
            Recipe(method="wanda", dtype="float16"),
            calibration=windows(),
            out=tmp_path / "out",
        )


def test_settings_of_the_program_change_no_product_and_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield

    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    right = x @ x
    # oneDNN multiplies in bf16 where the processor can
    torch.set_float32_matmul_precision("medium")
    try:
        with computing(torch.device("cpu")):
            assert torch.equal(x @ x, right)
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            with torch.device("meta"), computing(torch.device("cpu")):
                assert torch.zeros(1).device.type == "cpu"
            # bits on a CPU do not depend on it
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        monkeypatch.setattr(torch.cuda, "device", use)
        with computing(CARD):
            assert current == [CARD]
            assert torch.are_deterministic_algorithms_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["autocast", "inference mode", "default dtype"])
def test_what_a_program_around_a_run_sets_changes_no_bit(
    name: str, tmp_path: Path
) -> None:
    around = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference mode": torch.inference_mode,
        "default dtype": lambda: by_default(torch.float64),
    }
    source, ids = save_tiny(tiny_llama(), None, tmp_path / "dense"), windows(4, 16)
    for place, context in (("alone", nullcontext), ("inside", around[name])):
        with context():
            sparsellm.prune(
                source, Recipe(sparsity=0.6), out=tmp_path / place, calibration=ids
            )
    alone, inside = tensors_of(tmp_path / "alone"), tensors_of(tmp_path / "inside")
    assert [key for key in alone if not torch.equal(alone[key], inside[key])] == []


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_on_a_card_take_plain_attention() -> None:
    with torch.enable_grad(), attention_for(CARD):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    for device, gradients in ((CARD, False), (torch.device("cpu"), True)):
        with torch.set_grad_enabled(gradients), attention_for(device):
            assert torch.backends.cuda.flash_sdp_enabled()


def test_a_device_without_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path
) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of"
    full = Mock(side_effect=torch.OutOfMemoryError(said))
    monkeypatch.setattr(walk, "BlockTask", full)
    monkeypatch.setattr(api, "inspect", full)
    with pytest.raises(
        MemoryBudgetError,
        match=r"no memory left .*2\.00 GiB.*; lower batch_tokens, seq_len or device",
    ):
        sparsellm.prune(
            llama, Recipe(method="wanda"), calibration=windows(), out=tmp_path / "out"
        )
    more = [
        "--method=wanda",
        f"--out={tmp_path}/o",
        "--samples=4",
        "--calibration=pydoc",
    ]
    for command, advice in (
        ("prune", "lower batch_tokens"),
        ("inspect", "lower batch, tokens or context"),
    ):
        code, said = run([command, str(llama), *(more if command == "prune" else [])])
        assert code == 2
        assert advice in said.splitlines()[-1]


@pytest.mark.usefixtures("visible")
def test_triton_that_cannot_launch_is_said_and_not_used() -> None:
    for cached in (triton_kernels.available, module._kernels):
        cached.cache_clear()
    with pytest.warns(
        Note,
        match="Triton does not run here .*, so torch does the work of its kernels, slowly",
    ):
        assert module.kernel_name("cuda") == "torch"
    for cached in (triton_kernels.available, module._kernels):
        cached.cache_clear()
