"""Fine-tuning: checkpoint and images in, checkpoint out."""
