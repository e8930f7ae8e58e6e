"""sparsepack_vllm: vLLM runs checkpoints that ``sparsellm pack`` wrote.

Nothing has to be called: vLLM finds ``register`` by the entry point ``vllm.general_plugins``, in each of its
processes.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Makes ``quant_method: sparsellm`` known to vLLM; a second call changes nothing."""
    import sparsepack_vllm.quantization  # noqa: F401  (it registers itself)
