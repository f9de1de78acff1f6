"""What converting a shard is made of: progress, numbers that are refused, readers of tensors, and the quantizer."""
