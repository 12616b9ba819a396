"""From text to batches.

corpus.py           files, folders and names to documents
sources.py          corpora by name, from the network
selection.py        which documents stay: filters.py, near_duplicates.py, weights of a mixture
text_batch.py       words of many documents at once, for filters and near duplicates
tokenizer.py        text to token ids and back
published_tokenizer.py       the tokenizers of published models
transformers_tokenizer.py    our tokenizers as tokenizers of transformers
build.py            documents to a dataset folder
bin_shards.py       token shards of llm.c: read, and written
shards.py           the file format of token ids
dataset.py          open and check a dataset folder        verify.py    check it completely
prepare.py          build a dataset once, cache it         cache.py     the folder of the cache
loader.py           token ids to batches
prefetch.py         read the next batches in a thread
epochs.py           how often a run reads its corpus
"""
