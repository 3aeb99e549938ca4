"""LoRALinear: the nn.Module around the lora_linear operator."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakernels.ops.lora_linear import lora_linear
from lorakernels.ops.lora_linear.implementations import select
from lorakernels.ops.lora_linear.problem import DIRECTIONS, Problem
from lorakernels.tolerance import accumulation_dtype


@dataclass(frozen=True)
class RowParts:
    """Which rows of a linear with interleaved outputs [head][part][head_dim] carry a low-rank update.

    A fused attention projection stacks several parts per head, for instance query, key and value. With
    RowParts(16, ("q", "k", "v"), ("q", "v")) only the rows of q and v are adapted: lora_b has those rows
    alone, in the order in which they stand in the weight.

    Attributes:
        heads: number of heads, the outermost dimension of the rows.
        names: the parts of one head in the order in which they are stored.
        chosen: the parts to adapt, any non-empty subset of names.
    """

    heads: int
    names: tuple[str, ...]
    chosen: tuple[str, ...]

    def __post_init__(self) -> None:
        names, chosen = tuple(self.names), tuple(self.chosen)
        if self.heads < 1:
            raise ValueError(f"heads: expected at least 1, got {self.heads}")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names: expected distinct part names, got {names}")
        unknown = [name for name in chosen if name not in names]
        if not chosen or unknown or len(set(chosen)) != len(chosen):
            raise ValueError(f"chosen: expected a non-empty subset of {names}, each part once, got {chosen}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "chosen", tuple(name for name in names if name in chosen))

    def head_dim(self, out_features: int) -> int:
        """Rows of one part of one head; ValueError where out_features does not divide into them."""
        group = self.heads * len(self.names)
        if out_features % group:
            raise ValueError(
                f"parts: expected a multiple of {self.heads} heads x {len(self.names)} parts as rows, "
                f"got {out_features}"
            )
        return out_features // group

    def rows(self, out_features: int) -> Tensor:
        """Indices, ascending, of the chosen rows among out_features: int64 [len(chosen rows)]."""
        grid = torch.arange(out_features).view(self.heads, len(self.names), self.head_dim(out_features))
        return grid[:, [self.names.index(name) for name in self.chosen]].flatten()

    def expand(self, chosen_rows: Tensor, out_features: int) -> Tensor:
        """Chosen rows [C, r] set into all rows [out_features, r], zero elsewhere; differentiable."""
        head_dim, rank = self.head_dim(out_features), chosen_rows.shape[1]
        given = chosen_rows.view(self.heads, len(self.chosen), head_dim, rank)
        absent = given.new_zeros(self.heads, head_dim, rank)
        parts = [given[:, self.chosen.index(n)] if n in self.chosen else absent for n in self.names]
        return torch.stack(parts, dim=1).reshape(out_features, rank)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: y = x·Wᵀ + b + scale·(drop(x)·Aᵀ)·Bᵀ.

    Made by from_linear. The state dict holds weight, bias, lora_a and lora_b; only lora_a and lora_b train.
    With parts, lora_b has the chosen rows only and full_lora_b() gives all of them. Dropout acts in training
    mode alone.

    Attributes:
        dropout_seed: int64 [1] on the layer's device, the seed of every forward's dropout mask, for a caller
            to change in place between steps; None, the default, draws one in each forward.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        *,
        dropout_p: float = 0.0,
        parts: RowParts | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(lora_b)
        self.scale = scale
        self.dropout_p = dropout_p
        self.parts = parts
        self.backend = "auto"
        self.dropout_seed: Tensor | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        scale: float,
        *,
        dropout_p: float = 0.0,
        parts: RowParts | None = None,
        device: torch.device | None = None,
    ) -> "LoRALinear":
        """Wrap linear [K -> N], sharing the storage of its weight and bias.

        lora_a [r, K] is initialised as in the LoRA paper's code (Kaiming uniform, a = sqrt(5)), lora_b [N,
        r], or [chosen rows, r] under parts, with zeros: the update starts at zero. Both are float32 whatever
        the base is, float64 on a float64 base, and on linear's device, or on device where that is given.

        Raises:
            TypeError: linear is no nn.Linear, or not floating point. ValueError: r, scale, dropout_p or parts
                out of bounds; the message names the argument.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected torch.nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        if not weight.is_floating_point():
            raise TypeError(f"linear: expected a floating-point weight, got {weight.dtype}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: expected an integer >= 1, got {r!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
        n, k = weight.shape
        rows = n if parts is None else n // len(parts.names) * len(parts.chosen)
        if parts is not None:
            parts.head_dim(n)
        dtype, device = accumulation_dtype(weight.dtype), device or weight.device
        lora_a = torch.empty(r, k, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        lora_b = torch.zeros(rows, r, dtype=dtype, device=device)
        return cls(weight, linear.bias, lora_a, lora_b, float(scale), dropout_p=dropout_p, parts=parts)

    @property
    def r(self) -> int:
        """The rank of the update."""
        return self.lora_a.shape[0]

    @property
    def in_features(self) -> int:
        """K, as in nn.Linear."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N, as in nn.Linear."""
        return self.weight.shape[0]

    def forward(self, x: Tensor, shrunk: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [..., K] to [..., N]; shrunk as in lora_linear."""
        return lora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_a,
            self.full_lora_b(),
            self.scale,
            dropout_p=self.dropout_p,
            training=self.training,
            backend=self.backend,
            shrunk=shrunk,
            seed=self.dropout_seed if shrunk is None else None,
        )

    @torch.no_grad()
    def prepare(self, rows: int) -> None:
        """Choose what computes inputs of `rows` rows in all, x [..., K] in the weight's dtype, and gradients.

        Without it a new problem is measured in its first forward and its first backward: under torch.compile
        in the middle of a compiled step, and where memory is fullest. One way alone is checked and not timed;
        nothing happens where both choices are known.
        """
        problem = Problem(
            self.weight.new_empty(rows, self.in_features),
            self.weight,
            self.bias,
            self.lora_a,
            self.full_lora_b(),
            self.scale,
            self.dropout_p if self.training else 0.0,
            # a choice does not depend on the mask
            self.weight.new_empty(0, dtype=torch.int64),
        )
        for direction in DIRECTIONS:
            select(problem, self.backend, direction)

    def full_lora_b(self) -> Tensor:
        """lora_b with a row for every output [N, r]; under parts the rows that were not chosen are zero."""
        return self.lora_b if self.parts is None else self.parts.expand(self.lora_b, self.out_features)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scale·B·A, [N, K], in at least float32."""
        wide = accumulation_dtype(self.lora_a.dtype)
        return self.scale * (self.full_lora_b().to(wide) @ self.lora_a.to(wide))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain nn.Linear, the update added to a copy of the weight in float32 and rounded once."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        delta = self.delta_weight()
        merged = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)
        linear.weight = nn.Parameter(merged, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        text += f", r={self.r}, scale={self.scale}, dropout_p={self.dropout_p}"
        if self.parts is not None:
            text += f", parts={'+'.join(self.parts.chosen)} of {self.parts.heads} heads"
        return text
