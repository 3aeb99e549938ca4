"""Compile every Triton kernel for every GPU target without a GPU, and print what the result says.

chips.py holds the targets, launches.py what is compiled, stand_in.py what Triton takes for a GPU,
compilation.py the compilation and the reading of its result, roofline.py the arithmetic beside it,
__main__.py the command `python -m lorakernels.aot`.
"""
