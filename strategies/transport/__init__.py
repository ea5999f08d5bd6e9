"""Alignment of two releases of a backbone, and fine-tunings carried from one to the other."""
