"""Corpora, and token windows packed from them. Nothing here loads a model."""
