"""Corpora: texts without labels, read as a stream, tokenized once, and kept in memory-mapped shards.

`open_corpus` checks paths, `tokenized` writes Megatron's `.bin`/`.idx` pairs, `Shards` reads them, `open_shards` also those
that others wrote. No torch here.
"""

from graftkit.data.corpora.corpus import Corpus as Corpus
from graftkit.data.corpora.corpus import open_corpus as open_corpus
from graftkit.data.corpora.sentences import split_sentences as split_sentences
from graftkit.data.corpora.shards import Shards as Shards
from graftkit.data.corpora.shards import open_shards as open_shards
from graftkit.data.corpora.tokenizing import tokenized as tokenized
