"""Layer plan, quantization, and the preparation of a runnable model."""
