"""From text to token ids and back.

tokenizer.py                 the tokenizers that a run can name or learn
published_tokenizer.py       the tokenizers of published models
transformers_tokenizer.py    our tokenizers as tokenizers of transformers
"""
