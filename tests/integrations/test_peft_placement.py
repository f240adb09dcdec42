"""Adapters after the FFN alone, and beside it."""

import copy
import json
import logging
import threading

import peft
import pytest
import torch
from families import build, inputs_of
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear, targets

PARALLEL = {"placement": "parallel", "reduction_factor": 2, "activation": "relu", "scaling": 4.0}


@pytest.fixture
def beside():
    """beside(name): a model of a family with a parallel adapter far from the identity."""

    def make(name, **options):
        base = build(name)
        torch.manual_seed(2)
        return peft.get_peft_model(
            base, BottleneckConfig(init="bert", **PARALLEL, **options)
        ).eval()

    return make


def layers(model):
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, BottleneckLinear)}


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def first(output):
    return next(value for value in output.values() if torch.is_tensor(value))


def run(model, name, **options):
    with torch.no_grad():
        return first(model(**inputs_of(name), **options))


def par_bn(adapter, x):
    z = nn.functional.linear(x, adapter.down_proj.weight, adapter.down_proj.bias)
    return 4.0 * nn.functional.linear(z.relu(), adapter.up_proj.weight, adapter.up_proj.bias)


# For each FFN: the module whose output is FFN(x), and that with x as an argument or as its output.
SOURCES = {
    "bert": ("encoder.layer.{}.output.dense", "encoder.layer.{}.output", 1),
    "distilbert": ("transformer.layer.{}.ffn.lin2", "transformer.layer.{}.ffn", 0),
    "dinov2": ("encoder.layer.{}.mlp", "encoder.layer.{}.norm2", None),
    "gpt2": ("transformer.h.{}.mlp", "transformer.h.{}.mlp", 0),
    "llama": ("model.layers.{}.mlp", "model.layers.{}.mlp", 0),
    "modernbert": ("layers.{}.mlp", "layers.{}.mlp_norm", None),
    "opt": (
        "model.decoder.layers.{}.fc2", "model.decoder.layers.{}.final_layer_norm", None
    ),
    "phi3": ("model.layers.{}.mlp", "model.layers.{}.post_attention_layernorm", None),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_parallel_adds_what_par_bn_makes_of_the_ffn_input(beside, name):
    model, plain = beside(name), build(name)
    adapters = [layer.bottleneck_adapter["default"] for layer in layers(model).values()]
    output, source, argument = SOURCES[name]
    for index, adapter in enumerate(adapters):
        kept = []
        read = plain.get_submodule(source.format(index))
        if argument is None:
            read.register_forward_hook(lambda module, args, y, kept=kept: kept.append(y))
        else:
            read.register_forward_pre_hook(
                lambda module, args, kept=kept, argument=argument: kept.append(args[argument])
            )
        plain.get_submodule(output.format(index)).register_forward_hook(
            lambda module, args, y, kept=kept, adapter=adapter: y + par_bn(adapter, kept.pop())
        )
    expected = first(plain(**inputs_of(name)))
    weights = [weight for adapter in adapters for weight in adapter.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    found = first(model(**inputs_of(name)))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, run(build(name), name), atol=1e-3)
    found.square().sum().backward()
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5)


def test_parallel_equals_par_bn_of_the_library(beside):
    adapters = pytest.importorskip(
        "adapters", reason="AdapterHub's library is not installed", exc_type=ImportError
    )
    model, hub = beside("bert"), build("bert")
    adapters.init(hub)
    hub.add_adapter("beside", config="par_bn")
    for index, layer in enumerate(layers(model).values()):
        ours = layer.bottleneck_adapter["default"]
        theirs = hub.encoder.layer[index].output.adapters["beside"]
        theirs.adapter_down[0].load_state_dict(ours.down_proj.state_dict())
        theirs.adapter_up.load_state_dict(ours.up_proj.state_dict())
    hub.set_active_adapters("beside")
    torch.testing.assert_close(run(model, "bert"), run(hub.eval(), "bert"))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_placement_is_saved_and_loads(tmp_path, placement):
    config = BottleneckConfig(placement=placement, init="bert", bottleneck_size=4)
    model = peft.get_peft_model(build("bert"), config).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["placement"] == placement
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
    assert layers(loaded).keys() == layers(model).keys()
    assert torch.equal(run(loaded, "bert"), run(model, "bert"))


def test_configuration_of_before_there_were_placements_loads_as_it_was(tmp_path):
    options = {"target_modules": ["attention.output.dense", "output.dense"], "init": "bert"}
    model = peft.get_peft_model(build("bert"), BottleneckConfig(**options)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["placement"]
    path.write_text(json.dumps(saved))
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
    assert len(layers(loaded)) == 4
    assert torch.equal(run(loaded, "bert"), run(model, "bert"))


@pytest.mark.parametrize(
    ("excluded", "places"),
    [
        (None, {0, 1}),
        (["layer.0.output.dense"], {1}),
        (r".*layer\.0\.output.*", {1}),
    ],
    ids=["none", "list", "expression"],
)
def test_pfeiffer_keeps_what_the_user_excludes(excluded, places):
    config = BottleneckConfig(placement="pfeiffer", exclude_modules=excluded)
    model = peft.get_peft_model(build("bert"), config)
    assert layers(model.get_base_model()).keys() == {
        f"encoder.layer.{index}.output.dense" for index in places
    }


@pytest.mark.parametrize("order", [["after", "beside"], ["beside", "after"], ["beside", "other"]])
def test_parallel_adapters_stack_in_order(beside, order):
    model = beside("bert")
    model.add_adapter("beside", BottleneckConfig(init="bert", **PARALLEL))
    model.add_adapter("other", BottleneckConfig(init="bert", **PARALLEL))
    model.add_adapter("after", BottleneckConfig(init="bert", placement="pfeiffer"))
    for name, weight in model.named_parameters():
        if "up_proj.weight" in name:
            nn.init.normal_(weight, std=0.2)
    model.set_adapter(order)
    plain = build("bert")
    for name, layer in layers(model.get_base_model()).items():
        output = plain.get_submodule(name.removesuffix(".dense"))

        def stacked(module, inputs, y, layer=layer, block=output):
            for one in order:
                adapter = layer.bottleneck_adapter[one]
                y = adapter(y) if one == "after" else y + par_bn(adapter, block.x)
            return y

        output.register_forward_pre_hook(lambda module, args: setattr(module, "x", args[1]))
        plain.get_submodule(name).register_forward_hook(stacked)
    torch.testing.assert_close(run(model, "bert"), run(plain, "bert"))


def test_parallel_adapter_switches_off_and_goes_without_a_trace(beside):
    model = beside("bert")
    adapted, expected = run(model, "bert"), run(build("bert"), "bert")
    assert hooks(model) == 2
    with model.disable_adapter():
        assert torch.equal(run(model, "bert"), expected)
    assert all(layer.reads[1].value is None for layer in layers(model).values())
    model.add_adapter("second", BottleneckConfig(**PARALLEL))
    model.set_adapter("second")  # the identity still
    assert torch.equal(run(model, "bert"), expected)
    model.set_adapter("default")
    assert torch.equal(run(model, "bert"), adapted)
    assert hooks(model) == 2
    model.delete_adapter("second")
    assert hooks(model) == 2
    base = model.unload()
    assert hooks(base) == 0
    assert torch.equal(run(base, "bert"), expected)


def test_deleting_the_last_parallel_adapter_stops_reading(beside):
    model = beside("bert")
    model.add_adapter("after", BottleneckConfig(placement="pfeiffer"))
    model.set_adapter("after")
    model.delete_adapter("default")
    assert hooks(model) == 0
    assert torch.equal(run(model, "bert"), run(build("bert"), "bert"))


def test_first_layer_of_the_ffn_may_have_adapters_too(beside):
    model = beside("bert")
    expected = run(model, "bert")
    model.add_adapter("up", BottleneckConfig(target_modules=["intermediate.dense"]))
    model.set_adapter(["default", "up"])
    assert torch.equal(run(model, "bert"), expected)

    model = peft.get_peft_model(
        build("bert"), BottleneckConfig(target_modules=["intermediate.dense"]), "up"
    )
    torch.manual_seed(2)
    model.add_adapter("default", BottleneckConfig(init="bert", **PARALLEL))
    model.set_adapter(["default", "up"])
    assert torch.equal(run(model.eval(), "bert"), expected)
    for layer in layers(model).values():  # the hook outlives the adapters of that first layer
        assert layer.reads is None or type(layer.reads[0]) is nn.Linear


def test_mixed_batch_reads_each_input_for_its_own_adapter(beside):
    for name in ("bert", "opt"):
        model = beside(name)
        model.add_adapter("after", BottleneckConfig(init="bert", placement="pfeiffer"))
        parallel, base = run(model, name), run(build(name), name)
        model.set_adapter("after")
        after = run(model, name)
        mixed = run(model, name, adapter_names=["after", "default", "__base__"])
        for row, expected in enumerate((after, parallel, base)):
            torch.testing.assert_close(mixed[row], expected[row])


def test_threads_read_their_own_input(beside):
    """Each runs its forward between the first and the last layer of the other's FFN."""
    model = beside("bert")
    inputs = inputs_of("bert")
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(2)]
    with torch.no_grad():
        expected = [first(model(**row)) for row in rows]
    barrier, found = threading.Barrier(2, timeout=60), {}
    for layer in layers(model).values():
        layer.reads[0].register_forward_hook(lambda *_: (barrier.wait(), None)[1])

    def forward(index):
        with torch.no_grad():
            found[index] = first(model(**rows[index]))

    threads = [threading.Thread(target=forward, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))


def test_copy_of_a_parallel_model_is_separate(beside):
    model = beside("bert")
    expected = run(model, "bert")
    twin = copy.deepcopy(model)
    for layer, other in zip(layers(twin).values(), layers(model).values(), strict=True):
        assert layer.reads[0] is not other.reads[0]
        assert layer.reads[1] is not other.reads[1]
    assert torch.equal(run(twin, "bert"), expected)
    for layer in layers(twin).values():
        nn.init.zeros_(layer.bottleneck_adapter["default"].up_proj.weight)
        nn.init.zeros_(layer.bottleneck_adapter["default"].up_proj.bias)
    assert torch.equal(run(twin, "bert"), run(build("bert"), "bert"))
    assert torch.equal(run(model, "bert"), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_parallel_gradients_survive_checkpointing(beside, use_reentrant):
    def gradients(checkpoint):
        model = beside("llama")
        if checkpoint:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.get_base_model().enable_input_require_grads()
        model.train()
        ids = inputs_of("llama")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    pairs = list(zip(gradients(True), gradients(False), strict=True))
    assert len(pairs) == 8
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.thorough
def test_compiled_parallel_model_equals_the_eager_one(beside):
    model = beside("bert")
    inputs = inputs_of("bert")
    expected = first(model(**inputs))
    torch.compiler.reset()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(first(compiled(**inputs)), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_parallel_keeps_half_precision(dtype):
    model = peft.get_peft_model(
        build("llama").to(dtype),
        BottleneckConfig(init="bert", **{**PARALLEL, "scaling": "learned"}),
    )
    outputs = []
    for layer in layers(model).values():
        layer.register_forward_hook(lambda module, args, y: outputs.append(y.dtype))
    ids = inputs_of("llama")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert outputs == [dtype] * 2
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "bert",
            ["attention.output.dense"],
            r"cannot adapt \S+0.attention.output.dense: it is not",
        ),
        (
            "bert",
            ["query"],
            r"cannot adapt .*query.*\n.*in this one: encoder.layer.\*.output.dense",
        ),
        ("bert", "all-linear", "cannot adapt encoder.layer.0.attention.self.query: it is not"),
        (
            "qwen2_moe",
            ["shared_expert.down_proj"],
            r"cannot adapt \S+0.mlp.shared_expert.down_proj",
        ),
    ],
)
def test_parallel_is_refused_where_no_ffn_ends(name, target, message):
    base = build(name)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, BottleneckConfig(placement="parallel", target_modules=target))
    assert not layers(base)
    assert hooks(base) == 0


def test_parallel_takes_the_ffns_that_the_user_names(beside):
    model = beside("bert", target_modules=["1.output.dense"])
    assert layers(model.get_base_model()).keys() == {"encoder.layer.1.output.dense"}


def test_last_layer_alone_is_an_error(beside):
    layer = next(iter(layers(beside("bert")).values()))
    with pytest.raises(RuntimeError, match=r"must read .* \[2, 32\], and got nothing"):
        layer(torch.randn(2, 64))


@pytest.mark.parametrize("placement", ["Pfeiffer", "", None, 1])
def test_unknown_placement_is_refused(placement):
    with pytest.raises(ValueError, match="one of houlsby, pfeiffer, parallel, got"):
        BottleneckConfig(placement=placement)


def test_suffix_that_hits_attention_too_is_logged(caplog):
    targets.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="adapterkern"):
        model = peft.get_peft_model(
            build("bert"), BottleneckConfig(target_modules=["output.dense"])
        )
        assert len(layers(model)) == 4  # as PEFT's rule has it
        for quiet in (
            {"exclude_modules": ["attention.output.dense"]},
            {},
        ):
            suffixes = ["output.dense"] if quiet else ["output.dense", "attention.output.dense"]
            peft.get_peft_model(build("bert"), BottleneckConfig(target_modules=suffixes, **quiet))
    (record,) = caplog.records
    assert record.getMessage() == (
        "adapterkern: target_modules 'output.dense' adapts attention.output.dense too, since PEFT "
        "compares the ends of names; exclude_modules=['attention.output.dense'] leaves them out."
    )
