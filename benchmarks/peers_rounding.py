"""Rounds a model's linears to 4 bits with another tool on given windows, and saves what its numbers stand for.

``grids.py`` runs this in the tool's own environment. It does not import sparsellm, so that the tool alone is measured,
with its defaults: symmetric integers in groups of columns, a scale each, embedding and head as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def by_llmcompressor(
    model: nn.Module, windows: Tensor, method: str, group: int
) -> dict[str, Tensor]:
    """Weights by name."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier

    if not torch.cuda.is_available():
        Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign] # AWQ calls it without an accelerator too, where torch refuses
    numbers = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=numbers)
    fields = {"config_groups": {"group_0": scheme}, "ignore": ["re:.*lm_head"]}
    recipe = (
        [GPTQModifier(**fields)]
        if method == "gptq"
        else [AWQModifier(), QuantizationModifier(**fields)]
    )
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows
    ]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if (given := getattr(module, "quantization_scheme", None)) is not None:
            weights[f"{name}.weight"] = forward_quantize(
                module, module.weight, "weight", given.weights
            ).detach()
    return weights


def by_gptqmodel(directory: str, windows: Tensor, group: int) -> dict[str, Tensor]:
    """Weights by name."""
    # it needs two, and takes one on a machine of two cores
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(
        directory,
        QuantizeConfig(bits=4, group_size=group, sym=True, offload_to_disk=False),
        device="cpu",
    )
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows
    ]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    weights = {
        name: parameter.detach() for name, parameter in model.model.named_parameters()
    }
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            weight = module.dequantize_weight().detach()  # (in, out)
            # stored zeros are one less, which is mended only when a file is loaded
            if module.qzero_format() == 1:
                weight = weight - module.scales[module.g_idx.long()]
            weights[f"{name}.weight"] = weight.t()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=("gptqmodel", "gptq", "awq"), required=True)
    parser.add_argument(
        "--group", type=int, required=True, help="columns that share a scale"
    )
    parser.add_argument(
        "--windows",
        required=True,
        help="safetensors file with token ids, (samples, seq)",
    )
    asked = parser.parse_args()
    windows = load_file(asked.windows)["windows"]
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    dense = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters()
    }
    if asked.method == "gptqmodel":
        weights = by_gptqmodel(asked.model, windows, asked.group)
    else:
        weights = by_llmcompressor(model, windows, asked.method, asked.group)
    # gptqmodel drops some others
    there = {name: weight for name, weight in weights.items() if not weight.is_meta}
    result = {
        name: there.get(name, old).to(old.dtype).contiguous()
        for name, old in dense.items()
    }
    rounded = sum(not torch.equal(result[name], old) for name, old in dense.items())
    assert all(result[name].shape == old.shape for name, old in dense.items())
    asked.out.mkdir(parents=True)
    for file in Path(asked.model).iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, asked.out)
    save_file(result, asked.out / "model.safetensors", metadata={"format": "pt"})
    package = "gptqmodel" if asked.method == "gptqmodel" else "llmcompressor"
    print(
        json.dumps(
            {package: version(package), "torch": torch.__version__, "changed": rounded}
        )
    )


if __name__ == "__main__":
    main()
