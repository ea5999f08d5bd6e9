"""Alignment of two models by permutations, and fine-tunings that are carried over along it.

What can be permuted (`specification`, `architectures`), what was found (`alignment`), and how far it helps (`diagnostics`).
The algorithms are strategies.
"""
