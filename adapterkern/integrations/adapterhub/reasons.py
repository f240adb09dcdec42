"""The reasons why an adapter stays on the library's own path, why a block's norm is a pass of its
own, and why several adapters run one by one, each a code and a sentence."""

REASONS = {
    "phm": "its projections are Kronecker products (Compacter), not linear layers",
    "quantized": "a projection is quantised and must be called to be itself",
    "not_linear": "a projection is not a plain nn.Linear (wrapped, parametrised or replaced)",
    "custom_class": "its class is not one of the library's own, so its forward may differ",
    "gating": "its output is gated by a mean over the sequence",
    "ln_before": "it has a LayerNorm of its own before the down-projection",
    "ln_after": "it has a LayerNorm of its own after the up-projection",
    "dropout": "it drops out while training; in evaluation it runs fused, if by a plain nn.Dropout",
    "stochastic_depth": "it drops whole rows while training; in evaluation it runs fused",
    "activation": "its activation has no fused form",
    "hooks": "hooks or an overridden forward run only where the module itself is called",
    "sharded": "its parameters are sharded, on the meta device or a tensor subclass",
    "device": "its device has no kernels of ours; CPU and CUDA have",
    "fuse": "AdapterFusion mixes the up-projections before their residual is added",
    "gating_scores": "gating scores were asked for, which only the library's path records",
    "shape": "its inputs differ in shape",
    "dtype": (
        "its parameters and its input differ in dtype, which needs torch.autocast; "
        "model.adapter_to(name, dtype=...) converts an adapter"
    ),
    "unpatched": "the model that it belongs to is not patched, unlike others here",
    "export": "the model is being traced or exported, where plain operations are wanted",
}

SAME_PASS = "LayerNorm in the same pass"
NORM_REASONS = {
    "norm_class": "its class is not nn.LayerNorm itself, so its forward may differ",
    "norm_hooks": "hooks or an overridden forward run only where the norm itself is called",
    "norm_parameters": "its parameters are a tensor subclass, or those of a DataParallel replica",
    "norm_numbers": "it normalises another width, or its eps is no float above 0",
    "norm_dtype": "in the adapter's pass its result would have another dtype",
    "norm_unknown": "the block's source does not tell which norm the adapter is given",
    "layer_level": (
        "the library's own code adds up and norms the block: several adapters are active together, "
        'residual_before_ln="post_add", or patch(..., layer_level=False)'
    ),
    "no_kernel": "no kernel takes the norm with the adapter here, so PyTorch's own follows",
}

SAME_LAUNCH = "one launch for all"
GROUP_REASONS = {
    "nested": "a child of the composition is itself one",
    "child": "another adapter of the composition runs on the library's path",
    "differ": "the adapters differ in class, activation, dtype, device or biases",
    "scaling": "a learned scaling has a value for each feature, or widens the result",
    "one_by_one": "no kernel here takes several adapters at once",
}
