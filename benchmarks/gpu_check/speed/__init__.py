"""The speed half of gpu_check: every operator, a block and the whole step beside their rivals."""
