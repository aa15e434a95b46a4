"""Pruning before and inside the text decoder of a multimodal model, or of a model of text."""
