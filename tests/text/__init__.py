"""Tests of text sources and token windows."""
