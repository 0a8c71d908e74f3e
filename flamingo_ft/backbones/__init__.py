"""The two frozen backbones: OpenCLIP towers and causal language models, their quantization and identity."""

from flamingo_ft.registration import register_now

register_now()  # whoever begins with a backbone has the Flamingo registered too
