"""Adapter, residual add and norm of a transformer's blocks in one pass over memory.

    pip install -e ".[peft]"
    python examples/fused_norms.py

A post-LN encoder (BERT) and a pre-LN decoder (Llama), both tiny and random, so that nothing is
downloaded. Real ones come from AutoModel.from_pretrained(...); the two lines with `get_peft_model`
and `fuse_norms` stay as they are.
"""

import copy

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from adapterkern.integrations.peft import BottleneckConfig
from adapterkern.integrations.transformers import explain, fuse_norms, unfuse_norms

WORDS = 100
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def encoder() -> BertForMaskedLM:
    # Dropout stands between an adapter of PEFT and the add: in training, with p > 0, the blocks run
    # the model's own code, with a warning. In evaluation they are fused whatever p is.
    return BertForMaskedLM(
        BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def decoder() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def train(model: PeftModel, steps: int = 10) -> list[float]:
    torch.manual_seed(1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    losses = []
    for _ in range(steps):
        ids = torch.randint(1, WORDS // 2, (4, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    for build in (encoder, decoder):
        torch.manual_seed(0)
        plain = get_peft_model(build(), BottleneckConfig(reduction_factor=4, init="bert")).train()
        fused = copy.deepcopy(plain)
        fuse_norms(fused)
        print(f"{build.__name__}: {explain(fused)}")

        # The same losses, and afterwards the same results.
        losses, expected = train(fused), train(plain)
        apart = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
        print(f"  loss {losses[0]:.4f} to {losses[-1]:.4f}, at most {apart:.0e} from the unfused")
        ids = torch.arange(1, 13).reshape(1, 12)
        with torch.no_grad():
            apart = (fused(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
        print(f"  logits at most {apart:.0e} from the unfused")

        # Nothing but the forwards was replaced: keys, saving and switching are PEFT's.
        assert list(fused.state_dict()) == list(plain.state_dict())
        with fused.disable_adapter(), torch.no_grad():
            base = fused(input_ids=ids).logits
        with plain.disable_adapter(), torch.no_grad():
            print(f"  without adapters equal: {torch.equal(base, plain(input_ids=ids).logits)}")
        unfuse_norms(fused)  # and back again


if __name__ == "__main__":
    main()
