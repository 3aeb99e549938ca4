"""What users and libraries attach to a model works as it does without the patch, or is refused by name."""

import copy
import types

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BloomForCausalLM, BloomModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomBlock, BloomGelu, BloomMLP

from bloomft.model.patch import fuse_bloom, is_patched, patch_bloom, unfuse_bloom, unpatch_bloom
from bloomft.model.peft_format import adapted_layers
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import close, tokens

SCALE = 2.0
BLOCK = "transformer.h.1"
MODULES = [
    "transformer.word_embeddings",
    "transformer.word_embeddings_layernorm",
    BLOCK,
    f"{BLOCK}.input_layernorm",
    f"{BLOCK}.self_attention",
    f"{BLOCK}.self_attention.attention_dropout",
    f"{BLOCK}.self_attention.dense",
    f"{BLOCK}.post_attention_layernorm",
    f"{BLOCK}.mlp",
    f"{BLOCK}.mlp.dense_h_to_4h",
    f"{BLOCK}.mlp.gelu_impl",
    f"{BLOCK}.mlp.dense_4h_to_h",
    "transformer.ln_f",
    "lm_head",
]


def first(value) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def change(value):
    """The same, its tensor 1.5 times as large."""
    return (value[0] * 1.5, *value[1:]) if isinstance(value, tuple) else value * 1.5


def forward_of_its_own(module):
    forward = module.forward
    module.forward = lambda *args, **options: change(forward(*args, **options))


# Each attaches something to a module and returns a list of what it will have seen.
def keep_results(module):
    seen = []
    module.register_forward_hook(lambda _module, _args, result: seen.append(first(result)))
    return seen


def keep_arguments(module):
    seen = []
    module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    return seen


def change_results(module):
    module.register_forward_hook(lambda _module, _args, result: change(result))
    return []


def change_arguments(module):
    module.register_forward_pre_hook(
        lambda _module, args: args if args[0].dtype == torch.long else change(args)
    )
    return []


def change_gradients(module):
    module.register_full_backward_hook(
        lambda _module, inputs, _outputs: tuple(None if value is None else value * 1.5 for value in inputs)
    )
    return []


def change_incoming_gradients(module):
    module.register_full_backward_pre_hook(
        lambda _module, outputs: tuple(None if value is None else value * 1.5 for value in outputs)
    )
    return []


def replace_forward(module):
    forward_of_its_own(module)
    return []


def accelerate_hook(module):
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    return []


ATTACHMENTS = [
    keep_results,
    keep_arguments,
    change_results,
    change_arguments,
    change_gradients,
    change_incoming_gradients,
    replace_forward,
    accelerate_hook,
]


def outcome(model: BloomForCausalLM) -> dict[str, torch.Tensor]:
    """Loss, its gradient for the embeddings, logits in both modes, and generated tokens."""
    ids = tokens(2, 13)
    embeddings = model.transformer.word_embeddings(ids).detach().requires_grad_()
    loss = model.train()(inputs_embeds=embeddings, labels=ids).loss
    loss.backward()
    result = {"loss": loss.detach(), "embeddings": embeddings.grad}
    with torch.no_grad():
        result["training logits"] = model(ids).logits
        result["logits"] = model.eval()(ids).logits
        result["cached"] = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=3)
    return result


def assert_same(model: BloomForCausalLM, plain: BloomForCausalLM) -> None:
    """A patched model with fresh adapters against the plain one; the adapters' gradients follow from dW."""
    expected, actual = outcome(plain), outcome(model)
    assert torch.equal(actual.pop("cached"), expected.pop("cached"))
    for name, value in expected.items():
        close(actual[name], value)
    for name, layer in adapted_layers(model).items():
        close(layer.lora_b.grad, SCALE * plain.get_submodule(name).weight.grad @ layer.lora_a.T, 1e-4)


def patch(model: BloomForCausalLM, **options) -> BloomForCausalLM:
    return patch_bloom(model, r=4, scale=SCALE, **options)


@pytest.mark.parametrize("attach", ATTACHMENTS, ids=lambda attach: attach.__name__)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("patched_first", [False, True])
def test_what_is_attached_to_a_module_works_as_without_the_patch(name, attach, patched_first):
    plain = tiny_model()
    model = copy.deepcopy(plain)
    if patched_first:
        patch(model)
    seen = [attach(one.get_submodule(name)) for one in (model, plain)]
    if not patched_first:
        patch(model)
    assert_same(model, plain)
    # Without logits there is no call of the head, except where it has hooks.
    assert len(seen[0]) == len(seen[1])
    for ours, theirs in zip(*seen, strict=True):
        close(ours.detach(), theirs.detach())


@pytest.mark.parametrize("attach", ATTACHMENTS, ids=lambda attach: attach.__name__)
def test_what_is_attached_to_an_adapted_layer_afterwards_works(attach):
    name = f"{BLOCK}.self_attention.query_key_value"
    plain = tiny_model()
    model = patch(copy.deepcopy(plain))
    for one in (model, plain):
        attach(one.get_submodule(name))
    expected, actual = outcome(plain), outcome(model)
    for key, value in expected.items():
        close(actual[key], value)


def with_class(model: nn.Module, name: str, kind: type) -> None:
    """Makes the module one of a subclass that computes something else."""
    module = model.get_submodule(name)

    def forward(self, *args, **options):
        return change(kind.forward(self, *args, **options))

    module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (BLOCK, BloomBlock),
        (f"{BLOCK}.self_attention", BloomAttention),
        (f"{BLOCK}.mlp", BloomMLP),
        (f"{BLOCK}.mlp.gelu_impl", BloomGelu),
        (f"{BLOCK}.mlp.dense_4h_to_h", nn.Linear),
        (f"{BLOCK}.self_attention.dense", nn.Linear),
        (f"{BLOCK}.self_attention.attention_dropout", nn.Dropout),
        (f"{BLOCK}.input_layernorm", nn.LayerNorm),
        ("lm_head", nn.Linear),
        ("transformer.word_embeddings", nn.Embedding),
    ],
)
def test_a_module_of_a_class_of_its_own_keeps_its_forward(name, kind):
    plain = tiny_model()
    with_class(plain, name, kind)
    model = patch(copy.deepcopy(plain))
    assert type(model.get_submodule(name)) is type(plain.get_submodule(name))
    assert_same(model, plain)
    classes = [type(module) for module in plain.modules()]
    assert [type(module) for module in unpatch_bloom(model).modules()] == classes
    fused = fuse_bloom(copy.deepcopy(plain))
    for key, value in outcome(plain).items():
        close(outcome(fused)[key], value)
    assert [type(module) for module in unfuse_bloom(fused).modules()] == classes


def test_packed_documents_reach_an_attention_of_another_class():
    model = tiny_model()
    with_class(model, f"{BLOCK}.self_attention", BloomAttention)
    patch(model).eval()
    ids = tokens(1, 12)
    packed = model(ids, document_ids=torch.tensor([[0] * 5 + [1] * 7])).logits
    close(packed[:, 5:], model(ids[:, 5:], use_cache=False).logits)


def scaled_scores(model):
    model.get_submodule(f"{BLOCK}.self_attention").inv_norm_factor *= 3


def scaled_bias(model):
    model.get_submodule(f"{BLOCK}.self_attention").beta = 0.25


def parametrized(model):
    nn.utils.parametrizations.spectral_norm(model.lm_head)


def normed_weight(model):
    nn.utils.weight_norm(model.lm_head)


def compiled_mlp(model):
    model.get_submodule(f"{BLOCK}.mlp").compile(backend="eager")


def compiled_attention(model):
    model.get_submodule(f"{BLOCK}.self_attention").compile(backend="eager")


def frozen_layer_norm(model):
    model.get_submodule(f"{BLOCK}.input_layernorm").requires_grad_(False)


@pytest.mark.parametrize(
    "prepare",
    [
        scaled_scores,
        scaled_bias,
        parametrized,
        normed_weight,
        compiled_mlp,
        compiled_attention,
        frozen_layer_norm,
    ],
    ids=lambda prepare: prepare.__name__,
)
@pytest.mark.parametrize("patched_first", [False, True])
def test_settings_of_one_module_count(prepare, patched_first):
    torch._dynamo.reset()
    plain, model = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=False)
    if patched_first:
        patch(model)
    for one in (plain, model):
        torch.manual_seed(3)
        prepare(one)
    if not patched_first:
        patch(model)
    assert_same(model, plain)


def test_dropout_of_one_attention_counts():
    model = patch(tiny_model()).eval()
    ids = tokens(1, 12)
    without = model(ids).logits
    dropout = model.get_submodule(f"{BLOCK}.self_attention.attention_dropout").train()
    dropout.p = 0.9
    torch.manual_seed(1)
    first_time = model(ids).logits
    torch.manual_seed(2)
    assert not torch.equal(model(ids).logits, first_time)
    assert not torch.allclose(first_time, without)


def spread(model):
    places = {name: "cpu" for name, _ in model.transformer.named_children() if name != "h"}
    places = {f"transformer.{name}": place for name, place in places.items()}
    places |= {f"transformer.h.{index}": "cpu" for index in range(2)} | {"lm_head": "cpu"}
    return accelerate.dispatch_model(model, places, force_hooks=True)


def offload(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


def offload_when_called(model):
    return accelerate.cpu_offload_with_hook(model, "cpu")[0]


def hook_of_a_target(model):
    target = model.get_submodule(f"{BLOCK}.self_attention.query_key_value")
    target.register_forward_hook(lambda _module, _args, result: result)


def target_of_another_class(model):
    with_class(model, f"{BLOCK}.self_attention.query_key_value", nn.Linear)


def target_with_its_own_forward(model):
    forward_of_its_own(model.get_submodule(f"{BLOCK}.self_attention.query_key_value"))


def parametrized_target(model):
    nn.utils.parametrizations.weight_norm(model.get_submodule(f"{BLOCK}.self_attention.query_key_value"))


def normed_target(model):
    nn.utils.weight_norm(model.get_submodule(f"{BLOCK}.self_attention.query_key_value"))


def quantized_target(model):
    target = model.get_submodule(f"{BLOCK}.self_attention.query_key_value")
    target.weight = nn.Parameter(target.weight.to(torch.int8), requires_grad=False)


def wrapped_tensor(model):
    target = model.get_submodule(f"{BLOCK}.self_attention.query_key_value")
    target.weight = nn.Parameter(TwoTensor(target.weight.detach(), target.weight.detach().clone()))


def shared_weight(model):
    blocks = model.transformer.h
    blocks[1].self_attention.query_key_value.weight = blocks[0].self_attention.query_key_value.weight


def shared_layer(model):
    blocks = model.transformer.h
    blocks[1].self_attention.query_key_value = blocks[0].self_attention.query_key_value


def adapters_of_peft(model):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["dense"]), model)


def wrapped_block(model):
    model.transformer.h[1] = torch.compile(model.transformer.h[1], backend="eager")


def additional_tensor(model):
    model.get_submodule(f"{BLOCK}.mlp").register_buffer("mask", torch.ones(1))


def trunk_of_another_class(model):
    with_class(model, "transformer", BloomModel)


def model_of_another_class(model):
    model.__class__ = type("MyBloom", (BloomForCausalLM,), {})


def trunk_with_its_own_bias(model):
    model.transformer.build_alibi_tensor = types.MethodType(lambda *args, **options: None, model.transformer)


REFUSED = {
    spread: "model: its forward",
    offload: "model.*: its forward",
    offload_when_called: "model: its forward",
    hook_of_a_target: rf"'{BLOCK}.self_attention.query_key_value' .* hooks",
    target_of_another_class: rf"'{BLOCK}.self_attention.query_key_value' .*MyLinear",
    target_with_its_own_forward: rf"'{BLOCK}.self_attention.query_key_value' .*forward",
    parametrized_target: "h.1.self_attention.query_key_value.parametrizations",
    normed_target: "h.1.self_attention.query_key_value.weight_[gv] is not a tensor of BLOOM's",
    quantized_target: rf"'{BLOCK}.self_attention.query_key_value' .*int8",
    wrapped_tensor: rf"'{BLOCK}.self_attention.query_key_value' .*TwoTensor",
    shared_weight: r"shared: .*h\.0\.self_attention.* and .*h\.1\.self_attention",
    shared_layer: r"shared: .*h\.0\.self_attention.* and .*h\.1\.self_attention",
    adapters_of_peft: r"h\.0\.self_attention\.dense\..* is not a tensor of BLOOM's",
    wrapped_block: r"h\.1\._orig_mod\..* is not a tensor of BLOOM's",
    additional_tensor: r"h\.1\.mlp\.mask is not a tensor of BLOOM's",
    trunk_of_another_class: "model.transformer: expected exactly a BloomModel, got MyBloomModel",
    model_of_another_class: "model: expected exactly a BloomForCausalLM, got MyBloom",
    trunk_with_its_own_bias: "model.transformer: its build_alibi_tensor",
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda prepare: prepare.__name__)
def test_what_cannot_be_kept_is_refused_by_name_and_left_alone(prepare):
    model = tiny_model()
    model = prepare(model) or model
    before = [(type(module), module.training) for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=REFUSED[prepare]) as caught:
        patch(model)
    assert "\n" not in str(caught.value)
    assert not is_patched(model)
    assert [(type(module), module.training) for module in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


@pytest.mark.parametrize("prepare", [spread, offload, offload_when_called], ids=lambda p: p.__name__)
def test_a_patched_model_may_be_spread_afterwards(prepare):
    plain = tiny_model().eval()
    model = patch(copy.deepcopy(plain)).eval()
    model = prepare(model) or model
    ids = tokens(2, 13)
    with torch.no_grad():
        expected, actual = plain(ids, labels=ids), model(ids, labels=ids)
    close(actual.logits, expected.logits)
    close(actual.loss, expected.loss)


@pytest.mark.parametrize(
    "prepare", [spread, offload, trunk_of_another_class, model_of_another_class], ids=lambda p: p.__name__
)
def test_fusing_refuses_the_same_models(prepare):
    model = tiny_model()
    model = prepare(model) or model
    with pytest.raises((TypeError, ValueError), match=REFUSED[prepare]):
        fuse_bloom(model)


def test_patching_draws_nothing_but_its_adapters():
    torch.manual_seed(7)
    layers = adapted_layers(patch(tiny_model())).values()
    torch.manual_seed(0)
    tiny_model()
    for layer in layers:
        expected = torch.empty_like(layer.lora_a)
        nn.init.kaiming_uniform_(expected, a=5**0.5)
        assert torch.equal(layer.lora_a, expected)
