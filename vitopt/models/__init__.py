"""Load and save checkpoints; logical layer names per architecture family."""
