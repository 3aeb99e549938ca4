"""Are the results on this GPU right, and how fast? ``python -m benchmarks.gpu_check --out DIR``.

Every operator, kernel and the training job against float64, a list of items in processes side by side; then
every operator and the whole step beside their rivals, timed alone.
"""
