"""From files to the documents of a dataset.

corpus.py           files, folders and names to documents
sources.py          corpora by name, from the network
selection.py        which documents stay: filters.py, near_duplicates.py, weights of a mixture
text_batch.py       words of many documents at once, for filters and near duplicates
"""
