"""SafeRoPE: rotate what a concept looks like to the heads that see it (arXiv 2604.01826), on any model."""
