"""Reports made of records: tables, the model card, one self-contained page."""
