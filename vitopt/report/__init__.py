"""Records in, something to read out: tables, the model card, one self-contained page."""
