"""Kernels for LoRA fine-tuning: fused operations for torch that know nothing of any model."""
