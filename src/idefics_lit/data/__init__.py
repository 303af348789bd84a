"""Datasets of questions about document pages, and the loaders that batch them."""
