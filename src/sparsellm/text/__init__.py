"""Turns the text that a user names into windows of token ids."""
