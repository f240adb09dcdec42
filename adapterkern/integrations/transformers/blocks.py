"""The forwards that take the place of those of transformers, each told by its source.

A forward here does what the one that it replaces does, but that the adapted layer returns its
output h without the adapter, and adapter, residual add and norm run as one pass over h. Where a
site has no such pass, `Pass` runs the model's own parts one after another, and where no site of a
block has one, the class's forward runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from adapterkern.integrations.transformers.sites import Pass, Placed, Site, prepare, report


class Record(NamedTuple):
    """What `fuse_norms` found out about one block."""

    block: str  # a name in BLOCKS
    names: tuple[str, ...]  # of the arguments of the forward that is replaced
    defaults: dict[str, Any]
    placed: tuple[Placed | None, ...]  # a site each; None: it is left as it is


# At module level, with the block as an argument and not bound to it: what an instance holds is a
# `functools.partial` of this function, which deepcopy, pickle and torch.compile follow.
def run(block: Any, record: Record, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block with fused sites."""
    kind = BLOCKS[record.block]
    passes = [
        prepare(block, placed, site) for placed, site in zip(record.placed, kind.sites, strict=True)
    ]
    fused = any(one.adapter is not None for one in passes)
    # The old name of an argument, which a decorator in transformers 4 translates.
    if not fused or len(args) > len(record.names) or "past_key_value" in kwargs:
        return type(block).forward(block, *args, **kwargs)
    given = dict(zip(record.names, args, strict=False))
    return kind.forward(block, *passes, **{**record.defaults, **given, **kwargs})


def _post_norm(block: Any, site: Pass, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    with site.deferred():
        h = block.dense(hidden_states)
    return site.normed(h, input_tensor)  # a site with active dropout has no pass


def _mpnet(block: Any, site: Pass, hidden_states: Tensor, **arguments: Any) -> Any:
    with site.deferred():
        outputs = block.attn(hidden_states, **arguments)
    return site.normed(outputs[0], hidden_states), *outputs[1:]


def _distilbert_4(
    block: Any, attention: Pass, feed_forward: Pass, x: Tensor, attn_mask: Any = None,
    head_mask: Any = None, output_attentions: bool = False,
) -> Any:  # fmt: skip
    with attention.deferred():
        h, *weights = block.attention(
            query=x, key=x, value=x, mask=attn_mask, head_mask=head_mask,
            output_attentions=output_attentions,
        )  # fmt: skip
    x = attention.normed(h, x)
    with feed_forward.deferred():
        h = block.ffn(x)
    x = feed_forward.normed(h, x)
    return (*weights, x) if output_attentions else (x,)


def _distilbert_5(
    block: Any, attention: Pass, feed_forward: Pass, hidden_states: Tensor, **arguments: Any
) -> Tensor:
    with attention.deferred():
        h, _ = block.attention(hidden_states, **arguments)
    x = attention.normed(h, hidden_states)
    with feed_forward.deferred():
        h = block.ffn(x)
    return feed_forward.normed(h, x)


def _llama(
    block: Any, attention: Pass, feed_forward: Pass, hidden_states: Tensor, **arguments: Any
) -> Tensor:
    normed = block.input_layernorm(hidden_states)
    with attention.deferred():
        h, _ = block.self_attn(hidden_states=normed, **arguments)
    normed, stream = attention.add_and_norm(h, hidden_states)
    with feed_forward.deferred():
        h = block.mlp(normed)
    return feed_forward.add(h, stream)


def _gpt2(
    block: Any, attention: Pass, feed_forward: Pass, hidden_states: Tensor,
    encoder_hidden_states: Tensor | None, encoder_attention_mask: Tensor | None, **arguments: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    normed = block.ln_1(hidden_states)
    with attention.deferred():
        h, weights = block.attn(normed, **arguments)
    normed, stream = attention.add_and_norm(h, hidden_states)
    with feed_forward.deferred():
        h = block.mlp(normed)
    return feed_forward.add(h, stream), weights


def _gpt2_5(block: Any, *passes: Any, **arguments: Any) -> Any:
    if arguments["encoder_hidden_states"] is not None:
        report("cross-attention stands between the adapter behind attention and its norm")
        return type(block).forward(block, **arguments)
    return _gpt2(block, *passes, **arguments)[0]


def _gpt2_4(block: Any, *passes: Any, **arguments: Any) -> Any:
    if arguments["encoder_hidden_states"] is not None:
        return _gpt2_5(block, *passes, **arguments)
    stream, weights = _gpt2(block, *passes, **arguments)
    return (stream, weights) if arguments["output_attentions"] else (stream,)


def _opt(
    block: Any, attention: Pass, feed_forward: Pass, hidden_states: Tensor, **arguments: Any
) -> tuple[Tensor, Any]:
    normed = block.self_attn_layer_norm(hidden_states)
    with attention.deferred():
        h, weights = block.self_attn(hidden_states=normed, **arguments)
    normed, stream = attention.add_and_norm(_opt_dropout(block, h), hidden_states)
    rows = -1, stream.size(-1)  # the model flattens its tokens for the FFN
    h = block.activation_fn(block.fc1(normed.reshape(rows)))
    with feed_forward.deferred():
        h = block.fc2(h)
    return feed_forward.add(_opt_dropout(block, h), stream.reshape(rows)).view_as(stream), weights


def _opt_dropout(block: Any, h: Tensor) -> Tensor:
    return nn.functional.dropout(h, p=block.dropout, training=block.training)


def _opt_5(block: Any, *passes: Any, use_cache: Any = None, **arguments: Any) -> Tensor:
    return _opt(block, *passes, **arguments)[0]


def _opt_4(
    block: Any, *passes: Any, output_attentions: bool, use_cache: Any, **arguments: Any
) -> Any:
    stream, weights = _opt(block, *passes, output_attentions=output_attentions, **arguments)
    return (stream, weights) if output_attentions else (stream,)


class Block(NamedTuple):
    """A class of blocks: the forward in place of its own, which takes a `Pass` for each site."""

    forward: Callable[..., Any]
    sites: tuple[Site, ...]
    needs: str | None = None  # an attribute that must be true of an instance


_DISTILBERT = (
    Site(("attention", "out_lin"), "sa_layer_norm"),
    Site(("ffn", "lin2"), "output_layer_norm", ("ffn", "dropout")),
)
_GPT2 = (
    Site(("attn", "c_proj"), "ln_2", ("attn", "resid_dropout")),
    Site(("mlp", "c_proj"), None, ("mlp", "dropout")),
)
_OPT = (
    Site(("self_attn", "out_proj"), "final_layer_norm", ("dropout",)),
    Site(("fc2",), None, ("dropout",)),
)
BLOCKS = {
    "post_norm": Block(_post_norm, (Site(("dense",), "LayerNorm", ("dropout",)),)),
    "mpnet": Block(_mpnet, (Site(("attn", "o"), "LayerNorm", ("dropout",)),)),
    "distilbert_4": Block(_distilbert_4, _DISTILBERT),
    "distilbert_5": Block(_distilbert_5, _DISTILBERT),
    "llama": Block(
        _llama,
        (
            Site(("self_attn", "o_proj"), "post_attention_layernorm"),
            Site(("mlp", "down_proj"), None),
        ),
    ),
    "gpt2_4": Block(_gpt2_4, _GPT2),
    "gpt2_5": Block(_gpt2_5, _GPT2),
    "opt_4": Block(_opt_4, _OPT, "do_layer_norm_before"),
    "opt_5": Block(_opt_5, _OPT, "do_layer_norm_before"),
}
