"""HTTP inference: requests gathered into batches, decoded beside a model that runs in a process of its own."""
