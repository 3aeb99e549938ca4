"""Are the results on this GPU right? ``python -m benchmarks.gpu_check --out DIR [--seconds N] [--rehearse]``.

Every operator, kernel and the training job against float64, a list of items in processes side by side.
"""
