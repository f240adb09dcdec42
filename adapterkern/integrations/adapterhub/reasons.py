"""The reasons why an adapter stays on the library's own path, each a code and a sentence."""

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
