"""Forms of a model that other tools make: quantised by the tool, and read back as the dense numbers they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm.model.structure import find_blocks, iterate_linears
from sparsepack.bench import resident_bytes

# By model_type of transformers: the architecture's name in llama.cpp, which its mixtures of types depend on.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


@dataclass
class Numbers:
    """Quantised weights by the name of the parameter: dense numbers, and bytes with scales and all other overhead."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


def open_dense(
    directory: Path, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype
    ).eval()
    return model


def block_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linears of the blocks by the name of their weight."""
    name, blocks = find_blocks(model)
    return {
        f"{linear}.weight": module for linear, module in iterate_linears(blocks, name)
    }


@torch.no_grad()
def with_numbers(directory: Path, numbers: Numbers) -> PreTrainedModel:
    """The dense model with these numbers in place of its own."""
    model = open_dense(directory)
    parameters = dict(model.named_parameters())
    for name, weight in numbers.weights.items():
        parameters[name].copy_(weight)
    return model


def torchao_model(directory: Path, bits: int) -> PreTrainedModel:
    """The model with the linears of its blocks in torchao's int8 or int4 (groups of 32)."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = open_dense(directory)
    quantize_(
        find_blocks(model)[1],
        Int8WeightOnlyConfig()
        if bits == 8
        else PrototypeInt4WeightOnlyConfig(group_size=32),
    )
    return model


def torchao_numbers(directory: Path, bits: int) -> Numbers:
    """The weights that the model of :func:`torchao_model` multiplies by."""
    quantised, numbers = block_linears(torchao_model(directory, bits)), Numbers()
    for name, linear in block_linears(open_dense(directory)).items():
        weight: Any = quantised[name].get_parameter("weight")
        # int4 for the CPU keeps its codes in the order of its kernel
        if hasattr(weight, "scale_and_zero"):
            numbers.weights[name] = rounded(
                linear.get_parameter("weight").detach(), weight.scale_and_zero
            )
        else:
            numbers.weights[name] = weight.dequantize().detach()
        numbers.bytes[name] = resident_bytes(
            nn.ModuleList([quantised[name]]), linears_only=True
        )
    return numbers


def rounded(weight: Tensor, scale_and_zero: Tensor) -> Tensor:
    """A weight ``(out, in)`` in torchao's int4, (code - 8) · scale + zero; scales, zeros ``(groups, out, 2)``."""
    groups = len(scale_and_zero)
    # (out, groups, 1)
    scale, zero = scale_and_zero.transpose(0, 1).unsqueeze(2).unbind(-1)
    codes = (
        ((weight.view(len(weight), groups, -1) - zero) / scale + 8).round().clamp(0, 15)
    )
    return ((codes - 8) * scale + zero).view_as(weight)


def hqq_numbers(directory: Path, bits: int, group: int = 64) -> Numbers:
    """The linears of the blocks by HQQ, with scales and zeros in fp16."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    numbers = Numbers()
    for name, linear in block_linears(open_dense(directory)).items():
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        made = HQQLinear(
            linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False
        )
        numbers.weights[name] = made.dequantize().float()
        stored = [
            made.W_q,
            *(part for part in made.meta.values() if isinstance(part, Tensor)),
        ]
        numbers.bytes[name] = sum(part.numel() * part.element_size() for part in stored)
    return numbers


def write_gguf(
    model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """Writes a model as a GGUF file for llama.cpp, matrices in ``dtype``, and returns parameters by GGUF name.

    The file has neither a tokenizer nor the order of rows that llama.cpp computes with. The quantiser needs neither:
    it treats each row by itself. llama.cpp runs such a file at its usual speed, with wrong results.

    Raises:
        ValueError: the architecture is not one of :data:`ARCHITECTURES`.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"no GGUF file is written here for the architecture {config.model_type}"
        )
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    head_dim = (
        getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    parameters = {}
    for name, parameter in model.named_parameters():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ValueError(f"llama.cpp has no name for the parameter {name}")
        parameters[called] = name
        writer.add_tensor(
            called,
            parameter.detach()
            .to(dtype if parameter.dim() > 1 else torch.float32)
            .numpy(),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parameters


@torch.no_grad()
def importance_matrix(directory: Path, windows: Tensor) -> dict[str, Tensor]:
    """The mean squares of the inputs of each linear of the blocks, fp32 ``(in,)``, by the name of its weight.

    Args:
        directory: the dense checkpoint.
        windows: ``(windows, tokens)`` ids of the calibration text.
    """
    model = open_dense(directory)
    sums = {
        name: torch.zeros(linear.get_parameter("weight").shape[1])
        for name, linear in block_linears(model).items()
    }

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        sums[name] += inputs[0].flatten(0, -2).square().sum(0)

    for name, linear in block_linears(model).items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs))
    for ids in windows:
        model(ids[None], use_cache=False, logits_to_keep=1)
    return {name: total / windows.numel() for name, total in sums.items()}


def quantised_gguf(
    source: Path,
    kind: str,
    path: Path,
    threads: int = 1,
    importance: dict[str, Tensor] | None = None,
) -> Path:
    """A GGUF file quantised by llama.cpp as ``path``, which is made where it does not exist.

    Args:
        source: the GGUF file to quantise.
        kind: llama.cpp's name of the mixture of types, such as Q4_K_M.
        path: the file to write.
        threads: CPU threads that quantise.
        importance: mean squares of inputs by the tensor's name in the file.

    Raises:
        ImportError: llama-cpp-py-sync is not installed, whose wheel has llama.cpp compiled.
        RuntimeError: llama.cpp refuses.
    """
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    if path.is_file():
        return path
    interface = get_ffi()
    library = get_lib()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    # from the model's own values, which are what every other row starts from
    settings.allow_requantize = True
    settings.nthread = threads
    kept = []  # what the array points to
    # a name of null ends the array
    entries = interface.new(
        "struct llama_model_imatrix_data[]", len(importance or {}) + 1
    )
    for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
        called = interface.new("char[]", name.encode())
        numbers = interface.new("float[]", values.tolist())
        kept += [called, numbers]
        entry.name = called
        entry.data = numbers
        entry.size = len(values)
    if importance:
        settings.imatrix = entries
    temporary = path.with_suffix(".part")
    pointer = interface.new("llama_model_quantize_params *", settings)
    names = (str(source).encode(), str(temporary).encode())
    if library.llama_model_quantize(*names, pointer) != 0:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")
    temporary.replace(path)
    return path


def gguf_numbers(path: Path, parameters: dict[str, str]) -> Numbers:
    """The matrices of a GGUF file; ``parameters`` are those of :func:`write_gguf`."""
    numbers = Numbers()
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            name = parameters[tensor.name]
            numbers.weights[name] = torch.from_numpy(
                gguf.dequantize(tensor.data, tensor.tensor_type)
            ).clone()
            numbers.bytes[name] = int(tensor.n_bytes)
    return numbers
