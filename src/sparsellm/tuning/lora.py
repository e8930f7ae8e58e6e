"""LoRA (2106.09685) whose update has the zeros of the weight: ``W + M∘(s·BA)``, with ``M`` the mask of kept weights.

The mask is applied in the forward pass, so the trained update equals the merged one: merging changes logits by rounding
only, and keeps every zero. A plain LoRA would fill all zeros when merged, or change its outputs if masked afterwards.
The cost is that ``BA (out, in)`` is computed in full in each forward. Built on peft: ``pip install 'sparsellm[tune]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError, Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm.errors import MissingExtraError, ModelError, RecipeError, one_line
from sparsellm.model.structure import find_blocks

try:
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper
except ImportError as error:
    raise MissingExtraError(
        "adapters need peft; install it: pip install 'sparsellm[tune]'"
    ) from error

# Other initialisations change the base weight, and its zeros, before training begins.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Variants of LoRA whose update is not the product BA, to which the mask is applied.
_VARIANTS = ("use_dora", "arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config",
             "kasa_config", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_bias",
             "layer_replication", "target_parameters")  # fmt: skip


class MaskedLoraLinear(LoraLinear):
    """peft's LoRA layer, with the update masked; for ``nn.Linear`` and GPT-2's ``Conv1D``."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        base: Any = self.get_base_layer()
        self.fan_in_fan_out = self.is_target_conv_1d_layer = isinstance(base, Conv1D)
        # Not saved, since it follows from the base weight.
        self.register_buffer("kept", base.weight.detach() != 0, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The masked update that is merged, in the shape of the weight."""
        delta = super().get_delta_weight(adapter)
        return delta * self.get_buffer("kept").to(delta.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise RecipeError(
                "a batch that mixes adapters cannot be run with masked LoRA; run one adapter at a time"
            )
        if self.merged and self.disable_adapters:
            self.unmerge()
        base: Any = self.base_layer
        result: Tensor = base(x, *args, **kwargs)
        for adapter in (
            [] if self.merged or self.disable_adapters else self.active_adapters
        ):
            if adapter in self.lora_A:
                delta = self.get_delta_weight(adapter)
                delta = delta.t() if self.fan_in_fan_out else delta
                dropped = self.lora_dropout[adapter](x.to(delta.dtype))
                result = result + nn.functional.linear(dropped, delta).to(result.dtype)
        return result


def masked(config: LoraConfig) -> LoraConfig:
    """A LoRA configuration that keeps zeros; peft does not save this property with the adapter.

    Raises:
        RecipeError: the variant of LoRA, or the initialisation, cannot keep zeros.
    """
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise RecipeError(f"LoRA with {name} cannot keep zeros; leave it out")
    if config.init_lora_weights not in _INITIALISATIONS:
        value, known = config.init_lora_weights, ", ".join(map(repr, _INITIALISATIONS))
        raise RecipeError(
            f"init_lora_weights={value!r} changes the pruned weight itself; choose one of {known}"
        )
    config._register_custom_module(
        {nn.Linear: MaskedLoraLinear, Conv1D: MaskedLoraLinear}
    )
    return config


def add_adapter(
    model: PreTrainedModel,
    config: LoraConfig | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """A pruned model with a fresh masked adapter, ready for ``transformers.Trainer``.

    ``merge_and_unload()`` of the result returns the model with the same zeros and the logits of the adapted model.
    ``config`` None is rank 16 on all linears.

    Raises:
        ModelError: the model is packed, or its blocks share weights.
        RecipeError: the configuration cannot keep zeros, or those of stacked experts.
    """
    masks = masked(
        config
        or LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    )
    return _keeping_zeros(
        model,
        lambda: get_peft_model(model, masks, adapter_name),
        all_linears=config is None,
    )


def load_adapter(
    model: PreTrainedModel, directory: str | Path, *, is_trainable: bool = False
) -> PeftModel:
    """A saved masked adapter on the pruned model that it was trained on.

    Raises:
        ModelError: the model is packed, or its blocks share weights.
        RecipeError: the adapter is not LoRA, or one that cannot keep zeros.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # no such directory, or no JSON
        raise RecipeError(
            f"{directory} holds no adapter that peft reads: {one_line(error)}"
        ) from error
    if not isinstance(config, LoraConfig):
        raise RecipeError(
            f"{directory} holds a {config.peft_type} adapter; only LoRA keeps zeros"
        )
    settings: Any = {"config": masked(config), "is_trainable": is_trainable}
    return _keeping_zeros(
        model, lambda: PeftModel.from_pretrained(model, str(directory), **settings)
    )


def _keeping_zeros(
    model: PreTrainedModel, adapted: Callable[[], Any], *, all_linears: bool = False
) -> PeftModel:
    """What ``adapted`` makes of the model; if it is refused, by peft or because zeros would be filled, the model is put
    back, as far as peft takes its adapters out again. With ``all_linears``, no pruned weights may be left out."""
    if getattr(model, "quantization_method", None) == "sparsellm":
        raise ModelError(
            "a packed model cannot be trained; unpack it with `sparsellm unpack`, train, and pack again"
        )
    named = find_blocks(model)[1].named_parameters() if all_linears else ()
    stacks = (
        w
        for n, w in named
        if w.dim() == 3 or (".experts." in n and not n.endswith(("weight", "bias")))
    )
    if any(
        w.dim() > 1 and w.shape[1] > 1 and bool((w == 0).any()) for w in stacks
    ):  # a convolution's has 1
        raise RecipeError(
            "an adapter on all linears leaves out the stacked experts of this model; take --way full"
        )
    trained, wrapped = (
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        None,
    )
    try:
        wrapped = adapted()
        assert isinstance(wrapped, PeftModel)
        _check_zeros(wrapped)
    except Exception as error:
        if wrapped is not None:
            wrapped.unload()
        for parameter in trained:
            parameter.requires_grad_()
        if isinstance(
            error,
            RecipeError | ModelError | AssertionError | MemoryError | OutOfMemoryError,
        ):
            raise
        raise RecipeError(
            f"peft refuses to adapt this model: {one_line(error)}"
        ) from error
    return wrapped


def _check_zeros(wrapped: PeftModel) -> None:
    """Refuses what peft trains unmasked, and a weight with several adapters, which merge into another model."""
    if any(
        getattr(config, "target_parameters", None)
        for config in wrapped.peft_config.values()
    ):
        raise RecipeError(
            "peft would adapt the stacked experts of this model and fill their zeros; take --way full"
        )
    copied = {
        name: module
        for name, module in wrapped.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    inside = (
        {*find_blocks(wrapped.get_base_model())[1].modules()} if copied else set()
    )  # a head was not pruned
    for name, module in copied.items():
        pruned = inside.intersection(module.original_module.modules())
        if not all(
            bool(child.weight.detach().all())
            for child in pruned
            if isinstance(child, nn.Linear | Conv1D)
        ):
            raise RecipeError(
                f"modules_to_save has {name}, whose zeros would be trained; make it a target instead"
            )
    weights = [
        id(layer.get_base_layer().weight)
        for layer in wrapped.modules()
        if isinstance(layer, MaskedLoraLinear)
    ]
    if len({*weights}) < len(weights):
        raise ModelError(
            "blocks of this model share weights, and each would get an adapter; take --way full"
        )
