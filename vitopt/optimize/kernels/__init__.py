"""Matrix products in Triton with what stands around them in a block; `blocks.py` alone knows models."""
