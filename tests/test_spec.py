"""adapterkern.spec: what a call is, and what is said about one that is none."""

import pytest
import torch
from eager import tensors

import adapterkern as ak
from adapterkern.spec import TENSOR_NAMES, make_call
from adapterkern.validation import FLOAT_DTYPES, name_of

H, R = 10, 4


def call_of(options=(), dropout=0.0, **arguments):
    settings = {"residual": "input", "skip": None, "activation": "gelu", "scaling": 1.0}
    settings |= {"down_bias": None, "up_bias": None, "dropout": dropout, **dict(options)}
    return make_call(**settings | arguments)


def sizes(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def message(error=ValueError, /, **arguments):
    settings = {name: t.detach() for name, t in tensors((3, 5), H, R, torch.float32).items()}
    with pytest.raises(error) as caught:
        ak.bottleneck_adapter(**settings | arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", ["down_weight", "up_weight"])
def test_a_missing_weight_is_named(name):
    assert message(TypeError, **{name: None}) == f"{name} must be a torch.Tensor, got NoneType."


def test_transposed_weights_are_named_with_a_hint():
    text = message(down_weight=torch.zeros(H, R), up_weight=torch.zeros(R, H))
    assert text == (
        f"down_weight must have shape [R, H] and up_weight [H, R], with H = {H} to match x "
        f"[3, 5, {H}], got [{H}, {R}] and [{R}, {H}].\n"
        "  hint: they use nn.Linear layout (out_features, in_features); these look like their "
        "transposes."
    )
    text = message(down_weight=torch.zeros(H, R))
    assert f"[R, H] = [R, {H}] to match x [3, 5, {H}], got [{H}, {R}].\n" in text
    assert "hint: down_weight uses nn.Linear layout (out_features, in_features); this looks" in text
    assert "hint: up_weight uses nn.Linear layout" in message(up_weight=torch.zeros(R, H))


def test_wrong_weight_shape_names_both_sides_without_the_hint():
    text = message(up_weight=torch.zeros(H, R + 1))
    assert text == (
        f"up_weight must have shape [H, R] = [{H}, {R}] to match x [3, 5, {H}] and "
        f"down_weight [{R}, {H}], got [{H}, {R + 1}]."
    )


def test_wrong_hidden_size_names_x_and_weight():
    text = message(x=torch.zeros(3, H + 2))
    assert f"down_weight must have shape [R, H] = [R, {H + 2}] to match x [3, {H + 2}]" in text


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("down_bias", (H,), f"down_bias must have shape [{R}], got [{H}]."),
        ("down_bias", (R, 1), f"down_bias must have shape [{R}], got [{R}, 1]."),
        ("up_bias", (R,), f"up_bias must have shape [{H}], got [{R}]."),
        ("residual", (5, H), f"residual must have the shape of x, [3, 5, {H}], got [5, {H}]."),
        ("skip", (3, 5, 1), f"skip must have the shape of x, [3, 5, {H}], got [3, 5, 1]."),
        ("scaling", (R,), f"scaling must be a float or a tensor of shape [1] or [{H}], got [{R}]."),
        ("scaling", (), "hint: use scaling.reshape(1)."),
        ("x", (), "x must have shape [..., H], got a 0-dimensional tensor."),
        (
            "down_weight",
            (H,),
            f"down_weight must have shape [R, H] and up_weight [H, R], got [{H}]",
        ),
    ],
)
def test_wrong_shape_names_expectation_and_actual(name, shape, expected):
    assert expected in message(**{name: torch.zeros(shape)})


def test_bottleneck_of_size_zero_is_refused():
    text = message(
        down_weight=torch.zeros(0, H), up_weight=torch.zeros(H, 0), down_bias=None, up_bias=None
    )
    assert "bottleneck_size must be at least 1" in text
    assert "an adapter of size 0 is no adapter; leave it out" in text


def test_hidden_size_zero_is_refused():
    x, down, up = sizes((3, 0), (R, 0), (0, R))
    with pytest.raises(ValueError, match="hidden_size and bottleneck_size must be at least 1"):
        ak.bottleneck_adapter(x, down, up)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=name_of)
@pytest.mark.parametrize("autocast", [False, True])
def test_x_that_is_not_floating_point_is_refused(dtype, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        text = message(x=torch.zeros(3, H, dtype=dtype))
    assert (
        "x must be a floating-point tensor (float32, float16, bfloat16, float64), "
        f"got {name_of(dtype)}." in text
    )


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("x", torch.zeros(3, 5, H).long(), "hint: convert it, as in x.float()."),
        ("x", torch.zeros(3, 5, H + 2), f"hint: both weights are for hidden_size {H};"),
        ("down_bias", torch.zeros(1, R), f"hint: use down_bias.reshape({R})."),
        ("residual", torch.zeros(5, H), "hint: nothing is broadcast; use residual.expand_as(x)."),
        ("skip", torch.zeros(3, 5, 1), "hint: nothing is broadcast; use skip.expand_as(x)."),
        ("skip", torch.zeros(15, H), "hint: use skip.reshape(x.shape)."),
        ("scaling", torch.zeros(1, H), f"hint: use scaling.reshape({H})."),
        ("dropout", 50, "hint: it is a probability: 0.1 drops one element in ten, 0 none."),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_likely_cure_is_named(name, value, hint):
    assert hint in message(**{name: value})


def test_a_cure_is_not_made_up():
    assert "hint" not in message(residual=torch.zeros(2, 5, H))
    assert "hint" not in message(up_bias=torch.zeros(R))
    assert "hint" not in message(x=torch.zeros(3, 5, H, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["x", "up_weight"])
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_layout_without_strides_is_refused(name, layout):
    given = {name: t.detach() for name, t in tensors((3,), H, R, torch.float32).items()}
    ak.bottleneck_adapter(**given)  # the dense call of the same shapes does not vouch for it
    dense = given[name]
    given[name] = (
        dense.to_mkldnn() if layout == "_mkldnn" else dense.to_sparse(layout=getattr(torch, layout))
    )
    with pytest.raises(ValueError, match=rf"{name} must be a dense \(strided\) tensor") as caught:
        ak.bottleneck_adapter(**given)
    assert f"got {layout}.\n  hint: use {name}.to_dense()." in str(caught.value)


def test_dropout_of_another_type_is_a_type_error():
    assert message(TypeError, dropout="x") == "dropout must be a number in [0, 1), got 'x'."


def test_half_precision_weights_do_not_meet_float32_x_outside_autocast():
    text = message(down_weight=torch.zeros(R, H, dtype=torch.bfloat16))
    assert "down_weight is bfloat16 but the computation runs in float32." in text
    assert "adapter.to(torch.float32)" in text
    assert "torch.autocast" in text


def test_float64_parameters_do_not_meet_float32_x():
    assert "up_bias is float64" in message(up_bias=torch.zeros(H, dtype=torch.float64))


@pytest.mark.parametrize("name", ["residual", "skip", "scaling"])
def test_float64_does_not_mix_with_other_types(name):
    shape = (H,) if name == "scaling" else (3, 5, H)
    text = message(**{name: torch.zeros(shape, dtype=torch.float64)})
    assert f"{name} is float64 but the computation runs in float32; float64 does not mix" in text


def test_different_devices_are_all_listed():
    text = message(up_weight=torch.zeros(H, R, device="meta"))
    assert (
        "all tensors must be on one device, got x on cpu, down_weight on cpu, up_weight on meta"
        in text
    )
    assert "hint: adapter.to('cpu')" in text


def test_every_problem_of_a_call_is_reported_at_once():
    text = message(
        up_weight=torch.zeros(R, H),
        down_bias=torch.zeros(1),
        residual=torch.zeros(2, H),
        scaling=torch.zeros(3),
        skip=torch.zeros(3, 5, H, dtype=torch.float64),
        up_bias=torch.zeros(H, device="meta"),
    )
    for problem in ("up_weight must", "down_bias must", "residual must", "scaling must"):
        assert problem in text
    assert "skip is float64" in text
    assert "up_bias on meta" in text


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("x", [1.0], "list"),
        ("down_weight", 3.0, "float"),
        ("up_bias", "zero", "str"),
        ("residual", 1.0, "float"),
        ("skip", [2.0], "list"),
    ],
)
def test_what_must_be_a_tensor_is_named_when_it_is_none(name, value, kind):
    assert message(TypeError, **{name: value}) == f"{name} must be a torch.Tensor, got {kind}."


def test_scaling_of_another_type_is_a_type_error():
    text = message(TypeError, scaling="big")
    assert text == "scaling must be a float or a tensor of shape [1] or [H], got 'big'."


def test_residual_of_another_name_is_refused():
    assert (
        message(residual="output") == "residual must be \"input\", a tensor or None, got 'output'."
    )


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_outside_its_range_is_refused(dropout):
    assert "dropout must be in [0, 1)" in message(dropout=dropout)


def test_unknown_activation_lists_the_known_ones():
    text = message(activation="prelu")
    assert "unknown activation 'prelu'" in text
    assert "gelu_tanh (alias gelu_new)" in text


def test_unknown_backend_lists_the_known_ones():
    text = message(backend="cublas")
    assert text == (
        "unknown backend 'cublas'.\n  hint: known backends are auto, triton, cuda, reference."
    )


def test_a_refused_call_is_refused_again():
    """Nothing of a bad call stays behind in the dispatcher's memory."""
    first, second = (message(up_bias=torch.zeros(R)) for _ in range(2))
    assert first == second


def test_a_good_call_does_not_vouch_for_a_bad_one_of_the_same_size():
    arguments = tensors((3,), H, R, torch.float32, residual=True)
    ak.bottleneck_adapter(**arguments)
    for name, value in (
        ("residual", torch.zeros(2, H)),
        ("residual", torch.zeros(3, H, dtype=torch.float64)),
        ("up_bias", torch.zeros(H, device="meta")),
        ("x", torch.zeros(3, H, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match=name):
            ak.bottleneck_adapter(**{**arguments, name: value})


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=name_of)
def test_float32_master_weights_may_meet_half_precision_x(half):
    arguments = tensors((3,), H, R, torch.float32)
    spec = call_of(**{**arguments, "x": arguments["x"].to(half)}).spec()
    assert spec.compute_dtype == half
    assert "mixed_dtypes" in spec.features


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_mixed_dtypes_is_a_feature_whichever_tensor_differs(name):
    arguments = tensors((3,), H, R, torch.float32, residual=True, skip=True, scaling=H)
    assert "mixed_dtypes" not in call_of(**arguments).features()
    vector = torch.ones(H)
    call = call_of(**arguments)._replace(norm="layer", norm_weight=vector, norm_bias=vector)
    assert "mixed_dtypes" not in call.features()
    call = call._replace(**{name: getattr(call, name).to(torch.bfloat16)})
    assert "mixed_dtypes" in call.features()


def test_autocast_converts_every_smaller_type():
    arguments = tensors((3,), H, R, torch.float32)
    arguments["down_bias"] = arguments["down_bias"].to(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert call_of(**arguments).spec().compute_dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert call_of(**tensors((3,), H, R)).spec().compute_dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"bias", "input_residual"}),
        ({"bias": False}, {"input_residual"}),
        ({"residual": True}, {"bias", "external_residual"}),
        ({"skip": True}, {"bias", "input_residual", "skip"}),
        ({"scaling": 1}, {"bias", "input_residual", "scaling", "learned_scaling"}),
    ],
)
def test_features_name_what_a_call_needs(options, expected):
    assert call_of(**tensors((3,), H, R, **options)).features() == expected


def test_features_name_float_scaling_and_dropout():
    call = call_of(
        {"scaling": 0.5, "residual": None}, dropout=0.1, **tensors((3,), H, R, bias=False)
    )
    assert call.features() == {"scaling", "dropout"}


def test_features_name_the_transform_around_the_call():
    arguments = tensors((3,), H, R, bias=False)
    seen = []

    def look(x):
        seen.append(call_of(**{**arguments, "x": x}).features())
        return x.sum()

    torch.func.grad(look)(arguments["x"])
    with torch.autograd.forward_ad.dual_level():
        look(arguments["x"])
    look(arguments["x"])
    assert seen == [
        {"input_residual", "functorch"},
        {"input_residual", "forward_ad"},
        {"input_residual"},
    ]


def test_spec_ignores_the_number_of_tokens_and_is_hashable():
    specs = {call_of(**tensors(shape, H, R)).spec() for shape in ((3,), (2, 7), ())}
    assert len(specs) == 1
    assert specs.pop().describe() == "H=10 R=4 gelu float64 on cpu, features: bias, input_residual"


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES[:3], ids=name_of)
@pytest.mark.parametrize("residual_dtype", FLOAT_DTYPES[:3], ids=name_of)
def test_output_dtype_is_what_torch_promotes_to(x_dtype, residual_dtype):
    arguments = tensors((3,), H, R, x_dtype, residual=True)
    arguments["residual"] = arguments["residual"].to(residual_dtype)
    expected = (torch.zeros(1, dtype=x_dtype) + torch.zeros(1, dtype=residual_dtype)).dtype
    assert call_of(**arguments).output_dtype == expected
