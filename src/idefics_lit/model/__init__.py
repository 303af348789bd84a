"""The model: loading, forward, packing, feature cache, CUDA graphs."""
