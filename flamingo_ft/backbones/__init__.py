"""The two frozen backbones: OpenCLIP towers and causal language models, their quantization and identity."""
