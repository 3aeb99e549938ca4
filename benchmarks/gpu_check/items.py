"""Every item, the most important first: packed training and BLOOM's shapes, then the rest."""

from benchmarks.gpu_check import attention_items, dense_items, job_items, lora_items, model_items
from benchmarks.gpu_check.pool import Item


def all_items() -> list[Item]:
    """The items in the order in which they start; the long ones of the first group come first."""
    modules = (model_items, job_items, attention_items, lora_items, dense_items)
    return [item for module in modules for item in module.first()] + [
        item for module in modules for item in module.rest()
    ]
