"""Runtimes beside torch: a model file is made of a checkpoint, and called."""
