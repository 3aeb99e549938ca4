"""A frozen base spread over the processes of a run, with adapters that are whole on each of them.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers a block before it is used, forward and backward, and
drops it afterwards. The base has no gradients, so nothing else is sent for it. FSDP2 knows nothing of the
adapters, which are megabytes: their gradients are summed as without shards, and a checkpoint is the same.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import BloomForCausalLM

from bloomft.model.base_files import StoredTensors
from bloomft.model.sharded_vocabulary import ShardedEmbedding, rows_of_a_shard
from bloomft.process import return_large_blocks
from bloomft.progress import waiting
from lorakernels import LoRALinear


def shard_base(
    model: BloomForCausalLM, stored: StoredTensors, device: torch.device, *, cpu_offload: bool = False
) -> None:
    """Spread the base of a patched model over all processes and read this one's shards from ``stored``.

    Every parameter but the adapters, which are on ``device``, is on the meta device, in the dtype to train
    in. Each process reads its own rows of each tensor alone. With ``cpu_offload`` the shards of the blocks
    stay in host memory, and are copied to the device whenever a block is gathered.
    """
    if device.type == "cpu":
        return_large_blocks()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    embedding, head = model.transformer.word_embeddings, model.lm_head
    embedding.__class__ = ShardedEmbedding
    vocabulary = cast(nn.Parameter, embedding.weight)
    kept = {parameter for parameter in model.parameters() if parameter.requires_grad}
    kept.add(vocabulary)
    # only memory that a GPU reads by itself has to be pinned
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, ignored_params=kept, offload_policy=policy)
    # the layer norms, and what makes the blocks know of each other
    fully_shard(model, mesh=mesh, ignored_params=kept, offload_policy=policy)
    shards: dict[str, Tensor] = {}
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    size = sum(parameter.nbytes for parameter in frozen.values()) // mesh.size()
    with waiting("reading this process's part of the base,", size, in_bytes=True) as wait:
        for name, parameter in frozen.items():
            shard = _shard(parameter, stored, name, mesh, device)
            shards[name] = shard.cpu() if cpu_offload and parameter is not vocabulary else shard
            wait.advance(held_bytes(shard))
    embedding.weight = head.weight = nn.Parameter(
        shards.pop("transformer.word_embeddings.weight"), requires_grad=False
    )
    model.load_state_dict(shards, strict=False, assign=True)


def is_sharded(model: BloomForCausalLM) -> bool:
    """Whether `shard_base` has spread the base of ``model``."""
    return isinstance(model.transformer.word_embeddings, ShardedEmbedding)


def held_bytes(parameter: Tensor) -> int:
    """The memory that a parameter takes in this process."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes


def whole_stand_in(layer: LoRALinear) -> LoRALinear:
    """A layer with the adapter, shapes and dtypes of ``layer``, and random numbers for a sharded weight."""
    device, generator = layer.lora_a.device, torch.Generator().manual_seed(0)
    weight, bias = (
        None
        if like is None
        else (torch.randn(like.shape, generator=generator) / like.shape[-1] ** 0.5).to(device, like.dtype)
        for like in (layer.weight, layer.bias)
    )
    assert weight is not None
    parts = (layer.lora_a.detach(), layer.lora_b.detach(), layer.scale)
    whole = LoRALinear(weight, bias, *parts, dropout_p=layer.dropout_p, parts=layer.parts)
    whole.backend = layer.backend
    return whole.train(layer.training)


def _shard(
    parameter: Tensor, stored: StoredTensors, name: str, mesh: DeviceMesh, device: torch.device
) -> DTensor:
    """This process's rows of one tensor of the base, as FSDP2 cuts it."""
    rows = rows_of_a_shard(len(parameter), mesh.size())
    first = min(mesh.get_local_rank() * rows, len(parameter))
    mapped = stored.read(name, first, min(first + rows, len(parameter)))
    local = torch.empty(mapped.shape, dtype=parameter.dtype, device=device).copy_(mapped)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
