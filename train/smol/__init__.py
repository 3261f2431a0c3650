"""A second, larger test model: SmolLM2-135M-Instruct behind a DINOv2 ViT-S/14, taught to see the
scenes of st3-tiny with a projector and low-rank adapters. See docs/second-model.md."""
