"""From text to batches.

corpus.py     files and folders to documents          tokenizer.py  text to token ids and back
build.py      documents to a dataset folder           shards.py     the file format of token ids
dataset.py    open and check a dataset folder         loader.py     token ids to batches
prefetch.py   read the next batches in a thread       prepare.py    build a dataset once, cache it
"""
