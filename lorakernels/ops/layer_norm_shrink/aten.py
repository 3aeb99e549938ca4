"""torch's own layer norm, and the shrink as the LoRA linear makes it, one after the other."""

from lorakernels.ops.add_layer_norm.aten import layer_norm
from lorakernels.ops.layer_norm_shrink.reference import Problem, Results, kept_inputs
from lorakernels.ops.lora_linear.aten import wide_product


def forward(problem: Problem) -> Results:
    """h, S, mean and rstd."""
    keep = kept_inputs(problem)
    h, mean, rstd = layer_norm(problem.x, problem.norm_weight, problem.norm_bias, problem.eps)
    dropped = h if keep is None else h * keep
    s = wide_product(dropped, problem.lora_a.T) * (problem.scale / (1 - problem.dropout_p))
    return h, s, mean, rstd
