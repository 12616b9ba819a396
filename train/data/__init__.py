"""From text to batches.

documents/    files, folders and names to documents, and which documents stay
tokenizers/   text to token ids and back

build.py            documents to a dataset folder
bin_shards.py       token shards of llm.c: read, and written
shards.py           the file format of token ids
dataset.py          open and check a dataset folder        verify.py    check it completely
prepare.py          build a dataset once, cache it
loader.py           token ids to batches
prefetch.py         read the next batches in a thread
epochs.py           how often a run reads its corpus
"""
