"""Fine-tune BLOOM with LoRA on the fused kernels of `lorakernels`."""
