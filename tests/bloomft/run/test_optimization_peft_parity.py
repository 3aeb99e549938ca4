"""Training follows PEFT's: same base, same adapters, same batches, twenty steps of AdamW in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from bloomft.config.loading import load_config
from bloomft.data.loading import load_data
from bloomft.model.base import load_base, patch_base
from bloomft.model.patch import adapted_layers
from bloomft.run.optimization import make_optimizer, make_scheduler
from tests.bloomft.peft_models import with_peft

STEPS = 20


def test_losses_agree_at_every_step(settings, config_path, base_folder):
    settings["data"].update(packing=False, max_length=24)
    settings["optim"]["scheduler"].update(num_training_steps=STEPS)
    config = load_config(config_path(settings))
    base = load_base(config.model.transformer)
    data = load_data(config.data, base.tokenizer).train
    torch.manual_seed(0)
    ours = patch_base(base, config.model.lora, torch.device("cpu"), torch.float32).train()
    theirs = with_peft(AutoModelForCausalLM.from_pretrained(base_folder)).train()
    for name, layer in adapted_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(layer.lora_a)
        twin.lora_B["default"].weight.data.copy_(layer.lora_b)

    optimizer = make_optimizer(ours, config.optim)
    scheduler = make_scheduler(optimizer, config.optim.scheduler)
    settings = config.optim.optimizer
    their_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    their_scheduler = get_scheduler("linear", their_optimizer, 2, STEPS)
    losses = []
    for index in range(STEPS):
        # Rows of one length, so that no padding enters on either side.
        batch = data.batch(index, 1)
        real = batch["document_ids"][0] == 0
        ids = batch["input_ids"][:, real]
        pair = []
        for model, steps in ((ours, (optimizer, scheduler)), (theirs, (their_optimizer, their_scheduler))):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            for part in steps:
                part.step()
            steps[0].zero_grad()
            pair.append(loss.item())
        losses.append(pair)
        assert pair[0] == pytest.approx(pair[1], rel=1e-4), f"step {index}"
    with torch.no_grad():
        ids = data.batch(0, 1)["input_ids"]
        torch.testing.assert_close(ours.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    worst = max(abs(a - b) / b for a, b in losses)
    print(f"largest relative difference of {STEPS} losses: {worst:.1e}")
    assert adapted_layers(ours)["transformer.h.0.self_attention.query_key_value"].lora_b.abs().max() > 1e-3
