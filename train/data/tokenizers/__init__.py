"""From text to token ids and back.

tokenizer.py           the tokenizers that a run can name or learn
published.py           the tokenizers of published models
_definition.py         the content of their tokenizer.json
continuation.py        the ids of a text that continues another one
for_transformers.py    our tokenizers as tokenizers of transformers
"""
