"""Families of models: where their tokens are and how they are taken out."""
