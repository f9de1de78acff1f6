"""What converting a shard is made of: progress, numbers that are refused, where tensors lie, and the quantizer."""
