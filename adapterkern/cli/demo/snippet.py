"""The lines of Python that a user pastes to use the adapter that the demo saved."""

import json

COLUMNS = 80
TEXT = "Split a path in two."


def snippet(folder: str, text: str = TEXT) -> str:
    """Code that loads the adapter in `folder` into its base model and prints the label of `text`.

    It needs no indentation, which a prompt would ask to be closed by an empty line, and only public
    libraries, so that it can be taken over into a program. Lines have at most COLUMNS columns.
    """
    return "\n".join(
        [
            "import json, peft, transformers, adapterkern.integrations.peft",
            "from safetensors.torch import load_file",
            *_assignment("folder", folder),
            'task = json.load(open(f"{folder}/task.json"))',
            'head = load_file(f"{folder}/head.safetensors")',
            'tokenizer = transformers.AutoTokenizer.from_pretrained(task["base_model"])',
            'base = transformers.AutoModel.from_pretrained(task["base_model"])',
            "model = peft.PeftModel.from_pretrained(base.float(), folder)",
            f'text = tokenizer({_quoted(text)}, truncation=True, return_tensors="pt")',
            "features = model(**text).last_hidden_state.mean(1)",
            'scores = features @ head["weight"].T + head["bias"]',
            'print(task["labels"][scores.argmax()])',
        ]
    )


def _assignment(name: str, value: str) -> list[str]:
    """A string in one line, or in as many pieces as the columns ask for."""
    line = f"{name} = {_quoted(value)}"
    if len(line) <= COLUMNS:
        return [line]
    pieces, rest = [], value
    while rest:
        size = len(rest)
        while len(f"    {_quoted(rest[:size])}") > COLUMNS:
            size -= 1
        pieces.append(f"    {_quoted(rest[:size])}")
        rest = rest[size:]
    return [f"{name} = (", *pieces, ")"]


def _quoted(text: str) -> str:
    """`text` as a literal of Python; JSON's strings are."""
    return json.dumps(text, ensure_ascii=False)
