"""Text in, trained GPT out: tokenizers, token shards, the training loop, checkpoints and the recipes that configure them."""

if "." not in __name__:
    raise ImportError(
        "this folder is part of the package 'tritium': write 'import tritium.train', not 'import train'"
    )
