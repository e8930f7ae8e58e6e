"""Publishing of a checkpoint: its model card, and the upload to the Hugging Face hub."""
