"""Banks of adapters with random weights, and what they compute one adapter at a time."""

import torch

import adapterkern as ak

RANKS = {"full": 8, "narrow": 5, "thin": 1}


def random_adapter(units, hidden_size=16, **options):
    adapter = ak.BottleneckAdapter(hidden_size, units, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return adapter


def bank_of(ranks=None, slots=5, hidden_size=16, options=None, **of_bank):
    """A bank with an adapter of each of these ranks. options: of all adapters."""
    ranks = RANKS if ranks is None else ranks
    bank = ak.AdapterBank(hidden_size, max(ranks.values(), default=8), slots, **of_bank)
    dtype = bank.down_weights.dtype
    activation = {"activation": bank.activation, "dtype": dtype}
    for name, units in ranks.items():
        bank.add(name, random_adapter(units, hidden_size, **activation | (options or {})))
    return bank


def routed(bank, names, **options):
    """A routing of its own for these names."""
    ids = bank.ids(names)
    tokens = len(names) * options.get("seq_len", 1)
    return ak.AdapterRouting(max(tokens, 1), bank.slots).update(ids, **options)


def one_at_a_time(bank, x, names, skip=None):
    """What a loop over the tokens computes: each adapter called as the module that it is."""
    rows = x if skip is None else x + skip
    of_rows = [
        rows[i : i + 1]
        if name is None
        else bank[name](x[i : i + 1], skip=None if skip is None else skip[i : i + 1])
        for i, name in enumerate(names)
    ]
    return torch.cat(of_rows) if of_rows else rows
