"""Accuracy, latency, memory, and the statistics that compare them."""
