"""sparsellm: prune Hugging Face language models after training, globally."""

__version__ = "0.1.0"
