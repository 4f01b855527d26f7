"""Blocks that nobody gave back."""
