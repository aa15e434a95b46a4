"""Pruning inside the blocks of a vision encoder."""
