"""Make Vision Transformers small and fast, and prove what that cost."""

__version__ = "0.1.0"
